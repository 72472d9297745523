"""Which keys are nearest to each query by cosine, exactly and within a memory budget, and sparsemax over those cosines.

`nearest_tokens` finds the best keys of every query in tiles: it never holds the matrix of all similarities (90 GB for
150,000 x 150,000 tokens). `sparsemax_tokens` gives the sparsemax (arXiv 1602.02068) of each row of that matrix, for
which it needs only the best few of every row: it asks for more only where the support does not end among them.

What is ranked is the cosine computed in float64 and rounded to float32, equal ones in the order of their ids. A float32
matrix product finds candidates, with a bound of its error; a query whose candidates the bound cannot separate from the
rest is searched again for more of them. So neither tiles nor threads nor the order of summation show in the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MEMORY_BUDGET = 256 * 2**20  # bytes

_SPARE_CANDIDATES = 8  # near ties, such as the spellings that an uncased encoder does not tell apart
_MORE_CANDIDATES = 4  # times as many, where the candidates could not be separated from the rest
_FIRST_SUPPORT = 64  # cosines per row that sparsemax looks at first
_CANDIDATE_BYTES = 80  # an index and a similarity, several times while tiles are merged
_QUERY_TILE = 512  # rows are enough for a matrix product at full speed
_FLOAT32_UNIT_ROUNDOFF = 2.0**-24
# What torch may round the factors of float32 products to, by torch.get_float32_matmul_precision(): TF32 or bfloat16.
_FACTOR_ROUNDING = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}


class NearestTokens(NamedTuple):
    """The nearest keys of every query, best first.

    indices: `(queries, top_k)` int64, positions in the keys.
    similarities: `(queries, top_k)` float32, their cosines.
    """

    indices: Tensor
    similarities: Tensor


class SparseCombinations(NamedTuple):
    """Weighted keys for every query; the valid places of a row stand first.

    indices: `(queries, longest)` int64, positions in the keys, -1 in unused places.
    weights: `(queries, longest)` float32, 0 in unused places.
    """

    indices: Tensor
    weights: Tensor


def nearest_tokens(queries: Tensor, keys: Tensor, top_k: int, *, memory_budget: int = MEMORY_BUDGET) -> NearestTokens:
    """The `top_k` keys with the largest cosine for every query; all keys where there are fewer.

    queries: `(queries, dim)`, keys: `(keys, dim)`, floating point, on one device, taken as float32. The cosine with a
        zero vector is 0.
    memory_budget: bytes that may be held at once beyond the arguments (other dtypes than float32 are
        copied) and the result.

    Cosines are float64 values rounded to float32; equal ones stand in the order of their positions. Raises ValueError
    for shapes that do not fit, for NaN and infinite components, for `top_k < 1` and for a budget that is not positive.
    """
    queries, keys = _checked(queries, keys, memory_budget)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        rows = torch.arange(len(queries), device=queries.device)
        return _exact_top_k(queries, rows, keys, min(top_k, len(keys)), memory_budget)


def sparsemax_tokens(queries: Tensor, keys: Tensor, *, memory_budget: int = MEMORY_BUDGET) -> SparseCombinations:
    """The sparsemax of every query's cosines with all keys, as weighted keys, largest weight first.

    Arguments and errors as in `nearest_tokens`; there must be a key. The weights of a row are positive and sum to 1.
    Beyond the budget the function holds as many indices and weights for every query as the longest row has.
    """
    queries, keys = _checked(queries, keys, memory_budget)
    if not len(keys):
        raise ValueError("sparsemax needs at least one key, but there is none")
    rows = torch.arange(len(queries), device=queries.device)
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        parts = list(_sparsemax_parts(queries, rows, keys, min(_FIRST_SUPPORT, len(keys)), memory_budget // 2))
    longest = max((part.indices.shape[1] for _, part in parts), default=0)
    indices = torch.full((len(queries), longest), -1, dtype=torch.int64, device=queries.device)
    weights = torch.zeros((len(queries), longest), dtype=torch.float32, device=queries.device)
    for part_rows, part in parts:
        indices[part_rows, : part.indices.shape[1]] = part.indices
        weights[part_rows, : part.weights.shape[1]] = part.weights
    return SparseCombinations(indices, weights)


def sparsemax_of_sorted(scores: Tensor) -> Tensor:
    """Sparsemax along the last dimension of scores that fall along it: `(rows, count)`, computed in float64, float32.

    The Euclidean projection onto the simplex (arXiv 1602.02068, algorithm 1). With the best `count` of more scores
    given, the result is that of all scores if the last weight is 0, since then no later score can be in the support.
    """
    scores = scores.double()
    sizes = torch.arange(1, scores.shape[-1] + 1, dtype=torch.float64, device=scores.device)
    excess = scores.cumsum(-1) - 1
    support = (scores * sizes > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, support - 1) / support
    return (scores - threshold).clamp(min=0).float()


def _sparsemax_parts(
    queries: Tensor, rows: Tensor, keys: Tensor, count: int, memory_budget: int
) -> Iterator[tuple[Tensor, SparseCombinations]]:
    """Some rows at a time with their weighted keys, found among the best `count` keys or, where needed, more."""
    for part in rows.split(max(1, memory_budget // (64 * count))):
        found = _exact_top_k(queries, part, keys, count, memory_budget)
        weights = sparsemax_of_sorted(found.similarities)
        ended = weights[:, -1] == 0 if count < len(keys) else torch.ones_like(part, dtype=torch.bool)
        if ended.any():
            longest = int((weights[ended] > 0).sum(1).max())
            weights_kept = weights[ended, :longest]
            indices_kept = found.indices[ended, :longest].masked_fill(weights_kept == 0, -1)
            yield part[ended], SparseCombinations(indices_kept, weights_kept)
        if not ended.all():
            more = min(count * _MORE_CANDIDATES, len(keys))
            yield from _sparsemax_parts(queries, part[~ended], keys, more, memory_budget)


# --- arguments --------------------------------------------------------------------------------------------------------


def _checked(queries: Tensor, keys: Tensor, memory_budget: int) -> tuple[Tensor, Tensor]:
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1]:
        shapes = f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        raise ValueError(f"expected queries (queries, dim) and keys (keys, dim) of one dim, not {shapes}")
    if memory_budget < 1:
        raise ValueError(f"memory_budget must be a positive number of bytes, not {memory_budget}")
    for name, vectors in (("query", queries), ("key", keys)):
        if not vectors.is_floating_point():
            raise ValueError(f"expected floating-point vectors for each {name}, not {vectors.dtype}")
        finite = vectors.detach().amax(1).isfinite() & vectors.detach().amin(1).isfinite()
        if not finite.all():
            raise ValueError(f"{name} {int((~finite).nonzero()[0])} holds NaN or infinite components")
    return queries.detach().float(), keys.detach().float()


# --- candidates in float32 --------------------------------------------------------------------------------------------


def _exact_top_k(queries: Tensor, rows: Tensor, keys: Tensor, top_k: int, memory_budget: int) -> NearestTokens:
    """`nearest_tokens` for some rows of the queries, checked, and `top_k` not above the number of keys."""
    indices = torch.empty((len(rows), top_k), dtype=torch.int64, device=queries.device)
    similarities = torch.empty((len(rows), top_k), dtype=torch.float32, device=queries.device)
    places = torch.arange(len(rows), device=queries.device)
    count = min(top_k + _SPARE_CANDIDATES, len(keys))
    while len(places) and top_k:
        uncertain = []
        for part in places.split(max(1, memory_budget // (4 * (_CANDIDATE_BYTES * count + 4 * queries.shape[1])))):
            vectors = queries[rows[part]]
            candidates, others_at_most = _candidates(vectors, keys, count, memory_budget // 2)
            ranked = _ranked(vectors, keys, candidates, memory_budget // 4)
            indices[part], similarities[part] = ranked.indices[:, :top_k], ranked.similarities[:, :top_k]
            uncertain.append(part[others_at_most >= ranked.similarities[:, top_k - 1]])
        places = torch.cat(uncertain) if count < len(keys) else places[:0]
        count = min(count * _MORE_CANDIDATES, len(keys))
    return NearestTokens(indices, similarities)


def _candidates(queries: Tensor, keys: Tensor, count: int, memory_budget: int) -> tuple[Tensor, Tensor]:
    """The `count` best keys of each query by float32 cosines, `(queries, count)` in any order, and what no other key's
    cosine exceeds, `(queries,)`."""
    best = torch.full((len(queries), count), -math.inf, device=queries.device)
    best_keys = torch.zeros((len(queries), count), dtype=torch.int64, device=queries.device)
    query_tile, key_tile = _tiles(len(queries), len(keys), queries.shape[1], memory_budget)
    # One buffer for all tiles, and results written in place: kept between freed blocks, they would fragment the heap.
    buffer = torch.empty(query_tile * key_tile, device=queries.device)
    for start in range(0, len(keys), key_tile):
        directions = _directions(keys[start : start + key_tile]).T
        for rows in torch.arange(len(queries), device=queries.device).split(query_tile):
            tile = buffer[: len(rows) * directions.shape[1]].view(len(rows), -1)
            torch.mm(_directions(queries[rows]), directions, out=tile)
            values, columns = _tile_top_k(tile, count)
            values = torch.cat([best[rows], values], dim=1)
            best[rows], kept = values.topk(count, dim=1)
            best_keys[rows] = torch.cat([best_keys[rows], columns + start], dim=1).gather(1, kept)
    return best_keys, best.amin(1) + _cosine_error(queries.shape[1])


def _tiles(queries: int, keys: int, dim: int, memory_budget: int) -> tuple[int, int]:
    """How many queries and keys are compared at once, so that their similarities and both sides' directions fit into
    the budget; wide tiles, of which little is left after the first selection."""
    floats = memory_budget // 4
    query_tile = max(1, min(_QUERY_TILE, queries, math.isqrt(max(1, floats // 4))))
    key_tile = max(1, (floats - 3 * query_tile * dim) // (2 * query_tile + 3 * dim))
    return query_tile, min(key_tile, keys)


def _tile_top_k(similarities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values of each row and their columns, in any order.

    Columns are taken in groups: those of the `count` groups with the largest maxima hold the `count` largest values.
    Maxima are vectorised, unlike `topk`, which so looks at a small part of the row.
    """
    columns = similarities.shape[1]
    group_size = math.isqrt(columns // max(1, count))
    if group_size < 4:
        return similarities.topk(min(count, columns), dim=1)
    groups = columns // group_size  # group g is the columns g, g + groups, g + 2 * groups, …
    grouped = similarities[:, : groups * group_size].unflatten(1, (group_size, groups))
    best_groups = grouped.amax(1).topk(count, dim=1).indices
    members = (
        best_groups[:, None, :] + groups * torch.arange(group_size, device=similarities.device)[:, None]
    ).flatten(1)
    rest = torch.arange(groups * group_size, columns, device=similarities.device).expand(len(similarities), -1)
    members = torch.cat([members, rest], dim=1)
    values, kept = similarities.gather(1, members).topk(count, dim=1)
    return values, members.gather(1, kept)


def _directions(vectors: Tensor) -> Tensor:
    """The vectors with length 1, zero vectors as they are; scaled first, so that no square overflows or vanishes."""
    largest = vectors.abs().amax(1, keepdim=True)
    vectors = vectors / torch.where(largest > 0, largest, 1.0)
    return vectors / torch.where(largest > 0, vectors.norm(dim=1, keepdim=True), 1.0)


def _cosine_error(dim: int) -> float:
    """A bound of the error of float32 cosines: `dim` products and sums of unit vectors, whose components are themselves
    off by the sums of squares, a root and a quotient; and of the rounding of the exact ones."""
    return 2 * (dim + 8) * _FLOAT32_UNIT_ROUNDOFF + 2 * _FACTOR_ROUNDING[torch.get_float32_matmul_precision()]


# --- exact cosines ----------------------------------------------------------------------------------------------------


def _ranked(queries: Tensor, keys: Tensor, candidates: Tensor, memory_budget: int) -> NearestTokens:
    """The candidates of every query by falling exact cosine, equal ones by position."""
    candidates = candidates.sort(dim=1).values
    block = max(1, memory_budget // (32 * max(1, queries.shape[1]) * candidates.shape[1]))
    similarities = torch.empty(candidates.shape, dtype=torch.float32, device=queries.device)
    for rows in torch.arange(len(queries), device=queries.device).split(block):
        similarities[rows] = _cosines(queries[rows], keys, candidates[rows])
    order = similarities.argsort(dim=1, descending=True, stable=True)
    return NearestTokens(candidates.gather(1, order), similarities.gather(1, order))


def _cosines(queries: Tensor, keys: Tensor, candidates: Tensor) -> Tensor:
    """`(queries, candidates)`, computed in float64 and rounded to float32."""
    vectors = queries.double()[:, None]
    others = keys[candidates.flatten()].view(*candidates.shape, -1).double()
    products = (others * vectors).sum(-1)
    norms = others.square().sum(-1).sqrt() * vectors.square().sum(-1).sqrt()
    return torch.where(norms > 0, products / norms, 0.0).float()
