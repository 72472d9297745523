"""A training run as one file: data, model, objective and optimisation, stored with the checkpoint."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from rarezoo.auto import FAMILIES, family_of
from rarezoo.training.late_interaction_losses import LateInteractionObjective
from rarezoo.training.objective import SparseObjective, check_field_types

if TYPE_CHECKING:
    from typing_extensions import Self

RECIPE_FILE = "training_recipe.json"
# Beside it, where its files lie on this machine: never published with the checkpoint.
PATHS_FILE = "training_paths.json"
# Fields that may name a file or folder.
_PATHS = ("training_data", "queries", "corpus", "evaluation_data", "model", "tokenizer", "teacher")

_POSITIVE = (
    "vocabulary_size",
    "lora_rank",
    "learning_rate",
    "batch_size",
    "mini_batch_size",
    "max_steps",
    "epochs",
    "logging_steps",
    "adam_epsilon",
    "nway",
    "accumulation_steps",
    "sequence_length",
    "scale_learning_rate_factor",
    "temperature",
)


def check_types_and_signs(recipe: Any) -> None:
    """Raises `ValueError` that names the field."""
    check_field_types(recipe)
    for name in _POSITIVE:
        value = getattr(recipe, name, None)
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, found {value}")


def check_common_fields(recipe: Any) -> None:
    """Types, signs, and that there is one model to start from.

    Raises:
        ValueError: naming the field.
    """
    check_types_and_signs(recipe)
    if (recipe.model is None) == (recipe.preset is None):
        raise ValueError(
            f"a recipe needs either a model to fine-tune or a preset to start from, found model={recipe.model!r} and "
            f"preset={recipe.preset!r}"
        )


class StoredRecipe:
    """What recipes of all kinds have in common: a dataclass, as a dict and as a file."""

    family: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(cast(Any, self))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
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

    def save_into(self, folder: str | Path) -> None:
        """Store the recipe in a checkpoint folder, so that the checkpoint may be published: of absolute paths only the
        last names stand in the recipe, and the paths in a file of their own, with which `load` puts them together."""
        folder, settings = Path(folder), self.to_dict()
        paths = {name: settings[name] for name in _PATHS if any(map(os.path.isabs, _listed(settings.get(name))))}
        names: dict[str, Any] = {name: _last_names(value) for name, value in paths.items()}
        if paths:
            write_whole(folder / PATHS_FILE, json.dumps(paths, indent=2, ensure_ascii=False, default=str) + "\n")
        dataclasses.replace(cast(Any, self), **names).save(folder / RECIPE_FILE)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recipe file, or the one stored in a checkpoint folder."""
        path = _recipe_file(path)
        try:
            return cls.from_dict(_read_settings(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


@dataclass
class TrainingRecipe(StoredRecipe):
    """What training runs of all kinds of retriever depend on; the subclasses add the rest and their own defaults.

    Args:
        training_data: file of rows, see `read_training_rows` and `parse_row`.
        queries, corpus: files of texts by id, for rows that hold ids, see `read_text_table`.
        evaluation_data: file of rows whose losses are logged beside the training's.
        model: checkpoint folder or Hub name of a retriever to fine-tune, or, for a multi-vector one, of an X-MOD
            language model, whose projection to token vectors is then new; or None, and
        preset: architecture preset to start from scratch, of `family`.
        family: `model_type` of the model or preset.
        tokenizer: for a preset or a bare language model: tokenizer folder or Hub name; None trains one on the rows'
            texts, or takes the language model's.
        vocabulary_size: for a preset: entries of the trained tokenizer; None takes the preset's.
        initialization: for a preset: "random" or "lexical".
        config: fields of the model's configuration to override, for example `{"logit_scale": 0.125}`.
        processor: arguments of the processor to override, for example `{"max_document_length": 128}`.
        lora: True, False, or None: LoRA for backbones above 0.5 billion parameters, else full fine-tuning. The recipe
            that is stored with a checkpoint says which it was.
        lora_rank, lora_alpha, lora_dropout: of LoRA.
        lora_target_modules: names of the adapted layers; None takes the family's.
        lora_on_head: adapt the head too (the vocabulary head, or the projection to token vectors).
        quantization: None, or "nf4": keep the frozen weights in 4 bits during training (QLoRA).
        dtype: of the loaded weights, "float32", "bfloat16" or "float16"; None takes bfloat16 for frozen weights under
            LoRA, float32 otherwise. LoRA's merged model has the dtype of the checkpoint that `model` names.
        learning_rate: highest value; a linear warm-up, then `scheduler`.
        scheduler: name of a transformers scheduler.
        warmup_ratio: part of the steps in which the learning rate grows.
        weight_decay, adam_epsilon, max_grad_norm: as in `TrainingArguments`.
        batch_size: rows per step and process; every other row's documents are negatives.
        mini_batch_size: texts encoded at a time, see `encode_in_chunks`; None keeps the whole batch's activations.
        max_steps: optimiser steps; None runs `epochs`.
        epochs: passes over the rows.
        bf16: compute in bfloat16 autocast.
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
        logging_steps, save_steps: steps between log entries and between checkpoints (0: no checkpoints).
        seed: of initialisation, order of rows and dropout.
    """

    representation: ClassVar[str]
    objective_class: ClassVar[type]

    training_data: str | None = None
    queries: str | None = None
    corpus: str | None = None
    evaluation_data: str | None = None
    model: str | None = None
    preset: str | None = None
    family: str = ""
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
    objective: Any = None
    learning_rate: float = 1e-4
    scheduler: str = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    batch_size: int = 128
    mini_batch_size: int | None = None
    max_steps: int | None = None
    epochs: float = 1.0
    bf16: bool = False
    activation_checkpointing: bool = False
    logging_steps: int = 10
    save_steps: int = 500
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.family, str):
            self.family = _family_name(self.family)
        if isinstance(self.objective, Mapping):
            self.objective = self.objective_class(**_known_fields(self.objective_class, self.objective))
        check_common_fields(self)
        if self.initialization not in ("random", "lexical"):
            raise ValueError(f"initialization must be 'random' or 'lexical', found {self.initialization!r}")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be null, 'float32', 'bfloat16' or 'float16', found {self.dtype!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, found {self.lora_dropout}")
        if self.quantization not in (None, "nf4"):
            raise ValueError(f"quantization must be null or 'nf4', found {self.quantization!r}")
        if self.model is None and (self.lora or self.quantization):
            raise ValueError("LoRA and quantization keep pretrained weights frozen; a preset has none: set a model")
        if self.quantization and self.lora is False:
            raise ValueError("quantized weights cannot be trained themselves; set lora to true or null")


@dataclass
class SparseTrainingRecipe(TrainingRecipe):
    """Everything that a training run of a sparse retriever depends on: the fields of `TrainingRecipe`, and

    Args:
        objective: losses, regularisers and their schedule.
        stop_on_collapse: end the run when the representations become empty.

    The defaults of LoRA are those reported for Echo-Mistral-SPLADE; `initialization: lexical` is
    `initialize_as_lexical_matcher`.
    """

    representation: ClassVar[str] = "sparse"
    objective_class: ClassVar[type] = SparseObjective

    family: str = "mistral_splade"
    objective: SparseObjective = field(default_factory=SparseObjective)
    scheduler: str = "cosine"
    warmup_ratio: float = 0.05
    stop_on_collapse: bool = False

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


@dataclass
class LateInteractionRecipe(TrainingRecipe):
    """Everything that a training run of a multi-vector retriever depends on: the fields of `TrainingRecipe`, and

    Args:
        objective: the losses and their weights.
        nway: passages of a row that are used: the positive and the first `nway - 1` negatives; None takes all.
        language: of rows without a column `language`: X-MOD code, ISO code or BCP-47 tag; None takes the model's
            default language.
        freeze: train neither embeddings nor language adapters, so that the other languages profit; False trains all.
            With LoRA they are frozen in any case.
        accumulation_steps: batches whose gradients are averaged before a step; each has its own in-batch negatives.

    The defaults are those of the published weights (arXiv 2402.15059 and colbert-ai): AdamW with peak learning rate
    3e-6 after 10 % warm-up, linear decay, epsilon 1e-6, weight decay 0.01 of all trained weights, gradients clipped at
    norm 2, batches of 128, one pass over the data (there 50,000 steps with one hard negative each), seed 42. Lengths
    are the processor's. `initialization: lexical` is `initialize_as_lexical_late_interaction`.
    """

    representation: ClassVar[str] = "multi-vector"
    objective_class: ClassVar[type] = LateInteractionObjective

    family: str = "colbert_xm"
    objective: LateInteractionObjective = field(default_factory=LateInteractionObjective)
    lora: bool | None = False
    learning_rate: float = 3e-6
    weight_decay: float = 0.01
    adam_epsilon: float = 1e-6
    max_grad_norm: float = 2.0
    seed: int = 42
    nway: int | None = None
    language: str | None = None
    freeze: bool = True
    accumulation_steps: int = 1

    @classmethod
    def small_from_scratch(cls, **overrides: Any) -> LateInteractionRecipe:
        """A two-layer model from nothing but a few thousand short texts, on two CPU cores in about two minutes."""
        settings: dict[str, Any] = {
            "preset": "tiny",
            "initialization": "lexical",
            # The more directions, the less do different words resemble each other; dropout would blur them.
            "config": {"dim": 120, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            "processor": {"max_query_length": 32, "max_document_length": 96},
            "vocabulary_size": 4096,
            "freeze": False,  # nothing here is pretrained
            # Scores of the lexical start differ by less than the scores of long training do.
            "objective": LateInteractionObjective(score_scale=5.0),
            "learning_rate": 1e-3,
            "batch_size": 96,
            "max_steps": 80,
            "save_steps": 0,
        }
        return cls(**{**settings, **overrides})


@dataclass
class LanguageModelRecipe(StoredRecipe):
    """Everything that a training run of a language model depends on.

    Args:
        training_data: file of text, or several. Of `.jsonl`, `.tsv` (also `.gz`), `.parquet` and folders written by
            `Dataset.save_to_disk`, each row is a text in the column `text`, or ids in the column `input_ids`, which are
            taken as they are; every other file is one text in UTF-8.
        evaluation_data: the same; its loss is logged ten times.
        task: "text", or "lookup": prompts `k v / k v / … k` of random ids, of which only the last value is learned;
            they need no data. Every prompt has a key-value list and a separator of its own.
        pairs: of "lookup": fewest and most pairs.
        sequence_length: tokens in a row; texts are joined, with the tokenizer's end of text behind each if it has one,
            and cut.
        model: checkpoint folder or Hub name of a model to go on with; or None, and
        preset: architecture preset to start from, of `family`.
        family: `model_type` of the model or preset.
        tokenizer: folder or Hub name; None takes the model's, or for a preset the 128 characters of ASCII.
        table: None takes the configuration's. `"learned"` trains the standard language model that is otherwise the
            same; the other kinds are those of `LexinvariantConfig`.
        config: fields of the model's configuration to override, for example `{"randomize_prob": 0.5}`.
        optimizer: "adamw", or "adafactor" with its updates relative to the size of the weights.
        learning_rate: highest value: a linear warm-up, then a cosine down to `final_learning_rate_ratio` of it.
        final_learning_rate_ratio: see `learning_rate`.
        warmup_steps: steps in which the learning rate grows.
        scale_learning_rate_factor: of the attention scales and the final norm, few numbers that have far to go.
        beta1, beta2: decay of the averages of gradients and, with AdamW, of their squares; Adafactor calls the first
            one momentum.
        weight_decay, max_grad_norm: as in `TrainingArguments`; a norm of 0 does not clip.
        batch_size: rows per step and process.
        accumulation_steps: batches whose gradients are added up before a step, as one large batch.
        max_steps: optimiser steps.
        bf16, activation_checkpointing, logging_steps, save_steps, seed: as in `TrainingRecipe`; the seed also
            chooses the tables of the sequences, new ones at every visit.
    """

    training_data: str | list[str] | None = None
    evaluation_data: str | list[str] | None = None
    task: str = "text"
    pairs: list[int] = field(default_factory=lambda: [3, 10])
    sequence_length: int = 512
    model: str | None = None
    preset: str | None = None
    family: str = "lexinvariant"
    tokenizer: str | None = None
    table: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    final_learning_rate_ratio: float = 0.1
    warmup_steps: int = 1000
    scale_learning_rate_factor: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 64
    accumulation_steps: int = 1
    max_steps: int = 10_000
    bf16: bool = False
    activation_checkpointing: bool = False
    logging_steps: int = 10
    save_steps: int = 500
    seed: int = 0

    def __post_init__(self):
        check_common_fields(self)
        self.pairs = list(self.pairs)
        if self.task not in _LANGUAGE_MODEL_TASKS:
            raise ValueError(f"task must be one of {', '.join(_LANGUAGE_MODEL_TASKS)}, found {self.task!r}")
        if self.optimizer not in ("adamw", "adafactor"):
            raise ValueError(f"optimizer must be 'adamw' or 'adafactor', found {self.optimizer!r}")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, found {self.sequence_length}")
        if len(self.pairs) != 2 or not 1 <= self.pairs[0] <= self.pairs[1]:
            raise ValueError(f"pairs must be the fewest and the most pairs of a prompt, found {self.pairs}")
        if self.task == "lookup" and self.training_data is not None:
            raise ValueError(f"task 'lookup' makes its own data, found training_data={self.training_data!r}")

    @classmethod
    def as_published(cls, **overrides: Any) -> LanguageModelRecipe:
        """The recipe of arXiv 2305.16349: Adafactor, cosine from 0.01 to 0.001, 250,000 steps of 64 x 512 tokens.

        What the paper leaves open is google-research/meliad's: warm-up, momentum, updates relative to the size of the
        weights, bfloat16.
        """
        settings: dict[str, Any] = {
            "preset": "150m-character",
            "optimizer": "adafactor",
            "learning_rate": 0.01,
            "max_grad_norm": 0.0,  # Adafactor clips its updates itself
            "max_steps": 250_000,
            "bf16": True,
            "logging_steps": 100,
            "save_steps": 5000,
        }
        return cls(**{**settings, **overrides})

    @classmethod
    def small_from_scratch(cls, **overrides: Any) -> LanguageModelRecipe:
        """A two-layer model that learns from text of few different characters on one CPU core in about two minutes.

        Ours, as is its start (see `LexinvariantConfig`): the usual one learns nothing in that time.
        """
        settings: dict[str, Any] = {
            "preset": "tiny",
            "sequence_length": 128,
            "learning_rate": 3e-3,
            "final_learning_rate_ratio": 0.05,
            "warmup_steps": 50,
            "scale_learning_rate_factor": 10.0,
            "batch_size": 32,
            "max_steps": 1000,
            "save_steps": 0,
        }
        return cls(**{**settings, **overrides})


_LANGUAGE_MODEL_TASKS = ("text", "lookup")


@dataclass
class TransplantTrainingRecipe(StoredRecipe):
    """After-care of a language model with a transplanted tokenizer: its embeddings and head learn, the rest is frozen.

    Args:
        model: checkpoint folder or Hub name of the model with its new tokenizer, plain or of the family
            `tokenizer_transplant`; the result is plain.
        training_data: file of text, or several, as of `LanguageModelRecipe`.
        evaluation_data: the same; its loss is logged ten times.
        objective: "language_modeling", or "alm": the text's probabilities under `teacher`, chunk by chunk, as in
            `alm_loss`.
        teacher: of "alm": folder or Hub name of the model before its transplantation, with its own tokenizer.
        trained_rows: which rows of the tables learn: "all"; "new", those that the transplantation did not copy, as the
            report or the transplant matrix beside the model tells; or a list of ids. The others stay bit-identical.
            Rows that input table and head share are trained once.
        lora: adapt the layers between the tables by LoRA, merged into the result.
        lora_rank, lora_alpha, lora_dropout: of LoRA.
        lora_target_modules: names of the adapted layers; None takes all linear layers but the head.
        temperature: of "alm": chunks' log-probabilities are divided by it.
        tokenizer: folder or Hub name; None takes the model's.
        dtype: of the frozen weights, "float32", "bfloat16" or "float16"; what learns is float32. The result has it.
        sequence_length: tokens in a row, of model and teacher alike.
        learning_rate: highest value: a linear warm-up over `warmup_steps`, then linear decay.
        beta1, beta2: decay of AdamW's averages of gradients and of their squares.
        weight_decay, max_grad_norm: as in `TrainingArguments`.
        batch_size: rows per step and process.
        accumulation_steps: batches whose gradients are averaged before a step.
        max_steps: optimiser steps.
        bf16, activation_checkpointing, logging_steps, save_steps, seed: as in `TrainingRecipe`.
        family: names the kind of recipe.
    """

    model: str | None = None
    training_data: str | list[str] | None = None
    evaluation_data: str | list[str] | None = None
    objective: str = "language_modeling"
    teacher: str | None = None
    trained_rows: str | list[int] = "all"
    lora: bool = False
    lora_rank: int = 64
    lora_alpha: float = 64
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None
    temperature: float = 100.0
    tokenizer: str | None = None
    dtype: str = "float32"
    sequence_length: int = 512
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    batch_size: int = 16
    accumulation_steps: int = 1
    max_steps: int = 1000
    bf16: bool = False
    activation_checkpointing: bool = False
    logging_steps: int = 10
    save_steps: int = 500
    seed: int = 0
    family: str = "tokenizer_transplant"

    def __post_init__(self):
        check_types_and_signs(self)
        if self.model is None:
            raise ValueError("a recipe of after-care needs the model that got the new tokenizer: set model")
        if self.objective not in ("language_modeling", "alm"):
            raise ValueError(f"objective must be 'language_modeling' or 'alm', found {self.objective!r}")
        if (self.objective == "alm") != (self.teacher is not None):
            raise ValueError(
                f"objective 'alm' and only it needs a teacher, found {self.objective!r} and {self.teacher!r}"
            )
        if self.trained_rows not in ("all", "new") and not _are_ids(self.trained_rows):
            raise ValueError(f"trained_rows must be 'all', 'new' or a list of ids, found {self.trained_rows!r}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be 'float32', 'bfloat16' or 'float16', found {self.dtype!r}")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, found {self.sequence_length}")

    @classmethod
    def as_published(cls, **overrides: Any) -> TransplantTrainingRecipe:
        """tokenkit's approximate likelihood matching: 5,000 steps of AdamW at 1e-5 after 2,000 of warm-up, LoRA of rank
        and alpha 64 on all projections, all rows of the tables."""
        settings: dict[str, Any] = {
            "objective": "alm",
            "lora": True,
            "learning_rate": 1e-5,
            "warmup_steps": 2000,
            "max_steps": 5000,
            "batch_size": 64,
        }
        return cls(**{**settings, **overrides})


def load_recipe(path: str | Path) -> StoredRecipe:
    """Read a recipe file, or the one stored in a checkpoint folder, of whichever kind (see `recipe_class`)."""
    file = _recipe_file(path)
    try:
        kind = recipe_class(_read_settings(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return kind.load(path)


def recipe_class(settings: Mapping[str, Any]) -> type[StoredRecipe]:
    """The kind of recipe, by the family that it names or else by its model's; a preset without a family is sparse.

    Raises `ValueError` for a family that there is not.
    """
    named, family = settings.get("family"), None
    if isinstance(named, str):
        known = named.replace("-", "_")
        family = known if known in _RECIPES_OF_FAMILIES else _family_name(named)
    elif isinstance(settings.get("model"), str):
        family = family_of(settings["model"])
    if family in _RECIPES_OF_FAMILIES:
        return _RECIPES_OF_FAMILIES[family]
    representation = FAMILIES[family].representation if family in FAMILIES else "sparse"
    return _RECIPES[representation]


# By what the models of a family produce.
_RECIPES: dict[str, type[StoredRecipe]] = {
    "sparse": SparseTrainingRecipe,
    "multi-vector": LateInteractionRecipe,
    "text": LanguageModelRecipe,
}
# Before that: families whose training is of a kind of its own. This one's results are plain models of any type.
_RECIPES_OF_FAMILIES: dict[str | None, type[StoredRecipe]] = {"tokenizer_transplant": TransplantTrainingRecipe}


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(entry) is int and entry >= 0 for entry in value)


def _listed(value: Any) -> list[Any]:
    """The paths of a field that holds one, several or none."""
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def _last_names(value: Any) -> str | list[str]:
    return [Path(path).name for path in value] if isinstance(value, (list, tuple)) else Path(value).name


def _family_name(name: str) -> str:
    """The table's name of a family; hyphens do for underscores."""
    known = name.replace("-", "_")
    if known not in FAMILIES:
        near = difflib.get_close_matches(known, list(FAMILIES), 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown family {name!r}{hint}; known families: {', '.join(FAMILIES)}")
    return known


def _recipe_file(path: str | Path) -> Path:
    path = Path(path)
    path = path / RECIPE_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no training recipe at {path}")
    return path


def _read_settings(path: Path) -> dict[str, Any]:
    settings = _read_object(path)
    paths = path.with_name(PATHS_FILE)
    if path.name == RECIPE_FILE and paths.is_file():
        known = _read_object(paths).items()
        settings |= {name: value for name, value in known if _last_names(value) == settings.get(name)}
    return settings


def _read_object(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    import yaml

    try:
        settings = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not valid: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold the fields of a recipe, found {type(settings).__name__}")
    return settings


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
