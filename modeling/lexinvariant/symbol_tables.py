"""Tables of symbol rows: what the ids of a sequence mean, from an explicit table, a learned one, or seeds.

A table serves `sequences` = batch * num_tables sequences: the tables of one batch element follow each other. It gives
rows of chosen symbols and products with the rows of all symbols; tables made from seeds compute both on demand, so that
nothing of shape (batch, vocab_size, hidden_size) exists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from .symbol_rows import random_permutations, random_rows, uniform_numbers

_CHUNK_NUMBERS = 2**22  # of the rows that exist at once while products with all rows are computed


@dataclass(frozen=True)
class StoredTable:
    """Rows that exist: `weight` (vocab_size, hidden_size), or (sequences, vocab_size, hidden_size); under
    `permutations` (sequences, vocab_size) the row of symbol v is `weight[permutations[v]]`."""

    weight: Tensor
    permutations: Tensor | None = None

    def rows(self, symbols: Tensor) -> Tensor:
        """(sequences, length) -> (sequences, length, hidden_size)"""
        symbols = self.places(symbols)
        if self.weight.dim() == 2:
            return functional.embedding(symbols, self.weight)
        return self.weight.gather(1, symbols[..., None].expand(-1, -1, self.weight.shape[2]))

    def places(self, symbols: Tensor) -> Tensor:
        """Of which row of the weight a symbol has the numbers: (sequences, length) -> the same"""
        return symbols if self.permutations is None else self.permutations.gather(1, symbols)

    def products(self, hidden: Tensor) -> Tensor:
        """(sequences, length, hidden_size) -> (sequences, length, vocab_size)"""
        weight = self.weight.to(hidden.dtype)
        products = functional.linear(hidden, weight) if weight.dim() == 2 else hidden @ weight.transpose(1, 2)
        if self.permutations is not None:
            products = products.gather(2, self.permutations[:, None].expand(-1, hidden.shape[1], -1))
        return products


@dataclass(frozen=True)
class RandomTable:
    """Independent normal rows of `hidden_size` numbers; seeds and tables (sequences,), as `random_rows` takes them."""

    seeds: Tensor
    tables: Tensor
    vocab_size: int
    hidden_size: int
    std: float = 1.0
    permutations: Tensor | None = None

    def rows(self, symbols: Tensor) -> Tensor:
        if self.permutations is not None:
            symbols = self.permutations.gather(1, symbols)
        rows = random_rows(self.seeds[:, None], symbols, self.hidden_size, self.tables[:, None])
        return rows if self.std == 1.0 else rows * self.std

    def of(self, sequence: int) -> RandomTable:
        """That of one sequence."""
        one = slice(sequence, sequence + 1)
        permutations = None if self.permutations is None else self.permutations[one]
        return replace(self, seeds=self.seeds[one], tables=self.tables[one], permutations=permutations)

    def all_rows(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of the symbols `first..last - 1`: (sequences, last - first, hidden_size)"""
        symbols = torch.arange(first, self.vocab_size if last is None else last, device=self.seeds.device)
        return self.rows(symbols.expand(len(self.seeds), -1))

    def stored(self) -> StoredTable | RandomTable:
        """The same rows, computed now if they are few, for a table that is asked many times."""
        if len(self.seeds) * self.vocab_size * self.hidden_size > _CHUNK_NUMBERS:
            return self
        rows = self.all_rows()
        return StoredTable(rows[0] if len(rows) == 1 else rows)

    def products(self, hidden: Tensor) -> Tensor:
        return _ProductsWithRandomRows.apply(hidden, self)


class _ProductsWithRandomRows(torch.autograd.Function):
    """Products with chunks of rows that are computed, used and forgotten; the backward pass computes them again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, table: RandomTable) -> Tensor:
        ctx.table, ctx.dtype = table, hidden.dtype
        products = hidden.new_empty(*hidden.shape[:2], table.vocab_size)
        for first, last, rows in _chunks_of_rows(table, hidden.dtype):
            products[..., first:last] = hidden @ rows.transpose(1, 2)
        return products

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (gradient,) = gradients
        total: Tensor | None = None
        for first, last, rows in _chunks_of_rows(ctx.table, ctx.dtype):
            part = gradient[..., first:last] @ rows
            total = part if total is None else total.add_(part)
        return total, None


def _chunks_of_rows(table: RandomTable, dtype: torch.dtype):
    size = max(1, _CHUNK_NUMBERS // (len(table.seeds) * table.hidden_size))
    for first in range(0, table.vocab_size, size):
        last = min(first + size, table.vocab_size)
        yield first, last, table.all_rows(first, last).to(dtype)


@dataclass(frozen=True)
class MixedTable:
    """A learned row or, where `randomized` (sequences, vocab_size) says so, a random one."""

    learned: StoredTable
    random: RandomTable
    randomized: Tensor

    def rows(self, symbols: Tensor) -> Tensor:
        chosen = self.randomized.gather(1, symbols)[..., None]
        learned = self.learned.rows(symbols)
        return torch.where(chosen, self.random.rows(symbols).to(learned.dtype), learned)

    def products(self, hidden: Tensor) -> Tensor:
        return torch.where(self.randomized[:, None], self.random.products(hidden), self.learned.products(hidden))


@dataclass(frozen=True)
class ExemptingTable:
    """A table of which some symbols, `tokens` (exempt,), have the rows `weight` (exempt, hidden_size)."""

    table: StoredTable | RandomTable | MixedTable
    tokens: Tensor
    weight: Tensor

    def rows(self, symbols: Tensor) -> Tensor:
        rows = self.table.rows(symbols)
        matches = symbols[..., None] == self.tokens
        exempt = functional.embedding(matches.long().argmax(-1), self.weight)
        return torch.where(matches.any(-1)[..., None], exempt.to(rows.dtype), rows)

    def stored(self) -> Table:
        """As `RandomTable.stored`."""
        table = self.table.stored() if isinstance(self.table, RandomTable) else self.table
        if isinstance(table, StoredTable) and table.permutations is None:
            exempt = self.weight.to(table.weight.dtype).expand(*table.weight.shape[:-2], -1, -1)
            return StoredTable(table.weight.index_copy(-2, self.tokens, exempt))
        return replace(self, table=table)

    def products(self, hidden: Tensor) -> Tensor:
        exempt = hidden @ self.weight.to(hidden.dtype).T
        return self.table.products(hidden).index_copy(2, self.tokens, exempt)


Table = StoredTable | RandomTable | MixedTable | ExemptingTable


def make_table(
    config,
    seeds: Tensor,
    tables: Tensor,
    *,
    learned: Tensor | None = None,
    exempt: Tensor | None = None,
    explicit: Tensor | None = None,
    permutations: Tensor | None = None,
    training: bool = False,
) -> Table:
    """The table that the configuration describes.

    Args:
        seeds, tables: int64 (sequences,).
        learned: the trained rows (vocab_size, hidden_size), where the configuration has them.
        exempt: the trained rows of `config.exempt_token_ids`.
        explicit: (vocab_size, hidden_size) or (sequences, vocab_size, hidden_size), instead of what the configuration
            says.
        permutations: (sequences, vocab_size), of the symbols, before a row is looked up.
        training: whether a shared table that is not trained is new in every call; else it is that of
            `config.eval_seed`, so that no sequence depends on the others of its batch.
    """
    table: StoredTable | RandomTable | MixedTable
    random = RandomTable(seeds, tables, config.vocab_size, config.hidden_size, config.embedding_std, permutations)
    if explicit is not None:
        table = StoredTable(explicit, permutations)
    elif config.table == "orthonormal":
        rows = orthonormal_rows(replace(random, permutations=None).all_rows())
        table = StoredTable(rows * config.embedding_std, permutations)
    elif config.table == "learned":
        table = StoredTable(learned, permutations)
    elif config.table == "permuted":
        if permutations is None:
            permutations = random_permutations(seeds, config.vocab_size, tables=tables)
        table = StoredTable(_shared_rows(config, seeds, training) if learned is None else learned, permutations)
    elif config.table == "mixed":
        table = MixedTable(StoredTable(learned, permutations), random, _randomized(config, seeds, tables))
    elif config.table == "subset_permuted":
        if permutations is None:
            chosen = _randomized(config, seeds, tables)
            permutations = random_permutations(seeds, config.vocab_size, chosen, tables=tables)
        table = StoredTable(learned, permutations)
    else:
        table = random
    if exempt is None or explicit is not None:
        return table
    return ExemptingTable(table, torch.tensor(config.exempt_token_ids, device=seeds.device), exempt)


def orthonormal_rows(rows: Tensor) -> Tensor:
    """Gram-Schmidt: rows (..., n, dim), n <= dim, made orthogonal one after the other, each of length sqrt(dim).

    Of independent normal rows the results are uniform over all orthogonal rows: no order of the symbols is preferred.
    """
    basis, factors = torch.linalg.qr(rows.transpose(-1, -2))
    signs = factors.diagonal(dim1=-2, dim2=-1).sign()
    return (basis * signs[..., None, :]).transpose(-1, -2) * rows.shape[-1] ** 0.5


def _shared_rows(config, seeds: Tensor, training: bool) -> Tensor:
    if training:
        return torch.randn(config.vocab_size, config.hidden_size, device=seeds.device) * config.embedding_std
    symbols = torch.arange(config.vocab_size, device=seeds.device)
    seed = torch.tensor(config.eval_seed, device=seeds.device)
    return random_rows(seed, symbols, config.hidden_size) * config.embedding_std


def _randomized(config, seeds: Tensor, tables: Tensor) -> Tensor:
    """Which symbols (sequences, vocab_size) are random ones."""
    symbols = torch.arange(config.vocab_size, device=seeds.device)
    if config.randomize_scope == "sequence":
        symbols = torch.full_like(symbols, config.vocab_size)
    return uniform_numbers(seeds[:, None], symbols, tables[:, None]) < config.randomize_prob
