"""`rarezoo export`: embeddings for other search engines, and checkpoints for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

EMBEDDING_FORMATS = ("anserini", "anserini-queries", "qdrant", "opensearch", "elasticsearch", "seismic", "scipy")
CHECKPOINT_FORMATS = ("onnx", "inference-free")


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Folder of `rarezoo encode`, or a checkpoint for onnx and inference-free."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New file, or new folder.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=", ".join((*EMBEDDING_FORMATS, *CHECKPOINT_FORMATS)))],
    model: Annotated[
        str | None, typer.Option(help="Checkpoint whose tokens name the dimensions; without it they are <id:N>.")
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Name of the vector field (opensearch, elasticsearch, qdrant).")
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="Write a folder of files with that many texts each.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Corpus from which inference-free queries take their weights.")
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            help="Language of an onnx graph's texts, for families that tell languages apart; the checkpoint's default."
        ),
    ] = None,
) -> None:
    """Write for other search engines and runtimes.

    Embeddings become the files that the engine loads; a checkpoint becomes an ONNX graph, or the table of weights with
    which queries need no model.
    """
    if language is not None and to in (*EMBEDDING_FORMATS, "inference-free"):
        raise ValueError(f"--language is of --to onnx: --to {to} takes what is encoded already, leave it out")
    if to in EMBEDDING_FORMATS:
        _export_embeddings(source, output, to, model, field, shard_size)
    elif to == "onnx":
        _export_onnx(source, output, language)
    elif to == "inference-free":
        _export_inference_free(source, output, corpus)
    else:
        known = ", ".join((*EMBEDDING_FORMATS, *CHECKPOINT_FORMATS))
        raise ValueError(
            f"--to must be one of {known}; found {to!r}. Official layouts: `rarezoo convert --to official`"
        )
    typer.echo(f"written to {output}")


def _export_embeddings(
    source: str, output: Path, to: str, model: str | None, field: str | None, shard_size: int | None
) -> None:
    from rarezoo.retrieval import SparseEmbeddings, export_embeddings, open_embeddings

    embeddings = open_embeddings(source)
    if not isinstance(embeddings, SparseEmbeddings):
        raise ValueError(f"{source} holds several vectors per text; --to {to} takes sparse vectors")
    tokens = None
    if model is not None:
        from rarezoo.cli.checkpoints import load_processor

        tokens = load_processor(model).tokenizer
    named: dict[str, Any] = {} if field is None else {"field": field}
    export_embeddings(embeddings, output, to, tokens, shard_size=shard_size, show_progress_bar=True, **named)


def _export_inference_free(source: str, output: Path, corpus: Path | None) -> None:
    if corpus is None:
        raise ValueError("--to inference-free counts the tokens of a corpus: give --corpus")
    from rarezoo.cli.checkpoints import load_config, load_processor
    from rarezoo.retrieval import InferenceFreeQueryEncoder, read_corpus

    family, config = load_config(source)
    if family.representation != "sparse":
        raise ValueError(
            f"{source} gives several vectors per text, with which no table of weights can be compared; --to "
            "inference-free takes a sparse model"
        )
    tokenizer = load_processor(source).tokenizer
    encoder = InferenceFreeQueryEncoder.from_corpus(
        tokenizer, read_corpus(corpus), vocab_size=config.vocab_size, show_progress_bar=True
    )
    encoder.save_pretrained(output)


def _export_onnx(source: str, output: Path, language: str | None) -> None:
    """The model as an ONNX graph with dynamic batch and length, and the processor that prepares its inputs; of a model
    with language adapters, one language."""
    import onnxscript  # noqa: F401  the exporter would fail late and unclearly without it
    import torch
    from transformers.exporters import OnnxConfig, OnnxExporter

    from rarezoo.cli.checkpoints import load_config, load_retriever
    from rarezoo.conversion.engine import staged_folder

    _, config = load_config(source)
    code, longest = None, config.max_position_embeddings
    if hasattr(config, "languages"):
        # Which adapter reads a row depends on the data, and no graph says that.
        code = config.languages[config.language_id(language)]
        longest -= config.pad_token_id + 1  # positions begin behind that of padding
    elif language is not None:
        raise ValueError(f"--language: {source} reads all languages alike, leave it out")
    retriever, processor = load_retriever(source, device="cpu", dtype="float32", language=code)
    retriever.requires_grad_(False)  # a graph for training would fix the batch size
    # The shapes of the sample are not baked in, but no dimension of it may be 1.
    inputs = dict(processor.process_documents(["a sample text", "another, somewhat longer sample text"]))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=longest)
    shapes = {name: {0: batch, 1: length} for name in inputs}
    with staged_folder(output) as folder:
        program = OnnxExporter().export(retriever, inputs, config=OnnxConfig(dynamic=True, dynamic_shapes=shapes))
        program.save_pretrained(folder)
        processor.save_pretrained(folder)
    if code is not None:
        typer.echo(f"the graph reads {code}, of {len(config.languages)} language(s)")
