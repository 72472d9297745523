"""`rarezoo info`: what a preset or a checkpoint is."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer

from rarezoo.auto import FAMILIES, Family
from rarezoo.cli.family_names import meant_preset, presets_named
from rarezoo.cli.options import JsonOption
from rarezoo.cli.output import megabytes, print_json, print_pairs


def info(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Preset FAMILY/NAME, FAMILY, checkpoint folder, or Hub repository OWNER/NAME."
        ),
    ],
    json: JsonOption = False,
) -> None:
    """Describe a preset or a checkpoint.

    Shows its configuration, parameters, files, training recipe and quantization; of a family, its presets.
    """
    first, _, preset = model.partition("/")
    family = first.replace("-", "_")
    local = (Path(model).expanduser() / "config.json").is_file()
    if family in FAMILIES and (not local or (family == first and preset)):
        answer = _describe_preset(family, preset) if preset else _describe_presets(family)
    else:
        _check_spelling(model)
        answer = _describe_checkpoint(model)
    if json:
        print_json(answer)
    else:
        print_pairs(_lines(answer))


def _check_spelling(model: str) -> None:
    """Before a search on the Hub, which may be long: name the preset that was probably meant."""
    if model.startswith((".", "/", "~")) or Path(model).exists():
        return
    meant = meant_preset(model)
    if meant is not None:
        raise ValueError(f"no preset or checkpoint {model}; did you mean {meant}?")
    namesakes = presets_named(model.partition("/")[2])
    if namesakes:
        typer.echo(f"looking for the Hub repository {model}; the preset is {' or '.join(namesakes)}", err=True)


def _describe_presets(family_name: str) -> dict[str, Any]:
    from rarezoo.configs import list_presets

    presets = [f"{family_name}/{name}" for name in list_presets(family_name)]
    return {**_describe_family(FAMILIES[family_name]), "presets": presets}


def _describe_preset(family_name: str, name: str) -> dict[str, Any]:
    from rarezoo.configs import load_preset, read_preset

    preset = read_preset(family_name, name)
    return {
        "preset": f"{family_name}/{name}",
        **_describe_family(FAMILIES[family_name]),
        "parameters": _count_parameters(load_preset(family_name, name)),
        "source": preset["source"],
        "config": preset["config"],
        "processor": preset.get("processor"),
    }


def _describe_checkpoint(model: str) -> dict[str, Any]:
    from transformers import AutoConfig

    from rarezoo.cli.checkpoints import is_plain_transplant, load_config, read_config

    stored = read_config(model)
    config: Any
    if is_plain_transplant(stored):
        family, config = FAMILIES["tokenizer_transplant"], AutoConfig.from_pretrained(model)
    else:
        family, config = load_config(model)
    folder = Path(model).expanduser()
    answer = {
        "checkpoint": model,
        **_describe_family(family),
        "architecture": stored["architectures"][0] if is_plain_transplant(stored) else None,
        "parameters": _count_parameters(config),
        "config": _own_fields(config),
        "transplant": stored.get("tokenizer_transplant"),
        "processor": _read(model, "processor_config.json"),
        "training_recipe": _read(model, "training_recipe.json"),
        "quantization": _quantization(config, _read(model, "quantization_report.json")),
        "files": _folder_files(folder) if folder.is_dir() else _hub_files(model),
    }
    return {name: value for name, value in answer.items() if value is not None}


def _describe_family(family: Family) -> dict[str, Any]:
    return {"family": family.name, "title": family.title, "representation": family.representation}


def _count_parameters(config: Any) -> int:
    """Parameters of the model that `AutoModel` gives, built without memory for its weights."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _own_fields(config: Any) -> dict[str, Any]:
    """The configuration as stored, without what other lines of the answer say."""
    left_out = (
        *("auto_map", "quantization_config", "architectures", "transformers_version", "_name_or_path"),
        "tokenizer_transplant",
    )
    return {name: value for name, value in config.to_dict().items() if name not in left_out}


def _read(model: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a checkpoint; None where it has none."""
    from transformers.utils import cached_file

    path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return json_format.loads(Path(path).read_text(encoding="utf-8")) if path else None


def _quantization(config: Any, report: dict[str, Any] | None) -> dict[str, Any] | None:
    settings = getattr(config, "quantization_config", None)
    if settings is None and report is None:
        return None
    if settings is not None and not isinstance(settings, dict):
        settings = settings.to_dict()
    scheme = report["scheme"] if report else (settings or {}).get("quant_method")
    return {"scheme": scheme, "settings": settings, "report": report}


def _folder_files(folder: Path) -> dict[str, int]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _hub_files(model: str) -> dict[str, int] | None:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        return None
    return {entry.path: entry.size for entry in HfApi().list_repo_tree(model, recursive=True) if hasattr(entry, "size")}


def _lines(answer: dict[str, Any]) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = [(name, answer[name]) for name in ("checkpoint", "preset") if name in answer]
    lines.append(("family", f"{answer['family']} ({answer['title']}, {answer['representation']})"))
    lines += [("presets" if position == 0 else "", name) for position, name in enumerate(answer.get("presets", []))]
    if "architecture" in answer:
        lines.append(("architecture", f"{answer['architecture']}, a plain model"))
    if "parameters" in answer:
        lines.append(("parameters", f"{answer['parameters']:,}"))
    if "source" in answer:
        lines.append(("source", answer["source"]))
    if "quantization" in answer:
        lines.append(("quantization", answer["quantization"]["scheme"]))
    sections = {name: answer.get(name) or {} for name in ("config", "transplant", "processor", "training_recipe")}
    if "checkpoint" in answer:
        sections["config"] = _without_defaults(sections["config"])
    sections["training_recipe"] = _without_nulls(sections["training_recipe"])
    for section, values in sections.items():
        for position, (name, value) in enumerate(values.items()):
            title = section.replace("_", " ") if position == 0 else ""
            lines.append((title, f"{name} = {json_format.dumps(value, default=str, ensure_ascii=False)}"))
    for position, (name, size) in enumerate((answer.get("files") or {}).items()):
        lines.append(("files" if position == 0 else "", f"{name}, {megabytes(size)}"))
    return lines


def _without_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the fields of every transformers model that say nothing of this one, such as id2label."""
    from transformers import PreTrainedConfig

    defaults = PreTrainedConfig().to_dict()
    return {
        name: _without_defaults(value) if name == "text_config" and isinstance(value, dict) else value
        for name, value in config.items()
        if name not in defaults or value != defaults[name]
    }


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_nulls(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }
