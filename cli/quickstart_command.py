"""`rarezoo quickstart`: a family at work on real text, from training to explained answers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from rarezoo.cli.family_names import FamilyArgument

_TOURS = {"mistral_splade": "rarezoo.cli.quickstart"}


def quickstart(
    family: FamilyArgument = "mistral_splade",
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint, the index and the picture.")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """Watch a family at work on real text.

    Trains a small model on the documentation strings of this machine, saves it, loads it without the package, indexes,
    searches, explains and quantizes. Nothing is downloaded.
    """
    module = _TOURS.get(family)
    if module is None:
        raise ValueError(f"no quickstart for {family!r}; expected {', '.join(_TOURS)}")
    importlib.import_module(module).run(output)
