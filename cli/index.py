"""`rarezoo index`: build and change an index on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rarezoo.cli.options import JsonOption, MetadataOption, PrecisionOption
from rarezoo.cli.output import print_json

EmbeddingsArgument = Annotated[Path, typer.Argument(metavar="EMBEDDINGS", help="Folder of `rarezoo encode`.")]
IndexArgument = Annotated[Path, typer.Argument(metavar="INDEX", help="Folder of the index.")]


class _BuildUnlessNamed(TyperGroup):
    """`rarezoo index EMBEDDINGS INDEX` is `rarezoo index build EMBEDDINGS INDEX`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["build", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_BuildUnlessNamed,
    help="Build and change an index.\n\n`rarezoo index EMBEDDINGS INDEX` builds one.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


@app.callback()
def _show_help(context: typer.Context) -> None:
    # Not `no_args_is_help`: to the group of all verbs that is an error, of one line.
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@app.command("build")
def build(
    embeddings: EmbeddingsArgument,
    index: IndexArgument,
    precision: PrecisionOption = None,
    metadata: MetadataOption = None,
    json: JsonOption = False,
) -> None:
    """Build an index in a new folder."""
    from rarezoo.cli.checkpoints import check_precision
    from rarezoo.retrieval import build_index, open_embeddings

    check_precision(precision)
    _report(build_index(open_embeddings(embeddings), index, precision, _read_metadata(metadata)), json)


@app.command("add")
def add(
    index: IndexArgument, embeddings: EmbeddingsArgument, metadata: MetadataOption = None, json: JsonOption = False
) -> None:
    """Add documents to an index."""
    from rarezoo.retrieval import open_embeddings, open_index

    opened: Any = open_index(index)
    opened.add(open_embeddings(embeddings), _read_metadata(metadata))
    _report(opened, json)


@app.command("delete")
def delete(
    index: IndexArgument,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Identifiers of documents.")],
    json: JsonOption = False,
) -> None:
    """Delete documents from an index; `compact` frees their space."""
    from rarezoo.retrieval import open_index

    opened = open_index(index)
    opened.delete(ids)
    _report(opened, json)


@app.command("compact")
def compact(index: IndexArgument, json: JsonOption = False) -> None:
    """Rewrite an index without its deleted documents."""
    from rarezoo.retrieval import open_index

    opened = open_index(index)
    opened.compact()
    _report(opened, json)


def _read_metadata(corpus: Path | None) -> dict[str, Any] | None:
    """By document; None without a corpus."""
    from rarezoo.retrieval import read_corpus

    if corpus is None:
        return None
    found = {document.id: document.metadata for document in read_corpus(corpus) if document.metadata is not None}
    if not found:
        raise ValueError(f"{corpus}: no document has metadata; expected JSONL rows with an object 'metadata'")
    return found


def _report(index: Any, json: bool) -> None:
    what = "postings" if hasattr(index, "num_postings") else "vectors"
    count = getattr(index, f"num_{what}")
    if json:
        print_json({"folder": str(index.folder), "documents": len(index), what: count})
    else:
        typer.echo(f"{index.folder}: {len(index):,} documents, {count:,} {what}")
