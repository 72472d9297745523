"""The maxima of MaxSim in bfloat16 for processors with AVX-512 BF16, compiled by numba at the first import (a second;
later processes read what it compiled).

A library's matrix product must write all similarities out, and reads the documents while it does not multiply. Here a
tile of document vectors stays in registers until its maxima are taken, while the next ones are on their way from
memory. Documents in float32 are rounded a tile at a time, so that no copy of them is needed.

numba knows no vectors of the processor: the two innermost loops are written in the intermediate language of LLVM.
`max_sim.py` imports this module only where it can run; importing it elsewhere raises.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .max_sim import _memory

try:
    from llvmlite import binding, ir
    from numba import boolean, config, int64, njit, types
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError("this module needs numba") from error
_settings: Any = config  # numba sets its attributes from the environment, where type checkers do not see them
if _settings.DISABLE_JIT:
    raise ImportError("this module needs numba's compiler, which NUMBA_DISABLE_JIT turns off")
_is_known = _settings.ENABLE_AVX and binding.get_host_cpu_features().get("avx512bf16")
if _settings.CPU_NAME or _settings.CPU_FEATURES or not _is_known:
    # LLVM ends the whole process over an instruction that the processor it compiles for does not have.
    raise ImportError("this module needs numba to compile for this processor, and for AVX-512 BF16")

LANES = 16  # float32 numbers of a register
_TILE_ROWS = 12  # document vectors: with the sums of 2 registers of query vectors each, they fill the 32 registers
_TILE_QUERIES = 2 * LANES
_PAIR_BYTES = 4  # two neighbouring components in bfloat16: the processor's product adds up pairs
_AHEAD_BYTES = 6_144  # so far behind the current vectors, memory is fetched into the cache
_LINE_BYTES = 64
_VECTORS_PER_THREAD = 16_384

_FLOAT, _INT64, _INT32 = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_POINTER = ir.PointerType(ir.IntType(8))


class _BFloat16(ir.Type):
    """LLVM's type, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_FLOATS = ir.VectorType(_FLOAT, LANES)
_BFLOATS = ir.VectorType(_BFloat16(), LANES)
_PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)
_PAIRS_AS_INTEGERS = ir.VectorType(_INT32, LANES)
_ZEROS = ir.Constant(_FLOATS, [ir.Constant(_FLOAT, 0.0)] * LANES)


def max_sim_maxima(
    query: Tensor, addresses: np.ndarray, lengths: np.ndarray, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """For every document the largest product of every query vector with one of its vectors, all rounded to bfloat16.

    query: `(query vectors, dim)` bfloat16 on the CPU, dim a multiple of `LANES`.
    addresses, lengths: `(documents,)` int64: where a document's vectors lie, one after the other, and their number.
    dtype: of the documents, bfloat16 or float32.

    Returns `(documents, query vectors)` float32, -inf for documents without vectors, NaN where a product is; and, for
    documents in float32, the squares of the largest norm of a vector and of its rounding error, `(documents, 2)`.
    The products of two vectors are summed up in float32, in the order of the components. The maxima lie in memory that
    the thread's next call overwrites.
    """
    count, dim = query.shape
    groups = -(-count // _TILE_QUERIES)
    # (groups, pairs, query vectors of a group, 2): what a tile multiplies a pair of components by is in one place.
    arranged = _memory.of("queries", groups * dim * _TILE_QUERIES, torch.bfloat16, query.device).zero_()
    arranged = arranged.view(groups, dim // 2, _TILE_QUERIES, 2)
    for group, rows in enumerate(query.split(_TILE_QUERIES)):
        arranged[group, :, : len(rows)] = rows.view(len(rows), dim // 2, 2).transpose(0, 1)
    maxima = _memory.of("maxima", len(lengths) * groups * _TILE_QUERIES, torch.float32, query.device).fill_(-torch.inf)
    maxima = maxima.view(len(lengths), groups * _TILE_QUERIES)
    squares = torch.zeros(len(lengths), 2, dtype=torch.float32, device=query.device)
    rounds = dtype is torch.float32

    def run(start: int, end: int) -> None:
        tile = _memory.of("tile", _TILE_ROWS * dim, torch.bfloat16, query.device)
        _all_maxima(
            addresses[start:end], lengths[start:end], dim, groups, arranged.data_ptr(), maxima[start:end].data_ptr(),
            rounds, tile.data_ptr(), squares[start:end].data_ptr(),
        )  # fmt: skip

    _in_threads(run, lengths)
    return maxima[:, :count], squares


def rounded_to_bfloat16(vectors: Tensor, rounded: Tensor, lengths: np.ndarray) -> Tensor:
    """Write the documents' vectors, `(total vectors, dim)` float32, to `rounded`, of the same shape in bfloat16, and
    return the squares of the largest norm of a vector and of its rounding error in every document, `(documents, 2)`."""
    dim = vectors.shape[1]
    squares = torch.zeros(len(lengths), 2, dtype=torch.float32, device=vectors.device)
    starts = np.concatenate([[0], np.cumsum(lengths)])

    def run(start: int, end: int) -> None:
        first = int(starts[start])
        _all_rounded(
            vectors[first:].data_ptr(), rounded[first:].data_ptr(), lengths[start:end], dim,
            squares[start:end].data_ptr(),
        )  # fmt: skip

    _in_threads(run, lengths)
    return squares


def _in_threads(run: Callable[[int, int], None], lengths: np.ndarray) -> None:
    """Call `run(start, end)` for ranges of documents, in as many threads as torch may use for so much work; a second
    time for the same documents, where a thread cannot be started, which must change nothing."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    threads = min(torch.get_num_threads(), 1 + total // _VECTORS_PER_THREAD)
    if threads == 1:
        run(0, len(lengths))
        return
    bounds = np.searchsorted(ends, np.linspace(0, total, threads + 1)[1:-1])
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, [0, *bounds.tolist()], [*bounds.tolist(), len(lengths)]))
    except RuntimeError:  # once the main thread has ended, or at the system's limit, Python starts no other
        run(0, len(lengths))


# --- compiled code: all addresses and sizes are int64, sizes in bytes where they say so -------------------------------


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)


def _function(builder, name: str, result, *arguments):
    """A function of LLVM or of the processor."""
    return builder.module.declare_intrinsic(name, (), ir.FunctionType(result, arguments))


def _at(builder, address, type_, offset=None):
    return builder.inttoptr(address if offset is None else builder.add(address, offset), ir.PointerType(type_))


def _loaded(builder, pointer, align: int):
    value = builder.load(pointer)
    value.align = align
    return value


def _store(builder, value, pointer, align: int) -> None:
    builder.store(value, pointer).align = align


def _fetch(builder, address) -> None:
    """Ask for the cache line at an address, which need not be a valid one."""
    prefetch = _function(builder, "llvm.prefetch.p0", ir.VoidType(), _POINTER, _INT32, _INT32, _INT32)
    reading, all_caches, data = (ir.Constant(_INT32, value) for value in (0, 3, 1))
    builder.call(prefetch, [_at(builder, address, ir.IntType(8)), reading, all_caches, data])


class _Loop:
    """`for index in range(count)`, count at least 1, with values that every turn replaces."""

    def __init__(self, builder, count, values: list):
        before, self.block = builder.block, builder.append_basic_block()
        builder.branch(self.block)
        builder.position_at_end(self.block)
        self.builder, self.count = builder, count
        self.index = builder.phi(_INT64)
        self.index.add_incoming(_constant(0), before)
        self.values = [builder.phi(value.type) for value in values]
        for phi, value in zip(self.values, values):
            phi.add_incoming(value, before)

    def end(self, values: list) -> None:
        builder, after = self.builder, self.builder.append_basic_block()
        following = builder.add(self.index, _constant(1))
        for phi, value in zip([self.index, *self.values], [following, *values]):
            phi.add_incoming(value, self.block)
        builder.cbranch(builder.icmp_signed("<", following, self.count), self.block, after)
        builder.position_at_end(after)


def _inlined(function: Callable) -> Any:
    """`intrinsic`, of which type checkers believe that compiled code passes the typing context itself."""
    return intrinsic(function)


@_inlined
def _round_vector(typing_context, source, target, registers, ahead, squares):
    """Round one vector of `registers` times 16 numbers from float32 to bfloat16; raise `squares[0]` to the square of
    its norm and `squares[1]` to that of its rounding error where they are below."""

    def generated(context, builder, signature, arguments):
        source, target, registers, ahead, squares = arguments
        multiply_add = _function(builder, "llvm.fma.v16f32", _FLOATS, _FLOATS, _FLOATS, _FLOATS)
        total = _function(builder, "llvm.vector.reduce.fadd.v16f32", _FLOAT, _FLOAT, _FLOATS)
        larger = _function(builder, "llvm.maximum.f32", _FLOAT, _FLOAT, _FLOAT)
        loop = _Loop(builder, registers, [_ZEROS, _ZEROS])
        address = builder.add(source, builder.mul(loop.index, _constant(4 * LANES)))
        _fetch(builder, builder.add(address, ahead))
        given = _loaded(builder, _at(builder, address, _FLOATS), align=4)
        rounded = builder.fptrunc(given, _BFLOATS)
        _store(builder, rounded, _at(builder, target, _BFLOATS, builder.mul(loop.index, _constant(2 * LANES))), align=2)
        error = builder.fsub(given, builder.fpext(rounded, _FLOATS))
        sums = [builder.call(multiply_add, [value, value, sum_]) for value, sum_ in zip((given, error), loop.values)]
        loop.end(sums)
        for place, sum_ in enumerate(sums):
            square = builder.call(total, [ir.Constant(_FLOAT, -0.0), sum_], fastmath=("reassoc",))
            pointer = _at(builder, squares, _FLOAT, _constant(4 * place))
            builder.store(builder.call(larger, [builder.load(pointer), square]), pointer)
        return context.get_dummy_value()

    return types.void(source, target, registers, ahead, squares), generated


@_inlined
def _raise_maxima(typing_context, documents, vector_bytes, last, pairs, ahead, queries, maxima):
    """Raise the 32 `maxima` to the products of 32 query vectors with `_TILE_ROWS` document vectors where they are
    below. Behind the tile's `last` vector, that one is taken again, which changes no maximum."""

    def generated(context, builder, signature, arguments):
        documents, vector_bytes, last, pairs, ahead, queries, maxima = arguments
        multiply_add = _function(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, _FLOATS, _PAIRS, _PAIRS)
        larger = _function(builder, "llvm.maximum.v16f32", _FLOATS, _FLOATS, _FLOATS)
        undefined = ir.Constant(_PAIRS_AS_INTEGERS, ir.Undefined)
        to_all = ir.Constant(_PAIRS_AS_INTEGERS, [ir.Constant(_INT32, 0)] * LANES)
        rows = []
        for number in range(_TILE_ROWS):
            row = builder.select(builder.icmp_signed("<", last, _constant(number)), last, _constant(number))
            rows.append(builder.add(documents, builder.mul(row, vector_bytes)))
        loop = _Loop(builder, pairs, [_ZEROS] * (2 * _TILE_ROWS))
        _fetch(builder, builder.add(builder.add(documents, ahead), builder.mul(loop.index, _constant(_LINE_BYTES))))
        first = builder.add(queries, builder.mul(loop.index, _constant(_PAIR_BYTES * _TILE_QUERIES)))
        asked = [
            builder.bitcast(_loaded(builder, _at(builder, first, _PAIRS_AS_INTEGERS, _constant(offset)), 64), _PAIRS)
            for offset in (0, _PAIR_BYTES * LANES)
        ]
        sums = []
        for number, row in enumerate(rows):
            pointer = _at(builder, row, _INT32, builder.mul(loop.index, _constant(_PAIR_BYTES)))
            pair = builder.insert_element(undefined, _loaded(builder, pointer, align=2), ir.Constant(_INT32, 0))
            pair = builder.bitcast(builder.shuffle_vector(pair, undefined, to_all), _PAIRS)
            for half in (0, 1):
                sums.append(builder.call(multiply_add, [loop.values[2 * number + half], pair, asked[half]]))
        loop.end(sums)
        for half in (0, 1):
            pointer = _at(builder, maxima, _FLOATS, _constant(half * 4 * LANES))
            best = _loaded(builder, pointer, align=64)
            for sum_ in sums[half::2]:
                best = builder.call(larger, [best, sum_])
            _store(builder, best, pointer, align=64)
        return context.get_dummy_value()

    return types.void(documents, vector_bytes, last, pairs, ahead, queries, maxima), generated


def _compiled(*signature: Any) -> Callable:
    """Compiled now, so that what cannot be compiled fails at the import."""

    def compile_function(function: Callable) -> Callable:
        try:
            return njit(types.void(*signature), cache=True, nogil=True)(function)
        except RuntimeError:  # numba finds no folder that it may write its cache to
            return njit(types.void(*signature), nogil=True)(function)

    return compile_function


@_compiled(int64[::1], int64[::1], int64, int64, int64, int64, boolean, int64, int64)
def _all_maxima(addresses, lengths, dim, groups, queries, maxima, rounds, tile, squares):
    for document in range(len(lengths)):
        for start in range(0, lengths[document], _TILE_ROWS):
            last = min(_TILE_ROWS, lengths[document] - start) - 1
            if rounds:
                first = addresses[document] + start * dim * 4
                for row in range(last + 1):
                    source, target = first + row * dim * 4, tile + row * dim * 2
                    _round_vector(source, target, dim // LANES, _AHEAD_BYTES, squares + document * 8)
                first, ahead = tile, 0
            else:
                first, ahead = addresses[document] + start * dim * 2, _AHEAD_BYTES
            for group in range(groups):
                asked = queries + group * dim * 2 * _TILE_QUERIES
                best = maxima + (document * groups + group) * 4 * _TILE_QUERIES
                _raise_maxima(first, dim * 2, last, dim // 2, ahead, asked, best)


@_compiled(int64, int64, int64[::1], int64, int64)
def _all_rounded(source, target, lengths, dim, squares):
    for document in range(len(lengths)):
        for _ in range(lengths[document]):
            _round_vector(source, target, dim // LANES, _AHEAD_BYTES, squares + document * 8)
            source += dim * 4
            target += dim * 2
