"""The official layout: an X-MOD `config.json` with `artifact.metadata`, the dump of colbert-ai's `ColBERTConfig`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

METADATA_NAME = "artifact.metadata"
# colbert-ai 0.2.22, `infra/config/settings.py`: what a file that lacks a field means.
DEFAULTS: dict[str, Any] = {
    "query_token_id": "[unused0]",
    "doc_token_id": "[unused1]",
    "query_maxlen": 32,
    "doc_maxlen": 220,
    "dim": 128,
    "similarity": "cosine",
    "mask_punctuation": True,
    "attend_to_mask_tokens": False,
    "marker_mode": "",  # ours: colbert-ai neither writes nor minds it
}
_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def is_stanford_layout(config: Mapping[str, Any], source: str | Path | None = None, **kwargs: Any) -> bool:
    """Whether `config.json` is an official checkpoint's: it names colbert-ai's class, or names none and the folder or
    repository `source` has an `artifact.metadata`."""
    if config.get("model_type") != "xmod":
        return False
    architectures = config.get("architectures")
    if architectures or source is None:
        return "HF_ColBERT" in (architectures or [])
    return _find_metadata(source, **kwargs) is not None


def read_metadata(source: str | Path, **kwargs: Any) -> dict[str, Any]:
    """The fields of `DEFAULTS` from the `artifact.metadata` of a checkpoint folder or Hub repository.

    A field that is missing or of the wrong kind (some public files hold a dict for a marker) has its default; a file
    that is missing has all of them. Both are warned of.

    Raises:
        ValueError: the file is not JSON.
    """
    path = _find_metadata(source, **kwargs)
    if path is None:
        logger.warning(f"{source} has no {METADATA_NAME}: colbert-ai's default lengths, markers and masks are used")
        return dict(DEFAULTS)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return usable_fields(content, path)


def _find_metadata(source: str | Path, **kwargs: Any) -> str | None:
    options = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if kwargs.get(name) is not None}
    return cached_file(
        source, METADATA_NAME, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False,
        **options,
    )  # fmt: skip


def usable_fields(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The fields of `DEFAULTS` from a dump of colbert-ai's settings; `path` is named in warnings.

    Raises:
        ValueError: it is no JSON object.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a JSON object; found {type(content).__name__}")
    return {name: _usable(name, content.get(name, default), default, path) for name, default in DEFAULTS.items()}


def processor_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `ColBERTXMProcessor` from the fields of `DEFAULTS`; `marker_mode` is not among them."""
    return {
        "max_query_length": metadata["query_maxlen"],
        "max_document_length": metadata["doc_maxlen"],
        "query_marker": metadata["query_token_id"],
        "document_marker": metadata["doc_token_id"],
        "attend_to_mask_tokens": metadata["attend_to_mask_tokens"],
        "mask_punctuation": metadata["mask_punctuation"],
    }


def _usable(name: str, value: Any, default: Any, path: str | Path) -> Any:
    fits = type(value) is type(default) and (not isinstance(value, int) or isinstance(value, bool) or value > 0)
    if fits:
        return value
    logger.warning(f"{path}: {name} is {value!r}, which is no {type(default).__name__}; {default!r} is used")
    return default


def marker_mode_of(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """How the code that saved an official checkpoint placed its marker: "replace" up to colbert-ai 0.2.20, "insert"
    from 0.2.21 on (August 2024, stanford-futuredata/ColBERT pull request 362). Only our exports record it; for others
    the transformers version in `config.json` tells the time."""
    if metadata.get("marker_mode"):
        return metadata["marker_mode"]
    version = re.match(r"(\d+)\.(\d+)", str(config.get("transformers_version", "")))
    return "replace" if version and (int(version[1]), int(version[2])) < (4, 44) else "insert"
