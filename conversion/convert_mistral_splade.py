"""Mistral-SPLADE checkpoints: every published layout (`mistral_splade_layouts`) to rarezoo's, and back.

Backbone and head keep Mistral's tensor names in all layouts; the work is in the adapters, the tied heads and the files
around the weights.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoProcessor,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from rarezoo.conversion.checkpoint_files import (
    CheckpointReader,
    ConversionError,
    locate_checkpoint,
    read_json,
    write_json,
)
from rarezoo.conversion.engine import (
    ConversionReport,
    FolderReport,
    Rule,
    WrittenWeights,
    drop,
    expected_shapes,
    keep,
    parse_dtype,
    plan_conversion,
    reverse,
    staged_folder,
    verify_model,
    verify_weights,
    write_weights,
)
from rarezoo.conversion.lora_adapter import LoraAdapter
from rarezoo.conversion.mistral_splade_layouts import (
    ADAPTER_FOLDER,
    PAIR,
    RETRIEVAL_FIELDS,
    Encoder,
    detect_layout,
    find_encoders,
)
from rarezoo.conversion.sentence_transformers_files import (
    check_sparse_encoder,
    sparse_encoder_options,
    without_prompts,
    write_sparse_encoder_files,
)
from rarezoo.mistral_splade import (
    MistralSpladeConfig,
    MistralSpladeForMaskedLM,
    MistralSpladeForRetrieval,
    MistralSpladeProcessor,
)
from rarezoo.mistral_splade.sentence_transformers_mistral_splade import MODULES, SPARSE_ENCODER_CONFIG

logger = logging.get_logger(__name__)

FAMILY = MistralSpladeConfig.model_type
OFFICIAL_LAYOUTS = ("hf", "peft", "tevatron", "naver")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

BACKBONE_RULES = (
    *keep(
        "model.layers.{layer}.self_attn.q_proj.weight",
        "model.layers.{layer}.self_attn.k_proj.weight",
        "model.layers.{layer}.self_attn.v_proj.weight",
        "model.layers.{layer}.self_attn.o_proj.weight",
        "model.layers.{layer}.mlp.gate_proj.weight",
        "model.layers.{layer}.mlp.up_proj.weight",
        "model.layers.{layer}.mlp.down_proj.weight",
        "model.layers.{layer}.input_layernorm.weight",
        "model.layers.{layer}.post_attention_layernorm.weight",
        "model.norm.weight",
    ),
    drop("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "computed from the configuration"),
)
OWN_HEAD = keep(EMBEDDING, HEAD)
TIED_HEAD = keep(EMBEDDING)
STORED_TIED_HEAD = (*keep(EMBEDDING), drop(HEAD, "tied: equal to the embedding"))
REPLACED_HEAD = (*keep(EMBEDDING), drop(HEAD, "replaced by the embedding: tie_word_embeddings was asked for"))
UNTIED_HEAD = (Rule((EMBEDDING,), (EMBEDDING, HEAD), forward=lambda tensors: [tensors[0], tensors[0].clone()]),)

_PROCESSOR_OPTIONS = tuple(
    name for name in inspect.signature(MistralSpladeProcessor).parameters if name not in ("tokenizer", "chat_template")
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_SMALL_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*", "generation_config.json")


@dataclass(frozen=True)
class _Writing:
    """How weights are written: dtype (None keeps the source's), shard size, and whether an adapter is merged."""

    dtype: torch.dtype | None
    max_shard_size: int | str
    merge_adapter: bool


def to_rarezoo(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    base: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    merge_adapter: bool = True,
    role: str | None = None,
    config_options: Mapping[str, Any] | None = None,
    processor_options: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Any layout of the family to rarezoo's.

    A pair of encoders becomes two folders, `query/` and `document/`. A source that has rarezoo's layout already is
    written again: to merge its adapter, or to change dtype, shards or options.

    Args:
        source, destination, dtype, max_shard_size: as in `rarezoo.conversion.convert`.
        base: folder or Hub repository of the adapter's base; overrides the adapter's own `base_model_name_or_path`,
            which may be a path on another machine.
        tokenizer: folder or Hub repository of the tokenizer, where the source has none.
        merge_adapter: True merges a LoRA adapter: W + (alpha / r) B A in float32, rounded once. False keeps it in
            `lora/` beside the base, for `PeftModel.from_pretrained(model, destination, subfolder="lora")`.
        role: "query" or "document" writes only that encoder of a pair, directly into the destination.
        config_options: fields of `MistralSpladeConfig` that the source does not say or says wrongly.
        processor_options: options of `MistralSpladeProcessor`: templates, prompt, maximum lengths.
    """
    writing = _Writing(parse_dtype(dtype), max_shard_size, merge_adapter)
    folder = locate_checkpoint(source)
    layout = detect_layout(folder)
    encoders = find_encoders(folder, layout, base, role)
    reports = []
    with staged_folder(Path(destination)) as staging:
        for encoder in encoders:
            config = _build_config(encoder, config_options or {})
            processor = _build_processor(encoder, config, tokenizer, processor_options or {})
            name = encoder.role if role is None else ""
            target = _make_subfolder(staging, name)
            weights = _write_weights(encoder, config, MistralSpladeForRetrieval, BACKBONE_RULES, target, writing)
            _write_model_files(target, config, processor, MistralSpladeForRetrieval)
            _copy_small_files(encoder, target)
            _verify(target, AutoModel, weights)
            _check_processor(target, config)
            reports.append(_report(Path(destination) / name, "rarezoo", encoder, weights))
    return ConversionReport(FAMILY, str(source), layout, "rarezoo", tuple(reports))


def to_official(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    layout: str = "hf",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    base: str | os.PathLike | None = None,
    merge_adapter: bool = True,
) -> ConversionReport:
    """Rarezoo's layout to a published one.

    Args:
        source, destination, dtype, max_shard_size: as in `rarezoo.conversion.convert`.
        layout: "hf": a `MistralForCausalLM` folder for plain transformers, vLLM or llama.cpp; it says nothing about
            pooling and templates. "naver": our model with the files by which sentence-transformers' own modules run it
            (`SparseEncoder(folder, trust_remote_code=True)`); only for encoders that read the text once. "tevatron": a
            pair as `query_model/` and `passage_model/`. "peft": the adapter alone.
        base: for "peft": the `base_model_name_or_path` to write.
        merge_adapter: whether an adapter in `lora/` is merged, or kept in `lora/`.
    """
    if layout not in OFFICIAL_LAYOUTS:
        raise ConversionError(f"layout must be one of {', '.join(OFFICIAL_LAYOUTS)}; found {layout!r}")
    if (base is not None) != (layout == "peft"):
        raise ConversionError(
            "layout 'peft' needs base=, the name to write as the adapter's base; no other layout takes it"
        )
    writing = _Writing(parse_dtype(dtype), max_shard_size, merge_adapter)
    folder = locate_checkpoint(source)
    source_layout = detect_layout(folder)
    if source_layout != "rarezoo":
        raise ConversionError(f"{folder} has the layout {source_layout!r} already; expected a rarezoo folder")
    encoders = find_encoders(folder, source_layout)
    if (len(encoders) == 2) != (layout == "tevatron"):
        raise ConversionError(
            f"{folder} holds {len(encoders)} encoder(s); layout 'tevatron' takes a pair, the others one folder of it"
        )
    reports = []
    with staged_folder(Path(destination)) as staging:
        for encoder in encoders:
            name = PAIR[encoder.role] if encoder.role else ""
            target = _make_subfolder(staging, name)
            weights = _write_official(encoder, layout, target, writing, base)
            reports.append(_report(Path(destination) / name, layout, encoder, weights))
            if encoder.role:  # Tevatron loads one tokenizer, from the root
                for file in _tokenizer_files(target):
                    shutil.copyfile(file, staging / file.name)
    return ConversionReport(FAMILY, str(source), source_layout, "official", tuple(reports))


def _write_official(
    encoder: Encoder, layout: str, target: Path, writing: _Writing, base: str | os.PathLike | None
) -> _Weights:
    config = _build_config(encoder, {})
    processor = _build_processor(encoder, config, None, {})
    if base is not None:
        _write_plain_tokenizer(processor, target)
        return _write_adapter_alone(encoder, config, target, base)
    if layout == "naver":
        return _write_sparse_encoder(encoder, config, processor, target, writing)
    plain = _plain_config(config)
    weights = _write_weights(encoder, plain, MistralForCausalLM, reverse(BACKBONE_RULES), target, writing)
    plain.save_pretrained(target)
    _write_plain_tokenizer(processor, target)
    _copy_small_files(encoder, target)
    _verify(target, AutoModelForCausalLM, weights)
    settings = ", ".join(f"{name}={getattr(config, name)!r}" for name in RETRIEVAL_FIELDS)
    encoder.notes.append(f"A plain Mistral folder does not hold the templates and these settings: {settings}.")
    return weights


def _plain_config(config: MistralSpladeConfig) -> MistralConfig:
    fields = {name: getattr(config, name) for name in MistralConfig.__annotations__}
    if config.attention_mode == "bidirectional":
        fields["is_causal"] = False  # transformers 5 leaves the causal mask out
    return MistralConfig(**fields)


def _write_sparse_encoder(
    encoder: Encoder,
    config: MistralSpladeConfig,
    processor: MistralSpladeProcessor,
    target: Path,
    writing: _Writing,
) -> _Weights:
    check_sparse_encoder(config, processor)
    weights = _write_weights(encoder, config, MistralSpladeForMaskedLM, reverse(BACKBONE_RULES), target, writing)
    _write_model_files(target, config, without_prompts(processor), MistralSpladeForMaskedLM)
    encoder.notes += write_sparse_encoder_files(target, config, processor)
    _copy_small_files(encoder, target)
    _verify(target, AutoModelForMaskedLM, weights)
    return weights


def _write_plain_tokenizer(processor: MistralSpladeProcessor, target: Path) -> None:
    """The tokenizer without its entries about this family's processor."""
    processor.tokenizer.save_pretrained(target)
    path = target / "tokenizer_config.json"
    own = ("auto_map", "processor_class", "is_local", "local_files_only")
    write_json(path, {name: value for name, value in read_json(path).items() if name not in own})


@dataclass(frozen=True)
class _Weights:
    """Weights that were written, and what became of the others."""

    written: WrittenWeights
    merged: tuple[str, ...] = ()
    dropped: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _build_config(encoder: Encoder, options: Mapping[str, Any]) -> MistralSpladeConfig:
    known = (*MistralConfig.__annotations__, *RETRIEVAL_FIELDS)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConversionError(
            f"unknown config_options {', '.join(unknown)}; the retrieval fields are {', '.join(RETRIEVAL_FIELDS)}"
        )
    try:
        return MistralSpladeConfig(**{**encoder.backbone, **encoder.settings, **options})
    except (StrictDataclassError, ValueError) as error:
        raise ConversionError(f"the configuration of {encoder.weights} is not valid: {error}") from error


def _build_processor(
    encoder: Encoder,
    config: MistralSpladeConfig,
    tokenizer_source: str | os.PathLike | None,
    options: Mapping[str, Any],
) -> MistralSpladeProcessor:
    """The processor that belongs to the configuration: stored or stated by the source, overridden by `options`."""
    unknown = [name for name in options if name not in _PROCESSOR_OPTIONS]
    if unknown:
        raise ConversionError(
            f"unknown processor_options {', '.join(unknown)}; expected some of {', '.join(_PROCESSOR_OPTIONS)}"
        )
    mode = config.attention_mode
    if options.get("attention_mode", mode) != mode:
        raise ConversionError(
            f"processor_options say attention_mode {options['attention_mode']!r}, the configuration {mode!r}; "
            "set it in config_options alone"
        )
    tokenizer = _read_tokenizer(encoder, tokenizer_source)
    size = max(tokenizer.get_vocab().values()) + 1
    if size > config.vocab_size:
        raise ConversionError(
            f"the tokenizer has {size} tokens, but the weights have vocab_size {config.vocab_size}; they do not belong "
            "together: give the right tokenizer with tokenizer="
        )
    if tokenizer.pad_token is None and tokenizer.unk_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        encoder.notes.append(f"The tokenizer has no padding token; {tokenizer.eos_token!r} pads.")
    stored = _stored_processor_options(encoder, tokenizer, mode)
    foreign = [token for token in ("<s>", "</s>") if token not in tokenizer.get_vocab()]
    if foreign:
        encoder.notes.append(f"The tokenizer lacks {', '.join(foreign)}; the templates use its own special tokens.")
    return MistralSpladeProcessor(tokenizer, **{**stored, **options, "attention_mode": mode})


def _stored_processor_options(encoder: Encoder, tokenizer: PreTrainedTokenizerBase, mode: str) -> dict[str, Any]:
    if encoder.sparse_encoder is not None and mode in ("plain", "bidirectional"):
        return sparse_encoder_options(encoder.sparse_encoder, tokenizer)
    for folder in encoder.folders:
        path = folder / "processor_config.json"
        if path.exists() and read_json(path).get("processor_class") == MistralSpladeProcessor.__name__:
            stored = MistralSpladeProcessor.from_pretrained(folder, local_files_only=True)
            if stored.attention_mode == mode:
                return {name: getattr(stored, name) for name in _PROCESSOR_OPTIONS}
    return {}


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]


def _read_tokenizer(encoder: Encoder, source: str | os.PathLike | None) -> PreTrainedTokenizerBase:
    folders = [locate_checkpoint(source)] if source is not None else encoder.folders
    for folder in folders:
        if _tokenizer_files(folder):
            try:
                return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except (ValueError, OSError, KeyError) as error:
                raise ConversionError(f"the tokenizer in {folder} cannot be read: {error}") from error
    searched = ", ".join(str(folder) for folder in dict.fromkeys(folders))
    raise ConversionError(f"no tokenizer in {searched}; give its folder with tokenizer=")


def _write_weights(
    encoder: Encoder,
    config: MistralConfig,
    model_class: type,
    rules: tuple[Rule, ...],
    target: Path,
    writing: _Writing,
) -> _Weights:
    """Write the weights, merging or copying the adapter; unties the head in `config` where the adapter needs it."""
    reader = CheckpointReader(encoder.weights)
    shapes = _shapes(model_class, config)
    adapter = _open_adapter(encoder, shapes)
    merged = adapter.touched if adapter is not None and writing.merge_adapter else ()
    if config.tie_word_embeddings and {EMBEDDING, HEAD} & set(merged):
        config.tie_word_embeddings = False
        shapes = _shapes(model_class, config)
        note = "The adapter changes only one of the tied embedding and head: the head is untied and stored by itself."
        encoder.notes.append(note)
        logger.warning(note)
    plan = plan_conversion((*rules, *_head_rules(encoder, config, reader)), reader.entries, shapes, encoder.weights)
    written = write_weights(
        plan,
        reader,
        shapes,
        target,
        dtype=writing.dtype,
        max_shard_size=writing.max_shard_size,
        finish=adapter.merge if adapter is not None and writing.merge_adapter else None,
    )
    config.dtype = written.dtype
    config.architectures = [model_class.__name__]
    if adapter is not None and not writing.merge_adapter:
        _save_adapter(adapter, reader, _make_subfolder(target, ADAPTER_FOLDER), "..", model_class)
        encoder.notes.append(f"The adapter is not merged: load it from {ADAPTER_FOLDER}/ with PEFT.")
    return _Weights(written, merged, plan.dropped)


def _head_rules(encoder: Encoder, config: MistralConfig, reader: CheckpointReader) -> tuple[Rule, ...]:
    source_tied = encoder.backbone.get("tie_word_embeddings", False)
    if not config.tie_word_embeddings:
        return UNTIED_HEAD if source_tied and HEAD not in reader else OWN_HEAD
    if HEAD not in reader:
        return TIED_HEAD
    if not source_tied:
        return REPLACED_HEAD
    if not torch.equal(reader.read(HEAD), reader.read(EMBEDDING)):
        raise ConversionError(
            f"the configuration of {encoder.weights} ties head and embedding, but it stores a head that differs; "
            "give config_options tie_word_embeddings False to keep both"
        )
    return STORED_TIED_HEAD


def _shapes(model_class: type, config: MistralConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return expected_shapes(model_class(config))


def _open_adapter(encoder: Encoder, shapes: Mapping[str, tuple[int, ...]]) -> LoraAdapter | None:
    if encoder.adapter is None:
        return None
    return LoraAdapter(encoder.adapter, {**shapes, HEAD: shapes[EMBEDDING]})


def _save_adapter(
    adapter: LoraAdapter, reader: CheckpointReader, folder: Path, base: str, model_class: type
) -> WrittenWeights:
    copies = {name: reader.read(name if name in reader else EMBEDDING) for name in adapter.base_copies}
    adapter.save(folder, base, "CAUSAL_LM" if model_class is MistralForCausalLM else None, copies)
    saved = LoraAdapter(folder, adapter.weights)
    tensors = {name: (entry.shape, entry.dtype) for name, entry in saved.entries.items()}
    return WrittenWeights(tensors, tuple({entry.file.name for entry in saved.entries.values()}))


def _write_adapter_alone(encoder: Encoder, config: MistralConfig, target: Path, base: str | os.PathLike) -> _Weights:
    adapter = _open_adapter(encoder, _shapes(MistralSpladeForRetrieval, config))
    if adapter is None:
        raise ConversionError(f"{encoder.folder} has no adapter in {ADAPTER_FOLDER}/; layout 'peft' writes one")
    reader = CheckpointReader(encoder.weights)
    return _Weights(_save_adapter(adapter, reader, target, str(base), MistralForCausalLM))


def _write_model_files(
    target: Path, config: MistralSpladeConfig, processor: MistralSpladeProcessor, model_class: type
) -> None:
    """What the family's `save_pretrained` writes beside the weights, without a model: configuration, code for
    `trust_remote_code`, tokenizer and processor, the description for sentence-transformers."""
    config.save_pretrained(target)
    custom_object_save(model_class, target)
    processor.save_pretrained(target)
    write_json(target / "modules.json", MODULES)
    write_json(target / "config_sentence_transformers.json", SPARSE_ENCODER_CONFIG)


def _copy_small_files(encoder: Encoder, target: Path) -> None:
    """Licence texts and generation settings, which belong to the weights; the model card does not."""
    for folder in reversed(encoder.folders):
        for pattern in _SMALL_FILES:
            for file in folder.glob(pattern):
                shutil.copyfile(file, target / file.name)


def _verify(target: Path, auto_class: Any, weights: _Weights) -> None:
    verify_weights(target, weights.written)
    # A model of several shards may be larger than memory: its names and shapes are compared on the meta device.
    verify_model(target, auto_class, weights.written, load=len(weights.written.files) == 1)


def _check_processor(target: Path, config: MistralSpladeConfig) -> None:
    processor = AutoProcessor.from_pretrained(target, local_files_only=True)
    inputs = processor.process_documents(["a text"])
    if processor.attention_mode != config.attention_mode or int(inputs["input_ids"].max()) >= config.vocab_size:
        raise ConversionError(f"the processor written to {target} does not fit the configuration")


def _make_subfolder(folder: Path, name: str) -> Path:
    subfolder = folder / name
    subfolder.mkdir(exist_ok=True)
    return subfolder


def _report(path: Path, layout: str, encoder: Encoder, weights: _Weights) -> FolderReport:
    return FolderReport(
        str(path),
        layout,
        tensors=len(weights.written.tensors),
        parameters=weights.written.parameters,
        size_bytes=weights.written.size_bytes,
        files=len(weights.written.files),
        dtype=str(weights.written.dtype).removeprefix("torch."),
        merged=weights.merged,
        dropped={**encoder.dropped, **weights.dropped},
        notes=tuple(encoder.notes),
    )
