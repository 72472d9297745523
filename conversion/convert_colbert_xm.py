"""ColBERT-XM checkpoints: every published layout (`colbert_xm_layouts`) to rarezoo's, and back.

colbert-ai ("Stanford") and rarezoo keep X-MOD's tensor names under `roberta.` and the projection as `linear.weight`.
The work is in the settings, which colbert-ai keeps in `artifact.metadata` and PyLate beside its modules, and in the
pooler, which their classes have and ColBERT never reads.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor, XmodConfig
from transformers.dynamic_module_utils import custom_object_save

from rarezoo.colbert_xm import ColBERTXMConfig, ColBERTXMForRetrieval, ColBERTXMProcessor
from rarezoo.colbert_xm.colbert_metadata import write_metadata
from rarezoo.colbert_xm.sentence_transformers_colbert_xm import write_multi_vector_encoder_files
from rarezoo.conversion.checkpoint_files import CheckpointReader, ConversionError, read_json, write_json
from rarezoo.conversion.colbert_xm_layouts import FAMILY, PROJECTION, Source, open_checkpoint
from rarezoo.conversion.engine import (
    ConversionReport,
    FolderReport,
    Plan,
    Rule,
    Step,
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
from rarezoo.conversion.pylate_files import DENSE_FOLDER, write_pylate_files

OFFICIAL_LAYOUTS = ("stanford", "pylate")
_LAYER = "roberta.encoder.layer.{layer}."
_NORM_PARTS = (("weight", "gamma"), ("bias", "beta"))
_POOLER = ("roberta.pooler.dense.weight", "roberta.pooler.dense.bias")

# The same names on both sides; the pooler stays in the file, so that the way back gives every tensor again.
RULES: tuple[Rule, ...] = (
    *keep(
        "roberta.embeddings.word_embeddings.weight",
        "roberta.embeddings.position_embeddings.weight",
        "roberta.embeddings.token_type_embeddings.weight",
        PROJECTION,
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
            "roberta.encoder.LayerNorm",  # with pre_norm
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

_SMALL_FILES = ("LICENSE*", "NOTICE*")


def to_rarezoo(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    base: str | os.PathLike | None = None,
    languages: list | str | None = None,
    default_language: str | None = None,
    marker_mode: str | None = None,
    processor_options: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """A published checkpoint to rarezoo's layout; one of rarezoo's is written again, to change dtype or languages.

    Args:
        source: as in `rarezoo.conversion.convert`, or the path of a `.dnn` file.
        destination, dtype, max_shard_size: as in `rarezoo.conversion.convert`.
        base: of a `.dnn` file: folder or repository of configuration and tokenizer, where they are not beside it.
        languages: adapters to keep, as X-MOD codes, ISO codes or BCP-47 tags; None keeps all.
        default_language: of texts whose language is not given; None keeps the source's.
        marker_mode: "insert" or "replace", see `ColBERTXMProcessor`. None: by the age of the checkpoint, "replace" when
            transformers before 4.44 wrote it, as for `antoinelouis/colbert-xm`, and for `.dnn` files.
        processor_options: other options of `ColBERTXMProcessor` that replace the source's.
    """
    options = dict(processor_options or {})
    if marker_mode is not None:
        options["marker_mode"] = marker_mode
    opened = open_checkpoint(
        source, base=base, languages=languages, default_language=default_language, processor_options=options
    )
    with staged_folder(Path(destination)) as staging:
        written, dropped = _write_weights(opened, staging, dtype, max_shard_size)
        opened.config.save_pretrained(staging)
        custom_object_save(ColBERTXMForRetrieval, staging)
        opened.processor.save_pretrained(staging)
        write_metadata(staging, opened.config)
        write_multi_vector_encoder_files(staging)
        _copy_small_files(opened.folder, staging)
        verify_weights(staging, written)
        verify_model(staging, AutoModel, _without_pooler(written), load=len(written.files) == 1)
        _check_processor(staging, opened.config)
    return _report(source, opened, destination, "rarezoo", [written], dropped)


def to_official(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    layout: str = "stanford",
    default_language: str | None = None,
) -> ConversionReport:
    """Rarezoo's layout to one that other libraries open.

    Args:
        source, destination, dtype, max_shard_size: as in `rarezoo.conversion.convert`.
        layout: "stanford", for colbert-ai's `Checkpoint(folder)`, or "pylate", for PyLate's `ColBERT(folder)` and
            sentence-transformers' `MultiVectorEncoder(folder)`.
        default_language: the language that those libraries use for all texts; None keeps the source's.
    """
    if layout not in OFFICIAL_LAYOUTS:
        raise ConversionError(f"layout must be one of {', '.join(OFFICIAL_LAYOUTS)}; found {layout!r}")
    opened = open_checkpoint(source, default_language=default_language)
    if opened.layout != "rarezoo":
        raise ConversionError(f"{opened.folder} has the layout {opened.layout!r} already; expected a rarezoo folder")
    with staged_folder(Path(destination)) as staging:
        write = _write_stanford if layout == "stanford" else _write_pylate
        parts, dropped = write(opened, staging, dtype, max_shard_size)
        _write_plain_tokenizer(opened.processor, staging)
        _copy_small_files(opened.folder, staging)
        _check_official(staging, opened)
    if _POOLER[0] not in opened.weights:
        opened.notes.append(
            "There is no pooler: other libraries will say that they make a new one, which is never read."
        )
    return _report(source, opened, destination, layout, parts, dropped)


def _write_stanford(
    opened: Source, target: Path, dtype: str | torch.dtype | None, max_shard_size: int | str
) -> tuple[list[WrittenWeights], dict[str, str]]:
    if opened.processor.skiplist_tokens is not None:
        raise ConversionError("colbert-ai has no skip list of its own: skiplist_tokens cannot be written; use 'pylate'")
    written, dropped = _write_weights(opened, target, dtype, max_shard_size)
    _write_official_config(opened.config, written, "HF_ColBERT", target)
    write_metadata(target, opened.config, opened.processor)
    verify_weights(target, written)
    opened.notes.append(
        f"colbert-ai places markers as its version does; this checkpoint was made for {opened.processor.marker_mode!r}."
    )
    return [written], dropped


def _write_pylate(
    opened: Source, target: Path, dtype: str | torch.dtype | None, max_shard_size: int | str
) -> tuple[list[WrittenWeights], dict[str, str]]:
    (target / DENSE_FOLDER).mkdir()
    dense, _ = _write_weights(opened, target / DENSE_FOLDER, dtype, max_shard_size, {PROJECTION: PROJECTION})
    names = {name: name.removeprefix("roberta.") for name in _expected(opened) if name != PROJECTION}
    written, dropped = _write_weights(opened, target, dtype, max_shard_size, names)
    _write_official_config(opened.config, written, "XmodModel", target)
    write_pylate_files(target, opened.config, opened.processor)
    verify_weights(target, written)
    verify_weights(target / DENSE_FOLDER, dense)
    if opened.processor.marker_mode != "insert":
        opened.notes.append("PyLate inserts markers; this checkpoint was made for 'replace', whose vectors differ.")
    if opened.config.similarity != "cosine":
        opened.notes.append(f"PyLate scores by cosine, which ranks as {opened.config.similarity!r} does.")
    return [written, dense], dropped


def _expected(opened: Source) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors to write: the model's, and the pooler where the source has it."""
    config = opened.config
    with torch.device("meta"):
        shapes = expected_shapes(ColBERTXMForRetrieval(config))
    if all(name in opened.weights for name in _POOLER):
        shapes |= {_POOLER[0]: (config.hidden_size, config.hidden_size), _POOLER[1]: (config.hidden_size,)}
    return shapes


def _write_weights(
    opened: Source,
    target: Path,
    dtype: str | torch.dtype | None,
    max_shard_size: int | str,
    names: Mapping[str, str] | None = None,
) -> tuple[WrittenWeights, dict[str, str]]:
    """Write all tensors under their names, or those of `names` (ours -> the target's) under new ones."""
    shapes = _expected(opened)
    rules = [*RULES, *_adapter_rules(opened.weights, opened.config)]
    plan = plan_conversion(rules, opened.weights.entries, shapes, opened.folder)
    if names is not None:
        steps = (Step(step.sources, (names[step.targets[0]],)) for step in plan.steps if step.targets[0] in names)
        plan = Plan(tuple(steps), plan.dropped)
        shapes = {names[name]: shape for name, shape in shapes.items() if name in names}
    written = write_weights(
        plan, opened.weights, shapes, target, dtype=parse_dtype(dtype), max_shard_size=max_shard_size
    )
    opened.config.dtype = written.dtype
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


def _write_official_config(config: ColBERTXMConfig, written: WrittenWeights, architecture: str, target: Path) -> None:
    fields = {name: getattr(config, name) for name in XmodConfig.__annotations__}
    official = XmodConfig(**fields, dtype=written.dtype, architectures=[architecture])
    # As older versions of transformers, with which colbert-ai and PyLate run, want it.
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


def _check_official(target: Path, opened: Source) -> None:
    """The written folder says what the source's processor does; markers are compared by their ids."""
    mode = opened.processor.marker_mode
    found = open_checkpoint(target, processor_options={"marker_mode": mode}).processor
    if _behaviour(found) != _behaviour(opened.processor):
        raise ConversionError(
            f"the files written to {target} do not give the processor's settings: {_behaviour(found)} instead of "
            f"{_behaviour(opened.processor)}"
        )


def _behaviour(processor: ColBERTXMProcessor) -> dict[str, Any]:
    markers = [processor.query_marker, processor.document_marker]
    return {
        "markers": processor.tokenizer.convert_tokens_to_ids(markers),
        "lengths": (processor.max_query_length, processor.max_document_length),
        "attend_to_mask_tokens": processor.attend_to_mask_tokens,
        "skiplist": processor.skiplist_ids,
    }


def _report(
    source: str | os.PathLike,
    opened: Source,
    destination: str | os.PathLike,
    layout: str,
    parts: list[WrittenWeights],
    dropped: dict[str, str],
) -> ConversionReport:
    folder = FolderReport(
        str(destination),
        layout,
        tensors=sum(len(written.tensors) for written in parts),
        parameters=sum(written.parameters for written in parts),
        size_bytes=sum(written.size_bytes for written in parts),
        files=sum(len(written.files) for written in parts),
        dtype=str(parts[0].dtype).removeprefix("torch."),
        dropped=dropped,
        notes=tuple(opened.notes),
    )
    to = "rarezoo" if layout == "rarezoo" else "official"
    return ConversionReport(FAMILY, str(source), opened.layout, to, (folder,))
