"""Pool a vocabulary head's logits over positions without ever holding (batch, length, vocab) in memory.

A SPLADE representation needs, per row and vocabulary entry, one number out of `length` logits. The logits are therefore
computed in vocabulary tiles and reduced at once: peak memory is batch x positions x tile, forward and backward. For max
pooling the backward pass touches only the winning position of each active entry:

    u[b, j] = relu(max_p z[b, p, j]),  z = sum_k hidden_k @ weight_k.T,  p* = argmax
    d hidden_k[b, p*] += g[b, j] weight_k[j],     d weight_k[j] += g[b, j] hidden_k[b, p*]     where u[b, j] > 0

which costs O(active entries x hidden_size) instead of two full matrix products. A head with a low-rank update (LoRA)
is the same sum with one more pair (hidden @ A.T * scaling, B): no merged weight is built.
"""

import functools
from collections.abc import Iterator

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Entries of a temporary buffer of gathered rows or logits in the backward pass: 4 Mi floats, 16 MiB.
_BUFFER_ELEMENTS = 4 * 1024 * 1024

# Fewest rows (batch x positions) for which a bfloat16 screening pass is worth its overhead.
_SCREENING_ROWS = 128


def saturate(values: torch.Tensor, activation: str) -> torch.Tensor:
    """`log1p_relu` or `log1p_log1p_relu` of values (any shape)."""
    values = torch.log1p(torch.relu(values))
    return torch.log1p(values) if activation == "log1p_log1p_relu" else values


def pooled_positions(pool_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions to pool, packed to the front.

    Args:
        pool_mask: (batch, length), nonzero where pooled.

    Returns:
        index: int64 (batch, positions), positions = the largest number pooled in any row (at least 1). Rows with
            fewer repeat their first pooled position, which changes neither their maximum nor, with `valid`, their
            sum.
        valid: bool (batch, positions), False on the repetitions and all False for a row that pools nothing.
    """
    pool_mask = pool_mask != 0
    length = pool_mask.shape[1]
    arange = torch.arange(length, device=pool_mask.device).expand_as(pool_mask)
    first = torch.where(pool_mask, arange, length).amin(dim=1, keepdim=True).clamp(max=length - 1)
    if torch.compiler.is_compiling():  # a traced graph cannot have a data-dependent number of positions
        return torch.where(pool_mask, arange, first), pool_mask
    positions = max(int(pool_mask.sum(dim=1).max()), 1)
    order = torch.where(pool_mask, arange, length).sort(dim=1).values[:, :positions]
    valid = order < length
    return torch.where(valid, order, first), valid


def head_factors(head: nn.Module, hidden: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Write `head(hidden)` as a sum of products.

    Args:
        head: an `nn.Linear` without bias, or PEFT's LoRA or modules-to-save wrapper of one.
        hidden: (batch, length, hidden_size).

    Returns:
        Pairs (hidden_k (batch, length, d_k), weight_k (vocab, d_k)) with head(hidden) = sum_k hidden_k @ weight_k.T,
        or None where the head is anything else (quantized, hooked, DoRA …) and has to be called as a module.
    """
    if _is_hooked(head):
        return None
    saved_copies = getattr(head, "modules_to_save", None)
    if isinstance(saved_copies, nn.ModuleDict):
        disabled = head.disable_adapters or not head.active_adapters
        return head_factors(head.original_module if disabled else saved_copies[head.active_adapters[0]], hidden)
    if hasattr(head, "lora_A"):
        return _lora_factors(head, hidden)
    # Quantized layers subclass nn.Linear, or keep the class and hold a tensor subclass as weight.
    if type(head) is nn.Linear and head.bias is None and _is_plain(head.weight):
        return [(hidden, head.weight)]
    return None


def _is_hooked(head: nn.Module) -> bool:
    """Somebody has to see the call: hooks of torch (PEFT's for batches of several adapters, say), or accelerate's,
    which replace `forward` (offloaded weights lie on the meta device until then)."""
    modules = [head, *head.children()]
    replaced = any("forward" in vars(module) or hasattr(module, "_hf_hook") for module in modules)
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    return replaced or (hooked and not torch.compiler.is_exporting())  # torch.export hooks all, for its own records


def _is_plain(weight: torch.Tensor) -> bool:
    """Not a tensor subclass; while a program is exported, plain weights are fakes."""
    exported = torch.compiler.is_exporting() and not hasattr(weight, "__tensor_flatten__")
    return exported or type(weight) in (nn.Parameter, torch.Tensor)


def _lora_factors(head: nn.Module, hidden: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    base = head.base_layer
    if type(base) is not nn.Linear or base.bias is not None or not _is_plain(base.weight):
        return None
    if head.merged:
        return None if head.disable_adapters else [(hidden, base.weight)]
    pairs = [(hidden, base.weight)]
    for name in [] if head.disable_adapters else head.active_adapters:
        if name not in head.lora_A:
            continue
        down, up = head.lora_A[name], head.lora_B[name]
        if name in getattr(head, "lora_variant", {}) or type(down) is not nn.Linear or up.bias is not None:
            return None
        low_rank = down(head.lora_dropout[name](hidden.to(down.weight.dtype))) * head.scaling[name]
        pairs.append((low_rank.to(hidden.dtype), up.weight))
    return pairs


def pool_vocabulary_head(
    head: nn.Module,
    hidden: torch.Tensor,
    pool_mask: torch.Tensor,
    *,
    pooling: str = "max",
    activation: str = "log1p_relu",
    logit_scale: float = 1.0,
    tile_size: int = 512,
) -> torch.Tensor:
    """Sparse representation from the backbone's hidden states.

    Args:
        head: vocabulary head, hidden_size -> vocab.
        hidden: (batch, length, hidden_size), any floating dtype.
        pool_mask: (batch, length), nonzero where pooled. A row without any gives an all-zero representation.
        pooling: "max", "sum", "mean" (over the pooled positions) or "last" (the last pooled position).
        activation: "log1p_relu" or "log1p_log1p_relu".
        logit_scale: positive factor on the logits.
        tile_size: vocabulary entries per tile.

    Returns:
        (batch, vocab) float32, non-negative. Logits are computed in `hidden`'s dtype (or autocast's), the reduction
        and the activation in float32 (float64 stays float64).
    """
    index, valid = pooled_positions(pool_mask)
    if pooling == "last":
        index = torch.where(valid, index, -1).amax(dim=1, keepdim=True).clamp(min=0)
        valid = valid.any(dim=1, keepdim=True)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        hidden = hidden.to(torch.get_autocast_dtype(device_type))
    factors = head_factors(head, hidden)
    if factors is None:
        return _pool_opaque_head(head, _take(hidden, index), valid, pooling, activation, logit_scale)
    hiddens = [_take(factor, index) for factor, _ in factors]
    weights = [weight for _, weight in factors]
    # An exported program has no backward pass, and autograd functions would freeze its batch size.
    has_backward = (
        not torch.compiler.is_exporting()
        and torch.is_grad_enabled()
        and any(factor.requires_grad for factor in (*hiddens, *weights))
    )
    with torch.autocast(device_type, enabled=False):
        if pooling in ("sum", "mean"):
            pool = _ActivatedSum.apply if has_backward else _activated_sum
            shares = _shares(valid, pooling, hidden.dtype)
            # Zero times infinity is NaN: what is not pooled must not reach a product.
            hiddens = [torch.where(valid.unsqueeze(-1), factor, 0.0) for factor in hiddens]
            return pool(shares, activation, logit_scale, tile_size, len(hiddens), *hiddens, *weights)
        pool = _PositiveMaximum.apply if has_backward else _positive_maximum
        maximum = pool(tile_size, len(hiddens), *hiddens, *weights)
    return _activate_maximum(maximum, valid, activation, logit_scale)


def _take(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def _shares(valid: torch.Tensor, pooling: str, dtype: torch.dtype) -> torch.Tensor:
    """Weight of each position in the sum: 1, or 1 / number of pooled positions for the mean; 0 where not valid."""
    shares = valid.to(_reduction_dtype(dtype))
    return shares / shares.sum(dim=1, keepdim=True).clamp(min=1) if pooling == "mean" else shares


def _activate_maximum(maximum: torch.Tensor, valid: torch.Tensor, activation: str, logit_scale: float) -> torch.Tensor:
    # log1p∘relu grows with its argument, so it commutes with the maximum: one activation per entry instead of per
    # position. where() rather than a product: a row without pooled positions must be zero even if its hidden states
    # are not finite.
    maximum = torch.where(valid.any(dim=1, keepdim=True), maximum, 0.0)
    return saturate(maximum * logit_scale, activation)


def _reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logit_tiles(hiddens, weights, tile_size: int) -> Iterator[torch.Tensor]:
    """Logits of consecutive vocabulary tiles: (batch, positions, tile), in the dtype of the hidden states."""
    for start in range(0, weights[0].shape[0], tile_size):
        logits = None
        for hidden, weight in zip(hiddens, weights):
            product = hidden @ weight[start : start + tile_size].to(hidden.dtype).t()
            logits = product if logits is None else logits.add_(product)
        yield logits


def _positive_maximum(tile_size, number_of_factors, *factors) -> torch.Tensor:
    """relu(max over positions of the logits), (batch, vocab)."""
    return _maximum_and_winners(tile_size, number_of_factors, factors, wants_winners=False)[0]


def _maximum_and_winners(tile_size, number_of_factors, factors, wants_winners: bool):
    """The positive maximum (batch, vocab) and, if wanted, the position (batch, vocab) int32 that attains it."""
    hiddens, weights = factors[:number_of_factors], factors[number_of_factors:]
    if _can_screen(hiddens[0]):
        return _screened_maximum(hiddens, weights, tile_size)
    dtype = _reduction_dtype(hiddens[0].dtype)
    maxima, winners = [], []
    for logits in _logit_tiles(hiddens, weights, tile_size):
        if wants_winners:
            maximum, winner = logits.max(dim=1)
            winners.append(winner.to(torch.int32))
        else:
            maximum = logits.amax(dim=1)
        maxima.append(maximum.to(dtype).relu())
    return torch.cat(maxima, dim=1), torch.cat(winners, dim=1) if wants_winners else None


def _can_screen(hidden: torch.Tensor) -> bool:
    """Float32 on a CPU that multiplies bfloat16 natively, with enough rows that the product dominates the cost."""
    return (
        not torch.compiler.is_compiling()
        and hidden.device.type == "cpu"
        and hidden.dtype == torch.float32
        and hidden.shape[0] * hidden.shape[1] >= _SCREENING_ROWS
        and _multiplies_bfloat16()
    )


@functools.cache
def _multiplies_bfloat16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


def _screened_maximum(hiddens, weights, tile_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact float32 result of `_maximum_and_winners`, computed only where it can be positive.

    A bfloat16 product (unit roundoff u = 2**-8, float32 accumulation) is off by at most

        (2 u + u**2 + width * 2**-23) * |hidden| * |weight|        (rounded operands, Cauchy-Schwarz)

    so an entry whose approximate maximum lies below minus this bound is inactive: relu makes it exactly zero. All other
    entries are recomputed in float32. Where most are active screening cannot pay, and tiles are computed directly;
    every fourth tile looks again, since frequent tokens stand together at the start of many vocabularies.
    """
    hidden = torch.cat(hiddens, dim=-1)
    batch, _, width = hidden.shape
    vocab_size = weights[0].shape[0]
    coarse_hidden = hidden.to(torch.bfloat16)
    bound = hidden.norm(dim=-1).amax(dim=1, keepdim=True) * (2.1 * 2.0**-8 + width * 2.0**-22)
    maximum = hidden.new_zeros(batch, vocab_size)
    winners = torch.zeros(batch, vocab_size, dtype=torch.int32)
    tile_size = 4 * tile_size  # half the bytes per logit, and fewer recomputations of larger size
    dense_tiles = 0
    for start in range(0, vocab_size, tile_size):
        tile = slice(start, min(start + tile_size, vocab_size))
        weight = torch.cat([weight[tile].float() for weight in weights], dim=1)
        if dense_tiles % 4:
            dense_tiles -= 1
            value, winner = (hidden @ weight.t()).max(dim=1)
            maximum[:, tile], winners[:, tile] = value.relu(), winner.to(torch.int32)
            continue
        coarse = (coarse_hidden @ weight.to(torch.bfloat16).t()).amax(dim=1).float()
        # Written so that a NaN counts as possibly active and shows in the result.
        candidates = ~(coarse + bound * weight.norm(dim=1) <= 0)
        for row in range(batch):
            entries = candidates[row].nonzero().squeeze(1)
            value, winner = (hidden[row] @ weight[entries].t()).max(dim=0)
            maximum[row, start + entries], winners[row, start + entries] = value.relu(), winner.to(torch.int32)
        dense_tiles = 3 if candidates.float().mean() > 0.5 else 0
    return maximum, winners


class _PositiveMaximum(torch.autograd.Function):
    """`_positive_maximum` with the gather/scatter backward pass of the module docstring."""

    @staticmethod
    def forward(ctx, tile_size, number_of_factors, *factors):
        wants_winners = any(ctx.needs_input_grad)
        maximum, winners = _maximum_and_winners(tile_size, number_of_factors, factors, wants_winners)
        if wants_winners:
            ctx.number_of_factors = number_of_factors
            ctx.save_for_backward(maximum, winners, *factors)
        return maximum

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        maximum, winners, *factors = ctx.saved_tensors
        hiddens, weights = factors[: ctx.number_of_factors], factors[ctx.number_of_factors :]
        needs_hidden = ctx.needs_input_grad[2 : 2 + ctx.number_of_factors]
        needs_weight = ctx.needs_input_grad[2 + ctx.number_of_factors :]
        if torch.compiler.is_compiling():
            scatter = _scatter_dense
        else:
            scatter = _scatter_active
        gradient = torch.where(maximum > 0, gradient, 0.0)
        hidden_gradients, weight_gradients = [], []
        for hidden, weight, hidden_needed, weight_needed in zip(hiddens, weights, needs_hidden, needs_weight):
            hidden_gradient, weight_gradient = scatter(gradient, winners, hidden, weight, hidden_needed, weight_needed)
            hidden_gradients.append(hidden_gradient)
            weight_gradients.append(weight_gradient)
        return None, None, *hidden_gradients, *weight_gradients


def _scatter_active(gradient, winners, hidden, weight, hidden_needed, weight_needed):
    """Gradients of one factor from the active entries alone, gathered in blocks of bounded size."""
    batch, positions, width = hidden.shape
    dtype = gradient.dtype
    hidden_gradient = hidden.new_zeros(batch * positions, width, dtype=dtype) if hidden_needed else None
    weight_gradient = weight.new_zeros(weight.shape, dtype=dtype) if weight_needed else None
    rows, entries = gradient.nonzero(as_tuple=True)
    values = gradient[rows, entries].unsqueeze(1)
    sources = rows * positions + winners[rows, entries].long()
    flat_hidden = hidden.flatten(0, 1)
    block = max(_BUFFER_ELEMENTS // width, 1)
    for start in range(0, rows.numel(), block):
        part = slice(start, start + block)
        if hidden_needed:
            hidden_gradient.index_add_(0, sources[part], weight[entries[part]].to(dtype).mul_(values[part]))
        if weight_needed:
            weight_gradient.index_add_(0, entries[part], flat_hidden[sources[part]].to(dtype).mul_(values[part]))
    return (
        hidden_gradient.view(batch, positions, width).to(hidden.dtype) if hidden_needed else None,
        weight_gradient.to(weight.dtype) if weight_needed else None,
    )


def _scatter_dense(gradient, winners, hidden, weight, hidden_needed, weight_needed):
    """The same with shapes that do not depend on the data, one row of the batch at a time, for compiled graphs."""
    dtype = gradient.dtype
    hidden_gradients = []
    weight_gradient = weight.new_zeros(weight.shape, dtype=dtype) if weight_needed else None
    entries = torch.arange(weight.shape[0], device=weight.device)
    for row in range(hidden.shape[0]):
        sources, values = winners[row].long(), gradient[row].unsqueeze(1)
        if hidden_needed:
            zeros = hidden.new_zeros(hidden.shape[1:], dtype=dtype)
            hidden_gradients.append(zeros.index_add(0, sources, weight.to(dtype) * values))
        if weight_needed:
            # Not a plain sum: inductor (torch 2.13) would fuse it with the embedding's own gradient, where the head is
            # tied, and lose that.
            weight_gradient = weight_gradient.index_add(0, entries, hidden[row].to(dtype)[sources] * values)
    return (
        torch.stack(hidden_gradients).to(hidden.dtype) if hidden_needed else None,
        weight_gradient.to(weight.dtype) if weight_needed else None,
    )


def _activated_sum(shares, activation, logit_scale, tile_size, number_of_factors, *factors) -> torch.Tensor:
    """Sum over positions of share x activation(logit), (batch, vocab)."""
    tiles = _logit_tiles(factors[:number_of_factors], factors[number_of_factors:], tile_size)
    return torch.cat([_share_sum(logits, shares, activation, logit_scale) for logits in tiles], dim=1)


def _share_sum(logits, shares, activation, logit_scale) -> torch.Tensor:
    """(…, positions, vocab) logits and (…, positions) shares -> (…, vocab)."""
    shares = shares.unsqueeze(-1)
    activated = saturate(logits.to(shares.dtype) * logit_scale, activation)
    return torch.where(shares > 0, activated * shares, 0.0).sum(dim=-2)


class _ActivatedSum(torch.autograd.Function):
    """`_activated_sum`; the backward pass recomputes the logits tile by tile."""

    @staticmethod
    def forward(ctx, shares, activation, logit_scale, tile_size, number_of_factors, *factors):
        ctx.settings = activation, logit_scale, tile_size, number_of_factors
        ctx.save_for_backward(shares, *factors)
        return _activated_sum(shares, activation, logit_scale, tile_size, number_of_factors, *factors)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        activation, logit_scale, tile_size, number_of_factors = ctx.settings
        shares, *factors = ctx.saved_tensors
        hiddens, weights = factors[:number_of_factors], factors[number_of_factors:]
        needs = ctx.needs_input_grad[5:]
        totals = [torch.zeros_like(f, dtype=gradient.dtype) if need else None for f, need in zip(factors, needs)]
        for number, logits in enumerate(_logit_tiles(hiddens, weights, tile_size)):
            tile = slice(number * tile_size, number * tile_size + logits.shape[-1])
            slope = _slope(logits.to(gradient.dtype) * logit_scale, activation) * logit_scale
            slope = torch.where(shares.unsqueeze(-1) > 0, slope * shares.unsqueeze(-1), 0.0)
            slope = (slope * gradient[:, None, tile]).flatten(0, 1)
            for k, (hidden, weight) in enumerate(zip(hiddens, weights)):
                if needs[k]:
                    totals[k] += (slope @ weight[tile].to(slope.dtype)).view_as(hidden)
                if needs[number_of_factors + k]:
                    totals[number_of_factors + k][tile] += slope.t() @ hidden.flatten(0, 1).to(slope.dtype)
        totals = [t if t is None else t.to(f.dtype) for t, f in zip(totals, factors)]
        return None, None, None, None, None, *totals


def _slope(logits: torch.Tensor, activation: str) -> torch.Tensor:
    """Derivative of `saturate` with respect to the (scaled) logits."""
    positive = logits.relu()
    slope = (logits > 0) / (1 + positive)
    return slope / (1 + torch.log1p(positive)) if activation == "log1p_log1p_relu" else slope


def _pool_opaque_head(head, hidden, valid, pooling, activation, logit_scale) -> torch.Tensor:
    """Any head that only can be called: position chunks of bounded size, recomputed in the backward pass. Each call
    sees all rows, since a head may treat them differently (PEFT's batches of several adapters)."""
    shares = _shares(valid, pooling, hidden.dtype)
    chunk = max(_BUFFER_ELEMENTS // ((getattr(head, "out_features", None) or 1 << 15) * hidden.shape[0]), 1)
    parts = zip(hidden.split(chunk, dim=1), shares.split(chunk, dim=1))
    if pooling in ("sum", "mean"):
        pieces = (checkpoint(_chunk_sum, head, *part, activation, logit_scale, use_reentrant=False) for part in parts)
        return functools.reduce(torch.add, pieces)
    pieces = (checkpoint(_chunk_maximum, head, part, use_reentrant=False) for part, _ in parts)
    return _activate_maximum(functools.reduce(torch.maximum, pieces), valid, activation, logit_scale)


def _chunk_maximum(head, hidden) -> torch.Tensor:
    logits = head(hidden)
    return logits.amax(dim=1).to(_reduction_dtype(logits.dtype)).relu()


def _chunk_sum(head, hidden, shares, activation, logit_scale) -> torch.Tensor:
    return _share_sum(head(hidden), shares, activation, logit_scale)
