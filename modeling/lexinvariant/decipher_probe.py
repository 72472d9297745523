"""Reading a substitution cipher out of a lexinvariant language model (arXiv 2305.16349, section 3.3).

A model that is blind to what symbols are called has to find out what they are. How far it does is read from its last
hidden states by a small network that is trained on enciphered text, each sequence with a cipher of its own, and that
sees nothing but hidden states.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from .evaluation import evaluating, in_batches, random_relabelling
from .modeling_lexinvariant import check_symbols
from .symbolic_tasks import Cipher

_FORMAT = "lexinvariant decipher probe"


class DecipherHead(nn.Module):
    """Hidden states (…, hidden_size) to logits (…, vocab_size) of the plain symbols: a two-layer MLP, then products
    with a trained row for every plain symbol."""

    def __init__(self, hidden_size: int, vocab_size: int, width: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, width)
        self.down_proj = nn.Linear(width, hidden_size)
        self.plain_rows = nn.Parameter(torch.randn(vocab_size, hidden_size) * hidden_size**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.plain_rows.dtype)
        return self.down_proj(functional.relu(self.up_proj(hidden))) @ self.plain_rows.T


@dataclass(frozen=True)
class Decipherment:
    """What a probe says of ciphertexts under one key.

    Attributes:
        symbols: int64 (symbols,), the different cipher symbols, in the order of the vocabulary.
        counts: int64 (windows, symbols), how often each occurs in each window of all sequences.
        votes: int64 (windows, symbols, vocab_size), how often each plain symbol was the likeliest for it.
        posterior: float32 (windows, symbols, vocab_size), means of the plain symbols' probabilities over the places
            where the cipher symbol stands; 0 where there are none.
    """

    symbols: Tensor
    counts: Tensor
    votes: Tensor
    posterior: Tensor

    @property
    def key(self) -> dict[int, int]:
        """Cipher symbol to plain symbol, by the votes of all places."""
        weights = self.counts[..., None] / self.counts.sum(0)[:, None]
        return self._key(self.counts.sum(0), self.votes.sum(0), (self.posterior * weights).sum(0))

    @property
    def window_keys(self) -> list[dict[int, int]]:
        """The key by the votes of each window alone, of the symbols that occur in it."""
        return [self._key(*window) for window in zip(self.counts, self.votes, self.posterior)]

    def _key(self, counts: Tensor, votes: Tensor, posterior: Tensor) -> dict[int, int]:
        # Mean probabilities, below 1, decide between equal votes.
        plain = (votes + posterior.double() / 2).argmax(-1)
        return {int(symbol): int(plain[i]) for i, symbol in enumerate(self.symbols) if counts[i]}

    def precision(self, true_key: Cipher | Mapping[int, int]) -> float:
        """Share of the cipher symbols whose plain symbol is right in `key`."""
        return _precision(self.key, true_key)

    def window_precision(self, true_key: Cipher | Mapping[int, int]) -> list[float]:
        """The same of each window's key: it rises as the context grows."""
        return [_precision(key, true_key) for key in self.window_keys]


def _precision(key: dict[int, int], true_key: Cipher | Mapping[int, int]) -> float:
    """true_key: a cipher, or cipher symbols to plain symbols."""
    if isinstance(true_key, Cipher):
        true_key = dict(enumerate(true_key.inverse.tolist()))
    missing = [symbol for symbol in key if symbol not in true_key]
    if missing:
        raise ValueError(f"the true key has no plain symbol for the cipher symbols {missing[:5]}")
    return sum(plain == true_key[symbol] for symbol, plain in key.items()) / len(key)


class DecipherProbe:
    """A frozen lexinvariant language model with a trained head that names plain symbols.

    Attributes:
        model: a `LexinvariantForCausalLM` or `LexinvariantModel`.
        head: a `DecipherHead`.
    """

    def __init__(self, model, head: DecipherHead):
        config, rows = model.config, head.plain_rows
        if rows.shape[1] != config.hidden_size:
            raise ValueError(
                f"the head reads {rows.shape[1]} numbers, but the model's hidden_size is {config.hidden_size}"
            )
        self.model, self.head = model, head.to(model.device)

    @classmethod
    def fit(
        cls,
        model,
        corpus_ids: Tensor,
        *,
        steps: int = 10_000,
        sequence_length: int = 512,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        width: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
    ) -> DecipherProbe:
        """Trains a head on a corpus of plain text; the model stays as it is.

        Every sequence is enciphered with a key of its own and read with a table of its own. The target is the plain
        symbol that the current one stands for. Adam; the learning rate falls to 0 along a cosine.

        Args:
            model: a `LexinvariantForCausalLM` or `LexinvariantModel`.
            corpus_ids: int64 (symbols,), or (texts, symbols): sequences are windows of them.
            steps, batch_size: number of steps, and sequences in each; the paper takes 10,000 steps.
            sequence_length: symbols in a sequence.
            width: of the MLP, by default four times the hidden size.
            generator: of windows, keys and tables.
            progress: whether to show a progress bar.

        Raises:
            ValueError: a corpus shorter than a sequence, symbols outside the vocabulary.
        """
        corpus = torch.atleast_2d(corpus_ids)
        config = model.config
        check_symbols(corpus, None, config.vocab_size)
        spare = corpus.shape[1] - sequence_length
        if not len(corpus) or spare < 0 or min(steps, sequence_length, batch_size) < 1:
            raise ValueError(
                f"steps, batch_size and sequence_length must be at least 1, and the corpus as long as a sequence of "
                f"{sequence_length}; found {steps}, {batch_size} and a corpus of {tuple(corpus_ids.shape)}"
            )
        probe = cls(model, DecipherHead(config.hidden_size, config.vocab_size, width or 4 * config.hidden_size))
        optimizer = torch.optim.Adam(probe.head.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        bar = tqdm(range(steps), desc="decipher probe", disable=not progress)
        for _ in bar:
            texts = torch.randint(len(corpus), (batch_size, 1), generator=generator)
            starts = torch.randint(spare + 1, (batch_size, 1), generator=generator)
            plain = corpus[texts, starts + torch.arange(sequence_length)]
            keys = [random_relabelling(config.vocab_size, config.exempt_token_ids, generator) for _ in plain]
            enciphered = torch.stack(keys).gather(1, plain)
            tables = torch.randint(-(2**63), 2**63 - 1, (batch_size,), generator=generator)
            hidden = probe.hidden_states(enciphered, lex_seeds=tables)
            loss = functional.cross_entropy(probe.head(hidden).flatten(0, 1), plain.to(hidden.device).flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        return probe

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None, lex_seeds: Tensor | None = None):
        """All that a head sees: (batch, length, hidden_size), behind the final norm, without gradients."""
        device = self.model.device
        with evaluating(self.model):
            arguments = {"attention_mask": attention_mask, "lex_seeds": lex_seeds}
            given = {name: value.to(device) for name, value in arguments.items() if value is not None}
            return self.model.base_model(input_ids.to(device), use_cache=False, **given).last_hidden_state

    @torch.no_grad()
    def decipher(
        self,
        ciphertext: Tensor,
        window: int = 100,
        *,
        attention_mask: Tensor | None = None,
        lex_seeds: Tensor | None = None,
        batch_size: int = 16,
    ) -> Decipherment:
        """Votes and probabilities of plain symbols in windows of the context (arXiv 2305.16349, figures 4 and 5).

        Args:
            ciphertext: int64 (length,) or (sequences, length), all under one key: their votes are added up.
            window: length of a window; the last one also holds what is left behind it.
            attention_mask: the shape of `ciphertext`, 0 at padding.
            lex_seeds: int64 (sequences,), the model's tables; by default `0, 1, ...`.
            batch_size: sequences at a time.

        Raises:
            ValueError: no symbols, or symbols outside the vocabulary.
        """
        ids = torch.atleast_2d(ciphertext).cpu()
        mask = torch.ones_like(ids) if attention_mask is None else torch.atleast_2d(attention_mask).cpu()
        check_symbols(ids, mask, self.model.config.vocab_size)
        real = mask.bool()
        if mask.shape != ids.shape or not real.any() or window < 1:
            raise ValueError(
                f"window must be at least 1, and the ciphertext and its mask of one shape with real symbols; found "
                f"{window}, {tuple(ids.shape)} and {tuple(mask.shape)}"
            )
        symbols = ids[real].unique()
        windows = max(1, int(real.sum(1).max()) // window)
        places = ((real.cumsum(1) - 1) // window).clamp(max=windows - 1)
        cells = places * len(symbols) + torch.searchsorted(symbols, ids).clamp(max=len(symbols) - 1)
        size, vocab_size = windows * len(symbols), len(self.head.plain_rows)
        counts = torch.zeros(size, dtype=torch.int64).index_add(0, cells[real], torch.ones_like(cells[real]))
        votes = torch.zeros(size, vocab_size, dtype=torch.int64)
        posterior = torch.zeros(size, vocab_size)
        seeds = torch.arange(len(ids)) if lex_seeds is None else lex_seeds.cpu()
        parts = {"input_ids": ids, "attention_mask": mask, "lex_seeds": seeds}
        for part, own in zip(
            in_batches(parts, batch_size, "cpu"), zip(real.split(batch_size), cells.split(batch_size))
        ):
            probabilities = self.head(self.hidden_states(**part)).float().softmax(-1).cpu()[own[0]]
            cell = own[1][own[0]]
            posterior.index_add_(0, cell, probabilities)
            likeliest = probabilities.argmax(-1)
            votes.index_put_((cell, likeliest), torch.ones_like(cell), accumulate=True)
        posterior /= counts.clamp(min=1)[:, None]
        shape = (windows, len(symbols))
        return Decipherment(symbols, counts.view(shape), votes.view(*shape, -1), posterior.view(*shape, -1))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the head, as one safetensors file; the model is not part of it."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            tensors = {name: tensor.contiguous().cpu() for name, tensor in self.head.state_dict().items()}
            save_file(tensors, partial, metadata={"format": _FORMAT})
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()

    @classmethod
    def load(cls, path: str | os.PathLike, model) -> DecipherProbe:
        """A saved head on the model that it was trained with.

        Raises:
            ValueError: the file holds something else, or a head for another hidden size.
        """
        try:
            with safe_open(path, "pt") as file:
                found = (file.metadata() or {}).get("format")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        if found != _FORMAT:
            raise ValueError(f"{path} holds no decipher probe; found the format {found!r}")
        (vocab_size, hidden_size), width = tensors["plain_rows"].shape, len(tensors["up_proj.weight"])
        head = DecipherHead(hidden_size, vocab_size, width)
        head.load_state_dict(tensors)
        return cls(model, head)
