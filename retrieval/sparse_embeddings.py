"""The container for sparse vectors: identifiers and CSR rows, in memory or memory-mapped from safetensors shards.

On disk a container is a folder: `embeddings.json` (kind, model fingerprint, counts, versions, list of shards) and
`shard-00000.safetensors`, … Each shard holds the rows of consecutive texts as CSR (`indptr` int64, `indices` int32,
`data` float32) and their identifiers (`id_bytes`: UTF-8, `id_offsets` int64).
"""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import scipy.sparse

from rarezoo.retrieval import storage

MANIFEST_NAME = "embeddings.json"
FORMAT_VERSION = 1
_SHARD_TENSORS: dict[str, type] = {
    "indptr": np.int64,
    "indices": np.int32,
    "data": np.float32,
    "id_bytes": np.uint8,
    "id_offsets": np.int64,
}


class PackedIds(Sequence[str]):
    """Identifiers as UTF-8 bytes and offsets: a read-only sequence of strings that costs nothing to open.

    Args:
        id_bytes: (total bytes,) uint8.
        id_offsets: (n + 1,) int64, increasing, from 0 to the total.
    """

    def __init__(self, id_bytes: np.ndarray, id_offsets: np.ndarray):
        self.id_bytes = id_bytes
        self.id_offsets = id_offsets

    @classmethod
    def pack(cls, ids: Iterable[str]) -> PackedIds:
        """Pack strings; an identifier that is not a string is a TypeError."""
        encoded = []
        for identifier in ids:
            if not isinstance(identifier, str):
                raise TypeError(f"identifiers must be str, found {type(identifier).__name__}: {identifier!r}")
            encoded.append(identifier.encode("utf-8"))
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(identifier) for identifier in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.id_offsets) - 1

    @overload
    def __getitem__(self, position: int) -> str: ...
    @overload
    def __getitem__(self, position: slice) -> list[str]: ...
    def __getitem__(self, position: int | slice) -> str | list[str]:
        if isinstance(position, slice):
            return self.take(np.arange(len(self))[position])
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of {len(self)} identifiers")
        position %= len(self)
        return self.take(np.array([position]))[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.take(np.arange(len(self))))

    def take(self, positions: np.ndarray) -> list[str]:
        """The identifiers at these positions (not negative)."""
        buffer = self.id_bytes.data
        starts, ends = self.id_offsets[positions].tolist(), self.id_offsets[positions + 1].tolist()
        return [str(buffer[start:end], "utf-8") for start, end in zip(starts, ends)]


class _ShardedIds(Sequence[str]):
    """The identifiers of several shards as one sequence, each shard opened when first touched."""

    def __init__(self, shards: list[_Shard], starts: np.ndarray):
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


def listed_ids(ids: Iterable[str]) -> list[str]:
    """The identifiers as a list.

    Raises:
        TypeError: one string, which would be taken for its characters, or an identifier that is not a string.
    """
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"expected several identifiers, found the one {ids!r}: write [{ids!r}]")
    ids = list(ids)
    wrong = next((identifier for identifier in ids if not isinstance(identifier, str)), None)
    if wrong is not None:
        raise TypeError(f"identifiers must be str, found {type(wrong).__name__}: {wrong!r}")
    return ids


def digest_ids(ids: Iterable[str]) -> np.ndarray:
    """(n,) array of 16-byte BLAKE2b digests (numpy type "S16"): equal identifiers, equal digests."""
    return np.array([hashlib.blake2b(identifier.encode(), digest_size=16).digest() for identifier in ids], dtype="S16")


class SeenIds:
    """Notices an identifier that comes twice in a stream; holds 16 bytes per identifier, not the identifiers."""

    def __init__(self) -> None:
        self._digests = np.empty(0, dtype="S16")

    def add(self, ids: Sequence[str]) -> np.ndarray:
        """Take the next identifiers of the stream; returns their digests, in their order.

        Raises:
            ValueError: one of them has come before.
        """
        unsorted = digest_ids(ids)
        order = np.argsort(unsorted, kind="stable")
        digests = unsorted[order]
        positions = np.searchsorted(self._digests, digests)
        repeated = np.zeros(len(digests), dtype=bool)
        repeated[1:] = digests[1:] == digests[:-1]
        inside = positions < len(self._digests)
        repeated[inside] |= self._digests[positions[inside]] == digests[inside]
        if repeated.any():
            raise ValueError(f"duplicate identifier {ids[int(order[repeated].min())]!r}: every text needs its own")
        self._digests = np.insert(self._digests, positions, digests)
        return unsorted


class _Shard:
    """Consecutive rows: a file that is opened when first touched, or rows in memory."""

    def __init__(self, num_documents: int, num_postings: int, vocab_size: int, path: Path | None, mmap: bool = True):
        self.num_documents = num_documents
        self.num_postings = num_postings
        self.vocab_size = vocab_size
        self.path = path
        self._mmap = mmap

    @classmethod
    def in_memory(cls, ids: Sequence[str], matrix: scipy.sparse.csr_matrix) -> _Shard:
        shard = cls(matrix.shape[0], matrix.nnz, matrix.shape[1], path=None)
        shard.ids = ids
        shard.matrix = matrix
        return shard

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        assert self.path is not None
        tensors = storage.map_tensors(self.path, _SHARD_TENSORS, self._mmap)
        expected_lengths = {
            "indptr": self.num_documents + 1,
            "id_offsets": self.num_documents + 1,
            "indices": self.num_postings,
            "data": self.num_postings,
        }
        for name, length in expected_lengths.items():
            if len(tensors[name]) != length:
                raise ValueError(
                    f"{self.path} is damaged: '{name}' has {len(tensors[name])} entries, expected {length}"
                )
        for name, end in (("indptr", self.num_postings), ("id_offsets", len(tensors["id_bytes"]))):
            offsets = tensors[name]
            if offsets[0] != 0 or offsets[-1] != end or (offsets[1:] < offsets[:-1]).any():
                raise ValueError(f"{self.path} is damaged: '{name}' does not increase from 0 to {end}")
        return tensors

    @cached_property
    def ids(self) -> Sequence[str]:
        return PackedIds(self.tensors["id_bytes"], self.tensors["id_offsets"])

    @cached_property
    def matrix(self) -> scipy.sparse.csr_matrix:
        tensors = self.tensors
        matrix = scipy.sparse.csr_matrix(
            (tensors["data"], tensors["indices"], tensors["indptr"]), shape=(self.num_documents, self.vocab_size)
        )
        matrix.has_sorted_indices = True
        return matrix

    def verify(self) -> None:
        """Read everything: checksum, index range, weights."""
        if self.path is None:
            return
        storage.verify_checksum(self.path, self.tensors)
        problem = _problem(self.matrix, self.ids)
        if problem:
            raise ValueError(f"{self.path} is damaged: {problem}")


def _problem(matrix: scipy.sparse.csr_matrix, ids: Sequence[str]) -> str | None:
    """What is wrong with the entries of a CSR matrix that ought to hold sorted, positive, finite weights."""
    if matrix.nnz == 0:
        return None
    if matrix.indices.min() < 0 or matrix.indices.max() >= matrix.shape[1]:
        return f"a vocabulary index lies outside 0 … {matrix.shape[1] - 1}"
    wrong_weights = ~(np.isfinite(matrix.data) & (matrix.data > 0))
    if wrong_weights.any():
        entry = int(np.flatnonzero(wrong_weights)[0])
        weight = matrix.data[entry]
        return f"{_row_name(matrix, entry, ids)} holds the weight {weight}; weights must be positive and finite"
    increasing = matrix.indices[1:] > matrix.indices[:-1]
    row_starts = matrix.indptr[1:-1]
    row_starts = row_starts[(row_starts > 0) & (row_starts < matrix.nnz)]
    increasing[row_starts - 1] = True
    if not increasing.all():
        entry = int(np.flatnonzero(~increasing)[0])
        return f"the vocabulary indices of {_row_name(matrix, entry, ids)} are not sorted and distinct"
    return None


def _row_name(matrix: scipy.sparse.csr_matrix, entry: int, ids: Sequence[str]) -> str:
    row = int(np.searchsorted(matrix.indptr, entry, side="right")) - 1
    return f"row {row} ({ids[row]!r})"


def canonical_rows(matrix: Any, ids: Sequence[str]) -> scipy.sparse.csr_matrix:
    """float32 CSR with sorted, distinct indices and no stored zeros; the caller's matrix is left alone.

    Raises:
        TypeError: not a scipy sparse matrix.
        ValueError: another number of rows than of `ids`, or a weight is negative, NaN or infinite.
    """
    if not scipy.sparse.issparse(matrix):
        raise TypeError(f"expected a scipy.sparse matrix (n, vocab_size), found {type(matrix).__name__}")
    canonical = scipy.sparse.csr_matrix(matrix, dtype=np.float32)
    if not canonical.has_canonical_format or (canonical.data == 0).any():
        canonical = canonical.copy()
        canonical.sum_duplicates()
        canonical.eliminate_zeros()
    if len(ids) != canonical.shape[0]:
        raise ValueError(f"expected one identifier per row, found {len(ids)} for {canonical.shape[0]} rows")
    problem = _problem(canonical, ids)
    if problem:
        raise ValueError(f"not a matrix of sparse embeddings: {problem}")
    return canonical


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def list_shards(folder: Path) -> list[str]:
    """Names of the shards that lie in `folder`, listed in its manifest or not."""
    return sorted(path.name for path in folder.glob("shard-*.safetensors"))


def write_shard(path: Path, ids: Sequence[str], matrix: scipy.sparse.csr_matrix, source: str = "") -> None:
    """Write one shard, whole or not at all. `matrix` is canonical float32 CSR with one row per identifier."""
    packed = PackedIds.pack(ids)
    tensors = {
        "indptr": matrix.indptr.astype(np.int64),
        "indices": np.ascontiguousarray(matrix.indices, dtype=np.int32),
        "data": np.ascontiguousarray(matrix.data, dtype=np.float32),
        "id_bytes": packed.id_bytes,
        "id_offsets": packed.id_offsets,
    }
    storage.write_tensors(path, tensors, source)


def write_manifest(folder: Path, num_shards: int, vocab_size: int, *, complete: bool = True, **fields: Any) -> None:
    """List the shards that lie in `folder`, with their counts and sizes, in its manifest."""
    from rarezoo import __version__

    shards: list[dict[str, Any]] = []
    for number in range(num_shards):
        path = folder / shard_name(number)
        tensors = storage.map_tensors(path, _SHARD_TENSORS)
        shards.append(
            {
                "file": path.name,
                "num_documents": len(tensors["indptr"]) - 1,
                "num_postings": len(tensors["data"]),
                "num_bytes": path.stat().st_size,
            }
        )
    manifest = {
        "format": "rarezoo.sparse_embeddings",
        "format_version": FORMAT_VERSION,
        "kind": "sparse",
        "complete": complete,
        **fields,
        "vocab_size": vocab_size,
        "num_documents": sum(shard["num_documents"] for shard in shards),
        "num_postings": sum(shard["num_postings"] for shard in shards),
        "versions": {"rarezoo": __version__},
        "shards": shards,
    }
    storage.write_json(folder / MANIFEST_NAME, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """`storage.read_manifest` of a folder of embeddings."""
    return storage.read_manifest(folder / MANIFEST_NAME, "sparse embeddings", FORMAT_VERSION)


class SparseEmbeddings:
    """Sparse vectors with identifiers: CSR float32 (n, vocab_size), weights > 0, in memory or memory-mapped.

    Args:
        ids: n distinct strings.
        matrix: scipy sparse (n, vocab_size); converted to CSR float32 with sorted indices, stored zeros dropped.
        fingerprint: the model's, from `model_fingerprint`; None when the vectors' origin is unknown.
        vocabulary: what the dimensions are called, from `vocabulary_fingerprint`; None when that is unknown.

    Raises:
        ValueError: counts differ, an identifier comes twice, or a weight is negative, NaN or infinite.
        TypeError: `matrix` is not a scipy sparse matrix, `ids` is one string, or an identifier is not a string.
    """

    def __init__(self, ids: Sequence[str], matrix: Any, fingerprint: str | None = None, vocabulary: str | None = None):
        ids = listed_ids(ids)
        canonical = canonical_rows(matrix, ids)
        SeenIds().add(ids)
        self._set_shards([_Shard.in_memory(ids, canonical)], canonical.shape[1], fingerprint, vocabulary)

    def _set_shards(
        self, shards: list[_Shard], vocab_size: int, fingerprint: str | None, vocabulary: str | None
    ) -> None:
        self._shards = shards
        self._starts = np.concatenate([[0], np.cumsum([shard.num_documents for shard in shards], dtype=np.int64)])
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.vocabulary = vocabulary

    @classmethod
    def _from_shards(
        cls, shards: list[_Shard], vocab_size: int, fingerprint: str | None, vocabulary: str | None
    ) -> SparseEmbeddings:
        embeddings = cls.__new__(cls)
        embeddings._set_shards(shards, vocab_size, fingerprint, vocabulary)
        return embeddings

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"SparseEmbeddings({len(self)} rows, vocab_size={self.vocab_size}, {self.num_postings} postings)"

    @property
    def num_postings(self) -> int:
        """Number of stored weights."""
        return sum(shard.num_postings for shard in self._shards)

    @property
    def ids(self) -> Sequence[str]:
        """The n identifiers in row order."""
        return self._shards[0].ids if len(self._shards) == 1 else _ShardedIds(self._shards, self._starts)

    @property
    def matrix(self) -> scipy.sparse.csr_matrix:
        """All rows, (n, vocab_size) float32. Of several shards this is a copy in memory: see `iter_shards`."""
        if len(self._shards) == 1:
            return self._shards[0].matrix
        if not self._shards:
            return scipy.sparse.csr_matrix((0, self.vocab_size), dtype=np.float32)
        return scipy.sparse.vstack([shard.matrix for shard in self._shards], format="csr")

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> SparseEmbeddings:
        """Rows by position, slice, positions or boolean mask, as a container in memory, in the order asked for."""
        positions = np.arange(len(self))[rows]
        return self._take(np.atleast_1d(positions))

    def _take(self, positions: np.ndarray) -> SparseEmbeddings:
        shard_numbers = np.searchsorted(self._starts, positions, side="right") - 1
        order = np.argsort(shard_numbers, kind="stable")
        blocks = [scipy.sparse.csr_matrix((0, self.vocab_size), dtype=np.float32)]
        for number in np.unique(shard_numbers):
            inside = positions[order][shard_numbers[order] == number] - self._starts[number]
            blocks.append(self._shards[number].matrix[inside])
        matrix = scipy.sparse.vstack(blocks, format="csr")[np.argsort(order, kind="stable")]
        all_ids = self.ids
        ids = [all_ids[int(position)] for position in positions]
        return SparseEmbeddings(ids, matrix, self.fingerprint, self.vocabulary)

    def iter_shards(self, verify: bool = False) -> Iterator[SparseEmbeddings]:
        """The shards in order, each a container of its own (still memory-mapped when this one is).

        Args:
            verify: read each shard and check its checksum and its weights first; a ValueError names the file.
        """
        for shard in self._shards:
            if verify:
                shard.verify()
            yield self._from_shards([shard], self.vocab_size, self.fingerprint, self.vocabulary)

    @staticmethod
    def concatenate(parts: Sequence[SparseEmbeddings]) -> SparseEmbeddings:
        """One container of all rows, in order, in memory.

        Raises:
            ValueError: no parts, other vocabulary sizes, other models, or an identifier in two parts.
        """
        if not parts:
            raise ValueError("expected at least one container to concatenate, found none")
        for name in ("vocab_size", "fingerprint", "vocabulary"):
            values = {getattr(part, name) for part in parts}
            if name == "vocabulary":
                values.discard(None)  # the same model, as its fingerprint tells, from a source that does not name it
            if len(values) > 1:
                raise ValueError(f"cannot concatenate embeddings with different {name}: {sorted(map(str, values))}")
        ids = [identifier for part in parts for identifier in part.ids]
        matrix = scipy.sparse.vstack([part.matrix for part in parts], format="csr")
        vocabulary = next((part.vocabulary for part in parts if part.vocabulary), None)
        return SparseEmbeddings(ids, matrix, parts[0].fingerprint, vocabulary)

    def top_k(self, k: int) -> SparseEmbeddings:
        """Keep the k largest weights of every row, in memory; of equal weights the lower vocabulary index.

        Rows with fewer weights stay as they are.
        """
        if k < 1:
            raise ValueError(f"expected k >= 1, found {k}")
        blocks = [_top_k_rows(shard.matrix, k) for shard in self._shards]
        empty = scipy.sparse.csr_matrix((0, self.vocab_size), dtype=np.float32)
        matrix = scipy.sparse.vstack([empty, *blocks], format="csr")
        shard = _Shard.in_memory(list(self.ids), matrix)
        return self._from_shards([shard], self.vocab_size, self.fingerprint, self.vocabulary)

    def save(self, folder: str | os.PathLike[str], shard_size: int = 65536) -> None:
        """Write a new folder of shards with at most `shard_size` rows each; whole or not at all.

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
                write_shard(partial / shard_name(number), part.ids, part.matrix)
            write_manifest(
                partial, len(starts), self.vocab_size, fingerprint=self.fingerprint, vocabulary=self.vocabulary
            )

    @classmethod
    def open(cls, folder: str | os.PathLike[str], mmap: bool = True) -> SparseEmbeddings:
        """Open a folder written by `save` or `encode_corpus`; memory-mapped, nothing is read until it is used.

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
        shards = []
        for row in manifest["shards"]:
            path = folder / row["file"]
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, though {MANIFEST_NAME} lists it")
            if path.stat().st_size != row["num_bytes"]:
                raise ValueError(
                    f"{path} is damaged or truncated: {path.stat().st_size} bytes, expected {row['num_bytes']}"
                )
            shards.append(_Shard(row["num_documents"], row["num_postings"], manifest["vocab_size"], path, mmap))
        vocabulary = manifest.get("vocabulary")  # folders of rarezoo's first version have none
        return cls._from_shards(shards, manifest["vocab_size"], manifest["fingerprint"], vocabulary)

    def verify(self) -> None:
        """Read every shard and check its checksum, its weights and that no identifier comes twice.

        Raises:
            ValueError: names the file and what is wrong with it.
        """
        seen = SeenIds()
        for shard in self.iter_shards(verify=True):
            seen.add(shard.ids)


def _top_k_rows(matrix: scipy.sparse.csr_matrix, k: int) -> scipy.sparse.csr_matrix:
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    rank_in_row = np.arange(matrix.nnz) - matrix.indptr[rows]
    kept = np.sort(order[rank_in_row < k])
    indptr = np.concatenate([[0], np.cumsum(np.minimum(np.diff(matrix.indptr), k))])
    return scipy.sparse.csr_matrix((matrix.data[kept], matrix.indices[kept], indptr), shape=matrix.shape)
