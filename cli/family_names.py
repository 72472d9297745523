"""Names of families and presets as people type them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated

import typer

from rarezoo.auto import FAMILIES

# Similarities, as difflib counts them. The Hub has an owner colbert-ir, which is 0.8 like colbert_xm.
_MISTYPED = 0.9
_RELATED = 0.5


def family_name(name: str) -> str:
    """The table's name of a family; hyphens do for underscores. Raises `ValueError` that suggests the nearest one."""
    known = name.replace("-", "_")
    if known in FAMILIES:
        return known
    near = _nearest(name, FAMILIES, 0.6)
    question = f"did you mean {near}? Known" if near else "known"
    raise ValueError(f"unknown family {name!r}; {question} families: {', '.join(FAMILIES)}")


FamilyArgument = Annotated[
    str, typer.Argument(metavar="FAMILY", help="A name that `rarezoo list` shows.", callback=family_name)
]


def meant_preset(model: str) -> str | None:
    """What a text that is no local folder was probably meant to be: "mistral_splade/tiny", or a family. None where it
    may well be a Hub repository."""
    first, slash, second = model.partition("/")
    if not slash:
        return _nearest(first, FAMILIES, 0.6) or " or ".join(presets_named(first)) or None
    owners = [preset.partition("/")[0] for preset in presets_named(second)]
    family = _nearest(first, FAMILIES, _MISTYPED) or _nearest(first, owners, _RELATED)
    if family is None:
        return None
    from rarezoo.configs import list_presets

    preset = _nearest(second, list_presets(family), 0.6, hyphens=True)
    return f"{family}/{preset}" if preset else family


def presets_named(name: str) -> list[str]:
    """FAMILY/NAME of every preset of this name."""
    from rarezoo.configs import list_presets

    return [f"{family}/{name}" for family in FAMILIES if name in list_presets(family)]


def _nearest(name: str, known: Iterable[str], similarity: float, hyphens: bool = False) -> str | None:
    found = get_close_matches(name if hyphens else name.replace("-", "_"), list(known), 1, similarity)
    return found[0] if found else None
