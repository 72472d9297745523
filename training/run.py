"""Carrying out a recipe: build, train, export."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from rarezoo.auto import FAMILIES, Family, family_of
from rarezoo.configs import load_preset, read_preset
from rarezoo.training.collator import LateInteractionCollator, RetrievalCollator, parse_row
from rarezoo.training.data import read_text_table, read_training_rows
from rarezoo.training.from_scratch import initialize_as_lexical_matcher, train_tokenizer
from rarezoo.training.language_model import train_language_model
from rarezoo.training.late_interaction_from_scratch import (
    initialize_as_lexical_late_interaction,
    train_xlm_r_tokenizer,
)
from rarezoo.training.recipe import (
    LanguageModelRecipe,
    LateInteractionRecipe,
    SparseTrainingRecipe,
    StoredRecipe,
    TrainingRecipe,
    TransplantTrainingRecipe,
)
from rarezoo.training.run_folder import (
    CHECKPOINT_FOLDER,
    check_folder,
    cleared_after_a_mistake,
    common_arguments,
    export_run,
    last_whole_checkpoint,
)
from rarezoo.training.tokenizer_transplant import train_transplanted
from rarezoo.training.trainer import (
    LateInteractionTrainer,
    RetrievalTrainer,
    SparseRetrievalTrainer,
    show_progress_bar_alone,
)

ADAPTER_FOLDER = "adapter"
# Full fine-tuning needs 16 bytes per parameter: above this many it is too much for most machines.
LARGE_BACKBONE = 500_000_000

Rows = Sequence[Mapping[str, Any]]


def train(
    recipe: StoredRecipe,
    output_dir: str | Path,
    *,
    rows: Sequence[Any] | None = None,
    evaluation_rows: Sequence[Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """Train a model and save it: a retriever, or, by a `LanguageModelRecipe`, a language model, or, by a
    `TransplantTrainingRecipe`, one with a transplanted tokenizer.

    `output_dir` becomes a checkpoint for AutoModel and AutoProcessor, with `training_recipe.json`,
    `training_paths.json` (the absolute paths of the recipe, if any: the one file that tells of this machine) and
    `training_log.json` (all log entries). After LoRA training it holds the merged model, and `adapter/` the adapter
    alone. Intermediate checkpoints, if any, stand in `checkpoints/`.

    Args:
        recipe: what to do; its class tells the kind of retriever.
        output_dir: a new or empty folder; with `resume`, that of the interrupted run.
        rows: training rows, instead of `recipe.training_data`; of a language model, texts or rows of ids (see
            `LanguageModelRecipe`).
        evaluation_rows: rows whose losses are logged ten times, instead of `recipe.evaluation_data`.
        callbacks: further Trainer callbacks; they get `model` and `processing_class` (the processor).
        resume: go on from the last checkpoint in `output_dir`, with the same recipe and rows.

    Returns:
        The last logged training metrics, `steps`, `train_runtime` in seconds, and `output_dir`.

    Raises:
        FileExistsError: the folder is not empty and `resume` is False.
        FileNotFoundError, ValueError: data or model are missing, or the recipe cannot be carried out. Before the first
            checkpoint, nothing is left in the folder.
    """
    if isinstance(recipe, LanguageModelRecipe):
        return train_language_model(recipe, output_dir, rows, evaluation_rows, callbacks, resume)
    if isinstance(recipe, TransplantTrainingRecipe):
        return train_transplanted(recipe, output_dir, rows, evaluation_rows, callbacks, resume)
    output_dir = Path(output_dir)
    processes = PartialState()
    check_folder(recipe, output_dir, resume)
    assert isinstance(recipe, TrainingRecipe)
    processes.wait_for_everyone()
    checkpoints = output_dir / CHECKPOINT_FOLDER
    rows = _rows(rows, recipe.training_data, "training_data")
    if evaluation_rows is None and recipe.evaluation_data is not None:
        evaluation_rows = read_training_rows(recipe.evaluation_data)
    queries = read_text_table(recipe.queries) if recipe.queries else None
    corpus = read_text_table(recipe.corpus) if recipe.corpus else None
    set_seed(recipe.seed)
    model: Any
    if recipe.model is None:
        model, processor = build_from_preset(recipe, rows, queries, corpus)
    else:
        model, processor = load_for_training(recipe)
    args = _training_arguments(recipe, checkpoints, len(rows), evaluation_rows is not None)
    with cleared_after_a_mistake(output_dir, resume):
        trainer = _KINDS[type(recipe)].make_trainer(
            recipe,
            processor,
            queries,
            corpus,
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=evaluation_rows,
            processing_class=processor,
            callbacks=callbacks,
        )
        show_progress_bar_alone(trainer)
        if processes.is_main_process:
            recipe = dataclasses.replace(recipe, lora=hasattr(model, "merge_and_unload"))
            recipe.save_into(output_dir)
        result = trainer.train(resume_from_checkpoint=last_whole_checkpoint(checkpoints))
    if processes.is_main_process:
        trained = trainer.accelerator.unwrap_model(model)
        export_run(output_dir, lambda scratch: _export(recipe, trained, processor, scratch), trainer.state.log_history)
    processes.wait_for_everyone()
    logged = [entry for entry in trainer.state.log_history if "ranking_loss" in entry]
    return {
        **(logged[-1] if logged else {}),
        "steps": trainer.state.global_step,
        "train_runtime": result.metrics["train_runtime"],
        "output_dir": str(output_dir),
    }


class _SparseRun:
    """What training a sparse retriever is made of."""

    train_tokenizer = staticmethod(train_tokenizer)
    initialize = staticmethod(initialize_as_lexical_matcher)
    language_models: Mapping[str, str] = {}

    @staticmethod
    def check_pair(model: Any, processor: Any) -> None:
        if processor.attention_mode != model.config.attention_mode:
            raise ValueError(
                f"the model reads attention_mode={model.config.attention_mode!r}, the processor writes "
                f"{processor.attention_mode!r}; set the same in the recipe's config and processor"
            )

    @staticmethod
    def prepare(recipe: Any, model: Any) -> None:
        """Nothing is frozen."""

    @staticmethod
    def make_trainer(recipe: Any, processor: Any, queries: Any, corpus: Any, **arguments: Any) -> RetrievalTrainer:
        return SparseRetrievalTrainer(
            objective=recipe.objective,
            mini_batch_size=recipe.mini_batch_size,
            stop_on_collapse=recipe.stop_on_collapse,
            data_collator=RetrievalCollator(processor, queries=queries, corpus=corpus),
            **arguments,
        )


class _LateInteractionRun:
    """What training a multi-vector retriever is made of."""

    train_tokenizer = staticmethod(train_xlm_r_tokenizer)
    initialize = staticmethod(initialize_as_lexical_late_interaction)
    # Training of a family may begin with a bare language model of this type: only the projection is new.
    language_models: Mapping[str, str] = {"xmod": "colbert_xm"}

    @staticmethod
    def check_pair(model: Any, processor: Any) -> None:
        model.check_processor(processor)
        longest = model.config.max_position_embeddings - model.config.pad_token_id - 1
        for name in ("max_query_length", "max_document_length"):
            if getattr(processor, name) > longest:
                raise ValueError(f"{name} is {getattr(processor, name)}, but the model takes {longest} tokens")

    @staticmethod
    def prepare(recipe: Any, model: Any) -> None:
        model.config.language_id(recipe.language)  # an unknown one is an error before anything is written
        if recipe.freeze:
            model.freeze_embeddings_and_language_adapters()

    @staticmethod
    def make_trainer(recipe: Any, processor: Any, queries: Any, corpus: Any, **arguments: Any) -> RetrievalTrainer:
        config = arguments["model"].config
        return LateInteractionTrainer(
            objective=recipe.objective,
            mini_batch_size=recipe.mini_batch_size,
            data_collator=LateInteractionCollator(
                processor, config, queries, corpus, nway=recipe.nway, language=recipe.language
            ),
            **arguments,
        )


_KINDS: dict[type[TrainingRecipe], Any] = {
    SparseTrainingRecipe: _SparseRun,
    LateInteractionRecipe: _LateInteractionRun,
}


def build_from_preset(
    recipe: TrainingRecipe,
    rows: Rows,
    queries: Mapping[str, str] | None = None,
    corpus: Mapping[str, str] | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A new model of the recipe's preset and its processor, in float32; the rows' texts train the tokenizer.

    Args:
        recipe: with a `preset`.
        rows: training rows.
        queries, corpus: tables of texts, where the rows hold ids.
    """
    kind, family = _KINDS[type(recipe)], _family(recipe.family, recipe.representation)
    preset = read_preset(recipe.family, str(recipe.preset))
    examples = [parse_row(row, queries, corpus) for row in rows]
    documents = list(dict.fromkeys(text for example in examples for text in (example.positive, *example.negatives)))
    vocabulary_size = recipe.vocabulary_size or recipe.config.get("vocab_size") or preset["config"]["vocab_size"]
    if recipe.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer)
    else:
        texts = [*documents, *(example.query for example in examples)]
        tokenizer = kind.train_tokenizer(texts, vocabulary_size)
    settings = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings["vocab_size"] = len(tokenizer)
    config = load_preset(recipe.family, str(recipe.preset), **{**settings, **recipe.config})
    model = family.model_class()(config).float()
    processor = _processor_class(family)(tokenizer, **{**preset["processor"], **recipe.processor})
    kind.check_pair(model, processor)
    if recipe.initialization == "lexical":
        kind.initialize(model, processor, documents)
    kind.prepare(recipe, model)
    return model, processor


def load_for_training(recipe: TrainingRecipe) -> tuple[Any, Any]:
    """The recipe's model, with LoRA adapters and 4-bit weights where the recipe says so, and its processor."""
    kind, family = _KINDS[type(recipe)], _stored_family(recipe)
    config = family.config_class().from_pretrained(recipe.model, **recipe.config)
    processor = _processor_for(recipe, family)
    lora = _uses_lora(recipe, config)
    dtype = recipe.dtype or ("bfloat16" if lora else "float32")
    model, _ = _load_weights(recipe, family, dtype, recipe.quantization)
    kind.check_pair(model, processor)
    kind.prepare(recipe, model)
    if not lora:
        return model, processor
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("LoRA needs the peft library: pip install 'rarezoo[train]'") from None

    targets = list(recipe.lora_target_modules or family.lora_target_modules)
    targets += family.full_precision_modules if recipe.lora_on_head else ()
    layers = [name for name, _ in model.named_modules()]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)]
    if unknown:
        raise ValueError(
            f"lora_target_modules: {recipe.model} has no layer {', '.join(unknown)}; the family's are "
            f"{', '.join(family.lora_target_modules)}"
        )
    # PEFT annotates lora_alpha as int and takes any number.
    alpha: Any = recipe.lora_alpha
    settings = LoraConfig(
        r=recipe.lora_rank, lora_alpha=alpha, lora_dropout=recipe.lora_dropout, target_modules=targets
    )
    try:
        return get_peft_model(model, settings), processor
    except ValueError as error:
        raise ValueError(f"lora_target_modules: {' '.join(str(error).split())}") from None


def _load_weights(
    recipe: TrainingRecipe, family: Family, dtype: str, quantization: str | None = None
) -> tuple[Any, set[str]]:
    """The recipe's model, and the names of the weights that its checkpoint lacks, which are random."""
    options: dict[str, Any] = {"dtype": dtype, **recipe.config}
    if quantization is not None:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(family.full_precision_modules),
        )
    try:
        loaded: Any = family.model_class().from_pretrained(str(recipe.model), output_loading_info=True, **options)
    except RuntimeError as error:
        if not recipe.config or "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"config: with {recipe.config}, weights would have other shapes than those of {recipe.model}; sizes can be "
            "chosen for a preset only"
        ) from None
    model, report = loaded
    if recipe.lora_on_head and model.config.tie_word_embeddings:
        # Merged into a shared matrix, the head's update would change the embeddings too.
        model.config.tie_word_embeddings = False
        model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.detach().clone())
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would pack the weights at the first evaluation, and later steps would silently give no
            # gradient to the layers below; see rarezoo.quantization.four_bit_guard.
            module.support_avx512bf16_for_cpu = False
    return model, set(report["missing_keys"])


def _uses_lora(recipe: TrainingRecipe, config: Any) -> bool:
    if recipe.lora is not None:
        return recipe.lora
    if recipe.quantization is not None:
        return True
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return getattr(model, model.base_model_prefix).num_parameters() > LARGE_BACKBONE


def _family(name: str, representation: str) -> Family:
    if name not in FAMILIES or FAMILIES[name].representation != representation:
        known = ", ".join(family.name for family in FAMILIES.values() if family.representation == representation)
        hint = "; turn a language model into one with `rarezoo convert` first" if representation == "sparse" else ""
        raise ValueError(f"{name!r} is no {representation} retriever of rarezoo (known: {known}){hint}")
    return FAMILIES[name]


def _stored_family(recipe: TrainingRecipe) -> Family:
    """The family of the recipe's model; a checkpoint that none of them reads has its own name in the message."""
    name = family_of(str(recipe.model)) or AutoConfig.from_pretrained(str(recipe.model)).model_type
    return _family(_KINDS[type(recipe)].language_models.get(name, name), recipe.representation)


def _processor_for(recipe: TrainingRecipe, family: Family) -> Any:
    """The model's processor; of a bare language model, a new one around the recipe's tokenizer or its own."""
    if family_of(str(recipe.model)) is not None:
        return _processor_class(family).from_pretrained(recipe.model, **recipe.processor)
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.model)
    return _processor_class(family)(tokenizer, **recipe.processor)


def _processor_class(family: Family) -> Any:
    return family.processor_class()


def _rows(rows: Rows | None, path: str | None, name: str) -> Rows:
    if rows is None:
        if path is None:
            raise ValueError(f"no training rows: set {name} in the recipe, or pass rows")
        rows = read_training_rows(path)
    if len(rows) == 0:
        raise ValueError("there are no training rows")
    return rows


def _training_arguments(recipe: TrainingRecipe, folder: Path, rows: int, evaluates: bool) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rows_per_step = recipe.batch_size * getattr(recipe, "accumulation_steps", 1) * processes
    per_epoch = max(rows // rows_per_step, 1)
    max_steps = recipe.max_steps or math.ceil(recipe.epochs * per_epoch)
    return TrainingArguments(
        **common_arguments(recipe, folder, max_steps, evaluates),
        lr_scheduler_type=recipe.scheduler,
        warmup_steps=round(recipe.warmup_ratio * max_steps),
        adam_epsilon=recipe.adam_epsilon,
        # A smaller last batch would have easier negatives and another FLOPS.
        dataloader_drop_last=rows >= recipe.batch_size * processes,
    )


def _export(recipe: TrainingRecipe, model: Any, processor: Any, scratch: Path) -> None:
    if hasattr(model, "merge_and_unload"):
        # The vocabulary head is not saved along with an adapter on it: it is the base model's.
        model.save_pretrained(scratch / ADAPTER_FOLDER, save_embedding_layers=False)
        model = _merge(recipe, model, scratch / ADAPTER_FOLDER)
    model.save_pretrained(scratch)
    processor.save_pretrained(scratch)


def _merge(recipe: TrainingRecipe, model: Any, adapter: Path) -> PreTrainedModel:
    """The adapter merged into the weights as they are stored, in their dtype: in those of the training, 4 bits would
    round the adapter away, and another dtype the frozen weights."""
    from peft import PeftModel

    trained = model.get_base_model()
    base, random = _load_weights(recipe, _stored_family(recipe), dtype="auto")
    for name in random:  # the projection of a bare language model: that of the training
        module, _, parameter = name.rpartition(".")
        adapted = trained.get_submodule(module)
        source = getattr(getattr(adapted, "base_layer", adapted), parameter)
        base.get_parameter(name).data.copy_(source.data)
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()
