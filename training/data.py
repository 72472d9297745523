"""Training rows and tables of texts from files."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROW_FORMATS = ".jsonl, .tsv, .jsonl.gz, .tsv.gz, .parquet, or a folder written by datasets' save_to_disk"


def read_training_rows(path: str | Path) -> Sequence[Mapping[str, Any]]:
    """Rows of training data, see `rarezoo.training.collator.parse_row` for their columns.

    Files: JSON lines; tab-separated values with a header line; Parquet, or a folder written by `Dataset.save_to_disk`
    (both stay on disk and need the `datasets` library: the choice for millions of rows).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another format, an invalid line, or no rows.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no training data at {path}; expected {ROW_FORMATS}")
    if path.is_dir():
        from datasets import load_from_disk

        rows = load_from_disk(str(path))
    elif path.suffix == ".parquet":
        from datasets import Dataset

        rows = Dataset.from_parquet(str(path))
    else:
        rows = list(_read_lines(path))
    if len(rows) == 0:
        raise ValueError(f"{path} holds no rows")
    return rows


def read_text_table(path: str | Path) -> dict[str, str]:
    """A table id -> text from rows with `_id` or `id`, `text`, and optionally `title`, which goes before the text."""
    table = {}
    for number, row in enumerate(read_training_rows(path), start=1):
        identifier = row.get("_id", row.get("id"))
        if identifier is None or not isinstance(row.get("text"), str):
            raise ValueError(f"{path}, row {number}: expected columns '_id' (or 'id') and 'text', found {dict(row)!r}")
        table[str(identifier)] = f"{row['title']} {row['text']}" if row.get("title") else row["text"]
    return table


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if suffix not in (".jsonl", ".tsv", ".jsonl.gz", ".tsv.gz"):
        raise ValueError(f"cannot read training data from {path}; expected {ROW_FORMATS}")
    with _open_text(path) as lines:
        yield from _json_rows(path, lines) if suffix.startswith(".jsonl") else _tsv_rows(path, lines)


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _json_rows(path: Path, lines: IO[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        yield row


def _tsv_rows(path: Path, lines: IO[str]) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} tab-separated values "
                f"({', '.join(reader.fieldnames or ())})"
            )
        yield {column: _number(value) if column in ("margin", "scores") else value for column, value in row.items()}


def _number(value: str) -> Any:
    """A number, or a list of numbers separated by commas; other text stays, for the collator to refuse."""
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        return value
    return numbers if len(numbers) > 1 else numbers[0]
