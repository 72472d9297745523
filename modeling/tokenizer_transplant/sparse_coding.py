"""Vectors as sparse combinations of anchor vectors: pure numerics of the methods that work in a donor model's space.

`orthogonal_matching_pursuit` gives the supports of `mergekit.tokensurgeon.batch_omp` in a fraction of the time,
`interpolation` combines the nearest anchors, `procrustes_map` and `sparse_basis` carry a space over into another,
`rotary_matching_pursuit` lets anchors turn by rotary positions; `under_trained_rows` tells which anchors to trust.

A combination is two tensors: `indices` `(targets, k)` int64 into the anchors and `weights` `(targets, k)` float32.
Places that a target does not use stand last, with index -1 and weight 0.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from numbers import Integral
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .nearest_tokens import SparseCombinations, nearest_tokens

ALGORITHMS = ("auto", "gram", "direct")
WEIGHT_SCHEMES = ("distance_proportional", "barycentric", "least_squares")

# Bytes of the correlations that one tile of targets keeps: on a CPU they stay in the cache.
_TILE_BYTES = {"cpu": 16 * 2**20, "cuda": 2**31}
_BLOCK_TARGETS = 256  # targets whose products with all anchors are computed at once

# A residual or an atom's remainder below this part of the target or atom is rounding, not signal: the pursuit ends.
_TOLERANCE = 1e-6
_COMMON_EXPONENT = 16  # of two: with components up to such powers, no product or square leaves float32
# The Gram form loses digits as residuals and remainders shrink. Below these parts of squared norms, targets are
# repeated in the direct form, which computes with the vectors themselves.
_TRUSTED_ENERGY = 1e-3
_TRUSTED_REMAINDER = 1e-2
# Correlations closer than this part of |target| |longest anchor| are compared again in float64: eight units of
# float32's last place, several times the errors seen.
_DECIDED_PART = 2.0**-21
_EQUAL_PART = 1e-12  # what float64 cannot tell apart counts as equal: the lowest index wins
# Corrections of least-squares weights (relative): two sweeps leave about the square of it as error.
_CONVERGED = 1e-4
_SPARE_CANDIDATES = 16  # neighbours ranked again by exact distances, beyond those asked for
_LEAST_DISTANCE = 1e-6  # mergekit's: distances below weigh as this one, sums of cosines below count as none
_LEAST_SIZE = 1e-8  # of an atom's squared norm, in mp_rope
_LEAST_COSINE = 0.5  # with the mean unused row, for a row to count as unused itself
# The cost model, measured on one thread in floating-point operations of a matrix product that take the same time: of
# the Gram form for every anchor and squared number of steps, with and without compiled steps; of the direct form for
# every component and squared number of steps.
_COMPILED_UPDATE = 1.5
_UPDATE = 10.0
_ORTHOGONALISATION = 215.0
# targets * anchors * sparsity**2: from here on the compiled steps save more time than numba's import takes.
_COMPILED_UPDATES = 10**10


class _Supports(NamedTuple):
    """Chosen anchors of some targets and the Cholesky factors of their Gram matrices.

    indices: `(targets, k)` int64, -1 where the pursuit ended before.
    factors: `(targets, k, k)` float64, lower triangular; rows of unused places are those of the identity.
    """

    indices: Tensor
    factors: Tensor


def orthogonal_matching_pursuit(
    targets: Tensor,
    anchors: Tensor,
    sparsity: int,
    *,
    algorithm: str = "auto",
    memory_budget: int = 4 * 2**30,
) -> SparseCombinations:
    """Every target as a combination of at most `sparsity` anchors, chosen greedily.

    In each step a target takes the anchor with the largest `|<residual, anchor>|` (anchors are not normalised; near
    ties are decided in float64, equal ones by the lowest index), then the residual is made orthogonal to all anchors
    taken. The weights are the least squares of the target on its anchors. Supports are those of
    `mergekit.tokensurgeon.batch_omp` (spec 4.3), except that a target stops where its residual, or what the best anchor
    adds to those taken, is no more than rounding: duplicated and zero anchors get no weight.

    targets: `(targets, width)`; anchors: `(anchors, width)`; floating point, computed in float32.
    algorithm: "gram" updates correlations with the anchors' Gram matrix (Batch-OMP), which takes `4 * anchors**2`
        bytes; "direct" multiplies residuals and anchors anew in every step; "auto" takes the cheaper one for these
        sizes whose Gram matrix keeps to `memory_budget` bytes.

    Raises ValueError for shapes that do not fit, values that are not finite in float32, `sparsity` below 1 or above the
    number of anchors, and for targets so much longer than the anchors that float32 does not hold their weights.
    """
    targets, anchors = _checked_pair(targets, anchors)
    sparsity = _checked_count(sparsity, len(anchors))
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm is one of {', '.join(ALGORITHMS)}, not {algorithm!r}")
    kernel = _kernel_for(targets, len(anchors), sparsity)
    if algorithm == "auto":
        compiled = kernel is not None
        algorithm = _cheaper_algorithm(len(targets), len(anchors), anchors.shape[1], sparsity, memory_budget, compiled)

    targets, target_exponents = _scaled(targets, 1)
    anchors, anchor_exponents = _scaled(anchors, (0, 1))
    gram = _gram_form(anchors, kernel) if algorithm == "gram" else None
    results = [torch.empty(0, sparsity, dtype=torch.int64, device=targets.device)]
    weights = [targets.new_empty(0, sparsity)]
    exponents = target_exponents - anchor_exponents
    for block, exponent in zip(targets.split(_BLOCK_TARGETS), exponents.split(_BLOCK_TARGETS)):
        supports = _supports_of_block(block, anchors, gram, sparsity)
        results.append(supports.indices)
        weights.append((_least_squares_weights(block, anchors, supports, kernel) * exponent.double().exp2()).float())
    combinations = SparseCombinations(torch.cat(results), torch.cat(weights))
    if not torch.isfinite(combinations.weights).all():
        row = int((~torch.isfinite(combinations.weights)).any(1).nonzero()[0])
        raise ValueError(f"target {row} is so much longer than its anchors that float32 does not hold its weights")
    return combinations


def _scaled(vectors: Tensor, dims: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Vectors divided by powers of two, exactly, so that their products neither overflow nor vanish: one for each row
    or for all, where the largest component is far from 1; and the exponents, int32, of as many dimensions."""
    exponents = torch.linalg.vector_norm(vectors, math.inf, dims, keepdim=True).frexp().exponent
    exponents = torch.where(exponents.abs() <= _COMMON_EXPONENT, 0, exponents)
    if not exponents.any():
        return vectors, exponents
    half = exponents.div(2, rounding_mode="floor")  # 2^149 is beyond float32
    return vectors * half.neg().float().exp2() * (half - exponents).float().exp2(), exponents


def _cheaper_algorithm(
    targets: int, anchors: int, width: int, sparsity: int, memory_budget: int, compiled: bool
) -> str:
    """ "gram" or "direct", by their times. What both do for every anchor in a step is left out."""
    # Half as many anchors as dimensions leave so little of a target that the Gram form cannot be trusted.
    if 4 * anchors**2 > memory_budget or 2 * sparsity >= width:
        return "direct"
    products, update = 2 * targets * anchors * width, _COMPILED_UPDATE if compiled else _UPDATE
    gram_cost = 2 * anchors**2 * width + products + update * targets * anchors * sparsity**2
    direct_cost = products * sparsity + _ORTHOGONALISATION * targets * width * sparsity**2
    return "gram" if gram_cost < direct_cost else "direct"


class _GramForm(NamedTuple):
    """What the pursuit by inner products knows of the anchors.

    matrix: `(anchors, columns)` float32, their inner products with the columns.
    columns: `(columns, width)` float32, the anchors and, for the compiled steps, zeros behind them.
    kernel: `pursuit_kernel`, or None for steps by torch.
    """

    matrix: Tensor
    columns: Tensor
    kernel: Any


def _gram_form(anchors: Tensor, kernel: Any) -> _GramForm:
    columns = anchors
    if kernel is not None:
        columns = torch.nn.functional.pad(anchors, (0, 0, 0, -len(anchors) % kernel.TILE_ANCHORS))
    if anchors.device.type != "cpu":
        return _GramForm(anchors @ columns.T, columns, kernel)
    # numpy asks for huge pages, torch does not: to find the small ones costs a part of the time.
    matrix = torch.from_numpy(np.empty((len(anchors), len(columns)), np.float32))
    for rows, block in zip(matrix.split(_BLOCK_TARGETS), anchors.split(_BLOCK_TARGETS)):
        rows.copy_(_products(block, columns))
    return _GramForm(matrix, columns, kernel)


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ columns.T` of float32. On a CPU by the function of oneDNN that Inductor's code calls: the library behind
    `@` takes twice as long on some processors, and there is no public choice between them."""
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if rows.device.type != "cpu" or not onednn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return rows @ columns.T
    return torch.ops.mkldnn._linear_pointwise.default(rows, columns, None, "none", [], "")


def _kernel_for(targets: Tensor, anchors: int, sparsity: int) -> Any:
    """`pursuit_kernel` where the steps are on a CPU and enough for it."""
    enough = len(targets) * anchors * sparsity**2 >= _COMPILED_UPDATES
    return _pursuit_kernel() if enough and targets.device.type == "cpu" else None


@lru_cache
def _pursuit_kernel() -> Any:
    """The compiled steps of `pursuit_kernel.py`; None without numba."""
    try:
        from .pursuit_kernel import TILE_ANCHORS, make_orthogonal, pursuit_steps, refined_weights
    except ImportError:
        return None
    except Exception as error:  # of numba's or LLVM's: another version than those known
        warnings.warn(
            f"matching pursuit goes on without its compiled steps, which numba refuses: {error}", stacklevel=2
        )
        return None
    return SimpleNamespace(
        TILE_ANCHORS=TILE_ANCHORS,
        make_orthogonal=make_orthogonal,
        pursuit_steps=pursuit_steps,
        refined_weights=refined_weights,
    )


def _supports_of_block(targets: Tensor, anchors: Tensor, gram: _GramForm | None, sparsity: int) -> _Supports:
    if gram is None:
        return _direct_pursuit(targets, anchors, sparsity)
    correlations = _products(targets, gram.columns)
    if gram.kernel is not None:
        supports, trusted = _compiled_pursuit(targets, correlations, anchors, gram, sparsity)
    else:
        tile_bytes = _TILE_BYTES.get(targets.device.type, _TILE_BYTES["cuda"])
        tile = max(1, tile_bytes // (4 * sparsity * len(anchors)))
        tiles = zip(targets.split(tile), correlations.split(tile))
        parts, known = zip(*(_gram_pursuit(*part, anchors, gram.matrix, sparsity) for part in tiles))
        supports, trusted = _Supports(*(torch.cat(field) for field in zip(*parts))), torch.cat(known)
    again = (~trusted).nonzero().squeeze(1)
    if len(again):
        repeated = _direct_pursuit(targets[again], anchors, sparsity)
        for field, repeated_field in zip(supports, repeated):
            field[again] = repeated_field
    return supports


def _compiled_pursuit(
    targets: Tensor, correlations: Tensor, anchors: Tensor, gram: _GramForm, sparsity: int
) -> tuple[_Supports, Tensor]:
    """As `_gram_pursuit`, by the compiled steps."""

    def decide(target: int, candidates: Tensor, taken: Tensor) -> int:
        return _decided(candidates, targets[target], anchors, taken, gram.kernel)

    sizes = gram.matrix.diagonal()
    close = _close(targets, sizes).squeeze(1)
    steps = gram.kernel.pursuit_steps(correlations, gram.matrix, close, sparsity, decide)
    energies = targets.double().square().sum(1, keepdim=True)
    return _checked_supports(steps.indices, steps.taken, steps.remainders, steps.shares, energies, sizes)


def _gram_pursuit(
    targets: Tensor, correlations: Tensor, anchors: Tensor, gram: Tensor, sparsity: int
) -> tuple[_Supports, Tensor]:
    """The pursuit in terms of inner products only (Batch-OMP), for a tile of targets.

    The taken anchors are orthogonalised implicitly: `projected[i]` holds the inner products of all anchors with what
    the i-th taken anchor adds to those before it, from which the correlations of the next residual follow by one
    subtraction. Which targets ended early or lost digits on the way is found out afterwards.

    correlations: `(tile, anchors)` float32, inner products of targets and anchors; overwritten.
    gram: `(anchors, anchors)` float32, inner products of the anchors.
    Returns the supports and whether each can be trusted, `(tile,)` bool: if not, all of its values are meaningless.
    """
    tile, sizes = len(targets), gram.diagonal()
    indices = torch.zeros(tile, sparsity, dtype=torch.int64, device=correlations.device)
    projected = correlations.new_empty(sparsity, tile, len(anchors))
    shares, taken = correlations.new_zeros(sparsity, tile, sparsity), correlations.new_empty(sparsity, tile, 1)
    remainders = correlations.new_empty(tile, sparsity)
    magnitudes, close = torch.empty_like(correlations), _close(targets, sizes)
    for step in range(sparsity):
        torch.abs(correlations, out=magnitudes)
        chosen = _chosen(magnitudes, close, targets, anchors, indices[:, :step])
        indices[:, step : step + 1] = chosen
        torch.gather(correlations, 1, chosen, out=taken[step])
        torch.index_select(gram, 0, chosen.squeeze(1), out=projected[step])
        if step:
            before = projected[:step].transpose(0, 1)  # (tile, step, anchors)
            share = shares[step, :, :step]
            torch.div(
                before.gather(2, chosen.unsqueeze(1).expand(-1, step, 1)).squeeze(2), remainders[:, :step], out=share
            )
            projected[step].unsqueeze(1).baddbmm_(share.contiguous().unsqueeze(1), before, alpha=-1)
        torch.gather(projected[step], 1, chosen, out=remainders[:, step : step + 1])
        correlations.addcmul_(taken[step] / remainders[:, step : step + 1], projected[step], value=-1)
        # Taken anchors are orthogonal to the residual: what rounding left there must not be chosen.
        correlations.scatter_(1, indices[:, : step + 1], 0.0)
    energies = targets.double().square().sum(1, keepdim=True)
    return _checked_supports(indices, taken.squeeze(2).T, remainders, shares.transpose(0, 1), energies, sizes)


def _checked_supports(
    indices: Tensor, taken: Tensor, remainders: Tensor, shares: Tensor, energies: Tensor, sizes: Tensor
) -> tuple[_Supports, Tensor]:
    """What the steps of a Gram pursuit amount to.

    indices, taken, remainders: `(tile, sparsity)`, the anchor of every step, its correlation with the residual and the
    squared norm of what it adds; shares: `(tile, sparsity, sparsity)`, how much of the earlier additions is in it;
    energies: `(tile, 1)` float64, squared norms of the targets; sizes: `(anchors,)`, those of the anchors.
    """
    remainders = remainders.double()
    left = energies - (taken.double().square() / remainders).cumsum(1)
    left_before = torch.cat([energies, left[:, :-1]], 1)
    sound = (taken != 0) & (left_before > _TRUSTED_ENERGY * energies)
    sound &= remainders > _TRUSTED_REMAINDER * sizes[indices]
    factors = (
        shares.double() + torch.eye(shares.shape[1], dtype=torch.float64, device=shares.device)
    ) * remainders.sqrt().unsqueeze(1)
    return _Supports(indices, factors), sound.all(1)  # NaN is not sound


def _direct_pursuit(targets: Tensor, anchors: Tensor, sparsity: int) -> _Supports:
    """The pursuit with the residuals themselves: one product of residuals and anchors in each step."""
    count, width = targets.shape
    indices, factors = _no_supports(count, sparsity, targets.device)
    directions = targets.new_zeros(count, min(sparsity, width), width)
    residuals = targets.clone()
    norms = torch.linalg.vector_norm(targets, dim=1)
    active = norms > 0
    magnitudes, close = targets.new_empty(count, len(anchors)), _close(targets, anchors.square().sum(1))
    for step in range(min(sparsity, width)):
        torch.abs(_products(residuals, anchors), out=magnitudes)
        if step:
            magnitudes.scatter_(1, indices[:, :step].clamp(min=0), 0.0)
        chosen = _chosen(magnitudes, close, targets, anchors, indices[:, :step]).squeeze(1)
        atoms = anchors[chosen]
        remainders, shares = _orthogonal_remainders(atoms, directions[:, :step])
        lengths = torch.linalg.vector_norm(remainders, dim=1)
        active &= (residuals * atoms).sum(1) != 0
        active &= torch.linalg.vector_norm(residuals, dim=1) > _TOLERANCE * norms
        active &= lengths > _TOLERANCE * torch.linalg.vector_norm(atoms, dim=1)
        if not active.any():
            break

        indices[:, step] = torch.where(active, chosen, -1)
        factors[:, step, :step] = torch.where(active[:, None], shares, 0.0).double()
        factors[:, step, step] = torch.where(active, lengths, 1.0).double()
        direction = torch.where(active[:, None], remainders / lengths[:, None], 0.0)
        directions[:, step] = direction
        residuals -= (residuals * direction).sum(1, keepdim=True) * direction
    return _Supports(indices, factors)


def _orthogonal_remainders(atoms: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """What of `atoms` `(targets, width)` is orthogonal to `directions` `(targets, n, width)`, and the shares
    `(targets, n)` taken away; done twice, as once is not enough in floating point."""
    shares = atoms.new_zeros(directions.shape[:2])
    for _ in range(2 if directions.shape[1] else 0):
        more = torch.bmm(directions, atoms.unsqueeze(2))
        atoms = atoms - torch.bmm(more.transpose(1, 2), directions).squeeze(1)
        shares = shares + more.squeeze(2)
    return atoms, shares


def _no_supports(count: int, sparsity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    indices = torch.full((count, sparsity), -1, dtype=torch.int64, device=device)
    factors = torch.eye(sparsity, dtype=torch.float64, device=device).repeat(count, 1, 1)
    return indices, factors


def _close(targets: Tensor, sizes: Tensor) -> Tensor:
    """Differences of correlations that float32 does not decide, `(targets, 1)`; sizes: squared norms of the anchors."""
    return _DECIDED_PART * torch.linalg.vector_norm(targets, dim=1, keepdim=True) * sizes.max().sqrt()


def _chosen(magnitudes: Tensor, close: Tensor, targets: Tensor, anchors: Tensor, taken: Tensor) -> Tensor:
    """The anchor that every target takes next, `(targets, 1)` int64.

    magnitudes: `(targets, anchors)`, of the correlations with the residuals; overwritten.
    close: `(targets, 1)`, differences from the largest that decide nothing.
    taken: `(targets, steps)` int64, the anchors taken so far, -1 for none.
    """
    chosen = _first_largest(magnitudes).unsqueeze(1)
    largest = magnitudes.gather(1, chosen)
    magnitudes.scatter_(1, chosen, 0.0)
    second = magnitudes.gather(1, _first_largest(magnitudes).unsqueeze(1))
    undecided = (largest - second <= close) & (largest > close)
    for row in undecided[:, 0].nonzero()[:, 0].tolist():
        magnitudes[row, chosen[row]] = largest[row]
        candidates = (magnitudes[row] >= largest[row] - close[row]).nonzero()[:, 0]
        chosen[row] = _decided(candidates, targets[row], anchors, taken[row])
    return chosen


def _decided(candidates: Tensor, target: Tensor, anchors: Tensor, taken: Tensor, kernel: Any = None) -> int:
    """The candidate with the largest correlation in float64, the lowest of equal ones."""
    points, residual = anchors[taken[taken >= 0]].double(), target.double()
    if kernel is not None:  # in every new thread of its own, torch's QR would start threads again
        kernel.make_orthogonal(residual, points)
    elif len(points):
        basis = torch.linalg.qr(points.T).Q
        residual = residual - basis @ (basis.T @ residual)
    exact = (anchors[candidates].double() * residual).sum(1).abs()
    return int(candidates[exact >= (1 - _EQUAL_PART) * exact.max()][0])


def _first_largest(values: Tensor) -> Tensor:
    """Position of the largest value in every row, the first of equal ones: `(rows,)` int64."""
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy().argmax(1))  # ten times as fast as torch's, and certain to be the first
    return values.argmax(1)


def _least_squares_weights(targets: Tensor, anchors: Tensor, supports: _Supports, kernel: Any) -> Tensor:
    """Weights `(targets, k)` float64 of the least squares of every target on its support.

    The factor of the pursuit, known to about float32, preconditions sweeps of iterative refinement in float64; where
    they do not converge, the support is nearly dependent and the weights come from its singular values.
    """
    refined = _refined_weights if kernel is None else kernel.refined_weights
    weights, corrections = refined(targets, anchors, *supports)
    stray = ~(_norms(corrections) <= _CONVERGED * _norms(weights))  # NaN strays
    for rows in stray.nonzero().squeeze(1).split(32):
        weights[rows] = _unconstrained_weights(targets[rows].double(), _points(anchors, supports.indices[rows]))
    return torch.where(supports.indices < 0, 0.0, weights)


def _refined_weights(targets: Tensor, anchors: Tensor, indices: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares weights after two sweeps, and the corrections of the second, `(targets, k)` float64 each."""
    parts = []
    for block, taken, factor in zip(targets.split(32), indices.split(32), factors.split(32)):
        points = _points(anchors, taken)
        solution = torch.cholesky_solve(points @ block.double().unsqueeze(2), factor)
        residuals = block.double().unsqueeze(2) - points.transpose(1, 2) @ solution
        correction = torch.cholesky_solve(points @ residuals, factor)
        parts.append(torch.cat([solution + correction, correction], 2))
    weights, corrections = torch.cat(parts).unbind(2)
    return weights, corrections


def _norms(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dim=1)


def _points(anchors: Tensor, indices: Tensor) -> Tensor:
    """Anchors of every target, `(targets, k, width)` float64, zero where unused."""
    points = anchors[indices.clamp(min=0)].double()
    return points.masked_fill_((indices < 0).unsqueeze(2), 0.0)


def nearest_anchors(targets: Tensor, anchors: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """The anchors at the least Euclidean distance from every target, nearest first, equal ones by index.

    targets: `(targets, width)`; anchors: `(anchors, width)`. Returns indices `(targets, neighbors)` int64 and the
    distances, the same shape, float64, computed from differences. Raises ValueError as `orthogonal_matching_pursuit`.
    """
    targets, anchors = _checked_pair(targets, anchors)
    neighbors = _checked_count(neighbors, len(anchors))
    half_squares = anchors.double().square().sum(1).div(2).float()
    candidates = min(neighbors + _SPARE_CANDIDATES, len(anchors))
    indices, distances = [], []
    for block in targets.split(_BLOCK_TARGETS):
        # |y - a|^2 / 2 = |y|^2 / 2 + |a|^2 / 2 - <y, a> ranks roughly; differences decide among the best.
        closeness = torch.addmm(half_squares, block, anchors.T, beta=-1)
        found = closeness.topk(candidates, dim=1).indices.sort(dim=1).values
        apart = torch.stack([_norms(anchors[row].double() - target.double()) for row, target in zip(found, block)])
        order = apart.sort(dim=1, stable=True).indices[:, :neighbors]
        indices.append(found.gather(1, order))
        distances.append(apart.gather(1, order))
    if not indices:
        return targets.new_empty(0, neighbors, dtype=torch.int64), targets.new_empty(0, neighbors, dtype=torch.float64)
    return torch.cat(indices), torch.cat(distances)


def interpolation(
    targets: Tensor,
    anchors: Tensor,
    neighbors: int,
    *,
    weight_scheme: str = "distance_proportional",
    cosine: bool = False,
) -> SparseCombinations:
    """Every target as a combination of its nearest anchors (mergekit's common_interpolation, spec 4.3).

    weight_scheme: "distance_proportional", weights `1 / max(distance, 1e-6)`, with `cosine` the cosines themselves,
        divided by their sum; "barycentric", the least squares of the target on its anchors among weights of sum 1;
        "least_squares", without that condition (the shortest solution where there are several).
    cosine: nearest by cosine instead of Euclidean distance.

    A target whose cosines have no positive sum (nothing lies in its direction) gets no combination: all its places are
    unused. Raises ValueError as `orthogonal_matching_pursuit`, and for an unknown scheme.
    """
    targets, anchors = _checked_pair(targets, anchors)
    neighbors = _checked_count(neighbors, len(anchors))
    if weight_scheme not in WEIGHT_SCHEMES:
        raise ValueError(f"weight_scheme is one of {', '.join(WEIGHT_SCHEMES)}, not {weight_scheme!r}")
    if cosine:
        indices, similarities = nearest_tokens(targets, anchors, neighbors)
        shares = similarities.double()
    else:
        indices, distances = nearest_anchors(targets, anchors, neighbors)
        shares = 1.0 / distances.clamp(min=_LEAST_DISTANCE)
    if weight_scheme == "distance_proportional":
        total = shares.sum(1, keepdim=True)
        weights = torch.where(total > _LEAST_DISTANCE, shares / total, 0.0)
        indices = torch.where(total > _LEAST_DISTANCE, indices, -1)
    else:
        solve = _barycentric_weights if weight_scheme == "barycentric" else _unconstrained_weights
        blocks = zip(targets.split(32), indices.split(32))
        solved = [solve(block.double(), _points(anchors, rows)) for block, rows in blocks]
        weights = torch.cat([targets.new_empty(0, neighbors, dtype=torch.float64), *solved])
    return SparseCombinations(indices, weights.float())


def _unconstrained_weights(targets: Tensor, points: Tensor) -> Tensor:
    """The shortest least-squares weights `(n, k)` of `targets` `(n, width)` on `points` `(n, k, width)`, all float64;
    directions below float32's resolution of the points count as absent."""
    resolution = (max(points.shape[1:]) * torch.finfo(torch.float32).eps) ** 2  # the Gram matrix has squared values
    inverse = torch.linalg.pinv(points @ points.transpose(1, 2), rtol=resolution, hermitian=True)
    return (inverse @ (points @ targets.unsqueeze(2))).squeeze(2)


def _barycentric_weights(targets: Tensor, points: Tensor) -> Tensor:
    """As `_unconstrained_weights`, among weights whose sum is 1 (the Gram matrix bordered by ones, after Lagrange)."""
    count, neighbors, width = points.shape
    gram = points @ points.transpose(1, 2)
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    system = gram.new_ones(count, neighbors + 1, neighbors + 1)
    system[:, :neighbors, :neighbors] = gram / scale[:, None, None]
    system[:, neighbors, neighbors] = 0.0
    right = gram.new_ones(count, neighbors + 1, 1)
    right[:, :neighbors] = points @ targets.unsqueeze(2) / scale[:, None, None]
    resolution = (max(neighbors, width) * torch.finfo(torch.float32).eps) ** 2
    return (torch.linalg.pinv(system, rtol=resolution, hermitian=True) @ right)[:, :neighbors, 0]


class AffineMap(NamedTuple):
    """`y -> (y - source_mean) @ matrix + target_mean`, all float64."""

    source_mean: Tensor
    matrix: Tensor
    target_mean: Tensor

    def __call__(self, vectors: Tensor) -> Tensor:
        """vectors: `(n, source width)`; returns `(n, target width)` float32."""
        return ((vectors.double() - self.source_mean) @ self.matrix + self.target_mean).float()


def procrustes_map(source: Tensor, target: Tensor) -> AffineMap:
    """The rotation between the principal subspaces of two spaces that brings landmarks closest to their images.

    source: `(landmarks, source width)`, target: `(landmarks, target width)`, the same landmarks in both. Both are
    centred and projected on their `min(widths)` principal components; the orthogonal matrix between these is
    Procrustes' `U W^T` of the singular value decomposition of `source^T target` (spec 4.3, landmark_pca; mergekit 0.1.5
    applies its transpose). An exact rotation of the source is recovered.
    """
    if len(source) != len(target) or not len(source):
        raise ValueError(f"expected the same landmarks in both spaces, found {len(source)} and {len(target)}")
    components = min(source.shape[1], target.shape[1])
    source_mean, target_mean = source.double().mean(0), target.double().mean(0)
    source, target = source.double() - source_mean, target.double() - target_mean
    source_basis, target_basis = _principal_directions(source, components), _principal_directions(target, components)
    left, _, right = torch.linalg.svd((source @ source_basis).T @ (target @ target_basis))
    return AffineMap(source_mean, source_basis @ left @ right @ target_basis.T, target_mean)


def _principal_directions(centred: Tensor, count: int) -> Tensor:
    """Directions of the largest variance, `(width, count)`, largest first, of `centred` `(points, width)`."""
    return torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :count]


def sparse_basis(points: Tensor, sparsity: int, count: int) -> SparseCombinations:
    """Sparse combinations of centred points that stand for their `count` principal directions: the token basis of stb
    (spec 4.3). points: `(points, width)`, count ≤ width. Returns tensors of shape `(count, sparsity)`."""
    centred = points.double() - points.double().mean(0)
    directions = _principal_directions(centred, count).T
    return orthogonal_matching_pursuit(directions.float(), centred.float(), sparsity)


class RotarySpace(NamedTuple):
    """A model's embedding space as rotary positions (RoPE) turn it.

    heads: attention heads among which the width is divided; base: RoPE's base (`rope_theta`).
    """

    heads: int
    base: float = 10_000.0


def rotary_matching_pursuit(
    targets: Tensor,
    source: Tensor,
    target: Tensor,
    sparsity: int,
    source_space: RotarySpace,
    target_space: RotarySpace,
) -> Tensor:
    """Images of vectors by matching pursuit with anchors that rotary positions may turn (mergekit's mp_rope, spec 4.3).

    Each step takes the anchor with the largest `|<residual, anchor>|`, turns it by the position that comes closest to
    the residual (or to its negative, whichever position is smaller), and subtracts its projection. The weights are the
    least squares of the target on the turned anchors; the image is the same combination of the anchors' images, turned
    by the same positions in their own space.

    targets: `(targets, source width)`; source: `(anchors, source width)`; target: `(anchors, target width)`, the same
    anchors in the space of the images. Returns `(targets, target width)` float32. Raises ValueError as
    `orthogonal_matching_pursuit`, and for widths that the heads do not divide into even parts.
    """
    targets, source = _checked_pair(targets, source)
    sparsity = _checked_count(sparsity, len(source))
    if len(source) != len(target):
        raise ValueError(f"expected the same anchors in both spaces, found {len(source)} and {len(target)}")
    source_frequencies = _rotary_frequencies(source.shape[1], source_space, source.device)
    target_frequencies = _rotary_frequencies(target.shape[1], target_space, source.device)
    images = [targets.new_empty(0, target.shape[1])]
    for block in targets.split(_BLOCK_TARGETS):
        indices, positions = _rotary_supports(block, source, sparsity, source_frequencies)
        points = _turned(source[indices].double(), positions, source_frequencies)
        weights = _unconstrained_weights(block.double(), points)
        turned = _turned(target[indices].double(), positions, target_frequencies)
        images.append((weights.unsqueeze(1) @ turned).squeeze(1).float())
    return torch.cat(images)


def _rotary_supports(targets: Tensor, anchors: Tensor, sparsity: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Indices `(targets, sparsity)` int64 and positions, the same shape, float64."""
    indices = targets.new_zeros(len(targets), sparsity, dtype=torch.int64)
    positions = targets.new_zeros(len(targets), sparsity, dtype=torch.float64)
    residuals = targets.double()
    for step in range(sparsity):
        magnitudes = (residuals.float() @ anchors.T).abs_().scatter_(1, indices[:, :step], -math.inf)
        indices[:, step] = _first_largest(magnitudes)
        atoms = anchors[indices[:, step]].double()
        forth = _closest_position(atoms, residuals, frequencies)
        back = _closest_position(atoms, -residuals, frequencies)
        positions[:, step] = torch.where(forth.abs() < back.abs(), forth, back)
        atoms = _turned(atoms, positions[:, step], frequencies)
        sizes = atoms.square().sum(1).clamp(min=_LEAST_SIZE)
        residuals = residuals - ((residuals * atoms).sum(1) / sizes).unsqueeze(1) * atoms
    return indices, positions


def _rotary_frequencies(width: int, space: RotarySpace, device: torch.device) -> Tensor:
    """The angle that one position adds in each plane of each head, `(heads, head width / 2)` float64."""
    head_width, rest = divmod(width, space.heads)
    if rest or head_width % 2:
        raise ValueError(f"{space.heads} heads do not divide a width of {width} into even parts")
    return space.base ** -(torch.arange(0, head_width, 2, dtype=torch.float64, device=device) / head_width).expand(
        space.heads, -1
    )


def _planes(vectors: Tensor, frequencies: Tensor) -> Tensor:
    """The two coordinates in every plane that positions turn, `(..., heads, 2, head width / 2)`."""
    return vectors.unflatten(-1, (len(frequencies), 2, frequencies.shape[1]))


def _closest_position(atoms: Tensor, residuals: Tensor, frequencies: Tensor) -> Tensor:
    """The position whose angles are the least squares of those that would turn each plane of an atom onto the
    residual's, `(targets,)`."""
    (atom_x, atom_y), (x, y) = _planes(atoms, frequencies).unbind(-2), _planes(residuals, frequencies).unbind(-2)
    angles = torch.atan2(atom_x * y - atom_y * x, atom_x * x + atom_y * y)
    return (angles * frequencies).sum((1, 2)) / frequencies.square().sum()


def _turned(vectors: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """`vectors` `(..., width)` as rotary attention turns them at `positions` `(...)`."""
    x, y = _planes(vectors, frequencies).unbind(-2)
    angles = positions[..., None, None] * frequencies
    turned = torch.stack([x * angles.cos() - y * angles.sin(), y * angles.cos() + x * angles.sin()], -2)
    return turned.flatten(-3)


def under_trained_rows(
    input_table: Tensor, head_table: Tensor | None, unused: Tensor, *, quantile: float = 0.01
) -> Tensor:
    """Which rows of a model's tables training has hardly touched, `(rows,)` bool (arXiv 2405.05417, spec 4.3).

    These are the `unused` rows; those whose cosine with the mean unused row is above the `1 - quantile` quantile and
    above 0.5, in either table; and, for a model with a head of its own, those of the input table whose norm is below
    the `quantile` quantile.

    input_table, head_table: `(rows, width)`, the head None where it is the input table; unused: `(n,)` int64, ids that
    no token of the tokenizer uses.
    """
    unused = unused.unique()
    bad = torch.zeros(len(input_table), dtype=torch.bool, device=input_table.device)
    bad[unused] = True
    if head_table is not None:
        norms = _norms(input_table.float())
        bad |= norms < torch.quantile(norms, quantile)
    if len(unused):
        for table in (input_table, head_table):
            if table is not None:
                mean = table[unused].float().mean(0, keepdim=True)
                cosines = torch.nn.functional.cosine_similarity(table.float(), mean, dim=1)
                bad |= cosines > torch.quantile(cosines, 1 - quantile).clamp(min=_LEAST_COSINE)
    return bad


def _checked_pair(targets: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    if not targets.dim() == anchors.dim() == 2 or not targets.shape[1] == anchors.shape[1] > 0:
        shapes = f"{tuple(targets.shape)} and {tuple(anchors.shape)}"
        raise ValueError(
            f"expected targets and anchors of shapes (targets, width) and (anchors, width), found {shapes}"
        )
    targets, anchors = (vectors.detach().float().contiguous() for vectors in (targets, anchors))
    for name, vectors in (("targets", targets), ("anchors", anchors)):
        unfit = ~torch.isfinite(torch.linalg.vector_norm(vectors, math.inf, dim=1))
        if unfit.any():
            row = int(unfit.nonzero()[0])
            raise ValueError(f"{name} must be finite in float32, but row {row} is not")
    return targets, anchors


def _checked_count(count: int, anchors: int) -> int:
    if isinstance(count, bool) or not isinstance(count, Integral):
        raise ValueError(f"k must be an integer, found {count!r}")
    if not 1 <= count <= anchors:
        raise ValueError(f"k must be between 1 and the number of anchors, {anchors}; found {count}")
    return int(count)  # the products of numpy's small integers overflow
