"""Training rows and tables of texts from files."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rarezoo.training.triples import (
    TrainingRow,
    TripleRows,
    is_plain_table,
    is_triple_file,
    open_text,
    read_plain_table,
)

ROW_FORMATS = ".jsonl, .tsv, .jsonl.gz, .tsv.gz, .parquet, or a folder written by datasets' save_to_disk"
TEXT_FORMATS = ".txt with a text a line, or .jsonl with the field 'text', also with .gz"


class _StoredRows(Sequence[TrainingRow]):
    """The rows of a `datasets.Dataset`, which stay on disk."""

    def __init__(self, rows: Any, path: Path):
        self._rows = rows
        self._path = path

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self._located(index % len(self) if index < 0 else index, self._rows[index])

    def __getitems__(self, indices: Sequence[int]) -> list[TrainingRow]:
        """Many at a time, as torch's loader asks for a batch."""
        return [self._located(index, row) for index, row in zip(indices, self._rows.__getitems__(list(indices)))]

    def __iter__(self) -> Iterator[TrainingRow]:
        return (self._located(index, row) for index, row in enumerate(self._rows))

    def _located(self, index: int, row: Mapping[str, Any]) -> TrainingRow:
        return TrainingRow(row, f"{self._path}, row {index + 1}")


def read_training_rows(path: str | Path) -> Sequence[TrainingRow]:
    """Rows of training data, see `rarezoo.training.collator.parse_row` for their columns.

    Files: JSON lines; tab-separated values with a header line; Parquet, or a folder written by `Dataset.save_to_disk`
    (both stay on disk and need the `datasets` library: the choice for millions of rows). Of JSON lines that begin with
    a list, see `rarezoo.training.triples.TripleRows`: colbert-ai's format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another format, an invalid line, or no rows.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no training data at {path}; expected {ROW_FORMATS}")
    if path.is_dir():
        from datasets import load_from_disk

        rows: Sequence[TrainingRow] = _StoredRows(load_from_disk(str(path)), path)
    elif path.suffix == ".parquet":
        from datasets import Dataset

        rows = _StoredRows(Dataset.from_parquet(str(path)), path)
    elif is_triple_file(path):
        rows = TripleRows(path)
    else:
        rows = list(_read_lines(path))
    if len(rows) == 0:
        raise ValueError(f"{path} holds no rows")
    return rows


def read_text_table(path: str | Path) -> dict[str, str]:
    """A table id -> text from rows with `_id` or `id`, `text`, and optionally `title`, which goes before the text.

    A `.tsv` file without such a header line is colbert-ai's: see `rarezoo.training.triples.read_plain_table`.
    """
    path = Path(path)
    if is_plain_table(path):
        return read_plain_table(path)
    table = {}
    for row in read_training_rows(path):
        identifier = row.get("_id", row.get("id"))
        if identifier is None or not isinstance(row.get("text"), str):
            raise ValueError(f"{row.where}: expected columns '_id' (or 'id') and 'text', found {dict(row)!r}")
        table[str(identifier)] = f"{row['title']} {row['text']}" if row.get("title") else row["text"]
    return table


def read_texts(path: str | Path) -> list[str]:
    """Raw texts: a `.txt` file with one a line, or `.jsonl` with objects that have a "text"; both also as `.gz`.

    Empty lines and texts of blanks alone are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another format, an invalid line, or no texts.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of texts at {path}; expected {TEXT_FORMATS}")
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in (".txt", ".jsonl"):
        raise ValueError(f"cannot read texts from {path}; expected {TEXT_FORMATS}")
    try:
        with open_text(path) as lines:
            texts = list(lines if suffix == ".txt" else (_text_of(row) for row in _json_rows(path, lines)))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as text in UTF-8 ({error})") from None
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no texts")
    return texts


def _text_of(row: TrainingRow) -> str:
    if not isinstance(row.get("text"), str):
        raise ValueError(f"{row.where}: expected a string in the field 'text', found {dict(row)!r:.80}")
    return row["text"]


def _read_lines(path: Path) -> Iterator[TrainingRow]:
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if suffix not in (".jsonl", ".tsv", ".jsonl.gz", ".tsv.gz"):
        raise ValueError(f"cannot read training data from {path}; expected {ROW_FORMATS}")
    try:
        with open_text(path) as lines:
            yield from _json_rows(path, lines) if suffix.startswith(".jsonl") else _tsv_rows(path, lines)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as text in UTF-8 ({error})") from None


def _json_rows(path: Path, lines: IO[str]) -> Iterator[TrainingRow]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        yield TrainingRow(row, f"{path}, line {number}")


def _tsv_rows(path: Path, lines: IO[str]) -> Iterator[TrainingRow]:
    reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} tab-separated values "
                f"({', '.join(reader.fieldnames or ())})"
            )
        columns = {column: _number(value) if column in ("margin", "scores") else value for column, value in row.items()}
        yield TrainingRow(columns, f"{path}, line {reader.line_num}")


def _number(value: str) -> Any:
    """A number, or a list of numbers separated by commas; other text stays, for the collator to refuse."""
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        return value
    return numbers if len(numbers) > 1 else numbers[0]
