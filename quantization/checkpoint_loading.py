"""Checkpoints loaded whole: weights that the configuration does not describe, or that are missing, are an error.

transformers itself only warns of both and goes on with random weights and default templates.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rarezoo.auto import FAMILIES, Family, family_of, family_of_model_type

_LISTED_NAMES = 6
# The files of a tokenizer, whichever library made it.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "tokenization_*.py",
)
_PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file holds something else; the message names it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); download or write it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object; found {type(content).__name__}")
    return content


def load_config(source: str | os.PathLike[str]) -> tuple[Family, Any]:
    """The family and the configuration of a checkpoint folder or Hub repository, also of one in an official layout that
    the family reads.

    Raises:
        OSError: it has no config.json.
        ValueError: a model that is not in the zoo, or a value that its configuration does not allow.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import cached_file

    file = Path(str(cached_file(str(source), "config.json")))
    model_type = read_object(file).get("model_type")
    known = family_of_model_type(model_type)
    name = known.name if known is not None else family_of(str(source))
    if name is None:
        types = ", ".join(sorted(family.model_type for family in FAMILIES.values()))
        raise ValueError(
            f"{source} has model_type {model_type!r}; expected one of {types}. "
            "Other layouts are read by `rarezoo convert FAMILY SOURCE DESTINATION`"
        )
    try:
        return FAMILIES[name], FAMILIES[name].config_class().from_pretrained(source)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file}: {error}") from error


def load_model(source: str | os.PathLike[str], auto_class: str = "AutoModel", **arguments: Any) -> Any:
    """`from_pretrained` of the class that an AutoClass gives, in evaluation mode. An AutoClass itself does not know
    official layouts.

    Args:
        source: checkpoint folder or Hub repository.
        auto_class: name of an AutoClass of transformers.
        arguments: of `from_pretrained`.

    Raises:
        ValueError: weights are missing, not expected or of another shape, or a weight file is damaged.
    """
    from safetensors import SafetensorError

    family, config = load_config(source)
    model_class = family.model_class(auto_class)
    mismatched: list[tuple[str, Any, Any]] = []
    try:
        if "quantization_config" in arguments:
            mismatched = _mismatched_shapes(Path(source), model_class, config)
        with _quiet_report():
            model, found = model_class.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
            )
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{_damaged_file(Path(source)) or source}: damaged weights ({error}); download or write them again"
        ) from error
    # Layers that are quantized while they are loaded are not compared by transformers.
    found["mismatched_keys"] = {*found["mismatched_keys"], *mismatched}
    problems = [
        f"{title}: {_listed(found[kind])}"
        for kind, title in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "not expected"),
            ("mismatched_keys", "of another shape"),
        )
        if found[kind]
    ]
    if problems:
        raise ValueError(
            f"the weights of {source} are not those that its config.json describes. {'; '.join(problems)}. Check that "
            "both belong together; a backbone without its head must be trained first"
        )
    return model.eval()


def load_processor(source: str | os.PathLike[str]) -> Any:
    """The processor that is stored in a checkpoint, or that its official files describe.

    Raises:
        FileNotFoundError: its processor_config.json is missing, which holds the templates.
        ValueError: one of its files is damaged.
    """
    from transformers.utils import cached_file

    family, _ = load_config(source)
    processor_class: Any = family.processor_class()
    ours = read_object(Path(str(cached_file(str(source), "config.json")))).get("model_type") == family.name
    for name in _PROCESSOR_FILES:
        file = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
        if file is None and ours and name == "processor_config.json":
            raise FileNotFoundError(
                f"{source} has no {name}, which holds the templates that the model was trained with; save the "
                "processor into it with save_pretrained"
            )
        if file is not None and name == "tokenizer.json" and "model" not in read_object(Path(file)):
            raise ValueError(f"{file} describes no tokenizer: it has no 'model'; download or write it again")
        if file is not None:
            read_object(Path(file))
    try:
        return processor_class.from_pretrained(source)
    except (OSError, ImportError):
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ValueError(
            f"{source}: {', '.join(_PROCESSOR_FILES)} make no processor ({type(error).__name__}: {error})"
        ) from error


def load_tokenizer(folder: str | os.PathLike[str]) -> Any | None:
    """The tokenizer of a checkpoint folder; None where it has none.

    Raises:
        ValueError: its files make no tokenizer.
    """
    from transformers import AutoTokenizer

    if not any(file for pattern in TOKENIZER_FILES for file in Path(folder).glob(pattern)):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ImportError):
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ValueError(
            f"{folder}: the tokenizer's files make no tokenizer ({type(error).__name__}: {error})"
        ) from error


def _damaged_file(folder: Path) -> Path | None:
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return file
    return None


def _mismatched_shapes(folder: Path, model_class: Any, config: Any) -> list[tuple[str, Any, Any]]:
    """(name, stored shape, expected shape) of the weights in a folder's safetensors files that differ."""
    import torch
    from safetensors import safe_open

    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
    wrong = []
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                shape = tuple(tensors.get_slice(name).get_shape())
                if expected.get(name, shape) != shape:
                    wrong.append((name, shape, expected[name]))
    return wrong


def _listed(keys: Any) -> str:
    names = sorted(
        key if isinstance(key, str) else f"{key[0]} {list(key[1])} instead of {list(key[2])}" for key in keys
    )
    more = len(names) - _LISTED_NAMES
    return ", ".join(names[:_LISTED_NAMES]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _quiet_report() -> Iterator[None]:
    """transformers' report on the weights is a table of warnings; here it becomes one error."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
