"""Batches larger than memory, with the gradients of the whole batch.

A contrastive loss and the FLOPS regulariser look at a whole batch at once, but only at its representations. So a batch
is encoded in mini-batches whose activations are dropped at once and recomputed, with the same dropout, when the
backward pass reaches them: GradCache (arXiv 2101.06983) by means of activation checkpointing. Memory holds the
activations of one mini-batch and the representations; the gradients are those of the whole batch, at the price of a
second forward pass.
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
        encode: model inputs -> representations, one vector per text, `(rows, size)`, or per token, `(rows, length,
            size)`.
        inputs: tensors whose first dimension is the batch and second, if they have one, the length; `attention_mask`
            among them. A position counts where it or `keep_mask` is not 0.
        mini_batch_size: rows at a time; None encodes all at once and keeps the activations.

    Returns:
        `(batch, size)` or `(batch, length, size)`, in the order of `inputs` and with zeros where a text has no
        position that counts, differentiable with respect to what `encode` uses.
    """
    batch_size = len(inputs["attention_mask"])
    if mini_batch_size is None:
        return encode(dict(inputs))
    if mini_batch_size < 1:
        raise ValueError(f"mini_batch_size must be at least 1, found {mini_batch_size}")
    used = inputs["attention_mask"].bool() | inputs.get("keep_mask", inputs["attention_mask"]).bool()
    # Rows of similar length together: a mini-batch is only as long as its own longest row.
    order = used.sum(dim=1).argsort(stable=True)
    representations = []
    for rows in order.split(mini_batch_size):
        columns = _used_columns(used[rows])
        chunk = {name: _select(tensor[rows], columns) for name, tensor in inputs.items()}
        if torch.is_grad_enabled() and batch_size > mini_batch_size:
            encoded = checkpoint(encode, chunk, use_reentrant=False)
        else:
            encoded = encode(chunk)
        representations.append(_restore(encoded, columns))
    return torch.cat(representations)[order.argsort()]


def _used_columns(used: Tensor) -> Tensor:
    """`(length,)` bool: all but the columns that are padding in every row, on either side."""
    columns = used.any(dim=0)
    columns[0] |= ~columns.any()  # a chunk of empty texts keeps one column
    return columns


def _select(tensor: Tensor, columns: Tensor) -> Tensor:
    return tensor[:, columns] if tensor.dim() > 1 else tensor


def _restore(encoded: Tensor, columns: Tensor) -> Tensor:
    """Put the vectors of tokens back into their columns."""
    if encoded.dim() < 3 or columns.all():
        return encoded
    whole = encoded.new_zeros(len(encoded), len(columns), encoded.shape[2])
    return whole.index_copy(1, columns.nonzero().squeeze(1), encoded)
