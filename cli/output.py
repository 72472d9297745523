"""How answers are printed: JSON for scripts, aligned columns for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import typer


def print_json(answer: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(answer, indent=2, ensure_ascii=False, default=str))


def print_pairs(pairs: Iterable[tuple[str, Any]]) -> None:
    """One line per pair: the name, padded, and the value."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        typer.echo(f"{name:<{width}}  {value}".rstrip())


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Left-aligned columns under their names."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())


def megabytes(size: float) -> str:
    """Bytes as a short text: "5.8 MB", "12 kB"."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
