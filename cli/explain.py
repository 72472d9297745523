"""`rarezoo explain`: the terms that a model gives a text."""

from __future__ import annotations

from typing import Annotated

import typer

from rarezoo.cli.options import DeviceOption, DtypeOption, JsonOption, ModelArgument
from rarezoo.cli.output import print_json


def explain(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text to explain.")],
    query: Annotated[bool, typer.Option("--query", help="Encode it as a query instead of a document.")] = False,
    top_k: Annotated[int, typer.Option(min=1, help="Number of terms.")] = 20,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Show the heaviest terms of a text, with their weights."""
    from rarezoo.cli.checkpoints import load_retriever

    retriever, processor = load_retriever(model, device, dtype)
    if not hasattr(retriever, "explain"):
        raise ValueError(
            f"{model}: the vectors of {type(retriever).__name__} have no terms; only sparse models explain"
        )
    terms = retriever.explain(text, processor=processor, top_k=top_k, kind="query" if query else "document")
    if json:
        print_json([{"token": token, "weight": round(weight, 6)} for token, weight in terms])
        return
    if not terms:
        typer.echo("no active terms")
    for token, weight in terms:
        typer.echo(f"{weight:8.4f}  {printable(token)}")


def printable(token: str) -> str:
    """A token on one line: line breaks and other control characters as escapes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in token)
