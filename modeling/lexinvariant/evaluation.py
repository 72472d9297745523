"""Measures of language models whose symbols have no fixed meaning: perplexity by length of the context, and how far
outputs follow a change of the symbols' names.

All of them also take any other causal language model of transformers, such as a standard twin.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@contextlib.contextmanager
def evaluating(model) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model trains again if it did before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def greedy_continuation(
    model, input_ids: Tensor, length: int, attention_mask: Tensor | None = None, **model_kwargs
) -> Tensor:
    """The likeliest next symbol, `length` times over.

    No symbol ends the text: where names mean nothing, the end-of-text symbol is one of many.

    Args:
        input_ids, attention_mask: (batch, prompt), padded on the left.
        model_kwargs: further arguments of the model, such as `lex_seeds`.

    Returns:
        int64 (batch, length), without the prompt.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if length == 1:
        output = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=1, **model_kwargs)
        return output.logits[:, -1:].argmax(-1)
    output = model.generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=length,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=False,
        **model_kwargs,
    )
    return output[:, input_ids.shape[1] :]


def in_batches(tensors: dict, batch_size: int, device: torch.device | str) -> Iterator[dict]:
    """Slices of the tensors, all of the same length, on `device`; what is not a tensor is repeated."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; found {batch_size}")
    count = next(len(value) for value in tensors.values() if isinstance(value, Tensor))
    for start in range(0, count, batch_size):
        yield {
            name: value[start : start + batch_size].to(device) if isinstance(value, Tensor) else value
            for name, value in tensors.items()
        }


# --- perplexity by position -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PositionCurve:
    """Perplexity against the length of the context.

    Attributes:
        context: int64 (points,), number of symbols read before the first one of each window: 1, 2, ...
        perplexity: float64 (points,); `vocab_size` is what guessing gives.
        losses: float64 (longest context,), mean loss in nats behind 1, 2, ... symbols.
        counts: int64 (longest context,), over how many sequences.
        window: number of symbols in a window.
    """

    context: Tensor
    perplexity: Tensor
    losses: Tensor
    counts: Tensor
    window: int

    def between(self, start: int, stop: int) -> float:
        """Perplexity of the predictions made at the positions start, ..., stop - 1, counted from 0: those behind
        start + 1, ..., stop symbols."""
        losses, counts = self.losses[start:stop], self.counts[start:stop]
        if not 0 <= start < stop or not counts.sum():
            raise ValueError(f"no predictions between the positions {start} and {stop}; there are {len(self.losses)}")
        return math.exp(float((losses * counts).sum() / counts.sum()))


def position_curve(
    model,
    ids: Tensor,
    window: int = 100,
    *,
    attention_mask: Tensor | None = None,
    lex_seeds: Tensor | None = None,
    num_tables: int = 1,
    average: str = "loss",
    batch_size: int = 16,
) -> PositionCurve:
    """Perplexity against the length of the context: exp of the mean loss in a moving window (arXiv 2305.16349,
    section 3.2, with 100 sequences of 512 symbols).

    A window lies in one sequence, behind at least one symbol of it. Where the read-out is collapsed, nothing of the
    size of the vocabulary is computed.

    Args:
        model: a `LexinvariantForCausalLM`, or another causal language model.
        ids: int64 (sequences, length).
        window: number of predictions over which a point of the curve is averaged.
        attention_mask: (sequences, length), 0 at padding; contexts are counted from the first real symbol.
        lex_seeds: int64 (sequences,), the tables of the sequences. By default `0, 1, ...`, a different one for each.
        num_tables: over how many tables probabilities are averaged.
        average: "loss", of all predictions in a window of all sequences, or "perplexity", which averages the
            perplexities of the sequences that fill the window, and weighs the worst most.

    Raises:
        ValueError: ids of another shape, no sequence as long as a window, unknown `average`.
    """
    if average not in ("loss", "perplexity"):
        raise ValueError(f"average must be 'loss' or 'perplexity'; found {average!r}")
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"ids must have the shape (sequences, length), length at least 2; found {tuple(ids.shape)}")
    if window < 1:
        raise ValueError(f"window must be at least 1; found {window}")
    if attention_mask is None:
        attention_mask = torch.ones_like(ids)
    if attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape {tuple(ids.shape)}; found {tuple(attention_mask.shape)}")
    arguments: dict = {"input_ids": ids, "attention_mask": attention_mask}
    if hasattr(model, "token_losses"):
        arguments["lex_seeds"] = torch.arange(len(ids)) if lex_seeds is None else lex_seeds
        arguments["num_tables"] = num_tables
    elif lex_seeds is not None or num_tables != 1:
        raise ValueError(f"lex_seeds and num_tables are for lexinvariant models; found {type(model).__name__}")
    with evaluating(model):
        parts = [_aligned_losses(model, **part) for part in in_batches(arguments, batch_size, model.device)]
    losses, counted = (torch.cat(part) for part in zip(*parts))
    counts = counted.sum(0)
    longest = int((counts > 0).sum())
    if longest < window:
        raise ValueError(f"a window of {window} predictions needs {window + 1} symbols; found at most {longest + 1}")
    losses, counted, counts = losses[:, :longest], counted[:, :longest], counts[:longest]
    if average == "loss":
        perplexity = (_window_sums(losses.sum(0), window) / _window_sums(counts, window)).exp()
    else:
        full = _window_sums(counted.long(), window) == window
        each = (_window_sums(losses, window) / window).exp()
        perplexity = (each * full).sum(0) / full.sum(0)
    context = torch.arange(1, longest - window + 2)
    return PositionCurve(context, perplexity, losses.sum(0) / counts, counts, window)


def _aligned_losses(model, input_ids: Tensor, attention_mask: Tensor, **tables) -> tuple[Tensor, Tensor]:
    """Losses (batch, length - 1) in float64 with that behind c symbols in column c - 1, and which there are."""
    if hasattr(model, "token_losses"):
        losses, counted = model.token_losses(input_ids, attention_mask, **tables)
    else:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1].float()
        losses = functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
        counted = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    # Padding stands at one end, so what counts is one run: a stable sort moves it to the front.
    order = (~counted).to(torch.int8).argsort(dim=1, stable=True)
    counted = counted.gather(1, order)
    losses = losses.double().gather(1, order)
    return torch.where(counted, losses, 0.0).cpu(), counted.cpu()


def _window_sums(values: Tensor, window: int) -> Tensor:
    """Sums of `window` neighbours in the last dimension: (…, n) -> (…, n - window + 1)"""
    return values.unfold(-1, window, 1).sum(-1)


# --- invariance -------------------------------------------------------------------------------------------------------


def random_relabelling(vocab_size: int, fixed_ids: Collection[int] = (), generator=None) -> Tensor:
    """New names of all symbols: int64 (vocab_size,), a permutation that leaves `fixed_ids` in their places."""
    if fixed_ids and not 0 <= min(fixed_ids) <= max(fixed_ids) < vocab_size:
        raise ValueError(f"fixed_ids must lie in 0..{vocab_size - 1}; found {sorted(fixed_ids)}")
    names = torch.arange(vocab_size)
    free = torch.ones(vocab_size, dtype=torch.bool)
    free[list(fixed_ids)] = False
    places = names[free]
    names[places] = places[torch.randperm(len(places), generator=generator)]
    return names


def alpha_covariance(
    model,
    ids: Tensor,
    n: int = 100,
    *,
    max_new_tokens: int = 0,
    attention_mask: Tensor | None = None,
    fixed_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
    batch_size: int = 1,
    **model_kwargs,
) -> float:
    """How far the output stays the same when symbols change their names (arXiv 2410.17161, formula 2):
    1 - (d - 1) / (n - 1), where d is the number of different outputs under n random relabelings, each read with the
    names changed back. 1: the names do not matter at all; 0: every relabelling gives another output.

    Compared are the logits of the next symbol, bit for bit, or, with `max_new_tokens`, greedy continuations. Symbols in
    a continuation that the prompt does not have are compared by the order in which they occur first: which of the
    symbols that nothing tells apart is taken is a matter of names, whatever the model. A canonical table gives exactly
    1.0; a model that draws random rows is invariant on average only, and gets less.

    Args:
        model: a `LexinvariantForCausalLM`, or another causal language model.
        ids: int64 (length,) or (prompts, length); of several prompts the mean is returned.
        n: number of relabelings, at least 2.
        max_new_tokens: length of the continuations; 0 compares logits.
        attention_mask: the shape of `ids`, 0 at padding.
        fixed_ids: symbols that keep their names, besides the model's `exempt_token_ids`.
        generator: of the relabelings.
        batch_size: relabelings at a time. Bits may depend on a row's place in a batch, by the order in which libraries
            add; therefore 1.
        model_kwargs: further arguments of the model.

    Raises:
        ValueError: n below 2, ids of another shape, fixed ids outside the vocabulary.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2; found {n}")
    if ids.dim() not in (1, 2) or not ids.numel():
        raise ValueError(f"ids must have the shape (length,) or (prompts, length); found {tuple(ids.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones_like(ids)
    if attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape {tuple(ids.shape)}; found {tuple(attention_mask.shape)}")
    fixed = {*fixed_ids, *getattr(model.config, "exempt_token_ids", ())}
    vocab_size = model.config.vocab_size
    values = []
    with evaluating(model):
        for prompt, real in zip(torch.atleast_2d(ids).cpu(), torch.atleast_2d(attention_mask).cpu().bool()):
            prompt, different = prompt[real], set()
            for start in range(0, n, batch_size):
                names = [random_relabelling(vocab_size, fixed, generator) for _ in range(min(batch_size, n - start))]
                for output in _outputs(model, prompt, torch.stack(names), max_new_tokens, fixed, model_kwargs):
                    different.add(hashlib.sha256(output.numpy().tobytes()).digest())
            values.append(1 - (len(different) - 1) / (n - 1))
    return sum(values) / len(values)


def _outputs(
    model, prompt: Tensor, names: Tensor, length: int, fixed: set[int], model_kwargs: dict
) -> Iterator[Tensor]:
    """What the model answers to a prompt (length,) under each of the names (relabelings, vocab_size), named back."""
    relabelled = names[:, prompt].to(model.device)
    if not length:
        logits = model(input_ids=relabelled, logits_to_keep=1, **model_kwargs).logits[:, -1].float().cpu()
        yield from logits.gather(1, names)
        return
    known = {int(symbol) for symbol in prompt} | fixed
    for continuation, name in zip(greedy_continuation(model, relabelled, length, **model_kwargs).cpu(), names):
        introduced: dict[int, int] = {}
        output = []
        for symbol in name.argsort()[continuation].tolist():
            if symbol not in known:
                symbol = introduced.setdefault(symbol, -1 - len(introduced))
            output.append(symbol)
        yield torch.tensor(output)
