"""`rarezoo push`: a checkpoint to the Hub, card included."""

from __future__ import annotations

from typing import Annotated

import typer

from rarezoo.cli.card import BaseModelOption, FolderArgument, LanguageOption, LicenseOption
from rarezoo.cli.options import JsonOption
from rarezoo.cli.output import print_json


def push(
    folder: FolderArgument,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Hub repository; made when absent.")],
    revision: Annotated[str | None, typer.Option(help="Branch; made when absent. By default main.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload checkpoint",
    license: LicenseOption = None,
    base_model: BaseModelOption = None,
    language: LanguageOption = None,
    json: JsonOption = False,
) -> None:
    """Upload a checkpoint to the Hub.

    Its card is written first; a README.md that was written or edited by hand goes up as it is. The files of the
    checkpoint go up as one commit, with the code that loads them.
    """
    from rarezoo.model_cards import push as push_checkpoint

    commit = push_checkpoint(
        folder,
        repository,
        revision=revision,
        private=private or None,
        commit_message=message,
        license=license,
        base_model=base_model,
        language=language,
    )
    if json:
        print_json({"repository": repository, "commit": commit.oid, "url": commit.commit_url})
    else:
        typer.echo(commit.commit_url)
