"""Losses over sparse representations: ranking, distillation and sparsity, with the schedule of the sparsity weights.

Representations are dense float tensors of shape `(batch, vocab_size)` with non-negative entries; a score is a dot
product. Everything is computed in float32 (float64 when the inputs are float64), also inside an autocast region: sums
over tens of thousands of vocabulary entries lose the small weights in half precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

SCHEDULE_CONVENTIONS = ("naver", "sentence-transformers")

_Parameters = ParamSpec("_Parameters")


def _without_autocast(loss: Callable[_Parameters, Tensor]) -> Callable[_Parameters, Tensor]:
    @functools.wraps(loss)
    def in_full_precision(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> Tensor:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(device_type=first.device.type, enabled=False):
            return loss(*args, **kwargs)

    return in_full_precision


def _full_precision(name: str, representations: Tensor, dimensions: int = 2) -> Tensor:
    if representations.dim() != dimensions:
        wanted = "(batch, vocab_size)" if dimensions == 2 else "(batch, n_negatives, vocab_size)"
        raise ValueError(f"{name} must have shape {wanted}, found {tuple(representations.shape)}")
    if 0 in representations.shape:
        raise ValueError(f"{name} is empty: shape {tuple(representations.shape)}; a loss needs at least one row")
    return representations if representations.dtype == torch.float64 else representations.float()


def _stack_negatives(queries: Tensor, negatives: Tensor | Sequence[Tensor]) -> Tensor:
    """Negatives as one tensor `(batch, n_negatives, vocab_size)`; a list holds one `(batch, vocab_size)` for each."""
    if not isinstance(negatives, Tensor):
        if not negatives:
            raise ValueError("negatives is an empty list; pass None, or at least one tensor (batch, vocab_size)")
        negatives = torch.stack(list(negatives), dim=1)
    negatives = _full_precision("negatives", negatives, dimensions=3)
    if negatives.shape[0] != queries.shape[0] or negatives.shape[2] != queries.shape[1]:
        raise ValueError(
            "negatives must have shape (batch, n_negatives, vocab_size) = "
            f"({queries.shape[0]}, n, {queries.shape[1]}), found {tuple(negatives.shape)}"
        )
    return negatives


def _check_pair(queries: Tensor, positives: Tensor) -> None:
    if queries.shape != positives.shape:
        raise ValueError(
            "queries and positives must have the same shape (batch, vocab_size), "
            f"found {tuple(queries.shape)} and {tuple(positives.shape)}"
        )


def pair_scores(queries: Tensor, positives: Tensor, negatives: Tensor | Sequence[Tensor]) -> Tensor:
    """Dot products of every query with its own positive (column 0) and negatives: `(batch, 1 + n_negatives)`."""
    queries = _full_precision("queries", queries)
    positives = _full_precision("positives", positives)
    _check_pair(queries, positives)
    negatives = _stack_negatives(queries, negatives)
    positive_scores = (queries * positives).sum(dim=1, keepdim=True)
    return torch.cat([positive_scores, torch.einsum("bv,bnv->bn", queries, negatives)], dim=1)


@_without_autocast
def info_nce_loss(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | Sequence[Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Cross-entropy of each query's own positive among all positives and all negatives of the batch.

    `mean_i -log softmax_j(scale * q_i . d_j)[i]`, the documents j being the batch's positives, then every row's
    negatives. `scale` is one over the temperature; 1.0 as in sentence-transformers' SparseMultipleNegativesRankingLoss.

    Args:
        queries: `(batch, vocab_size)`.
        positives: `(batch, vocab_size)`, row i answers query i.
        negatives: `(batch, n_negatives, vocab_size)`, or a list of `n_negatives` tensors `(batch, vocab_size)`.
        scale: factor on the dot products.

    Returns:
        A scalar.
    """
    queries = _full_precision("queries", queries)
    positives = _full_precision("positives", positives)
    _check_pair(queries, positives)
    scores = queries @ positives.T
    if negatives is not None:
        scores = torch.cat([scores, queries @ _stack_negatives(queries, negatives).flatten(0, 1).T], dim=1)
    return F.cross_entropy(scores * scale, torch.arange(len(queries), device=scores.device))


@_without_autocast
def margin_mse_loss(
    queries: Tensor, positives: Tensor, negatives: Tensor | Sequence[Tensor], teacher_margins: Tensor
) -> Tensor:
    """Mean squared difference of the student's and a teacher's margin `score(positive) - score(negative)`.

    Hofstätter et al., arXiv 2010.02666. `teacher_margins` is `(batch,)` for one negative or `(batch, n_negatives)`.
    """
    scores = pair_scores(queries, positives, negatives)
    margins = scores[:, :1] - scores[:, 1:]
    teacher = teacher_margins.to(margins).reshape(len(margins), -1)
    if teacher.shape != margins.shape:
        raise ValueError(
            f"teacher_margins must have shape {tuple(margins.shape)}, found {tuple(teacher_margins.shape)}"
        )
    return F.mse_loss(margins, teacher)


@_without_autocast
def kl_distillation_loss(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | Sequence[Tensor],
    teacher_scores: Tensor,
    temperature: float = 2.0,
) -> Tensor:
    """Divergence of the student's distribution over a query's documents from a teacher's.

    `KL(softmax(teacher / T) || softmax(student / T)) * T**2`, averaged over the batch. The factor `T**2` keeps the size
    of the gradients independent of the temperature. T = 2 is sentence-transformers' SparseDistillKLDivLoss; naver's
    SPLADE training is `temperature=1.0`.

    Args:
        queries: `(batch, vocab_size)`.
        positives: `(batch, vocab_size)`.
        negatives: `(batch, n_negatives, vocab_size)`, or a list of `n_negatives` tensors `(batch, vocab_size)`.
        teacher_scores: `(batch, 1 + n_negatives)`, the positive first.
        temperature: divides both kinds of score.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, found {temperature}")
    scores = pair_scores(queries, positives, negatives)
    if teacher_scores.shape != scores.shape:
        raise ValueError(
            f"teacher_scores must have shape (batch, 1 + n_negatives) = {tuple(scores.shape)}, "
            f"found {tuple(teacher_scores.shape)}"
        )
    student = F.log_softmax(scores / temperature, dim=1)
    teacher = F.log_softmax(teacher_scores.to(scores) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


@_without_autocast
def flops_regularizer(representations: Tensor, threshold: int | None = None) -> Tensor:
    """`sum_j (mean_b |w_bj|)**2`: a smooth stand-in for the multiplications that an inverted index has to do.

    Paria et al., arXiv 2004.05665. The mean over the batch stands inside the square, so the value of a batch is not the
    mean of the values of its parts: pass the whole batch.

    Args:
        representations: `(batch, vocab_size)`.
        threshold: rows with at most this many active entries count as zero (arXiv 2504.14839); the mean still divides
            by all rows.
    """
    representations = _full_precision("representations", representations)
    if threshold is not None:
        keep = (representations != 0).sum(dim=1, keepdim=True) > threshold
        representations = representations * keep
    return representations.abs().mean(dim=0).square().sum()


@_without_autocast
def l1_regularizer(representations: Tensor) -> Tensor:
    """`mean_b sum_j |w_bj|` of representations `(batch, vocab_size)`."""
    return _full_precision("representations", representations).abs().sum(dim=1).mean()


def active_dimensions(representations: Tensor) -> Tensor:
    """Mean number of non-zero entries per row of `(batch, vocab_size)`: a float32 scalar without gradient."""
    return (representations.detach() != 0).sum(dim=1).float().mean()


def quadratic_weight(weight: float, step: int, warmup_steps: int, convention: str = "naver") -> float:
    """Weight of a regulariser at a training step: grows with the square of the step, then stays.

    `weight * (min(t, warmup_steps) / warmup_steps)**2`. The conventions differ in t by one: "naver" counts first and
    then uses the weight, so t = 1 at the first step; "sentence-transformers" starts with t = 0, a first step without
    regulariser.

    Args:
        weight: the final weight.
        step: optimiser steps finished so far (0 during the first step), as in `TrainerState.global_step`.
        warmup_steps: steps until the final weight is reached; 0 means from the beginning.
        convention: "naver" or "sentence-transformers".
    """
    if convention not in SCHEDULE_CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(SCHEDULE_CONVENTIONS)}, found {convention!r}")
    if step < 0 or warmup_steps < 0:
        raise ValueError(f"step and warmup_steps must not be negative, found {step} and {warmup_steps}")
    if warmup_steps == 0:
        return weight
    t = step + 1 if convention == "naver" else step
    return weight * (min(t, warmup_steps) / warmup_steps) ** 2
