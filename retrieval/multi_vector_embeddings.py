"""The container for multi-vector representations: identifiers and packed rows, in memory or memory-mapped.

Every text has some vectors, possibly none. They lie one below the other, without padding; `lengths` tells how many
belong to each text. On disk a container is a folder: `embeddings.json` (kind, model fingerprint, counts, versions, list
of shards) and `shard-00000.safetensors`, … with the rows of consecutive texts:

    vectors     float32 or float16  (tokens, dim)
    lengths     int32               (texts,)
    id_bytes    uint8               identifiers, UTF-8
    id_offsets  int64               (texts + 1,)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rarezoo.retrieval import storage
from rarezoo.retrieval.sparse_embeddings import (
    MANIFEST_NAME,
    PackedIds,
    SeenIds,
    _ShardedIds,
    listed_ids,
    shard_name,
)

KIND = "multi-vector"
FORMAT_VERSION = 1
_DTYPES: dict[str, type] = {"float32": np.float32, "float16": np.float16}


def packed_rows(vectors: Any) -> np.ndarray:
    """Two-dimensional, contiguous rows, float32 or float16 (of other floating-point types float32).

    Args:
        vectors: (tokens, dim), an array or a torch tensor on any device.

    Raises:
        TypeError: not floating-point numbers.
        ValueError: not two-dimensional, or without columns.
    """
    if hasattr(vectors, "detach"):
        vectors = vectors.detach().cpu()
        vectors = vectors.numpy() if str(vectors.dtype) != "torch.bfloat16" else vectors.float().numpy()
    vectors = np.asarray(vectors)
    if not np.issubdtype(vectors.dtype, np.floating):
        raise TypeError(f"expected vectors of a floating-point type, found {vectors.dtype}")
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ValueError(f"expected packed vectors (tokens, dim), found the shape {vectors.shape}")
    if vectors.dtype.name not in _DTYPES:
        vectors = vectors.astype(np.float32)
    return np.ascontiguousarray(vectors)


def canonical_vectors(vectors: Any, lengths: Any, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`packed_rows` and their int32 lengths, checked.

    Args:
        vectors: (tokens, dim).
        lengths: (n,) integers, how many rows belong to each text; 0 for texts without vectors.
        ids: n identifiers.

    Raises:
        TypeError: types that are not numbers.
        ValueError: counts differ, or a vector is not finite.
    """
    rows = packed_rows(vectors)
    counts = np.asarray(lengths.cpu() if hasattr(lengths, "cpu") else lengths)
    if counts.ndim != 1 or not (np.issubdtype(counts.dtype, np.integer) or counts.size == 0):
        raise TypeError(f"expected lengths (n,) as integers, found {counts.dtype} of the shape {counts.shape}")
    if len(ids) != len(counts):
        raise ValueError(f"expected one identifier per text, found {len(ids)} for {len(counts)} lengths")
    if (counts < 0).any() or int(counts.sum()) != len(rows):
        raise ValueError(f"expected lengths >= 0 that add up to {len(rows)} vectors, found the sum {int(counts.sum())}")
    counts = counts.astype(np.int32)
    problem = _problem(rows, counts, ids)
    if problem:
        raise ValueError(f"not multi-vector embeddings: {problem}")
    return rows, counts


def _problem(vectors: np.ndarray, lengths: np.ndarray, ids: Sequence[str]) -> str | None:
    """Which vector is not finite; a sum finds most such at once, and cheaply."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.sum(vectors, dtype=np.float32)) or np.isfinite(vectors).all():
            return None
    token = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
    text = int(np.searchsorted(np.cumsum(lengths), token, side="right"))
    return f"vector {token} (of text {text}, {ids[text]!r}) is not finite"


def write_shard(path: Path, ids: Sequence[str], vectors: np.ndarray, lengths: np.ndarray, source: str = "") -> None:
    """Write one shard, whole or not at all. `vectors` and `lengths` are as `canonical_vectors` gives them."""
    packed = PackedIds.pack(ids)
    tensors = {
        "vectors": np.ascontiguousarray(vectors),
        "lengths": np.ascontiguousarray(lengths, dtype=np.int32),
        "id_bytes": packed.id_bytes,
        "id_offsets": packed.id_offsets,
    }
    storage.write_tensors(path, tensors, source)


def _shard_tensors(dtype: str) -> dict[str, type]:
    return {"vectors": _DTYPES[dtype], "lengths": np.int32, "id_bytes": np.uint8, "id_offsets": np.int64}


def write_manifest(
    folder: Path, num_shards: int, dim: int, vectors_dtype: str, *, complete: bool = True, **fields: Any
) -> None:
    """List the shards that lie in `folder`, with their counts and sizes, in its manifest."""
    from rarezoo import __version__

    shards: list[dict[str, Any]] = []
    for number in range(num_shards):
        path = folder / shard_name(number)
        tensors = storage.map_tensors(path, _shard_tensors(vectors_dtype))
        shards.append(
            {
                "file": path.name,
                "num_documents": len(tensors["lengths"]),
                "num_vectors": len(tensors["vectors"]),
                "num_bytes": path.stat().st_size,
            }
        )
    manifest = {
        "format": "rarezoo.multi_vector_embeddings",
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "complete": complete,
        **fields,
        "dim": dim,
        "vectors_dtype": vectors_dtype,
        "num_documents": sum(shard["num_documents"] for shard in shards),
        "num_vectors": sum(shard["num_vectors"] for shard in shards),
        "versions": {"rarezoo": __version__},
        "shards": shards,
    }
    storage.write_json(folder / MANIFEST_NAME, manifest)


def read_manifest_of_kind(path: Path, contents: str, format_version: int) -> dict[str, Any]:
    """Read the manifest of a folder of multi-vectors or of an index of such, if this release can read the rest.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is damaged, of another kind or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {contents}: {path.name} is missing")
    manifest = storage.read_json(path)
    if manifest.get("kind") != KIND:
        raise ValueError(f"{path}: expected kind {KIND!r}, found {manifest.get('kind')!r}")
    if manifest.get("format_version") != format_version:
        raise ValueError(
            f"{path}: format version {manifest.get('format_version')!r}, this rarezoo reads version {format_version}"
        )
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of embeddings; see `read_manifest_of_kind`."""
    manifest = read_manifest_of_kind(folder / MANIFEST_NAME, "multi-vector embeddings", FORMAT_VERSION)
    if manifest["vectors_dtype"] not in _DTYPES:
        raise ValueError(f"{folder / MANIFEST_NAME} is damaged: vectors_dtype {manifest['vectors_dtype']!r}")
    return manifest


class _Shard:
    """Consecutive texts: a file that is opened when first touched, or rows in memory."""

    def __init__(
        self, num_documents: int, num_vectors: int, dim: int, dtype: str, path: Path | None, mmap: bool = True
    ):
        self.num_documents = num_documents
        self.num_vectors = num_vectors
        self.dim = dim
        self.dtype = dtype
        self.path = path
        self._mmap = mmap

    @classmethod
    def in_memory(cls, ids: Sequence[str], vectors: np.ndarray, lengths: np.ndarray) -> _Shard:
        shard = cls(len(lengths), len(vectors), vectors.shape[1], vectors.dtype.name, path=None)
        shard.ids = ids
        shard.tensors = {"vectors": vectors, "lengths": lengths}
        return shard

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        assert self.path is not None
        tensors = storage.map_tensors(self.path, _shard_tensors(self.dtype), self._mmap)
        expected_shapes = {
            "vectors": (self.num_vectors, self.dim),
            "lengths": (self.num_documents,),
            "id_offsets": (self.num_documents + 1,),
        }
        for name, shape in expected_shapes.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{self.path} is damaged: '{name}' has the shape {tensors[name].shape}, not {shape}")
        lengths, offsets = tensors["lengths"], tensors["id_offsets"]
        if (lengths < 0).any() or lengths.sum(dtype=np.int64) != self.num_vectors:
            raise ValueError(f"{self.path} is damaged: 'lengths' does not add up to {self.num_vectors} vectors")
        if offsets[0] != 0 or offsets[-1] != len(tensors["id_bytes"]) or (np.diff(offsets) < 0).any():
            raise ValueError(f"{self.path} is damaged: 'id_offsets' does not increase from 0 to the end")
        return tensors

    @cached_property
    def ids(self) -> Sequence[str]:
        return PackedIds(self.tensors["id_bytes"], self.tensors["id_offsets"])

    @cached_property
    def offsets(self) -> np.ndarray:
        """(texts + 1,) int64: where the rows of each text begin, and the end."""
        return np.concatenate([[0], np.cumsum(self.tensors["lengths"], dtype=np.int64)])

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The rows of some texts, one below the other, copied."""
        starts, ends = self.offsets[positions], self.offsets[positions + 1]
        vectors = self.tensors["vectors"]
        return np.concatenate([vectors[:0], *(vectors[start:end] for start, end in zip(starts, ends))])

    def verify(self) -> None:
        """Read everything: checksum and values."""
        if self.path is None:
            return
        storage.verify_checksum(self.path, self.tensors)
        problem = _problem(self.tensors["vectors"], self.tensors["lengths"], self.ids)
        if problem:
            raise ValueError(f"{self.path} is damaged: {problem}")


class MultiVectorEmbeddings:
    """Several vectors per text, with identifiers: packed rows (tokens, dim), in memory or memory-mapped.

    Args:
        ids: n distinct strings.
        vectors: (tokens, dim) float32 or float16 (other floating-point types become float32), an array or a tensor.
        lengths: (n,) integers, how many of the rows belong to each text; 0 is allowed.
        fingerprint: the model's, from `model_fingerprint`; None when the vectors' origin is unknown.

    Raises:
        ValueError: counts differ, an identifier comes twice, or a vector is not finite.
        TypeError: `ids` is one string, an identifier is not a string, or the vectors are not floating-point numbers.
    """

    def __init__(self, ids: Sequence[str], vectors: Any, lengths: Any, fingerprint: str | None = None):
        ids = listed_ids(ids)
        rows, counts = canonical_vectors(vectors, lengths, ids)
        SeenIds().add(ids)
        self._set_shards([_Shard.in_memory(ids, rows, counts)], rows.shape[1], rows.dtype.name, fingerprint)

    def _set_shards(self, shards: list[_Shard], dim: int, dtype: str, fingerprint: str | None) -> None:
        self._shards = shards
        self._starts = np.concatenate([[0], np.cumsum([shard.num_documents for shard in shards], dtype=np.int64)])
        self.dim = dim
        self.dtype = np.dtype(dtype)
        self.fingerprint = fingerprint

    @classmethod
    def _from_shards(cls, shards: list[_Shard], dim: int, dtype: str, fingerprint: str | None) -> MultiVectorEmbeddings:
        embeddings = cls.__new__(cls)
        embeddings._set_shards(shards, dim, dtype, fingerprint)
        return embeddings

    @classmethod
    def from_list(
        cls, ids: Sequence[str], rows: Sequence[Any], fingerprint: str | None = None
    ) -> MultiVectorEmbeddings:
        """Pack one array or tensor (length, dim) per text.

        Raises:
            ValueError: no texts (their dimension is then unknown), other dimensions, or as the constructor.
        """
        arrays = [packed_rows(array) for array in rows]
        dims = sorted({array.shape[1] for array in arrays})
        if len(dims) != 1:
            raise ValueError(f"expected at least one text, and vectors of one dimension; found the dimensions {dims}")
        return cls(ids, np.concatenate(arrays), np.array([len(array) for array in arrays], dtype=np.int32), fingerprint)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"MultiVectorEmbeddings({len(self)} texts, {self.num_vectors} vectors, dim={self.dim}, {self.dtype})"

    @property
    def num_vectors(self) -> int:
        """Number of rows of all texts."""
        return sum(shard.num_vectors for shard in self._shards)

    @property
    def ids(self) -> Sequence[str]:
        """The n identifiers in order."""
        # _ShardedIds asks of a shard no more than its identifiers.
        return self._shards[0].ids if len(self._shards) == 1 else _ShardedIds(self._shards, self._starts)  # type: ignore[arg-type]

    @property
    def vectors(self) -> np.ndarray:
        """All rows, (tokens, dim). Of several shards this is a copy in memory: see `iter_shards`."""
        if len(self._shards) == 1:
            return self._shards[0].tensors["vectors"]
        empty = np.empty((0, self.dim), dtype=self.dtype)
        return np.concatenate([empty, *(shard.tensors["vectors"] for shard in self._shards)])

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int32: how many rows belong to each text."""
        return np.concatenate([np.empty(0, dtype=np.int32), *(shard.tensors["lengths"] for shard in self._shards)])

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """(identifier, rows (length, dim)) of every text; the rows are views, memory-mapped where the container is."""
        for shard in self._shards:
            for row, identifier in enumerate(shard.ids):
                yield identifier, shard.tensors["vectors"][shard.offsets[row] : shard.offsets[row + 1]]

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> MultiVectorEmbeddings:
        """Texts by position, slice, positions or boolean mask, as a container in memory, in the order asked for."""
        return self._take(np.atleast_1d(np.arange(len(self))[rows]))

    def _take(self, positions: np.ndarray) -> MultiVectorEmbeddings:
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        # Runs of texts in one shard, in the order asked for: mostly one run per shard.
        boundaries = np.flatnonzero(np.diff(numbers)) + 1
        parts = [np.empty((0, self.dim), dtype=self.dtype)]
        lengths = [np.empty(0, dtype=np.int32)]
        for run in np.split(np.arange(len(positions)), boundaries):
            if len(run):
                shard = self._shards[numbers[run[0]]]
                inside = positions[run] - self._starts[numbers[run[0]]]
                parts.append(shard.take(inside))
                lengths.append(shard.tensors["lengths"][inside])
        all_ids = self.ids
        ids = [all_ids[int(position)] for position in positions]
        return MultiVectorEmbeddings(ids, np.concatenate(parts), np.concatenate(lengths), self.fingerprint)

    def iter_shards(self, verify: bool = False) -> Iterator[MultiVectorEmbeddings]:
        """The shards in order, each a container of its own (still memory-mapped when this one is).

        Args:
            verify: read each shard and check its checksum and its values first; a ValueError names the file.
        """
        for shard in self._shards:
            if verify:
                shard.verify()
            yield self._from_shards([shard], self.dim, self.dtype.name, self.fingerprint)

    @staticmethod
    def concatenate(parts: Sequence[MultiVectorEmbeddings]) -> MultiVectorEmbeddings:
        """One container of all texts, in order, in memory; of float32 and float16 parts it is float32.

        Raises:
            ValueError: no parts, other dimensions, other models, or an identifier in two parts.
        """
        if not parts:
            raise ValueError("expected at least one container to concatenate, found none")
        for name in ("dim", "fingerprint"):
            values = {getattr(part, name) for part in parts}
            if len(values) > 1:
                raise ValueError(f"cannot concatenate embeddings with different {name}: {sorted(map(str, values))}")
        ids = [identifier for part in parts for identifier in part.ids]
        vectors = np.concatenate([part.vectors for part in parts])
        lengths = np.concatenate([part.lengths for part in parts])
        return MultiVectorEmbeddings(ids, vectors, lengths, parts[0].fingerprint)

    def save(self, folder: str | os.PathLike[str], shard_size: int = 8192) -> None:
        """Write a new folder of shards with at most `shard_size` texts each; whole or not at all.

        Raises:
            FileExistsError: `folder` exists and is not empty.
            OSError: it cannot be written.
        """
        if shard_size < 1:
            raise ValueError(f"expected shard_size >= 1, found {shard_size}")
        with storage.folder_written_beside(Path(folder)) as partial:
            starts = range(0, len(self), shard_size)
            for number, start in enumerate(starts):
                part = self[start : start + shard_size]
                write_shard(partial / shard_name(number), part.ids, part.vectors, part.lengths)
            write_manifest(partial, len(starts), self.dim, self.dtype.name, fingerprint=self.fingerprint)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], mmap: bool = True) -> MultiVectorEmbeddings:
        """Open a folder written by `save` or by an encoding job; memory-mapped, nothing is read until it is used.

        Args:
            folder: the folder.
            mmap: map the files; False reads them into memory when they are used.

        Raises:
            FileNotFoundError: no such folder, no manifest, or a shard is missing.
            ValueError: the folder is of another kind or unfinished, or a shard is truncated.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            raise ValueError(
                f"the encoding job in {folder} has not finished: run it again with the same settings and it resumes"
            )
        dim, dtype = manifest["dim"], manifest["vectors_dtype"]
        shards = []
        for row in manifest["shards"]:
            path = folder / row["file"]
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, though {MANIFEST_NAME} lists it")
            if path.stat().st_size != row["num_bytes"]:
                raise ValueError(
                    f"{path} is damaged or truncated: {path.stat().st_size} bytes, expected {row['num_bytes']}"
                )
            shards.append(_Shard(row["num_documents"], row["num_vectors"], dim, dtype, path, mmap))
        return cls._from_shards(shards, dim, dtype, manifest["fingerprint"])

    def verify(self) -> None:
        """Read every shard and check its checksum, its values and that no identifier comes twice.

        Raises:
            ValueError: names the file and what is wrong with it.
        """
        seen = SeenIds()
        for shard in self.iter_shards(verify=True):
            seen.add(shard.ids)
