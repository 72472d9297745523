"""Random rows of symbols, computed from (seed, table, token) without state.

The generator counts instead of remembering: any row of any table is available at any time, on every device with the
same value, whatever else is computed with it. Nothing of the size of the vocabulary is ever stored.

Definition, with all arithmetic modulo 2^64 and `mix` the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014):

    s = mix(seed + G (1 + table)),  r = mix(s + C (1 + token)),  x_j = mix(r + G (1 + j)),  j = 0, 1, ...
    u = (floor(x_j / 2^40) + 1) / 2^24,  w = (floor(x_j / 2^8) mod 2^24) / 2^24
    row[2j] = sqrt(-2 ln u) cos(2 pi w),  row[2j + 1] = sqrt(-2 ln u) sin(2 pi w)
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


_G = _signed(0x9E3779B97F4A7C15)
_C = _signed(0x2545F4914F6CDD1D)
_FIRST_FACTOR = _signed(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = _signed(0x94D049BB133111EB)
_CHUNK_PAIRS = 2**16  # that are computed at once


def mix(state: Tensor) -> Tensor:
    """The finalizer of SplitMix64 on int64 tensors, read as unsigned: a bijection of the 2^64 states."""
    return _mix_(state.clone())


def _mix_(state: Tensor) -> Tensor:
    """`mix` in place."""
    state.bitwise_xor_(_shifted(state, 30)).mul_(_FIRST_FACTOR)
    state.bitwise_xor_(_shifted(state, 27)).mul_(_SECOND_FACTOR)
    return state.bitwise_xor_(_shifted(state, 31))


def row_states(seeds: Tensor, tokens: Tensor, tables: Tensor | int = 0) -> Tensor:
    """The states r of the module's definition.

    Args:
        seeds, tokens, tables: int64, of shapes that broadcast.

    Returns:
        int64, of the broadcast shape.
    """
    tables = torch.as_tensor(tables, dtype=torch.int64, device=seeds.device)  # whose products wrap around
    return mix(mix(seeds + _G * (1 + tables)) + _C * (1 + tokens))


def random_rows(seeds: Tensor, tokens: Tensor, dim: int, tables: Tensor | int = 0) -> Tensor:
    """Rows of independent standard normal numbers, one for every token.

    Args:
        seeds, tokens, tables: int64, of shapes that broadcast; tokens may be any non-negative numbers.
        dim: length of a row.

    Returns:
        float32, the broadcast shape with `dim` behind it.
    """
    if _is_compiled():
        return _rows_behind_a_call(seeds, tokens, torch.as_tensor(tables, device=seeds.device), dim)
    states = row_states(seeds, tokens, tables)
    offsets = _G * torch.arange(1, (dim + 1) // 2 + 1, device=states.device)
    flat = states.flatten()
    if torch.compiler.is_compiling():
        radius, angle = _radius_and_angle(flat, offsets)
        rows = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    else:
        # On a CPU, intermediate results stay in its cache: three times as fast. Nothing else has to wait for one.
        chunk = max(1, _CHUNK_PAIRS // len(offsets)) if states.device.type == "cpu" else max(1, len(flat))
        rows = torch.empty(len(flat), len(offsets), 2, device=states.device)
        for part, part_of_rows in zip(flat.split(chunk), rows.split(chunk)):
            radius, angle = _radius_and_angle(part, offsets)
            torch.mul(radius, angle.cos(), out=part_of_rows[..., 0])
            torch.mul(radius, angle.sin_(), out=part_of_rows[..., 1])
    return rows.view(*states.shape, 2 * len(offsets))[..., :dim]


def _radius_and_angle(states: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Of pairs of normal numbers (Box and Muller): states (n,), offsets (pairs,) -> two tensors (n, pairs)."""
    bits = _mix_(states[:, None] + offsets)
    # The upper 24 bits of both halves of each state, the lower half first as memory has it.
    halves = bits.view(torch.int32).view(*bits.shape, 2).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float()
    radius = halves[..., 1].add(1).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    return radius, halves[..., 0] * (2 * math.pi * 2.0**-24)


def uniform_numbers(seeds: Tensor, tokens: Tensor, tables: Tensor | int = 0) -> Tensor:
    """One number in [0, 1) for every token, independent of its row: float64, of the broadcast shape."""
    if _is_compiled():
        return _numbers_behind_a_call(seeds, tokens, torch.as_tensor(tables, device=seeds.device))
    return _shifted(mix(row_states(seeds, tokens, tables)), 11).double() * 2.0**-53


def _is_compiled() -> bool:
    # What is exported has to run where these operators are not known.
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


# Inductor (seen in torch 2.13, on CPUs) makes kernels for these integers that give other numbers, or write where they
# must not, as soon as the seed is one that it knows. So compiled models call them as they stand. The name is the
# module's, since code that travels with checkpoints is loaded more than once.
_OPERATORS = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_OPERATORS}::rows", mutates_args=())
def _rows_behind_a_call(seeds: Tensor, tokens: Tensor, tables: Tensor, dim: int) -> Tensor:
    return random_rows(seeds, tokens, dim, tables).contiguous()


@_rows_behind_a_call.register_fake
def _(seeds: Tensor, tokens: Tensor, tables: Tensor, dim: int) -> Tensor:
    shape = torch.broadcast_shapes(seeds.shape, tokens.shape, tables.shape)
    return torch.empty(*shape, dim, device=seeds.device)


@torch.library.custom_op(f"{_OPERATORS}::numbers", mutates_args=())
def _numbers_behind_a_call(seeds: Tensor, tokens: Tensor, tables: Tensor) -> Tensor:
    return uniform_numbers(seeds, tokens, tables)


@_numbers_behind_a_call.register_fake
def _(seeds: Tensor, tokens: Tensor, tables: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(seeds.shape, tokens.shape, tables.shape)
    return torch.empty(shape, dtype=torch.float64, device=seeds.device)


def random_permutations(
    seeds: Tensor, size: int, selected: Tensor | None = None, tables: Tensor | None = None
) -> Tensor:
    """A permutation of `range(size)` for every seed.

    Args:
        seeds, tables: int64 `(batch,)`.
        selected: bool `(batch, size)`; where it is False, a number stays in its place. All are moved without it.

    Returns:
        int64 `(batch, size)`; row b holds the image of every number.
    """
    tokens = torch.arange(size, device=seeds.device)
    keys = uniform_numbers(seeds[:, None], tokens, 0 if tables is None else tables[:, None])
    if selected is None:
        return keys.argsort(dim=1, stable=True)
    # Both orders put the selected numbers first: as they stand, and shuffled.
    standing = torch.where(selected, tokens, size + tokens).argsort(dim=1)
    shuffled = torch.where(selected, keys, 1.0 + tokens).argsort(dim=1, stable=True)
    return torch.empty_like(standing).scatter_(1, standing, shuffled)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shifted right with zeros moving in: on int64, `>>` repeats the sign."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)
