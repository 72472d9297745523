"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder, or Hub repository OWNER/NAME.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of text.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … By default a GPU where there is one.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. By default what the checkpoint says.")
]
LanguageOption = Annotated[
    str | None,
    typer.Option(
        help="Of the texts, for families that tell languages apart: a code as fr_XX, fr or fr-CA; detect, text by text."
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(help="Of a multi-vector index: float32, float16, int8, 8-bit, 4-bit, 2-bit or 1-bit."),
]
MetadataOption = Annotated[
    Path | None,
    typer.Option(
        metavar="CORPUS", help="Keep the metadata that the rows of this corpus have; documents are filtered by them."
    ),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Texts per forward pass.")]
