"""Pool a vocabulary head's logits over positions without ever holding (batch, length, vocab) in memory.

A SPLADE representation needs, per row and vocabulary entry, one number out of `length` logits. The logits are therefore
computed in vocabulary tiles and reduced at once: peak memory is batch x positions x tile, forward and backward. For max
pooling the backward pass touches only the winning position of each active entry:

    u[b, j] = relu(max_p z[b, p, j]),  z = sum_k hidden_k @ weight_k.T,  p* = argmax
    d hidden_k[b, p*] += g[b, j] weight_k[j],     d weight_k[j] += g[b, j] hidden_k[b, p*]     where u[b, j] > 0

which costs O(active entries x hidden_size) instead of two full matrix products. A head with a low-rank update (LoRA) is the
same sum with one more pair (hidden @ A.T * scaling, B): no merged weight is built.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Entries of a temporary buffer of gathered rows or logits in the backward pass: 4 Mi floats, 16 MiB.
_BUFFER_ELEMENTS = 4 * 1024 * 1024


def saturate(values: torch.Tensor, activation: str) -> torch.Tensor:
    """`log1p_relu` or `log1p_log1p_relu` of values (any shape)."""
    values = torch.log1p(torch.relu(values))
    return torch.log1p(values) if activation == "log1p_log1p_relu" else values


def pooled_positions(pool_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions to pool, packed to the front.

    Args:
        pool_mask: (batch, length), nonzero where pooled.

    Returns:
        index: int64 (batch, positions), positions = the largest number pooled in any row (at least 1). Rows with fewer repeat
            their first pooled position, which changes neither their maximum nor, with `valid`, their sum.
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
        Pairs (hidden_k (batch, length, d_k), weight_k (vocab, d_k)) with head(hidden) = sum_k hidden_k @ weight_k.T, or None
        where the head is anything else (quantized, hooked, DoRA …) and has to be called as a module.
    """
    if head._forward_hooks or head._forward_pre_hooks:
        return None
    saved_copies = getattr(head, "modules_to_save", None)
    if isinstance(saved_copies, nn.ModuleDict):
        disabled = head.disable_adapters or not head.active_adapters
        return head_factors(head.original_module if disabled else saved_copies[head.active_adapters[0]], hidden)
    if hasattr(head, "lora_A"):
        return _lora_factors(head, hidden)
    # Quantized layers subclass nn.Linear, or keep the class and hold a tensor subclass as weight.
    if type(head) is nn.Linear and head.bias is None and type(head.weight) in (nn.Parameter, torch.Tensor):
        return [(hidden, head.weight)]
    return None


def _lora_factors(head: nn.Module, hidden: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    base = head.base_layer
    if type(base) is not nn.Linear or base.bias is not None or type(base.weight) not in (nn.Parameter, torch.Tensor):
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
    tile_size: int = 1024,
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
        (batch, vocab) float32, non-negative. Logits are computed in `hidden`'s dtype (or autocast's), the reduction and the
        activation in float32 (float64 stays float64).
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
    with torch.autocast(device_type, enabled=False):
        if pooling in ("sum", "mean"):
            shares = _shares(valid, pooling)
            return _ActivatedSum.apply(shares, activation, logit_scale, tile_size, len(hiddens), *hiddens, *weights)
        maximum = _PositiveMaximum.apply(tile_size, len(hiddens), *hiddens, *weights)
    return _activate_maximum(maximum, valid, activation, logit_scale)


def _take(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def _shares(valid: torch.Tensor, pooling: str) -> torch.Tensor:
    """Weight of each position in the sum: 1, or 1 / number of pooled positions for the mean; 0 where not valid."""
    shares = valid.float()
    return shares / shares.sum(dim=1, keepdim=True).clamp(min=1) if pooling == "mean" else shares


def _activate_maximum(maximum: torch.Tensor, valid: torch.Tensor, activation: str, logit_scale: float) -> torch.Tensor:
    # log1p∘relu grows with its argument, so it commutes with the maximum: one activation per entry instead of per position.
    # where() rather than a product: a row without pooled positions must be zero even if its hidden states are not finite.
    maximum = torch.where(valid.any(dim=1, keepdim=True), maximum, 0.0)
    return saturate(maximum * logit_scale, activation)


def _reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tile_logits(hiddens, weights, start: int, end: int) -> torch.Tensor:
    """(batch, positions, end - start), in the dtype of the hidden states."""
    logits = None
    for hidden, weight in zip(hiddens, weights):
        rows = weight[start:end].to(hidden.dtype)
        if logits is None:
            logits = hidden.flatten(0, 1) @ rows.t()
        else:
            logits = logits.addmm_(hidden.flatten(0, 1), rows.t())
    return logits.unflatten(0, hiddens[0].shape[:2])


class _PositiveMaximum(torch.autograd.Function):
    """relu(max over positions of the logits), (batch, vocab), with the gather/scatter backward of the module docstring."""

    @staticmethod
    def forward(ctx, tile_size, number_of_factors, *factors):
        hiddens, weights = factors[:number_of_factors], factors[number_of_factors:]
        batch, vocab_size = hiddens[0].shape[0], weights[0].shape[0]
        dtype = _reduction_dtype(hiddens[0].dtype)
        needs_gradient = any(ctx.needs_input_grad)
        maxima, winners = [], []
        for start in range(0, vocab_size, tile_size):
            logits = _tile_logits(hiddens, weights, start, min(start + tile_size, vocab_size))
            if needs_gradient:
                maximum, winner = logits.max(dim=1)
                winners.append(winner.to(torch.int32))
            else:
                maximum = logits.amax(dim=1)
            maxima.append(maximum.to(dtype).relu())
        maximum = torch.cat(maxima, dim=1)
        ctx.number_of_factors = number_of_factors
        if needs_gradient:
            ctx.save_for_backward(maximum, torch.cat(winners, dim=1), *factors)
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
    for row in range(hidden.shape[0]):
        sources, values = winners[row].long(), gradient[row].unsqueeze(1)
        if hidden_needed:
            zeros = hidden.new_zeros(hidden.shape[1:], dtype=dtype)
            hidden_gradients.append(zeros.index_add(0, sources, weight.to(dtype) * values))
        if weight_needed:
            weight_gradient = weight_gradient + hidden[row].to(dtype)[sources] * values
    return (
        torch.stack(hidden_gradients).to(hidden.dtype) if hidden_needed else None,
        weight_gradient.to(weight.dtype) if weight_needed else None,
    )


class _ActivatedSum(torch.autograd.Function):
    """Sum over positions of share x activation(logit), (batch, vocab); the backward pass recomputes the logits tile by tile."""

    @staticmethod
    def forward(ctx, shares, activation, logit_scale, tile_size, number_of_factors, *factors):
        hiddens, weights = factors[:number_of_factors], factors[number_of_factors:]
        vocab_size = weights[0].shape[0]
        dtype = _reduction_dtype(hiddens[0].dtype)
        pieces = []
        for start in range(0, vocab_size, tile_size):
            logits = _tile_logits(hiddens, weights, start, min(start + tile_size, vocab_size)).to(dtype)
            activated = saturate(logits * logit_scale, activation)
            pieces.append(torch.where(shares.unsqueeze(-1) > 0, activated * shares.unsqueeze(-1), 0.0).sum(dim=1))
        ctx.settings = activation, logit_scale, tile_size, number_of_factors
        ctx.save_for_backward(shares, *factors)
        return torch.cat(pieces, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        activation, logit_scale, tile_size, number_of_factors = ctx.settings
        shares, *factors = ctx.saved_tensors
        hiddens, weights = factors[:number_of_factors], factors[number_of_factors:]
        needs = ctx.needs_input_grad[5:]
        totals = [torch.zeros_like(f, dtype=gradient.dtype) if need else None for f, need in zip(factors, needs)]
        for start in range(0, weights[0].shape[0], tile_size):
            end = min(start + tile_size, weights[0].shape[0])
            logits = _tile_logits(hiddens, weights, start, end).to(gradient.dtype) * logit_scale
            slope = _slope(logits, activation) * logit_scale
            slope = torch.where(shares.unsqueeze(-1) > 0, slope * shares.unsqueeze(-1), 0.0)
            slope = (slope * gradient[:, None, start:end]).flatten(0, 1)
            for k, (hidden, weight) in enumerate(zip(hiddens, weights)):
                if needs[k]:
                    totals[k] += (slope @ weight[start:end].to(slope.dtype)).view_as(hidden)
                if needs[number_of_factors + k]:
                    totals[number_of_factors + k][start:end] += slope.t() @ hidden.flatten(0, 1).to(slope.dtype)
        totals = [t if t is None else t.to(f.dtype) for t, f in zip(totals, factors)]
        return None, None, None, None, None, *totals


def _slope(logits: torch.Tensor, activation: str) -> torch.Tensor:
    """Derivative of `saturate` with respect to the (scaled) logits."""
    positive = logits.relu()
    slope = (logits > 0) / (1 + positive)
    return slope / (1 + torch.log1p(positive)) if activation == "log1p_log1p_relu" else slope


def _pool_opaque_head(head, hidden, valid, pooling, activation, logit_scale) -> torch.Tensor:
    """Any head that only can be called: position chunks of bounded size, recomputed in the backward pass."""
    shares = _shares(valid, pooling)
    rows = []
    for row in range(hidden.shape[0]):
        pooled = None
        for part, share in _position_chunks(head, hidden[row], shares[row]):
            if pooling in ("sum", "mean"):
                piece = checkpoint(_chunk_sum, head, part, share, activation, logit_scale, use_reentrant=False)
                pooled = piece if pooled is None else pooled + piece
            else:
                piece = checkpoint(_chunk_maximum, head, part, use_reentrant=False)
                pooled = piece if pooled is None else torch.maximum(pooled, piece)
        rows.append(pooled)
    pooled = torch.stack(rows)
    return pooled if pooling in ("sum", "mean") else _activate_maximum(pooled, valid, activation, logit_scale)


def _position_chunks(head, hidden, shares):
    vocab_size = getattr(head, "out_features", None) or 1 << 15
    chunk = max(_BUFFER_ELEMENTS // vocab_size, 1)
    return zip(hidden.split(chunk), shares.split(chunk))


def _chunk_maximum(head, hidden) -> torch.Tensor:
    logits = head(hidden)
    return logits.amax(dim=0).to(_reduction_dtype(logits.dtype)).relu()


def _chunk_sum(head, hidden, shares, activation, logit_scale) -> torch.Tensor:
    logits = head(hidden)
    activated = saturate(logits.to(_reduction_dtype(logits.dtype)) * logit_scale, activation)
    return torch.where(shares.unsqueeze(-1) > 0, activated * shares.unsqueeze(-1), 0.0).sum(dim=0)
