"""The container for sparse vectors: identifiers and CSR rows, in memory or memory-mapped from safetensors shards.

On disk a container is a folder of `shards`. Each shard holds the rows of consecutive texts as CSR: `indptr` int64,
`indices` int32, `data` float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse

from rarezoo.retrieval import shards, storage
from rarezoo.retrieval.identifiers import SeenIds, listed_ids

if TYPE_CHECKING:
    from typing_extensions import Self

KIND = "sparse"
_SHARD_TENSORS: dict[str, type] = {"indptr": np.int64, "indices": np.int32, "data": np.float32, **shards.ID_TENSORS}


class _Shard(shards.Shard):
    """Consecutive rows; `matrix` is their CSR (num_documents, vocab_size)."""

    def __init__(self, num_documents: int, num_postings: int, vocab_size: int, path: Path | None, mmap: bool = True):
        super().__init__(num_documents, path)
        self.num_postings = num_postings
        self.vocab_size = vocab_size
        self._mmap = mmap

    @classmethod
    def in_memory(cls, ids: Sequence[str], matrix: scipy.sparse.csr_matrix) -> _Shard:
        shard = cls(matrix.shape[0], matrix.nnz, matrix.shape[1], path=None)
        shard.ids = ids
        shard.matrix = matrix
        return shard

    def _map_tensors(self, path: Path) -> dict[str, np.ndarray]:
        tensors = storage.map_tensors(path, _SHARD_TENSORS, self._mmap)
        stored = (self.num_postings,)
        storage.check_shapes(path, tensors, {"indptr": (self.num_documents + 1,), "indices": stored, "data": stored})
        storage.check_offsets(path, "indptr", tensors["indptr"], self.num_postings)
        return tensors

    @cached_property
    def matrix(self) -> scipy.sparse.csr_matrix:
        tensors = self.tensors
        matrix = scipy.sparse.csr_matrix(
            (tensors["data"], tensors["indices"], tensors["indptr"]), shape=(self.num_documents, self.vocab_size)
        )
        matrix.has_sorted_indices = True
        return matrix

    def _problem(self) -> str | None:
        return _problem(self.matrix, self.ids)


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


def write_shard(path: Path, ids: Sequence[str], matrix: scipy.sparse.csr_matrix, source: str = "") -> None:
    """Write one shard, whole or not at all. `matrix` is canonical float32 CSR with one row per identifier."""
    tensors = {
        "indptr": matrix.indptr.astype(np.int64),
        "indices": np.ascontiguousarray(matrix.indices, dtype=np.int32),
        "data": np.ascontiguousarray(matrix.data, dtype=np.float32),
    }
    shards.write_shard(path, ids, tensors, source)


def write_manifest(folder: Path, num_shards: int, vocab_size: int, *, complete: bool = True, **fields: Any) -> None:
    """List the shards that lie in `folder`, with their counts and sizes, in its manifest."""
    fields = {"complete": complete, **fields, "vocab_size": vocab_size}
    shards.write_manifest(folder, num_shards, KIND, _SHARD_TENSORS, ("num_postings", "data"), **fields)


def read_manifest(folder: Path) -> dict[str, Any]:
    """`storage.read_manifest` of a folder of sparse embeddings."""
    return shards.read_manifest(folder, KIND)


class SparseEmbeddings(shards.ShardedEmbeddings[_Shard]):
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

    default_shard_size = 65536

    def __init__(self, ids: Sequence[str], matrix: Any, fingerprint: str | None = None, vocabulary: str | None = None):
        ids = listed_ids(ids)
        canonical = canonical_rows(matrix, ids)
        SeenIds().add(ids)
        self._set_shards([_Shard.in_memory(ids, canonical)])
        self.vocab_size = canonical.shape[1]
        self.fingerprint = fingerprint
        self.vocabulary = vocabulary

    def __repr__(self) -> str:
        return f"SparseEmbeddings({len(self)} rows, vocab_size={self.vocab_size}, {self.num_postings} postings)"

    @property
    def num_postings(self) -> int:
        """Number of stored weights."""
        return sum(shard.num_postings for shard in self._shards)

    @property
    def matrix(self) -> scipy.sparse.csr_matrix:
        """All rows, (n, vocab_size) float32. Of several shards this is a copy in memory: see `iter_shards`."""
        if len(self._shards) == 1:
            return self._shards[0].matrix
        if not self._shards:
            return scipy.sparse.csr_matrix((0, self.vocab_size), dtype=np.float32)
        return scipy.sparse.vstack([shard.matrix for shard in self._shards], format="csr")

    def _take(self, positions: np.ndarray) -> Self:
        shard_numbers = np.searchsorted(self._starts, positions, side="right") - 1
        order = np.argsort(shard_numbers, kind="stable")
        blocks = [scipy.sparse.csr_matrix((0, self.vocab_size), dtype=np.float32)]
        for number in np.unique(shard_numbers):
            inside = positions[order][shard_numbers[order] == number] - self._starts[number]
            blocks.append(self._shards[number].matrix[inside])
        matrix = scipy.sparse.vstack(blocks, format="csr")[np.argsort(order, kind="stable")]
        return type(self)(self._ids_at(positions), matrix, self.fingerprint, self.vocabulary)

    @staticmethod
    def concatenate(parts: Sequence[SparseEmbeddings]) -> SparseEmbeddings:
        """One container of all rows, in order, in memory.

        Raises:
            ValueError: no parts, other vocabulary sizes, other models, or an identifier in two parts.
        """
        shards.check_alike(parts, ("vocab_size", "fingerprint"))
        # The same model, as its fingerprint tells; some sources do not name the vocabulary.
        shards.check_alike([part for part in parts if part.vocabulary] or parts, ["vocabulary"])
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
        return self._with_shards([_Shard.in_memory(list(self.ids), matrix)])

    def _write_shard(self, path: Path) -> None:
        write_shard(path, self.ids, self.matrix)

    def _write_manifest(self, folder: Path, num_shards: int) -> None:
        write_manifest(folder, num_shards, self.vocab_size, fingerprint=self.fingerprint, vocabulary=self.vocabulary)

    def _open(self, folder: Path, mmap: bool) -> None:
        manifest = read_manifest(folder)
        self.vocab_size = manifest["vocab_size"]
        self.fingerprint = manifest["fingerprint"]
        self.vocabulary = manifest.get("vocabulary")  # folders of rarezoo's first version have none
        listed = shards.listed_shards(folder, manifest)
        self._set_shards(
            [_Shard(row["num_documents"], row["num_postings"], self.vocab_size, path, mmap) for path, row in listed]
        )


def _top_k_rows(matrix: scipy.sparse.csr_matrix, k: int) -> scipy.sparse.csr_matrix:
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    rank_in_row = np.arange(matrix.nnz) - matrix.indptr[rows]
    kept = np.sort(order[rank_in_row < k])
    indptr = np.concatenate([[0], np.cumsum(np.minimum(np.diff(matrix.indptr), k))])
    return scipy.sparse.csr_matrix((matrix.data[kept], matrix.indices[kept], indptr), shape=matrix.shape)
