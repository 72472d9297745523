"""The steps of matching pursuit by a Gram matrix, compiled by numba at the first import (some seconds; later processes
read what it compiled).

A library's functions go through all earlier directions in every step: for thousands of anchors they lie outside the
fast caches, and reading them takes the time. Here a target takes several steps at once among its most promising
anchors. Then one pass over all anchors, in which the directions are read once, computes the correlations after every
one of these steps and counts the anchors that reach what was taken. From the first step on at which there is another
one, the steps do not count and are taken again: what is found is what a search among all anchors in every step finds.

numba knows no vectors of the processor: the pass over a tile of anchors, which has to stay in its registers, is written
in the intermediate language of LLVM. `sparse_coding.py` imports this module only where there is enough to do.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

try:
    from llvmlite import binding, ir
    from numba import config, float32, float64, int64, njit, types
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError("this module needs numba") from error
_settings: Any = config  # numba sets its attributes from the environment, where type checkers do not see them
if _settings.DISABLE_JIT:
    raise ImportError("this module needs numba's compiler, which NUMBA_DISABLE_JIT turns off")
_features = binding.get_host_cpu_features()
_is_known = "sse2" not in _features or (_settings.ENABLE_AVX and _features.get("avx2") and _features.get("fma"))
if _settings.CPU_NAME or _settings.CPU_FEATURES or not _is_known:
    # For another processor, LLVM calls a function for every product, or ends the whole process.
    raise ImportError("this module needs numba to compile for this processor, on x86 one with AVX2 and FMA")

# The sums of a tile, `GROUP_STEPS` times `_REGISTERS`, and its earlier directions fill the 32 or 16 registers.
_LANES, _REGISTERS = (16, 4) if _features.get("avx512f") else (8, 2)
TILE_ANCHORS = _LANES * _REGISTERS
_GROUP_STEPS = 6
_CANDIDATES = 128  # the most promising anchors: at most so many, and at least half of them where there are
_SEARCH_STEPS = 10  # to find how large the correlations of so many anchors are
_FIRST_LEVEL = 0.6  # of the largest correlation: where that search begins
_TILES_AHEAD = 2  # so far ahead, rows of the Gram matrix are fetched into the cache
_LINE_BYTES = 64
_MAGNITUDE_BITS = 0x7FFFFFFF  # as integers, these bits of float32 numbers have the order of their magnitudes

_FLOAT, _INT64, _INT32 = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_BYTE, _MASK = ir.IntType(8), ir.IntType(_LANES)
_FLOATS = ir.VectorType(_FLOAT, _LANES)


class Steps(NamedTuple):
    """What targets took, `(targets, sparsity)` each, and zeros from where a target's correlations are no more than
    rounding.

    indices: int64, the anchor of every step; taken: float32, its correlation with the residual; remainders: float32,
    the squared norm of what it adds to the earlier ones.
    shares: `(targets, sparsity, sparsity)` float32, how much of what the earlier ones added is in it.
    """

    indices: Tensor
    taken: Tensor
    remainders: Tensor
    shares: Tensor


def pursuit_steps(
    correlations: Tensor, gram: Tensor, close: Tensor, sparsity: int, decide: Callable[[int, Tensor, Tensor], int]
) -> Steps:
    """The steps of orthogonal matching pursuit, in as many threads as torch may use.

    correlations: `(targets, columns)` float32, inner products of targets and anchors; overwritten. The number of
        columns is a multiple of `TILE_ANCHORS`; those behind the anchors are zero.
    gram: `(anchors, columns)` float32, inner products of the anchors.
    close: `(targets,)` float32, differences of correlations that decide nothing.
    decide: called as `decide(target, candidates, taken)` where several anchors are that close to the largest
        correlation: `candidates`, `(n,)` int64 in ascending order, after the anchors `taken`, `(steps,)` int64.
    """
    count, columns = correlations.shape
    steps = Steps(
        torch.zeros(count, sparsity, dtype=torch.int64, device=correlations.device),
        correlations.new_zeros(count, sparsity),
        correlations.new_zeros(count, sparsity),
        correlations.new_zeros(count, sparsity, sparsity),
    )
    arrays = [tensor.numpy() for tensor in (correlations, gram, close, *steps)]

    def run(target: int, end: int) -> None:
        projected = _aligned(columns // TILE_ANCHORS, sparsity + _GROUP_STEPS, TILE_ANCHORS)
        following, step, chosen = _aligned(columns), 0, -1
        while target < end:
            target, step = _pursue(*arrays, projected, following, target, end, step, chosen)
            if target < end:
                magnitudes = correlations[target].abs()
                candidates = (magnitudes >= magnitudes.max() - close[target]).nonzero()[:, 0]
                chosen = decide(target, candidates, steps.indices[target, :step])

    _in_threads(run, count)
    return steps


def refined_weights(targets: Tensor, anchors: Tensor, indices: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares weights of targets on anchors after two sweeps of iterative refinement in float64, and the
    corrections of the second sweep, `(targets, k)` float64 each.

    targets: `(targets, width)`, anchors: `(anchors, width)`, float32; indices: `(targets, k)` int64, unused ones
        negative and last; factors: `(targets, k, k)` float64, about the Cholesky factors of the Gram matrices of the
        anchors taken, rows of unused places those of the identity.
    """
    weights, corrections = factors.new_zeros(2, *indices.shape)
    arrays = [tensor.contiguous().numpy() for tensor in (targets, anchors, indices, factors, weights, corrections)]

    def run(start: int, end: int) -> None:
        _refine(*arrays, start, end)

    _in_threads(run, len(targets))
    return weights, corrections


def make_orthogonal(residual: Tensor, points: Tensor) -> None:
    """Subtract from `residual`, `(width,)`, its part in the space of `points`, `(n, width)`, both float64, in place.
    The points become a basis."""
    _make_orthogonal(residual.numpy(), points.numpy())


def _in_threads(run: Callable[[int, int], None], count: int) -> None:
    """Call `run(start, end)` once for each of several ranges of targets, in this thread and as many others as torch may
    use and the system starts."""
    threads = max(1, min(torch.get_num_threads(), count))
    bounds = np.linspace(0, count, threads + 1).astype(int).tolist()
    if threads == 1:
        run(*bounds)
        return
    ranges = SimpleQueue[tuple[int, int]]()
    for start_and_end in pairwise(bounds):
        ranges.put(start_and_end)

    def run_ranges() -> None:
        while True:
            try:
                start, end = ranges.get_nowait()
            except Empty:
                return
            run(start, end)

    with ThreadPoolExecutor(threads - 1) as pool:
        helpers = []
        try:
            for _ in range(threads - 1):
                helpers.append(pool.submit(run_ranges))
        except RuntimeError:  # once the main thread has ended, or at the system's limit, Python starts no other
            pass
        run_ranges()
    for helper in helpers:
        helper.result()


def _aligned(*shape: int) -> np.ndarray:
    """Uninitialised float32 numbers that begin with a cache line."""
    memory = np.empty(4 * int(np.prod(shape)) + _LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % _LINE_BYTES
    return memory[start : start + len(memory) - _LINE_BYTES].view(np.float32).reshape(shape)


# --- compiled code: the pass over a tile; addresses are int64 ---------------------------------------------------------


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)


def _function(builder, name: str, result, *arguments):
    """A function of LLVM."""
    return builder.module.declare_intrinsic(name, (), ir.FunctionType(result, arguments))


def _at(builder, address, type_, offset: int = 0):
    return builder.inttoptr(builder.add(address, _constant(offset)), ir.PointerType(type_))


def _loaded(builder, pointer):
    value = builder.load(pointer)
    value.align = 4
    return value


def _registers(builder, address, offset: int = 0) -> list:
    """The numbers of a tile."""
    places = range(offset, offset + 4 * TILE_ANCHORS, 4 * _LANES)
    return [_loaded(builder, _at(builder, address, _FLOATS, place)) for place in places]


def _store(builder, registers: list, address, offset: int = 0) -> None:
    for number, register in enumerate(registers):
        builder.store(register, _at(builder, address, _FLOATS, offset + 4 * _LANES * number)).align = 4


def _to_all(builder, address, offset: int = 0):
    """One number in all places of a register."""
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    single = builder.insert_element(undefined, _loaded(builder, _at(builder, address, _FLOAT, offset)), _constant(0))
    return builder.shuffle_vector(single, undefined, ir.Constant(ir.VectorType(_INT32, _LANES), [0] * _LANES))


def _fetch(builder, address) -> None:
    """Ask for the cache lines of a tile, which need not lie at a valid address."""
    prefetch = _function(builder, "llvm.prefetch.p0", ir.VoidType(), ir.PointerType(_BYTE), _INT32, _INT32, _INT32)
    reading, all_caches, data = (ir.Constant(_INT32, value) for value in (0, 3, 1))
    for offset in range(0, 4 * TILE_ANCHORS, _LINE_BYTES):
        builder.call(prefetch, [_at(builder, address, _BYTE, offset), reading, all_caches, data])


def _add_products(builder, factor, registers: list, sums: list) -> list:
    multiply_add = _function(builder, f"llvm.fma.v{_LANES}f32", _FLOATS, _FLOATS, _FLOATS, _FLOATS)
    return [builder.call(multiply_add, [factor, register, sum_]) for register, sum_ in zip(registers, sums)]


def _inlined(function: Callable) -> Any:
    """`intrinsic`, of which type checkers believe that compiled code passes the typing context itself."""
    return intrinsic(function)


@_inlined
def _pass_tile(
    typing_context, rows, earlier, next_rows, addresses, shares, inner_shares, ratios, levels, correlations, following,
    counts,
):  # fmt: skip
    """All steps of a group for a tile of anchors.

    rows: the tile's inner products with the `earlier` directions; those of the group are written behind them.
    next_rows: where the next tile's begin.
    addresses: `(group,)` int64, where the tile begins in the rows of the Gram matrix that belong to the anchors taken.
    shares: `(earlier, group)`, what to add of the earlier directions to each; inner_shares: `(group, group)`, and of
        those of the group itself.
    ratios: `(group,)`, what to add of each direction to the correlations; written to `following` after the last one.
    levels, counts: `(group,)`, `counts[step]` grows by the number of correlations before the step of at least that
        magnitude.
    """

    def generated(context, builder, signature, arguments):
        rows, earlier, next_rows, addresses, shares, inner_shares, ratios, levels, correlations, following, counts = (
            arguments
        )
        sums = []
        for step in range(_GROUP_STEPS):
            address = builder.load(_at(builder, addresses, _INT64, 8 * step))
            sums += _registers(builder, address)
            _fetch(builder, builder.add(address, _constant(4 * TILE_ANCHORS * _TILES_AHEAD)))
        sums = _with_earlier(builder, sums, rows, earlier, next_rows, shares)
        directions = [sums[start : start + _REGISTERS] for start in range(0, len(sums), _REGISTERS)]

        magnitude = _function(builder, f"llvm.fabs.v{_LANES}f32", _FLOATS, _FLOATS)
        ones = _function(builder, f"llvm.ctpop.i{_LANES}", _MASK, _MASK)
        places = builder.add(rows, builder.mul(earlier, _constant(4 * TILE_ANCHORS)))
        current = _registers(builder, correlations)
        for step in range(_GROUP_STEPS):
            for before in range(step):
                share = _to_all(builder, inner_shares, 4 * (step * _GROUP_STEPS + before))
                directions[step] = _add_products(builder, share, directions[before], directions[step])
            _store(builder, directions[step], places, 4 * TILE_ANCHORS * step)
            level, pointer = _to_all(builder, levels, 4 * step), _at(builder, counts, _INT64, 8 * step)
            count = builder.load(pointer)
            for register in current:
                reached = builder.fcmp_ordered(">=", builder.call(magnitude, [register]), level)
                reached = builder.call(ones, [builder.bitcast(reached, _MASK)])
                count = builder.add(count, builder.zext(reached, _INT64))
            builder.store(count, pointer)
            current = _add_products(builder, _to_all(builder, ratios, 4 * step), directions[step], current)
        _store(builder, current, following)
        return context.get_dummy_value()

    return types.void(*[int64] * 11), generated


def _with_earlier(builder, sums: list, rows, earlier, next_rows, shares) -> list:
    """The sums of `_pass_tile` with the shares of the earlier directions."""
    before, head, body, after = builder.block, *(builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_INT64)
    index.add_incoming(_constant(0), before)
    values = [builder.phi(_FLOATS) for _ in sums]
    for value, sum_ in zip(values, sums):
        value.add_incoming(sum_, before)
    builder.cbranch(builder.icmp_signed("<", index, earlier), body, after)

    builder.position_at_end(body)
    offset = builder.mul(index, _constant(4 * TILE_ANCHORS))
    direction = _registers(builder, builder.add(rows, offset))
    _fetch(builder, builder.add(next_rows, offset))
    factors, following = builder.add(shares, builder.mul(index, _constant(4 * _GROUP_STEPS))), []
    for step in range(_GROUP_STEPS):
        own = values[_REGISTERS * step : _REGISTERS * (step + 1)]
        following += _add_products(builder, _to_all(builder, factors, 4 * step), direction, own)
    index.add_incoming(builder.add(index, _constant(1)), body)
    for value, sum_ in zip(values, following):
        value.add_incoming(sum_, body)
    builder.branch(head)
    builder.position_at_end(after)
    return values


# --- compiled code: the steps of a target -----------------------------------------------------------------------------

# Sums are fused with products, and in float64 taken in any order; division by zero gives infinity.
_FLOAT32: Any = {"fastmath": {"contract"}, "error_model": "numpy", "nogil": True}
_FLOAT64: Any = {**_FLOAT32, "fastmath": {"contract", "reassoc"}}
_inner = njit(**_FLOAT32)


class _Target(NamedTuple):
    """One target's part of the arguments of `_pursue`."""

    correlations: Any
    close: Any
    indices: Any
    taken: Any
    remainders: Any
    shares: Any


class _Group(NamedTuple):
    """What the steps of a group need."""

    candidates: Any  # (_CANDIDATES + 1,) int64, the most promising anchors
    values: Any  # (_CANDIDATES + 1,), their correlations with the residual
    directions: Any  # (sparsity, _CANDIDATES), their inner products with the directions
    addresses: Any  # the others as in _pass_tile
    shares: Any
    inner_shares: Any
    ratios: Any
    levels: Any
    counts: Any


@_inner
def _largest_magnitude(correlations):
    """NaN if there is one."""
    bits, largest = correlations.view(np.int32), np.int32(0)
    for number in range(len(bits)):
        largest = max(largest, np.int32(bits[number] & _MAGNITUDE_BITS))
    return np.int32(largest).view(np.float32)


@_inner
def _count_from(correlations, level):
    """How many correlations have at least this magnitude."""
    count = 0
    for number in range(len(correlations)):
        count += abs(correlations[number]) >= level
    return count


@_inner
def _choose_candidates(target, group, largest, level):
    """Write down the most promising anchors, in ascending order; return how many (0 if too many are as good as the
    best) and the level that they reach, a part of the largest correlation."""
    low, high, reached, count = np.float32(0), np.float32(1), np.float32(0), 0
    for _ in range(_SEARCH_STEPS):
        reached = min(level * largest, largest - target.close)  # whatever is close to the largest is among them
        count = _count_from(target.correlations, reached)
        if count > _CANDIDATES:
            low = level
        elif 2 * count < _CANDIDATES:
            high = level
        else:
            break
        level = (low + high) / np.float32(2)
    if count > _CANDIDATES:
        reached = largest - target.close
        count = _count_from(target.correlations, reached)
        if count > _CANDIDATES:
            return 0, level
    _write_candidates(target, group, reached)
    return count, level


@_inner
def _write_candidates(target, group, reached):
    count, correlations, candidates = np.uint64(0), target.correlations, group.candidates
    for anchor in range(len(correlations)):
        candidates[count] = anchor  # overwritten by the next one if this one does not count
        count += np.uint64(abs(correlations[anchor]) >= reached)
    for place in range(count):
        group.values[place] = correlations[candidates[place]]


@_inner
def _best_candidate(group, count, close):
    """The place of the candidate with the largest correlation, -1 if another one is close to it."""
    best, largest, second = -1, np.float32(0), np.float32(0)
    for place in range(count):
        magnitude = abs(group.values[place])
        if magnitude > largest:
            best, largest, second = place, magnitude, largest
        elif magnitude > second:
            second = magnitude
    return best if largest - second > close else -1


@_inner
def _take(target, gram, group, first, number, place):
    """Take the candidate at `place` as step `number` of the group that begins with step `first`."""
    step, anchor = first + number, group.candidates[place]
    direction, taken = group.directions[step], group.values[place]
    for other in range(_CANDIDATES):
        direction[other] = gram[anchor, group.candidates[other]]
    for before in range(step):
        earlier = group.directions[before]
        share = earlier[place] / target.remainders[before]
        target.shares[step, before] = share
        if before < first:
            group.shares[before, number] = -share
        else:
            group.inner_shares[number, before - first] = -share
        for other in range(_CANDIDATES):
            direction[other] -= share * earlier[other]
    ratio = taken / direction[place]
    for other in range(_CANDIDATES):
        group.values[other] -= ratio * direction[other]
    target.indices[step], target.taken[step], target.remainders[step] = anchor, taken, direction[place]
    group.ratios[number], group.levels[number], group.counts[number] = -ratio, abs(taken) - target.close, 0
    group.addresses[number] = gram.ctypes.data + anchor * gram.strides[0]


@_inner
def _take_group(target, gram, group, projected, step, count, place):
    """Take steps among the candidates, the first at `place`, until two are close; return how many."""
    numbers, tile_numbers = projected.reshape(projected.size), projected[0].size
    candidates = group.candidates[:count]
    starts = candidates // TILE_ANCHORS * tile_numbers + candidates % TILE_ANCHORS
    for before in range(step):
        for other in range(count):
            group.directions[before, other] = numbers[starts[other]]
        starts += TILE_ANCHORS
    number, places = 0, np.empty(_GROUP_STEPS, np.int64)
    while place >= 0:
        _take(target, gram, group, step, number, place)
        places[number] = place
        number += 1
        if number == _GROUP_STEPS or step + number == len(target.indices):
            break
        # Taken anchors are orthogonal to the residual: what rounding left there must not be chosen.
        group.values[places[:number]] = 0
        place = _best_candidate(group, count, target.close)
    for unused in range(number, _GROUP_STEPS):
        group.addresses[unused], group.ratios[unused], group.levels[unused] = group.addresses[0], 0, 0
        group.shares[:step, unused], group.inner_shares[unused] = 0, 0
    return number


@_inner
def _verify_group(target, group, projected, following, step, number):
    """Pass over all anchors; return how many of the `number` steps hold, after which `target.correlations` are those
    with the residual."""
    tile_bytes, row_bytes = projected.strides[0], projected.strides[1]
    for tile in range(len(projected)):
        rows = projected.ctypes.data + tile * tile_bytes
        offset = tile * row_bytes
        _pass_tile(
            rows, step, rows + (tile_bytes if tile + 1 < len(projected) else 0), group.addresses.ctypes.data,
            group.shares.ctypes.data, group.inner_shares.ctypes.data, group.ratios.ctypes.data,
            group.levels.ctypes.data, target.correlations.ctypes.data + offset, following.ctypes.data + offset,
            group.counts.ctypes.data,
        )  # fmt: skip
        group.addresses[:] += row_bytes
    held = 1
    while held < number and group.counts[held] == 1:
        held += 1
    if held == number:
        target.correlations[:] = following
    else:
        for tile in range(len(projected)):
            part = target.correlations[tile * TILE_ANCHORS : (tile + 1) * TILE_ANCHORS]
            for place in range(held):
                part += group.ratios[place] * projected[tile, step + place]
    target.correlations[target.indices[: step + held]] = 0
    return held


@_inner
def _pursue_target(target, gram, group, projected, following, step, chosen):
    """The steps of one target from `step` on, which takes the anchor `chosen` if that is not -1; return the step that
    has to be decided, or that behind the last."""
    level = np.float32(_FIRST_LEVEL)
    while step < len(target.indices):
        largest = _largest_magnitude(target.correlations)
        if not largest > target.close:
            target.indices[step:], target.taken[step:], target.remainders[step:] = 0, 0, 0
            return len(target.indices)
        count, level = _choose_candidates(target, group, largest, level)
        if chosen < 0:
            place = _best_candidate(group, count, target.close)
            if place < 0:
                return step
        elif count:
            place = np.searchsorted(group.candidates[:count], chosen)
        else:
            place, count = 0, 1
            group.candidates[0], group.values[0] = chosen, target.correlations[chosen]
        chosen = -1
        group.candidates[count:], group.values[count:] = group.candidates[0], 0
        number = _take_group(target, gram, group, projected, step, count, place)
        step += _verify_group(target, group, projected, following, step, number)
    return step


def _compiled(signature: Any, options: Any) -> Callable:
    """Compiled now, so that what cannot be compiled fails at the import."""

    def compile_function(function: Callable) -> Callable:
        try:
            return njit(signature, cache=True, **options)(function)
        except Exception:  # numba finds no folder that it may write its cache to, or what it finds there is damaged
            return njit(signature, **options)(function)

    return compile_function


_VALUES, _ROWS, _CUBE = float32[::1], float32[:, ::1], float32[:, :, ::1]


@_compiled(
    types.UniTuple(int64, 2)(
        _ROWS, _ROWS, _VALUES, int64[:, ::1], _ROWS, _ROWS, _CUBE, _CUBE, _VALUES, int64, int64, int64, int64
    ),
    _FLOAT32,
)
def _pursue(
    correlations, gram, close, indices, taken, remainders, shares, projected, following, start, end, step, chosen
):
    """The steps of targets `start` to `end`, the first of which has taken `step` anchors and takes `chosen` next, if
    that is not -1. Returns the target and step that have to be decided, or `(end, 0)`.

    projected: `(tiles, sparsity + group, TILE_ANCHORS)`, the inner products of all anchors with what each anchor taken
    adds to those before it; following: `(columns,)`, memory.
    """
    sparsity = indices.shape[1]
    group = _Group(
        np.zeros(_CANDIDATES + 1, np.int64), np.zeros(_CANDIDATES + 1, np.float32),
        np.zeros((sparsity, _CANDIDATES), np.float32), np.zeros(_GROUP_STEPS, np.int64),
        np.zeros((sparsity, _GROUP_STEPS), np.float32), np.zeros((_GROUP_STEPS, _GROUP_STEPS), np.float32),
        np.zeros(_GROUP_STEPS, np.float32), np.zeros(_GROUP_STEPS, np.float32), np.zeros(_GROUP_STEPS, np.int64),
    )  # fmt: skip
    for number in range(start, end):
        target = _Target(
            correlations[number], close[number], indices[number], taken[number], remainders[number], shares[number]
        )
        step = _pursue_target(target, gram, group, projected, following, step, chosen)
        if step < sparsity:
            return number, step
        step, chosen = 0, -1
    return end, 0


# --- compiled code: weights -------------------------------------------------------------------------------------------


@njit(**_FLOAT64)
def _product(anchor, residual):
    total = 0.0
    for component in range(len(anchor)):
        total += anchor[component] * residual[component]
    return total


@njit(**_FLOAT64)
def _solve(factor, values, count):
    """Divide the first `count` values by the Gram matrix with this Cholesky factor."""
    for place in range(count):
        for before in range(place):
            values[place] -= factor[place, before] * values[before]
        values[place] /= factor[place, place]
    for place in range(count - 1, -1, -1):
        values[place] /= factor[place, place]
        for before in range(place):
            values[before] -= factor[place, before] * values[place]


@_compiled(
    types.void(_ROWS, _ROWS, int64[:, ::1], float64[:, :, ::1], float64[:, ::1], float64[:, ::1], int64, int64),
    _FLOAT64,
)
def _refine(targets, anchors, indices, factors, weights, corrections, start, end):
    for target in range(start, end):
        taken, factor, solution, correction = indices[target], factors[target], weights[target], corrections[target]
        count = (taken >= 0).sum()
        for sweep in range(2):
            residual = targets[target].astype(np.float64)
            for place in range(count if sweep else 0):
                residual -= solution[place] * anchors[taken[place]]
            for place in range(count):
                correction[place] = _product(anchors[taken[place]], residual)
            _solve(factor, correction, count)
            solution += correction


@njit(**_FLOAT64)
def _subtract_parts(vector, basis):
    for _ in range(2):  # once is not enough in floating point
        for place in range(len(basis)):
            share = _product(basis[place], vector)
            for component in range(len(vector)):
                vector[component] -= share * basis[place, component]


@_compiled(types.void(float64[::1], float64[:, ::1]), _FLOAT64)
def _make_orthogonal(residual, points):
    """By Gram and Schmidt."""
    for place in range(len(points)):
        point = points[place]
        _subtract_parts(point, points[:place])
        size = np.sqrt(_product(point, point))
        if size > 0:
            point /= size
    _subtract_parts(residual, points)
