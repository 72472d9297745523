"""Methods in the space of a donor: a model that already uses the new tokenizer.

Tokens that both models know (the anchors) tie the two embedding spaces together. A new token is described by the
anchors in the donor's space, and the same description is read in the base's space. Input table and head are described
separately, in (donor input, base input) and (donor head, base head). Source: specification section 4.3 (mergekit's
tokensurgeon; arXiv 2506.06607 for `omp`, arXiv 2405.05417 for under-trained tokens).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .nearest_tokens import SparseCombinations
from .sparse_coding import (
    RotarySpace,
    interpolation,
    orthogonal_matching_pursuit,
    procrustes_map,
    rotary_matching_pursuit,
    sparse_basis,
    under_trained_rows,
)
from .token_bytes import Vocabulary, normalized_forms
from .transplant_matrix import CombinationRows, SourceKind, TransplantMatrix, concatenate_rows
from .transplanting import TransplantContext

_ROWS_AT_ONCE = 4_096  # new rows whose norms are taken at once
TABLE_CHOICES = ("no", "yes", "embed", "lm_head")

_UNUSED_NAMES = ("unused_token", "reserved_special_token")


# --- methods whose rows are combinations of few base rows -------------------------------------------------------------


def omp(
    context: TransplantContext, *, k: int = 64, algorithm: str = "auto", memory_budget: int = 4 * 2**30
) -> TransplantMatrix:
    """Orthogonal matching pursuit: every new token as the least squares of at most `k` greedily chosen anchors.

    A row that would be longer than the longest anchor is shortened to that, and the report counts these; not so with
    `compatibility` "mergekit".

    Args:
        k: anchors per token; fewer where the remaining anchors add no more than rounding.
        algorithm: "auto", "gram" or "direct", see `orthogonal_matching_pursuit`: they differ in time only.
        memory_budget: bytes for the anchors' Gram matrix.

    Raises ValueError without donor, and for `k` above the number of anchors.
    """

    def describe(targets: Tensor, anchors: Tensor) -> SparseCombinations:
        return orthogonal_matching_pursuit(targets, anchors, k, algorithm=algorithm, memory_budget=memory_budget)

    matrix = _combined(context, "omp", describe)
    return matrix if context.compatibility == "mergekit" else _with_clipped_norms(context, matrix, "omp")


def common_interpolation(
    context: TransplantContext,
    *,
    k: int = 64,
    weight_scheme: str = "distance_proportional",
    cosine_similarity: bool = False,
) -> TransplantMatrix:
    """Every new token as a combination of the `k` anchors nearest to it in the donor's space.

    Args:
        k: anchors per token.
        weight_scheme: "distance_proportional" (inverse distances, or cosines, divided by their sum), "barycentric"
            (least squares with weights of sum 1) or "least_squares".
        cosine_similarity: nearest by cosine instead of Euclidean distance. A token whose cosines have no positive sum
            stays undefined.

    Raises ValueError without donor, and for `k` above the number of anchors.
    """

    def describe(targets: Tensor, anchors: Tensor) -> SparseCombinations:
        return interpolation(targets, anchors, k, weight_scheme=weight_scheme, cosine=cosine_similarity)

    return _combined(context, "common_interpolation", describe)


def _combined(
    context: TransplantContext, method: str, describe: Callable[[Tensor, Tensor], SparseCombinations]
) -> TransplantMatrix:
    """The matrix of descriptions in terms of anchors; a row that either table cannot describe stays undefined."""
    base_ids = context.anchors[1]
    tables = _table_pairs(context, method)
    if len(tables) == 2 and tables[1].donor is tables[0].donor:
        del tables[1]  # the same description for both
    combinations = [describe(*table.donor_vectors(context)) for table in tables]
    defined = torch.stack([found.indices[:, 0].cpu() >= 0 for found in combinations]).all(0)
    rows = []
    for found in combinations:
        indices = found.indices.cpu()
        used = (indices >= 0) & defined[:, None]
        rows.append((torch.where(used, base_ids[indices.clamp(min=0)], -1), found.weights.cpu()))
    lengths = (combinations[0].indices >= 0).sum(1)
    context.notes[f"{method}: tokens with fewer than k anchors"] = int(
        (lengths < combinations[0].indices.shape[1]).sum()
    )
    head_indices, head_weights = rows[1] if len(rows) == 2 else (None, None)
    return TransplantMatrix.from_combinations(
        *rows[0], context.base_rows, head_indices=head_indices, head_weights=head_weights
    )


def _with_clipped_norms(context: TransplantContext, matrix: TransplantMatrix, method: str) -> TransplantMatrix:
    """Rows longer than the longest anchor in the base's table are shortened to its length, in each table: nearly equal
    anchors of the donor have large coefficients of opposite signs, which need not cancel in the base. Of a token that
    is longer than all anchors in the donor, the row may be longer to the same part."""
    clipped = torch.zeros(len(matrix), dtype=torch.bool)
    parts = []
    for head, pair in enumerate(_table_pairs(context, method)):
        targets, anchors = (_lengths(rows) for rows in pair.donor_vectors(context))
        longest = _lengths(pair.base_anchors(context)).max() * (targets / anchors.max().clamp(min=1e-30)).clamp(min=1)
        rows, table = matrix.rows_for(bool(head)), pair.base.detach().float()
        blocks = torch.arange(len(rows)).split(_ROWS_AT_ONCE)
        lengths = torch.cat([_lengths(rows.select(block).apply(table)) for block in blocks])
        too_long = lengths > longest * 1.001
        clipped |= too_long
        parts.append(rows.scaled(torch.where(too_long, longest / lengths.clamp(min=1e-30), 1.0)))
    context.notes[f"{method}: rows shortened to the base's longest"] = int(clipped.sum())
    if not clipped.any():
        return matrix
    return TransplantMatrix(matrix.kinds, parts[0], matrix.base_rows, parts[1] if len(parts) == 2 else None)


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).cpu()


# --- methods whose rows are images under a map of spaces --------------------------------------------------------------


def landmark_pca(context: TransplantContext) -> TransplantMatrix:
    """New tokens carried over by the rotation between the principal subspaces of both spaces that brings the anchors
    closest (orthogonal Procrustes). mergekit 0.1.5 applies that rotation transposed; this is the correct formula.

    Raises ValueError without donor or anchors.
    """

    def image(table: _TablePair) -> Tensor:
        targets, anchors = table.donor_vectors(context)
        return procrustes_map(anchors, table.base_anchors(context))(targets)

    return _mapped(context, "landmark_pca", image)


def stb(context: TransplantContext, *, k: int = 64) -> TransplantMatrix:
    """Sparse token basis: principal directions of the narrower model's anchors as combinations of `k` anchors, which
    give a basis in both spaces; a new token has the same coordinates in both, relative to the means of the tables.

    Raises ValueError without donor, and for `k` above the number of anchors.
    """

    def image(table: _TablePair) -> Tensor:
        targets, anchors = table.donor_vectors(context)
        base_anchors = table.base_anchors(context)
        narrower = anchors if anchors.shape[1] < base_anchors.shape[1] else base_anchors
        indices, weights = sparse_basis(narrower, k, min(anchors.shape[1], base_anchors.shape[1]))
        donor_basis, base_basis = (
            (weights.double().unsqueeze(1) @ vectors.double()[indices.clamp(min=0)]).squeeze(1)
            for vectors in (anchors, base_anchors)
        )
        centred = targets.double() - table.donor.double().mean(0)
        coordinates = centred @ torch.linalg.pinv(donor_basis)
        return (coordinates @ base_basis + table.base.double().mean(0)).float()

    return _mapped(context, "stb", image)


def mp_rope(
    context: TransplantContext,
    *,
    k: int = 64,
    donor_heads: int,
    base_heads: int,
    donor_rope_theta: float = 10_000.0,
    base_rope_theta: float = 10_000.0,
) -> TransplantMatrix:
    """Matching pursuit with anchors that rotary positions may turn, see `rotary_matching_pursuit`.

    Args:
        k: anchors per token.
        donor_heads, base_heads: attention heads of the two models.
        donor_rope_theta, base_rope_theta: their bases of rotary positions.

    Raises ValueError without donor, for `k` above the number of anchors, and for widths that heads do not divide.
    """

    def image(table: _TablePair) -> Tensor:
        targets, anchors = table.donor_vectors(context)
        spaces = RotarySpace(donor_heads, donor_rope_theta), RotarySpace(base_heads, base_rope_theta)
        return rotary_matching_pursuit(targets, anchors, table.base_anchors(context), k, *spaces)

    return _mapped(context, "mp_rope", image)


def _mapped(context: TransplantContext, method: str, image: Callable[[_TablePair], Tensor]) -> TransplantMatrix:
    dense = [image(table) for table in _table_pairs(context, method)]
    none = torch.empty(len(context.targets), 0, dtype=torch.int64)
    return TransplantMatrix.from_combinations(
        none,
        none.float(),
        context.base_rows,
        dense=dense[0],
        head_dense=dense[1] if len(dense) == 2 else None,
        kind=SourceKind.DENSE,
    )


class _TablePair(NamedTuple):
    """A table of the donor, `(its rows, its hidden_size)`, and the base's of the same purpose."""

    donor: Tensor
    base: Tensor

    def donor_vectors(self, context: TransplantContext) -> tuple[Tensor, Tensor]:
        """The donor's vectors of the targets and of the anchors, float32."""
        return _rows(self.donor, context.targets), _rows(self.donor, context.anchors[0])

    def base_anchors(self, context: TransplantContext) -> Tensor:
        """The base's vectors of the anchors, float32, on the donor's device."""
        return _rows(self.base, context.anchors[1]).to(self.donor.device)


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    return table[ids.to(table.device)].float()


def _table_pairs(context: TransplantContext, method: str) -> list[_TablePair]:
    """Input tables, and the heads where the base has one of its own; a donor without one uses its input table."""
    donor_input, donor_head = context.require_donor(method)
    pairs = [_TablePair(donor_input, context.input_table)]
    if context.head_table is not None:
        pairs.append(_TablePair(donor_input if donor_head is None else donor_head, context.head_table))
    return pairs


# --- which tokens to trust, and which to copy beyond the matches ------------------------------------------------------


class WellTrained(NamedTuple):
    """matched: `(new.size,)` int64 as in `TransplantContext`, without tokens that either model has hardly trained.
    zeroed: `(n,)` int64, new ids of tokens that the donor has hardly trained and the base has not or hardly: their rows
    are zeros."""

    matched: Tensor
    zeroed: Tensor


def well_trained_matches(context: TransplantContext) -> WellTrained:
    """The magikarp filter: only tokens that both models have trained well are copied and serve as anchors.

    Unused rows are those without a token, and tokens called "unused_token…" or "reserved_special_token…"; for the other
    rules see `under_trained_rows`. Raises ValueError without donor.
    """
    donor_input, donor_head = context.require_donor("magikarp")
    if donor_head is None and context.compatibility == "mergekit":
        donor_head = donor_input  # mergekit takes the tied table for a head
    bad_base = under_trained_rows(
        context.input_table, context.head_table, _unused_ids(context.base, len(context.input_table))
    )
    bad_new = under_trained_rows(donor_input, donor_head, _unused_ids(context.new, len(donor_input)))
    bad_base, bad_new = bad_base.cpu(), bad_new.cpu()[: context.new.size]
    matched = context.matched
    base_is_bad = (matched < 0) | bad_base[matched.clamp(min=0)]
    return WellTrained(torch.where(base_is_bad | bad_new, -1, matched), (base_is_bad & bad_new).nonzero()[:, 0])


def _unused_ids(vocabulary: Vocabulary, rows: int) -> Tensor:
    tokens = [*vocabulary.tokens, *([None] * (rows - vocabulary.size))][:rows]
    return torch.tensor(
        [i for i, token in enumerate(tokens) if token is None or any(name in token for name in _UNUSED_NAMES)],
        dtype=torch.int64,
    )


class PartialMatches(NamedTuple):
    """Base ids whose rows are copied for the context's targets, `(targets,)` int64, -1 where none is: in the input
    table, and in the head."""

    input: Tensor
    head: Tensor


def partial_matches(
    context: TransplantContext, *, prefix_match: str = "no", byte_match: str = "no", base_ids: Tensor | None = None
) -> PartialMatches:
    """Rows to copy for tokens that no token of the base matches: of the same single byte, else of the longest prefix.

    Args:
        prefix_match: "no", "yes", "embed" (in the input table only) or "lm_head" (in the head only): the base token of
            the longest proper prefix of the bytes; never for special tokens, never a prefix of whitespace only.
        byte_match: likewise: the base token that stands for the same single byte.
        base_ids: ids that may be copied; by default all that have a row.

    With compatibility "mergekit", prefixes are those of its normalized tokens, a character below 256 counts as the byte
    of that number, and "embed" and "lm_head" mean each other, as in its version 0.1.5. Raises ValueError for other
    choices.
    """
    allowed = torch.zeros(context.base_rows, dtype=torch.bool)
    if base_ids is None:
        base_ids = torch.tensor([i for i in context.base.used_ids if i < context.base_rows])
    allowed[base_ids] = True
    find = _by_normalized_form if context.compatibility == "mergekit" else _by_bytes
    of_bytes, of_prefix = (torch.tensor(ids, dtype=torch.int64) for ids in find(context, allowed))
    found = []
    for byte, prefix in zip(_tables(context, "byte_match", byte_match), _tables(context, "prefix_match", prefix_match)):
        none = torch.full_like(of_bytes, -1)
        first, second = (of_bytes if byte else none), (of_prefix if prefix else none)
        found.append(torch.where(first >= 0, first, second))
    return PartialMatches(*found)


def _tables(context: TransplantContext, option: str, choice: str) -> tuple[bool, bool]:
    """Whether the option holds for the input table, and for the head."""
    if choice not in TABLE_CHOICES:
        raise ValueError(f"{option} is one of {', '.join(TABLE_CHOICES)}, not {choice!r}")
    chosen = choice in ("yes", "embed"), choice in ("yes", "lm_head")
    return chosen[::-1] if context.compatibility == "mergekit" else chosen


def _by_bytes(context: TransplantContext, allowed: Tensor) -> tuple[list[int], list[int]]:
    ids = {raw: i for raw, i in context.base.ids_by_bytes(context.base_rows).items() if allowed[i]}
    same, prefixes = [], []
    for new_id in context.targets.tolist():
        raw = b"" if new_id in context.new.special_ids else context.new.token_bytes[new_id] or b""
        same.append(ids.get(raw, -1) if len(raw) == 1 else -1)
        shorter = (raw[:stop] for stop in range(len(raw) - 1, 0, -1))
        prefixes.append(next((ids[part] for part in shorter if part in ids and part.strip()), -1))
    return same, prefixes


def _by_normalized_form(context: TransplantContext, allowed: Tensor) -> tuple[list[int], list[int]]:
    base_forms = normalized_forms(context.base, by_class=True)
    ids = {form: i for i, form in enumerate(base_forms[: context.base_rows]) if form is not None and allowed[i]}
    new_forms = normalized_forms(context.new, by_class=True)
    same, prefixes = [], []
    for form in (new_forms[new_id] for new_id in context.targets.tolist()):
        same.append(ids.get(_byte_counterpart(form), -1))
        prefixes.append(next((ids[part] for part in _shorter_forms(form) if part in ids), -1))
    return same, prefixes


def _byte_counterpart(form: Any) -> str | None:
    """`<0xNN>` for a character below 256, and the reverse."""
    if isinstance(form, str) and len(form) == 1 and ord(form) < 256:
        return f"<0x{ord(form):02X}>"
    if isinstance(form, str) and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", form)):
        return chr(int(byte[1], 16))
    return None


def _shorter_forms(form: Any) -> Iterator[Any]:
    mark, text = form if isinstance(form, tuple) else (None, form or "")
    if mark == "special":
        return
    for stop in range(len(text) - 1, 0, -1):
        if not text[:stop].strip():
            return
        yield text[:stop] if mark is None else (mark, text[:stop])


def with_partial_matches(matrix: TransplantMatrix, matches: PartialMatches) -> TransplantMatrix:
    """The matrix of the same targets with copied rows wherever a partial match stands, in each table."""
    if not bool(((matches.input >= 0) | (matches.head >= 0)).any()):
        return matrix
    input_rows = _with_copies(matrix.input, matches.input)
    head_rows = None
    if matrix.head is not None or not torch.equal(matches.input, matches.head):
        head_rows = _with_copies(matrix.rows_for(head=True), matches.head)
    both, either = (matches.input >= 0) & (matches.head >= 0), (matches.input >= 0) | (matches.head >= 0)
    kinds = matrix.kinds.clone()
    kinds[either & (kinds != SourceKind.UNDEFINED)] = int(SourceKind.COMBINED)
    kinds[both] = int(SourceKind.COPIED)
    return TransplantMatrix(kinds, input_rows, matrix.base_rows, head_rows)


def _with_copies(rows: CombinationRows, base_ids: Tensor) -> CombinationRows:
    copied = base_ids >= 0
    copies = CombinationRows.from_padded(base_ids[copied, None], torch.ones(int(copied.sum()), 1))
    source = torch.arange(len(rows))
    source[copied] = len(rows) + torch.arange(len(copies))
    return concatenate_rows([rows, copies]).select(source)
