"""`rarezoo card`: the model card of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="Checkpoint folder.")]
LicenseOption = Annotated[str | None, typer.Option(help="Licence of the weights, as the Hub names it.")]
BaseModelOption = Annotated[str | None, typer.Option(help="Hub repository of the model it was made from.")]
LanguageOption = Annotated[str | None, typer.Option(help="Language code.")]


def card(
    folder: FolderArgument,
    repository: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="What the examples of the card load.")
    ] = None,
    license: LicenseOption = None,
    base_model: BaseModelOption = None,
    language: LanguageOption = None,
    show: Annotated[bool, typer.Option("--show", help="Print the card instead of writing README.md.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Write over a README.md that was written or edited by hand.")
    ] = False,
) -> None:
    """Write a checkpoint's model card.

    Its numbers are the checkpoint's own: weight files, configuration, training recipe, evaluation and quantization
    report. The text of a README.md that was written or edited by hand stays, unless --replace is given; its metadata
    stay in any case.
    """
    from rarezoo.model_cards import build_card, write_card

    if show:
        typer.echo(str(build_card(folder, repository, license=license, base_model=base_model, language=language)))
        return
    path = write_card(folder, repository, replace=replace, license=license, base_model=base_model, language=language)
    typer.echo(f"written to {path}")
