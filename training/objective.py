"""What training minimises: L = L_rank + lambda_q(t) R(queries) + lambda_d(t) R(documents)."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarezoo.training.losses import (
    SCHEDULE_CONVENTIONS,
    active_dimensions,
    flops_regularizer,
    info_nce_loss,
    kl_distillation_loss,
    l1_regularizer,
    margin_mse_loss,
    quadratic_weight,
)

REGULARIZERS = ("flops", "l1")


def check_field_types(settings: Any) -> None:
    """Compare the plain fields of a dataclass instance with their annotations; numbers written as text, as YAML reads
    1e-4, become numbers.

    Raises:
        ValueError: a field of another type.
    """
    for entry in dataclasses.fields(settings):
        kinds, value = str(entry.type).split(" | "), getattr(settings, entry.name)
        if value is None and "None" in kinds:
            continue
        if "float" in kinds and isinstance(value, int | float | str) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                value = float(value)
                setattr(settings, entry.name, value)
        plain = {"float": float, "int": int, "bool": bool, "str": str, "None": type(None)}
        if all(name in plain for name in kinds) and type(value) not in {plain[name] for name in kinds}:
            raise ValueError(f"{entry.name} must be of type {entry.type}, found {value!r}")


@dataclass
class SparseObjective:
    """Ranking losses and sparsity regularisers with their weights.

    Args:
        info_nce_weight: weight of `info_nce_loss`.
        margin_mse_weight: weight of `margin_mse_loss`; above 0 the rows need negatives and `margin` or `scores`.
        kl_weight: weight of `kl_distillation_loss`; above 0 the rows need negatives and `scores`.
        score_scale: factor on the scores in `info_nce_loss`.
        temperature: of `kl_distillation_loss`.
        query_regularizer, document_regularizer: "flops" or "l1". Documents are positives and negatives together.
        query_regularizer_weight, document_regularizer_weight: the final lambda of each side.
        flops_threshold: rows with at most this many active dimensions are spared by the "flops" regulariser.
        regularizer_warmup_steps: optimiser steps in which lambda grows quadratically; None takes a third of the run.
        schedule: "naver" or "sentence-transformers", see `quadratic_weight`.
    """

    info_nce_weight: float = 1.0
    margin_mse_weight: float = 0.0
    kl_weight: float = 0.0
    score_scale: float = 1.0
    temperature: float = 2.0
    query_regularizer: str = "flops"
    document_regularizer: str = "flops"
    query_regularizer_weight: float = 1e-3
    document_regularizer_weight: float = 1e-3
    flops_threshold: int | None = None
    regularizer_warmup_steps: int | None = None
    schedule: str = "naver"

    def __post_init__(self):
        check_field_types(self)
        weights = {name: value for name, value in vars(self).items() if name.endswith("_weight")}
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, found {value}")
        if not any(weights[name] for name in ("info_nce_weight", "margin_mse_weight", "kl_weight")):
            raise ValueError(
                "info_nce_weight, margin_mse_weight and kl_weight are all 0: there is nothing to learn from"
            )
        for name in ("score_scale", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        for name in ("query_regularizer", "document_regularizer"):
            if getattr(self, name) not in REGULARIZERS:
                raise ValueError(f"{name} must be one of {', '.join(REGULARIZERS)}, found {getattr(self, name)!r}")
        if self.schedule not in SCHEDULE_CONVENTIONS:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULE_CONVENTIONS)}, found {self.schedule!r}")

    def __call__(
        self,
        queries: Tensor,
        documents: Tensor,
        *,
        step: int,
        max_steps: int,
        teacher_scores: Tensor | None = None,
        teacher_margins: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one whole batch.

        Args:
            queries: `(batch, vocab_size)`.
            documents: `(batch * (1 + n_negatives), vocab_size)`: positives, then all first negatives, and so on.
            step: optimiser steps finished so far.
            max_steps: length of the run.
            teacher_scores: `(batch, 1 + n_negatives)`.
            teacher_margins: `(batch, n_negatives)`.

        Returns:
            The scalar loss, and scalars to log (detached).
        """
        positives, negatives = _split_documents(documents, len(queries))
        metrics = self._ranking_losses(queries, positives, negatives, teacher_scores, teacher_margins)
        ranking_loss = torch.stack(list(metrics.values())).sum()
        metrics = {"ranking_loss": ranking_loss, **(metrics if len(metrics) > 1 else {})}
        loss = ranking_loss
        for side, representations in (("query", queries), ("document", documents)):
            weight = self.regularizer_weight(side, step, max_steps)
            flops = flops_regularizer(representations, self.flops_threshold)
            regularizer = flops
            if getattr(self, f"{side}_regularizer") == "l1":
                regularizer = l1_regularizer(representations)
            loss = loss + weight * regularizer
            metrics[f"{side}_regularizer"] = regularizer
            metrics[f"{side}_lambda"] = torch.tensor(weight, device=loss.device)
            metrics[f"{side}_flops"] = flops
            metrics[f"{side}_active_dimensions"] = active_dimensions(representations)
        return loss, {name: value.detach().float() for name, value in metrics.items()}

    def regularizer_weight(self, side: str, step: int, max_steps: int) -> float:
        """lambda of side "query" or "document" during a step (`step` = optimiser steps finished before it)."""
        warmup_steps = self.regularizer_warmup_steps
        if warmup_steps is None:
            warmup_steps = max_steps // 3
        return quadratic_weight(getattr(self, f"{side}_regularizer_weight"), step, warmup_steps, self.schedule)

    def _ranking_losses(self, queries, positives, negatives, teacher_scores, teacher_margins) -> dict[str, Tensor]:
        losses = {}
        if self.info_nce_weight:
            loss = info_nce_loss(queries, positives, negatives, self.score_scale)
            losses["info_nce_loss"] = self.info_nce_weight * loss
        if self.margin_mse_weight or self.kl_weight:
            if negatives is None:
                raise ValueError("distillation needs rows with negatives; found none")
        if self.margin_mse_weight:
            if teacher_margins is None and teacher_scores is not None:
                teacher_margins = teacher_scores[:, :1] - teacher_scores[:, 1:]
            if teacher_margins is None:
                raise ValueError("margin_mse_weight is above 0, but the rows have neither 'margin' nor 'scores'")
            loss = margin_mse_loss(queries, positives, negatives, teacher_margins)
            losses["margin_mse_loss"] = self.margin_mse_weight * loss
        if self.kl_weight:
            if teacher_scores is None:
                raise ValueError("kl_weight is above 0, but the rows have no 'scores'")
            loss = kl_distillation_loss(queries, positives, negatives, teacher_scores, self.temperature)
            losses["kl_loss"] = self.kl_weight * loss
        return losses


def _split_documents(documents: Tensor, batch_size: int) -> tuple[Tensor, Tensor | None]:
    """Positives `(batch, vocab_size)` and negatives `(batch, n_negatives, vocab_size)` or None."""
    if len(documents) % batch_size:
        raise ValueError(
            f"expected a multiple of {batch_size} documents for {batch_size} queries, found {len(documents)}"
        )
    groups = documents.unflatten(0, (-1, batch_size))
    return groups[0], groups[1:].transpose(0, 1) if len(groups) > 1 else None
