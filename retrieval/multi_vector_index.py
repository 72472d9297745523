"""MaxSim search on disk: an index of packed vectors that opens memory-mapped, adds, deletes and compacts.

In "float32" every document is scored, exactly. The other precisions assign every vector to a centroid; a search then
goes through the stages of PLAID (arXiv 2205.09707): the documents in the lists of the centroids nearest to the query's
vectors, their scores with centroids in place of vectors, and MaxSim over the decompressed vectors of the best of them.
On clustered synthetic vectors recall@10 is 0.96 in "2-bit" and 1.00 in "int8", in about a tenth of the time of exact
search (`benchmarks/bench_multi_vector_index.py`); the loss is the compression's, not the stages'. The stages lose where
no document is near: of queries of random directions, whose scores hardly differ between documents, "int8" finds 0.60 at
the defaults, 0.97 with 16 cells and 4,096 candidates of the 10,000 documents, and "2-bit" 0.47 and, however it is
searched, at most 0.58.

An index is a folder of segments (`segmented_index`, `multi_vector_segments`) and the codec (`vector_encoder`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rarezoo.retrieval import storage
from rarezoo.retrieval.identifiers import SeenIds, listed_ids
from rarezoo.retrieval.metadata import LinesOf, MetadataOf, Where, lines_of_new
from rarezoo.retrieval.multi_vector_embeddings import KIND, MultiVectorEmbeddings, packed_rows
from rarezoo.retrieval.multi_vector_segments import (
    EncodedDocuments,
    MultiVectorSegment,
    encoded_documents,
    segment_contents,
)
from rarezoo.retrieval.residual_codec import ResidualCodec, compiled_loops
from rarezoo.retrieval.segmented_index import SegmentedIndex, check_counts
from rarezoo.retrieval.sparse_embeddings import SparseEmbeddings
from rarezoo.retrieval.vector_encoder import PRECISIONS, VectorEncoder

_SCORED_COLUMNS = 2**10  # query vectors of one matrix product


class MultiVectorIndex(SegmentedIndex[MultiVectorSegment, MultiVectorEmbeddings]):
    """A MaxSim index in a folder. Made by `build` and `open`.

    Attributes:
        folder: where it is.
        fingerprint: of the model that encoded the documents; None when their origin is unknown.
        precision: how vectors are stored, one of `PRECISIONS`.
        dim: dimensions of a vector.

    One process at a time may change an index; others keep reading what they have opened.
    """

    _kind, _container, _count = KIND, MultiVectorEmbeddings, "num_vectors"

    @classmethod
    def build(
        cls,
        embeddings: MultiVectorEmbeddings,
        folder: str | os.PathLike[str],
        precision: str = "float32",
        num_centroids: int | None = None,
        codec: ResidualCodec | None = None,
        seed: int = 0,
        metadata: MetadataOf | None = None,
    ) -> MultiVectorIndex:
        """Build an index in a new folder, whole or not at all, reading the embeddings shard by shard.

        Args:
            embeddings: the documents. Documents without vectors are kept (no query finds them).
            folder: new or empty.
            precision: "float32" (exact search, 512 bytes per vector at 128 dimensions), "float16", "int8", or the bits
                per dimension of a residual codec for vectors of length 1: "8-bit", "4-bit", "2-bit" (34 bytes with its
                centroid), "1-bit".
            num_centroids: by default `default_num_centroids`; not for "float32".
            codec: use its centroids, and for residual precisions its buckets, instead of training them.
            seed: of the training; equal seeds, equal indexes.
            metadata: of documents, by identifier: fields with str, int, float, bool, None or a list of those.

        Raises:
            FileExistsError: `folder` is not empty.
            TypeError: embeddings of another kind.
            ValueError: a shard is damaged, an identifier comes twice, vectors that the precision cannot hold, no
                vectors to train centroids on, metadata that cannot be stored, or of a document that is not among these.
            CannotWriteError: full disk or read-only folder.
        """
        folder = Path(folder)
        cls._check_kind(embeddings)
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}; found {precision!r}")
        lines_of = lines_of_new(metadata, embeddings.ids)
        with storage.folder_written_beside(folder) as partial:
            encoder = VectorEncoder.train(embeddings, precision, num_centroids, codec, seed)
            cls._write_new(partial, encoded_documents(embeddings, encoder), encoder, embeddings.fingerprint, lines_of)
        return cls.open(folder)

    @classmethod
    def build_from_stored(
        cls,
        parts: Iterable[tuple[Sequence[str], np.ndarray, dict[str, np.ndarray]]],
        folder: str | os.PathLike[str],
        codec: ResidualCodec,
        fingerprint: str | None = None,
    ) -> MultiVectorIndex:
        """Build an index of vectors that are compressed already, whole or not at all.

        Args:
            parts: as `iter_stored` gives them: identifiers, lengths (n,), and `codes` (tokens,) and `residuals`
                (tokens, bytes) of `codec`.
            folder: new or empty.
            codec: which compressed them.
            fingerprint: of the model that encoded the documents; None when their origin is unknown.

        Raises:
            FileExistsError: `folder` is not empty.
            ValueError: an identifier comes twice, or the numbers of identifiers, lengths and rows do not agree.
            CannotWriteError: full disk or read-only folder.
        """
        folder, seen = Path(folder), SeenIds()
        encoder = VectorEncoder(f"{codec.num_bits}-bit", codec.dim, codec.centroids, codec)
        types = encoder.payload_types

        def encoded() -> Iterator[EncodedDocuments]:
            for ids, lengths, stored in parts:
                payload: dict[str, np.ndarray] = {
                    name: stored[name].astype(dtype, copy=False) for name, (dtype, _) in types.items()
                }
                rows = {name: len(stored_rows) for name, stored_rows in payload.items()}
                if len(ids) != len(lengths) or set(rows.values()) != {int(lengths.sum())}:
                    raise ValueError(
                        f"expected one length per identifier and one row per vector; found {len(ids)} identifiers, "
                        f"{len(lengths)} lengths that add up to {int(lengths.sum())}, and rows {rows}"
                    )
                yield EncodedDocuments(ids, seen.add(ids), lengths.astype(np.int64), payload)

        with storage.folder_written_beside(folder) as partial:
            cls._write_new(partial, encoded(), encoder, fingerprint)
        return cls.open(folder)

    @classmethod
    def _write_new(
        cls,
        folder: Path,
        parts: Iterable[EncodedDocuments],
        encoder: VectorEncoder,
        fingerprint: str | None,
        lines_of: LinesOf | None = None,
    ) -> None:
        encoder.write(folder)
        cls._write_index(folder, segment_contents(parts, encoder), fingerprint, _settings(encoder), lines_of)

    def _set_settings(self, manifest: dict[str, Any]) -> None:
        self.precision: str = manifest["precision"]
        self.dim: int = manifest["dim"]
        self._encoder = VectorEncoder.read(self.folder, self.precision, self.dim)

    def _settings(self) -> dict[str, Any]:
        return _settings(self._encoder)

    def _open_segment(self, row: dict[str, Any]) -> MultiVectorSegment:
        return MultiVectorSegment(self.folder, row, self._encoder)

    def _new_documents(self, embeddings: MultiVectorEmbeddings) -> Iterator[EncodedDocuments]:
        return encoded_documents(embeddings, self._encoder)

    def _contents(self, parts: Iterable[EncodedDocuments]) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        return segment_contents(parts, self._encoder)

    def __repr__(self) -> str:
        return (
            f"MultiVectorIndex({len(self)} documents, {self.num_vectors} vectors, dim={self.dim}, {self.precision}, "
            f"{len(self._segments)} segments)"
        )

    @property
    def num_vectors(self) -> int:
        """Stored vectors, those of deleted documents included until the index is compacted."""
        return sum(segment.num_vectors for segment in self._segments)

    @property
    def codec(self) -> ResidualCodec | None:
        """The residual codec; None in "float32", "float16" and "int8"."""
        return self._encoder.codec

    def search(
        self,
        queries: MultiVectorEmbeddings | Sequence[Any] | np.ndarray,
        top_k: int = 10,
        subset: Iterable[str] | None = None,
        exhaustive: bool = False,
        num_cells: int = 4,
        num_candidates: int | None = None,
        where: Where | None = None,
    ) -> list[list[tuple[str, float]]]:
        """The documents with the largest MaxSim: for each query vector its best inner product in the document, summed.

        Args:
            queries: embeddings, whose fingerprint is then compared; or (queries, length, dim), or one array or tensor
                (length, dim) per query.
            top_k: results per query.
            subset: identifiers to search among; those that the index does not hold are passed over.
            exhaustive: score every document with its stored vectors. An index in "float32" always does. For queries
                that no document is near to; others lose hardly anything by the candidates.
            num_cells: centroids per query vector whose documents become candidates.
            num_candidates: candidates whose MaxSim is computed, by default max(256, 16 * top_k). Of an index, or after
                `subset` and `where`, of no more documents all are.
            where: which documents of these, by their metadata: a mapping of fields to a value or several allowed ones,
                all fields of which must match; or a function of the metadata. A field that is a list matches by each of
                its values; one that a document lacks does not match. As with `subset`, all documents that are left
                become candidates, however far their centroids are.

        Returns:
            Per query at most `top_k` pairs (document identifier, score), best first; of equal scores the document that
            was added first. Scores are float32 and may be negative. Documents without vectors are not found, and a
            query without vectors finds nothing.

        Raises:
            ValueError: another dimension, another model, query vectors that are not finite, or a value in `where` that
                no metadata can hold.
            TypeError: `where` is neither a mapping nor a function, or a number is not whole.
        """
        vectors, offsets = self._query_rows(queries)
        check_counts(top_k=top_k, num_cells=num_cells)
        num_candidates = max(256, 16 * top_k) if num_candidates is None else num_candidates
        check_counts(num_candidates=num_candidates)
        chosen = self._chosen(subset, where)
        eligible = [segment.searchable for segment in self._segments]
        if chosen is not None:
            eligible = [searchable & mask for searchable, mask in zip(eligible, chosen)]
        if exhaustive or self._encoder.centroids is None or sum(map(np.count_nonzero, eligible)) <= num_candidates:
            found = self._search_all(vectors, offsets, eligible, top_k)
        else:
            rows = [vectors[start:end] for start, end in itertools.pairwise(offsets)]
            cells = min(num_cells, self._encoder.num_centroids) if chosen is None else 0
            found = [self._search_candidates(row, eligible, top_k, cells, max(num_candidates, top_k)) for row in rows]
        return [list(zip(self._ids_of(best.documents), best.scores.tolist())) for best in found]

    def _query_rows(self, queries: MultiVectorEmbeddings | Sequence[Any] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(query vectors, dim) float32 and (queries + 1,) offsets."""
        if isinstance(queries, MultiVectorEmbeddings):
            if queries.fingerprint is not None:
                self._check_origin("queries", queries.fingerprint)
            vectors, lengths = queries.vectors, queries.lengths
        elif isinstance(queries, SparseEmbeddings):
            raise TypeError(
                f"{self.folder} holds several vectors per document, the queries are sparse: use its own model"
            )
        else:
            rows = _listed_queries(queries)
            vectors = np.concatenate(rows) if rows else np.empty((0, self.dim), dtype=np.float32)
            lengths = np.array([len(row) for row in rows], dtype=np.int64)
        if vectors.shape[1] != self.dim:
            raise ValueError(
                f"the queries have {vectors.shape[1]} dimensions, the index {self.dim}: encode both with the same model"
            )
        if not np.isfinite(vectors).all():
            raise ValueError("the queries hold values that are not finite")
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return np.ascontiguousarray(vectors, dtype=np.float32), offsets

    def _search_all(
        self, vectors: np.ndarray, offsets: np.ndarray, eligible: list[np.ndarray], top_k: int
    ) -> list[_Best]:
        found: list[_Best] = []
        for first, last in _query_groups(offsets):
            columns, group = vectors[offsets[first] : offsets[last]], offsets[first : last + 1] - offsets[first]
            best = [_Best.none() for _ in range(last - first)]
            for segment, start, chosen in zip(self._segments, self._starts, eligible):
                documents = np.flatnonzero(chosen)
                scores = segment.max_sim(documents, columns, group)
                best = [one.merged(documents + start, row, top_k) for one, row in zip(best, scores)]
            found += best
        lengths = np.diff(offsets)
        return [best if length else _Best.none() for best, length in zip(found, lengths)]

    def _search_candidates(
        self, query: np.ndarray, eligible: list[np.ndarray], top_k: int, num_cells: int, num_candidates: int
    ) -> _Best:
        """Of one query; with `num_cells` 0 every eligible document is a candidate."""
        if len(query) == 0:
            return _Best.none()
        assert self._encoder.centroids is not None
        cell_scores = self._encoder.centroids @ query.T
        candidates = eligible
        if num_cells:
            cells = compiled_loops().best_cells(cell_scores, num_cells)
            candidates = [segment.in_cells(cells, chosen) for segment, chosen in zip(self._segments, eligible)]
            if sum(map(np.count_nonzero, candidates)) < top_k:
                candidates = eligible
        best = _Best.none()
        for segment, start, chosen in zip(self._segments, self._starts, candidates):
            documents = np.flatnonzero(chosen)
            scores = segment.approximate_scores(documents, cell_scores)
            best = best.merged(documents + start, scores, num_candidates)
        return self._rescored(query, np.sort(best.documents), top_k)

    def _rescored(self, query: np.ndarray, documents: np.ndarray, top_k: int) -> _Best:
        offsets = np.array([0, len(query)], dtype=np.int64)
        best = _Best.none()
        for segment, start, end in zip(self._segments, self._starts, self._starts[1:]):
            inside = documents[slice(*np.searchsorted(documents, (start, end)))]
            if len(inside):
                best = best.merged(inside, segment.max_sim(inside - start, query, offsets)[0], top_k)
        return best

    def add(self, embeddings: MultiVectorEmbeddings, metadata: MetadataOf | None = None) -> None:
        """Add documents as a new segment, with metadata as in `build`; whole or not at all.

        The centroids stay those that `build` trained.

        Raises:
            TypeError: embeddings of another kind.
            ValueError: another dimension or model, an identifier that the index holds already, or as `build`.
            CannotWriteError: full disk or read-only folder.
        """
        self._check_kind(embeddings)
        if embeddings.dim != self.dim:
            raise ValueError(
                f"the documents have {embeddings.dim} dimensions, the index {self.dim}: encode them with the model "
                "that built the index"
            )
        self._check_origin("new documents", embeddings.fingerprint)
        self._add(embeddings, lines_of_new(metadata, embeddings.ids))

    def iter_stored(self) -> Iterator[tuple[list[str], np.ndarray, dict[str, np.ndarray]]]:
        """Segment by segment what is stored of the documents: identifiers, lengths (n,), and per vector the rows."""
        for segment in self._segments:
            for part in segment.live_documents():
                yield list(part.ids), part.lengths, part.payload

    def reconstruct(self, ids: Sequence[str]) -> MultiVectorEmbeddings:
        """The stored vectors of some documents, decompressed to float32.

        Raises:
            ValueError: the index does not hold one of them.
        """
        located = [self._located(identifier) for identifier in listed_ids(ids)]
        parts = [segment.vectors_of(np.array([document])) for segment, document in located]
        rows = np.concatenate([np.empty((0, self.dim), dtype=np.float32), *parts])
        return MultiVectorEmbeddings(ids, rows, np.array([len(part) for part in parts], dtype=int), self.fingerprint)

    def verify(self) -> None:
        """Read every file and compare it with its checksum; a ValueError names a damaged one."""
        VectorEncoder.read(self.folder, self.precision, self.dim, verify=True)
        super().verify()


def _settings(encoder: VectorEncoder) -> dict[str, Any]:
    """The entries of the manifest."""
    return {"dim": encoder.dim, "precision": encoder.precision, "num_centroids": encoder.num_centroids}


class _Best(NamedTuple):
    """The best documents so far of one query, best first."""

    documents: np.ndarray
    scores: np.ndarray

    @classmethod
    def none(cls) -> _Best:
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))

    def merged(self, documents: np.ndarray, scores: np.ndarray, count: int) -> _Best:
        """The `count` best of these and others; of equal scores the lower document numbers."""
        documents, scores = np.concatenate([self.documents, documents]), np.concatenate([self.scores, scores])
        if len(scores) > count:
            threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
            kept = np.flatnonzero(scores >= threshold)
            documents, scores = documents[kept], scores[kept]
        order = np.lexsort((documents, -scores))[:count]
        return _Best(documents[order], scores[order])


def _listed_queries(queries: Sequence[Any] | np.ndarray) -> list[np.ndarray]:
    """The rows (length, dim) of each query."""
    shape = getattr(queries, "shape", (0, 0, 0))
    if len(shape) != 3:
        raise ValueError(
            f"expected queries (queries, length, dim) or a list of (length, dim), found the shape "
            f"{tuple(shape)}: write [query] for one"
        )
    rows = [packed_rows(query) for query in queries]
    dims = sorted({row.shape[1] for row in rows})
    if len(dims) > 1:
        raise ValueError(f"expected queries of one dimension, found {dims}")
    return rows


def _query_groups(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of queries with together at most `_SCORED_COLUMNS` vectors, or of one query."""
    first, num_queries = 0, len(offsets) - 1
    while first < num_queries:
        last = int(np.searchsorted(offsets, offsets[first] + _SCORED_COLUMNS, side="right")) - 1
        yield first, (last := max(last, first + 1))
        first = last
