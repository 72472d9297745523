"""Checkpoint folders on disk: finding them, and reading their tensors one at a time."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

_LISTED_NAMES = 20


class ConversionError(ValueError):
    """The source cannot be converted as asked; the message says what was expected, what was found and what to do."""


def listed(names: Sequence[str]) -> str:
    """Sorted names for an error message; long lists are cut."""
    shown = ", ".join(sorted(names)[:_LISTED_NAMES])
    more = len(names) - _LISTED_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON object (or a list, by `kind`) from a file; errors name the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not valid JSON ({error}); download or write it again") from error
    if not isinstance(content, kind):
        wanted = "object" if kind is dict else kind.__name__
        raise ConversionError(f"{path} must hold a JSON {wanted}; found {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def locate_checkpoint(name_or_path: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local folder, or a Hub repository, which is downloaded (or found in the cache).

    Raises `FileNotFoundError` when neither exists.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists():
        raise ConversionError(f"{name} is a file; expected the folder that holds config.json and the weights")
    try:
        validate_repo_id(name)
    except HFValidationError:
        name_is_repository = False
    else:
        name_is_repository = name.count("/") == 1
    if not name_is_repository:
        raise FileNotFoundError(f"no folder {name!r}; expected a checkpoint folder or a Hub repository 'owner/name'")
    try:
        return _download(name, revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no folder {name!r}, and the Hub repository of that name is not available ({reason}); "
            "check the name, or download it first and give its folder"
        ) from error


def _download(repository: str, revision: str | None) -> Path:
    # "consolidated" files are a second copy of the weights in Mistral's own format.
    skipped = ["consolidated*", "original/*", "*.gguf"]
    small = ["*.json", "*.jinja", "*.metadata", "*.model", "*.txt", "LICENSE*", "NOTICE*"]
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=small))
    for weights in ("*.safetensors", "*.bin", "*.dnn"):
        # The snapshot folder is named after the commit: all files come from the same one.
        snapshot_download(repository, revision=folder.name, allow_patterns=[weights], ignore_patterns=skipped)
        if any(folder.rglob(weights)):
            break
    return folder


@dataclass(frozen=True)
class TensorEntry:
    """Where a stored tensor is, and what it looks like."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointReader:
    """The tensors of one checkpoint folder, by name, read one at a time.

    Reads `<stem>.safetensors`, `<stem>.bin` and sharded forms of both (`*.index.json`); safetensors come first where a
    folder holds both. Of a training checkpoint with a `model_state_dict` it reads that. Files are memory-mapped: `read`
    costs memory only for what is touched, until `close`.

    Args:
        folder: the folder, or one file of weights.
        stems: file names without extension, in order of preference.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ConversionError: a damaged file, or an index that does not describe its shards.
    """

    def __init__(self, folder: Path, stems: Sequence[str] = ("model", "pytorch_model")):
        self.folder = folder
        self._open_files: dict[Path, Any] = {}
        self.entries: dict[str, TensorEntry] = {}
        index = None
        for file in self._weight_files(stems):
            if file.name.endswith(".index.json"):
                index = read_json(file).get("weight_map")
                if not isinstance(index, dict):
                    raise ConversionError(f"{file} has no 'weight_map'; download or write it again")
                for shard in sorted(set(index.values())):
                    self._list(folder / shard)
            else:
                self._list(file)
        if index is not None:
            self._check_index(index)
        self.close()

    @staticmethod
    def has_weights(folder: Path, stems: Sequence[str] = ("model", "pytorch_model")) -> bool:
        """Whether the folder holds weight files under one of the names."""
        return any(path.exists() for path in _candidate_files(folder, stems))

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str) -> torch.Tensor:
        """The tensor, as stored; a view of the mapped file."""
        file = self.entries[name].file
        opened = self._open(file)
        return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def release(self, names: Sequence[str]) -> None:
        """Give back the memory of tensors that were read and copied, where mapping their file again costs nothing."""
        for file in {self.entries[name].file for name in names}:
            if file.suffix == ".safetensors":
                self._open_files.pop(file, None)

    def close(self) -> None:
        """Unmap the files (as soon as the tensors that were read are gone); the next `read` maps them again."""
        self._open_files.clear()

    def _weight_files(self, stems: Sequence[str]) -> list[Path]:
        if self.folder.is_file():
            return [self.folder]
        for path in _candidate_files(self.folder, stems):
            if path.exists():
                return [path]
        expected = ", ".join(path.name for path in _candidate_files(self.folder, stems))
        raise FileNotFoundError(f"no weights in {self.folder}; expected one of {expected}")

    def _list(self, file: Path) -> None:
        opened = self._open(file)
        for name in list(opened.keys()):
            tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
            if not isinstance(tensor, torch.Tensor):
                raise ConversionError(f"{file}: {name!r} is a {type(tensor).__name__}; expected only tensors")
            if name in self.entries:
                raise ConversionError(f"{name!r} is stored twice, in {self.entries[name].file.name} and {file.name}")
            self.entries[name] = TensorEntry(file, tuple(tensor.shape), tensor.dtype)

    def _check_index(self, index: Mapping[str, str]) -> None:
        stored = {name: entry.file.name for name, entry in self.entries.items()}
        if stored != dict(index):
            wrong = [name for name in {**stored, **index} if stored.get(name) != index.get(name)]
            raise ConversionError(
                f"the index in {self.folder} and its shards disagree about {listed(wrong)}; download them again"
            )

    def _open(self, file: Path) -> Any:
        if file not in self._open_files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing, but the index in its folder names it; download it again")
            self._open_files[file] = _open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file)
        return self._open_files[file]


class RenamedTensors(CheckpointReader):
    """The tensors of one or several files, under other names.

    Args:
        folder: named in error messages.
        parts: the readers, each with the function from its names to ours.
    """

    def __init__(self, folder: Path, parts: Iterable[tuple[CheckpointReader, Callable[[str], str]]]):
        self.folder = folder
        self.entries: dict[str, TensorEntry] = {}
        self._stored: dict[str, tuple[CheckpointReader, str]] = {}
        for reader, renamed in parts:
            for name, entry in reader.entries.items():
                if renamed(name) in self.entries:
                    raise ConversionError(f"{folder} holds {renamed(name)} twice; expected each tensor once")
                self.entries[renamed(name)] = entry
                self._stored[renamed(name)] = (reader, name)

    def read(self, name: str) -> torch.Tensor:
        reader, stored = self._stored[name]
        return reader.read(stored)

    def release(self, names: Sequence[str]) -> None:
        for name in names:
            reader, stored = self._stored[name]
            reader.release([stored])

    def close(self) -> None:
        for reader, _ in self._stored.values():
            reader.close()


def _candidate_files(folder: Path, stems: Sequence[str]) -> list[Path]:
    names = []
    for extension in ("safetensors", "bin"):
        for stem in stems:
            names += [f"{stem}.{extension}", f"{stem}.{extension}.index.json"]
    return [folder / name for name in names]


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ConversionError(_damaged(file, error)) from error


def _open_bin(file: Path) -> dict[str, torch.Tensor]:
    content = read_pickle(file)
    weights = content.get("model_state_dict", content)
    if not isinstance(weights, dict):
        raise ConversionError(f"{file}: model_state_dict is a {type(weights).__name__}; expected a dict of tensors")
    return weights


def read_pickle(file: Path) -> dict[str, Any]:
    """The dict in a file of `torch.save`, read without running code; its tensors are memory-mapped."""
    # Files of the format before torch 1.6 are not zip archives and cannot be mapped.
    mapped = zipfile.is_zipfile(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        raise ConversionError(_damaged(file, error)) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds a {type(content).__name__}; expected a dict of tensors")
    return content


def _damaged(file: Path, error: Exception) -> str:
    with open(file, "rb") as stream:
        is_pointer = stream.read(40).startswith(b"version https://git-lfs")
    if is_pointer:
        return f"{file} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{file} is damaged, truncated or not a weight file ({reason}); download it again"
