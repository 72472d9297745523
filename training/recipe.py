"""A training run as one file: data, model, objective and optimisation, stored with the checkpoint."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rarezoo.training.objective import SparseObjective, check_field_types

RECIPE_FILE = "training_recipe.json"


_POSITIVE = (
    "vocabulary_size",
    "lora_rank",
    "learning_rate",
    "batch_size",
    "mini_batch_size",
    "max_steps",
    "epochs",
    "logging_steps",
)


@dataclass
class SparseTrainingRecipe:
    """Everything that a training run of a sparse retriever depends on.

    Args:
        training_data: file of rows, see `read_training_rows` and `parse_row`.
        queries, corpus: files of texts by id, for rows that hold ids.
        evaluation_data: file of rows whose losses are logged beside the training's.
        model: checkpoint folder or Hub name of a retriever to fine-tune; or None, and
        preset: architecture preset to start from scratch, of `family`.
        family: `model_type` of the preset.
        tokenizer: for a preset: tokenizer folder or Hub name; None trains one on the rows' texts.
        vocabulary_size: for a preset: entries of the trained tokenizer; None takes the preset's.
        initialization: for a preset: "random", or "lexical", see `initialize_as_lexical_matcher`.
        config: fields of the model's configuration to override, for example `{"logit_scale": 0.125}`.
        processor: arguments of the processor to override, for example `{"max_document_length": 128}`.
        lora: True, False, or None: LoRA for backbones above 0.5 billion parameters, else full fine-tuning. The recipe
            that is stored with a checkpoint says which it was.
        lora_rank, lora_alpha, lora_dropout: of LoRA; defaults as reported for Echo-Mistral-SPLADE.
        lora_target_modules: names of the adapted layers; None takes the family's.
        lora_on_head: adapt the vocabulary head too.
        quantization: None, or "nf4": keep the frozen weights in 4 bits during training (QLoRA).
        dtype: of the loaded weights; None takes bfloat16 for frozen weights under LoRA, float32 otherwise.
        objective: losses, regularisers and their schedule.
        learning_rate: highest value; a linear warm-up, then `scheduler`.
        scheduler: name of a transformers scheduler.
        warmup_ratio: part of the steps in which the learning rate grows.
        weight_decay, max_grad_norm: as in `TrainingArguments`.
        batch_size: rows per step and process; every other row's documents are negatives.
        mini_batch_size: texts encoded at a time, see `encode_in_chunks`; None keeps the whole batch's activations.
        max_steps: optimiser steps; None runs `epochs`.
        epochs: passes over the rows.
        bf16: compute in bfloat16 autocast.
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
        logging_steps, save_steps: steps between log entries and between checkpoints (0: no checkpoints).
        stop_on_collapse: end the run when the representations become empty.
        seed: of initialisation, order of rows and dropout.
    """

    training_data: str | None = None
    queries: str | None = None
    corpus: str | None = None
    evaluation_data: str | None = None
    model: str | None = None
    preset: str | None = None
    family: str = "mistral_splade"
    tokenizer: str | None = None
    vocabulary_size: int | None = None
    initialization: str = "random"
    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    lora: bool | None = None
    lora_rank: int = 16
    lora_alpha: float = 8
    lora_dropout: float = 0.1
    lora_target_modules: list[str] | None = None
    lora_on_head: bool = False
    quantization: str | None = None
    dtype: str | None = None
    objective: SparseObjective = field(default_factory=SparseObjective)
    learning_rate: float = 1e-4
    scheduler: str = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 128
    mini_batch_size: int | None = None
    max_steps: int | None = None
    epochs: float = 1.0
    bf16: bool = False
    activation_checkpointing: bool = False
    logging_steps: int = 10
    save_steps: int = 500
    stop_on_collapse: bool = False
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.objective, Mapping):
            self.objective = SparseObjective(**_known_fields(SparseObjective, self.objective))
        check_field_types(self)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, found {value}")
        if (self.model is None) == (self.preset is None):
            raise ValueError(
                f"a recipe needs either a model to fine-tune or a preset to start from, found model={self.model!r} and "
                f"preset={self.preset!r}"
            )
        if self.initialization not in ("random", "lexical"):
            raise ValueError(f"initialization must be 'random' or 'lexical', found {self.initialization!r}")
        if self.quantization not in (None, "nf4"):
            raise ValueError(f"quantization must be null or 'nf4', found {self.quantization!r}")
        if self.model is None and (self.lora or self.quantization):
            raise ValueError("LoRA and quantization keep pretrained weights frozen; a preset has none: set a model")
        if self.quantization and self.lora is False:
            raise ValueError("quantized weights cannot be trained themselves; set lora to true or null")

    @classmethod
    def small_from_scratch(cls, **overrides: Any) -> SparseTrainingRecipe:
        """A two-layer model from nothing but a few thousand short texts, on two CPU cores in about two minutes."""
        settings: dict[str, Any] = {
            "preset": "tiny",
            "initialization": "lexical",
            # Short literals: every token of a template is read for every text, which counts on a CPU.
            "processor": {
                "query_template": "<s>{!%%text%%}</s>{%%text%%}",
                "document_template": "<s>{!%%text%%}</s>{%%text%%}",
                "max_query_length": 48,
                "max_document_length": 128,
            },
            "vocabulary_size": 8192,
            # The lexical start is good already: higher rates forget it before they learn anything better.
            "learning_rate": 2e-4,
            # Scores of the lexical start differ by a few units; at scale 1 the loss would rather raise all weights than
            # reorder the documents.
            "objective": SparseObjective(
                score_scale=2.0, query_regularizer_weight=0.03, document_regularizer_weight=0.03
            ),
            "batch_size": 64,
            "max_steps": 90,
            "bf16": True,
            "save_steps": 0,
        }
        return cls(**{**settings, **overrides})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SparseTrainingRecipe:
        """Raises `ValueError` for unknown fields."""
        return cls(**_known_fields(cls, settings))

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON, or as YAML where the name ends in .yaml or .yml."""
        path = Path(path)
        if path.suffix in (".yaml", ".yml"):
            import yaml

            text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        else:
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_whole(path, text)

    @classmethod
    def load(cls, path: str | Path) -> SparseTrainingRecipe:
        """Read a recipe file, or the one stored in a checkpoint folder."""
        path = Path(path)
        path = path / RECIPE_FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no training recipe at {path}")
        text = path.read_text(encoding="utf-8")
        import yaml

        try:
            settings = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is not valid: {' '.join(str(error).split())}") from None
        if not isinstance(settings, dict):
            raise ValueError(f"{path} must hold the fields of a recipe, found {type(settings).__name__}")
        try:
            return cls.from_dict(settings)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _known_fields(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    known = [entry.name for entry in dataclasses.fields(kind)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        near = [(name, difflib.get_close_matches(str(name), known, 1)) for name in unknown]
        named = [f"{name} (did you mean {match[0]}?)" if match else str(name) for name, match in near]
        raise ValueError(f"unknown {kind.__name__} fields {', '.join(named)}; known fields: {', '.join(known)}")
    return dict(settings)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
