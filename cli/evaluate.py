"""`rarezoo eval`: how well a model retrieves on a test collection."""

from __future__ import annotations

import json as json_format
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rarezoo.cli.options import (
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LanguageOption,
    ModelArgument,
    PrecisionOption,
)
from rarezoo.cli.output import print_json, print_pairs

if TYPE_CHECKING:
    from rarezoo.cli.queries import QueryEncoder
    from rarezoo.retrieval import MultiVectorEmbeddings, MultiVectorIndex, SparseEmbeddings, SparseIndex

EVALUATION_FILE = "evaluation.json"


def evaluate(
    model: ModelArgument,
    collection: Annotated[
        Path, typer.Argument(metavar="COLLECTION", help="BEIR folder: corpus.jsonl, queries.jsonl and qrels/.")
    ],
    split: Annotated[str, typer.Option(help="Name of the judgements, as in qrels/test.tsv.")] = "test",
    metrics: Annotated[str, typer.Option(help="Names that ir-measures knows, separated by commas.")] = (
        "nDCG@10,RR@10,R@100"
    ),
    depth: Annotated[int, typer.Option(min=1, help="Documents kept per query.")] = 1000,
    output: Annotated[
        Path | None, typer.Option(help="Keep embeddings, index, run and metrics here; an interrupted run goes on.")
    ] = None,
    query_model: Annotated[
        str | None, typer.Option(help="Encode queries with this folder of `export --to inference-free` instead.")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Write the result into the checkpoint, for its card.")] = False,
    language: LanguageOption = None,
    precision: PrecisionOption = None,
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Measure retrieval on a test collection.

    Encodes the corpus, builds an index (exact, unless --precision says otherwise), searches all judged queries and
    evaluates with ir-measures. As is usual on BEIR, a document with the identifier of the query is the query itself and
    no answer, unless the judgements name that pair.
    """
    from rarezoo.cli.checkpoints import check_precision, language_of, load_config, load_retriever
    from rarezoo.cli.queries import QueryEncoder
    from rarezoo.retrieval import encode_corpus, evaluate_run, read_corpus, read_qrels, write_run

    # Whatever can be wrong is found now, not after hours of encoding.
    known = _known_results(Path(model), query_model) if save else []
    check_precision(precision, load_config(model)[0])
    if output:
        _check_precision_of(output / "index", precision)
    names = [name.strip() for name in metrics.split(",")]
    qrels = read_qrels(collection, split)
    evaluate_run(qrels, qrels, metrics=names)
    if output:
        _check_identifiers(collection)
    documents = read_corpus(collection)
    retriever, processor = load_retriever(model, device, dtype)
    encoder = QueryEncoder.load(query_model) if query_model else QueryEncoder(retriever, processor, language)
    queries = _encode_queries(encoder, collection, set(qrels))
    told = language_of(language, retriever)
    if query_model:
        _check_same_space(queries, retriever, query_model)
    with nullcontext(str(output)) if output else tempfile.TemporaryDirectory(prefix="rarezoo-eval-") as folder:
        embeddings = encode_corpus(
            retriever, processor, documents, Path(folder) / "documents", batch_size=batch_size, language=told
        )
        index = _index(embeddings, Path(folder) / "index", precision)
        run = _search(index, queries, qrels, depth)
        measured = evaluate_run(run, qrels, metrics=names)
        answer = {
            "dataset": collection.resolve().name,
            "split": split,
            **_conditions(index, retriever, told),
            "queries": len(run),
            "documents": len(index),
            "metrics": {name: round(value, 5) for name, value in measured.items()},
        }
        # Printed first: what cannot be stored is not lost.
        if json:
            print_json(answer)
        else:
            counts = [("queries", f"{len(run):,}"), ("documents", f"{answer['documents']:,}")]
            print_pairs(counts + [(name, f"{value:.4f}") for name, value in measured.items()])
        if output:
            write_run(run, output / "run.trec")
            _write_json(output / "metrics.json", answer)
    if save:
        same = _measurement(answer)
        kept = [entry for entry in known if _measurement(entry) != same]
        _write_json(Path(model) / EVALUATION_FILE, [*kept, answer])


def _known_results(folder: Path, query_model: str | None) -> list[dict[str, Any]]:
    """The results that the checkpoint holds already."""
    from rarezoo.model_cards.card import read_evaluations

    if not folder.is_dir():
        raise ValueError(f"--save writes into a checkpoint folder; {folder} is none")
    if query_model:
        raise ValueError("--save stores the model's own result; with --query-model leave it out and use --output")
    return read_evaluations(folder)


def _conditions(index: Any, retriever: Any, language: Any) -> dict[str, str]:
    """What shapes the figures besides the collection: language, and precision and dtype other than float32."""
    conditions = {}
    if hasattr(retriever.config, "languages"):
        config = retriever.config
        conditions["language"] = "detect" if callable(language) else config.languages[config.language_id(language)]
    for name, value in (
        ("precision", getattr(index, "precision", "float32")),
        ("dtype", str(retriever.dtype).removeprefix("torch.")),
    ):
        if value != "float32":
            conditions[name] = value
    return conditions


def _measurement(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What a later result of the same takes the place of."""
    return tuple(entry.get(name) for name in ("dataset", "split", "language", "precision", "dtype"))


def _check_identifiers(collection: Path) -> None:
    """A run file separates its columns by white space."""
    from rarezoo.retrieval import read_corpus, read_queries

    for read in (read_queries, read_corpus):
        for text in read(collection):
            if any(character.isspace() for character in text.id):
                raise ValueError(
                    f"{collection}: the identifier {text.id!r} holds white space and cannot stand in the run file of "
                    "--output; rename it, or leave out --output"
                )


def _encode_queries(
    encoder: QueryEncoder, collection: Path, judged: set[str]
) -> SparseEmbeddings | MultiVectorEmbeddings:
    from rarezoo.retrieval import read_queries

    queries = [query for query in read_queries(collection) if query.id in judged]
    if not queries:
        raise ValueError(f"{collection}: none of its queries is judged in this split")
    return encoder.encode([query.id for query in queries], [query.text for query in queries], True)


def _check_same_space(queries: Any, retriever: Any, query_model: str) -> None:
    from rarezoo.retrieval import SparseEmbeddings, model_fingerprint

    if not isinstance(queries, SparseEmbeddings) or not hasattr(retriever.config, "top_k_query"):
        raise ValueError(f"--query-model {query_model}: another model for the queries is for sparse vectors only")
    if queries.matrix.shape[1] != retriever.config.vocab_size:
        raise ValueError(
            f"--query-model {query_model}: its vectors have {queries.matrix.shape[1]} dimensions, those of the "
            f"documents {retriever.config.vocab_size}; make it from this model"
        )
    if queries.fingerprint not in (None, model_fingerprint(retriever)):
        raise ValueError(f"--query-model {query_model} is another model than the one that encodes the documents")


def _check_precision_of(folder: Path, precision: str | None) -> None:
    """An interrupted run goes on with the index that it built."""
    from rarezoo.retrieval import open_index

    if precision is not None and folder.exists() and getattr(open_index(folder), "precision", None) != precision:
        raise ValueError(f"{folder} is an index of another precision: remove it or choose another --output")


def _index(
    embeddings: SparseEmbeddings | MultiVectorEmbeddings, folder: Path, precision: str | None
) -> SparseIndex | MultiVectorIndex:
    from rarezoo.retrieval import build_index, open_index

    if not folder.exists():
        return build_index(embeddings, folder, precision)
    index = open_index(folder)
    if index.fingerprint != embeddings.fingerprint or len(index) != len(embeddings):
        raise ValueError(f"{folder} is the index of other embeddings: remove it or choose another --output")
    return index


def _search(
    index: Any, queries: Any, qrels: dict[str, dict[str, int]], depth: int
) -> dict[str, list[tuple[str, float]]]:
    from rarezoo.cli.search import search_all

    found = search_all(index, queries, depth + 1)
    run = {}
    for query, row in zip(queries.ids, found):
        itself = {query} - qrels[query].keys()
        run[query] = [(document, score) for document, score in row if document not in itself][:depth]
    return run


def _write_json(path: Path, content: Any) -> None:
    from rarezoo.model_cards.card import write_whole

    write_whole(path, json_format.dumps(content, indent=2) + "\n")
