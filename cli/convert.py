"""`rarezoo convert`: published checkpoint layouts to rarezoo's, and back."""

from __future__ import annotations

import importlib
import json as json_format
import math
from collections.abc import Mapping
from dataclasses import asdict
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from rarezoo.cli.checkpoints import check_found, check_new_folder
from rarezoo.cli.family_names import FamilyArgument
from rarezoo.cli.options import JsonOption
from rarezoo.cli.output import megabytes, print_json

_TYPE_NAMES: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a JSON object",
    Mapping: "a JSON object",
    NoneType: "null",
}


def convert(
    family: FamilyArgument,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Checkpoint folder, or Hub repository OWNER/NAME.")],
    destination: Annotated[str, typer.Argument(metavar="DESTINATION", help="New folder.")],
    to: Annotated[str, typer.Option(help="rarezoo, or official.")] = "rarezoo",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. By default the source's own.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, as 5GB or 200MB.")] = "5GB",
    base: Annotated[
        str | None,
        typer.Option(help="Base of an adapter: folder or Hub repository. By default what the adapter names."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Option of the family's converter; VALUE is JSON or a plain word."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Convert a checkpoint to rarezoo's layout, or back.

    It is read tensor by tensor. Every tensor is accounted for, and the result is opened again before it gets its name.
    """
    options = read_assignments("--option", option or [])
    check_found(source)
    check_new_folder(destination)
    _check_options(options, family, to)
    if base is not None:
        options["base"] = base
    from rarezoo.conversion import convert as convert_checkpoint

    report = convert_checkpoint(
        family, source, destination, to=to, dtype=dtype, max_shard_size=max_shard_size, **options
    )
    if json:
        print_json(asdict(report))
        return
    for folder in report.folders:
        dtype_text = f" in {folder.dtype}" if folder.dtype else ""
        typer.echo(
            f"{folder.path}: {folder.layout} layout, {folder.tensors} tensors, {folder.parameters:,} "
            f"parameters{dtype_text}, {megabytes(folder.size_bytes)}"
        )
        if folder.merged:
            typer.echo(f"  adapter merged into {len(folder.merged)} weights")
        for reason, names in _by_reason(folder.dropped).items():
            what = names[0] if len(names) == 1 else f"{len(names)} tensors or files, such as {names[0]}"
            typer.echo(f"  left out {what}: {reason}")
        for note in folder.notes:
            typer.echo(f"  {note}")


def _by_reason(dropped: Mapping[str, str]) -> dict[str, list[str]]:
    """Why -> what was left out; of several dozen adapters that would be thousands of lines."""
    reasons: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def _check_options(options: dict[str, Any], family: str, to: str) -> None:
    for name in ("family", "source", "destination", "to", "dtype", "max_shard_size"):
        if name in options:
            raise ValueError(f"--option {name}: it is an argument of the command itself, see `rarezoo convert --help`")
    converter = getattr(importlib.import_module(f"rarezoo.conversion.convert_{family}"), f"to_{to}", None)
    hints = get_type_hints(converter) if converter else {}
    for name, value in options.items():
        check_type("--option", name, value, hints.get(name, Any))


def check_type(option: str, name: str, value: Any, hint: Any) -> None:
    """Raise `ValueError` unless a value from the command line is of the type that its field is declared with."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    plain = [get_origin(kind) or kind for kind in kinds]
    if Any in plain:
        return
    if isinstance(value, bool):
        fits = bool in plain
    elif isinstance(value, (int, float)) and float in plain:
        fits = math.isfinite(value)
    else:
        fits = isinstance(value, tuple(plain))
    if not fits:
        wanted = " or ".join(_TYPE_NAMES[kind] for kind in plain if kind in _TYPE_NAMES)
        raise ValueError(f"{option} {name}: expected {wanted}; found {value!r}")


def read_assignments(option: str, texts: list[str]) -> dict[str, Any]:
    """{name: value} of texts NAME=VALUE, VALUE being JSON or else a plain word."""
    assignments = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"{option} must be NAME=VALUE; found {text!r}")
        try:
            assignments[name] = json_format.loads(value)
        except ValueError:
            assignments[name] = value
    return assignments
