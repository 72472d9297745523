"""Metadata of documents: one flat JSON object each, stored as lines of JSON, and filters over them.

In the file of a segment, beside the identifiers and only where a document has metadata:

    metadata_bytes    uint8  JSON lines in UTF-8, one per document, `{}` for those without
    metadata_offsets  int64  (documents + 1,)  where the line of each document begins
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rarezoo.retrieval import storage

METADATA_TENSORS: dict[str, type] = {"metadata_bytes": np.uint8, "metadata_offsets": np.int64}
_NOTHING = b"{}\n"
_BLOCK_DOCUMENTS = 8192  # parsed at once
_EXPECTED = "expected str, int, float, bool, None or a list of those"

Scalar = str | int | float | bool | None
Metadata = dict[str, Scalar | list[Scalar]]
MetadataOf = Mapping[str, Mapping[str, Any] | None]  # by document identifier
Where = Mapping[str, Scalar | Collection[Scalar]] | Callable[[Metadata], bool]
LinesOf = Callable[[Iterable[str]], list[bytes]]
_Filter = dict[str, set[Any]] | Callable[[Metadata], bool]


def lines_of_new(metadata: MetadataOf | None, ids: Iterable[str]) -> LinesOf | None:
    """Check the metadata of new documents; returns what gives the lines that are stored of them, None without any.

    Args:
        metadata: by document identifier; documents may be left out, or have None.
        ids: of all new documents.

    Raises:
        TypeError: not a mapping.
        ValueError: a document that is not among the new ones, or a value that cannot be stored.
    """
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata: expected a mapping of identifiers to metadata, found {type(metadata).__name__}")
    lines = {identifier: _line(identifier, fields) for identifier, fields in metadata.items() if fields is not None}
    unknown = set(lines)
    unknown.difference_update(ids)
    if unknown:
        raise ValueError(
            f"metadata: {min(unknown, key=str)!r} is none of the new documents ({len(unknown)} of {len(lines)} are "
            "unknown): give the metadata of the documents that are indexed"
        )
    return lambda names: [lines.get(name, _NOTHING) for name in names]


def _line(document_id: str, fields: Any) -> bytes:
    where = f"metadata of document {document_id!r}"
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}: expected an object of fields and values, found {type(fields).__name__}")
    for field, value in fields.items():
        if not isinstance(field, str):
            raise ValueError(f"{where}: the names of fields must be str, found {field!r}")
        for entry in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(entry, Scalar):
                raise ValueError(f"{where}: the field {field!r} holds {type(entry).__name__}; {_EXPECTED}")
            if isinstance(entry, float) and not math.isfinite(entry):
                raise ValueError(f"{where}: the field {field!r} holds {entry}, which JSON has no number for")
    try:
        return (json.dumps(dict(fields), ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: holds unpaired surrogates, which are not valid Unicode text") from None


def metadata_tensors(lines: list[bytes]) -> dict[str, np.ndarray]:
    """The tensors of a segment whose documents have these lines; none where no document has metadata."""
    if all(line == _NOTHING for line in lines):
        return {}
    offsets = np.zeros(len(lines) + 1, dtype=np.int64)
    np.cumsum([len(line) for line in lines], out=offsets[1:])
    return {"metadata_bytes": np.frombuffer(b"".join(lines), dtype=np.uint8), "metadata_offsets": offsets}


def checked_filter(where: Where) -> _Filter:
    """A filter as `PackedMetadata.matching` takes it: by field the values of which one is needed, or a function.

    Raises:
        TypeError: neither a mapping nor a function, or a field that is not a string.
        ValueError: a value that no metadata can hold.
    """
    if not isinstance(where, Mapping):
        if not callable(where):
            raise TypeError(
                f"where: expected a mapping of fields to values, or a function of the metadata; found "
                f"{type(where).__name__}"
            )
        return where
    allowed: dict[str, set[Any]] = {}
    for field, value in where.items():
        if not isinstance(field, str):
            raise TypeError(f"where: the names of fields must be str, found {field!r}")
        values = value if isinstance(value, (list, tuple, set, frozenset)) else (value,)
        wrong = next((entry for entry in values if not isinstance(entry, Scalar)), None)
        if wrong is not None:
            raise ValueError(f"where: the field {field!r} is compared with {type(wrong).__name__}; {_EXPECTED}")
        allowed[field] = {_key(entry) for entry in values}
    return allowed


def _key(value: Scalar) -> Any:
    """Equal values, equal keys. True is no 1, as in JSON and unlike in Python."""
    return (value,) if isinstance(value, bool) else value


class _Column(NamedTuple):
    """One field of all documents: entry i is the value with the number `numbers[i]`, of document `documents[i]`."""

    values: dict[Any, int]
    numbers: np.ndarray
    documents: np.ndarray


class PackedMetadata:
    """The metadata of a segment's documents; parsed when they are asked for.

    Args:
        path: of the segment, for errors.
        num_documents: how many.
        tensors: `metadata_bytes` and `metadata_offsets`; without them no document has metadata.

    Raises:
        ValueError: the offsets are damaged.
    """

    def __init__(self, path: Path, num_documents: int, tensors: Mapping[str, np.ndarray]):
        self._path = path
        self._num_documents = num_documents
        if "metadata_bytes" in tensors:
            self._lines, self._offsets = tensors["metadata_bytes"], tensors["metadata_offsets"]
            storage.check_offsets(path, "metadata_offsets", self._offsets, len(self._lines))
        else:
            self._lines = np.frombuffer(_NOTHING * num_documents, dtype=np.uint8)
            self._offsets = np.arange(num_documents + 1, dtype=np.int64) * len(_NOTHING)
        # Of fields that a filter has asked for.
        self._columns: dict[str, _Column] = {}

    def __getitem__(self, document: int) -> Metadata:
        return self._parsed(document, document + 1)[0]

    def lines(self, documents: np.ndarray) -> list[bytes]:
        """What is stored of some documents."""
        starts, ends = self._offsets[documents].tolist(), self._offsets[documents + 1].tolist()
        return [self._lines[start:end].tobytes() for start, end in zip(starts, ends)]

    def matching(self, where: _Filter, among: np.ndarray) -> np.ndarray:
        """(documents,) bool: those of `among` (documents,) bool that the filter lets through.

        Raises:
            ValueError: the file is damaged.
        """
        if not isinstance(where, dict):
            return self._approved(where, among)
        self._read_columns([field for field in where if field not in self._columns])
        for field, values in where.items():
            column = self._columns[field]
            wanted = np.zeros(len(column.values), dtype=bool)
            wanted[[column.values[value] for value in values if value in column.values]] = True
            matching = np.zeros(self._num_documents, dtype=bool)
            matching[column.documents[wanted[column.numbers]]] = True
            among = among & matching
        return among

    def _approved(self, approve: Callable[[Metadata], bool], among: np.ndarray) -> np.ndarray:
        approved = np.zeros(self._num_documents, dtype=bool)
        for start, end in self._blocks():
            documents = np.flatnonzero(among[start:end]).tolist()
            rows = self._parsed(start, end) if documents else []
            for document in documents:
                approved[start + document] = bool(approve(rows[document]))
        return approved

    def _read_columns(self, fields: list[str]) -> None:
        """Read fields of all documents, in one pass; what is kept takes 8 bytes per value and each distinct value."""
        if not fields:
            return
        entries: dict[str, tuple[dict[Any, int], list[int], list[int]]] = {field: ({}, [], []) for field in fields}
        for start, end in self._blocks():
            for document, row in enumerate(self._parsed(start, end), start):
                for field in fields:
                    if field in row:
                        values, numbers, documents = entries[field]
                        value = row[field]
                        for entry in value if isinstance(value, list) else (value,):
                            if not isinstance(entry, Scalar):
                                raise self._damaged(f"{field!r} holds {type(entry).__name__}")
                            numbers.append(values.setdefault(_key(entry), len(values)))
                            documents.append(document)
        for field, (values, numbers, documents) in entries.items():
            self._columns[field] = _Column(
                values, np.array(numbers, dtype=np.int32), np.array(documents, dtype=np.int32)
            )

    def _blocks(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self._num_documents, _BLOCK_DOCUMENTS):
            yield start, min(start + _BLOCK_DOCUMENTS, self._num_documents)

    def _parsed(self, start: int, end: int) -> list[Metadata]:
        """The metadata of consecutive documents."""
        lines = self._lines[self._offsets[start] : self._offsets[end]].tobytes()
        try:
            # One array of them all: much sooner parsed than line by line.
            rows = json.loads(b"[" + lines.rstrip(b"\n").replace(b"\n", b",") + b"]")
            _check_rows(rows, end - start)
        except (ValueError, RecursionError) as error:
            raise self._damaged(str(error)) from error
        return rows

    def _damaged(self, problem: str) -> ValueError:
        return ValueError(f"{self._path} is damaged: 'metadata_bytes' does not hold metadata ({problem})")


def _check_rows(rows: list[Any], count: int) -> None:
    if len(rows) != count:
        raise ValueError(f"{len(rows)} objects for {count} documents")
    wrong = next((row for row in rows if not isinstance(row, dict)), None)
    if wrong is not None:
        raise ValueError(f"{type(wrong).__name__} instead of an object")
