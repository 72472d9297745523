"""`rarezoo quantize`: a smaller copy of a checkpoint, and what it costs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from rarezoo.cli.checkpoints import check_new_folder, check_source, load_config
from rarezoo.cli.options import JsonOption
from rarezoo.cli.output import print_json

# The names of `rarezoo.quantization.SCHEMES`, which takes torch to import; a test compares them.
_SCHEMES = ("nf4", "nf4-double", "fp4", "fp4-double", "int8", "bf16", "int8-torchao", "int8-torchao-dynamic")

_MOST_TEXTS = 256


def quantize(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Checkpoint folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder.")],
    scheme: Annotated[str, typer.Option(help=f"{', '.join(_SCHEMES)}.")] = "nf4",
    compute_dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16: dtype of all that is not quantized.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(metavar="BEIR", help="BEIR folder: adds nDCG@10 before and after to the report.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"Corpus on whose first {_MOST_TEXTS} texts outputs are compared."),
    ] = None,
    fidelity: Annotated[bool, typer.Option(help="Compare with full precision.")] = True,
    json: JsonOption = False,
) -> None:
    """Write a smaller copy of a checkpoint.

    The copy carries a report on what changed: outputs (vectors of a retriever, next-token distributions of a language
    model), file size, memory and speed, and nDCG@10 with --evaluation.
    """
    if not source.exists():
        raise FileNotFoundError(f"no folder {source}: expected a checkpoint folder")
    check_source(str(source))
    if scheme not in _SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known schemes: {', '.join(_SCHEMES)}")
    check_new_folder(output)
    from rarezoo.quantization import EvaluationSet
    from rarezoo.quantization import quantize as write_quantized
    from rarezoo.quantization.fidelity import render_markdown
    from rarezoo.retrieval import read_corpus, read_qrels, read_queries

    family, _ = load_config(str(source))
    if family.name == "tokenizer_transplant":
        raise ValueError(
            f"{source} holds no weights of its own: load it with quantization_config=…, or write the plain model, by "
            f"`rarezoo convert tokenizer_transplant {source} PLAIN --to official`"
        )
    evaluation_set = None
    if evaluation is not None:
        evaluation_set = EvaluationSet(
            {query.id: query.text for query in read_queries(evaluation)},
            {document.id: document.text for document in read_corpus(evaluation)},
            read_qrels(evaluation),
        )
    sample_texts = None if texts is None else [row.text for row in itertools.islice(read_corpus(texts), _MOST_TEXTS)]
    report = write_quantized(
        source,
        output,
        scheme=scheme,
        compute_dtype=compute_dtype,
        evaluation=evaluation_set,
        sample_texts=sample_texts,
        fidelity=fidelity,
    )
    if json:
        print_json(report)
    else:
        typer.echo(render_markdown(report))
        typer.echo(f"written to {output}")
