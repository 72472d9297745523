"""Exact search on disk: an inverted index of sparse vectors that opens memory-mapped, adds, deletes and compacts.

An index is a folder of segments (`segmented_index`); of the documents each stores the postings:

    term_offsets    int64    (blocks * (vocab_size + 1),)  where the postings of each term begin, per block
    documents       uint16   (postings,)  document numbers within the block of 65,536 documents
    weights         float32  (postings,)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from tqdm.auto import tqdm

from rarezoo.retrieval import storage
from rarezoo.retrieval.identifiers import SeenIds
from rarezoo.retrieval.metadata import MetadataOf, Where, lines_of_new
from rarezoo.retrieval.segmented_index import Segment, SegmentedIndex, check_counts, id_tensors
from rarezoo.retrieval.sparse_embeddings import KIND, SparseEmbeddings, canonical_rows

# Documents per segment: bounds the memory that building and compacting take (about 1 GB at 200 terms per document).
SEGMENT_SIZE = 4 * 65536
_QUERIES_AT_ONCE = 256
_POSTINGS_TENSORS: dict[str, type] = {"term_offsets": np.int64, "documents": np.uint16, "weights": np.float32}


class MatchedTerm(NamedTuple):
    """A vocabulary entry that a query and a document share; it adds `query_weight * document_weight` to the score."""

    vocabulary_index: int
    query_weight: float
    document_weight: float


class _Rows(NamedTuple):
    """Consecutive documents on their way into a segment."""

    ids: Sequence[str]
    digests: np.ndarray
    matrix: scipy.sparse.csr_matrix

    def part(self, start: int, end: int) -> _Rows:
        return _Rows(self.ids[start:end], self.digests[start:end], self.matrix[start:end])


_scratch = threading.local()


def _accumulator(size: int) -> np.ndarray:
    """Zeros for the compiled search of this thread, which leaves zeros behind: fresh ones would cost page faults."""
    if not hasattr(_scratch, "accumulator"):
        _scratch.accumulator = np.zeros(size, dtype=np.float32)
    return _scratch.accumulator


def _kernels() -> ModuleType:
    try:
        from rarezoo.retrieval import sparse_kernels
    except ImportError as error:
        raise ImportError(
            f"the index runs on compiled loops and needs numba: pip install 'rarezoo[retrieval]' ({error})"
        ) from error
    return sparse_kernels


class SparseIndex(SegmentedIndex["_Segment", SparseEmbeddings]):
    """An exact inverted index in a folder. Made by `build` and `open`.

    Attributes:
        folder: where it is.
        fingerprint: of the model that encoded the documents; None when their origin is unknown.
        vocabulary: what the terms are called, as a fingerprint; None when that is unknown.
        vocab_size: number of terms.

    One process at a time may change an index; others keep reading what they have opened.
    """

    _kind, _container, _count = KIND, SparseEmbeddings, "num_postings"

    @classmethod
    def build(
        cls,
        embeddings: SparseEmbeddings,
        folder: str | os.PathLike[str],
        metadata: MetadataOf | None = None,
    ) -> SparseIndex:
        """Build an index in a new folder, whole or not at all, reading the embeddings shard by shard.

        Args:
            embeddings: the documents. Documents without terms are kept (no query finds them).
            folder: new or empty.
            metadata: of documents, by identifier: fields with str, int, float, bool, None or a list of those.

        Raises:
            FileExistsError: `folder` is not empty.
            TypeError: embeddings of another kind.
            ValueError: a shard is damaged, an identifier comes twice, metadata that cannot be stored, or of a document
                that is not among these.
            CannotWriteError: full disk or read-only folder.
        """
        folder = Path(folder)
        cls._check_kind(embeddings)
        lines_of = lines_of_new(metadata, embeddings.ids)
        with storage.folder_written_beside(folder) as partial:
            contents = _segment_contents(_new_rows(embeddings), embeddings.vocab_size)
            settings = {"vocabulary": embeddings.vocabulary, "vocab_size": embeddings.vocab_size}
            cls._write_index(partial, contents, embeddings.fingerprint, settings, lines_of)
        return cls.open(folder)

    def _set_settings(self, manifest: dict[str, Any]) -> None:
        self.vocabulary: str | None = manifest.get("vocabulary")  # rarezoo's first version wrote none
        self.vocab_size: int = manifest["vocab_size"]

    def _settings(self) -> dict[str, Any]:
        return {"vocabulary": self.vocabulary, "vocab_size": self.vocab_size}

    def _open_segment(self, row: dict[str, Any]) -> _Segment:
        return _Segment(self.folder, row, self.vocab_size)

    def _new_documents(self, embeddings: SparseEmbeddings) -> Iterator[_Rows]:
        return _new_rows(embeddings)

    def _contents(self, parts: Iterable[_Rows]) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        return _segment_contents(parts, self.vocab_size)

    def __repr__(self) -> str:
        return f"SparseIndex({len(self)} documents, vocab_size={self.vocab_size}, {len(self._segments)} segments)"

    @property
    def num_postings(self) -> int:
        """Stored weights, those of deleted documents included until the index is compacted."""
        return sum(segment.num_postings for segment in self._segments)

    def search(
        self,
        queries: scipy.sparse.csr_matrix | SparseEmbeddings,
        top_k: int = 10,
        num_threads: int = 1,
        subset: Iterable[str] | None = None,
        where: Where | None = None,
    ) -> list[list[tuple[str, float]]]:
        """The documents with the largest dot products, exactly.

        Args:
            queries: sparse (n, vocab_size), weights >= 0; or embeddings, whose fingerprint is then compared.
            top_k: results per query.
            num_threads: threads, each working on queries of its own.
            subset: identifiers to search among; those that the index does not hold are passed over.
            where: which documents of these, by their metadata: a mapping of fields to a value or several allowed ones,
                all fields of which must match; or a function of the metadata. A field that is a list matches by each of
                its values; one that a document lacks does not match.

        Returns:
            Per query at most `top_k` pairs (document identifier, score > 0), best first; of equal scores the
            document that was added first. Scores are float32 sums in the order of the vocabulary.

        Raises:
            ValueError: another vocabulary, another model, weights that are negative or not finite, or a value in
                `where` that no metadata can hold.
            TypeError: `where` is neither a mapping nor a function, or a number is not whole.
        """
        matrix = self._query_rows(queries)
        check_counts(top_k=top_k, num_threads=num_threads)
        at_once = min(_QUERIES_AT_ONCE, -(-matrix.shape[0] // num_threads)) or 1
        excluded = self._excluded(subset, where)
        if matrix.shape[0] <= at_once:
            return self._search_part(matrix, top_k, excluded)
        parts = [matrix[start : start + at_once] for start in range(0, matrix.shape[0], at_once)]
        with ThreadPoolExecutor(num_threads) as pool:
            found = pool.map(lambda part: self._search_part(part, top_k, excluded), parts)
            # The bar appears after a second.
            bar = tqdm(found, total=len(parts), desc="Searching", unit=f" x {at_once} queries", delay=1.0)
            return [row for rows in bar for row in rows]

    def _query_rows(self, queries: scipy.sparse.csr_matrix | SparseEmbeddings) -> scipy.sparse.csr_matrix:
        if isinstance(queries, SparseEmbeddings):
            if queries.fingerprint is not None:
                self._check_origin("queries", queries.fingerprint)
            self._check_vocabulary("queries", queries)
            queries = queries.matrix
        if not scipy.sparse.issparse(queries):
            raise TypeError(
                f"expected queries as a scipy.sparse matrix (n, vocab_size), found {type(queries).__name__}"
            )
        if queries.shape[1] != self.vocab_size:
            raise ValueError(
                f"the queries have {queries.shape[1]} vocabulary entries, the index {self.vocab_size}: "
                "encode both with the same model"
            )
        return canonical_rows(queries, [f"query {row}" for row in range(queries.shape[0])])

    def _check_vocabulary(self, name: str, embeddings: SparseEmbeddings) -> None:
        if None not in (self.vocabulary, embeddings.vocabulary) and self.vocabulary != embeddings.vocabulary:
            raise ValueError(
                f"the {name} have the vocabulary {embeddings.vocabulary}, the index in {self.folder} has "
                f"{self.vocabulary}: their dimensions mean other words. Use the tokenizer of the model that encoded "
                "the documents"
            )

    def _excluded(self, subset: Iterable[str] | None, where: Where | None) -> list[np.ndarray]:
        """Per segment (documents,) uint8, 1 where no result; (0,) where all documents are possible ones."""
        chosen = self._chosen(subset, where)
        if chosen is None:
            return [segment.deleted for segment in self._segments]
        excluded = [(~mask).astype(np.uint8) for mask in chosen]
        for mask in excluded:
            mask.flags.writeable = False  # as tombstones: compiled loops know two types of arrays
        return excluded

    def _search_part(
        self, queries: scipy.sparse.csr_matrix, top_k: int, excluded: list[np.ndarray]
    ) -> list[list[tuple[str, float]]]:
        kernels = _kernels()
        num_queries = queries.shape[0]
        k = min(top_k, max(1, self._starts[-1]))
        scores = np.zeros((num_queries, k), dtype=np.float32)
        documents = np.zeros((num_queries, k), dtype=np.int64)
        sizes = np.zeros(num_queries, dtype=np.int64)
        indptr, indices = queries.indptr.astype(np.int64), queries.indices.astype(np.int32)
        accumulator = _accumulator(kernels.BLOCK_SIZE)
        for segment, first_document, without in zip(self._segments, self._starts, excluded):
            kernels.search_segment(
                accumulator,
                segment.term_offsets,
                segment.tensors["documents"],
                segment.tensors["weights"],
                segment.num_documents,
                without,
                first_document,
                indptr,
                indices,
                queries.data,
                scores,
                documents,
                sizes,
            )
        kernels.sort_heaps(scores, documents, sizes)
        filled = np.arange(k) < sizes[:, None]
        pairs = list(zip(self._ids_of(documents[filled]), scores[filled].tolist()))
        ends = np.cumsum(sizes).tolist()
        return [pairs[end - size : end] for end, size in zip(ends, sizes.tolist())]

    def matched_terms(self, query: scipy.sparse.csr_matrix | SparseEmbeddings, document_id: str) -> list[MatchedTerm]:
        """Why a document was found: the terms that it shares with a query, the largest contribution first.

        Args:
            query: one row, (1, vocab_size).
            document_id: of a document in the index.

        Raises:
            ValueError: no such document, or not one row.
        """
        row = self._query_rows(query)
        if row.shape[0] != 1:
            raise ValueError(f"expected one query, found {row.shape[0]} rows")
        segment, document = self._located(document_id)
        terms = []
        for term, weight in zip(row.indices, row.data):
            document_weight = segment.weight(int(term), document)
            if document_weight:
                terms.append(MatchedTerm(int(term), float(weight), document_weight))
        return sorted(terms, key=lambda term: -term.query_weight * term.document_weight)

    def add(self, embeddings: SparseEmbeddings, metadata: MetadataOf | None = None) -> None:
        """Add documents as a new segment, with metadata as in `build`; whole or not at all.

        Raises:
            TypeError: embeddings of another kind.
            ValueError: another vocabulary or model, an identifier that the index holds already, or as `build`.
            CannotWriteError: full disk or read-only folder.
        """
        self._check_kind(embeddings)
        if embeddings.vocab_size != self.vocab_size:
            raise ValueError(
                f"the documents have {embeddings.vocab_size} vocabulary entries, the index {self.vocab_size}: "
                "encode them with the model that built the index"
            )
        self._check_origin("new documents", embeddings.fingerprint)
        self._check_vocabulary("new documents", embeddings)
        self._add(embeddings, lines_of_new(metadata, embeddings.ids))


class _Segment(Segment):
    """One file of postings."""

    def __init__(self, folder: Path, row: dict[str, Any], vocab_size: int):
        super().__init__(folder, row, _POSTINGS_TENSORS)
        self.num_postings: int = row["num_postings"]
        self.vocab_size = vocab_size
        blocks = -(-self.num_documents // _kernels().BLOCK_SIZE)
        stored = (self.num_postings,)
        shapes = {"term_offsets": (blocks * (vocab_size + 1),), "documents": stored, "weights": stored}
        storage.check_shapes(self.path, self.tensors, shapes)

    @cached_property
    def term_offsets(self) -> np.ndarray:
        """(blocks, vocab_size + 1) int64, checked: the compiled loops trust them."""
        offsets = self.tensors["term_offsets"]
        if len(offsets):
            storage.check_offsets(self.path, "term_offsets", offsets, self.num_postings)
        return offsets.reshape(-1, self.vocab_size + 1)

    def weight(self, term: int, document: int) -> float:
        """Weight of a term in a document, 0 where it has none."""
        block, number = divmod(document, _kernels().BLOCK_SIZE)
        start, end = self.term_offsets[block, term : term + 2]
        position = start + np.searchsorted(self.tensors["documents"][start:end], number)
        if position < end and self.tensors["documents"][position] == number:
            return float(self.tensors["weights"][position])
        return 0.0

    def live_documents(self) -> Iterator[_Rows]:
        """Block by block, the documents that are not deleted."""
        digests = self.digests()
        block_size = _kernels().BLOCK_SIZE
        for block, offsets in enumerate(self.term_offsets):
            first = block * block_size
            length = min(block_size, self.num_documents - first)
            postings = slice(offsets[0], offsets[-1])
            documents = self.tensors["documents"][postings].astype(np.int32)
            columns = (self.tensors["weights"][postings], documents, offsets - offsets[0])
            matrix = scipy.sparse.csc_matrix(columns, shape=(length, self.vocab_size)).tocsr()
            live = np.arange(length)
            if len(self.deleted):
                live = np.flatnonzero(self.deleted[first : first + length] == 0)
            yield _Rows([self.ids[int(first + row)] for row in live], digests[first + live], matrix[live])


def _new_rows(embeddings: SparseEmbeddings) -> Iterator[_Rows]:
    """The verified shards of embeddings; an identifier that comes twice is an error."""
    seen = SeenIds()
    with tqdm(total=len(embeddings), desc="Indexing", unit="document", delay=1.0) as bar:
        for shard in embeddings.iter_shards(verify=True):
            ids = list(shard.ids)
            yield _Rows(ids, seen.add(ids), shard.matrix)
            bar.update(len(shard))


def _groups(parts: Iterable[_Rows], size: int) -> Iterator[list[_Rows]]:
    """Cut and collect parts into groups of `size` rows; the last may be smaller."""
    group: list[_Rows] = []
    room = size
    for part in parts:
        start = 0
        while start < len(part.ids):
            end = min(start + room, len(part.ids))
            group.append(part.part(start, end))
            room -= end - start
            start = end
            if room == 0:
                yield group
                group, room = [], size
    if group:
        yield group


def _segment_contents(parts: Iterable[_Rows], vocab_size: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """The tensors of one segment after another, and the number of postings."""
    for group in _groups(parts, SEGMENT_SIZE):
        tensors = _invert(group, vocab_size)
        yield tensors, len(tensors["weights"])


def _invert(group: list[_Rows], vocab_size: int) -> dict[str, np.ndarray]:
    """The tensors of one segment."""
    kernels = _kernels()
    num_postings = sum(rows.matrix.nnz for rows in group)
    documents = np.empty(num_postings, dtype=np.uint16)
    weights = np.empty(num_postings, dtype=np.float32)
    offsets = []
    end = 0
    for block in _groups(group, kernels.BLOCK_SIZE):
        counts = sum(np.bincount(rows.matrix.indices, minlength=vocab_size) for rows in block)
        block_offsets = np.concatenate([[end], end + np.cumsum(counts)]).astype(np.int64)
        end = int(block_offsets[-1])
        cursor = block_offsets[:-1].copy()
        first_document = 0
        for rows in block:
            matrix = rows.matrix
            kernels.invert_rows(matrix.indptr, matrix.indices, matrix.data, first_document, cursor, documents, weights)
            first_document += matrix.shape[0]
        offsets.append(block_offsets)
    postings = {"term_offsets": np.concatenate(offsets), "documents": documents, "weights": weights}
    return postings | id_tensors(group)
