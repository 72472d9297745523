"""Exact search on disk: an inverted index of sparse vectors that opens memory-mapped, adds, deletes and compacts.

An index is a folder: `index.json` (kind, model fingerprint, counts, versions, list of segments) and one file per
segment. `index.json` is written last and renamed, so an operation happens as a whole or not at all.

    segment-00000.safetensors               postings and identifiers of consecutive documents
        term_offsets    int64    (blocks * (vocab_size + 1),)  where the postings of each term begin, per block
        documents       uint16   (postings,)  document numbers within the block of 65,536 documents
        weights         float32  (postings,)
        id_bytes        uint8    identifiers, UTF-8
        id_offsets      int64    (documents + 1,)
        id_digests      uint8    (documents * 16,)  BLAKE2b of the identifiers, sorted: finds a document by identifier
        id_order        int32    (documents,)  the documents in the order of `id_digests`
    segment-00000.deleted-00001.safetensors  tombstones: `deleted` uint8 (documents,)
"""

from __future__ import annotations

import bisect
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from tqdm.auto import tqdm

from rarezoo.retrieval import storage
from rarezoo.retrieval.identifiers import PackedIds, SeenIds, digest_ids, listed_ids
from rarezoo.retrieval.sparse_embeddings import KIND, SparseEmbeddings, canonical_rows

MANIFEST_NAME = "index.json"
FORMAT_VERSION = 1
# Documents per segment: bounds the memory that building and compacting take (about 1 GB at 200 terms per document).
SEGMENT_SIZE = 4 * 65536
_QUERIES_AT_ONCE = 256
_OPENING_ATTEMPTS = 10
_SEGMENT_TENSORS: dict[str, type] = {
    "term_offsets": np.int64,
    "documents": np.uint16,
    "weights": np.float32,
    "id_bytes": np.uint8,
    "id_offsets": np.int64,
    "id_digests": np.uint8,
    "id_order": np.int32,
}
_TOMBSTONE_TENSORS: dict[str, type] = {"deleted": np.uint8}


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


class SparseIndex:
    """An exact inverted index in a folder. Made by `build` and `open`.

    Attributes:
        folder: where it is.
        fingerprint: of the model that encoded the documents; None when their origin is unknown.
        vocabulary: what the terms are called, as a fingerprint; None when that is unknown.
        vocab_size: number of terms.

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
        self.vocabulary: str | None = manifest.get("vocabulary")  # rarezoo's first version wrote none
        self.vocab_size: int = manifest["vocab_size"]
        self._segments = [_Segment(self.folder, row, self.vocab_size) for row in manifest["segments"]]
        counts = [segment.num_documents for segment in self._segments]
        # Documents are numbered through all segments; these are the numbers of the first ones, and the end.
        self._starts: list[int] = [0, *np.cumsum(counts, dtype=np.int64).tolist()]

    @classmethod
    def build(cls, embeddings: SparseEmbeddings, folder: str | os.PathLike[str]) -> SparseIndex:
        """Build an index in a new folder, whole or not at all, reading the embeddings shard by shard.

        Args:
            embeddings: the documents. Documents without terms are kept (no query finds them).
            folder: new or empty.

        Raises:
            FileExistsError: `folder` is not empty.
            ValueError: a shard is damaged or an identifier comes twice.
            CannotWriteError: full disk or read-only folder.
        """
        folder = Path(folder)
        with storage.folder_written_beside(folder) as partial:
            segments = _write_segments(partial, 0, _new_rows(embeddings), embeddings.vocab_size)
            _write_manifest(partial, segments, embeddings)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> SparseIndex:
        """Open an index memory-mapped: nothing is read until it is searched.

        Raises:
            FileNotFoundError: no index there, or a file of it is missing.
            ValueError: `folder` is another kind of index, of a newer version, or a file is damaged.
        """
        return cls(Path(folder))

    def __len__(self) -> int:
        """Number of documents, without the deleted ones."""
        return sum(segment.num_documents - segment.num_deleted for segment in self._segments)

    def __contains__(self, document_id: object) -> bool:
        return isinstance(document_id, str) and self._find([document_id])[0] >= 0

    def __repr__(self) -> str:
        return f"SparseIndex({len(self)} documents, vocab_size={self.vocab_size}, {len(self._segments)} segments)"

    @property
    def num_postings(self) -> int:
        """Stored weights, those of deleted documents included until the index is compacted."""
        return sum(segment.num_postings for segment in self._segments)

    def search(
        self, queries: scipy.sparse.csr_matrix | SparseEmbeddings, top_k: int = 10, num_threads: int = 1
    ) -> list[list[tuple[str, float]]]:
        """The documents with the largest dot products, exactly.

        Args:
            queries: sparse (n, vocab_size), weights >= 0; or embeddings, whose fingerprint is then compared.
            top_k: results per query.
            num_threads: threads, each working on queries of its own.

        Returns:
            Per query at most `top_k` pairs (document identifier, score > 0), best first; of equal scores the
            document that was added first. Scores are float32 sums in the order of the vocabulary.

        Raises:
            ValueError: another vocabulary, another model, or weights that are negative or not finite.
        """
        matrix = self._query_rows(queries)
        for name, value in (("top_k", top_k), ("num_threads", num_threads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; found {value}")
        at_once = min(_QUERIES_AT_ONCE, -(-matrix.shape[0] // num_threads)) or 1
        if matrix.shape[0] <= at_once:
            return self._search_part(matrix, top_k)
        parts = [matrix[start : start + at_once] for start in range(0, matrix.shape[0], at_once)]
        with ThreadPoolExecutor(num_threads) as pool:
            found = pool.map(lambda part: self._search_part(part, top_k), parts)
            # The bar appears after a second.
            bar = tqdm(found, total=len(parts), desc="Searching", unit=f" x {at_once} queries", delay=1.0)
            return [row for rows in bar for row in rows]

    def _query_rows(self, queries: scipy.sparse.csr_matrix | SparseEmbeddings) -> scipy.sparse.csr_matrix:
        if isinstance(queries, SparseEmbeddings):
            if queries.fingerprint is not None and queries.fingerprint != self.fingerprint:
                raise ValueError(
                    f"the queries were encoded by model {queries.fingerprint}, the documents in {self.folder} by "
                    f"{self.fingerprint or 'an unknown model'}: encode both with the same model"
                )
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

    def _search_part(self, queries: scipy.sparse.csr_matrix, top_k: int) -> list[list[tuple[str, float]]]:
        kernels = _kernels()
        num_queries = queries.shape[0]
        k = min(top_k, max(1, self._starts[-1]))
        scores = np.zeros((num_queries, k), dtype=np.float32)
        documents = np.zeros((num_queries, k), dtype=np.int64)
        sizes = np.zeros(num_queries, dtype=np.int64)
        indptr, indices = queries.indptr.astype(np.int64), queries.indices.astype(np.int32)
        accumulator = _accumulator(kernels.BLOCK_SIZE)
        for segment, first_document in zip(self._segments, self._starts):
            kernels.search_segment(
                accumulator,
                segment.term_offsets,
                segment.tensors["documents"],
                segment.tensors["weights"],
                segment.num_documents,
                segment.deleted,
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
        document = int(self._find([document_id])[0])
        if document < 0:
            raise ValueError(f"the index in {self.folder} has no document {document_id!r}")
        number = self._segment_of(document)
        terms = []
        for term, weight in zip(row.indices, row.data):
            document_weight = self._segments[number].weight(int(term), document - self._starts[number])
            if document_weight:
                terms.append(MatchedTerm(int(term), float(weight), document_weight))
        return sorted(terms, key=lambda term: -term.query_weight * term.document_weight)

    def add(self, embeddings: SparseEmbeddings) -> None:
        """Add documents as a new segment; whole or not at all.

        Raises:
            ValueError: another vocabulary or model, or an identifier that the index holds already.
            CannotWriteError: full disk or read-only folder.
        """
        if embeddings.vocab_size != self.vocab_size:
            raise ValueError(
                f"the documents have {embeddings.vocab_size} vocabulary entries, the index {self.vocab_size}: "
                "encode them with the model that built the index"
            )
        if embeddings.fingerprint != self.fingerprint:
            raise ValueError(
                f"the documents were encoded by {embeddings.fingerprint or 'an unknown model'}, those in {self.folder} "
                f"by {self.fingerprint or 'an unknown model'}: encode them with the model that built the index"
            )
        self._check_vocabulary("new documents", embeddings)

        def kept_and_new() -> list[dict[str, Any]]:
            rows = [segment.row for segment in self._segments]
            return rows + self._write_new_segments(self._new_documents(embeddings))

        self._replace_segments(kept_and_new)

    def _new_documents(self, embeddings: SparseEmbeddings) -> Iterator[_Rows]:
        for rows in _new_rows(embeddings):
            known = np.flatnonzero(self._find_digests(rows.digests) >= 0)
            if len(known):
                raise ValueError(
                    f"the index holds a document {rows.ids[int(known[0])]!r} already ({len(known)} such in these "
                    "embeddings): delete it first or give the new one another identifier"
                )
            yield rows

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

        Raises:
            ValueError: a file does not match its checksum; the index is left as it was.
            CannotWriteError: full disk or read-only folder.
        """
        self._replace_segments(lambda: self._write_new_segments(self._live_rows()))

    def _live_rows(self) -> Iterator[_Rows]:
        bar = tqdm(total=len(self), desc="Compacting", unit="document", delay=1.0)
        with bar:
            for segment in self._segments:
                segment.verify()  # or damage would be given a valid checksum
                for rows in segment.live_rows():
                    yield rows
                    bar.update(len(rows.ids))

    def verify(self) -> None:
        """Read every file and compare it with its checksum; a ValueError names a damaged one."""
        for segment in self._segments:
            segment.verify()

    def _ids_of(self, documents: np.ndarray) -> list[str]:
        if len(self._segments) == 1:
            return self._segments[0].ids.take(documents)
        ids = np.empty(len(documents), dtype=object)
        numbers = np.searchsorted(self._starts, documents, side="right") - 1
        for number in np.unique(numbers):
            inside = numbers == number
            ids[inside] = self._segments[number].ids.take(documents[inside] - self._starts[number])
        return ids.tolist()

    def _segment_of(self, document: int) -> int:
        return bisect.bisect_right(self._starts, document) - 1

    def _find(self, ids: Sequence[str]) -> np.ndarray:
        """(n,) int64: document numbers in the index, -1 for unknown and deleted ones."""
        return self._find_digests(digest_ids(ids))

    def _find_digests(self, digests: np.ndarray) -> np.ndarray:
        documents = np.full(len(digests), -1, dtype=np.int64)
        for segment, start in zip(self._segments, self._starts):
            found = segment.find(digests)
            documents = np.where(found >= 0, found + start, documents)
        return documents

    def _write_new_segments(self, parts: Iterable[_Rows]) -> list[dict[str, Any]]:
        number = 1 + max((segment.number for segment in self._segments), default=-1)
        return _write_segments(self.folder, number, parts, self.vocab_size)

    def _replace_segments(self, write: Callable[[], list[dict[str, Any]]]) -> None:
        """Let `write` write files and make the rows that it returns the index; if it fails, its files are removed."""
        self._load()
        try:
            _write_manifest(self.folder, write(), self)
        finally:
            _remove_unlisted(self.folder)
        self._load()


def _remove_unlisted(folder: Path) -> None:
    """Remove the segments and tombstones that are not, or no longer, part of the index."""
    rows = _read_manifest(folder)["segments"]
    listed = {row["file"] for row in rows} | {row["tombstones"] for row in rows}
    for pattern in ("segment-*.safetensors", f".*{storage.PARTIAL_SUFFIX}"):
        for path in folder.glob(pattern):
            if path.name not in listed:
                path.unlink()


class _Segment:
    """One file of postings and, when documents of it have been deleted, its tombstones."""

    def __init__(self, folder: Path, row: dict[str, Any], vocab_size: int):
        self.row = row
        self.path = folder / row["file"]
        self.tombstones = folder / row["tombstones"] if row["tombstones"] else None
        self.number = int(row["file"].removeprefix("segment-").removesuffix(".safetensors"))
        self.num_documents: int = row["num_documents"]
        self.num_postings: int = row["num_postings"]
        self.num_deleted: int = row["num_deleted"]
        self.vocab_size = vocab_size
        self.tensors = storage.map_tensors(self.path, _SEGMENT_TENSORS)
        self.ids = PackedIds(self.tensors["id_bytes"], self.tensors["id_offsets"])
        self.deleted = np.empty(0, dtype=np.uint8)
        if self.tombstones is not None:
            self.deleted = storage.map_tensors(self.tombstones, _TOMBSTONE_TENSORS)["deleted"]
        self.deleted.flags.writeable = False
        self._check_sizes()

    def _check_sizes(self) -> None:
        blocks = -(-self.num_documents // _kernels().BLOCK_SIZE)
        expected = {
            "term_offsets": blocks * (self.vocab_size + 1),
            "documents": self.num_postings,
            "weights": self.num_postings,
            "id_offsets": self.num_documents + 1,
            "id_digests": 16 * self.num_documents,
            "id_order": self.num_documents,
        }
        for name, length in expected.items():
            if len(self.tensors[name]) != length:
                raise ValueError(f"{self.path} is damaged: {len(self.tensors[name])} entries in '{name}', not {length}")
        if self.tombstones is not None and len(self.deleted) != self.num_documents:
            raise ValueError(f"{self.tombstones} is damaged: {len(self.deleted)} entries, not {self.num_documents}")

    @cached_property
    def term_offsets(self) -> np.ndarray:
        """(blocks, vocab_size + 1) int64, checked: the compiled loops trust them."""
        offsets = self.tensors["term_offsets"]
        if (np.diff(offsets) < 0).any() or (len(offsets) and (offsets[0] != 0 or offsets[-1] != self.num_postings)):
            raise ValueError(f"{self.path} is damaged: 'term_offsets' does not increase from 0 to {self.num_postings}")
        return offsets.reshape(-1, self.vocab_size + 1)

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

    def weight(self, term: int, document: int) -> float:
        """Weight of a term in a document, 0 where it has none."""
        block, number = divmod(document, _kernels().BLOCK_SIZE)
        start, end = self.term_offsets[block, term : term + 2]
        position = start + np.searchsorted(self.tensors["documents"][start:end], number)
        if position < end and self.tensors["documents"][position] == number:
            return float(self.tensors["weights"][position])
        return 0.0

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

    def live_rows(self) -> Iterator[_Rows]:
        """Block by block, the documents that are not deleted."""
        digests = np.empty(self.num_documents, dtype="S16")
        digests[self.tensors["id_order"]] = self.tensors["id_digests"].view("S16")
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


def _write_segments(folder: Path, number: int, parts: Iterable[_Rows], vocab_size: int) -> list[dict[str, Any]]:
    """Write segments from `number` on; returns their rows for the manifest."""
    rows: list[dict[str, Any]] = []
    for group in _groups(parts, SEGMENT_SIZE):
        path = folder / f"segment-{number + len(rows):05d}.safetensors"
        tensors = _invert(group, vocab_size)
        storage.write_tensors(path, tensors)
        rows.append(
            {
                "file": path.name,
                "num_documents": len(tensors["id_order"]),
                "num_postings": len(tensors["weights"]),
                "tombstones": None,
                "num_deleted": 0,
            }
        )
    return rows


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
    ids = PackedIds.pack(identifier for rows in group for identifier in rows.ids)
    digests = np.concatenate([rows.digests for rows in group])
    order = np.argsort(digests, kind="stable")
    return {
        "term_offsets": np.concatenate(offsets),
        "documents": documents,
        "weights": weights,
        "id_bytes": ids.id_bytes,
        "id_offsets": ids.id_offsets,
        "id_digests": digests[order].view(np.uint8),
        "id_order": order.astype(np.int32),
    }


def _read_manifest(folder: Path) -> dict[str, Any]:
    return storage.read_manifest(folder / MANIFEST_NAME, KIND, "index", FORMAT_VERSION)


def _write_manifest(folder: Path, segments: list[dict[str, Any]], origin: SparseEmbeddings | SparseIndex) -> None:
    from rarezoo import __version__

    manifest = {
        "format": "rarezoo.sparse_index",
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "fingerprint": origin.fingerprint,
        "vocabulary": origin.vocabulary,
        "vocab_size": origin.vocab_size,
        "num_documents": sum(row["num_documents"] - row["num_deleted"] for row in segments),
        "num_deleted": sum(row["num_deleted"] for row in segments),
        "num_postings": sum(row["num_postings"] for row in segments),
        "versions": {"rarezoo": __version__},
        "segments": segments,
    }
    storage.write_json(folder / MANIFEST_NAME, manifest)
