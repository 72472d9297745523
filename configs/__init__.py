"""Architecture presets: one JSON file per published (or tiny) size, `<family>/<name>.json`."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from rarezoo.auto import FAMILIES


def list_presets(family: str) -> list[str]:
    """Names of the family's presets. Raises `KeyError` naming the known families."""
    if family not in FAMILIES:
        raise KeyError(f"unknown family {family!r}; known families: {', '.join(sorted(FAMILIES))}")
    folder = resources.files(f"rarezoo.configs.{family}")
    return sorted(entry.name[: -len(".json")] for entry in folder.iterdir() if entry.name.endswith(".json"))


def read_preset(family: str, name: str) -> dict[str, Any]:
    """The preset file as a dict: `{"parameters": int, "source": str, "config": {...}, "processor": {...}}`.

    `parameters` is the published parameter count, which the tests compare with the model built on the meta device.
    """
    presets = list_presets(family)
    if name not in presets:
        raise KeyError(f"unknown preset {name!r} of family {family!r}; known presets: {', '.join(presets)}")
    text = (resources.files(f"rarezoo.configs.{family}") / f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)


def load_preset(family: str, name: str, **overrides: Any):
    """Build the configuration object of a preset; keyword arguments override its fields."""
    preset = read_preset(family, name)
    return FAMILIES[family].config_class()(**{**preset["config"], **overrides})
