"""ColBERT-XM checkpoints: colbert-ai's ("Stanford") layout to rarezoo's, and back.

Both keep X-MOD's tensor names under `roberta.` and the projection as `linear.weight`; the work is in the settings,
which colbert-ai keeps in `artifact.metadata`, and in the pooler, which colbert-ai's class has and ColBERT never reads.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoProcessor, XmodConfig
from transformers.dynamic_module_utils import custom_object_save

from rarezoo.colbert_xm import ColBERTXMConfig, ColBERTXMForRetrieval, ColBERTXMProcessor
from rarezoo.colbert_xm.colbert_metadata import METADATA_NAME, is_stanford_layout
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
    rename,
    staged_folder,
    verify_model,
    verify_weights,
    write_weights,
)

FAMILY = ColBERTXMConfig.model_type
_LAYER = "roberta.encoder.layer.{layer}."
_NORM_PARTS = (("weight", "gamma"), ("bias", "beta"))
_POOLER = ("roberta.pooler.dense.weight", "roberta.pooler.dense.bias")

# The same names on both sides; the pooler stays in the file, so that the way back gives every tensor again.
RULES: tuple[Rule, ...] = (
    *keep(
        "roberta.embeddings.word_embeddings.weight",
        "roberta.embeddings.position_embeddings.weight",
        "roberta.embeddings.token_type_embeddings.weight",
        "linear.weight",
        *_POOLER,
        *(
            f"{_LAYER}{module}.{part}"
            for module in (
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
                "intermediate.dense",
                "output.dense",
            )
            for part in ("weight", "bias")
        ),
    ),
    *(
        rename(f"{norm}.{stored}", f"{norm}.{part}")
        for norm in (
            "roberta.embeddings.LayerNorm",
            f"{_LAYER}attention.output.LayerNorm",
            f"{_LAYER}output.LayerNorm",
            f"{_LAYER}output.adapter_layer_norm",
        )
        for part, old_name in _NORM_PARTS
        # Files of early libraries say gamma and beta; so do those that PyLate writes.
        for stored in (part, old_name)
    ),
    drop("roberta.embeddings.position_ids", "computed from the configuration"),
)
_ADAPTER_TENSORS = tuple(
    f"{_LAYER}output.adapter_modules.%s.{dense}.{part}" for dense in ("dense1", "dense2") for part in ("weight", "bias")
)

_PROCESSOR_OPTIONS = tuple(
    name for name in inspect.signature(ColBERTXMProcessor).parameters if name not in ("tokenizer", "chat_template")
)
_SMALL_FILES = ("LICENSE*", "NOTICE*")


def to_rarezoo(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    languages: list | str | None = None,
    marker_mode: str | None = None,
    processor_options: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """An official checkpoint to rarezoo's layout; one of rarezoo's is written again, to change dtype or languages.

    Args:
        source, destination, dtype, max_shard_size: as in `rarezoo.conversion.convert`.
        languages: adapters to keep, as X-MOD codes, ISO codes or BCP-47 tags; None keeps all.
        marker_mode: "insert" or "replace", see `ColBERTXMProcessor`. None: by the age of the checkpoint, "replace" when
            transformers before 4.44 wrote it, as for `antoinelouis/colbert-xm`.
        processor_options: other options of `ColBERTXMProcessor` that replace the source's.
    """
    options = dict(processor_options or {})
    if marker_mode is not None:
        options["marker_mode"] = marker_mode
    unknown = [name for name in options if name not in _PROCESSOR_OPTIONS]
    if unknown:
        raise ConversionError(
            f"unknown processor_options {', '.join(unknown)}; expected some of {', '.join(_PROCESSOR_OPTIONS)}"
        )
    folder = locate_checkpoint(source)
    layout = _detect_layout(folder)
    config = _read_config(folder, languages)
    processor = _read_processor(folder, config, options)
    with staged_folder(Path(destination)) as staging:
        written, dropped = _write_weights(folder, config, staging, dtype, max_shard_size)
        config.save_pretrained(staging)
        custom_object_save(ColBERTXMForRetrieval, staging)
        processor.save_pretrained(staging)
        _copy_small_files(folder, staging)
        verify_weights(staging, written)
        verify_model(staging, AutoModel, _without_pooler(written), load=len(written.files) == 1)
        _check_processor(staging, config)
    return _report(source, layout, "rarezoo", destination, written, dropped)


def to_official(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> ConversionReport:
    """Rarezoo's layout to colbert-ai's: `Checkpoint(folder)` opens it.

    Args:
        source, destination, dtype, max_shard_size: as in `rarezoo.conversion.convert`.
    """
    folder = locate_checkpoint(source)
    layout = _detect_layout(folder)
    if layout != "rarezoo":
        raise ConversionError(f"{folder} has the layout {layout!r} already; expected a rarezoo folder")
    config = _read_config(folder, None)
    processor = _read_processor(folder, config, {})
    with staged_folder(Path(destination)) as staging:
        written, dropped = _write_weights(folder, config, staging, dtype, max_shard_size)
        _write_official_config(config, written, staging)
        _write_plain_tokenizer(processor, staging)
        write_json(staging / METADATA_NAME, official_metadata(config, processor))
        _copy_small_files(folder, staging)
        verify_weights(staging, written)
        opened = ColBERTXMProcessor.from_pretrained(staging, marker_mode=processor.marker_mode)
        if any(getattr(opened, name) != getattr(processor, name) for name in _PROCESSOR_OPTIONS):
            raise ConversionError(f"the {METADATA_NAME} written to {staging} does not give the processor's settings")
    notes = [f"colbert-ai places markers as its version does; this checkpoint was made for {processor.marker_mode!r}."]
    if _POOLER[0] not in written.tensors:
        notes.append("There is no pooler: colbert-ai will say that it makes a new one, which it never reads.")
    return _report(source, layout, "official", destination, written, dropped, notes)


def official_metadata(config: ColBERTXMConfig, processor: ColBERTXMProcessor) -> dict[str, Any]:
    """The fields of colbert-ai's `ColBERTConfig` that say how texts are read; no paths, no host names."""
    return {
        "query_token_id": processor.query_marker,
        "doc_token_id": processor.document_marker,
        "query_token": "[Q]",
        "doc_token": "[D]",
        "query_maxlen": processor.max_query_length,
        "doc_maxlen": processor.max_document_length,
        "dim": config.dim,
        "similarity": config.similarity,
        "attend_to_mask_tokens": processor.attend_to_mask_tokens,
        "mask_punctuation": processor.mask_punctuation,
        "interaction": "colbert",
    }


def _detect_layout(folder: Path) -> str:
    path = folder / "config.json"
    if not path.exists():
        raise ConversionError(f"{folder} has no config.json; expected a checkpoint folder")
    config = read_json(path)
    if config.get("model_type") == FAMILY:
        return "rarezoo"
    if is_stanford_layout(config):
        return "stanford"
    raise ConversionError(
        f"{path} describes a {config.get('model_type')!r} model with architectures {config.get('architectures')}; "
        "expected rarezoo's layout (model_type 'colbert_xm') or colbert-ai's ('xmod' with 'HF_ColBERT')"
    )


def _read_config(folder: Path, languages: Sequence[str] | str | None) -> ColBERTXMConfig:
    try:
        config = ColBERTXMConfig.from_pretrained(folder, local_files_only=True)
        if languages is not None:
            config.keep_languages(languages)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(f"the configuration of {folder} is not valid: {error}") from error
    config.architectures = [ColBERTXMForRetrieval.__name__]
    return config


def _read_processor(folder: Path, config: ColBERTXMConfig, options: Mapping[str, Any]) -> ColBERTXMProcessor:
    try:
        processor = ColBERTXMProcessor.from_pretrained(folder, local_files_only=True, **options)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ConversionError(f"no processor can be made from {folder}: {error}") from error
    if len(processor.tokenizer) > config.vocab_size:
        raise ConversionError(
            f"the tokenizer has {len(processor.tokenizer)} tokens, but the weights have vocab_size "
            f"{config.vocab_size}; they do not belong together"
        )
    return processor


def _write_weights(
    folder: Path, config: ColBERTXMConfig, target: Path, dtype: str | torch.dtype | None, max_shard_size: int | str
) -> tuple[WrittenWeights, dict[str, str]]:
    reader = CheckpointReader(folder)
    with torch.device("meta"):
        shapes = expected_shapes(ColBERTXMForRetrieval(config))
    if all(name in reader for name in _POOLER):
        shapes |= {_POOLER[0]: (config.hidden_size, config.hidden_size), _POOLER[1]: (config.hidden_size,)}
    plan = plan_conversion((*RULES, *_adapter_rules(reader, config)), reader.entries, shapes, folder)
    written = write_weights(plan, reader, shapes, target, dtype=parse_dtype(dtype), max_shard_size=max_shard_size)
    config.dtype = written.dtype
    return written, plan.dropped


def _adapter_rules(reader: CheckpointReader, config: ColBERTXMConfig) -> list[Rule]:
    """The adapters of the configuration are kept, the others that the file holds are dropped."""
    behind = [name.partition(".adapter_modules.")[2] for name in reader.entries]
    stored = {name.split(".")[0] for name in behind if name}
    rules: list[Rule] = []
    for language in sorted(stored | set(config.languages)):
        for tensor in _ADAPTER_TENSORS:
            name = tensor % language
            rules += keep(name) if language in config.languages else [drop(name, "a language that is not kept")]
    return rules


def _write_official_config(config: ColBERTXMConfig, written: WrittenWeights, target: Path) -> None:
    fields = {name: getattr(config, name) for name in XmodConfig.__annotations__}
    official = XmodConfig(**fields, dtype=written.dtype, architectures=["HF_ColBERT"])
    # As older versions of transformers, with which colbert-ai runs, want it.
    content = {**official.to_dict(), "position_embedding_type": "absolute"}
    content["torch_dtype"] = content.pop("dtype", None)
    write_json(target / "config.json", content)


def _write_plain_tokenizer(processor: ColBERTXMProcessor, target: Path) -> None:
    """The tokenizer without its entries about this family's processor."""
    processor.tokenizer.save_pretrained(target)
    path = target / "tokenizer_config.json"
    own = ("auto_map", "processor_class", "is_local", "local_files_only")
    write_json(path, {name: value for name, value in read_json(path).items() if name not in own})


def _copy_small_files(folder: Path, target: Path) -> None:
    for pattern in _SMALL_FILES:
        for file in folder.glob(pattern):
            shutil.copyfile(file, target / file.name)


def _without_pooler(written: WrittenWeights) -> WrittenWeights:
    kept = {name: found for name, found in written.tensors.items() if name not in _POOLER}
    return WrittenWeights(kept, written.files)


def _check_processor(target: Path, config: ColBERTXMConfig) -> None:
    processor = AutoProcessor.from_pretrained(target, local_files_only=True)
    inputs = processor.process_documents(["a text"])
    if int(inputs["input_ids"].max()) >= config.vocab_size:
        raise ConversionError(f"the processor written to {target} does not fit the configuration")


def _report(source, source_layout, to, destination, written, dropped, notes=()) -> ConversionReport:
    folder = FolderReport(
        str(destination),
        "stanford" if to == "official" else to,
        tensors=len(written.tensors),
        parameters=written.parameters,
        size_bytes=written.size_bytes,
        files=len(written.files),
        dtype=str(written.dtype).removeprefix("torch."),
        dropped=dropped,
        notes=tuple(notes),
    )
    return ConversionReport(FAMILY, str(source), source_layout, to, (folder,))
