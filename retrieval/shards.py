"""Folders of shards: what the containers of all kinds of representations have in common, in memory and on disk.

A folder holds `embeddings.json` (kind, model fingerprint, counts, versions, list of shards) and
`shard-00000.safetensors`, … with the rows of consecutive texts and their identifiers (`id_bytes` uint8, UTF-8, and
`id_offsets` int64).
"""

from __future__ import annotations

import bisect
import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np

from rarezoo.retrieval import storage
from rarezoo.retrieval.identifiers import PackedIds, SeenIds

if TYPE_CHECKING:
    from typing_extensions import Self

MANIFEST_NAME = "embeddings.json"
FORMAT_VERSION = 1
ID_TENSORS: dict[str, type] = {"id_bytes": np.uint8, "id_offsets": np.int64}


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def list_shards(folder: Path) -> list[str]:
    """Names of the shards that lie in `folder`, listed in its manifest or not."""
    return sorted(path.name for path in folder.glob("shard-*.safetensors"))


def write_shard(path: Path, ids: Sequence[str], tensors: dict[str, np.ndarray], source: str) -> None:
    """Write one shard, whole or not at all; `source` as in `storage.write_tensors`."""
    packed = PackedIds.pack(ids)
    storage.write_tensors(path, {**tensors, "id_bytes": packed.id_bytes, "id_offsets": packed.id_offsets}, source)


def write_manifest(
    folder: Path, num_shards: int, kind: str, tensors: Mapping[str, type], counted: tuple[str, str], **fields: Any
) -> None:
    """List the shards that lie in `folder`, with their counts and sizes, in its manifest.

    Args:
        folder: which holds the shards 0 to `num_shards` - 1.
        num_shards: how many.
        kind: of representation.
        tensors: types of a shard's tensors.
        counted: name of the count of stored values, and the tensor as long as that.
        fields: entries between the kind and the counts; `complete` among them.
    """
    from rarezoo import __version__

    count, tensor = counted
    shards: list[dict[str, Any]] = []
    for number in range(num_shards):
        path = folder / shard_name(number)
        stored = storage.map_tensors(path, tensors)
        shards.append(
            {
                "file": path.name,
                "num_documents": len(stored["id_offsets"]) - 1,
                count: len(stored[tensor]),
                "num_bytes": path.stat().st_size,
            }
        )
    manifest = {
        "format": f"rarezoo.{kind.replace('-', '_')}_embeddings",
        "format_version": FORMAT_VERSION,
        "kind": kind,
        **fields,
        "num_documents": sum(shard["num_documents"] for shard in shards),
        count: sum(shard[count] for shard in shards),
        "versions": {"rarezoo": __version__},
        "shards": shards,
    }
    storage.write_json(folder / MANIFEST_NAME, manifest)


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """`storage.read_manifest` of a folder of embeddings."""
    return storage.read_manifest(folder / MANIFEST_NAME, kind, f"{kind} embeddings", FORMAT_VERSION)


def listed_shards(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Path and row of every shard that the manifest of a finished folder lists.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: the encoding job has not finished, or a shard is truncated.
    """
    if not manifest["complete"]:
        raise ValueError(
            f"the encoding job in {folder} has not finished: run it again with the same settings and it resumes"
        )
    for row in manifest["shards"]:
        path = folder / row["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {MANIFEST_NAME} lists it")
        if path.stat().st_size != row["num_bytes"]:
            raise ValueError(
                f"{path} is damaged or truncated: {path.stat().st_size} bytes, expected {row['num_bytes']}"
            )
        yield path, row


class Shard(ABC):
    """The rows of consecutive texts: a file that is opened when first touched, or rows in memory.

    Attributes:
        num_documents: number of texts.
        path: the file; None in memory.
    """

    def __init__(self, num_documents: int, path: Path | None):
        self.num_documents = num_documents
        self.path = path

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """The file's tensors, their shapes and offsets checked."""
        assert self.path is not None
        tensors = self._map_tensors(self.path)
        storage.check_shapes(self.path, tensors, {"id_offsets": (self.num_documents + 1,)})
        storage.check_offsets(self.path, "id_offsets", tensors["id_offsets"], len(tensors["id_bytes"]))
        return tensors

    @abstractmethod
    def _map_tensors(self, path: Path) -> dict[str, np.ndarray]:
        """The tensors, those checked that the kind of representation brings."""

    @abstractmethod
    def _problem(self) -> str | None:
        """What is wrong with the values; None where nothing is."""

    @cached_property
    def ids(self) -> Sequence[str]:
        return PackedIds(self.tensors["id_bytes"], self.tensors["id_offsets"])

    def verify(self) -> None:
        """Read everything: checksum and values."""
        if self.path is None:
            return
        storage.verify_checksum(self.path, self.tensors)
        problem = self._problem()
        if problem:
            raise ValueError(f"{self.path} is damaged: {problem}")


ShardT = TypeVar("ShardT", bound=Shard)


class ShardedEmbeddings(ABC, Generic[ShardT]):
    """Texts in shards, with identifiers, in memory or memory-mapped: what all kinds of containers have.

    Attributes:
        fingerprint: the model's, from `model_fingerprint`; None when the vectors' origin is unknown.
    """

    fingerprint: str | None
    default_shard_size: int

    def _set_shards(self, shards: list[ShardT]) -> None:
        self._shards = shards
        self._starts = np.concatenate([[0], np.cumsum([shard.num_documents for shard in shards], dtype=np.int64)])

    def _with_shards(self, shards: list[ShardT]) -> Self:
        """A container like this one, of other rows."""
        embeddings = copy.copy(self)
        embeddings._set_shards(shards)
        return embeddings

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def ids(self) -> Sequence[str]:
        """The n identifiers in order."""
        return self._shards[0].ids if len(self._shards) == 1 else _ShardedIds(self._shards, self._starts)

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> Self:
        """Texts by position, slice, positions or boolean mask, as a container in memory, in the order asked for."""
        return self._take(np.atleast_1d(np.arange(len(self))[rows]))

    @abstractmethod
    def _take(self, positions: np.ndarray) -> Self:
        """The texts at these positions, in memory."""

    def _ids_at(self, positions: np.ndarray) -> list[str]:
        ids = self.ids
        return [ids[int(position)] for position in positions]

    def iter_shards(self, verify: bool = False) -> Iterator[Self]:
        """The shards in order, each a container of its own (still memory-mapped when this one is).

        Args:
            verify: read each shard and check its checksum and its values first; a ValueError names the file.
        """
        for shard in self._shards:
            if verify:
                shard.verify()
            yield self._with_shards([shard])

    def save(self, folder: str | os.PathLike[str], shard_size: int | None = None) -> None:
        """Write a new folder of shards with at most `shard_size` texts each; whole or not at all.

        Args:
            folder: new or empty.
            shard_size: by default `default_shard_size`.

        Raises:
            FileExistsError: `folder` exists and is not empty.
            CannotWriteError: full disk or read-only folder.
        """
        shard_size = self.default_shard_size if shard_size is None else shard_size
        if shard_size < 1:
            raise ValueError(f"expected shard_size >= 1, found {shard_size}")
        with storage.folder_written_beside(Path(folder)) as partial:
            starts = range(0, len(self), shard_size)
            for number, start in enumerate(starts):
                self[start : start + shard_size]._write_shard(partial / shard_name(number))
            self._write_manifest(partial, len(starts))

    @abstractmethod
    def _write_shard(self, path: Path) -> None:
        """Write all rows into one shard."""

    @abstractmethod
    def _write_manifest(self, folder: Path, num_shards: int) -> None:
        """Write the manifest of finished shards."""

    @classmethod
    def open(cls, folder: str | os.PathLike[str], mmap: bool = True) -> Self:
        """Open a folder written by `save` or `encode_corpus`; memory-mapped, nothing is read until it is used.

        Args:
            folder: the folder.
            mmap: map the files; False reads them into memory when they are used.

        Raises:
            FileNotFoundError: no such folder, no manifest, or a shard is missing.
            ValueError: the folder is of another kind or unfinished, or a shard is truncated.
        """
        embeddings = cls.__new__(cls)
        embeddings._open(Path(folder), mmap)
        return embeddings

    @abstractmethod
    def _open(self, folder: Path, mmap: bool) -> None:
        """Set all attributes."""

    def verify(self) -> None:
        """Read every shard and check its checksum, its values and that no identifier comes twice.

        Raises:
            ValueError: names the file and what is wrong with it.
        """
        seen = SeenIds()
        for shard in self.iter_shards(verify=True):
            seen.add(shard.ids)


def check_alike(parts: Sequence[ShardedEmbeddings], names: Sequence[str]) -> None:
    """That there are containers to concatenate, and that these attributes of theirs are equal; else a ValueError."""
    if not parts:
        raise ValueError("expected at least one container to concatenate, found none")
    for name in names:
        values = {getattr(part, name) for part in parts}
        if len(values) > 1:
            raise ValueError(f"cannot concatenate embeddings with different {name}: {sorted(map(str, values))}")


class _ShardedIds(Sequence[str]):
    """The identifiers of several shards as one sequence, each shard opened when first touched."""

    def __init__(self, shards: Sequence[Shard], starts: np.ndarray):
        self._shards = shards
        self._starts = starts

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, position: int) -> str: ...
    @overload
    def __getitem__(self, position: slice) -> list[str]: ...
    def __getitem__(self, position: int | slice) -> str | list[str]:
        if isinstance(position, slice):
            return [self[row] for row in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of {len(self)} identifiers")
        position %= len(self)
        shard = bisect.bisect_right(self._starts, position) - 1
        return self._shards[shard].ids[position - int(self._starts[shard])]

    def __iter__(self) -> Iterator[str]:
        for shard in self._shards:
            yield from shard.ids
