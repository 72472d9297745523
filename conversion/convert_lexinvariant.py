"""Decoders to the lexinvariant family: Flax trees of google-research/meliad, both ways, and T5's decoders.

A learned table comes along as `table="learned"`; with `config_options={"table": "gaussian"}` (or any other without
learned rows) the network becomes a lexinvariant one and the rows stay behind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import custom_object_save

from rarezoo.conversion.checkpoint_files import ConversionError, write_json
from rarezoo.conversion.engine import (
    ConversionReport,
    FolderReport,
    Plan,
    Step,
    WrittenWeights,
    expected_shapes,
    parse_dtype,
    plan_conversion,
    reverse,
    staged_folder,
    verify_model,
    verify_weights,
    write_weights,
)
from rarezoo.conversion.lexinvariant_layouts import (
    FAMILY,
    FLAX_CONFIG,
    Source,
    flax_rules,
    full_flax_name,
    open_checkpoint,
    told_fields,
)
from rarezoo.lexinvariant import LexinvariantConfig, LexinvariantForCausalLM

_SMALL_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "spiece.model",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def to_rarezoo(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    config_options: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """A Flax tree or a T5 to rarezoo's layout; a rarezoo folder is written again, to change dtype or fields.

    Args:
        source: as in `rarezoo.conversion.convert`, or a `.npz` or `.safetensors` file of a Flax tree: its parameters
            under their paths, joined by "/".
        destination, dtype, max_shard_size: as in `rarezoo.conversion.convert`.
        config_options: fields of `LexinvariantConfig` that replace what the source says: of a Flax tree `hidden_act`,
            `attend_self`, `relative_attention_max_distance` and the like, which its tensors do not tell.
    """
    opened = open_checkpoint(source, config_options)
    shapes = _shapes(opened.config)
    with staged_folder(Path(destination)) as staging:
        plan = plan_conversion(opened.rules, opened.weights.entries, shapes, source)
        written = write_weights(
            plan, opened.weights, shapes, staging, dtype=parse_dtype(dtype), max_shard_size=max_shard_size
        )
        opened.config.dtype = written.dtype
        opened.config.save_pretrained(staging)
        custom_object_save(LexinvariantForCausalLM, staging)
        _copy_small_files(opened.folder, staging)
        verify_weights(staging, written)
        verify_model(staging, AutoModelForCausalLM, written, load=len(written.files) == 1)
    return _report(source, opened, destination, "rarezoo", written, plan.dropped)


def to_official(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    layout: str = "flax",
) -> ConversionReport:
    """Rarezoo's layout to a Flax tree: `model.safetensors` under the paths of google-research/meliad, and the fields of
    the configuration that tensors do not tell in `decoder_config.json`.

    Args:
        source, destination, dtype, max_shard_size: as in `rarezoo.conversion.convert`.
        layout: "flax", the only one.
    """
    if layout != "flax":
        raise ConversionError(f"layout must be flax; found {layout!r}")
    opened = open_checkpoint(source)
    if opened.layout != "rarezoo":
        raise ConversionError(f"{opened.folder} has the layout {opened.layout!r} already; expected a rarezoo folder")
    shapes = _flax_shapes(opened.config)
    plan = plan_conversion(reverse(flax_rules(opened.config)), opened.weights.entries, shapes, source)
    steps = (Step(step.sources, tuple(map(full_flax_name, step.targets)), step.transform) for step in plan.steps)
    shapes = {full_flax_name(name): shape for name, shape in shapes.items()}
    with staged_folder(Path(destination)) as staging:
        written = write_weights(
            Plan(tuple(steps), plan.dropped),
            opened.weights,
            shapes,
            staging,
            dtype=parse_dtype(dtype),
            max_shard_size=max_shard_size,
        )
        write_json(staging / FLAX_CONFIG, told_fields(opened.config))
        _copy_small_files(opened.folder, staging)
        verify_weights(staging, written)
    return _report(source, opened, destination, "flax", written, plan.dropped)


def _shapes(config: LexinvariantConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return expected_shapes(LexinvariantForCausalLM(config))


def _flax_shapes(config: LexinvariantConfig) -> dict[str, tuple[int, ...]]:
    """Name (as `flax_name` gives it) -> shape of every parameter."""
    ours, shapes = _shapes(config), {}
    for rule in flax_rules(config):
        for layer in range(config.num_hidden_layers):
            name = rule.targets[0].format(layer=layer)
            if name in ours:
                tensor = torch.empty(ours[name], device="meta")
                tensor = tensor if rule.backward is None else rule.backward([tensor])[0]
                shapes[rule.sources[0].format(layer=layer)] = tuple(tensor.shape)
    return shapes


def _copy_small_files(folder: Path, target: Path) -> None:
    for pattern in _SMALL_FILES:
        for file in folder.glob(pattern):
            shutil.copyfile(file, target / file.name)


def _report(
    source: str | os.PathLike,
    opened: Source,
    destination: str | os.PathLike,
    layout: str,
    written: WrittenWeights,
    dropped: dict[str, str],
) -> ConversionReport:
    folder = FolderReport(
        str(destination),
        layout,
        tensors=len(written.tensors),
        parameters=written.parameters,
        size_bytes=written.size_bytes,
        files=len(written.files),
        dtype=str(written.dtype).removeprefix("torch."),
        dropped=dropped,
        notes=tuple(opened.notes),
    )
    to = "rarezoo" if layout == "rarezoo" else "official"
    return ConversionReport(FAMILY, str(source), opened.layout, to, (folder,))
