"""The container for multi-vector representations: identifiers and packed rows, in memory or memory-mapped.

Every text has some vectors, possibly none. They lie one below the other, without padding; `lengths` tells how many
belong to each text. On disk a container is a folder of `shards`. Each shard holds the rows of consecutive texts:

    vectors     float32 or float16  (tokens, dim)
    lengths     int32               (texts,)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rarezoo.retrieval import shards, storage
from rarezoo.retrieval.identifiers import SeenIds, listed_ids
from rarezoo.retrieval.shards import MANIFEST_NAME

if TYPE_CHECKING:
    from typing_extensions import Self

KIND = "multi-vector"
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
    tensors = {
        "vectors": np.ascontiguousarray(vectors),
        "lengths": np.ascontiguousarray(lengths, dtype=np.int32),
    }
    shards.write_shard(path, ids, tensors, source)


def _shard_tensors(dtype: str) -> dict[str, type]:
    return {"vectors": _DTYPES[dtype], "lengths": np.int32, **shards.ID_TENSORS}


def write_manifest(
    folder: Path, num_shards: int, dim: int, vectors_dtype: str, *, complete: bool = True, **fields: Any
) -> None:
    """List the shards that lie in `folder`, with their counts and sizes, in its manifest."""
    fields = {"complete": complete, **fields, "dim": dim, "vectors_dtype": vectors_dtype}
    shards.write_manifest(folder, num_shards, KIND, _shard_tensors(vectors_dtype), ("num_vectors", "vectors"), **fields)


def read_manifest(folder: Path) -> dict[str, Any]:
    """`storage.read_manifest` of a folder of multi-vector embeddings."""
    manifest = shards.read_manifest(folder, KIND)
    if manifest["vectors_dtype"] not in _DTYPES:
        raise ValueError(f"{folder / MANIFEST_NAME} is damaged: vectors_dtype {manifest['vectors_dtype']!r}")
    return manifest


class _Shard(shards.Shard):
    """Consecutive texts."""

    def __init__(
        self, num_documents: int, num_vectors: int, dim: int, dtype: str, path: Path | None, mmap: bool = True
    ):
        super().__init__(num_documents, path)
        self.num_vectors = num_vectors
        self.dim = dim
        self.dtype = dtype
        self._mmap = mmap

    @classmethod
    def in_memory(cls, ids: Sequence[str], vectors: np.ndarray, lengths: np.ndarray) -> _Shard:
        shard = cls(len(lengths), len(vectors), vectors.shape[1], vectors.dtype.name, path=None)
        shard.ids = ids
        shard.tensors = {"vectors": vectors, "lengths": lengths}
        return shard

    def _map_tensors(self, path: Path) -> dict[str, np.ndarray]:
        tensors = storage.map_tensors(path, _shard_tensors(self.dtype), self._mmap)
        shapes = {"vectors": (self.num_vectors, self.dim), "lengths": (self.num_documents,)}
        storage.check_shapes(path, tensors, shapes)
        lengths = tensors["lengths"]
        if (lengths < 0).any() or lengths.sum(dtype=np.int64) != self.num_vectors:
            raise ValueError(f"{path} is damaged: 'lengths' does not add up to {self.num_vectors} vectors")
        return tensors

    @cached_property
    def offsets(self) -> np.ndarray:
        """(texts + 1,) int64: where the rows of each text begin, and the end."""
        return np.concatenate([[0], np.cumsum(self.tensors["lengths"], dtype=np.int64)])

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The rows of some texts, one below the other, copied."""
        starts, ends = self.offsets[positions], self.offsets[positions + 1]
        vectors = self.tensors["vectors"]
        return np.concatenate([vectors[:0], *(vectors[start:end] for start, end in zip(starts, ends))])

    def _problem(self) -> str | None:
        return _problem(self.tensors["vectors"], self.tensors["lengths"], self.ids)


class MultiVectorEmbeddings(shards.ShardedEmbeddings[_Shard]):
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

    default_shard_size = 8192

    def __init__(self, ids: Sequence[str], vectors: Any, lengths: Any, fingerprint: str | None = None):
        ids = listed_ids(ids)
        rows, counts = canonical_vectors(vectors, lengths, ids)
        SeenIds().add(ids)
        self._set_shards([_Shard.in_memory(ids, rows, counts)])
        self.dim = rows.shape[1]
        self.dtype = rows.dtype
        self.fingerprint = fingerprint

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

    def __repr__(self) -> str:
        return f"MultiVectorEmbeddings({len(self)} texts, {self.num_vectors} vectors, dim={self.dim}, {self.dtype})"

    @property
    def num_vectors(self) -> int:
        """Number of rows of all texts."""
        return sum(shard.num_vectors for shard in self._shards)

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

    def _take(self, positions: np.ndarray) -> Self:
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
        vectors, counts = np.concatenate(parts), np.concatenate(lengths)
        return type(self)(self._ids_at(positions), vectors, counts, self.fingerprint)

    @staticmethod
    def concatenate(parts: Sequence[MultiVectorEmbeddings]) -> MultiVectorEmbeddings:
        """One container of all texts, in order, in memory; of float32 and float16 parts it is float32.

        Raises:
            ValueError: no parts, other dimensions, other models, or an identifier in two parts.
        """
        shards.check_alike(parts, ("dim", "fingerprint"))
        ids = [identifier for part in parts for identifier in part.ids]
        vectors = np.concatenate([part.vectors for part in parts])
        lengths = np.concatenate([part.lengths for part in parts])
        return MultiVectorEmbeddings(ids, vectors, lengths, parts[0].fingerprint)

    def _write_shard(self, path: Path) -> None:
        write_shard(path, self.ids, self.vectors, self.lengths)

    def _write_manifest(self, folder: Path, num_shards: int) -> None:
        write_manifest(folder, num_shards, self.dim, self.dtype.name, fingerprint=self.fingerprint)

    def _open(self, folder: Path, mmap: bool) -> None:
        manifest = read_manifest(folder)
        dim, dtype = manifest["dim"], manifest["vectors_dtype"]
        self.dim = dim
        self.dtype = np.dtype(dtype)
        self.fingerprint = manifest["fingerprint"]
        listed = shards.listed_shards(folder, manifest)
        self._set_shards(
            [_Shard(row["num_documents"], row["num_vectors"], dim, dtype, path, mmap) for path, row in listed]
        )
