"""A model card from what a checkpoint folder says of itself.

Nothing in a card is invented: sizes come from the weight files' headers, fields from `config.json` and
`processor_config.json`, the recipe from `training_recipe.json`, figures from `evaluation.json` and
`quantization_report.json`. What a folder does not have leaves no section behind.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarezoo.auto import FAMILIES, Family, family_of_model_type
from rarezoo.configs import list_presets, read_preset

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

# Metadata that a card states itself; all other fields of an existing README.md are its author's and stay.
OWN_FIELDS = ("library_name", "pipeline_tag", "model_name", "eval_results", "model-index")
WEIGHT_FILES = ("model*.safetensors", "transplant_matrix.safetensors")
# The last line of every card that was written here: a text that differs from it, or lacks it, is its author's.
DIGEST_LINE = "<!-- rarezoo card {digest}: `rarezoo card` writes this text anew as long as nobody edits it -->"
# (task type, name) of the Hub's model index, by what a family produces.
TASKS = {
    "sparse": ("sparse-information-retrieval", "Sparse Information Retrieval"),
    "multi-vector": ("information-retrieval", "Information Retrieval"),
    "text": ("text-generation", "Text Generation"),
}
TAGS = {
    "sparse": ("sparse-encoder", "sparse", "splade", "retrieval"),
    "multi-vector": ("multi-vector", "late-interaction", "ColBERT", "retrieval"),
    "text": ("language-model",),
}
FAMILY_TAGS = {"lexinvariant": ("in-context-learning",), "tokenizer_transplant": ("tokenizer-transplantation",)}
PIPELINES = {"sparse": "feature-extraction", "multi-vector": "sentence-similarity", "text": "text-generation"}


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
        folder: checkpoint of one of the families, or a plain model whose `config.json` tells of a transplanted
            tokenizer. `evaluation.json`, when present, is one object or a list of
            objects {"dataset": str, "split": str, "metrics": {name: number}}, with "language", "precision" of the
            index and "dtype" of the model where they shaped the figures.
        repo_id: what the usage examples load; the folder's name when None.
        license, base_model, language: metadata that no file states; None keeps what the folder's README.md says. Of a
            checkpoint whose configuration lists its languages, `language` is these where the README.md says none.

    The card ends with a comment that holds a digest of its text, by which `is_authored` knows it again.

    Raises:
        FileNotFoundError: `folder` is not a checkpoint.
        ValueError: unknown family, or a malformed evaluation file.
    """
    from huggingface_hub import ModelCard

    folder = Path(folder)
    family, config = _read_config(folder)
    evaluations = read_evaluations(folder)
    given = _given(license=license, base_model=base_model, language=language)
    authored = {**named_base(config), **_authored_metadata(folder), **given}
    name = repo_id or folder.resolve().name
    data = _metadata(name, family, config, evaluations, authored, quantized="quantization_config" in config)
    template = (resources.files("rarezoo.model_cards") / f"{family.name}.md").read_text(encoding="utf-8")
    processor = read_json(folder / "processor_config.json", dict) or {}
    recipe = read_json(folder / "training_recipe.json", dict) or {}
    card = ModelCard.from_template(
        data,
        template_str=template,
        name=name.split("/")[-1],
        repo_id=name,
        family=family,
        config=config,
        is_plain=is_plain(family, config),
        auto_class=_auto_class(family, config),
        transplantation=_transplantation(config),
        processor=processor,
        reads_prompt=any("%%prompt%%" in (processor.get(f"{kind}_template") or "") for kind in ("query", "document")),
        libraries=_libraries(family, config),
        architecture=_architecture(family, config),
        size=_size(folder, family, config),
        recipe={_cell(name): _code(value) for name, value in _flatten(_effective(recipe)).items()},
        evaluations=[
            {**_cells({**entry, "dataset": _measured(entry)}), "metrics": _cells(entry["metrics"])}
            for entry in evaluations
        ],
        quantization=read_json(folder / "quantization_report.json", dict),
        sentence_transformers=(folder / "modules.json").is_file(),
        authored=authored,
    )
    card.text = f"{card.text.rstrip()}\n\n{DIGEST_LINE.format(digest=_digest(card.text))}\n"
    return card


def write_card(
    folder: str | os.PathLike[str], repo_id: str | None = None, *, replace: bool = False, **metadata: str | None
) -> Path:
    """`build_card` into the folder's README.md. Same arguments and errors, and

    Args:
        replace: write over a README.md that was written or edited by hand. Its metadata stay in any case.

    Raises:
        FileExistsError: without `replace`, the README.md is its author's, see `is_authored`.
    """
    readme = Path(folder) / "README.md"
    if not replace and is_authored(readme):
        raise FileExistsError(
            f"{readme} was written or edited by hand; --replace (in Python: replace=True) writes over its text, --show "
            "prints the card instead"
        )
    return write_whole(readme, str(build_card(folder, repo_id, **metadata)))


def is_authored(readme: Path) -> bool:
    """Whether a README.md has a text below its metadata that is not, to the letter, one of `build_card`'s."""
    card = _read_readme(readme)
    text = "" if card is None else card.text.strip()
    match = re.search(r"\n<!-- rarezoo card ([0-9a-f]+):[^\n]*-->$", text)
    return bool(text) and (match is None or _digest(text[: match.start()]) != match[1])


def _digest(text: str) -> str:
    """Of the text without the white space around it and at the ends of lines, which editors and git change."""
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


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
    family = family_of_model_type(config.get("model_type"))
    if family is None and isinstance(config.get("tokenizer_transplant"), dict):
        family = FAMILIES["tokenizer_transplant"]
    if family is None:
        raise ValueError(
            f"{folder} holds a model of type {config.get('model_type')!r}; known families: {', '.join(FAMILIES)}. "
            "An official checkpoint must be converted first, by `rarezoo convert`"
        )
    return family, config


def is_plain(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is a model of transformers' own that only tells what was done to it: it needs no code."""
    return config.get("model_type") != family.model_type


def named_base(config: Mapping[str, Any]) -> dict[str, str]:
    """`base_model` of a checkpoint that names its base on the Hub; nothing where there is none, or it is a folder."""
    base = config.get("base_model_name_or_path")
    on_hub = isinstance(base, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base) and not Path(base).is_dir()
    return {"base_model": base} if isinstance(base, str) and on_hub else {}


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


def _read_readme(readme: Path) -> ModelCard | None:
    """A README.md as a card; None where there is none."""
    import yaml
    from huggingface_hub import ModelCard

    if not readme.is_file():
        return None
    try:
        return ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{readme} is not text in UTF-8 ({error}); mend or remove it") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{readme}: its metadata is not valid YAML ({error}); mend or remove it") from error


def _authored_metadata(folder: Path) -> dict[str, Any]:
    card = _read_readme(folder / "README.md")
    known = {} if card is None else card.data.to_dict()
    return {str(name): value for name, value in known.items() if name not in OWN_FIELDS and value != ""}


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
    known = {**_languages(config), **authored}
    tags = known.get("tags", [])
    own_tags = ("rarezoo", family.name, *TAGS[family.representation], *FAMILY_TAGS.get(family.name, ()))
    if not is_plain(family, config):
        own_tags = ("custom_code", *own_tags)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES[family.representation] if not _is_masked(family, config) else "fill-mask",
        model_name=name.split("/")[-1],
        eval_results=_evaluation_results(family, config, evaluations) or None,
        **{**known, **relation, "tags": [*own_tags, *([tags] if isinstance(tags, str) else tags)]},
    )


def _languages(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ISO codes of the adapters' languages, as the Hub's `language`; nothing for families without adapters."""
    languages = config.get("languages")
    if not isinstance(languages, list):
        return {}
    codes = list(dict.fromkeys(str(code).partition("_")[0] for code in languages))
    return {"language": codes if len(codes) > 1 else codes[0]} if codes else {}


def _evaluation_results(
    family: Family, config: Mapping[str, Any], evaluations: list[dict[str, Any]]
) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    task_type, task_name = TASKS[family.representation]
    if _is_masked(family, config):
        task_type, task_name = "fill-mask", "Fill Mask"
    return [
        EvalResult(
            task_type=task_type,
            task_name=task_name,
            dataset_type=re.sub(r"[^\w.-]+", "-", entry["dataset"]).strip("-").lower(),
            dataset_name=_measured(entry),
            dataset_config=_conditions(entry) or None,  # by which results of one collection are told apart
            dataset_split=entry.get("split"),
            metric_type=metric.lower(),
            metric_name=metric,
            metric_value=value,
        )
        for entry in evaluations
        for metric, value in entry["metrics"].items()
    ]


def _conditions(entry: Mapping[str, Any]) -> str:
    """Under which a result was measured, in words: "fr_XX, 2-bit index"."""
    forms = {"language": "{}", "precision": "{} index", "dtype": "{} model"}
    return ", ".join(form.format(entry[name]) for name, form in forms.items() if entry.get(name) is not None)


def _measured(entry: Mapping[str, Any]) -> str:
    """The collection, and under which conditions."""
    conditions = _conditions(entry)
    return f"{entry['dataset']} ({conditions})" if conditions else entry["dataset"]


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


def _model_class(family: Family, config: Mapping[str, Any]) -> Any:
    """The class whose parameters are the checkpoint's: the family's, or of a transplanted model the one that it names;
    None where transformers does not have it."""
    names = config.get("architectures")
    if family.name != "tokenizer_transplant" or not names:
        return family.model_class()
    if not is_plain(family, config):
        return getattr(family.module("modeling"), names[0])
    import transformers

    return getattr(transformers, names[0], None)


def _is_masked(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether a transplanted model is a masked language model."""
    return family.name == "tokenizer_transplant" and (config.get("architectures") or [""])[0].endswith("ForMaskedLM")


def _auto_class(family: Family, config: Mapping[str, Any]) -> str:
    """Name of the AutoClass that opens a transplanted model with its head; of other families it stands in the
    template."""
    from transformers.models.auto import modeling_auto

    name = (config.get("architectures") or [""])[0]
    own = [auto_class for auto_class, ours in family.auto_classes.items() if ours == name]
    for auto_class, table in (
        ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModelForImageTextToText", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        if name in table.values():
            own.append(auto_class)
    return own[0] if own else "AutoModel"


def _transplantation(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the configuration tells of a transplanted tokenizer, as cells of a table; None where it tells nothing."""
    told = config.get("tokenizer_transplant")
    if not isinstance(told, Mapping):
        return None
    base = named_base(config).get("base_model") or Path(str(config.get("base_model_name_or_path") or "")).name
    names = ("method", "options", "fallback", "compatibility", "match", "special_map", "auxiliary", "rescale", "seed")
    settings = {name: told.get(name) for name in names if told.get(name) not in ({}, "none")}
    return {
        "base": _cell(base),
        "rows": told.get("rows"),
        "tokens": told.get("tokens"),
        "base_rows": told.get("base_rows"),
        "counts": told.get("counts") or {},
        "settings": {_cell(name): _code(value) for name, value in _flatten(settings).items()},
    }


def _size(folder: Path, family: Family, config_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the architecture (counted on the meta device), bytes and tensor types of the weight files."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    model_class = _model_class(family, config_fields)
    plain = is_plain(family, config_fields)
    try:
        config = (AutoConfig if plain else family.config_class()).from_pretrained(folder)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    parameters = None
    if model_class is not None:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    files = sorted(file for name in WEIGHT_FILES for file in folder.glob(name))
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


def _libraries(family: Family, config: Mapping[str, Any]) -> str:
    """What a reader has to install, as the words of a sentence."""
    names = ["torch", "transformers"]
    if family.representation == "sparse":
        names.append("scipy")
    library = config.get("quantization_config", {}).get("quant_method")
    if library:
        names += [library, "accelerate"]
    quoted = [f"`{name}`" for name in names]
    return f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _effective(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the settings that had no effect on the checkpoint."""
    idle: set[str] = set()
    if not recipe.get("lora") and not recipe.get("quantization"):
        idle |= {name for name in recipe if name.startswith("lora_")}
    if recipe.get("max_steps"):
        idle.add("epochs")
    if recipe.get("model"):
        idle |= {"family", "tokenizer", "vocabulary_size", "initialization"}
    kept = {name: value for name, value in recipe.items() if name not in idle}
    if isinstance(recipe.get("objective"), Mapping):
        kept["objective"] = _effective_objective(recipe["objective"])
    return kept


def _effective_objective(objective: Mapping[str, Any]) -> dict[str, Any]:
    """Losses and regularisers with a weight of 0 stay, what shapes them goes."""
    # A setting, and the weights of what it shapes.
    shapes = {
        "score_scale": ("info_nce_weight",),
        "temperature": ("kl_weight",),
        "query_regularizer": ("query_regularizer_weight",),
        "document_regularizer": ("document_regularizer_weight",),
        **dict.fromkeys(
            ("flops_threshold", "regularizer_warmup_steps", "schedule"),
            ("query_regularizer_weight", "document_regularizer_weight"),
        ),
    }
    idle = {
        name
        for name, weights in shapes.items()
        if all(weight in objective and not objective[weight] for weight in weights)
    }
    return {name: value for name, value in objective.items() if name not in idle}


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


def _code(value: Any) -> str:
    """A value as code in a table of Markdown, which shows tags, asterisks and backticks as they are."""
    text = _cell(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _cell(value: Any) -> str:
    return "" if value is None else "\\n".join(str(value).splitlines()).replace("|", "\\|")
