"""One function from a full-precision checkpoint to a quantized one."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rarezoo.auto import FAMILIES, Family, family_of_model_type
from rarezoo.quantization.checkpoint_loading import (
    TOKENIZER_FILES,
    load_config,
    load_model,
    load_processor,
    read_object,
)
from rarezoo.quantization.fidelity import (
    NO_RANKING,
    REPORT_JSON,
    REPORT_MARKDOWN,
    EvaluationSet,
    measure_fidelity,
    render_markdown,
)
from rarezoo.quantization.four_bit_guard import refuse_existing, write_folder_whole, write_model
from rarezoo.quantization.schemes import FOUR_BIT_BLOCK_SIZE, FOUR_BIT_ROW_TILE, SCHEMES, Scheme

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Beside weights, configuration, code and processor, what stays true of a quantized checkpoint.
COMPANIONS = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "training_recipe.json",
    "LICENSE",
    "lora",
)


def quantize(
    source_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    scheme: str = "nf4",
    compute_dtype: str | torch.dtype | None = None,
    evaluation: EvaluationSet | None = None,
    sample_texts: Sequence[str] | None = None,
    fidelity: bool = True,
) -> dict[str, Any]:
    """Write a quantized copy of a checkpoint, and what it changed.

    The output loads with plain `from_pretrained` of the AutoClass (with `trust_remote_code=True` where rarezoo is not
    installed); it carries the model's code, the processor or tokenizer, `quantization_report.json` and
    `quantization_report.md`.
    Embeddings, and the modules that the family's row names (its heads), are not quantized: they are stored in
    `compute_dtype`. Layers whose shape 4-bit kernels cannot take are left alone as well, and named in the report.

    Args:
        source_dir: checkpoint folder of one of the families, not quantized.
        output_dir: folder to write; must not exist, or be empty. It appears whole or not at all.
        scheme: a name in `SCHEMES`.
        compute_dtype: "float32" or "bfloat16": dtype of the computation and of all that is not quantized. None takes
            the checkpoint's own (bfloat16 for the scheme "bf16").
        evaluation: adds nDCG@10 before and after to the report; of retrievers only.
        sample_texts: texts on which outputs are compared; default: the evaluation set's documents, or the
            documentation of Python's built-ins. Language models without a tokenizer are compared on random symbols.
        fidelity: compare with full precision. False saves the time and the memory of loading both models; the report
            then only says what was done.

    Returns:
        The report: scheme, library, compute_dtype, versions, quantized_modules, full_precision_modules, and the
        sections of `measure_fidelity`.

    Raises:
        FileNotFoundError: no checkpoint in `source_dir`.
        FileExistsError: `output_dir` is in use.
        ValueError: unknown scheme, dtype or family, a source that is quantized already or has no head, or nothing to
            quantize.
        ImportError: a package of the extras is missing.
    """
    source, chosen = Path(source_dir), _find_scheme(scheme)
    family, config = _read_source(source)
    _require_packages(chosen, fidelity, evaluation)
    dtype = _find_dtype(compute_dtype, chosen, config)
    if fidelity and evaluation is not None and family.representation == "text":
        raise ValueError(NO_RANKING)
    refuse_existing(Path(output_dir))
    report: dict[str, Any] = {}

    def write(folder: Path) -> None:
        report.update(_write_quantized(source, folder, chosen, dtype, family, config))
        if fidelity:
            folders = {"full_precision": source, "quantized": folder}
            with quiet_casts():
                report.update(measure_fidelity(folders, list(sample_texts or []), evaluation))
        (folder / REPORT_JSON).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / REPORT_MARKDOWN).write_text(render_markdown(report), encoding="utf-8")

    write_folder_whole(output_dir, write)
    return report


def _find_scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise ValueError(f"unknown scheme {name!r}; known schemes: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def _read_source(source: Path) -> tuple[Family, dict[str, Any]]:
    file = source / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{source} is not a checkpoint folder: it has no config.json")
    config = read_object(file)
    family = family_of_model_type(config.get("model_type"))
    if family is None:
        raise ValueError(
            f"{source} holds a model of type {config.get('model_type')!r}; known families: {', '.join(FAMILIES)}. "
            "An official checkpoint must be converted first"
        )
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"{source} is quantized already (by {method}); give the full-precision checkpoint")
    return family, config


def _require_packages(scheme: Scheme, fidelity: bool, evaluation: EvaluationSet | None) -> None:
    """Before anything long begins."""
    needed = (
        {scheme.library: "quant"} if scheme.library == "torch" else {scheme.library: "quant", "accelerate": "quant"}
    )
    if fidelity:
        needed["psutil"] = "quant"
        if evaluation is not None:
            needed["ir_measures"] = "eval"
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"this needs the package {package}: pip install 'rarezoo[{extra}]'")


def _find_dtype(wanted: str | torch.dtype | None, scheme: Scheme, config: dict[str, Any]) -> torch.dtype:
    if wanted is None:
        wanted = "bfloat16" if scheme.name == "bf16" else config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(wanted).removeprefix("torch.")
    if name not in COMPUTE_DTYPES or (scheme.name == "bf16" and name != "bfloat16"):
        allowed = ["bfloat16"] if scheme.name == "bf16" else list(COMPUTE_DTYPES)
        raise ValueError(f"compute_dtype of scheme {scheme.name} must be {' or '.join(allowed)}; found {name}")
    return COMPUTE_DTYPES[name]


def _write_quantized(
    source: Path, folder: Path, scheme: Scheme, dtype: torch.dtype, family: Family, config: dict[str, Any]
) -> dict[str, Any]:
    auto_class = _auto_class_name(family, config)
    kept = [*family.full_precision_modules, *_unsuitable_modules(auto_class, source, scheme)]
    arguments = {} if scheme.configuration is None else {"quantization_config": scheme.configuration(kept, dtype)}
    processor = load_processor(source) if family.processor else None
    model = load_model(source, auto_class, dtype=dtype, **arguments)
    quantized, untouched = _split_linear_layers(model)
    if scheme.configuration is not None and not quantized:
        raise ValueError(
            f"scheme {scheme.name} can quantize none of the {len(untouched)} linear layers of {source}: 4-bit layers "
            f"need in_features divisible by {FOUR_BIT_BLOCK_SIZE} and out_features divisible by {FOUR_BIT_ROW_TILE}"
        )
    write_model(model, folder)
    if processor is not None:
        processor.save_pretrained(folder)
    else:
        _copy_tokenizer(source, folder)
    _copy_companions(source, folder)
    return {
        "scheme": scheme.name,
        "summary": scheme.summary,
        "library": scheme.library,
        "bits_per_weight": scheme.bits_per_weight,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "quantized_modules": len(quantized),
        "full_precision_modules": ["embeddings", *untouched] if quantized else [],
        "versions": _versions(scheme.library),
    }


def _auto_class_name(family: Family, config: dict[str, Any]) -> str:
    """The AutoClass of the head that was saved, so that the copy has the same architecture."""
    architectures = config.get("architectures") or [family.auto_classes["AutoModel"]]
    for name, model in family.auto_classes.items():
        if model in architectures:
            return name
    raise ValueError(
        f"the checkpoint holds {', '.join(architectures)}; expected {' or '.join(family.auto_classes.values())}. "
        "A backbone without its head is not quantized: the head would be made up"
    )


def _unsuitable_modules(auto_class: str, source: Path, scheme: Scheme) -> list[str]:
    """Linear layers that 4-bit CPU kernels refuse, by full name with and without the base model's prefix.

    They are left alone on every machine, so that a checkpoint made anywhere runs everywhere.
    """
    if not scheme.is_four_bit:
        return []
    import transformers

    _, config = load_config(source)
    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(config)
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (
            module.in_features % FOUR_BIT_BLOCK_SIZE or module.out_features % FOUR_BIT_ROW_TILE
        ):
            names.append(name)
    prefix = f"{model.base_model_prefix}."
    return [*names, *(name.removeprefix(prefix) for name in names if name.startswith(prefix))]


def _split_linear_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the quantized linear layers and of the others."""
    quantized: list[str] = []
    untouched: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            plain = type(module) is nn.Linear and type(module.weight.data) is torch.Tensor
            (untouched if plain else quantized).append(name)
    return quantized, untouched


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """File by file: what a library writes again may differ from what it read."""
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy2(file, folder / file.name)


def _copy_companions(source: Path, folder: Path) -> None:
    modules = source / "modules.json"
    names = [module["path"] for module in json.loads(modules.read_text(encoding="utf-8"))] if modules.is_file() else []
    for name in (*COMPANIONS, *filter(None, names)):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).is_file():
            shutil.copy2(source / name, folder / name)


def _versions(library: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in dict.fromkeys(("torch", "transformers", library))}


@contextmanager
def quiet_casts() -> Iterator[None]:
    """bitsandbytes warns at every int8 layer that activations are cast to float16, which is how it works."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
