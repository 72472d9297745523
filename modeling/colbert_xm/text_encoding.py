# Same file as text_encoding.py of the other families: each carries its own copy into its checkpoints.
"""What every `encode_queries` and `encode_documents` needs: the stored processor, batches, evaluation mode."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

_MODE_LOCK = threading.Lock()
# Model that encodes -> number of its threads that do, and its modules that were in training mode before the first. Not
# attributes of the model: copies and pickles made meanwhile would take them along.
_ENCODING: dict[nn.Module, tuple[int, list[nn.Module]]] = {}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode as long as any thread encodes; the last one restores what the first one found."""
    with _MODE_LOCK:
        threads, to_train_again = _ENCODING.get(model, (0, None))
        if to_train_again is None:
            to_train_again = [module for module in model.modules() if module.training]
            model.eval()
        _ENCODING[model] = threads + 1, to_train_again
    try:
        yield
    finally:
        with _MODE_LOCK:
            threads, to_train_again = _ENCODING.pop(model)
            if threads > 1:
                _ENCODING[model] = threads - 1, to_train_again
            else:
                for module in to_train_again:
                    module.training = True


def list_texts(texts: str | Iterable[str]) -> list[str]:
    """One text or several as a list; a TypeError if it is neither."""
    if not isinstance(texts, Iterable):
        raise TypeError(f"expected a text or several; found {type(texts).__name__}")
    return [texts] if isinstance(texts, str) else list(texts)


@torch.no_grad()
def encode_in_batches(
    model: nn.Module,
    texts: Sequence[str],
    encode: Callable[[list[int]], Iterable[Any]],
    batch_size: int,
    title: str | None = None,
    groups: Sequence[int] | None = None,
) -> list[Any]:
    """Texts through a model in evaluation mode, without gradients, in batches of similar length.

    Args:
        model: put into evaluation mode meanwhile.
        texts: the texts; what is no text counts as empty here, and is `encode`'s to refuse.
        encode: positions in `texts` of a batch -> the result of each.
        batch_size: texts per batch.
        title: of the progress bar; None shows none.
        groups: of each text; texts of different groups share no batch.

    Returns:
        The result of each text, in the order of `texts`.
    """
    groups = [0] * len(texts) if groups is None else groups
    lengths = [len(text) if isinstance(text, str) else 0 for text in texts]
    results: list[Any] = [None] * len(texts)
    # Inside another bar, it vanishes when it is done.
    bar = tqdm(total=len(texts), desc=title, unit="text", leave=None, disable=title is None)
    with bar, evaluation_mode(model):
        for batch in _batches(groups, lengths, batch_size):
            for i, result in zip(batch, encode(batch)):
                results[i] = result
            bar.update(len(batch))
    return results


def _batches(groups: Sequence[int], lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Of one group and similar length: little is computed on padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (groups[i], lengths[i])):
        if batch and (len(batch) == batch_size or groups[batch[0]] != groups[i]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def check_finite(model: Any, embeddings: torch.Tensor, texts: Sequence[str]) -> torch.Tensor:
    """The embeddings (batch, …) of a batch of texts; a ValueError if one holds NaN or infinity."""
    broken = (~embeddings.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"the model gives vectors that are not finite, for example for {texts[broken[0]][:80]!r}: its own weights "
            f"are damaged, or too large for {model.dtype}"
        )
    return embeddings


def stored_processor(processor_class: Any, config: Any) -> Any:
    """The processor beside the checkpoint from which the model of a configuration comes.

    Raises:
        ValueError: the model comes from no checkpoint, or there is none.
    """
    source, name = config._name_or_path, processor_class.__name__
    if not source:
        raise ValueError(f"this model was not loaded from a checkpoint: pass processor={name}(...)")
    # Where this module itself was loaded from a checkpoint, its user has agreed to run the checkpoint's code.
    trusted = __name__.startswith("transformers_modules.")
    revision = getattr(config, "_commit_hash", None)
    try:
        return processor_class.from_pretrained(source, revision=revision, trust_remote_code=trusted)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"no processor could be loaded from {source}, where the model comes from; expected processor_config.json "
            f"and a tokenizer beside the weights, or the argument processor={name}(...)"
        ) from error
