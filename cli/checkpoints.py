"""Checkpoints as the verbs meet them: found and checked before anything heavy is loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from rarezoo.auto import FAMILIES, Family

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_source(model: str) -> None:
    """Raise `FileNotFoundError` unless `model` is a checkpoint folder or has the form of a Hub repository's name."""
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{model} is a LoRA adapter without its base: merge them with `rarezoo convert FAMILY {model} DESTINATION`"
        )
    if folder.is_dir():
        raise FileNotFoundError(f"{model} is a folder without config.json: expected a checkpoint")
    if folder.exists():
        raise FileNotFoundError(f"{model} is a file: expected a checkpoint folder or a Hub repository OWNER/NAME")
    check_found(model)


def check_found(model: str) -> None:
    """Raise `FileNotFoundError` unless `model` exists on disk or has the form of a Hub repository's name."""
    hub_name = _HUB_NAME.fullmatch(model) and not model.startswith((".", "/", "~"))
    if not hub_name and not Path(model).expanduser().exists():
        raise FileNotFoundError(f"no folder {model}: expected a checkpoint folder or a Hub repository OWNER/NAME")


def check_new_folder(folder: str | Path) -> None:
    """Raise `FileExistsError` unless the folder is empty or does not exist."""
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{folder} already exists and is not an empty folder; give another output folder")


def load_config(model: str) -> tuple[Family, Any]:
    """The family and the configuration of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of a model that is not in the zoo, or damaged.
    """
    check_source(model)
    from rarezoo.quantization import checkpoint_loading

    stored = read_config(model)
    if is_plain_transplant(stored):
        raise ValueError(
            f"{model} is a plain {stored['architectures'][0]} with a transplanted tokenizer: whatever takes models of "
            "transformers takes it; this verb takes models of the zoo"
        )
    return checkpoint_loading.load_config(model)


def read_config(model: str) -> dict[str, Any]:
    """The configuration of a checkpoint of any kind, as it is stored.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    check_source(model)
    from transformers.utils import cached_file

    from rarezoo.quantization import checkpoint_loading

    return checkpoint_loading.read_object(Path(str(cached_file(model, "config.json"))))


def is_plain_transplant(stored: dict[str, Any]) -> bool:
    """Whether a stored configuration is that of a model of transformers' own with a transplanted tokenizer."""
    ours = [family.model_type for family in FAMILIES.values()]
    return bool(stored.get("tokenizer_transplant") and stored.get("architectures")) and stored["model_type"] not in ours


def _check_gives_vectors(model: str, family: Family) -> None:
    if family.representation == "text":
        raise ValueError(f"{model} is of the family {family.name}, whose models give text; this takes one of vectors")


def load_processor(model: str) -> Any:
    """The processor stored in a checkpoint."""
    _check_gives_vectors(model, load_config(model)[0])
    from rarezoo.quantization import checkpoint_loading

    return checkpoint_loading.load_processor(model)


def load_retriever(
    model: str, device: str | None = None, dtype: str | None = None, language: str | None = None
) -> tuple[Any, Any]:
    """Model (in evaluation mode, on the device) and processor of a checkpoint, quantized ones included.

    Args:
        model: folder or Hub repository.
        device: None takes a GPU where there is one, each of several processes its own.
        dtype: "float32", "bfloat16" or "float16"; None what the checkpoint says.
        language: of a family with language adapters, the code of the one to load; None loads all.
    """
    _check_dtype(dtype)
    family, config = load_config(model)
    _check_gives_vectors(model, family)
    import torch

    from rarezoo.quantization import checkpoint_loading

    target = _device(device)
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized and dtype is not None:
        raise ValueError(f"{model} is quantized: its dtype is fixed, leave out --dtype")
    arguments = {"dtype": getattr(torch, dtype)} if dtype else {}
    if language is not None:
        arguments["languages"] = [language]
    if quantized and target.type != "cpu":
        arguments["device_map"] = {"": target}
    processor = checkpoint_loading.load_processor(model)
    network = checkpoint_loading.load_model(model, **arguments)
    if not quantized:
        network = network.to(target)
    return network, processor


def check_precision(precision: str | None, family: Family | None = None) -> None:
    """Raise `ValueError` unless an index can have the precision: of any vectors, or of a family's."""
    if precision is None:
        return
    from rarezoo.retrieval.vector_encoder import PRECISIONS

    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}; found {precision!r}")
    if family is not None and family.representation == "sparse":
        raise ValueError("precision: an index of sparse vectors is exact, in float32; leave it out")


def language_of(name: str | None, model: Any) -> Any:
    """What `--language` means to a loaded model: its value, or for "detect" a function from text to language."""
    if name != "detect" or not hasattr(model.config, "languages"):
        return name
    from rarezoo.retrieval import LanguageDetector

    return LanguageDetector(model.config)


def _check_dtype(dtype: str | None) -> None:
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16; found {dtype!r}")


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        # `accelerate launch` and torchrun number the processes of a machine: one GPU each.
        rank = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:NUMBER; found {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch finds no GPU on this machine")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    return device
