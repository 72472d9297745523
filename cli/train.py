"""`rarezoo train`: a recipe becomes a checkpoint."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from rarezoo.cli.convert import check_type, read_assignments
from rarezoo.cli.options import JsonOption
from rarezoo.cli.output import print_json

if TYPE_CHECKING:
    from rarezoo.training.recipe import StoredRecipe


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="YAML or JSON file, or a checkpoint folder that holds a recipe.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder.")],
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another value for a field, as max_steps=100."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in OUTPUT.")] = False,
    json: JsonOption = False,
) -> None:
    """Train a retriever or a language model by a recipe.

    The output is a checkpoint with its recipe and its log. Several processes share the work under
    `accelerate launch -m rarezoo.cli train …`.
    """
    changes = read_assignments("--set", change or [])
    _check_paths(recipe, output, resume)
    from rarezoo.training import load_recipe
    from rarezoo.training import train as run_recipe

    start = load_recipe(recipe)
    settings = start.to_dict()
    for name, value in changes.items():
        _set(settings, start, name, value)
    result = run_recipe(type(start).from_dict(settings), output, resume=resume)
    if int(os.environ.get("RANK", "0")):  # of several processes one answers
        return
    if json:
        print_json(result)
        return
    typer.echo(f"{output}: {result['steps']:,} steps in {result['train_runtime']:.0f} s")
    for name, value in result.items():
        if name not in ("steps", "train_runtime", "output_dir", "step", "epoch"):
            typer.echo(f"  {name} {value:.4g}" if isinstance(value, float) else f"  {name} {value}")


def _check_paths(recipe: Path, output: Path, resume: bool) -> None:
    """What needs no heavy import to be seen, first."""
    file = recipe / "training_recipe.json" if recipe.is_dir() else recipe
    if not file.is_file():
        raise FileNotFoundError(f"no training recipe at {file}")
    if not resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is not empty; choose another folder, or resume the run that began there")


def _set(settings: dict[str, Any], recipe: StoredRecipe, name: str, value: Any) -> None:
    """Set a field; a dot leads into a section: `objective.score_scale`."""
    section, dot, inner = name.partition(".")
    target: Any = recipe
    if dot:
        if not isinstance(settings.get(section), dict):
            raise ValueError(f"--set {name}: the recipe has no section {section!r}")
        target, settings = getattr(recipe, section), settings[section]
    if dataclasses.is_dataclass(target):
        hint = get_type_hints(type(target)).get(inner or name, Any)
        # A section as a whole is given as an object.
        check_type("--set", name, value, dict if dataclasses.is_dataclass(hint) else hint)
    settings[inner or name] = value
