"""The segments of a multi-vector index: documents on their way into one, and what is read and computed from one.

vectors         float32, float16 or int8  (tokens, dim)
scales          float32  (tokens,)  of "int8": what the integers are multiplied with
residuals       uint8    (tokens, dim * bits / 8)  instead of `vectors` in "1-bit", "2-bit", "4-bit", "8-bit"
token_offsets   int64    (documents + 1,)  where the vectors of each document begin
codes           uint16 or int32  (tokens,)  the centroid of each vector; not in "float32", as the next two
cell_offsets    int32    (num_centroids + 1,)  where the list of each centroid begins
cell_documents  uint16   the documents that have a vector with that centroid
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from rarezoo.retrieval import storage
from rarezoo.retrieval.identifiers import SeenIds
from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings
from rarezoo.retrieval.residual_codec import compiled_loops
from rarezoo.retrieval.segmented_index import Segment, id_tensors
from rarezoo.retrieval.vector_encoder import VectorEncoder, rows_of_runs

# Per segment: document numbers fit into 16 bits, and a segment of float32 vectors with 128 dimensions into 1 GB.
SEGMENT_DOCUMENTS = 65536
SEGMENT_VECTORS = 2**21
_BLOCK_VECTORS = 2**16  # encoded at once
_SCORED_VECTORS = 2**12  # of one matrix product


class EncodedDocuments(NamedTuple):
    """Consecutive documents on their way into a segment; `payload` has one row per vector."""

    ids: Sequence[str]
    digests: np.ndarray
    lengths: np.ndarray
    payload: dict[str, np.ndarray]

    def part(self, start: int, end: int) -> EncodedDocuments:
        first, last = int(self.lengths[:start].sum()), int(self.lengths[:end].sum())
        payload = {name: rows[first:last] for name, rows in self.payload.items()}
        return EncodedDocuments(self.ids[start:end], self.digests[start:end], self.lengths[start:end], payload)


def encoded_documents(embeddings: MultiVectorEmbeddings, encoder: VectorEncoder) -> Iterator[EncodedDocuments]:
    """The verified shards of embeddings, encoded; an identifier that comes twice is an error."""
    seen = SeenIds()
    with tqdm(total=len(embeddings), desc="Indexing", unit="document", delay=1.0) as bar:
        for shard in embeddings.iter_shards(verify=True):
            lengths = shard.lengths.astype(np.int64)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            ids, vectors = list(shard.ids), shard.vectors
            for first, last in _ranges(offsets, _BLOCK_VECTORS, len(ids)):
                payload = encoder.encode(vectors[offsets[first] : offsets[last]])
                part = ids[first:last]
                yield EncodedDocuments(part, seen.add(part), lengths[first:last], payload)
                bar.update(len(part))


def _ranges(offsets: np.ndarray, max_vectors: int, max_documents: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of documents with at most so many vectors, or of one document that has more."""
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + max_vectors, side="right")) - 1
        last = min(max(last, first + 1), first + max_documents)
        yield first, last
        first = last


def segment_contents(
    parts: Iterable[EncodedDocuments], encoder: VectorEncoder
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """The tensors of one segment after another, and the number of its vectors."""
    for group in _groups(parts):
        tensors = _joined(group, encoder)
        yield tensors, int(tensors["token_offsets"][-1])


def _groups(parts: Iterable[EncodedDocuments]) -> Iterator[list[EncodedDocuments]]:
    """Cut and collect parts into groups that make one segment each."""
    group: list[EncodedDocuments] = []
    documents = vectors = 0
    for part in parts:
        start = 0
        while start < len(part.ids):
            ends = np.cumsum(part.lengths[start:])
            fitting = int(np.searchsorted(ends, SEGMENT_VECTORS - vectors, side="right"))
            fitting = min(fitting, SEGMENT_DOCUMENTS - documents)
            if fitting == 0 and group:
                yield group
                group, documents, vectors = [], 0, 0
                continue
            fitting = max(fitting, 1)
            group.append(part.part(start, start + fitting))
            documents, vectors = documents + fitting, vectors + int(ends[fitting - 1])
            start += fitting
    if group:
        yield group


def _segment_tensors(encoder: VectorEncoder) -> dict[str, type]:
    types: dict[str, type] = {name: dtype for name, (dtype, _) in encoder.payload_types.items()}
    if encoder.centroids is not None:
        types |= {"cell_offsets": np.int32, "cell_documents": np.uint16}
    return types | {"token_offsets": np.int64}


def _joined(group: list[EncodedDocuments], encoder: VectorEncoder) -> dict[str, np.ndarray]:
    """The tensors of one segment."""
    lengths = np.concatenate([part.lengths for part in group])
    token_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tensors = {name: np.concatenate([part.payload[name] for part in group]) for name in encoder.payload_types}
    if encoder.centroids is not None:
        cells = _inverted(tensors["codes"], token_offsets, encoder.num_centroids)
        tensors |= dict(zip(("cell_offsets", "cell_documents"), cells))
    return {**tensors, "token_offsets": token_offsets, **id_tensors(group)}


def _inverted(codes: np.ndarray, token_offsets: np.ndarray, num_centroids: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (num_centroids + 1,) int32 and documents uint16 of the inverted lists."""
    kernels = compiled_loops()
    offsets = np.zeros(num_centroids + 1, dtype=np.int32)
    nothing = np.empty(0, dtype=np.uint16)
    kernels.invert_codes(codes, token_offsets, offsets, nothing, np.full(num_centroids, -1, dtype=np.int32))
    offsets = np.cumsum(offsets, dtype=np.int32)
    documents = np.empty(int(offsets[-1]), dtype=np.uint16)
    if len(documents):
        last_document = np.full(num_centroids, -1, dtype=np.int32)
        kernels.invert_codes(codes, token_offsets, offsets[:-1].copy(), documents, last_document)
    return offsets, documents


class MultiVectorSegment(Segment):
    """One file of vectors, document by document, with the inverted lists of the centroids."""

    def __init__(self, folder: Path, row: dict[str, Any], encoder: VectorEncoder):
        super().__init__(folder, row, _segment_tensors(encoder))
        self.num_vectors: int = row["num_vectors"]
        self._encoder = encoder
        shapes: dict[str, tuple[int, ...]] = {"token_offsets": (self.num_documents + 1,)}
        for name, (_, shape) in encoder.payload_types.items():
            shapes[name] = (self.num_vectors, *shape)
        if encoder.centroids is not None:
            shapes["cell_offsets"] = (encoder.num_centroids + 1,)
        storage.check_shapes(self.path, self.tensors, shapes)

    def _checked_offsets(self, name: str, end: int) -> np.ndarray:
        storage.check_offsets(self.path, name, self.tensors[name], end)
        return self.tensors[name]

    @cached_property
    def token_offsets(self) -> np.ndarray:
        """(documents + 1,) int64, checked: the compiled loops trust them, as the next two."""
        return self._checked_offsets("token_offsets", self.num_vectors)

    @cached_property
    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Offsets (num_centroids + 1,) int32 and documents uint16 of the inverted lists."""
        documents = self.tensors["cell_documents"]
        if len(documents) and documents.max() >= self.num_documents:
            raise ValueError(f"{self.path} is damaged: 'cell_documents' holds the document {documents.max()}")
        return self._checked_offsets("cell_offsets", len(documents)), documents

    @cached_property
    def codes(self) -> np.ndarray:
        """(tokens,) the centroid of each vector."""
        codes = self.tensors["codes"]
        if len(codes) and not 0 <= codes.min() <= codes.max() < self._encoder.num_centroids:
            raise ValueError(f"{self.path} is damaged: 'codes' holds numbers from {codes.min()} to {codes.max()}")
        return codes

    @cached_property
    def searchable(self) -> np.ndarray:
        """(documents,) bool: has vectors and is not deleted."""
        searchable = np.diff(self.token_offsets) > 0
        return searchable & self.live()

    def in_cells(self, cells: np.ndarray, eligible: np.ndarray) -> np.ndarray:
        """(documents,) bool: eligible, and in a list of the marked cells (num_centroids,) uint8."""
        marks = np.zeros(self.num_documents, dtype=bool)
        compiled_loops().mark_documents(cells, *self.cells, eligible, marks)
        return marks

    def approximate_scores(self, documents: np.ndarray, cell_scores: np.ndarray) -> np.ndarray:
        """(n,) float32: MaxSim with centroids for vectors, of the query with `cell_scores` (num_centroids, length)."""
        scores = np.empty(len(documents), dtype=np.float32)
        starts, lengths = self._runs(documents)
        compiled_loops().approximate_scores(cell_scores, self.codes, starts, lengths, scores)
        return scores

    def _runs(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = self.token_offsets[documents]
        return starts, self.token_offsets[documents + 1] - starts

    def vectors_of(self, documents: np.ndarray) -> np.ndarray:
        """(vectors, dim) float32: the rows of some documents, decompressed."""
        if self._encoder.codec is not None:
            assert self.codes is not None  # checks them
        return self._encoder.decode(self.tensors, *self._runs(documents))

    def max_sim(self, documents: np.ndarray, queries: np.ndarray, query_offsets: np.ndarray) -> np.ndarray:
        """(queries, n) float32: MaxSim of some documents with the queries whose rows begin at `query_offsets`."""
        scores = np.empty((len(query_offsets) - 1, len(documents)), dtype=np.float32)
        lengths = self._runs(documents)[1]
        ends = np.cumsum(lengths)
        columns = np.ascontiguousarray(queries.T)
        first = 0
        while first < len(documents):
            limit = (ends[first - 1] if first else 0) + _SCORED_VECTORS
            last = max(first + 1, int(np.searchsorted(ends, limit, side="right")))
            products = self.vectors_of(documents[first:last]) @ columns
            block = np.empty((len(scores), last - first), dtype=np.float32)
            compiled_loops().max_sim(products, lengths[first:last], query_offsets, block)
            scores[:, first:last] = block
            first = last
        return scores

    def live_documents(self) -> Iterator[EncodedDocuments]:
        """The documents that are not deleted, as they are stored, at once."""
        live = np.flatnonzero(self.live())
        starts, lengths = self._runs(live)
        payload = {name: rows_of_runs(self.tensors[name], starts, lengths) for name in self._encoder.payload_types}
        yield EncodedDocuments(self.ids.take(live), self.digests()[live], lengths, payload)
