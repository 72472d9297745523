"""Files that are whole or absent: JSON and safetensors written beside and renamed, tensors opened memory-mapped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

PARTIAL_SUFFIX = ".partial"
_METADATA_KEY = "rarezoo"


class CannotWriteError(OSError):
    """A target that cannot be written: full disk, read-only, missing permission. Nothing half-written remains."""

    def __init__(self, path: Path, cause: OSError):
        super().__init__(f"cannot write {path}: {cause.strerror or cause}; nothing half-written remains")
        self.cause = cause


@contextlib.contextmanager
def reported_for(path: Path) -> Iterator[None]:
    """Turn whatever the system says about a failed write into one `CannotWriteError` for `path`."""
    try:
        yield
    except OSError as error:
        raise CannotWriteError(path, error) from error


def partial_beside(path: Path) -> Path:
    """A hidden path in the same folder that no process has used, dead ones and those of other machines included."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")


@contextlib.contextmanager
def _written_beside(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; rename it to `path` on success, remove it on failure."""
    partial = partial_beside(path)
    try:
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def folder_written_beside(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`; rename it to `folder` on success, remove it on failure.

    Raises:
        FileExistsError: `folder` exists and is not empty.
        CannotWriteError: the parent or a file in the temporary folder cannot be written, whoever writes it.
    """
    folder = folder.resolve()
    with reported_for(folder):
        occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if occupied:
        raise FileExistsError(f"{folder} exists and is not an empty folder. Choose another folder or remove this one.")
    partial = partial_beside(folder)
    try:
        with reported_for(folder):
            partial.mkdir(parents=True)
        yield partial
        with reported_for(folder):
            os.replace(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = _failed_write(error, partial)
        if cause is not None:
            raise CannotWriteError(folder, cause) from error
        raise


def _failed_write(error: BaseException, folder: Path) -> OSError | None:
    """What the system said when a file below `folder` could not be written; None for every other error."""
    if isinstance(error, CannotWriteError):
        return error.cause
    if isinstance(error, OSError):
        elsewhere = error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(folder)
        return None if error.errno is None or elsewhere else error
    # safetensors and tokenizers raise errors of their own, with the system's number in the words of their language.
    number = re.search(r"\bos error (\d+)|\bOs \{ code: (\d+)", str(error))
    return OSError(code := int(number[1] or number[2]), os.strerror(code)) if number else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, whole or not at all.

    Raises:
        CannotWriteError: the file cannot be written.
    """
    with reported_for(path), _written_beside(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Entries(dict[str, Any]):
    """A JSON object of a file; an entry that it lacks is a ValueError that names both."""

    def __init__(self, path: Path, entries: dict[str, Any]):
        super().__init__(entries)
        self._path = path

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self._path} is damaged: the entry '{name}' is missing")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. To look up an entry that it, or an object in it, lacks is a ValueError naming the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a JSON object.
    """
    return _parsed(path, path.read_bytes())


def _parsed(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        content = json.loads(text, object_hook=lambda entries: _Entries(path, entries))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: expected a JSON object ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, found {type(content).__name__}")
    return content


def read_manifest(path: Path, kind: str, contents: str, format_version: int) -> dict[str, Any]:
    """Read the manifest of a folder of embeddings or of an index, and see that this release can read the rest.

    Args:
        path: of the manifest.
        kind: of representation, that the manifest must name.
        contents: what the folder holds, for the message that it holds none.
        format_version: that the manifest must name.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is damaged, of another kind or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {contents}: {path.name} is missing")
    manifest = read_json(path)
    if manifest.get("kind") != kind:
        raise ValueError(f"{path}: expected kind {kind!r}, found {manifest.get('kind')!r}")
    if manifest.get("format_version") != format_version:
        raise ValueError(
            f"{path}: format version {manifest.get('format_version')!r}, this rarezoo reads version {format_version}"
        )
    return manifest


def _checksum(tensors: dict[str, np.ndarray]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].view(np.uint8).data, checksum)
    return checksum


def write_tensors(path: Path, tensors: dict[str, np.ndarray], source: str = "") -> None:
    """Write one safetensors file, whole or not at all; equal tensors give equal bytes.

    Args:
        path: the file.
        tensors: one-dimensional, contiguous arrays.
        source: what the tensors were made from (a digest), read back by `read_source`.

    Raises:
        CannotWriteError: the file cannot be written.
    """
    from safetensors.numpy import save

    # One metadata entry only: safetensors does not promise an order among several.
    metadata = {_METADATA_KEY: json.dumps({"crc32": _checksum(tensors), "source": source})}
    # Not save_file: it goes through a file of its own, which a killed process would leave behind under another name.
    content = save(tensors, metadata=metadata)
    with reported_for(path), _written_beside(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        # The numpy framework of safetensors copies into memory; the torch one maps the file.
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error})") from error
    except RuntimeError as error:
        if path.is_file():
            raise
        # Removed by another process after its header was read: torch maps the file then, and says it in its own way.
        raise FileNotFoundError(f"{path} is missing") from error


def map_tensors(path: Path, dtypes: Mapping[str, type], mmap: bool = True) -> dict[str, np.ndarray]:
    """Open one safetensors file memory-mapped and read-only (a copy in memory with `mmap=False`).

    Args:
        path: the file.
        dtypes: the expected tensors and their types.
        mmap: map the file instead of reading it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, truncated, or holds other tensors.
    """
    with _opened(path) as file:
        names = set(file.keys())
        if names != set(dtypes):
            raise ValueError(f"{path} holds the tensors {sorted(names)}; expected {sorted(dtypes)}")
        tensors = {name: file.get_tensor(name).numpy() for name in dtypes}
    for name, dtype in dtypes.items():
        if tensors[name].dtype != np.dtype(dtype):
            raise ValueError(f"{path}: '{name}' has type {tensors[name].dtype}; expected {np.dtype(dtype)}")
        if not mmap:
            tensors[name] = tensors[name].copy()
        tensors[name].flags.writeable = False
    return tensors


def check_shapes(path: Path, tensors: dict[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """That tensors of a file have the shapes that its manifest tells of; else a ValueError."""
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{path} is damaged: '{name}' has the shape {tensors[name].shape}, not {shape}")


def check_offsets(path: Path, name: str, offsets: np.ndarray, end: int) -> None:
    """That offsets of a file increase from 0 to `end`; else a ValueError."""
    if offsets[0] != 0 or offsets[-1] != end or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{path} is damaged: '{name}' does not increase from 0 to {end}")


def _read_metadata(path: Path) -> dict[str, Any]:
    with _opened(path) as file:
        metadata = (file.metadata() or {}).get(_METADATA_KEY)
    if metadata is None:
        raise ValueError(f"{path} was not written by rarezoo: its safetensors metadata has no '{_METADATA_KEY}' entry")
    return _parsed(path, metadata)


def read_source(path: Path) -> str:
    """The `source` that `write_tensors` was given."""
    return _read_metadata(path)["source"]


def verify_checksum(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Compare the tensors of a file with the checksum they were written with (reads everything).

    Raises:
        ValueError: they differ: the file was damaged after it was written.
    """
    if _checksum(tensors) != _read_metadata(path)["crc32"]:
        raise ValueError(f"{path} is damaged: its contents do not match the checksum they were written with")
