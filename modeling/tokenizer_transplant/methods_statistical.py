"""Methods that look at the base's tables as a whole: the baselines, and the fallbacks of all others.

Sources: specification section 4.3 (mean, zero, randn, john_hewitt as in mergekit's tokensurgeon) and `transformers`'
resizing of embeddings (mean_resizing). Statistics are taken over the rows that have a token, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .transplant_matrix import CombinationRows, SourceKind, TransplantMatrix
from .transplanting import TransplantContext

# `transformers` draws new rows so close to the mean that none stands out: arXiv 2404.04969's advice, its factor.
_RESIZING_VARIANCE = 1e-9


def mean(context: TransplantContext) -> TransplantMatrix:
    """Every row is the mean of the base's rows."""
    head_table = context.head_table
    return TransplantMatrix.constant(
        len(context.targets),
        context.base_rows,
        SourceKind.MEAN,
        _token_rows(context, context.input_table).mean(0),
        None if head_table is None else _token_rows(context, head_table).mean(0),
    )


def zero(context: TransplantContext) -> TransplantMatrix:
    """Every row is zero."""
    return TransplantMatrix.constant(len(context.targets), context.base_rows, SourceKind.ZERO)


def randn(context: TransplantContext) -> TransplantMatrix:
    """Every component is drawn from N(0, 1)."""
    return _drawn(context, lambda rows, noise: noise)


def normal(context: TransplantContext, *, per_dimension: bool = True) -> TransplantMatrix:
    """Every component is drawn from N(mean, standard deviation) of its dimension or, with `per_dimension=False` (as
    TokenAdapt), of the whole table."""

    def draw(rows: Tensor, noise: Tensor) -> Tensor:
        if per_dimension:
            return rows.mean(0) + noise * rows.std(0)
        return rows.mean() + noise * rows.std()

    return _drawn(context, draw)


def john_hewitt(context: TransplantContext) -> TransplantMatrix:
    """Every row is drawn from N(mean, covariance) of the base's rows."""
    return _drawn(context, lambda rows, noise: _gaussian(rows, noise, 1.0))


def mean_resizing(context: TransplantContext) -> TransplantMatrix:
    """Every row is drawn from N(mean, 1e-9 covariance), as `resize_token_embeddings` of `transformers` does."""
    return _drawn(context, lambda rows, noise: _gaussian(rows, noise, _RESIZING_VARIANCE))


def _token_rows(context: TransplantContext, table: Tensor) -> Tensor:
    """The rows of the base that have a token, `(n, hidden_size)` float64."""
    ids = [token_id for token_id in context.base.used_ids if token_id < len(table)]
    return table.detach()[torch.tensor(ids, device=table.device)].double().cpu()


def _drawn(context: TransplantContext, draw) -> TransplantMatrix:
    """Rows `draw(base's rows, standard normal noise)` for the input table and, from other noise, for the head."""
    generator = context.generator()
    rows = _drawn_rows(context, context.input_table, generator, draw)
    head = None if context.head_table is None else _drawn_rows(context, context.head_table, generator, draw)
    kinds = torch.full((len(context.targets),), int(SourceKind.RANDOM), dtype=torch.uint8)
    return TransplantMatrix(kinds, rows, context.base_rows, head)


def _drawn_rows(context: TransplantContext, table: Tensor, generator: torch.Generator, draw) -> CombinationRows:
    count = len(context.targets)
    noise = torch.randn(count, table.shape[1], generator=generator, dtype=torch.float64)
    nothing = torch.empty(count, 0)
    return CombinationRows.from_padded(nothing.long(), nothing, draw(_token_rows(context, table), noise))


def _gaussian(rows: Tensor, noise: Tensor, variance: float) -> Tensor:
    """noise -> N(mean, variance * covariance); the covariance may be singular (fewer tokens than dimensions)."""
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / len(rows)
    ridge = covariance.diagonal().mean() * 1e-10 + torch.finfo(torch.float64).tiny
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance), dtype=torch.float64))
    return rows.mean(0) + variance**0.5 * noise @ factor.T
