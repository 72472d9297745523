"""Rows of retrieval data to a batch of tensors.

A row holds a query, the document that answers it, optionally hard negatives and a teacher's opinion of them. Texts
stand in the row, or the row holds ids and the texts are looked up in tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

QUERY_COLUMNS = ("query", "anchor")
_NUMBERED_NEGATIVE = re.compile(r"negative_(id_)?(\d+)")


class RetrievalProcessor(Protocol):
    """What a retriever's processor offers: texts to model inputs."""

    def process_queries(self, texts: list[str], prompt: str | None = None) -> Mapping[str, torch.Tensor]: ...

    def process_documents(self, texts: list[str]) -> Mapping[str, torch.Tensor]: ...


@dataclass(frozen=True)
class RetrievalExample:
    """One row, checked.

    Attributes:
        query: text of the query.
        positive: text of the document that answers it.
        negatives: texts of documents that do not.
        scores: teacher scores of the positive and of each negative, in this order, or None.
        margins: teacher's `score(positive) - score(negative)` for each negative, or None.
    """

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None
    margins: tuple[float, ...] | None = None


def parse_row(
    row: Mapping[str, Any],
    queries: Mapping[str, str] | None = None,
    corpus: Mapping[str, str] | None = None,
) -> RetrievalExample:
    """Read one row of training data.

    Columns: `query` or `anchor`; `positive`; `negatives` (a list), `negative`, or `negative_1`, `negative_2`, …;
    `scores` (a list: positive, then negatives) or `margin` (a number, or one per negative). With tables:
    `query_id`, `positive_id` and `negative_ids`, `negative_id` or `negative_id_1`, …. A column that holds None counts
    as missing. Other columns are ignored.

    Args:
        row: column name -> value.
        queries: query id -> text, where rows hold `query_id`.
        corpus: document id -> text, where rows hold document ids.

    Raises:
        ValueError: a column is missing, or its value has the wrong type or length; the message begins with the place of
            a row from `read_training_rows`.
    """
    try:
        return _parse(row, queries, corpus)
    except ValueError as error:
        raise ValueError(f"{_place(row)}{error}") from None


def _place(row: Mapping[str, Any]) -> str:
    """The beginning of a message about a row: where it was read, if that is known."""
    where = getattr(row, "where", None)
    return f"{where}: " if where else ""


def _parse(
    row: Mapping[str, Any], queries: Mapping[str, str] | None, corpus: Mapping[str, str] | None
) -> RetrievalExample:
    row = {name: value for name, value in row.items() if value is not None}
    query_column = next((name for name in QUERY_COLUMNS if name in row), None)
    if query_column is not None:
        query = _text(row[query_column], query_column)
    else:
        query = _look_up(_required(row, "query_id", "query, anchor or query_id"), "query_id", queries, "queries")
    if "positive" in row:
        positive = _text(row["positive"], "positive")
    else:
        positive = _look_up(_required(row, "positive_id", "positive or positive_id"), "positive_id", corpus, "corpus")
    negatives = tuple(
        _look_up(value, column, corpus, "corpus") if "_id" in column else _text(value, column)
        for column, value in _negative_cells(row)
    )
    scores = _numbers(row["scores"], "scores", len(negatives) + 1) if "scores" in row else None
    margins = _numbers(row["margin"], "margin", len(negatives)) if "margin" in row else None
    return RetrievalExample(query, positive, negatives, scores, margins)


class RetrievalCollator:
    """Turns rows into the inputs of `SparseRetrievalTrainer`.

    Args:
        processor: the retriever's processor.
        queries: query id -> text, for rows with `query_id`.
        corpus: document id -> text, for rows with `positive_id`, `negative_id`, …
        prompt: instruction for the query template; None takes the processor's.

    Calling it with a list of rows (see `parse_row`) gives a dict:
        `queries`: model inputs of the queries, tensors of `batch` rows.
        `documents`: model inputs of `batch * (1 + n_negatives)` rows: all positives, all first negatives, all second …
        `teacher_scores`: float32 `(batch, 1 + n_negatives)`, where the rows have `scores`.
        `teacher_margins`: float32 `(batch, n_negatives)`, where the rows have `margin`.
    """

    def __init__(
        self,
        processor: RetrievalProcessor,
        queries: Mapping[str, str] | None = None,
        corpus: Mapping[str, str] | None = None,
        prompt: str | None = None,
    ):
        self.processor = processor
        self.queries = queries
        self.corpus = corpus
        self.prompt = prompt

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        examples = [self.read(row) for row in rows]
        _check_alike(examples, rows)
        documents = [example.positive for example in examples]
        for position in range(len(examples[0].negatives)):
            documents += [example.negatives[position] for example in examples]
        batch: dict[str, Any] = {
            "queries": dict(self.process_queries([example.query for example in examples])),
            "documents": dict(self.processor.process_documents(documents)),
        }
        if examples[0].scores is not None:
            batch["teacher_scores"] = torch.tensor([example.scores for example in examples])
        if examples[0].margins is not None:
            batch["teacher_margins"] = torch.tensor([example.margins for example in examples])
        return batch

    def read(self, row: Mapping[str, Any]) -> RetrievalExample:
        return parse_row(row, self.queries, self.corpus)

    def process_queries(self, texts: list[str]) -> Mapping[str, torch.Tensor]:
        return self.processor.process_queries(texts, prompt=self.prompt)


class LateInteractionCollator(RetrievalCollator):
    """Turns rows into the inputs of `LateInteractionTrainer`.

    Args:
        processor: the retriever's processor.
        config: the retriever's configuration, which knows its languages.
        queries, corpus: tables of texts by id.
        nway: passages of a row that are used, the positive and the first `nway - 1` negatives; None takes all.
        language: of rows without a column `language`; None takes the model's default.

    A row's column `document_language` names the language of its documents where that is not its query's.

    The dict is that of `RetrievalCollator`, each side with `keep_mask` and `lang_ids` `(texts,)` too.
    """

    def __init__(
        self,
        processor: Any,
        config: Any,
        queries: Mapping[str, str] | None = None,
        corpus: Mapping[str, str] | None = None,
        nway: int | None = None,
        language: str | None = None,
    ):
        super().__init__(processor, queries, corpus)
        self.config = config
        self.nway = nway
        self.language = language

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        for side, columns in (("queries", ("language",)), ("documents", ("document_language", "language"))):
            ids = torch.tensor([self.language_id(row, columns) for row in rows])
            batch[side]["lang_ids"] = ids.repeat(len(batch[side]["input_ids"]) // len(rows))
        return batch

    def read(self, row: Mapping[str, Any]) -> RetrievalExample:
        """The row with its positive and its first `nway - 1` negatives."""
        example = super().read(row)
        if self.nway is None:
            return example
        if self.nway > len(example.negatives) + 1:
            raise ValueError(
                f"{_place(row)}nway is {self.nway}, but the row has a positive and {len(example.negatives)} negative(s)"
            )
        return replace(
            example,
            negatives=example.negatives[: self.nway - 1],
            scores=None if example.scores is None else example.scores[: self.nway],
            margins=None if example.margins is None else example.margins[: self.nway - 1],
        )

    def language_id(self, row: Mapping[str, Any], columns: Sequence[str] = ("language",)) -> int:
        """Index of the adapter that the first of the columns that is filled names, or else `language`."""
        named = [row[column] for column in columns if row.get(column) is not None]
        try:
            return self.config.language_id(named[0] if named else self.language)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_place(row)}{error}") from None

    def process_queries(self, texts: list[str]) -> Mapping[str, torch.Tensor]:
        return self.processor.process_queries(texts)


def _required(row: Mapping[str, Any], column: str, wanted: str) -> Any:
    if column not in row:
        raise ValueError(f"a training row needs a column {wanted}; found columns: {', '.join(map(str, row)) or 'none'}")
    return row[column]


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must hold text, found {type(value).__name__}: {value!r}")
    return value


def _look_up(value: Any, column: str, table: Mapping[str, str] | None, table_name: str) -> str:
    if table is None:
        raise ValueError(f"column {column!r} holds an id, but no table of texts was given; pass {table_name}=…")
    if str(value) not in table:
        raise ValueError(f"column {column!r} holds id {value!r}, which is not in the {table_name} table")
    return _text(table[str(value)], f"{table_name}[{value!r}]")


def _negative_cells(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Pairs (column, value), one for each negative, numbered columns in the order of their numbers."""
    cells: list[tuple[str, Any]] = []
    for column in ("negatives", "negative_ids"):
        if column in row:
            if isinstance(row[column], str) or not isinstance(row[column], Sequence):
                raise ValueError(f"column {column!r} must hold a list, found {type(row[column]).__name__}")
            cells += [(column, value) for value in row[column]]
    cells += [(column, row[column]) for column in ("negative", "negative_id") if column in row]
    numbered = [(int(match.group(2)), column) for column in row if (match := _NUMBERED_NEGATIVE.fullmatch(str(column)))]
    return cells + [(column, row[column]) for _, column in sorted(numbered)]


def _numbers(value: Any, column: str, length: int) -> tuple[float, ...]:
    values = [value] if isinstance(value, int | float) else value
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != length:
        raise ValueError(f"column {column!r} must hold {length} number(s) for this row, found {value!r}")
    try:
        numbers = tuple(float(number) for number in values)
    except (TypeError, ValueError):
        raise ValueError(f"column {column!r} must hold numbers, found {value!r}") from None
    if not all(torch.isfinite(torch.tensor(numbers))):
        raise ValueError(f"column {column!r} must hold finite numbers, found {value!r}")
    return numbers


def _check_alike(examples: Sequence[RetrievalExample], rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ValueError` at the first row that differs from the batch's first."""
    first = examples[0]
    for row, example in zip(rows, examples):
        if len(example.negatives) != len(first.negatives):
            raise ValueError(
                f"{_place(row)}all rows of a batch need the same number of negatives, found {len(first.negatives)} "
                f"and {len(example.negatives)}; cut or repeat the negatives of your data to one number"
            )
        for name in ("scores", "margins"):
            if (getattr(example, name) is None) != (getattr(first, name) is None):
                raise ValueError(
                    f"{_place(row)}some rows have a teacher's {name} and others have none; give it for all rows or "
                    "for none"
                )
