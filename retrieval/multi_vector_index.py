"""MaxSim search on disk: an index of packed vectors that opens memory-mapped, adds, deletes and compacts.

In "float32" every document is scored, exactly. The other precisions assign every vector to a centroid; a search then
goes through the stages of PLAID (arXiv 2205.09707): the documents in the lists of the centroids nearest to the query's
vectors, their scores with centroids in place of vectors, and MaxSim over the decompressed vectors of the best of them.
On clustered synthetic vectors recall@10 is 0.96 in "2-bit" and 1.00 in "int8", in about a tenth of the time of exact
search (`benchmarks/bench_multi_vector_index.py`); the loss is the compression's, not the stages'.

An index is a folder: `index.json` (kind, model fingerprint, precision, counts, versions, list of segments), the codec
and one file per segment. `index.json` is written last and renamed, so an operation happens as a whole or not at all.

    codec.safetensors                       not in "float32"
        centroids       float32  (num_centroids, dim)
        bucket_cutoffs, bucket_weights, average_residual  float32, of the residual codec; empty in other precisions
    segment-00000.safetensors               consecutive documents
        vectors         float32, float16 or int8  (tokens, dim)
        scales          float32  (tokens,)  of "int8": what the integers are multiplied with
        residuals       uint8    (tokens, dim * bits / 8)  instead of `vectors` in "1-bit", "2-bit", "4-bit", "8-bit"
        token_offsets   int64    (documents + 1,)  where the vectors of each document begin
        codes           uint16 or int32  (tokens,)  the centroid of each vector; not in "float32", as the next two
        cell_offsets    int32    (num_centroids + 1,)  where the list of each centroid begins
        cell_documents  uint16   the documents that have a vector with that centroid
        id_bytes, id_offsets, id_digests, id_order  as in `sparse_index`
    segment-00000.deleted-00001.safetensors  tombstones: `deleted` uint8 (documents,)
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from rarezoo.retrieval import storage
from rarezoo.retrieval.identifiers import PackedIds, SeenIds, digest_ids, listed_ids
from rarezoo.retrieval.multi_vector_embeddings import KIND, MultiVectorEmbeddings, packed_rows
from rarezoo.retrieval.residual_codec import (
    CentroidTree,
    ResidualCodec,
    compiled_loops,
    default_num_centroids,
    train_centroids,
)
from rarezoo.retrieval.sparse_embeddings import SparseEmbeddings

MANIFEST_NAME = "index.json"
FORMAT_VERSION = 1
CODEC_NAME = "codec.safetensors"
# Per segment: document numbers fit into 16 bits, and a segment of float32 vectors with 128 dimensions into 1 GB.
SEGMENT_DOCUMENTS = 65536
SEGMENT_VECTORS = 2**21
_RESIDUAL_BITS = {"1-bit": 1, "2-bit": 2, "4-bit": 4, "8-bit": 8}
PRECISIONS = ("float32", "float16", "int8", *_RESIDUAL_BITS)
_TRAINING_VECTORS_PER_CENTROID = 32
_BLOCK_VECTORS = 2**16  # encoded at once
_SCORED_VECTORS, _SCORED_COLUMNS = 2**12, 2**10  # of one matrix product
_OPENING_ATTEMPTS = 10
_NORM_TOLERANCE = 0.02
_TOMBSTONE_TENSORS: dict[str, type] = {"deleted": np.uint8}
_CODEC_TENSORS: dict[str, type] = dict.fromkeys(
    ("centroids", "bucket_cutoffs", "bucket_weights", "average_residual"), np.float32
)


class _Encoded(NamedTuple):
    """Consecutive documents on their way into a segment; `payload` has one row per vector."""

    ids: Sequence[str]
    digests: np.ndarray
    lengths: np.ndarray
    payload: dict[str, np.ndarray]

    def part(self, start: int, end: int) -> _Encoded:
        first, last = int(self.lengths[:start].sum()), int(self.lengths[:end].sum())
        payload = {name: rows[first:last] for name, rows in self.payload.items()}
        return _Encoded(self.ids[start:end], self.digests[start:end], self.lengths[start:end], payload)


class _Encoder:
    """How the vectors of an index lie on disk: its precision, and its centroids where it has any."""

    def __init__(self, precision: str, dim: int, centroids: np.ndarray | None, codec: ResidualCodec | None):
        self.precision = precision
        self.dim = dim
        self.centroids = centroids
        self.codec = codec

    @cached_property
    def _tree(self) -> CentroidTree:
        assert self.centroids is not None
        return CentroidTree(self.centroids)

    @property
    def num_centroids(self) -> int:
        return 0 if self.centroids is None else len(self.centroids)

    @property
    def payload_types(self) -> dict[str, tuple[type, tuple[int, ...]]]:
        """Type, and shape behind the number of vectors, of everything that is stored per vector."""
        if self.codec is not None:
            stored: dict[str, tuple[type, tuple[int, ...]]] = {
                "residuals": (np.uint8, (self.codec.num_residual_bytes,))
            }
        else:
            stored = {"vectors": (getattr(np, self.precision), (self.dim,))}
        if self.precision == "int8":
            stored["scales"] = (np.float32, ())
        if self.centroids is not None:
            stored["codes"] = (np.uint16 if self.num_centroids <= 65536 else np.int32, ())
        return stored

    def encode(self, vectors: np.ndarray) -> dict[str, np.ndarray]:
        """What is stored of (n, dim) float32 or float16 vectors."""
        if self.precision == "float32":
            return {"vectors": vectors.astype(np.float32, copy=False)}
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        codes = self._tree.nearest(vectors)
        if self.codec is not None:
            _check_norms(vectors, self.precision)
            stored = {"residuals": self.codec.compress(vectors, codes)[1]}
        elif self.precision == "int8":
            scales = np.abs(vectors).max(axis=1, initial=0) / 127
            scales[scales == 0] = 1
            stored = {"vectors": np.rint(vectors / scales[:, None]).astype(np.int8), "scales": scales}
        else:
            stored = {"vectors": _as_float16(vectors)}
        return {**stored, "codes": codes.astype(self.payload_types["codes"][0])}

    def decode(self, tensors: dict[str, np.ndarray], starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(sum of lengths, dim) float32: some runs of stored vectors, one below the other."""
        if self.codec is not None:
            return self.codec.decompress_runs(tensors["codes"], tensors["residuals"], starts, lengths)
        vectors = _rows_of_runs(tensors["vectors"], starts, lengths).astype(np.float32, copy=False)
        if self.precision == "int8":
            vectors *= _rows_of_runs(tensors["scales"], starts, lengths)[:, None]
        return vectors


def _as_float16(vectors: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = vectors.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError("a vector holds values beyond float16's range of 65,504: choose the precision 'float32'")
    return halves


def _check_norms(vectors: np.ndarray, precision: str) -> None:
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(np.abs(norms - 1) > _NORM_TOLERANCE)
    if len(wrong):
        raise ValueError(
            f"the precision {precision!r} keeps directions only and needs vectors of length 1, found the length "
            f"{norms[wrong[0]]:.4g}: normalise them or choose 'float32', 'float16' or 'int8'"
        )


def _rows_of_runs(rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Runs of rows, one below the other: a view where they follow each other in `rows`."""
    if len(starts) == 0:
        return rows[:0]
    ends = starts + lengths
    if np.array_equal(starts[1:], ends[:-1]):
        return rows[starts[0] : ends[-1]]
    before = np.cumsum(lengths) - lengths
    return rows[np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))]


class MultiVectorIndex:
    """A MaxSim index in a folder. Made by `build` and `open`.

    Attributes:
        folder: where it is.
        fingerprint: of the model that encoded the documents; None when their origin is unknown.
        precision: how vectors are stored, one of `PRECISIONS`.
        dim: dimensions of a vector.

    One process at a time may change an index; others keep reading what they have opened.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._load()

    def _load(self) -> None:
        """Open what the manifest lists; once more when another process has replaced it meanwhile, and its files."""
        for _ in range(_OPENING_ATTEMPTS):
            manifest = _read_manifest(self.folder)
            try:
                return self._open_segments(manifest)
            except (FileNotFoundError, ValueError):
                if _read_manifest(self.folder) == manifest:
                    raise
        self._open_segments(_read_manifest(self.folder))

    def _open_segments(self, manifest: dict[str, Any]) -> None:
        self.fingerprint: str | None = manifest["fingerprint"]
        self.precision: str = manifest["precision"]
        self.dim: int = manifest["dim"]
        self._encoder = _read_encoder(self.folder, self.precision, self.dim)
        self._segments = [_Segment(self.folder, row, self._encoder) for row in manifest["segments"]]
        counts = [segment.num_documents for segment in self._segments]
        # Documents are numbered through all segments; these are the numbers of the first ones, and the end.
        self._starts: list[int] = [0, *np.cumsum(counts, dtype=np.int64).tolist()]

    @classmethod
    def build(
        cls,
        embeddings: MultiVectorEmbeddings,
        folder: str | os.PathLike[str],
        precision: str = "float32",
        num_centroids: int | None = None,
        codec: ResidualCodec | None = None,
        seed: int = 0,
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

        Raises:
            FileExistsError: `folder` is not empty.
            ValueError: a shard is damaged, an identifier comes twice, vectors that the precision cannot hold, or no
                vectors to train centroids on.
            CannotWriteError: full disk or read-only folder.
        """
        folder = Path(folder)
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}; found {precision!r}")
        with storage.folder_written_beside(folder) as partial:
            encoder = _new_encoder(embeddings, precision, num_centroids, codec, seed)
            _write_encoder(partial, encoder)
            segments = _write_segments(partial, 0, _new_documents(embeddings, encoder), encoder)
            _write_manifest(partial, segments, encoder, embeddings.fingerprint)
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
            ValueError: an identifier comes twice.
            CannotWriteError: full disk or read-only folder.
        """
        folder, seen = Path(folder), SeenIds()
        encoder = _Encoder(f"{codec.num_bits}-bit", codec.dim, codec.centroids, codec)
        types = encoder.payload_types

        def encoded() -> Iterator[_Encoded]:
            for ids, lengths, stored in parts:
                payload: dict[str, np.ndarray] = {
                    name: stored[name].astype(dtype, copy=False) for name, (dtype, _) in types.items()
                }
                yield _Encoded(ids, seen.add(ids), lengths.astype(np.int64), payload)

        with storage.folder_written_beside(folder) as partial:
            _write_encoder(partial, encoder)
            _write_manifest(partial, _write_segments(partial, 0, encoded(), encoder), encoder, fingerprint)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> MultiVectorIndex:
        """Open an index memory-mapped: no vectors are read until it is searched.

        Raises:
            FileNotFoundError: no index there, or a file of it is missing.
            ValueError: `folder` is another kind of index, of another version, or a file is damaged.
        """
        return cls(Path(folder))

    def __len__(self) -> int:
        """Number of documents, without the deleted ones."""
        return sum(segment.num_documents - segment.num_deleted for segment in self._segments)

    def __contains__(self, document_id: object) -> bool:
        return isinstance(document_id, str) and self._find([document_id])[0] >= 0

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
    ) -> list[list[tuple[str, float]]]:
        """The documents with the largest MaxSim: for each query vector its best inner product in the document, summed.

        Args:
            queries: embeddings, whose fingerprint is then compared; or (queries, length, dim), or one array or tensor
                (length, dim) per query.
            top_k: results per query.
            subset: identifiers to search among; those that the index does not hold are passed over.
            exhaustive: score every document with its stored vectors. An index in "float32" always does.
            num_cells: centroids per query vector whose documents become candidates.
            num_candidates: candidates whose MaxSim is computed, by default max(256, 16 * top_k). Of an index, or a
                subset, with no more documents all are.

        Returns:
            Per query at most `top_k` pairs (document identifier, score), best first; of equal scores the document that
            was added first. Scores are float32 and may be negative. Documents without vectors are not found, and a
            query without vectors finds nothing.

        Raises:
            ValueError: another dimension, another model, or query vectors that are not finite.
        """
        vectors, offsets = self._query_rows(queries)
        num_candidates = max(256, 16 * top_k) if num_candidates is None else num_candidates
        for name, value in (("top_k", top_k), ("num_cells", num_cells), ("num_candidates", num_candidates)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; found {value}")
        eligible = self._eligible(subset)
        if exhaustive or self._encoder.centroids is None or sum(map(np.count_nonzero, eligible)) <= num_candidates:
            found = self._search_all(vectors, offsets, eligible, top_k)
        else:
            rows = [vectors[start:end] for start, end in itertools.pairwise(offsets)]
            cells = min(num_cells, self._encoder.num_centroids) if subset is None else 0
            found = [self._search_candidates(row, eligible, top_k, cells, max(num_candidates, top_k)) for row in rows]
        return [list(zip(self._ids_of(best.documents), best.scores.tolist())) for best in found]

    def _query_rows(self, queries: MultiVectorEmbeddings | Sequence[Any] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(query vectors, dim) float32 and (queries + 1,) offsets."""
        if isinstance(queries, MultiVectorEmbeddings):
            if queries.fingerprint is not None and queries.fingerprint != self.fingerprint:
                raise ValueError(
                    f"the queries were encoded by model {queries.fingerprint}, the documents in {self.folder} by "
                    f"{self.fingerprint or 'an unknown model'}: encode both with the same model"
                )
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

    def _eligible(self, subset: Iterable[str] | None) -> list[np.ndarray]:
        """Per segment (documents,) bool: those that have vectors, are not deleted, and lie in the subset."""
        if subset is None:
            return [segment.searchable for segment in self._segments]
        documents = self._find(list(dict.fromkeys(listed_ids(subset))))
        chosen = np.zeros(self._starts[-1], dtype=bool)
        chosen[documents[documents >= 0]] = True
        parts = zip(self._segments, self._starts, self._starts[1:])
        return [segment.searchable & chosen[start:end] for segment, start, end in parts]

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

    def add(self, embeddings: MultiVectorEmbeddings) -> None:
        """Add documents as a new segment; whole or not at all. The centroids stay those that `build` trained.

        Raises:
            ValueError: another dimension or model, or an identifier that the index holds already.
            CannotWriteError: full disk or read-only folder.
        """
        if embeddings.dim != self.dim:
            raise ValueError(
                f"the documents have {embeddings.dim} dimensions, the index {self.dim}: encode them with the model "
                "that built the index"
            )
        if embeddings.fingerprint != self.fingerprint:
            raise ValueError(
                f"the documents were encoded by {embeddings.fingerprint or 'an unknown model'}, those in {self.folder} "
                f"by {self.fingerprint or 'an unknown model'}: encode them with the model that built the index"
            )

        def kept_and_new() -> list[dict[str, Any]]:
            rows = [segment.row for segment in self._segments]
            return rows + self._write_new_segments(self._unknown_documents(embeddings))

        self._replace_segments(kept_and_new)

    def _unknown_documents(self, embeddings: MultiVectorEmbeddings) -> Iterator[_Encoded]:
        for part in _new_documents(embeddings, self._encoder):
            known = np.flatnonzero(self._find_digests(part.digests) >= 0)
            if len(known):
                raise ValueError(
                    f"the index holds a document {part.ids[int(known[0])]!r} already: delete it first or give the new "
                    "one another identifier; nothing was added"
                )
            yield part

    def delete(self, ids: Iterable[str]) -> None:
        """Delete documents by tombstones; whole or not at all. `compact` frees their space.

        Raises:
            ValueError: the index does not hold one of them; nothing is deleted then.
            TypeError: `ids` is one string, or an identifier is not a string.
        """
        unique = list(dict.fromkeys(listed_ids(ids)))
        self._replace_segments(lambda: self._with_tombstones(unique))

    def _with_tombstones(self, ids: list[str]) -> list[dict[str, Any]]:
        documents = self._find(ids)
        unknown = [identifier for identifier, document in zip(ids, documents) if document < 0]
        if unknown:
            raise ValueError(
                f"the index in {self.folder} has no document {', '.join(map(repr, unknown[:5]))}"
                f"{', …' if len(unknown) > 5 else ''} ({len(unknown)} of {len(ids)} unknown); nothing was deleted"
            )
        rows = []
        for segment, start in zip(self._segments, self._starts):
            inside = documents[(documents >= start) & (documents < start + segment.num_documents)] - start
            rows.append(segment.write_tombstones(inside) if len(inside) else segment.row)
        return rows

    def compact(self) -> None:
        """Rewrite the index without deleted documents and with as few segments as possible; whole or not at all.

        The stored vectors are copied as they are: nothing is compressed a second time.

        Raises:
            ValueError: a file does not match its checksum; the index is left as it was.
            CannotWriteError: full disk or read-only folder.
        """
        self._replace_segments(lambda: self._write_new_segments(self._live_documents()))

    def _live_documents(self) -> Iterator[_Encoded]:
        with tqdm(total=len(self), desc="Compacting", unit="document", delay=1.0) as bar:
            for segment in self._segments:
                segment.verify()  # or damage would be given a valid checksum
                part = segment.live_documents()
                yield part
                bar.update(len(part.ids))

    def iter_stored(self) -> Iterator[tuple[list[str], np.ndarray, dict[str, np.ndarray]]]:
        """Segment by segment what is stored of the documents: identifiers, lengths (n,), and per vector the rows."""
        for segment in self._segments:
            part = segment.live_documents()
            yield list(part.ids), part.lengths, part.payload

    def reconstruct(self, ids: Sequence[str]) -> MultiVectorEmbeddings:
        """The stored vectors of some documents, decompressed to float32.

        Raises:
            ValueError: the index does not hold one of them.
        """
        parts = []
        for identifier, document in zip(listed_ids(ids), self._find(listed_ids(ids)).tolist()):
            if document < 0:
                raise ValueError(f"the index in {self.folder} has no document {identifier!r}")
            number = bisect.bisect_right(self._starts, document) - 1
            parts.append(self._segments[number].vectors_of(np.array([document - self._starts[number]])))
        rows = np.concatenate([np.empty((0, self.dim), dtype=np.float32), *parts])
        return MultiVectorEmbeddings(ids, rows, np.array([len(part) for part in parts], dtype=int), self.fingerprint)

    def verify(self) -> None:
        """Read every file and compare it with its checksum; a ValueError names a damaged one."""
        _read_encoder(self.folder, self.precision, self.dim, verify=True)
        for segment in self._segments:
            segment.verify()

    def _ids_of(self, documents: np.ndarray) -> list[str]:
        ids = np.empty(len(documents), dtype=object)
        numbers = np.searchsorted(self._starts, documents, side="right") - 1
        for number in np.unique(numbers):
            inside = numbers == number
            ids[inside] = self._segments[number].ids.take(documents[inside] - self._starts[number])
        return ids.tolist()

    def _find(self, ids: Sequence[str]) -> np.ndarray:
        """(n,) int64: document numbers in the index, -1 for unknown and deleted ones."""
        return self._find_digests(digest_ids(ids))

    def _find_digests(self, digests: np.ndarray) -> np.ndarray:
        documents = np.full(len(digests), -1, dtype=np.int64)
        for segment, start in zip(self._segments, self._starts):
            found = segment.find(digests)
            documents = np.where(found >= 0, found + start, documents)
        return documents

    def _write_new_segments(self, parts: Iterable[_Encoded]) -> list[dict[str, Any]]:
        number = 1 + max((segment.number for segment in self._segments), default=-1)
        return _write_segments(self.folder, number, parts, self._encoder)

    def _replace_segments(self, write: Callable[[], list[dict[str, Any]]]) -> None:
        """Let `write` write files and make the rows that it returns the index; if it fails, its files are removed."""
        self._load()
        try:
            _write_manifest(self.folder, write(), self._encoder, self.fingerprint)
        finally:
            _remove_unlisted(self.folder)
        self._load()


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


def _remove_unlisted(folder: Path) -> None:
    """Remove the segments and tombstones that are not, or no longer, part of the index."""
    rows = _read_manifest(folder)["segments"]
    listed = {row["file"] for row in rows} | {row["tombstones"] for row in rows}
    for pattern in ("segment-*.safetensors", f".*{storage.PARTIAL_SUFFIX}"):
        for path in folder.glob(pattern):
            if path.name not in listed:
                path.unlink()


class _Segment:
    """One file of documents and, when some of them have been deleted, its tombstones."""

    def __init__(self, folder: Path, row: dict[str, Any], encoder: _Encoder):
        self.row = row
        self.path = folder / row["file"]
        self.tombstones = folder / row["tombstones"] if row["tombstones"] else None
        self.number = int(row["file"].removeprefix("segment-").removesuffix(".safetensors"))
        self.num_documents: int = row["num_documents"]
        self.num_vectors: int = row["num_vectors"]
        self.num_deleted: int = row["num_deleted"]
        self._encoder = encoder
        self.tensors = storage.map_tensors(self.path, _segment_tensors(encoder))
        self.ids = PackedIds(self.tensors["id_bytes"], self.tensors["id_offsets"])
        self.deleted = np.empty(0, dtype=np.uint8)
        if self.tombstones is not None:
            self.deleted = storage.map_tensors(self.tombstones, _TOMBSTONE_TENSORS)["deleted"]
        self._check_sizes()

    def _check_sizes(self) -> None:
        expected: dict[str, tuple[int, ...]] = {
            "token_offsets": (self.num_documents + 1,),
            "id_offsets": (self.num_documents + 1,),
            "id_digests": (16 * self.num_documents,),
            "id_order": (self.num_documents,),
        }
        for name, (_, shape) in self._encoder.payload_types.items():
            expected[name] = (self.num_vectors, *shape)
        if self._encoder.centroids is not None:
            expected["cell_offsets"] = (self._encoder.num_centroids + 1,)
        for name, shape in expected.items():
            if self.tensors[name].shape != shape:
                found = self.tensors[name].shape
                raise ValueError(f"{self.path} is damaged: '{name}' has the shape {found}, not {shape}")
        if self.tombstones is not None and len(self.deleted) != self.num_documents:
            raise ValueError(f"{self.tombstones} is damaged: {len(self.deleted)} entries, not {self.num_documents}")

    def _increasing(self, name: str, end: int) -> np.ndarray:
        offsets = self.tensors[name]
        if offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
            raise ValueError(f"{self.path} is damaged: '{name}' does not increase from 0 to {end}")
        return offsets

    @cached_property
    def token_offsets(self) -> np.ndarray:
        """(documents + 1,) int64, checked: the compiled loops trust them, as the next two."""
        return self._increasing("token_offsets", self.num_vectors)

    @cached_property
    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Offsets (num_centroids + 1,) int32 and documents uint16 of the inverted lists."""
        documents = self.tensors["cell_documents"]
        if len(documents) and documents.max() >= self.num_documents:
            raise ValueError(f"{self.path} is damaged: 'cell_documents' holds the document {documents.max()}")
        return self._increasing("cell_offsets", len(documents)), documents

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
        return searchable & (self.deleted == 0) if len(self.deleted) else searchable

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

    def verify(self) -> None:
        """Compare the files with their checksums."""
        storage.verify_checksum(self.path, self.tensors)
        self._verify_tombstones()

    def _verify_tombstones(self) -> None:
        if self.tombstones is not None:
            storage.verify_checksum(self.tombstones, {"deleted": self.deleted})

    def find(self, digests: np.ndarray) -> np.ndarray:
        """(n,) int64: documents with these identifiers, -1 where there is none or it is deleted."""
        known = self.tensors["id_digests"].view("S16")
        positions = np.searchsorted(known, digests)
        positions[positions == len(known)] = 0
        documents = np.where(known[positions] == digests, self.tensors["id_order"][positions], -1).astype(np.int64)
        if len(self.deleted):
            documents[(documents >= 0) & (self.deleted[documents] == 1)] = -1
        return documents

    def write_tombstones(self, documents: np.ndarray) -> dict[str, Any]:
        """Write a new file of tombstones, with these documents too; returns the segment's new row."""
        self._verify_tombstones()
        deleted = np.zeros(self.num_documents, dtype=np.uint8)
        deleted[: len(self.deleted)] = self.deleted
        deleted[documents] = 1
        generation = 1 + (int(self.tombstones.stem.rpartition("-")[2]) if self.tombstones else 0)
        path = self.path.with_name(f"{self.path.stem}.deleted-{generation:05d}.safetensors")
        storage.write_tensors(path, {"deleted": deleted})
        return {**self.row, "tombstones": path.name, "num_deleted": int(deleted.sum())}

    def live_documents(self) -> _Encoded:
        """The documents that are not deleted, as they are stored."""
        digests = np.empty(self.num_documents, dtype="S16")
        digests[self.tensors["id_order"]] = self.tensors["id_digests"].view("S16")
        live = np.flatnonzero(self.deleted == 0) if len(self.deleted) else np.arange(self.num_documents)
        starts, lengths = self._runs(live)
        payload = {name: _rows_of_runs(self.tensors[name], starts, lengths) for name in self._encoder.payload_types}
        return _Encoded(self.ids.take(live), digests[live], lengths, payload)


def _new_encoder(
    embeddings: MultiVectorEmbeddings, precision: str, num_centroids: int | None, codec: ResidualCodec | None, seed: int
) -> _Encoder:
    dim, bits = embeddings.dim, _RESIDUAL_BITS.get(precision)
    if precision == "float32":
        if num_centroids is not None or codec is not None:
            raise ValueError("an index in 'float32' has no centroids: leave out num_centroids and codec")
        return _Encoder(precision, dim, None, None)
    if codec is not None:
        if codec.dim != dim or (bits is not None and codec.num_bits != bits):
            raise ValueError(f"{codec} does not fit the precision {precision!r} and vectors of {dim} dimensions")
        return _Encoder(precision, dim, codec.centroids, codec if bits else None)
    if embeddings.num_vectors == 0:
        raise ValueError(
            f"there are no vectors to train the centroids of the precision {precision!r} on: add some documents, give "
            "a codec, or choose 'float32'"
        )
    num_centroids = num_centroids or default_num_centroids(embeddings.num_vectors)
    sample = _sample(embeddings, _TRAINING_VECTORS_PER_CENTROID * num_centroids, seed)
    if bits is None:
        return _Encoder(precision, dim, train_centroids(sample, num_centroids, seed), None)
    _check_norms(sample, precision)
    trained = ResidualCodec.train(sample, bits, num_centroids, seed, least_squares=True)
    return _Encoder(precision, dim, trained.centroids, trained)


def _sample(embeddings: MultiVectorEmbeddings, size: int, seed: int) -> np.ndarray:
    """(at most size, dim) float32: vectors of all shards, drawn without replacement."""
    total = embeddings.num_vectors
    chosen = np.random.default_rng(seed).choice(total, size=min(size, total), replace=False)
    chosen.sort()
    parts, start = [], 0
    for shard in embeddings.iter_shards():
        inside = chosen[slice(*np.searchsorted(chosen, (start, start + shard.num_vectors)))] - start
        parts.append(shard.vectors[inside].astype(np.float32))
        start += shard.num_vectors
    return np.concatenate(parts)


def _read_encoder(folder: Path, precision: str, dim: int, verify: bool = False) -> _Encoder:
    if precision not in PRECISIONS:
        raise ValueError(f"{folder / MANIFEST_NAME} is damaged: precision {precision!r}")
    if precision == "float32":
        return _Encoder(precision, dim, None, None)
    path = folder / CODEC_NAME
    tensors = storage.map_tensors(path, _CODEC_TENSORS)
    if verify:
        storage.verify_checksum(path, tensors)
    centroids = tensors["centroids"]
    if centroids.ndim != 2 or centroids.shape[1] != dim:
        raise ValueError(f"{path} is damaged: 'centroids' has the shape {centroids.shape}, not (…, {dim})")
    if precision not in _RESIDUAL_BITS:
        return _Encoder(precision, dim, centroids, None)
    try:
        codec = ResidualCodec(
            centroids, tensors["bucket_cutoffs"], tensors["bucket_weights"], tensors["average_residual"][0]
        )
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if codec.num_bits != _RESIDUAL_BITS[precision]:
        raise ValueError(f"{path} is damaged: {codec} in an index of the precision {precision!r}")
    return _Encoder(precision, dim, centroids, codec)


def _write_encoder(folder: Path, encoder: _Encoder) -> None:
    if encoder.centroids is None:
        return
    none, codec = np.empty(0, dtype=np.float32), encoder.codec
    tensors = {
        "centroids": encoder.centroids,
        "bucket_cutoffs": none if codec is None else codec.bucket_cutoffs,
        "bucket_weights": none if codec is None else codec.bucket_weights,
        "average_residual": none if codec is None else np.array([codec.average_residual], dtype=np.float32),
    }
    storage.write_tensors(folder / CODEC_NAME, tensors)


def _new_documents(embeddings: MultiVectorEmbeddings, encoder: _Encoder) -> Iterator[_Encoded]:
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
                yield _Encoded(part, seen.add(part), lengths[first:last], payload)
                bar.update(len(part))


def _ranges(offsets: np.ndarray, max_vectors: int, max_documents: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of documents with at most so many vectors, or of one document that has more."""
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + max_vectors, side="right")) - 1
        last = min(max(last, first + 1), first + max_documents)
        yield first, last
        first = last


def _groups(parts: Iterable[_Encoded]) -> Iterator[list[_Encoded]]:
    """Cut and collect parts into groups that make one segment each."""
    group: list[_Encoded] = []
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


def _segment_tensors(encoder: _Encoder) -> dict[str, type]:
    types: dict[str, type] = {name: dtype for name, (dtype, _) in encoder.payload_types.items()}
    if encoder.centroids is not None:
        types |= {"cell_offsets": np.int32, "cell_documents": np.uint16}
    ids = {"id_bytes": np.uint8, "id_offsets": np.int64, "id_digests": np.uint8, "id_order": np.int32}
    return types | {"token_offsets": np.int64} | ids


def _write_segments(folder: Path, number: int, parts: Iterable[_Encoded], encoder: _Encoder) -> list[dict[str, Any]]:
    """Write segments from `number` on; returns their rows for the manifest."""
    rows: list[dict[str, Any]] = []
    for group in _groups(parts):
        path = folder / f"segment-{number + len(rows):05d}.safetensors"
        tensors = _joined(group, encoder)
        storage.write_tensors(path, tensors)
        rows.append(
            {
                "file": path.name,
                "num_documents": len(tensors["id_order"]),
                "num_vectors": int(tensors["token_offsets"][-1]),
                "tombstones": None,
                "num_deleted": 0,
            }
        )
    return rows


def _joined(group: list[_Encoded], encoder: _Encoder) -> dict[str, np.ndarray]:
    """The tensors of one segment."""
    lengths = np.concatenate([part.lengths for part in group])
    token_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = PackedIds.pack(identifier for part in group for identifier in part.ids)
    digests = np.concatenate([part.digests for part in group])
    order = np.argsort(digests, kind="stable")
    tensors = {name: np.concatenate([part.payload[name] for part in group]) for name in encoder.payload_types}
    if encoder.centroids is not None:
        cells = _inverted(tensors["codes"], token_offsets, encoder.num_centroids)
        tensors |= dict(zip(("cell_offsets", "cell_documents"), cells))
    return {
        **tensors,
        "token_offsets": token_offsets,
        "id_bytes": ids.id_bytes,
        "id_offsets": ids.id_offsets,
        "id_digests": digests[order].view(np.uint8),
        "id_order": order.astype(np.int32),
    }


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


def _read_manifest(folder: Path) -> dict[str, Any]:
    return storage.read_manifest(folder / MANIFEST_NAME, KIND, "index", FORMAT_VERSION)


def _write_manifest(folder: Path, segments: list[dict[str, Any]], encoder: _Encoder, fingerprint: str | None) -> None:
    from rarezoo import __version__

    manifest = {
        "format": "rarezoo.multi_vector_index",
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "fingerprint": fingerprint,
        "dim": encoder.dim,
        "precision": encoder.precision,
        "num_centroids": encoder.num_centroids,
        "num_documents": sum(row["num_documents"] - row["num_deleted"] for row in segments),
        "num_deleted": sum(row["num_deleted"] for row in segments),
        "num_vectors": sum(row["num_vectors"] for row in segments),
        "versions": {"rarezoo": __version__},
        "segments": segments,
    }
    storage.write_json(folder / MANIFEST_NAME, manifest)
