"""`rarezoo quickstart`: a family at work on real text, from training to answers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from rarezoo.cli.family_names import FamilyArgument

# Where each tour is, and where it puts its files.
_TOURS = {
    "mistral_splade": ("rarezoo.cli.quickstart_mistral_splade", "runs/quickstart"),
    "colbert_xm": ("rarezoo.cli.quickstart_colbert_xm", "runs/quickstart-colbert-xm"),
    "lexinvariant": ("rarezoo.cli.quickstart_lexinvariant", "runs/quickstart-lexinvariant"),
    "tokenizer_transplant": ("rarezoo.cli.quickstart_tokenizer_transplant", "runs/quickstart-tokenizer-transplant"),
}
# Their models are so narrow that several threads would wait for each other, on a busy machine ten times as long as one
# takes.
_NARROW = ("lexinvariant", "tokenizer_transplant")


def quickstart(
    family: FamilyArgument = "mistral_splade",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the checkpoint, the index and the picture. By default runs/quickstart, "
            "runs/quickstart-colbert-xm, runs/quickstart-lexinvariant, or runs/quickstart-tokenizer-transplant. What "
            "an earlier tour left there is replaced."
        ),
    ] = None,
) -> None:
    """Watch a family at work on real text.

    Trains a small model on the texts of this machine, saves it, loads it without the package, uses it and quantizes it.
    mistral_splade reads and finds documentation strings and explains its answers; colbert_xm reads translated messages
    of programs, answers questions in several languages, and learns a further one; lexinvariant reads the text of
    Python's library, the same enciphered, and looks up symbols that it has never seen; tokenizer_transplant gives a
    language model two other tokenizers by several methods and measures what is left of it. Nothing is downloaded.
    """
    if family not in _TOURS:
        raise ValueError(f"no quickstart for {family!r}; expected {', '.join(_TOURS)}")
    module, folder = _TOURS[family]
    tour = importlib.import_module(module)
    if family in _NARROW:
        import torch

        torch.set_num_threads(1)
    tour.run(output or Path(folder))
