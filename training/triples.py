"""The files of colbert-ai and xm-retrievers: triples by id as JSON lists, queries and collection as plain TSV."""

from __future__ import annotations

import gzip
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any


class TrainingRow(dict):
    """A row that knows where it was read, for error messages: "pairs.jsonl, line 3"."""

    __slots__ = ("where",)

    def __init__(self, columns: Mapping[str, Any], where: str):
        super().__init__(columns)
        self.where = where


class TripleRows(Sequence[TrainingRow]):
    """Rows from JSON lines `[query_id, [positive_id, score], [negative_id, score], …]` or `[query_id, positive_id,
    negative_id, …]`, as rows with `query_id`, `positive_id`, `negative_ids` and `scores`.

    All lines are checked when the file is opened, then they stay on disk (unless it is compressed): 8 bytes of memory
    per row.

    Raises:
        ValueError: a line is something else; the message names it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._text = gzip.decompress(self.path.read_bytes()) if self.path.suffix == ".gz" else None
        self._starts = array("q")
        self._numbers = array("q")
        start = 0
        for number, line in enumerate(self._lines(), start=1):
            if line.strip():
                _read_triple(line, f"{self.path}, line {number}")
                self._starts.append(start)
                self._numbers.append(number)
            start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        start, where = self._starts[index], f"{self.path}, line {self._numbers[index]}"
        if self._text is not None:
            end = self._text.find(b"\n", start)
            return _read_triple(self._text[start : end if end >= 0 else None], where)
        with self.path.open("rb") as file:
            file.seek(start)
            return _read_triple(file.readline(), where)

    def _lines(self) -> Iterator[bytes]:
        if self._text is not None:
            yield from self._text.splitlines(keepends=True)
            return
        with self.path.open("rb") as file:
            yield from file


def is_triple_file(path: Path) -> bool:
    """Whether the first line of a JSON lines file is a list of several entries."""
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")):
        return False
    try:
        entry = json.loads(_first_line(path))
    except json.JSONDecodeError:
        return False
    return isinstance(entry, list) and len(entry) > 1


def _read_triple(line: bytes, where: str) -> TrainingRow:
    try:
        entry = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(entry, list) or len(entry) < 2:
        raise ValueError(f"{where}: expected a list [query id, positive, negative, …], found {line[:80]!r}")
    query, *passages = entry
    scored = isinstance(passages[0], list)
    for passage in passages:
        if isinstance(passage, list) != scored or (scored and not _is_scored(passage)):
            raise ValueError(
                f"{where}: passages must all be ids or all be [id, score] with a finite score, found {passage!r}"
            )
    identifiers = [passage[0] for passage in passages] if scored else passages
    if not all(isinstance(identifier, int | str) and not isinstance(identifier, bool) for identifier in entry[:1]):
        raise ValueError(f"{where}: the query id must be a number or a text, found {query!r}")
    for identifier in identifiers:
        if not isinstance(identifier, int | str) or isinstance(identifier, bool):
            raise ValueError(f"{where}: a passage id must be a number or a text, found {identifier!r}")
    row: dict[str, Any] = {"query_id": query, "positive_id": identifiers[0], "negative_ids": identifiers[1:]}
    if scored:
        row["scores"] = [passage[1] for passage in passages]
    return TrainingRow(row, where)


def _is_scored(passage: list[Any]) -> bool:
    if len(passage) != 2:
        return False
    score = passage[1]
    return isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)


def is_plain_table(path: Path) -> bool:
    """Whether a `.tsv` file of texts has no header line with the columns `_id` or `id`, and `text`."""
    if not path.name.endswith((".tsv", ".tsv.gz")) or not path.is_file():
        return False
    columns = _first_line(path).rstrip("\r\n").split("\t")
    return not ("text" in columns and {"_id", "id"} & set(columns))


def read_plain_table(path: str | Path) -> dict[str, str]:
    """A table id -> text from lines `id<TAB>text`, `id<TAB>text<TAB>title`, or `text`, whose id is the line's number
    from 0. A title goes before the text as colbert-ai puts it: "title | text".

    Raises:
        ValueError: a line has another number of columns than the first, or an id occurs twice.
    """
    path, table = Path(path), {}
    columns = None
    with open_text(path) as lines:
        for number, line in enumerate(lines):
            cells = line.rstrip("\r\n").split("\t")
            columns = columns or len(cells)
            if len(cells) != columns or columns > 3:
                raise ValueError(
                    f"{path}, line {number + 1}: expected {min(columns, 3)} tab-separated value(s) (id and text, id, "
                    f"text and title, or a text), found {len(cells)}"
                )
            identifier, *rest = cells if columns > 1 else (str(number), cells[0])
            if identifier in table:
                raise ValueError(f"{path}, line {number + 1}: the id {identifier!r} occurs twice")
            table[identifier] = " | ".join(reversed(rest))
    if not table:
        raise ValueError(f"{path} holds no rows")
    return table


def _first_line(path: Path) -> str:
    try:
        with open_text(path) as lines:
            return lines.readline()
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as text in UTF-8 ({error})") from None


def open_text(path: Path) -> IO[str]:
    """A file of text in UTF-8, also with `.gz`; a byte-order mark at its beginning is no part of the text."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")
