"""A model card from what a checkpoint folder says of itself.

Nothing in a card is invented: sizes come from the weight files' headers, fields from `config.json` and
`processor_config.json`, the recipe from `training_recipe.json`, figures from `evaluation.json` and
`quantization_report.json`. What a folder does not have leaves no section behind.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarezoo.auto import FAMILIES, Family
from rarezoo.configs import list_presets, read_preset

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

# Metadata of an existing README.md that only its author can know.
AUTHORED_FIELDS = ("license", "license_name", "license_link", "base_model", "language", "datasets")
# (task type, name) of the Hub's model index, by what a family produces.
TASKS = {
    "sparse": ("sparse-information-retrieval", "Sparse Information Retrieval"),
    "multi-vector": ("information-retrieval", "Information Retrieval"),
}
TAGS = {
    "sparse": ("sparse-encoder", "sparse", "splade", "retrieval"),
    "multi-vector": ("multi-vector", "late-interaction", "ColBERT", "retrieval"),
}
PIPELINES = {"sparse": "feature-extraction", "multi-vector": "sentence-similarity"}


def build_card(
    folder: str | os.PathLike[str],
    repo_id: str | None = None,
    *,
    license: str | None = None,
    base_model: str | None = None,
    language: str | None = None,
) -> ModelCard:
    """The card of a checkpoint folder, as huggingface_hub's `ModelCard`.

    Args:
        folder: checkpoint of one of the families. `evaluation.json`, when present, is one object or a list of
            objects {"dataset": str, "split": str, "metrics": {name: number}}.
        repo_id: what the usage examples load; the folder's name when None.
        license, base_model, language: metadata that no file states; None keeps what the folder's README.md says.

    Raises:
        FileNotFoundError: `folder` is not a checkpoint.
        ValueError: unknown family, or a malformed evaluation file.
    """
    from huggingface_hub import ModelCard

    folder = Path(folder)
    family, config = _read_config(folder)
    evaluations = read_evaluations(folder)
    authored = {**_authored_metadata(folder), **_given(license=license, base_model=base_model, language=language)}
    name = repo_id or folder.resolve().name
    data = _metadata(name, family, config, evaluations, authored, quantized="quantization_config" in config)
    template = (resources.files("rarezoo.model_cards") / f"{family.name}.md").read_text(encoding="utf-8")
    return ModelCard.from_template(
        data,
        template_str=template,
        name=name.split("/")[-1],
        repo_id=name,
        family=family,
        config=config,
        processor=read_json(folder / "processor_config.json", dict) or {},
        architecture=_architecture(family, config),
        size=_size(folder, family),
        recipe=_cells(_flatten(read_json(folder / "training_recipe.json", dict) or {})),
        evaluations=[{**_cells(entry), "metrics": _cells(entry["metrics"])} for entry in evaluations],
        quantization=read_json(folder / "quantization_report.json", dict),
        sentence_transformers=(folder / "modules.json").is_file(),
        authored=authored,
    )


def write_card(folder: str | os.PathLike[str], repo_id: str | None = None, **metadata: str | None) -> Path:
    """`build_card` into the folder's README.md, replacing it whole. Same arguments and errors."""
    card = build_card(folder, repo_id, **metadata)
    return write_whole(Path(folder) / "README.md", str(card))


def write_whole(file: Path, text: str) -> Path:
    """Write a text file beside its name and rename it; on failure nothing is left, and a file of that name stays.

    Raises:
        OSError: the folder cannot be written or the disk is full; the message names the file.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise OSError(f"cannot write {file} ({error.strerror}); free some space or check its permissions") from error
    finally:
        partial.unlink(missing_ok=True)
    return file


def _given(**values: str | None) -> dict[str, str]:
    return {name: value for name, value in values.items() if value is not None}


def read_json(file: Path, kind: type | None = None) -> Any:
    """The content of a JSON file, None where there is none; a `ValueError` names a damaged file, or another kind than
    `dict` or `list`."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); write it again") from error
    if kind is not None and not isinstance(content, kind):
        expected = "an object" if kind is dict else "a list"
        raise ValueError(f"{file} must hold {expected}; found {type(content).__name__}")
    return content


def _read_config(folder: Path) -> tuple[Family, dict[str, Any]]:
    config = read_json(folder / "config.json", dict)
    if config is None:
        raise FileNotFoundError(f"{folder} is not a checkpoint folder: it has no config.json")
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise ValueError(
            f"{folder} holds a model of type {config.get('model_type')!r}; known families: {', '.join(FAMILIES)}"
        )
    return family, config


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The results in a checkpoint's evaluation.json; a `ValueError` names the file when it is malformed."""
    content = read_json(folder / "evaluation.json")
    if content is None:
        return []
    evaluations = content if isinstance(content, list) else [content]
    for entry in evaluations:
        metrics = entry.get("metrics") if isinstance(entry, dict) else None
        numbers = isinstance(metrics, dict) and all(map(_is_number, metrics.values()))
        if not metrics or not numbers or not isinstance(entry.get("dataset"), str):
            raise ValueError(
                f"{folder / 'evaluation.json'}: expected {{'dataset': name, 'split': name, "
                f"'metrics': {{name: finite number}}}} or a list of such objects; found {json.dumps(entry)[:200]}"
            )
    return evaluations


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _authored_metadata(folder: Path) -> dict[str, Any]:
    import yaml
    from huggingface_hub import ModelCard

    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    try:
        known = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{readme}: its metadata is not valid YAML ({error}); mend or remove it") from error
    return {name: known[name] for name in AUTHORED_FIELDS if known.get(name)}


def _metadata(
    name: str,
    family: Family,
    config: Mapping[str, Any],
    evaluations: list[dict[str, Any]],
    authored: Mapping[str, Any],
    quantized: bool,
) -> ModelCardData:
    from huggingface_hub import ModelCardData

    relation: dict[str, Any] = {}
    if quantized and "base_model" in authored:
        relation["base_model_relation"] = "quantized"
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES[family.representation],
        tags=["custom_code", "rarezoo", family.name, *TAGS[family.representation]],
        model_name=name.split("/")[-1],
        eval_results=_evaluation_results(family, evaluations) or None,
        **authored,
        **relation,
    )


def _evaluation_results(family: Family, evaluations: list[dict[str, Any]]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    task_type, task_name = TASKS[family.representation]
    return [
        EvalResult(
            task_type=task_type,
            task_name=task_name,
            dataset_type=re.sub(r"[^\w.-]+", "-", entry["dataset"]).strip("-").lower(),
            dataset_name=entry["dataset"],
            dataset_split=entry.get("split"),
            metric_type=metric.lower(),
            metric_name=metric,
            metric_value=value,
        )
        for entry in evaluations
        for metric, value in entry["metrics"].items()
    ]


def _architecture(family: Family, config: Mapping[str, Any]) -> str | None:
    """Name of the preset whose shape the checkpoint has."""
    for name in list_presets(family.name):
        shape = {
            key: value
            for key, value in read_preset(family.name, name)["config"].items()
            if key in ("vocab_size", "intermediate_size") or key.startswith(("hidden_size", "num_", "head_dim"))
        }
        if all(config.get(key) == value for key, value in shape.items()):
            return name
    return None


def _size(folder: Path, family: Family) -> dict[str, Any]:
    """Parameters of the architecture (counted on the meta device), bytes and tensor types of the weight files."""
    import torch
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = family.config_class().from_pretrained(folder)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in family.model_class()(config).parameters())
    files = sorted(folder.glob("model*.safetensors"))
    stored: Counter[str] = Counter()
    for file in files:
        stored.update(_stored_elements(file))
    return {
        "parameters": parameters,
        "bytes": sum(file.stat().st_size for file in files),
        "tensor_types": [name for name, _ in stored.most_common()],
    }


def _stored_elements(file: Path) -> Counter[str]:
    """Tensor type -> number of elements of one weight file."""
    from safetensors import SafetensorError, safe_open

    stored: Counter[str] = Counter()
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                view = tensors.get_slice(key)
                stored[view.get_dtype()] += math.prod(view.get_shape())
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged weights ({error}); write the checkpoint again") from error
    return stored


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one table, without unset ones; absolute paths by their last name only."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        elif isinstance(value, str) and os.path.isabs(value):
            flat[f"{prefix}{name}"] = Path(value).name
        elif value is not None and value != [] and value != "":
            flat[f"{prefix}{name}"] = value
    return flat


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values that fit into a table of Markdown: without bare bars and line breaks; numbers as they are."""
    return {_cell(name): value if _is_number(value) else _cell(value) for name, value in row.items()}


def _cell(value: Any) -> str:
    return "" if value is None else "\\n".join(str(value).splitlines()).replace("|", "\\|")
