"""Folders of segments: what the indexes of all kinds of representations have in common.

An index is a folder: `index.json` (kind, model fingerprint, settings of the kind, counts, versions, list of segments)
and one file per segment. `index.json` is written last and renamed, so an operation happens as a whole or not at all.

    segment-00000.safetensors               consecutive documents: what the kind stores of them, and
        id_bytes        uint8    identifiers, UTF-8
        id_offsets      int64    (documents + 1,)
        id_digests      uint8    (documents * 16,)  BLAKE2b of the identifiers, sorted: finds a document by identifier
        id_order        int32    (documents,)  the documents in the order of `id_digests`
        and their metadata, where they have any (`metadata`)
    segment-00000.deleted-00001.safetensors  tombstones: `deleted` uint8 (documents,)
"""

from __future__ import annotations

import bisect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from tqdm.auto import tqdm

from rarezoo.retrieval import storage
from rarezoo.retrieval.fingerprint import difference
from rarezoo.retrieval.identifiers import PackedIds, digest_ids, listed_ids
from rarezoo.retrieval.metadata import (
    METADATA_TENSORS,
    LinesOf,
    Metadata,
    PackedMetadata,
    Where,
    checked_filter,
    metadata_tensors,
)

if TYPE_CHECKING:
    from typing_extensions import Self

MANIFEST_NAME = "index.json"
FORMAT_VERSION = 1
ID_TENSORS: dict[str, type] = {
    "id_bytes": np.uint8,
    "id_offsets": np.int64,
    "id_digests": np.uint8,
    "id_order": np.int32,
}
_TOMBSTONE_TENSORS: dict[str, type] = {"deleted": np.uint8}
_OPENING_ATTEMPTS = 10


class Documents(Protocol):
    """Consecutive documents on their way into a segment, with what `SeenIds.add` makes of their identifiers."""

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def digests(self) -> np.ndarray: ...


def id_tensors(parts: Sequence[Documents]) -> dict[str, np.ndarray]:
    """The tensors of a segment by which its documents are called and found."""
    ids = PackedIds.pack(identifier for part in parts for identifier in part.ids)
    digests = np.concatenate([part.digests for part in parts])
    order = np.argsort(digests, kind="stable")
    return {
        "id_bytes": ids.id_bytes,
        "id_offsets": ids.id_offsets,
        "id_digests": digests[order].view(np.uint8),
        "id_order": order.astype(np.int32),
    }


class Segment(ABC):
    """One file of documents and, when some of them have been deleted, its tombstones.

    Args:
        folder: of the index.
        row: what the manifest says of the segment.
        tensors: names and types of what the kind of index stores.
    """

    def __init__(self, folder: Path, row: dict[str, Any], tensors: Mapping[str, type]):
        self.row = row
        self.path = folder / row["file"]
        self.tombstones = folder / row["tombstones"] if row["tombstones"] else None
        self.number = int(row["file"].removeprefix("segment-").removesuffix(".safetensors"))
        self.num_documents: int = row["num_documents"]
        self.num_deleted: int = row["num_deleted"]
        self.has_metadata: bool = row.get("metadata", False)  # indexes of before have no such entry
        common = ID_TENSORS | METADATA_TENSORS if self.has_metadata else ID_TENSORS
        self.tensors = storage.map_tensors(self.path, {**tensors, **common})
        shapes = {"id_offsets": self.num_documents + 1, "id_digests": 16 * self.num_documents}
        shapes |= {"id_order": self.num_documents}
        if self.has_metadata:
            shapes["metadata_offsets"] = self.num_documents + 1
        storage.check_shapes(self.path, self.tensors, {name: (length,) for name, length in shapes.items()})
        self.ids = PackedIds(self.tensors["id_bytes"], self.tensors["id_offsets"])
        self.deleted = np.empty(0, dtype=np.uint8)
        self.deleted.flags.writeable = False  # as mapped ones: compiled loops know two types of arrays
        if self.tombstones is not None:
            tombstones = storage.map_tensors(self.tombstones, _TOMBSTONE_TENSORS)
            storage.check_shapes(self.tombstones, tombstones, {"deleted": (self.num_documents,)})
            self.deleted = tombstones["deleted"]

    @abstractmethod
    def live_documents(self) -> Iterator[Documents]:
        """The documents that are not deleted, as they are stored."""

    @cached_property
    def metadata(self) -> PackedMetadata:
        """Of all documents; a segment without any has empty ones."""
        return PackedMetadata(self.path, self.num_documents, self.tensors)

    def live(self) -> np.ndarray:
        """(documents,) bool: not deleted."""
        return self.deleted == 0 if len(self.deleted) else np.ones(self.num_documents, dtype=bool)

    def digests(self) -> np.ndarray:
        """(documents,) digests of the identifiers, in the order of the documents."""
        digests = np.empty(self.num_documents, dtype="S16")
        digests[self.tensors["id_order"]] = self.tensors["id_digests"].view("S16")
        return digests

    def find(self, digests: np.ndarray) -> np.ndarray:
        """(n,) int64: documents with these identifiers, -1 where there is none or it is deleted."""
        known = self.tensors["id_digests"].view("S16")
        positions = np.searchsorted(known, digests)
        positions[positions == len(known)] = 0
        documents = np.where(known[positions] == digests, self.tensors["id_order"][positions], -1).astype(np.int64)
        if len(self.deleted):
            documents[(documents >= 0) & (self.deleted[documents] == 1)] = -1
        return documents

    def verify(self) -> None:
        """Compare the files with their checksums."""
        storage.verify_checksum(self.path, self.tensors)
        self._verify_tombstones()

    def _verify_tombstones(self) -> None:
        if self.tombstones is not None:
            storage.verify_checksum(self.tombstones, {"deleted": self.deleted})

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


def check_counts(**counts: Any) -> None:
    """That arguments of a search are whole numbers of at least 1.

    Raises:
        TypeError: no whole number.
        ValueError: below 1.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be a whole number; found {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1; found {value}")


SegmentT = TypeVar("SegmentT", bound=Segment)
EmbeddingsT = TypeVar("EmbeddingsT")


class SegmentedIndex(ABC, Generic[SegmentT, EmbeddingsT]):
    """An index in a folder: opening, adding, deleting, compacting. Searching is left to its kind.

    Attributes:
        folder: where it is.
        fingerprint: of the model that encoded the documents; None when their origin is unknown.

    One process at a time may change an index; others keep reading what they have opened.
    """

    # The kind of representation, the class of its embeddings, and what the manifest calls the number of stored values.
    _kind: ClassVar[str]
    _container: ClassVar[type]
    _count: ClassVar[str]

    def __init__(self, folder: Path):
        self.folder = folder
        self._load()

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """Open an index memory-mapped: nothing is read until it is searched.

        Raises:
            FileNotFoundError: no index there, or a file of it is missing.
            ValueError: `folder` is another kind of index, of another version, or a file is damaged.
        """
        return cls(Path(folder))

    def _load(self) -> None:
        """Open what the manifest lists; once more when another process has replaced it meanwhile, and its files."""
        for _ in range(_OPENING_ATTEMPTS):
            manifest = _read_manifest(self.folder, self._kind)
            try:
                return self._open_segments(manifest)
            except (FileNotFoundError, ValueError):
                if _read_manifest(self.folder, self._kind) == manifest:
                    raise
        self._open_segments(_read_manifest(self.folder, self._kind))

    def _open_segments(self, manifest: dict[str, Any]) -> None:
        self.fingerprint: str | None = manifest["fingerprint"]
        self._set_settings(manifest)
        self._segments = [self._open_segment(row) for row in manifest["segments"]]
        counts = [segment.num_documents for segment in self._segments]
        # Documents are numbered through all segments; these are the numbers of the first ones, and the end.
        self._starts: list[int] = [0, *np.cumsum(counts, dtype=np.int64).tolist()]

    @abstractmethod
    def _set_settings(self, manifest: dict[str, Any]) -> None:
        """Set the attributes that `_settings` gives."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The entries of the manifest that this kind of index brings."""

    @abstractmethod
    def _open_segment(self, row: dict[str, Any]) -> SegmentT:
        """The segment that a row of the manifest tells of."""

    @abstractmethod
    def _new_documents(self, embeddings: EmbeddingsT) -> Iterator[Documents]:
        """Verified documents, ready for a segment; an identifier that comes twice is a ValueError."""

    @abstractmethod
    def _contents(self, parts: Iterable[Any]) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        """Of documents the tensors of one segment after another, and the number of their stored values."""

    def __len__(self) -> int:
        """Number of documents, without the deleted ones."""
        return sum(segment.num_documents - segment.num_deleted for segment in self._segments)

    def __contains__(self, document_id: object) -> bool:
        return isinstance(document_id, str) and self._find([document_id])[0] >= 0

    def metadata(self, document_id: str) -> Metadata:
        """The metadata of a document, a copy; empty where it has none.

        Raises:
            ValueError: no such document, or its file is damaged.
        """
        segment, document = self._located(document_id)
        return segment.metadata[document]

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

        What is stored is copied as it is: nothing is compressed a second time.

        Raises:
            ValueError: a file does not match its checksum; the index is left as it was.
            CannotWriteError: full disk or read-only folder.
        """
        self._replace_segments(lambda: self._write_segments(self._live_documents(), self._stored_lines()))

    def _live_documents(self) -> Iterator[Documents]:
        with tqdm(total=len(self), desc="Compacting", unit="document", delay=1.0) as bar:
            for segment in self._segments:
                segment.verify()  # or damage would be given a valid checksum
                for part in segment.live_documents():
                    yield part
                    bar.update(len(part.ids))

    def verify(self) -> None:
        """Read every file and compare it with its checksum; a ValueError names a damaged one."""
        for segment in self._segments:
            segment.verify()

    @classmethod
    def _check_kind(cls, embeddings: EmbeddingsT) -> None:
        """That documents are embeddings of the kind that this index holds."""
        if not isinstance(embeddings, cls._container):
            raise TypeError(
                f"{cls.__name__} holds {cls._kind} embeddings: expected {cls._container.__name__}, found "
                f"{type(embeddings).__name__}"
            )

    def _check_origin(self, name: str, fingerprint: str | None) -> None:
        """That vectors can be compared with the documents, as their fingerprint tells."""
        found = difference(fingerprint, self.fingerprint)
        if found is not None:
            raise ValueError(
                f"the {name} were encoded {found[0]}, the documents in {self.folder} {found[1]}: use the model and the "
                "processor that encoded the documents"
            )

    def _add(self, embeddings: EmbeddingsT, lines_of: LinesOf | None) -> None:
        def kept_and_new() -> list[dict[str, Any]]:
            rows = [segment.row for segment in self._segments]
            return rows + self._write_segments(self._unknown(self._new_documents(embeddings)), lines_of)

        self._replace_segments(kept_and_new)

    def _unknown(self, parts: Iterable[Documents]) -> Iterator[Documents]:
        for part in parts:
            known = np.flatnonzero(self._find_digests(part.digests) >= 0)
            if len(known):
                raise ValueError(
                    f"the index holds a document {part.ids[int(known[0])]!r} already: delete it first or give the new "
                    "one another identifier; nothing was added"
                )
            yield part

    def _chosen(self, subset: Iterable[str] | None, where: Where | None) -> list[np.ndarray] | None:
        """Per segment (documents,) bool: not deleted, in the subset and let through by `where`; None without both."""
        if subset is None and where is None:
            return None
        chosen = [segment.live() for segment in self._segments]
        if subset is not None:
            documents = self._find(list(dict.fromkeys(listed_ids(subset))))
            listed = np.zeros(self._starts[-1], dtype=bool)
            listed[documents[documents >= 0]] = True
            chosen = [live & listed[start:][: len(live)] for live, start in zip(chosen, self._starts)]
        if where is not None:
            checked = checked_filter(where)
            chosen = [segment.metadata.matching(checked, among) for segment, among in zip(self._segments, chosen)]
        return chosen

    def _ids_of(self, documents: np.ndarray) -> list[str]:
        if len(self._segments) == 1:
            return self._segments[0].ids.take(documents)
        ids = np.empty(len(documents), dtype=object)
        numbers = np.searchsorted(self._starts, documents, side="right") - 1
        for number in np.unique(numbers):
            inside = numbers == number
            ids[inside] = self._segments[number].ids.take(documents[inside] - self._starts[number])
        return ids.tolist()

    def _located(self, document_id: str) -> tuple[SegmentT, int]:
        """The segment of a document, and its number there.

        Raises:
            ValueError: the index does not hold it.
        """
        document = int(self._find([document_id])[0])
        if document < 0:
            raise ValueError(f"the index in {self.folder} has no document {document_id!r}")
        number = bisect.bisect_right(self._starts, document) - 1
        return self._segments[number], document - self._starts[number]

    def _find(self, ids: Sequence[str]) -> np.ndarray:
        """(n,) int64: document numbers in the index, -1 for unknown and deleted ones."""
        return self._find_digests(digest_ids(ids))

    def _find_digests(self, digests: np.ndarray) -> np.ndarray:
        documents = np.full(len(digests), -1, dtype=np.int64)
        for segment, start in zip(self._segments, self._starts):
            found = segment.find(digests)
            documents = np.where(found >= 0, found + start, documents)
        return documents

    def _stored_lines(self) -> LinesOf | None:
        """What gives the stored metadata of documents; None where none has any."""
        if not any(segment.has_metadata for segment in self._segments):
            return None

        def lines_of(ids: Iterable[str]) -> list[bytes]:
            documents = self._find(list(ids))
            lines = np.empty(len(documents), dtype=object)
            for segment, start, end in zip(self._segments, self._starts, self._starts[1:]):
                inside = np.flatnonzero((documents >= start) & (documents < end))
                lines[inside] = segment.metadata.lines(documents[inside] - start)
            return lines.tolist()

        return lines_of

    def _write_segments(self, parts: Iterable[Documents], lines_of: LinesOf | None) -> list[dict[str, Any]]:
        number = 1 + max((segment.number for segment in self._segments), default=-1)
        return _write_segments(self.folder, number, self._contents(parts), self._count, lines_of)

    def _replace_segments(self, write: Callable[[], list[dict[str, Any]]]) -> None:
        """Let `write` write files and make the rows that it returns the index; if it fails, its files are removed."""
        self._load()
        try:
            self._write_manifest(self.folder, write(), self.fingerprint, self._settings())
        finally:
            self._remove_unlisted()
        self._load()

    def _remove_unlisted(self) -> None:
        """Remove the segments and tombstones that are not, or no longer, part of the index."""
        rows = _read_manifest(self.folder, self._kind)["segments"]
        listed = {row["file"] for row in rows} | {row["tombstones"] for row in rows}
        for pattern in ("segment-*.safetensors", f".*{storage.PARTIAL_SUFFIX}"):
            for path in self.folder.glob(pattern):
                if path.name not in listed:
                    path.unlink()

    @classmethod
    def _write_index(
        cls,
        folder: Path,
        contents: Iterable[tuple[dict[str, np.ndarray], int]],
        fingerprint: str | None,
        settings: dict[str, Any],
        lines_of: LinesOf | None = None,
    ) -> None:
        """Write the segments and the manifest of a new index."""
        cls._write_manifest(folder, _write_segments(folder, 0, contents, cls._count, lines_of), fingerprint, settings)

    @classmethod
    def _write_manifest(
        cls, folder: Path, segments: list[dict[str, Any]], fingerprint: str | None, settings: dict[str, Any]
    ) -> None:
        from rarezoo import __version__

        manifest = {
            "format": f"rarezoo.{cls._kind.replace('-', '_')}_index",
            "format_version": FORMAT_VERSION,
            "kind": cls._kind,
            "fingerprint": fingerprint,
            **settings,
            "num_documents": sum(row["num_documents"] - row["num_deleted"] for row in segments),
            "num_deleted": sum(row["num_deleted"] for row in segments),
            cls._count: sum(row[cls._count] for row in segments),
            "versions": {"rarezoo": __version__},
            "segments": segments,
        }
        storage.write_json(folder / MANIFEST_NAME, manifest)


def _read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    return storage.read_manifest(folder / MANIFEST_NAME, kind, "index", FORMAT_VERSION)


def _write_segments(
    folder: Path,
    number: int,
    contents: Iterable[tuple[dict[str, np.ndarray], int]],
    count: str,
    lines_of: LinesOf | None,
) -> list[dict[str, Any]]:
    """Write segments from `number` on, with the metadata of their documents; returns their rows for the manifest."""
    rows: list[dict[str, Any]] = []
    for tensors, stored_values in contents:
        if lines_of is not None:
            tensors |= metadata_tensors(lines_of(PackedIds(tensors["id_bytes"], tensors["id_offsets"])))
        path = folder / f"segment-{number + len(rows):05d}.safetensors"
        storage.write_tensors(path, tensors)
        rows.append(
            {
                "file": path.name,
                "num_documents": len(tensors["id_order"]),
                count: stored_values,
                "metadata": "metadata_bytes" in tensors,
                "tombstones": None,
                "num_deleted": 0,
            }
        )
    return rows
