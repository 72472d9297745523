"""The official layout: an X-MOD `config.json` with `artifact.metadata`, the dump of colbert-ai's `ColBERTConfig`."""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

METADATA_NAME = "artifact.metadata"
PROJECTION = "linear.weight"
SIMILARITIES = ("cosine", "l2")
MARKER_MODES = ("insert", "replace")
# Three special tokens and one of text.
SHORTEST_INPUT = 4


def _is_count(minimum: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= minimum


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


# Field -> what a file that lacks it means (colbert-ai 0.2.22, `infra/config/settings.py`), and which values are usable.
_FIELDS: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "query_token_id": ("[unused0]", _is_token),
    "doc_token_id": ("[unused1]", _is_token),
    "query_maxlen": (32, _is_count(SHORTEST_INPUT)),
    "doc_maxlen": (220, _is_count(SHORTEST_INPUT)),
    "dim": (None, _is_count(1)),  # colbert-ai would take 128; `stored_dim` knows it
    "similarity": ("cosine", lambda value: value in SIMILARITIES),
    "mask_punctuation": (True, _is_flag),
    "attend_to_mask_tokens": (False, _is_flag),
    "marker_mode": (None, lambda value: value in MARKER_MODES),  # ours: colbert-ai neither writes nor minds it
}
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def is_stanford_layout(config: Mapping[str, Any], source: str | Path | None = None, **kwargs: Any) -> bool:
    """Whether `config.json` is an official checkpoint's: it names colbert-ai's class, or names none and the folder or
    repository `source` has an `artifact.metadata`."""
    if config.get("model_type") != "xmod":
        return False
    architectures = config.get("architectures")
    if architectures or source is None:
        return "HF_ColBERT" in (architectures or [])
    return _find(source, METADATA_NAME, **kwargs) is not None


def read_metadata(source: str | Path, **kwargs: Any) -> dict[str, Any]:
    """The fields that matter from the `artifact.metadata` of a checkpoint folder or Hub repository, as `usable_fields`
    gives them; where there is no file, all have their defaults, with a warning.

    Raises:
        ValueError: the file is not JSON, or no object.
    """
    path = _find(source, METADATA_NAME, **kwargs)
    if path is None:
        logger.warning(f"{source} has no {METADATA_NAME}: colbert-ai's default lengths, markers and masks are used")
        return usable_fields({}, source)
    return usable_fields(_json_object(path), path)


def usable_fields(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The fields that matter of a dump of colbert-ai's settings.

    A field that is missing has its default. So has one whose value cannot be used (some public files hold a dict for a
    marker), with a warning that names `path`. `dim` and `marker_mode` are then None.
    """
    return {name: _usable(name, content, path) for name in _FIELDS}


def _usable(name: str, content: Mapping[str, Any], path: str | Path) -> Any:
    default, fits = _FIELDS[name]
    if name not in content:
        return default
    value = content[name]
    if name == "similarity" and isinstance(value, str):
        value = value.lower()
    if fits(value):
        return value
    logger.warning(f"{path}: {name} is {value!r:.80}, which cannot be used; it counts as missing")
    return default


def stored_dim(source: str | Path, **kwargs: Any) -> int | None:
    """Components of a vector, from the shape of a checkpoint's projection: for metadata that do not say it. None where
    that cannot be read; loading the weights will say why.

    Of a Hub repository, the file with the projection is downloaded.
    """
    # Imported here for speed: they bring torch.
    import torch
    from safetensors import SafetensorError, safe_open

    file = _file_with_projection(source, **kwargs)
    if file is None:
        return None
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                return opened.get_slice(PROJECTION).get_shape()[0]
        return len(torch.load(file, map_location="meta", weights_only=True)[PROJECTION])
    except (SafetensorError, UnpicklingError, EOFError, KeyError, OSError, RuntimeError, TypeError):
        return None


def _file_with_projection(source: str | Path, **kwargs: Any) -> str | None:
    for name in _WEIGHT_FILES:
        file = _find(source, name, **kwargs)
        if file is not None:
            return file
        index = _find(source, f"{name}.index.json", **kwargs)
        if index is not None:
            shard = (_json_object(index).get("weight_map") or {}).get(PROJECTION)
            return None if shard is None else _find(source, shard, **kwargs)
    return None


def find_dense_module(source: str | Path, **kwargs: Any) -> str | None:
    """The folder of the projection in a checkpoint of PyLate or sentence-transformers, as its `modules.json` has it;
    None where there is none."""
    try:
        path = _find(source, "modules.json", **kwargs)
        modules = [] if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
        return next((entry["path"] for entry in modules if entry["type"].endswith(".Dense")), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not reachable, or something else
        return None


def _find(source: str | Path, name: str, **kwargs: Any) -> str | None:
    options = {option: kwargs[option] for option in _DOWNLOAD_OPTIONS if kwargs.get(option) is not None}
    return cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False, **options
    )


def _json_object(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; found {type(content).__name__}")
    return content


def write_metadata(folder: str | Path, config: Any = None, processor: Any = None) -> None:
    """Write `artifact.metadata` into a folder: of colbert-ai's settings those that tell how texts are read, and no
    folders, commands and host names, which its own dump holds.

    Args:
        folder: the checkpoint's.
        config, processor: a `ColBERTXMConfig` and a `ColBERTXMProcessor`. They may be saved one after the other: what
            the one that is not given would say stays as the folder's file has it.
    """
    path = Path(folder) / METADATA_NAME
    fields: dict[str, Any] = {}
    if path.is_file():
        with suppress(ValueError):  # a damaged file is written anew
            found = _json_object(path)
            fields = {name: found[name] for name, (_, fits) in _FIELDS.items() if name in found and fits(found[name])}
    fields |= {"query_token": "[Q]", "doc_token": "[D]", "interaction": "colbert"}
    if processor is not None:
        fields |= {
            "query_token_id": processor.query_marker,
            "doc_token_id": processor.document_marker,
            "query_maxlen": processor.max_query_length,
            "doc_maxlen": processor.max_document_length,
            "attend_to_mask_tokens": processor.attend_to_mask_tokens,
            "mask_punctuation": processor.mask_punctuation,
            "marker_mode": processor.marker_mode,
        }
    if config is not None:
        fields |= {"dim": config.dim, "similarity": config.similarity}
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def processor_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `ColBERTXMProcessor` from `usable_fields`; `marker_mode` is not among them."""
    return {
        "max_query_length": metadata["query_maxlen"],
        "max_document_length": metadata["doc_maxlen"],
        "query_marker": metadata["query_token_id"],
        "document_marker": metadata["doc_token_id"],
        "attend_to_mask_tokens": metadata["attend_to_mask_tokens"],
        "mask_punctuation": metadata["mask_punctuation"],
    }


def marker_mode_of(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """How the code that saved an official checkpoint placed its marker: "replace" up to colbert-ai 0.2.20, "insert"
    from 0.2.21 on (August 2024, stanford-futuredata/ColBERT pull request 362). Only our exports record it; for others
    the transformers version in `config.json` tells the time."""
    if metadata["marker_mode"] is not None:
        return metadata["marker_mode"]
    version = re.match(r"(\d+)\.(\d+)", str(config.get("transformers_version", "")))
    return "replace" if version and (int(version[1]), int(version[2])) < (4, 44) else "insert"
