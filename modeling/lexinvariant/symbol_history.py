"""Which symbols a sequence has met, and where first; kept in the key-value cache between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

NO_SYMBOL = -1  # padding, in a row of symbols


def first_positions(symbols: Tensor) -> Tensor:
    """Where the symbol of every position stands for the first time.

    Args:
        symbols: int64 (batch, length), `NO_SYMBOL` at padding.

    Returns:
        int64 (batch, length); a position at which a symbol is new, and only such a one, is its own first position.
    """
    ordered, order = symbols.sort(dim=1, stable=True)
    places = torch.arange(symbols.shape[1], device=symbols.device).expand_as(symbols)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group_starts = torch.where(begins, places, 0).cummax(dim=1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, group_starts))


def new_symbols(symbols: Tensor, first: Tensor) -> Tensor:
    """Whether a position shows a symbol for the first time: bool (batch, length), False at padding."""
    places = torch.arange(symbols.shape[1], device=symbols.device)
    return (first == places) & (symbols != NO_SYMBOL)


class HistoryLayer(DynamicLayer):
    """The cache of the first layer, which also holds what is known of every token: tensors (batch, tables, length,
    numbers), cropped, reordered, selected and repeated together with the keys."""

    history: dict[str, Tensor]

    def append_history(self, **tensors: Tensor) -> dict[str, Tensor]:
        """All of the history, the new tokens last."""
        if self.history:
            tensors = {name: torch.cat([self.history[name], tensor], dim=-2) for name, tensor in tensors.items()}
        self.history = tensors
        return tensors

    def _change(self, function) -> None:
        self.history = {name: function(tensor) for name, tensor in self.history.items()}

    def reset(self) -> None:
        super().reset()
        self.history = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.batch_select_history(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        length = self.get_seq_length()
        self._change(lambda tensor: tensor[..., :length, :])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.batch_select_history(indices)

    def batch_select_history(self, indices: Tensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))


def check_cache(cache: Cache | None) -> None:
    """Raises ValueError for a cache of fixed size."""
    if cache is not None and cache.is_compileable:
        raise ValueError(
            f"past_key_values must be a DynamicCache; found a {type(cache).__name__} of fixed size: leave "
            "cache_implementation unset"
        )


def history_layer(cache: Cache) -> HistoryLayer:
    """The first layer of a cache, made able to hold the history.

    Raises:
        ValueError: the cache is of another kind, or was filled without a history.
    """
    if not cache.layers:
        cache.layers.append(HistoryLayer())
    layer = cache.layers[0]
    if not isinstance(layer, HistoryLayer):
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"the symbols met so far are kept in a DynamicCache; found one with {type(layer).__name__}: leave "
                "cache_implementation unset"
            )
        if layer.get_seq_length():
            raise ValueError("past_key_values was filled by another model: it holds no history of symbols")
        layer = cache.layers[0] = HistoryLayer()
    if not hasattr(layer, "history"):
        layer.history = {}
    return layer
