"""Arguments and options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, or Hub repository OWNER/NAME.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of text.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … By default a GPU where there is one.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. By default what the checkpoint says.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Texts per forward pass.")]
