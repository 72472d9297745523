"""The folder of a training run: what it holds before, while and after a recipe is carried out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.utils import logging

from rarezoo.training.recipe import PATHS_FILE, RECIPE_FILE, StoredRecipe, write_whole

logger = logging.get_logger(__name__)

LOG_FILE = "training_log.json"
CHECKPOINT_FOLDER = "checkpoints"


def check_folder(recipe: StoredRecipe, output_dir: Path, resume: bool) -> None:
    """See that the folder is free, or that it holds the run that is resumed."""
    if not resume:
        if output_dir.exists() and any(output_dir.iterdir()):
            raise FileExistsError(
                f"{output_dir} is not empty; choose another folder, or resume the run that began there"
            )
        return
    earlier: Any = type(recipe).load(output_dir / RECIPE_FILE)
    if getattr(recipe, "lora", False) is None:
        earlier.lora = None  # what was stored is the answer that the first run found
    if earlier != recipe:
        changed = sorted(name for name, value in earlier.to_dict().items() if recipe.to_dict()[name] != value)
        raise ValueError(f"cannot resume {output_dir} with another recipe; these fields differ: {', '.join(changed)}")
    if (output_dir / LOG_FILE).exists():
        raise FileExistsError(f"the run in {output_dir} is finished; choose another folder")


def common_arguments(recipe: Any, folder: Path, max_steps: int, evaluates: bool) -> dict[str, Any]:
    """The `TrainingArguments` that recipes of all kinds have fields for.

    Args:
        folder: of the checkpoints.
        evaluates: whether there are data for it; it is then done ten times.
    """
    known = TrainingArguments.__dataclass_fields__
    # transformers renamed the option within version 5.
    option = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {
        "output_dir": str(folder),
        "max_steps": max_steps,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": getattr(recipe, "accumulation_steps", 1),
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": recipe.bf16,
        # Without it, transformers takes bf16 for a request for a GPU.
        "use_cpu": not torch.accelerator.is_available(),
        "logging_steps": recipe.logging_steps,
        "logging_first_step": True,
        "save_strategy": "steps" if recipe.save_steps else "no",
        "save_steps": recipe.save_steps or 1,
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": max(max_steps // 10, 1),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": not logging.is_progress_bar_enabled(),
        "seed": recipe.seed,
        option: recipe.activation_checkpointing,
    }


@contextmanager
def cleared_after_a_mistake(output_dir: Path, resume: bool) -> Iterator[None]:
    """A new run that ends in an error before its first checkpoint leaves nothing, so that it can begin again there. One
    that is interrupted stays as it is."""
    existed = output_dir.exists()
    try:
        yield
    except Exception:
        checkpoints = output_dir / CHECKPOINT_FOLDER
        if not resume and last_whole_checkpoint(checkpoints) is None:
            shutil.rmtree(checkpoints, ignore_errors=True)
            for name in (RECIPE_FILE, PATHS_FILE):
                (output_dir / name).unlink(missing_ok=True)
            if not existed:
                with suppress(OSError):
                    output_dir.rmdir()
        raise


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; a kill in the middle of one leaves the one before."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        if _is_whole(checkpoint):
            return str(checkpoint)
        logger.warning(f"{checkpoint} was not written to its end and is passed over")
    return None


def _is_whole(checkpoint: Path) -> bool:
    """transformers writes weights, optimizer, scheduler and, last, the state of the run."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return any(checkpoint.glob("*.safetensors")) and (checkpoint / "optimizer.pt").is_file()


def export_run(output_dir: Path, write: Callable[[Path], None], log: list[dict[str, float]]) -> None:
    """Write the final files beside, then move them into place; the log comes last and marks a finished run.

    Args:
        write: writes them into the folder that it is given.
    """
    scratch = output_dir / f".export-{os.getpid()}"
    for left_over in output_dir.glob(".export-*"):  # of a run that was killed here
        shutil.rmtree(left_over)
    try:
        write(scratch)
        for path in sorted(scratch.iterdir()):
            if path.is_dir():
                shutil.rmtree(output_dir / path.name, ignore_errors=True)
            os.replace(path, output_dir / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_whole(output_dir / LOG_FILE, json.dumps(log, indent=2) + "\n")
    with suppress(OSError):  # it holds checkpoints
        (output_dir / CHECKPOINT_FOLDER).rmdir()
