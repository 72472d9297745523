"""Tasks on symbols without meaning: substitution ciphers, LookUp and Permutation (arXiv 2305.16349, sections 3.3 and
3.5), as text of characters or as arbitrary ids of any vocabulary.

    LookUp:       A->2\nC->4\nG->5\nC->          answer 4
    Permutation:  A 2 C->C A\nd e f->f d\n4 1 D->    answer D 4

The paper gives neither the number of pairs and demonstrations nor their lengths; the defaults are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .evaluation import evaluating, greedy_continuation, in_batches

ASCII_SIZE = 128
# What can be seen in print, without the characters of the arrow.
PRINTABLE = "".join(chr(code) for code in range(33, 127) if chr(code) not in "->")
_ALL_AT_ONCE = 4096  # so many symbols are shuffled; of more, some are drawn until enough are different


@dataclass(frozen=True)
class SymbolicTask:
    """A prompt and its answer.

    Attributes:
        input_ids, answer_ids: the prompt and its answer; of characters, their ASCII codes.
        prompt, answer: the same as text; None where symbols are ids.
        rule: what the answer follows from. LookUp: the number of the pair that is asked for, `(index,)`; Permutation:
            the places in a line from which the answer is taken.
    """

    input_ids: list[int]
    answer_ids: list[int]
    prompt: str | None = None
    answer: str | None = None
    rule: tuple[int, ...] = ()


# --- symbols ----------------------------------------------------------------------------------------------------------


class _Symbols:
    """Draws symbols, uniformly or by frequency.

    symbols: characters, ids, or the number of ids 0, 1, ...
    frequencies: of each symbol, in any unit.
    """

    def __init__(self, symbols: str | int | Sequence[int], frequencies: Tensor | None, generator):
        self.is_text = isinstance(symbols, str)
        if isinstance(symbols, int):
            self.ids: Sequence[int] = range(symbols)
        else:
            self.ids = [ord(symbol) for symbol in symbols] if isinstance(symbols, str) else [int(i) for i in symbols]
            if len(set(self.ids)) < len(self.ids):
                raise ValueError("symbols must be different; found some twice")
        if self.is_text and not all(chr(code).isascii() and chr(code) not in "-> \n" for code in self.ids):
            raise ValueError("characters must be ASCII, without those of the arrow, space and newline")
        self.size, self.generator = len(self.ids), generator
        if not self.size or min(self.ids) < 0:
            raise ValueError("symbols must be characters, non-negative ids, or their number, at least 1")
        self.weights = None
        if frequencies is not None:
            self.weights = torch.as_tensor(frequencies, dtype=torch.float64)
            if self.weights.shape != (self.size,) or not (self.weights >= 0).all() or not self.weights.isfinite().all():
                raise ValueError(
                    f"frequencies must be {self.size} non-negative numbers, one for each symbol; found "
                    f"{tuple(self.weights.shape)}"
                )
        self.available = self.size if self.weights is None else int((self.weights > 0).sum())

    def different(self, count: int) -> list[int]:
        """Places of `count` different symbols, in the order in which they were drawn."""
        if count > self.available:
            raise ValueError(f"the task needs {count} different symbols; there are {self.available}")
        if self.weights is not None:
            return torch.multinomial(self.weights, count, generator=self.generator).tolist()
        if self.size <= _ALL_AT_ONCE:
            return torch.randperm(self.size, generator=self.generator)[:count].tolist()
        found: dict[int, None] = {}
        while len(found) < count:
            found.update(dict.fromkeys(torch.randint(self.size, (count,), generator=self.generator).tolist()))
        return list(itertools.islice(found, count))

    def any(self, count: int, without: Collection[int]) -> list[int]:
        """Places of `count` symbols, equal or not, other than those `without`."""
        weights = torch.ones(self.size, dtype=torch.float64) if self.weights is None else self.weights.clone()
        weights[list(without)] = 0
        if not weights.any():
            raise ValueError(f"the task needs more than {len(without)} different symbols; there are {self.available}")
        return torch.multinomial(weights, count, replacement=True, generator=self.generator).tolist()

    def number(self, span: int | tuple[int, int], what: str, low: int = 1) -> int:
        first, last = (span, span) if isinstance(span, int) else span
        if not low <= first <= last:
            raise ValueError(f"{what} must be a number or a range (first, last) from {low} up; found {span!r}")
        return int(torch.randint(first, last + 1, (), generator=self.generator))


def _marks(symbols: _Symbols, arrow_id: int | None, newline_id: int | None) -> tuple[int | None, int | None]:
    if symbols.is_text and (arrow_id is not None or newline_id is not None):
        raise ValueError("arrow_id and newline_id are for ids; in text the arrow is '->'")
    return arrow_id, newline_id


def _places(symbols: _Symbols, ids: Collection[int | None]) -> list[int]:
    """Where the ids stand among the symbols, as far as they do."""
    if isinstance(symbols.ids, range):
        return [i for i in ids if i is not None and i in symbols.ids]
    return [symbols.ids.index(i) for i in ids if i is not None and i in symbols.ids]
