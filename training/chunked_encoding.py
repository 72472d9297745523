"""Batches larger than memory, with the gradients of the whole batch.

A contrastive loss and the FLOPS regulariser look at a whole batch at once, but only at its representations. So a batch
is encoded in mini-batches whose activations are dropped at once and recomputed, with the same dropout, when the
backward pass reaches them: GradCache (arXiv 2101.06983) by means of activation checkpointing. Memory holds the
activations of one mini-batch and the `(batch, vocab_size)` representations; the gradients are those of the whole batch,
at the price of a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def encode_in_chunks(
    encode: Callable[[dict[str, Tensor]], Tensor], inputs: Mapping[str, Tensor], mini_batch_size: int | None = None
) -> Tensor:
    """Representations of a batch, `mini_batch_size` rows at a time.

    Args:
        encode: model inputs -> representations `(rows, vocab_size)`.
        inputs: tensors whose first dimension is the batch and second the length, `attention_mask` among them.
        mini_batch_size: rows at a time; None encodes all at once and keeps the activations.

    Returns:
        `(batch, vocab_size)`, in the order of `inputs`, differentiable with respect to what `encode` uses.
    """
    batch_size = len(inputs["attention_mask"])
    if mini_batch_size is None:
        return encode(dict(inputs))
    if mini_batch_size < 1:
        raise ValueError(f"mini_batch_size must be at least 1, found {mini_batch_size}")
    # Rows of similar length together: a mini-batch is only as long as its own longest row.
    order = inputs["attention_mask"].sum(dim=1).argsort(stable=True)
    representations = []
    for rows in order.split(mini_batch_size):
        chunk = _without_padding_columns({name: tensor[rows] for name, tensor in inputs.items()})
        if torch.is_grad_enabled() and batch_size > mini_batch_size:
            representations.append(checkpoint(encode, chunk, use_reentrant=False))
        else:
            representations.append(encode(chunk))
    return torch.cat(representations)[order.argsort()]


def _without_padding_columns(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the columns that are padding in every row, on either side."""
    used = inputs["attention_mask"].any(dim=0)
    used[0] |= ~used.any()  # a chunk of empty texts keeps one column
    return {name: tensor[:, used] for name, tensor in inputs.items()}
