"""`rarezoo encode`: a corpus becomes a folder of embeddings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rarezoo.cli.options import (
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LanguageOption,
    ModelArgument,
)
from rarezoo.cli.output import print_json


def encode(
    model: ModelArgument,
    corpus: Annotated[
        Path,
        typer.Argument(metavar="CORPUS", help="BEIR folder, .jsonl, .tsv or .txt file (also .gz), or folder of .txt."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder, or one to go on with.")],
    queries: Annotated[bool, typer.Option("--queries", help="The texts are queries, not documents.")] = False,
    batch_size: BatchSizeOption = 32,
    shard_size: Annotated[int, typer.Option(min=1, help="Texts per file.")] = 2048,
    top_k: Annotated[int | None, typer.Option(min=1, help="Weights kept per text. By default the model's own.")] = None,
    language: LanguageOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Encode a corpus into a folder of vectors.

    Run the same command again after an interruption: it goes on where it stopped. Several processes share the work
    under `accelerate launch -m rarezoo.cli encode …`.
    """
    from rarezoo.cli.checkpoints import language_of, load_retriever
    from rarezoo.retrieval import SparseEmbeddings, encode_corpus, read_corpus, read_queries

    texts = read_queries(corpus) if queries else read_corpus(corpus)
    retriever, processor = load_retriever(model, device, dtype)
    embeddings = encode_corpus(
        retriever,
        processor,
        texts,
        output,
        kind="query" if queries else "document",
        batch_size=batch_size,
        shard_size=shard_size,
        top_k=top_k,
        language=language_of(language, retriever),
    )
    if int(os.environ.get("RANK", "0")):  # of several processes one answers
        return
    if isinstance(embeddings, SparseEmbeddings):
        key, what, total = "active_dimensions", "active dimensions", embeddings.num_postings
    else:
        key, what, total = "vectors", f"vectors of {embeddings.dim} dimensions", embeddings.num_vectors
    average = total / max(len(embeddings), 1)
    if json:
        print_json({"folder": str(output), "texts": len(embeddings), key: round(average, 2)})
    else:
        typer.echo(f"{output}: {len(embeddings):,} texts, {average:.1f} {what} each on average")
