"""Runs and how good they are: TREC run files, and the metrics of ir-measures with one rule for equal scores.

A run is {query id: {document id: score}}; lists of (document id, score) pairs, as `SparseIndex.search` gives them,
do as well. Documents are ranked by score; documents with equal scores by their id, the later one first, which is what
trec_eval does. The rule is applied before ir-measures sees the run, because its metrics come from several programs
that order equal scores differently.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rarezoo.retrieval.text_files import file_written_beside, open_text, read_lines

if TYPE_CHECKING:
    import ir_measures

Run = Mapping[str, Mapping[str, float] | Sequence[tuple[str, float]]]
DEFAULT_METRICS = ("nDCG@10", "RR@10", "R@100")


def evaluate_run(
    run: Run, qrels: Mapping[str, Mapping[str, int]], metrics: Sequence[str] = DEFAULT_METRICS
) -> dict[str, float]:
    """Average each metric over all judged queries.

    A judged query without results counts as 0 and is reported with a warning; results of queries that were not judged
    are left out.

    Args:
        run: {query id: {document id: score}}, or lists of (document id, score) in place of the inner dictionaries.
        qrels: {query id: {document id: grade}}, as from `read_qrels`.
        metrics: names of ir-measures: nDCG@10, RR@10 (mean reciprocal rank), R@100 (recall), AP@1000, P@10, …

    Returns:
        {metric: mean}, in the order of `metrics`, by the canonical names of ir-measures ("MRR@10" becomes "RR@10").

    Raises:
        ValueError: an unknown metric, no judged query in the run, a score that is not finite, a document twice in one
            ranking, or empty judgements.
    """
    per_query = evaluate_run_per_query(run, qrels, metrics)
    return {metric: math.fsum(values.values()) / len(values) for metric, values in per_query.items()}


def evaluate_run_per_query(
    run: Run, qrels: Mapping[str, Mapping[str, int]], metrics: Sequence[str] = DEFAULT_METRICS
) -> dict[str, dict[str, float]]:
    """As `evaluate_run`, without the average: {metric: {query id: value}} with every judged query, in their order."""
    ir_measures = _ir_measures()
    measures = [_measure(metric) for metric in metrics]
    if not measures or not qrels:
        raise ValueError(f"nothing to evaluate: {len(measures)} metrics, {len(qrels)} judged queries")
    ranked = {query_id: rank_documents(query_id, run[query_id]) for query_id in qrels if run.get(query_id)}
    _report_missing(run, qrels, ranked)
    # Scores become ranks, so that every program behind ir-measures sees the same order.
    scores = {
        query_id: {document_id: float(-rank) for rank, (document_id, _) in enumerate(ranking)}
        for query_id, ranking in ranked.items()
    }
    values: dict[str, dict[str, float]] = {str(measure): dict.fromkeys(qrels, 0.0) for measure in measures}
    plain_qrels = {query_id: dict(grades) for query_id, grades in qrels.items()}
    for metric in ir_measures.iter_calc(measures, plain_qrels, scores):
        values[str(metric.measure)][metric.query_id] = metric.value
    return values


def rank_documents(
    query_id: str, results: Mapping[str, float] | Sequence[tuple[str, float]]
) -> list[tuple[str, float]]:
    """Order one query's results by falling score, equal scores by falling document id (trec_eval's order).

    Raises:
        ValueError: a score is not finite, or a document occurs twice.
    """
    pairs = list(results.items() if isinstance(results, Mapping) else results)
    for document_id, score in pairs:
        if not math.isfinite(score):
            raise ValueError(f"query {query_id!r}, document {document_id!r}: the score is {score}, expected a number")
    if len({document_id for document_id, _ in pairs}) < len(pairs):
        counted = [document_id for document_id, _ in pairs]
        repeated = next(document_id for document_id in counted if counted.count(document_id) > 1)
        raise ValueError(f"query {query_id!r}: the document {repeated!r} occurs twice in the ranking")
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]), reverse=True)


def read_run(path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """Read a TREC run file: query id, Q0, document id, rank, score, name of the run (6 columns; `.gz` too).

    As in trec_eval the scores decide the order, not the ranks in the file.

    Returns:
        {query id: {document id: score}}, documents in the order of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a wrong number of columns, a score that is not a finite number, a document twice for one query, or
            an empty file; the message gives file and line.
    """
    run: dict[str, dict[str, float]] = {}
    for number, line in read_lines(path):
        columns = line.split()
        if not columns:
            continue
        where = f"{path}, line {number}"
        if len(columns) != 6:
            raise ValueError(
                f"{where}: expected 6 columns (query id, Q0, document id, rank, score, run), found {len(columns)}"
            )
        query_id, _, document_id, _, score, _ = columns
        documents = run.setdefault(query_id, {})
        if document_id in documents:
            raise ValueError(f"{where}: the document {document_id!r} occurs twice for query {query_id!r}")
        documents[document_id] = _finite_score(score, where)
    if not run:
        raise ValueError(f"{path}: holds no results")
    return run


def write_run(run: Run, path: str | os.PathLike[str], name: str = "rarezoo") -> None:
    """Write a TREC run file (gzip-compressed when it ends in `.gz`), whole or not at all; an existing one is replaced.

    Args:
        run: as in `evaluate_run`; every ranking is written in `rank_documents` order, ranks from 1.
        path: the file.
        name: the last column, a name for the run without white space.

    Raises:
        ValueError: an id or the name holds white space (which separates the columns), a score is not finite, or a
            document occurs twice in one ranking.
        OSError: the file cannot be written.
    """
    path = Path(path)
    _without_space(name, "the name of the run")
    with file_written_beside(path) as partial, open_text(partial, compressed=path.suffix == ".gz") as file:
        for query_id, results in run.items():
            _without_space(query_id, "the query id")
            for rank, (document_id, score) in enumerate(rank_documents(query_id, results), start=1):
                _without_space(document_id, "the document id")
                file.write(f"{query_id} Q0 {document_id} {rank} {float(score)!r} {name}\n")


def _ir_measures():
    try:
        import ir_measures
    except ImportError as error:
        raise ImportError("evaluation needs ir-measures: pip install 'rarezoo[eval]'") from error
    return ir_measures


def _measure(metric: str) -> ir_measures.Measure:
    """Look a name up instead of letting ir-measures parse it: its parser needs `ast` nodes that Python 3.14 dropped."""
    ir_measures = _ir_measures()
    name, at_sign, cutoff = metric.partition("@")
    try:
        measure = ir_measures.measures.registry[name]
        if at_sign:
            measure = measure @ (int(cutoff) if cutoff.isdecimal() else float(cutoff))
        supported = ir_measures.DefaultPipeline.supports(measure) and cutoff != "0"
    except (KeyError, ValueError, AssertionError):
        supported = False
    if not supported:
        raise ValueError(
            f"unknown metric {metric!r}; expected a name of ir-measures, with a cutoff where it takes one, "
            "such as nDCG@10, RR@10, R@100, P@10, AP@1000 or Success@5"
        )
    return measure


def _report_missing(run: Run, qrels: Mapping[str, Mapping[str, int]], ranked: Mapping[str, object]) -> None:
    if not ranked:
        raise ValueError(
            f"the run and the judgements have no query in common: the run has {_examples(run)}, "
            f"the judgements have {_examples(qrels)}"
        )
    missing = [query_id for query_id in qrels if query_id not in ranked]
    if missing:
        warnings.warn(
            f"{len(missing)} of {len(qrels)} judged queries have no results and count as 0: {_examples(missing)}",
            stacklevel=3,
        )


def _examples(ids: Mapping[str, object] | Sequence[str]) -> str:
    shown = ", ".join(repr(query_id) for query_id in list(ids)[:3])
    return f"{shown}, …" if len(ids) > 3 else shown or "none"


def _finite_score(text: str, where: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{where}: the score {text!r} is not a finite number")
    return score


def _without_space(text: str, what: str) -> None:
    if not text or any(character.isspace() for character in text):
        raise ValueError(
            f"{what} {text!r} cannot stand in a TREC run file, whose columns are separated by white space; "
            "rename it or evaluate the run without a file"
        )
