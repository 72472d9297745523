"""The layouts in which ColBERT-XM checkpoints are found, each opened as configuration, processor and tensors.

| layout | recognised by |
|---|---|
| `rarezoo` | our own `config.json` |
| `stanford` | an X-MOD `config.json` that names `HF_ColBERT`, or no class but has an `artifact.metadata` beside it |
| `dnn` | a `.dnn` file, as colbert-ai saves checkpoints of a training, or a folder with no other weights |
| `pylate`, `sentence-transformers` | `modules.json` and `config_sentence_transformers.json` |
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer

from rarezoo.colbert_xm import ColBERTXMConfig, ColBERTXMForRetrieval, ColBERTXMProcessor
from rarezoo.colbert_xm.colbert_metadata import (
    METADATA_NAME,
    PROJECTION,
    is_stanford_layout,
    processor_settings,
    usable_fields,
)
from rarezoo.conversion.checkpoint_files import (
    CheckpointReader,
    ConversionError,
    RenamedTensors,
    locate_checkpoint,
    read_json,
    read_pickle,
)
from rarezoo.conversion.pylate_files import (
    check_markers,
    multi_vector_layout,
    read_multi_vector_files,
    skiplist_options,
)

FAMILY = ColBERTXMConfig.model_type
PROCESSOR_OPTIONS = tuple(
    name for name in inspect.signature(ColBERTXMProcessor).parameters if name not in ("tokenizer", "chat_template")
)
# Of X-MOD's config.json, what this family's configuration has fixed, or says in another way.
_FOREIGN_FIELDS = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "model_type",
    "position_embedding_type",
    "tie_word_embeddings",
)


@dataclass
class Source:
    """An opened checkpoint.

    Attributes:
        layout: its name.
        folder: where licence texts lie.
        config, processor: what it says, with the caller's options.
        weights: its tensors, under the official layout's names.
        notes: what the report should say.
    """

    layout: str
    folder: Path
    config: ColBERTXMConfig
    processor: ColBERTXMProcessor
    weights: CheckpointReader
    notes: list[str] = field(default_factory=list)


def open_checkpoint(
    source: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    languages: Sequence[str] | str | None = None,
    default_language: str | None = None,
    processor_options: Mapping[str, Any] | None = None,
) -> Source:
    """Open a checkpoint of any layout; the options are those of `convert_colbert_xm.to_rarezoo`."""
    options = dict(processor_options or {})
    unknown = [name for name in options if name not in PROCESSOR_OPTIONS]
    if unknown:
        raise ConversionError(
            f"unknown processor_options {', '.join(unknown)}; expected some of {', '.join(PROCESSOR_OPTIONS)}"
        )
    kept = {"languages": languages, "default_language": default_language}
    path = Path(source).expanduser()
    if not (path.is_file() and path.suffix == ".dnn"):
        path = locate_checkpoint(source)
    file = _dnn_file(path)
    if file is not None:
        return _open_dnn(file, base, kept, options)
    if base is not None:
        raise ConversionError(f"base= names configuration and tokenizer of a .dnn file; {path} has its own")
    layout = detect_layout(path)
    if layout in ("rarezoo", "stanford"):
        return _open_own_or_stanford(path, layout, kept, options)
    return _open_multi_vector(path, layout, kept, options)


def detect_layout(folder: Path) -> str:
    """The name of a folder's layout: "rarezoo", "stanford", "pylate" or "sentence-transformers".

    Raises:
        ConversionError: something else; the message says what.
    """
    config = _read_config_json(folder)
    if config.get("model_type") == FAMILY:
        return "rarezoo"
    if config.get("model_type") == "xmod":
        layout = multi_vector_layout(folder)
        if layout is not None:
            return layout
        if is_stanford_layout(config, folder, local_files_only=True):
            return "stanford"
    raise ConversionError(
        f"{folder / 'config.json'} describes a {config.get('model_type')!r} model with architectures "
        f"{config.get('architectures')}; expected rarezoo's layout (model_type 'colbert_xm'), or an X-MOD ('xmod') in "
        f"that of colbert-ai ('HF_ColBERT' or {METADATA_NAME}), PyLate or MultiVectorEncoder (modules.json)"
    )


def _read_config_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise ConversionError(f"{folder} has no config.json; expected a checkpoint folder")
    return read_json(path)


# --- rarezoo's and colbert-ai's folders -------------------------------------------------------------------------------


def _open_own_or_stanford(folder: Path, layout: str, kept: Mapping, options: Mapping) -> Source:
    weights = CheckpointReader(folder)
    try:
        fields, _ = ColBERTXMConfig.get_config_dict(folder, local_files_only=True)
    except ValueError as error:
        raise ConversionError(f"the configuration of {folder} is not valid: {error}") from error
    notes = []
    if layout == "stanford" and not (folder / METADATA_NAME).exists():
        notes.append(f"There is no {METADATA_NAME}: lengths, markers and masks are colbert-ai's defaults.")
    config = _build_config(fields, folder, kept)
    try:
        processor = ColBERTXMProcessor.from_pretrained(folder, local_files_only=True, **options)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ConversionError(f"no processor can be made from {folder}: {error}") from error
    _check_vocabulary(processor, config)
    return Source(layout, folder, config, processor, weights, notes)


# --- .dnn files -------------------------------------------------------------------------------------------------------


def _dnn_file(path: Path) -> Path | None:
    if path.is_file():
        return path
    if CheckpointReader.has_weights(path):
        return None
    found = sorted(path.glob("*.dnn"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ConversionError(f"{path} holds several .dnn files ({names}); give the path of the one to convert")
    return found[0] if found else None


def _open_dnn(file: Path, base: str | os.PathLike | None, kept: Mapping, options: Mapping) -> Source:
    """colbert-ai takes the settings from the file's `arguments`, and so does this."""
    folder = file.parent if base is None else locate_checkpoint(base)
    if not (folder / "config.json").exists():
        raise ConversionError(
            f"{file} holds weights only; expected config.json and tokenizer of its X-MOD in {folder}, or base=, the "
            "folder or repository that has them"
        )
    fields = _xmod_fields(folder)
    weights = RenamedTensors(file, [(CheckpointReader(file), _name_in_dnn)])
    arguments = read_pickle(file).get("arguments")
    arguments = arguments if isinstance(arguments, dict) else {}
    metadata = usable_fields({name: value for name, value in arguments.items() if value is not None}, file)
    fields["similarity"] = metadata["similarity"]
    if metadata["dim"] is not None:
        fields["dim"] = metadata["dim"]
    elif PROJECTION in weights:
        fields["dim"] = weights.entries[PROJECTION].shape[0]
    config = _build_config(fields, folder, kept)
    # Versions that save .dnn files overwrite a placeholder with the marker.
    settings = {**processor_settings(metadata), "marker_mode": "replace", **options}
    processor = _build_processor(folder, _read_tokenizer(folder, config), settings)
    _check_vocabulary(processor, config)
    notes = [] if arguments else ["The file has no arguments: lengths, markers and masks are colbert-ai's defaults."]
    return Source("dnn", folder, config, processor, weights, notes)


def _name_in_dnn(name: str) -> str:
    for prefix in ("module.", "model."):
        name = name.removeprefix(prefix)
    return f"roberta.{name.removeprefix('bert.')}" if name.startswith("bert.") else name


# --- PyLate's and sentence-transformers' folders ----------------------------------------------------------------------


def _open_multi_vector(folder: Path, layout: str, kept: Mapping, options: Mapping) -> Source:
    files = read_multi_vector_files(folder, layout)
    weights = RenamedTensors(
        folder,
        [
            (CheckpointReader(folder), lambda name: f"roberta.{name}"),
            (CheckpointReader(files.dense), lambda name: name),
        ],
    )
    config = _build_config({**_xmod_fields(folder), "dim": files.dim}, folder, kept)
    tokenizer = _read_tokenizer(folder, config)
    settings = {**files.settings, **options}
    check_markers(settings, tokenizer, folder)
    processor = _build_processor(folder, tokenizer, settings)
    if not {"mask_punctuation", "skiplist_tokens"} & set(options):
        settings.update(skiplist_options(files, processor))
        processor = _build_processor(folder, tokenizer, settings)
    _check_vocabulary(processor, config)
    return Source(layout, folder, config, processor, weights)


# --- what they share --------------------------------------------------------------------------------------------------


def _xmod_fields(folder: Path) -> dict[str, Any]:
    config = _read_config_json(folder)
    if config.get("model_type") not in ("xmod", FAMILY):
        raise ConversionError(
            f"{folder / 'config.json'} describes a {config.get('model_type')!r} model; expected an X-MOD ('xmod')"
        )
    return {name: value for name, value in config.items() if name not in _FOREIGN_FIELDS}


def _build_config(fields: Mapping[str, Any], folder: Path, kept: Mapping[str, Any]) -> ColBERTXMConfig:
    try:
        config = ColBERTXMConfig.from_dict(dict(fields), **kept)
        config.validate()
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(f"the configuration of {folder} is not valid: {error}") from error
    config.architectures = [ColBERTXMForRetrieval.__name__]
    return config


def _read_tokenizer(folder: Path, config: ColBERTXMConfig) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ConversionError(f"the tokenizer in {folder} cannot be read: {error}") from error
    # PyLate saves the tokenizer with <mask> for padding.
    padding_id: Any = config.pad_token_id
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_id)
    return tokenizer


def _build_processor(folder: Path, tokenizer: Any, settings: Mapping[str, Any]) -> ColBERTXMProcessor:
    try:
        return ColBERTXMProcessor(tokenizer, **settings)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"no processor can be made from {folder}: {error}") from error


def _check_vocabulary(processor: ColBERTXMProcessor, config: ColBERTXMConfig) -> None:
    if len(processor.tokenizer) > config.vocab_size:
        raise ConversionError(
            f"the tokenizer has {len(processor.tokenizer)} tokens, but the weights have vocab_size "
            f"{config.vocab_size}; they do not belong together"
        )
