"""`rarezoo search`: answers of an index, with the terms that matched."""

from __future__ import annotations

import json as json_format
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from rarezoo.cli.explain import printable
from rarezoo.cli.options import DeviceOption, DtypeOption, JsonOption, LanguageOption
from rarezoo.cli.output import print_json

SNIPPET_CHARACTERS = 160
SHOWN_TERMS = 8


def search(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="Folder of `rarezoo index`.")],
    model: Annotated[
        str, typer.Option(help="Checkpoint that encoded the documents, or a folder of `export --to inference-free`.")
    ],
    query: Annotated[str | None, typer.Argument(metavar="QUERY", help="What to search for.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Show the texts of what was found from this corpus.")] = None,
    queries: Annotated[Path | None, typer.Option(help="Instead of QUERY: a file of queries; needs --run.")] = None,
    run: Annotated[Path | None, typer.Option(help="Write the answers to this TREC run file.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Documents per query.")] = 10,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE",
            help="Only documents with this in their metadata: JSON, or else text. Of several for a field any one, of "
            "several fields all.",
        ),
    ] = None,
    terms: Annotated[
        int | None, typer.Option(min=0, help=f"Matched terms shown per document, of a sparse index; {SHOWN_TERMS}.")
    ] = None,
    language: LanguageOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Search an index.

    Each answer shows its score; of a sparse index also the terms of the query that matched, with what each contributed.
    """
    filters = parse_where(where or [])
    if (query is None) == (queries is None) or (queries is None) != (run is None):
        raise ValueError("give either a QUERY, or --queries FILE together with --run FILE")
    from rarezoo.cli.queries import QueryEncoder
    from rarezoo.retrieval import open_index

    opened = open_index(index)
    has_terms = hasattr(opened, "matched_terms")
    if terms is not None and not has_terms:
        raise ValueError(f"--terms: {index} holds several vectors per text, which have no terms; leave it out")
    encoder = QueryEncoder.load(model, device, dtype, language)
    if queries is not None and run is not None:
        _write_run(opened, encoder, queries, run, top_k, filters, json)
        return
    answers = _answers(opened, encoder, str(query), top_k, filters, SHOWN_TERMS if terms is None else terms)
    if corpus is not None:
        texts = find_texts(corpus, {answer["id"] for answer in answers})
        for answer in answers:
            answer["text"] = texts[answer["id"]]
    if json:
        print_json({"query": query, "answers": answers})
    else:
        print_answers(answers, filtered=filters is not None, by_terms=has_terms)


def parse_where(conditions: list[str]) -> dict[str, list[Any]] | None:
    """Of every field the values that are allowed, from `FIELD=VALUE`; None without conditions.

    Raises `ValueError` for another form.
    """
    where: dict[str, list[Any]] = {}
    for condition in conditions:
        field, equals, text = condition.partition("=")
        if not (field and equals):
            raise ValueError(f"--where {condition!r}: expected FIELD=VALUE")
        value = _json_or_text(text)
        where.setdefault(field, []).extend(value if isinstance(value, list) else [value])
    return where or None


def _json_or_text(text: str) -> Any:
    try:
        return json_format.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")  # Python takes NaN and Infinity for numbers


def _answers(
    index: Any, encoder: Any, query: str, top_k: int, where: dict[str, list[Any]] | None, terms: int
) -> list[dict[str, Any]]:
    embedded = encoder.encode(["query"], [query])
    (found,) = search_all(index, embedded, top_k, where)
    answers: list[dict[str, Any]] = []
    for rank, (document_id, score) in enumerate(found, 1):
        answer: dict[str, Any] = {"rank": rank, "id": document_id, "score": round(score, 6)}
        if metadata := index.metadata(document_id):
            answer["metadata"] = metadata
        if hasattr(index, "matched_terms"):
            answer["terms"] = [
                {
                    "token": encoder.token(term.vocabulary_index),
                    "query_weight": round(term.query_weight, 6),
                    "document_weight": round(term.document_weight, 6),
                    "contribution": round(term.query_weight * term.document_weight, 6),
                }
                for term in index.matched_terms(embedded, document_id)[:terms]
            ]
        answers.append(answer)
    return answers


def _write_run(
    index: Any,
    encoder: Any,
    queries: Path,
    run: Path,
    top_k: int,
    where: dict[str, list[Any]] | None,
    json: bool,
) -> None:
    from rarezoo.retrieval import read_queries, write_run

    ids, texts = zip(*read_queries(queries))
    found = search_all(index, encoder.encode(ids, texts, show_progress_bar=True), top_k, where)
    write_run(dict(zip(ids, found)), run)
    answer = {"run": str(run), "queries": len(ids), "answers": sum(map(len, found))}
    if json:
        print_json(answer)
    else:
        typer.echo(f"{run}: {answer['answers']:,} answers to {answer['queries']:,} queries")


def search_all(
    index: Any, queries: Any, top_k: int, where: dict[str, list[Any]] | None = None
) -> list[list[tuple[str, float]]]:
    """`index.search` of queries of its kind, on all cores.

    Raises `ValueError` when the queries come from a model of another kind.
    """
    from rarezoo.retrieval import SparseEmbeddings, SparseIndex

    is_sparse = isinstance(index, SparseIndex)
    if isinstance(queries, SparseEmbeddings) != is_sparse:
        kinds = ("sparse vectors", "several vectors per text")
        held, found = kinds if is_sparse else reversed(kinds)
        raise ValueError(
            f"{index.folder} holds {held}, --model gives {found}: use the model that encoded the documents"
        )
    # The products of multi-vectors use all cores anyway.
    threads = {"num_threads": os.cpu_count() or 1} if is_sparse else {}
    return index.search(queries, top_k, where=where, **threads)


def find_texts(corpus: Path, ids: set[str]) -> dict[str, str]:
    """The texts of some documents of a corpus, read until all are found.

    Raises `ValueError` when the corpus lacks one of them.
    """
    from rarezoo.retrieval import read_corpus

    texts: dict[str, str] = {}
    for document in read_corpus(corpus):
        if len(texts) == len(ids):
            break
        if document.id in ids:
            texts[document.id] = document.text
    missing = sorted(ids - set(texts))
    if missing:
        raise ValueError(f"{corpus} has no document {missing[0]!r}: expected the corpus that was indexed")
    return texts


def print_answers(answers: list[dict[str, Any]], filtered: bool = False, by_terms: bool = True) -> None:
    """Rank, score, identifier; below them matched terms, metadata, and the part of the text where most terms stand."""
    if not answers:
        if by_terms:
            among = "no document with the metadata of --where" if filtered else "no document"
            reason = f"{among} shares a term with the query"
        else:
            reason = "no document has the metadata of --where" if filtered else "the index holds no documents"
        typer.echo(f"nothing found: {reason}")
    for answer in answers:
        typer.echo(f"{answer['rank']:>3}. {answer['score']:9.4f}  {answer['id']}")
        terms = answer.get("terms", [])
        matched = [f"{printable(term['token'])} {term['contribution']:.2f}" for term in terms]
        if matched:
            typer.echo(f"     {'  '.join(matched)}")
        if "metadata" in answer:
            typer.echo(f"     {printable(json_format.dumps(answer['metadata'], ensure_ascii=False))}")
        if "text" in answer:
            typer.echo(f"     {snippet(answer['text'], [term['token'] for term in terms])}")


def snippet(text: str, tokens: list[str], width: int = SNIPPET_CHARACTERS) -> str:
    """The stretch of a text, on one line, that holds most of the tokens; its beginning where it holds none."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    words = {word for token in tokens if len(word := token.strip("▁Ġ ").lower()) > 1}
    lowered = text.lower()
    places = sorted(match.start() for word in words for match in re.finditer(re.escape(word), lowered))
    best = max(
        (0, *places),
        key=lambda start: (sum(word in lowered[start : start + width] for word in words), -start),
    )
    start = 0 if best == 0 else text.rfind(" ", 0, best) + 1
    shown = text[start : start + width].rsplit(" ", 1)[0] if start + width < len(text) else text[start:]
    return f"{'… ' if start else ''}{shown}{' …' if start + width < len(text) else ''}"
