"""Losses over the MaxSim scores of token vectors, as colbert-ai computes them, and their weighted sum.

A batch holds `batch` queries with `nway` passages each, the positive first. Scores are sums over the query's vectors
(about -32 to 32 for 32 vectors), with no temperature: colbert-ai 0.2.22, `training/training.py` and
`modeling/colbert.py`; ColBERT-XM, arXiv 2402.15059, section 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rarezoo.colbert_xm.max_sim import max_sim, max_sim_pairs
from rarezoo.training.objective import check_field_types

IN_BATCH_FORMS = ("code", "paper")


def nway_cross_entropy_loss(scores: Tensor) -> Tensor:
    """Cross-entropy of each query's positive among its own passages ("pairwise" in the paper, where nway is 2).

    Args:
        scores: `(batch, nway)`, the positive in column 0.

    Returns:
        A scalar, mean over the batch; 0 where nway is 1.
    """
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))


def in_batch_cross_entropy_loss(scores: Tensor, form: str = "code") -> Tensor:
    """Cross-entropy of each query's positive among the passages of the whole batch.

    Args:
        scores: `(batch, batch * nway)`: of every query with all passages, the first query's passages first, each
            query's positive before its negatives.
        form: "code" leaves a query's own negatives out of its candidates, so that `batch * nway - nway + 1` remain
            (colbert-ai, and the published weights); "paper" keeps them (formula 8).

    Returns:
        A scalar, mean over the batch.
    """
    batch_size = len(scores)
    if scores.dim() != 2 or batch_size == 0 or scores.shape[1] % batch_size:
        raise ValueError(f"scores must have shape (batch, batch * nway), found {tuple(scores.shape)}")
    if form not in IN_BATCH_FORMS:
        raise ValueError(f"form must be one of {', '.join(IN_BATCH_FORMS)}, found {form!r}")
    nway = scores.shape[1] // batch_size
    positives = torch.arange(batch_size, device=scores.device) * nway
    if form == "code":
        owner = torch.arange(scores.shape[1], device=scores.device) // nway
        kept = owner != torch.arange(batch_size, device=scores.device)[:, None]
        kept.scatter_(1, positives[:, None], True)
        # As many columns go from every row, all behind its positive: that keeps its column.
        scores = scores[kept].view(batch_size, -1)
    return F.cross_entropy(scores, positives)


def score_distillation_loss(scores: Tensor, teacher_scores: Tensor, alpha: float = 1.0) -> Tensor:
    """`KL(softmax(alpha * teacher) || softmax(scores))` over each query's own passages, mean over the batch.

    Args:
        scores: `(batch, nway)`.
        teacher_scores: `(batch, nway)`.
        alpha: colbert-ai's `distillation_alpha`, a factor on the teacher's scores only.
    """
    if teacher_scores.shape != scores.shape:
        raise ValueError(
            f"teacher_scores must have shape (batch, nway) = {tuple(scores.shape)}, found {tuple(teacher_scores.shape)}"
        )
    teacher = F.log_softmax(alpha * teacher_scores.to(scores), dim=-1)
    return F.kl_div(F.log_softmax(scores, dim=-1), teacher, reduction="batchmean", log_target=True)


def own_scores(scores: Tensor) -> Tensor:
    """`(batch, nway)`: the scores of each query with its own passages, out of `(batch, batch * nway)`."""
    batch_size = len(scores)
    return scores.unflatten(1, (batch_size, -1)).diagonal(dim1=0, dim2=1).T


@dataclass
class LateInteractionObjective:
    """Losses over token vectors with their weights. The default is what the published weights were trained with.

    Args:
        cross_entropy_weight: weight of `nway_cross_entropy_loss`.
        in_batch_weight: weight of `in_batch_cross_entropy_loss`.
        distillation_weight: weight of `score_distillation_loss`; above 0 the rows need negatives and `scores`.
            colbert-ai puts it in the place of the cross-entropy: set `cross_entropy_weight` to 0 for that.
        in_batch_form: "code" or "paper", see `in_batch_cross_entropy_loss`.
        distillation_alpha: factor on the teacher's scores.
        score_scale: factor on the scores in the two cross-entropies, one over their temperature; 1 as published.
    """

    cross_entropy_weight: float = 1.0
    in_batch_weight: float = 1.0
    distillation_weight: float = 0.0
    in_batch_form: str = "code"
    distillation_alpha: float = 1.0
    score_scale: float = 1.0

    def __post_init__(self):
        check_field_types(self)
        weights = {name: value for name, value in vars(self).items() if name.endswith("_weight")}
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, found {value}")
        if not any(weights.values()):
            raise ValueError(f"{', '.join(weights)} are all 0: there is nothing to learn from")
        for name in ("distillation_alpha", "score_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if self.in_batch_form not in IN_BATCH_FORMS:
            raise ValueError(f"in_batch_form must be one of {', '.join(IN_BATCH_FORMS)}, found {self.in_batch_form!r}")

    def __call__(
        self,
        queries: Tensor,
        documents: Tensor,
        *,
        query_mask: Tensor | None = None,
        document_mask: Tensor | None = None,
        teacher_scores: Tensor | None = None,
        similarity: str = "cosine",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one whole batch.

        Args:
            queries: `(batch, query_length, dim)`.
            documents: `(batch, nway, document_length, dim)`, the positive first.
            query_mask: `(batch, query_length)` bool, True for the vectors that count; None: all do.
            document_mask: `(batch, nway, document_length)` bool.
            teacher_scores: `(batch, nway)`.
            similarity: "cosine" or "l2", see `max_sim`.

        Returns:
            The scalar loss, and scalars to log (detached): the losses times their weights, their sum as
            `ranking_loss`, and `accuracy`, the share of queries whose positive scores highest of all candidates; one of
            n that score equally high counts 1 / n.
        """
        if documents.dim() != 4 or len(documents) != len(queries):
            raise ValueError(
                f"documents must have shape (batch, nway, length, dim) = ({len(queries)}, …), "
                f"found {tuple(documents.shape)}"
            )
        nway = documents.shape[1]
        self._check_rows(nway, teacher_scores)
        if self.in_batch_weight:
            candidates = max_sim(
                queries,
                documents.flatten(0, 1),
                query_mask=query_mask,
                document_mask=None if document_mask is None else document_mask.flatten(0, 1),
                similarity=similarity,
            )
            scores = own_scores(candidates)
        else:
            scores = candidates = max_sim_pairs(
                queries, documents, query_mask=query_mask, document_mask=document_mask, similarity=similarity
            )
        losses = {}
        if self.cross_entropy_weight:
            losses["cross_entropy_loss"] = self.cross_entropy_weight * nway_cross_entropy_loss(
                self.score_scale * scores
            )
        if self.distillation_weight and teacher_scores is not None:
            loss = score_distillation_loss(scores, teacher_scores, self.distillation_alpha)
            losses["distillation_loss"] = self.distillation_weight * loss
        if self.in_batch_weight:
            loss = in_batch_cross_entropy_loss(self.score_scale * candidates, self.in_batch_form)
            losses["in_batch_loss"] = self.in_batch_weight * loss
        ranking_loss = torch.stack(list(losses.values())).sum()
        highest = candidates == candidates.amax(dim=1, keepdim=True)
        found = scores[:, 0] == candidates.amax(dim=1)
        metrics = {"ranking_loss": ranking_loss, **losses, "accuracy": (found / highest.sum(dim=1)).mean()}
        return ranking_loss, {name: value.detach().float() for name, value in metrics.items()}

    def _check_rows(self, nway: int, teacher_scores: Tensor | None) -> None:
        if nway == 1 and not self.in_batch_weight:
            raise ValueError("without in_batch_weight the rows need negatives; found none")
        if self.distillation_weight and (nway == 1 or teacher_scores is None):
            raise ValueError("distillation_weight is above 0, but the rows have no negatives or no 'scores'")
