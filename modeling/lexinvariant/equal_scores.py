"""Choices among symbols with equal scores, as all symbols have that have not occurred.

What decides by position in the vocabulary would prefer low numbers, and the model would no longer be blind to what
symbols are called. Here the sequence's seed decides: each seed has an order of all symbols of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from .symbol_rows import uniform_numbers

# They cut a sorted list of scores, and so decide among equal ones by position.
_CUTTING = ("TopPLogitsWarper", "TypicalLogitsWarper", "TopHLogitsWarper")
CUTTING_WARPERS = tuple(getattr(logits_process, name) for name in _CUTTING if hasattr(logits_process, name))
_ORDER = -1  # the seed's table that orders symbols; rows come from tables 0, 1, ...


def preferences(seeds: Tensor, vocab_size: int) -> Tensor:
    """A number in [0, 1) for every seed (batch,) and symbol: (batch, vocab_size) float64; the larger comes first."""
    return uniform_numbers(seeds[:, None], torch.arange(vocab_size, device=seeds.device), _ORDER)


class InSeededOrder(LogitsProcessor):
    """Calls a processor with the symbols in the order of the seed."""

    def __init__(self, processor: LogitsProcessor, seeds: Tensor):
        self.processor, self.seeds = processor, seeds

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        order = preferences(self.seeds.to(scores.device), scores.shape[1]).argsort(dim=1, descending=True)
        processed = self.processor(input_ids, scores.gather(1, order))
        return torch.empty_like(processed).scatter_(1, order, processed)


class BreakTies(LogitsProcessor):
    """Makes the best `count` scores differ where several are equal: they fall in the order of the seed, each by a
    little more than `STEP` (by how much, the seed says too, so that sums over several tokens differ as well); all the
    others that were equal stand below them. Steps are above float32's rounding of a text's score and change it by less
    than (count + 1) * STEP per token."""

    STEP = 2.0**-14

    def __init__(self, seeds: Tensor, count: int):
        self.seeds, self.count = seeds, count

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        count = min(self.count, scores.shape[1])
        best = scores.topk(min(count + 1, scores.shape[1]), dim=1).values
        repeated = best[:, 1:] == best[:, :-1]
        if not repeated.any():
            return scores
        repeated &= best[:, 1:].isfinite()
        # One value can be that of many symbols: that of the unseen ones.
        value = best.gather(1, repeated.int().argmax(1, keepdim=True))
        equal = (scores == value) & repeated.any(1, keepdim=True)
        preferred = preferences(self.seeds.to(scores.device), scores.shape[1]).masked_fill(~equal, -1.0)
        chosen = preferred.topk(count, dim=1)
        fall = torch.arange(count, device=scores.device) + 1 - chosen.values
        lowered = torch.where(equal, scores - self.STEP * (count + 1), scores)
        top = torch.where(chosen.values >= 0, value - self.STEP * fall, lowered.gather(1, chosen.indices))
        return lowered.scatter(1, chosen.indices, top.to(scores.dtype))


class ThenBreakTies(LogitsProcessorList):
    """Processors, and behind them the ties: called directly, since a list looks up the signature of each of its members
    at every token, which takes longer than breaking ties."""

    def __init__(self, processors: Iterable[LogitsProcessor], break_ties: BreakTies):
        super().__init__(processors)
        self.break_ties = break_ties

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return self.break_ties(input_ids, super().__call__(input_ids, scores, **kwargs))
