"""Training of language models whose symbols have no fixed meaning, and of their standard twins."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import Adafactor
from transformers.trainer_utils import set_seed

from rarezoo.auto import FAMILIES
from rarezoo.configs import load_preset
from rarezoo.lexinvariant.character_tokenizer import character_tokenizer
from rarezoo.training.data import read_training_rows
from rarezoo.training.recipe import LanguageModelRecipe
from rarezoo.training.run_folder import (
    CHECKPOINT_FOLDER,
    check_folder,
    cleared_after_a_mistake,
    common_arguments,
    export_run,
    last_whole_checkpoint,
)
from rarezoo.training.trainer import show_progress_bar_alone

NOT_PREDICTED = -100
_ROW_SUFFIXES = (".jsonl", ".tsv", ".gz", ".parquet")

Row = Mapping[str, Any]


def train_language_model(
    recipe: LanguageModelRecipe,
    output_dir: str | Path,
    rows: Sequence[str | Row] | None = None,
    evaluation_rows: Sequence[str | Row] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """Train a language model and save it with its tokenizer: what `rarezoo.training.train` does with such a recipe.

    Args:
        rows: texts, or rows with `text` or with `input_ids` (and, where not all are to be predicted, `labels`), instead
            of `recipe.training_data`.
        evaluation_rows: the same, instead of `recipe.evaluation_data`.
        recipe, output_dir, callbacks, resume, and errors: as for `train`.

    Returns:
        `loss` and `perplexity` at the last log entry, those of the evaluation if there is one, `steps`,
        `train_runtime` in seconds, and `output_dir`.
    """
    output_dir = Path(output_dir)
    processes = PartialState()
    check_folder(recipe, output_dir, resume)
    processes.wait_for_everyone()
    texts = text_rows(rows, recipe.training_data)
    if texts is None and recipe.task == "text":
        raise ValueError("no texts to train on: set training_data in the recipe, or pass rows")
    if texts is not None and recipe.task != "text":
        raise ValueError(f"task {recipe.task!r} makes its own data; found rows")
    if texts is not None and len(texts) == 0:
        raise ValueError("there are no texts")
    set_seed(recipe.seed)
    model, tokenizer = build_language_model(recipe, tokenize=texts is not None and not _are_ids(texts))
    train_dataset = _dataset(recipe, texts, tokenizer, model)
    evaluation_texts = text_rows(evaluation_rows, recipe.evaluation_data)
    eval_dataset = None if evaluation_texts is None else pack_texts(evaluation_texts, tokenizer, recipe.sequence_length)
    checkpoints = output_dir / CHECKPOINT_FOLDER
    with cleared_after_a_mistake(output_dir, resume):
        trainer = LanguageModelTrainer(
            recipe,
            model=model,
            args=language_model_arguments(recipe, checkpoints, eval_dataset is not None),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=_collator(recipe, model.config.vocab_size),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        show_progress_bar_alone(trainer)
        if processes.is_main_process:
            recipe.save_into(output_dir)
        result = trainer.train(resume_from_checkpoint=last_whole_checkpoint(checkpoints))
    if processes.is_main_process:
        trained = trainer.accelerator.unwrap_model(model)

        def write(scratch: Path) -> None:
            trained.save_pretrained(scratch)
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch)

        export_run(output_dir, write, trainer.state.log_history)
    processes.wait_for_everyone()
    metrics: dict[str, Any] = {}
    for name in ("loss", "eval_loss"):
        logged = [entry[name] for entry in trainer.state.log_history if name in entry]
        if logged:
            metrics[name] = logged[-1]
            metrics[name.replace("loss", "perplexity")] = math.exp(logged[-1])
    return {
        **metrics,
        "steps": trainer.state.global_step,
        "train_runtime": result.metrics["train_runtime"],
        "output_dir": str(output_dir),
    }


def build_language_model(recipe: LanguageModelRecipe, tokenize: bool = True) -> tuple[Any, Any]:
    """The recipe's model in float32, new or loaded, and its tokenizer, None where there is none.

    Args:
        tokenize: False where the rows are ids already: a preset then gets no tokenizer and no special tokens, unless
            the recipe names them.

    Raises:
        ValueError: the family has no language model, or the vocabulary is too small for the tokenizer.
    """
    family = FAMILIES.get(recipe.family)
    if family is None or "AutoModelForCausalLM" not in family.auto_classes:
        known = ", ".join(name for name, family in FAMILIES.items() if "AutoModelForCausalLM" in family.auto_classes)
        raise ValueError(f"{recipe.family!r} is no language model of rarezoo (known: {known})")
    model_class = family.model_class("AutoModelForCausalLM")
    tokenizer = _tokenizer(recipe, tokenize)
    if recipe.preset is None:
        config = AutoConfig.from_pretrained(str(recipe.model), **_overrides(recipe))
        model = model_class.from_pretrained(str(recipe.model), config=config, dtype=torch.float32)
    else:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings: dict[str, Any] = {name: getattr(tokenizer, name, None) for name in names}
        if tokenizer is not None:
            settings["vocab_size"] = len(tokenizer)
        config = load_preset(recipe.family, recipe.preset, **{**settings, **_overrides(recipe)})
        model = model_class(config).float()
    return model, tokenizer


def _tokenizer(recipe: LanguageModelRecipe, tokenize: bool) -> Any:
    if recipe.tokenizer is not None:
        return AutoTokenizer.from_pretrained(recipe.tokenizer)
    if recipe.preset is not None:
        return character_tokenizer() if tokenize else None
    files = ("tokenizer.json", "tokenizer_config.json")
    folder = Path(str(recipe.model))
    if folder.is_dir() and not any((folder / name).is_file() for name in files):
        return None
    return AutoTokenizer.from_pretrained(str(recipe.model))


def _overrides(recipe: LanguageModelRecipe) -> dict[str, Any]:
    """Fields of the configuration; with a table in which every symbol has a row, those that it has no use for."""
    if recipe.table is None:
        return recipe.config
    learned = {"unseen_logits": "sampled", "exempt_token_ids": []} if recipe.table in _STORED_TABLES else {}
    return {**recipe.config, **learned, "table": recipe.table}


_STORED_TABLES = ("learned", "mixed", "subset_permuted", "permuted")


def language_model_arguments(recipe: LanguageModelRecipe, folder: Path, evaluates: bool) -> TrainingArguments:
    """The arguments of transformers' `Trainer` for a recipe; `folder` is that of the checkpoints."""
    return TrainingArguments(
        **common_arguments(recipe, folder, recipe.max_steps, evaluates),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_learning_rate_ratio},
        warmup_steps=recipe.warmup_steps,
        prediction_loss_only=True,
        label_names=["labels"],
        # The collator makes labels.
        remove_unused_columns=False,
    )


class LanguageModelTrainer(Trainer):
    """transformers' `Trainer` with the recipe's optimiser.

    Args:
        recipe: its fields about the optimiser are read.
        arguments: as for `Trainer`.
    """

    def __init__(self, recipe: LanguageModelRecipe, **arguments: Any):
        self.recipe = recipe
        super().__init__(**arguments)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            self.optimizer = make_optimizer(self.recipe, trained)
        return self.optimizer


def make_optimizer(recipe: LanguageModelRecipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimiser, with a higher learning rate for the attention scales and the final norm.

    Weight decay spares what is not a matrix: norms, scales and biases.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_scale = name.endswith("attn_scale") or name.endswith("model.norm.weight") or name == "norm.weight"
            groups.setdefault((is_scale, parameter.dim() > 1), []).append(parameter)
    parameters = [
        {
            "params": members,
            "lr": recipe.learning_rate * (recipe.scale_learning_rate_factor if is_scale else 1.0),
            "weight_decay": recipe.weight_decay if is_matrix else 0.0,
        }
        for (is_scale, is_matrix), members in groups.items()
    ]
    if recipe.optimizer == "adafactor":
        return Adafactor(
            parameters,
            lr=recipe.learning_rate,
            beta1=recipe.beta1 or None,
            scale_parameter=True,
            relative_step=False,
            warmup_init=False,
        )
    return torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2))


# --- data -------------------------------------------------------------------------------------------------------------


def text_rows(rows: Sequence[str | Row] | None, paths: str | list[str] | None) -> Sequence[str | Row] | None:
    """The given rows, or those of the files; None where there are neither."""
    if rows is not None or paths is None:
        return rows
    found = [_read(Path(path)) for path in ([paths] if isinstance(paths, str) else paths)]
    return found[0] if len(found) == 1 else [row for rows in found for row in rows]


def _read(path: Path) -> Sequence[str | Row]:
    """The rows of a file of rows; any other file is one text."""
    if path.is_dir() or path.suffix in _ROW_SUFFIXES or not path.exists():
        return read_training_rows(path)
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read as text in UTF-8 ({error})") from None


def _dataset(recipe: LanguageModelRecipe, texts: Sequence[str | Row] | None, tokenizer: Any, model: Any) -> Any:
    if texts is None:
        needed, found = 2 * recipe.pairs[1] + 1, model.config.vocab_size
        if found < needed:
            raise ValueError(f"{recipe.pairs[1]} pairs need {needed} different symbols; vocab_size is {found}")
        return range(recipe.max_steps * recipe.batch_size * recipe.accumulation_steps * PartialState().num_processes)
    return pack_texts(texts, tokenizer, recipe.sequence_length)


def pack_texts(rows: Sequence[str | Row], tokenizer: Any, sequence_length: int) -> Sequence[Any]:
    """Rows of `sequence_length` tokens, whatever the length of the texts.

    Texts are joined, with the tokenizer's end of text behind each if it has one. What is left over at the end is
    dropped unless it is all there is. Rows that hold `input_ids` are rows already and returned as they are.

    Args:
        rows: texts, or rows with a column `text` or `input_ids`.
        tokenizer: any of transformers'.

    Raises:
        ValueError: there are no texts, fewer than two tokens, or no tokenizer for them.
    """
    if len(rows) == 0:
        raise ValueError("there are no texts")
    if _are_ids(rows):
        return rows
    texts = [row if isinstance(row, str) else row.get("text") for row in rows]
    if not all(isinstance(text, str) for text in texts):
        wrong = next(row for row, text in zip(rows, texts) if not isinstance(text, str))
        raise ValueError(f"expected texts, or rows with the column 'text' or 'input_ids'; found {wrong!r}")
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: name one in the recipe, or give rows of input_ids")
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = torch.cat([torch.tensor([*ids, *end], dtype=torch.long) for ids in encoded])
    if len(tokens) < 2:
        raise ValueError(f"the texts hold {len(tokens)} tokens; training needs two at least")
    length = min(sequence_length, len(tokens))
    return [{"input_ids": row} for row in tokens[: len(tokens) // length * length].view(-1, length)]


def _are_ids(rows: Sequence[str | Row]) -> bool:
    return len(rows) > 0 and isinstance(rows[0], Mapping) and "input_ids" in rows[0]


def _collator(recipe: LanguageModelRecipe, vocab_size: int) -> Any:
    return _LookUpCollator(recipe, vocab_size) if recipe.task == "lookup" else collate_tokens


def collate_tokens(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A batch of rows with `input_ids` and perhaps `labels`, padded on the right where their lengths differ; -100 in
    the labels is not predicted."""
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    labels = [torch.as_tensor(row.get("labels", row["input_ids"]), dtype=torch.long) for row in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=NOT_PREDICTED),
    }
    if len({len(row) for row in ids}) > 1:
        batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return batch


class _LookUpCollator:
    """Batches that depend on nothing but the seed and the numbers of their rows, so that a run that goes on draws those
    of an uninterrupted one."""

    def __init__(self, recipe: LanguageModelRecipe, vocab_size: int):
        self.recipe, self.vocab_size = recipe, vocab_size

    def __call__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(zlib.crc32(repr(list(numbers)).encode()) ^ self.recipe.seed)
        first, last = self.recipe.pairs
        pairs = int(torch.randint(first, last + 1, (), generator=generator))
        input_ids = lookup_ids(len(numbers), pairs, self.vocab_size, generator)
        labels = torch.full_like(input_ids, NOT_PREDICTED)
        labels[:, -1] = input_ids[:, -1]
        return {"input_ids": input_ids, "labels": labels}


def lookup_ids(count: int, pairs: int, vocab_size: int, generator: torch.Generator | None = None) -> Tensor:
    """LookUp prompts with their answers, `k1 v1 / k2 v2 / … k v`: int64 (count, 3 * pairs + 2).

    Keys, values and the separator of a prompt are different symbols, drawn anew for every prompt. (For prompts with
    an arrow between key and value, as in arXiv 2305.16349, see `rarezoo.lexinvariant.symbolic_tasks`.)
    """
    symbols = torch.rand(count, vocab_size, generator=generator).topk(2 * pairs + 1).indices
    keys, values, separator = symbols.split([pairs, pairs, 1], dim=1)
    asked = torch.randint(pairs, (count, 1), generator=generator)
    shown = torch.stack([keys, values, separator.expand(-1, pairs)], dim=2).flatten(1)
    return torch.cat([shown, keys.gather(1, asked), values.gather(1, asked)], dim=1)
