"""Next-symbol distributions in which all symbols that have not occurred are one class.

Of a symbol that has occurred, the logit is the product with its row. The rows of all others are independent of the
hidden state h: of normal rows the logits are N(0, s^2), and each is replaced by log E exp = s^2 / 2. Probabilities are
exp(logit) / Z for a seen symbol and exp(unseen) / Z for each unseen one, Z = sum over seen exp(logit) + (V - n)
exp(unseen): a proper distribution, the same for all unseen symbols, without a row for any of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .symbol_history import NO_SYMBOL, first_positions


@dataclass
class CollapsedDistribution:
    """Distributions over `vocab_size` symbols at `length` positions of `sequences` sequences.

    logits: (sequences, length, slots) float32; slots are the positions up to now, with the exempt symbols before them.
    unseen: (sequences, length) float32, the logit of each unseen symbol.
    symbols, first: (sequences, slots), the symbol at each slot and the slot where it first occurred.
    seen: (sequences, length, slots) bool, whether a slot holds a symbol for the first time, at or before the position.
    """

    logits: Tensor
    unseen: Tensor
    symbols: Tensor
    first: Tensor
    seen: Tensor
    vocab_size: int

    def normalizer(self) -> Tensor:
        """log Z: (sequences, length)"""
        seen = self.logits.masked_fill(~self.seen, -torch.inf).logsumexp(-1)
        rest = (self.vocab_size - self.seen.sum(-1)).to(self.unseen.dtype)
        return torch.logaddexp(seen, torch.where(rest > 0, self.unseen + rest.clamp(min=1).log(), -torch.inf))

    def of(self, labels: Tensor) -> Tensor:
        """Logits of one symbol at each position: labels (sequences, length), non-negative; the result likewise."""
        slots = self.symbols.shape[1]
        first = first_positions(torch.cat([self.symbols, labels], dim=1))[:, slots:]
        slot = first.clamp(max=slots - 1)[..., None]
        seen = (first < slots) & self.seen.gather(2, slot)[..., 0]
        return torch.where(seen, self.logits.gather(2, slot)[..., 0], self.unseen)

    def full_logits(self) -> Tensor:
        """Logits of all symbols: (sequences, length, vocab_size) float32."""
        # Several slots of a symbol write the same number; padding writes to a column that is cut off.
        origin = self.first[:, None].expand_as(self.logits)
        values = torch.where(self.seen.gather(2, origin), self.logits.gather(2, origin), self.unseen[..., None])
        columns = torch.where(self.symbols == NO_SYMBOL, self.vocab_size, self.symbols)[:, None].expand_as(values)
        return self.unseen[..., None].repeat(1, 1, self.vocab_size + 1).scatter(2, columns, values)[..., :-1]
