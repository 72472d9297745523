"""Cross-entropy of products with all rows of a table, without keeping the products.

A chunk of positions at a time: products, their softmax and both gradients, which three matrix products give in the
forward pass already. Time is that of the usual way; of the size of the vocabulary only one chunk exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_NUMBERS = 2**22  # products that exist at once


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, importance: Tensor, scale: float) -> Tensor:
    """Sum over positions of importance * -log softmax(scale * weight @ hidden)[target].

    Args:
        hidden: (positions, hidden_size); weight: (vocab_size, hidden_size), of the same dtype.
        targets: (positions,) int64. importance: (positions,) float32, without gradient.

    Returns:
        float32, a scalar.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, importance, scale)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, importance, scale):
        with_hidden, with_weight = ctx.needs_input_grad[:2]
        size = max(1, _CHUNK_NUMBERS // len(weight))
        total = torch.zeros((), device=hidden.device)
        to_hidden = torch.empty_like(hidden) if with_hidden else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if with_weight else None
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = (hidden[part] @ weight.T).float().mul_(scale)
            normalizer = logits.logsumexp(1)
            target, share = targets[part, None], importance[part]
            total += ((normalizer - logits.gather(1, target)[:, 0]) * share).sum()
            if not (with_hidden or with_weight):
                continue
            gradient = logits.sub_(normalizer[:, None]).exp_()
            gradient.scatter_add_(1, target, gradient.new_full((1, 1), -1.0).expand_as(target))
            gradient = gradient.mul_(share[:, None] * scale).to(hidden.dtype)
            if with_hidden:
                to_hidden[part] = gradient @ weight
            if with_weight:
                to_weight.addmm_(gradient.T.float(), hidden[part].float())
        ctx.save_for_backward(to_hidden, None if to_weight is None else to_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        to_hidden, to_weight = ctx.saved_tensors
        (gradient,) = gradients
        return (
            None if to_hidden is None else to_hidden * gradient.to(to_hidden.dtype),
            None if to_weight is None else to_weight * gradient.to(to_weight.dtype),
            None,
            None,
            None,
        )
