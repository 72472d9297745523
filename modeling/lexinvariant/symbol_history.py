"""Which symbols a sequence has met, and where first; kept in the key-value cache between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

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


class _Keeping:
    """What is known of every token, beside the keys of a layer: tensors (batch, …, length, numbers), reordered together
    with the keys."""

    history: dict[str, Tensor]

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        self.history = {name: function(tensor) for name, tensor in self.history.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def _select(self, indices: Tensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))


class HistoryLayer(_Keeping, DynamicLayer):
    """The cache of the first layer, which also holds the history, cropped, selected and repeated with the keys."""

    def append(self, name: str, tensor: Tensor) -> Tensor:
        """All of a tensor of the history, that of the new tokens last. Comes before `update`."""
        if name in self.history:
            tensor = torch.cat([self.history[name], tensor], dim=-2)
        self.history[name] = tensor
        return tensor

    def reset(self) -> None:
        super().reset()
        self.history = {}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        length = self.get_seq_length()
        self._change(lambda tensor: tensor[..., :length, :])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)


class StaticHistoryLayer(_Keeping, StaticLayer):
    """The same of fixed size, for compiled decoding: places that are not filled yet hold `NO_SYMBOL`, and rows of
    zeros."""

    def append(self, name: str, tensor: Tensor) -> Tensor:
        """All places of a tensor of the history, with that of the new tokens. Comes before `update`."""
        if name not in self.history:
            shape = (*tensor.shape[:-2], self.max_cache_len, tensor.shape[-1])
            self.history[name] = tensor.new_full(shape, _nothing(tensor))
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.history[name])
        places = torch.arange(tensor.shape[-2], device=tensor.device) + self.get_seq_length()
        return self.history[name].index_copy_(-2, places, tensor)

    def reset(self) -> None:
        super().reset()
        for tensor in self.history.values():
            tensor.fill_(_nothing(tensor))


def _nothing(tensor: Tensor) -> int:
    return 0 if tensor.is_floating_point() else NO_SYMBOL


def fixed_size(cache: Cache | None) -> int | None:
    """Number of tokens for which a cache has places; None of one that grows."""
    return cache.layers[0].max_cache_len if cache is not None and cache.is_compileable else None


def history_layer(cache: Cache) -> HistoryLayer | StaticHistoryLayer:
    """The first layer of a cache, made able to hold the history.

    Raises:
        ValueError: the cache is of another kind, or was filled without a history.
    """
    if not cache.layers:
        cache.layers.append(HistoryLayer())
    layer = cache.layers[0]
    if not isinstance(layer, HistoryLayer | StaticHistoryLayer):
        if type(layer) not in (DynamicLayer, StaticLayer):
            raise ValueError(
                "the symbols met so far are kept in a DynamicCache or a StaticCache; found one with "
                f"{type(layer).__name__}: leave cache_implementation unset"
            )
        if layer.get_seq_length():
            raise ValueError("past_key_values was filled by another model: it holds no history of symbols")
        if isinstance(layer, DynamicLayer):
            layer = HistoryLayer()
        else:
            empty, layer = layer, StaticHistoryLayer(layer.max_cache_len)
            if empty.is_initialized:
                layer.lazy_initialization(empty.keys, empty.values)
        cache.layers[0] = layer
    if not hasattr(layer, "history"):
        layer.history = {}
    return layer
