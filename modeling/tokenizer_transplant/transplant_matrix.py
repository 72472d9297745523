"""The transplant matrix: every row of the new embedding tables as a sparse combination of rows of the old ones.

Row i of a new table is `sum_j weights[j] * table[base_ids[j]] + dense_row`, where most rows have one base id of weight
1 (a copy), some have a few, and a dense row stands only where a method has no sparse form (draws, affine maps).
The same combination serves the input table and the head unless a method computes the head's separately.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT = "transplant_matrix"  # the one key of the file's metadata: of several, the order would be random
_FORMAT_VERSION = 1
NEVER = -1e4  # the head bias of ids without a token: below every real logit, and finite in every dtype
_COLUMNS_AT_ONCE = 128  # of a table that is combined: bounds the float32 copy of the base rows that are read


class SourceKind(IntEnum):
    """Where a new row comes from; the report names it for every token id."""

    COPIED = 0  # the base's row of the same token
    SPECIAL = 1  # the base's row of the special token that plays the same role
    MAPPED = 2  # a mapping that the user gave
    COMBINED = 3  # a method's combination of base rows
    DENSE = 4  # a method's row that is no combination of few base rows
    RANDOM = 5  # a draw
    MEAN = 6  # the mean of the base's rows
    ZERO = 7  # zeros
    PADDING = 8  # zeros: no token of the new tokenizer has this id
    UNDEFINED = 9  # a method has no row for this token; the next fallback must have one


@dataclass(frozen=True)
class CombinationRows:
    """Rows in compressed form: `sum_j weights[j] * table[base_ids[j]]`, j from `offsets[i]` to `offsets[i + 1]`, plus
    `dense[dense_positions[i]]` where that position is not -1.

    offsets: `(rows + 1,)` int64. base_ids: `(entries,)` int64. weights: `(entries,)` float32.
    dense_positions: `(rows,)` int64. dense: `(dense rows, hidden_size)` float32, or None where no row has a dense part;
        several rows may share one dense row.
    """

    offsets: Tensor
    base_ids: Tensor
    weights: Tensor
    dense_positions: Tensor
    dense: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Number of base rows in every combination, `(rows,)` int64."""
        return self.offsets.diff()

    @classmethod
    def from_padded(cls, indices: Tensor, weights: Tensor, dense: Tensor | None = None) -> CombinationRows:
        """indices: `(rows, k)` integers, -1 in unused places; weights: `(rows, k)`; dense: `(rows, hidden_size)`, added
        to the combinations, or None."""
        if indices.dim() != 2 or indices.shape != weights.shape:
            shapes = f"{tuple(indices.shape)} and {tuple(weights.shape)}"
            raise ValueError(f"indices and weights must have one shape (rows, k), found {shapes}")
        if dense is not None and (dense.dim() != 2 or len(dense) != len(indices)):
            raise ValueError(f"dense rows must have shape ({len(indices)}, hidden_size), found {tuple(dense.shape)}")
        used = indices >= 0
        offsets = torch.zeros(len(indices) + 1, dtype=torch.int64)
        offsets[1:] = used.sum(1).cumsum(0)
        has_dense = torch.arange(len(indices)) if dense is not None else torch.full((len(indices),), -1)
        return cls(
            offsets,
            indices[used].to("cpu", torch.int64),
            weights[used].to("cpu", torch.float32),
            has_dense,
            None if dense is None else dense.to("cpu", torch.float32),
        )

    def select(self, positions: Tensor) -> CombinationRows:
        """The rows at the given positions, `(n,)` int64, in that order."""
        lengths = self.lengths[positions]
        entries = _ranges(self.offsets[positions], lengths)
        dense_positions, dense = self.dense_positions[positions], self.dense
        if dense is not None:
            kept, inverse = dense_positions.unique(return_inverse=True)
            has_none = bool(len(kept)) and int(kept[0]) == -1
            dense = dense[kept[int(has_none) :]]
            dense_positions, dense = inverse - int(has_none), (dense if len(dense) else None)
        return CombinationRows(
            _offsets_of(lengths), self.base_ids[entries], self.weights[entries], dense_positions, dense
        )

    def scaled(self, factors: Tensor) -> CombinationRows:
        """Row i multiplied by `factors[i]`, `(rows,)` float32."""
        weights = self.weights * factors.repeat_interleave(self.lengths).float()
        if self.dense is None:
            return CombinationRows(self.offsets, self.base_ids, weights, self.dense_positions)
        has_dense = (self.dense_positions >= 0) & (factors != 0)
        dense = self.dense[self.dense_positions[has_dense]] * factors[has_dense, None].float()
        positions = torch.where(has_dense, has_dense.cumsum(0) - 1, -1)
        return CombinationRows(self.offsets, self.base_ids, weights, positions, dense if len(dense) else None)

    def plus(self, other: CombinationRows) -> CombinationRows:
        """The sum, row by row; a base id that occurs in both terms is stored twice."""
        both = concatenate_rows([self, other])
        count = len(self)
        order = torch.stack([torch.arange(count), torch.arange(count) + count], 1).flatten()
        merged = both.select(order)
        dense_positions, dense = _summed_dense(self, other)
        return CombinationRows(merged.offsets[::2].clone(), merged.base_ids, merged.weights, dense_positions, dense)

    def apply(self, table: Tensor) -> Tensor:
        """The new rows, `(rows, hidden_size)`, in the dtype and on the device of `table`, `(base rows, hidden_size)`.

        Sums are taken in float32 (float64 for a float64 table), in the order of the entries, and rounded once; a
        single base row of weight 1 is copied bit by bit. The result depends neither on the number of threads nor on
        which other rows are asked for. Raises ValueError where a sum is not finite, as it is of base rows with NaN.
        """
        if table.dim() != 2:
            raise ValueError(f"a table has the shape (rows, hidden_size), found {tuple(table.shape)}")
        self._check_fits(table)
        new = torch.empty(len(self), table.shape[1], dtype=table.dtype, device=table.device)
        with torch.no_grad():
            is_copy = self._copies()
            copies, others = is_copy.nonzero()[:, 0], (~is_copy).nonzero()[:, 0]
            new[copies.to(new.device)] = table[self.base_ids[self.offsets[copies]].to(table.device)]
            if len(others):
                self.select(others)._combine(table, new, others.to(new.device))
                self._refuse_non_finite(table, new, others)
        return new

    def _refuse_non_finite(self, table: Tensor, new: Tensor, positions: Tensor) -> None:
        if new.device.type == "meta" or new.isfinite().all():
            return
        broken = positions[~new[positions.to(new.device)].isfinite().all(1).cpu()]
        if len(broken):
            read = self.select(broken[:1]).base_ids
            at_fault = read[~table[read.to(table.device)].isfinite().all(1).cpu()].unique().tolist()
            cause = f"base rows {at_fault[:5]} hold NaN or infinity" if at_fault else f"too large for {new.dtype}"
            raise ValueError(f"{len(broken)} combined rows would not be finite, the first of id {broken[0]}: {cause}")

    def _copies(self) -> Tensor:
        """Which rows are bit-exact copies: one base id, weight 1, no dense part; `(rows,)` bool."""
        single = (self.lengths == 1) & (self.dense_positions < 0)
        single[single.clone()] = self.weights[self.offsets[:-1][single]] == 1
        return single

    def _combine(self, table: Tensor, new: Tensor, positions: Tensor) -> None:
        """Write the rows to `positions` of `new`, a few columns at a time: what is gathered then stays in the cache."""
        working = torch.float64 if table.dtype == torch.float64 else torch.float32
        is_read = torch.zeros(len(table), dtype=torch.bool).index_fill_(0, self.base_ids, True)
        needed, places = (
            is_read.nonzero()[:, 0].to(table.device),
            (is_read.cumsum(0) - 1)[self.base_ids].to(table.device),
        )
        offsets, weights = self.offsets.to(table.device), self.weights.to(table.device, working)
        with_dense = (self.dense_positions >= 0).nonzero()[:, 0]
        for start in range(0, table.shape[1], _COLUMNS_AT_ONCE):
            columns = slice(start, start + _COLUMNS_AT_ONCE)
            part = table[:, columns]
            read = (part if len(needed) == len(table) else part[needed]).to(working).contiguous()
            # A sparse product: every bag is summed by one thread, in the order of its entries.
            rows = torch.nn.functional.embedding_bag(
                places, read, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
            )
            if self.dense is not None:
                dense = self.dense[self.dense_positions[with_dense], columns]
                rows[with_dense.to(rows.device)] += dense.to(table.device, working)
            new[:, columns].index_copy_(0, positions, rows.to(table.dtype))

    def _check_fits(self, table: Tensor) -> None:
        if len(self.base_ids) and int(self.base_ids.max()) >= len(table):
            raise ValueError(f"the rows read base id {int(self.base_ids.max())}, but the table has {len(table)} rows")
        if self.dense is not None and self.dense.shape[1] != table.shape[1]:
            raise ValueError(f"dense rows have width {self.dense.shape[1]}, the table has {table.shape[1]}")


@dataclass(frozen=True)
class TransplantMatrix:
    """Where every new row comes from, and how: what a transplantation method returns, and what a checkpoint stores.

    kinds: `(rows,)` uint8, `SourceKind` of every row.
    input: the combinations that give the input table.
    head: those that give the head where they differ (methods that solve for it separately), else None.
    base_rows: number of rows of the base's tables.
    """

    kinds: Tensor
    input: CombinationRows
    base_rows: int
    head: CombinationRows | None = None

    def __post_init__(self):
        for name, rows in (("input", self.input), ("head", self.head)):
            if rows is None:
                continue
            if len(rows) != len(self.kinds):
                raise ValueError(f"{len(self.kinds)} source kinds, but {len(rows)} rows of the {name} table")
            if len(rows.base_ids) and not 0 <= int(rows.base_ids.min()) <= int(rows.base_ids.max()) < self.base_rows:
                raise ValueError(f"base ids of the {name} table must lie in 0..{self.base_rows - 1}")
            if not bool(rows.weights.isfinite().all()):
                raise ValueError(f"weights of the {name} table must be finite")
            if rows.dense is not None and not bool(rows.dense.isfinite().all()):
                raise ValueError(f"dense rows of the {name} table must be finite")

    def __len__(self) -> int:
        return len(self.kinds)

    @classmethod
    def from_combinations(
        cls,
        indices: Tensor,
        weights: Tensor,
        base_rows: int,
        *,
        head_indices: Tensor | None = None,
        head_weights: Tensor | None = None,
        dense: Tensor | None = None,
        head_dense: Tensor | None = None,
        kind: SourceKind = SourceKind.COMBINED,
    ) -> TransplantMatrix:
        """A matrix from padded combinations: `(rows, k)` indices, -1 and weight 0 in unused places.

        head_indices, head_weights, head_dense: the head's own combinations, where a method computes them separately.
        dense, head_dense: `(rows, hidden_size)`, added to the combinations.
        kind: of the rows that have an entry or a dense part; rows with neither are UNDEFINED.
        """
        rows = CombinationRows.from_padded(indices, weights, dense)
        head = None
        if head_indices is not None or head_dense is not None:
            head_indices = indices if head_indices is None else head_indices
            head_weights = weights if head_weights is None else head_weights
            head = CombinationRows.from_padded(head_indices, head_weights, head_dense)
        defined = rows.lengths > 0
        if head is not None:
            defined |= head.lengths > 0
        if dense is not None or head_dense is not None:
            defined |= True
        return cls(_kinds(defined, kind), rows, base_rows, head)

    @classmethod
    def copies(cls, base_ids: Tensor, base_rows: int, kind: SourceKind = SourceKind.COPIED) -> TransplantMatrix:
        """Rows that are copies of base rows; base_ids: `(rows,)`, -1 for rows that stay undefined."""
        return cls.from_combinations(
            base_ids[:, None], (base_ids[:, None] >= 0).float(), base_rows, kind=SourceKind(kind)
        )

    @classmethod
    def constant(
        cls, rows: int, base_rows: int, kind: SourceKind, dense: Tensor | None = None, head_dense: Tensor | None = None
    ) -> TransplantMatrix:
        """`rows` equal rows: zeros, or the vectors `(hidden_size,)` that are given for the input table and the head."""
        head = None if head_dense is None else _constant_rows(rows, head_dense)
        return cls(torch.full((rows,), int(kind), dtype=torch.uint8), _constant_rows(rows, dense), base_rows, head)

    def select(self, positions: Tensor) -> TransplantMatrix:
        """The rows at the given positions, `(n,)` int64, in that order."""
        head = None if self.head is None else self.head.select(positions)
        return TransplantMatrix(self.kinds[positions], self.input.select(positions), self.base_rows, head)

    def replaced(self, positions: Tensor, other: TransplantMatrix) -> TransplantMatrix:
        """This matrix with the rows at `positions`, `(len(other),)` int64 without repetitions, taken from `other`."""
        source = torch.arange(len(self))
        source[positions] = torch.arange(len(other)) + len(self)
        return concatenate([self, other]).select(source)

    def undefined(self) -> Tensor:
        """Positions of the rows without a definition, `(n,)` int64."""
        return (self.kinds == SourceKind.UNDEFINED).nonzero()[:, 0]

    def rows_for(self, head: bool) -> CombinationRows:
        """The combinations of the head or of the input table."""
        return self.head if head and self.head is not None else self.input

    def apply(self, table: Tensor, *, head: bool = False) -> Tensor:
        """The new table `(rows, hidden_size)` from the base's `(base_rows, hidden_size)`; see `CombinationRows.apply`.

        Raises ValueError for a table of another number of rows, and for rows that no method has defined.
        """
        if len(table) != self.base_rows:
            raise ValueError(f"the matrix was made for a table of {self.base_rows} rows, this one has {len(table)}")
        if len(self.undefined()):
            ids = self.undefined()[:5].tolist()
            raise ValueError(f"{len(self.undefined())} rows are undefined (ids {ids} …): give a fallback method")
        return self.rows_for(head).apply(table)

    def apply_bias(self, bias: Tensor) -> Tensor:
        """The new head bias `(rows,)` from the base's `(base_rows,)`: the head's own combinations, so that logits stay
        linear in them; rows with a dense part, which are no combination, get the mean of the base's biases, without
        those of ids that have no token (`NEVER`, from an earlier transplantation)."""
        rows = self.rows_for(head=True)
        sparse = CombinationRows(rows.offsets, rows.base_ids, rows.weights, torch.full((len(rows),), -1))
        new = sparse.apply(bias[:, None])[:, 0]
        real = bias[bias > NEVER / 2].double()
        mean = real.mean() if len(real) else bias.new_zeros(())
        new[(rows.dense_positions >= 0).to(new.device)] = mean.to(new.dtype)
        return new

    def counts(self) -> dict[str, int]:
        """How many rows every source kind has, for the kinds that occur."""
        found = torch.bincount(self.kinds.long(), minlength=len(SourceKind)).tolist()
        return {kind.name.lower(): found[kind] for kind in SourceKind if found[kind]}

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, beside its place first and then renamed."""
        tensors = {"kinds": self.kinds}
        for name, rows in (("input", self.input), ("head", self.head)):
            if rows is not None:
                tensors |= _stored(name, rows)
        beside = Path(f"{path}.partial")
        heading = json.dumps({"version": _FORMAT_VERSION, "base_rows": self.base_rows})
        save_file(tensors, beside, metadata={_FORMAT: heading})
        beside.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TransplantMatrix:
        """Read what `save` wrote. Raises ValueError for another kind of safetensors file, and for a damaged one."""
        try:
            with safe_open(path, "pt") as file:
                heading = json.loads((file.metadata() or {}).get(_FORMAT, "{}"))
                if heading.get("version") != _FORMAT_VERSION:
                    raise ValueError(f"{path} holds no transplant matrix of version {_FORMAT_VERSION}; found {heading}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated ({error}): download it again") from error
        head = _restored("head", tensors) if "head.lengths" in tensors else None
        return cls(tensors["kinds"], _restored("input", tensors), heading["base_rows"], head)


def concatenate(matrices: Sequence[TransplantMatrix]) -> TransplantMatrix:
    """The matrices one below the other; the result has a head of its own if any of them has."""
    sizes = {matrix.base_rows for matrix in matrices}
    if len(sizes) != 1:
        raise ValueError(f"the matrices were made for tables of different sizes: {sorted(sizes)} rows")
    head = None
    if any(matrix.head is not None for matrix in matrices):
        head = concatenate_rows([matrix.rows_for(head=True) for matrix in matrices])
    kinds = torch.cat([matrix.kinds for matrix in matrices])
    return TransplantMatrix(kinds, concatenate_rows([matrix.input for matrix in matrices]), sizes.pop(), head)


def concatenate_rows(parts: Sequence[CombinationRows]) -> CombinationRows:
    """Combinations one below the other."""
    dense, dense_positions, count = [], [], 0
    for part in parts:
        dense_positions.append(torch.where(part.dense_positions >= 0, part.dense_positions + count, -1))
        if part.dense is not None:
            dense.append(part.dense)
            count += len(part.dense)
    return CombinationRows(
        _offsets_of(torch.cat([part.lengths for part in parts])),
        torch.cat([part.base_ids for part in parts]),
        torch.cat([part.weights for part in parts]),
        torch.cat(dense_positions),
        torch.cat(dense) if dense else None,
    )


def blend(parts: Sequence[tuple[TransplantMatrix, float]]) -> TransplantMatrix:
    """The weighted sum of matrices, row by row, over the parts in which a row is defined.

    Where a row is undefined in some parts, the weights of the others are scaled up to the same sum (one part alone
    counts in full). Rows that all parts copy from one base row stay copies.
    """
    if not parts:
        raise ValueError("a blend needs at least one matrix")
    if any(weight < 0 for _, weight in parts) or not sum(weight for _, weight in parts) > 0:
        raise ValueError(f"weights must not be negative, and not all zero: {[weight for _, weight in parts]}")
    matrices = [matrix for matrix, _ in parts]
    defined = torch.stack([matrix.kinds != SourceKind.UNDEFINED for matrix in matrices])
    weights = torch.tensor([weight for _, weight in parts], dtype=torch.float64)[:, None] * defined
    factors = (weights / weights.sum(0).clamp(min=torch.finfo(torch.float64).tiny)).float()
    head = None
    if any(matrix.head is not None for matrix in matrices):
        head = _weighted_sum([matrix.rows_for(head=True) for matrix in matrices], factors)
    rows = _weighted_sum([matrix.input for matrix in matrices], factors)
    kinds = _blended_kinds(matrices, factors)
    return TransplantMatrix(kinds, rows, matrices[0].base_rows, head)


def _weighted_sum(parts: Sequence[CombinationRows], factors: Tensor) -> CombinationRows:
    total = None
    for part, factor in zip(parts, factors):
        kept = part.scaled(factor)
        total = kept if total is None else total.plus(kept)
    assert total is not None
    merged = _without_zeros(_merged(total))
    # Shares of one copied row add up to 1 but for rounding: it stays a copy.
    whole = (merged.lengths == 1).repeat_interleave(merged.lengths) & ((merged.weights - 1).abs() < 1e-6)
    merged.weights[whole] = 1.0
    return merged


def _merged(rows: CombinationRows) -> CombinationRows:
    """Entries of one base id within a row added up, in the order of the ids."""
    row_of = torch.arange(len(rows)).repeat_interleave(rows.lengths)
    width = int(rows.base_ids.max()) + 1 if len(rows.base_ids) else 1
    keys, inverse = (row_of * width + rows.base_ids).unique(return_inverse=True)
    weights = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, inverse, rows.weights.double()).float()
    lengths = torch.bincount(keys // width, minlength=len(rows))
    return CombinationRows(_offsets_of(lengths), keys % width, weights, rows.dense_positions, rows.dense)


def _without_zeros(rows: CombinationRows) -> CombinationRows:
    kept = rows.weights != 0
    row_of = torch.arange(len(rows)).repeat_interleave(rows.lengths)
    lengths = torch.bincount(row_of[kept], minlength=len(rows))
    return CombinationRows(
        _offsets_of(lengths), rows.base_ids[kept], rows.weights[kept], rows.dense_positions, rows.dense
    )


def _blended_kinds(matrices: Sequence[TransplantMatrix], factors: Tensor) -> Tensor:
    """The kind that all parts with a share have in common, else COMBINED (DENSE where a part has a dense row)."""
    kinds = torch.full((len(matrices[0]),), int(SourceKind.UNDEFINED), dtype=torch.uint8)
    for matrix, factor in zip(matrices, factors):
        shares = factor > 0
        first = shares & (kinds == SourceKind.UNDEFINED)
        differs = shares & ~first & (kinds != matrix.kinds)
        dense = (matrix.input.dense_positions >= 0) | (kinds == SourceKind.DENSE)
        kinds = torch.where(first, matrix.kinds, kinds)
        kinds[differs & dense] = int(SourceKind.DENSE)
        kinds[differs & ~dense] = int(SourceKind.COMBINED)
    return kinds


def _summed_dense(first: CombinationRows, second: CombinationRows) -> tuple[Tensor, Tensor | None]:
    has = (first.dense_positions >= 0) | (second.dense_positions >= 0)
    if not bool(has.any()):
        return torch.full((len(first),), -1), None
    width = next(rows.dense.shape[1] for rows in (first, second) if rows.dense is not None)
    positions = torch.where(has, has.cumsum(0) - 1, -1)
    dense = torch.zeros(int(has.sum()), width)
    for rows in (first, second):
        own = rows.dense_positions >= 0
        if rows.dense is not None:
            dense[positions[own]] += rows.dense[rows.dense_positions[own]]
    return positions, dense


def _constant_rows(rows: int, dense: Tensor | None) -> CombinationRows:
    return CombinationRows(
        torch.zeros(rows + 1, dtype=torch.int64),
        torch.empty(0, dtype=torch.int64),
        torch.empty(0),
        torch.full((rows,), -1 if dense is None else 0),
        None if dense is None else dense.detach().to("cpu", torch.float32)[None].clone(),
    )


def _kinds(defined: Tensor, kind: SourceKind) -> Tensor:
    return torch.where(defined, int(kind), int(SourceKind.UNDEFINED)).to(torch.uint8)


def _offsets_of(lengths: Tensor) -> Tensor:
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    offsets[1:] = lengths.cumsum(0)
    return offsets


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """starts[0], starts[0] + 1, … (lengths[0] of them), starts[1], …"""
    within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return starts.repeat_interleave(lengths) + within


def _stored(name: str, rows: CombinationRows) -> dict[str, Tensor]:
    """Compact form: 32-bit ids; int32 lengths instead of offsets; nothing for dense parts where there are none."""
    tensors = {
        f"{name}.lengths": rows.lengths.to(torch.int32),
        f"{name}.base_ids": rows.base_ids.to(torch.int32),
        f"{name}.weights": rows.weights.contiguous(),
    }
    if rows.dense is not None:
        tensors[f"{name}.dense"] = rows.dense.contiguous()
        tensors[f"{name}.dense_positions"] = rows.dense_positions.to(torch.int32)
    return tensors


def _restored(name: str, tensors: dict[str, Tensor]) -> CombinationRows:
    lengths = tensors[f"{name}.lengths"].long()
    positions = tensors.get(f"{name}.dense_positions", torch.full((len(lengths),), -1)).long()
    return CombinationRows(
        _offsets_of(lengths),
        tensors[f"{name}.base_ids"].long(),
        tensors[f"{name}.weights"],
        positions,
        tensors.get(f"{name}.dense"),
    )
