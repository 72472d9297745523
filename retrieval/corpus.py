"""Documents, queries and relevance judgements from the files that people have: BEIR folders, JSONL, TSV, plain text.

Everything is streamed: of a corpus only the ids stay in memory, to find duplicates. Every error names file and line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rarezoo.retrieval.text_files import read_lines, read_text

ID_FIELDS = ("_id", "id", "docid")
TEXT_FIELDS = ("text", "contents", "content")

Qrels = dict[str, dict[str, int]]


class Document(NamedTuple):
    """One document.

    Attributes:
        id: unique in its corpus.
        text: title, a space and text where there is a title; may be empty.
        metadata: what a JSONL row has under that name, as it stands there; None without. An index stores it when it is
            flat, see `build_index`.
    """

    id: str
    text: str
    metadata: dict[str, Any] | None = None


class Query(NamedTuple):
    """One query: an id that is unique in its file, and the text."""

    id: str
    text: str


_Row = tuple[str, str, str, Any]  # where it stands, id, text, metadata


def read_corpus(path: str | os.PathLike[str]) -> Iterator[Document]:
    """Stream the documents of a corpus.

    Args:
        path: one of, each also gzip-compressed as `….gz`:
            a BEIR folder (`corpus.jsonl` with `_id`, `title`, `text`, `metadata`; Thakur et al. 2021,
            arXiv 2104.08663);
            a `.jsonl` file: an object a line with `_id`, `id` or `docid`, with `text`, `contents` or `content`, and
            optionally `title` and `metadata`;
            a `.tsv` file: id, tab, text;
            a `.txt` file: one document a line, empty lines skipped, the line number as id;
            any other folder: every `.txt` file below it is one document, its relative path as id.

    Returns:
        An iterator of `Document`. Path and kind of file are checked at once, the content while it is read.

    Raises:
        FileNotFoundError: no such file or folder, or a folder with nothing to read.
        ValueError: broken JSON, a missing id or text, a duplicate id, a wrong number of columns, text that is not
            UTF-8, or no document at all.
    """
    path = _existing(path)
    rows = _folder_rows(path) if path.is_dir() else _file_rows(path)
    return (Document(row_id, text, metadata) for row_id, text, metadata in _checked(rows, path, "document"))


def read_queries(path: str | os.PathLike[str]) -> Iterator[Query]:
    """Stream queries: `queries.jsonl` of a BEIR folder, or a `.jsonl`, `.tsv` or `.txt` file as in `read_corpus`."""
    path = _existing(path)
    if path.is_dir():
        path = _required(
            path, "queries.jsonl", "expected a BEIR folder (corpus.jsonl, queries.jsonl, qrels/) or a file"
        )
    return (Query(row_id, text) for row_id, text, _ in _checked(_file_rows(path), path, "query"))


def read_qrels(path: str | os.PathLike[str], split: str = "test") -> Qrels:
    """Read relevance judgements.

    Args:
        path: a BEIR folder (then `qrels/<split>.tsv` is read); a BEIR file (query id, document id, grade, separated
            by tabs, with or without the header line); or a TREC file (query id, iteration, document id, grade). The
            first line decides which of the two.
        split: which judgements of a BEIR folder.

    Returns:
        {query id: {document id: grade}}, grades as integers.

    Raises:
        FileNotFoundError: no such file, or no such split (the message lists those that exist).
        ValueError: a wrong number of columns, a grade that is not an integer, one pair judged twice with different
            grades, or no judgement at all.
    """
    path = _existing(path)
    if path.is_dir():
        path = _qrels_of_split(path, split)
    qrels: Qrels = {}
    columns = 0
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        columns = columns or (3 if line.count("\t") == 2 else 4)
        query_id, document_id, grade = _judgement(line, columns, where)
        if number == 1 and columns == 3 and not _is_number(grade):
            continue  # the header line
        if not _is_integer(grade):
            raise ValueError(f"{where}: the grade {grade!r} is not an integer")
        known = qrels.setdefault(query_id, {}).setdefault(document_id, int(grade))
        if known != int(grade):
            raise ValueError(f"{where}: query {query_id!r} and document {document_id!r} already have the grade {known}")
    if not qrels:
        raise ValueError(f"{path}: holds no relevance judgement")
    return qrels


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return path


def _find(folder: Path, name: str) -> Path | None:
    return next((folder / file for file in (name, f"{name}.gz") if (folder / file).is_file()), None)


def _required(folder: Path, name: str, expectation: str) -> Path:
    found = _find(folder, name)
    if found is None:
        raise FileNotFoundError(f"{folder}: has no {name} or {name}.gz; {expectation}")
    return found


def _qrels_of_split(folder: Path, split: str) -> Path:
    splits = sorted({file.name.split(".tsv")[0] for file in (folder / "qrels").glob("*.tsv*")})
    return _required(folder / "qrels", f"{split}.tsv", f"splits found: {', '.join(splits) or 'none'}")


def _judgement(line: str, columns: int, where: str) -> tuple[str, str, str]:
    parts = line.split("\t") if columns == 3 else line.split()
    if len(parts) != columns:
        expected = (
            "3 columns separated by tabs (query id, document id, grade)"
            if columns == 3
            else "4 columns (query id, iteration, document id, grade), or 3 separated by tabs (without iteration)"
        )
        raise ValueError(f"{where}: expected {expected}, found {len(parts)}")
    return (parts[0], parts[1], parts[2].strip()) if columns == 3 else (parts[0], parts[2], parts[3])


def _is_integer(text: str) -> bool:
    return text[text.startswith(("+", "-")) :].isdecimal()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _folder_rows(folder: Path) -> Iterable[_Row]:
    corpus = _find(folder, "corpus.jsonl")
    if corpus is not None:
        return _json_rows(corpus)
    files = sorted(file for file in folder.rglob("*") if file.name.endswith((".txt", ".txt.gz")) and file.is_file())
    if not files:
        raise FileNotFoundError(f"{folder}: has neither corpus.jsonl (a BEIR folder) nor any .txt file below it")
    return ((str(file), file.relative_to(folder).as_posix(), read_text(file), None) for file in files)


def _file_rows(path: Path) -> Iterable[_Row]:
    readers = {".jsonl": _json_rows, ".tsv": _tsv_rows, ".txt": _txt_rows}
    reader = readers.get(Path(path.name.removesuffix(".gz")).suffix)
    if reader is None:
        raise ValueError(f"{path}: unknown kind of file; expected {', '.join(readers)} (also with .gz), or a folder")
    return reader(path)


def _json_rows(path: Path) -> Iterator[_Row]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
        row_id = _field(row, ID_FIELDS, where)
        # bool is a kind of int in Python, but `true` is no id
        if not isinstance(row_id, (str, int)) or isinstance(row_id, bool):
            raise ValueError(f"{where}: the id must be a string or an integer, found {row_id!r}")
        text, title = _field(row, TEXT_FIELDS, where), row.get("title") or ""
        if not isinstance(text, str) or not isinstance(title, str):
            raise ValueError(f"{where}: text and title must be strings, found {text!r:.40} and {title!r:.40}")
        yield where, str(row_id), f"{title} {text}".rstrip() if title else text, row.get("metadata")


def _field(row: dict, names: tuple[str, ...], where: str):
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"{where}: no field {' or '.join(map(repr, names))}; found {sorted(row)}")


def _tsv_rows(path: Path) -> Iterator[_Row]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) != 2:
            raise ValueError(f"{path}, line {number}: expected 2 columns (id, tab, text), found {len(columns)}")
        if number == 1 and columns[0] in ID_FIELDS and columns[1] in TEXT_FIELDS:
            continue  # a header line
        yield f"{path}, line {number}", columns[0], columns[1], None


def _txt_rows(path: Path) -> Iterator[_Row]:
    for number, line in read_lines(path):
        if line.strip():
            yield f"{path}, line {number}", str(number), line.strip(), None


def _checked(rows: Iterable[_Row], path: Path, kind: str) -> Iterator[tuple[str, str, Any]]:
    """Identifier, text and metadata of every row."""
    seen: set[str] = set()
    for where, row_id, text, metadata in rows:
        if not row_id.strip() or any(character in row_id for character in "\t\r\n\0"):
            raise ValueError(f"{where}: an id must not be empty or hold tabs, line breaks or NUL, found {row_id!r}")
        if row_id in seen:
            raise ValueError(f"{where}: the id {row_id!r} occurs twice; ids must be unique")
        if not (_is_unicode(row_id) and _is_unicode(text)):
            raise ValueError(
                f"{where}: the entry {row_id!a} holds unpaired surrogates, which are not valid Unicode text"
            )
        seen.add(row_id)
        yield row_id, text, metadata
    if not seen:
        raise ValueError(f"{path}: holds no {kind}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
