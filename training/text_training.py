"""What trainings on raw text share: settings of the Trainer, and runs that go on from their last checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from rarezoo.training.trainer import show_progress_bar_alone


@contextmanager
def text_training_arguments(
    output_dir: str | Path | None, steps: int, batch_size: int, **settings: Any
) -> Iterator[TrainingArguments]:
    """Arguments of a run, which end with the context: without `output_dir` they name a temporary folder, and the run
    keeps no checkpoints; with it, one every tenth of the way.

    Args:
        output_dir: folder of the checkpoints, or None.
        steps: optimiser steps.
        batch_size: examples per step and process.
        settings: further fields of `TrainingArguments`; they go before those that are set here.
    """
    with tempfile.TemporaryDirectory() as scratch:
        usual: dict[str, Any] = {
            "output_dir": str(output_dir or scratch),
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            # Without it, transformers takes bf16 for a request for a GPU.
            "use_cpu": not torch.accelerator.is_available(),
            "remove_unused_columns": False,
            "report_to": "none",
            "logging_steps": max(steps // 100, 1),
            "save_strategy": "no" if output_dir is None else "steps",
            "save_steps": max(steps // 10, 1),
            "save_total_limit": 2,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "disable_tqdm": not logging.is_progress_bar_enabled(),
        }
        yield TrainingArguments(**{**usual, **settings})


def run_text_training(trainer: Trainer, output_dir: str | Path | None) -> dict[str, float]:
    """Train, on from the last checkpoint in `output_dir` if there is one.

    Returns:
        `{"first_loss", "last_loss", "steps"}`, the losses being means over a hundredth of the run.
    """
    show_progress_bar_alone(trainer)
    found = get_last_checkpoint(str(output_dir)) if output_dir and Path(output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=found)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"first_loss": losses[0], "last_loss": losses[-1], "steps": float(trainer.state.global_step)}
