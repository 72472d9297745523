"""`rarezoo list`: the families and their presets."""

from __future__ import annotations

from dataclasses import asdict

import typer

from rarezoo.auto import FAMILIES
from rarezoo.cli.options import JsonOption
from rarezoo.cli.output import print_json


def list_families(json: JsonOption = False) -> None:
    """List the families of models and their presets."""
    from rarezoo.configs import list_presets

    if json:
        print_json([{**asdict(family), "presets": list_presets(name)} for name, family in FAMILIES.items()])
        return
    for number, (name, family) in enumerate(FAMILIES.items()):
        paper = f", arXiv {family.paper}" if family.paper else ""
        if number:
            typer.echo()
        typer.echo(f"{name}: {family.title} ({family.representation}{paper})")
        typer.echo(f"  {family.summary}")
        typer.echo(f"  classes: {', '.join(f'{auto} -> {ours}' for auto, ours in family.auto_classes.items())}")
        typer.echo(f"  presets: {', '.join(list_presets(name))}")
