"""The files beside the weights with which PyLate, and sentence-transformers' `MultiVectorEncoder`, describe a ColBERT.

Both keep the backbone at the root of the folder, the projection in `1_Dense/` and the modules in `modules.json`.
PyLate's `config_sentence_transformers.json` holds lengths, markers and the skip list; sentence-transformers keeps them
with the modules, and the markers as prompts.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarezoo.conversion.checkpoint_files import ConversionError, read_json, write_json

DENSE_FOLDER = "1_Dense"
PYLATE = "pylate"
SENTENCE_TRANSFORMERS = "sentence-transformers"

_ENCODER_FILE = "config_sentence_transformers.json"
_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": DENSE_FOLDER, "type": "pylate.models.Dense.Dense"},
]
_EXPECTED_MODULES = {
    PYLATE: {"Transformer", "Dense"},
    SENTENCE_TRANSFORMERS: {"Transformer", "Dense", "MultiVectorMask", "Normalize"},
}


@dataclass(frozen=True)
class MultiVectorFiles:
    """What the files say.

    Attributes:
        layout: `PYLATE` or `SENTENCE_TRANSFORMERS`.
        dense: folder of the projection.
        dim: components of a vector.
        settings: options of `ColBERTXMProcessor`, without those that `skiplist_options` gives.
        skiplist_words: tokens whose vectors documents do not keep.
    """

    layout: str
    dense: Path
    dim: int
    settings: dict[str, Any]
    skiplist_words: list[str]


def multi_vector_layout(folder: Path) -> str | None:
    """`PYLATE`, `SENTENCE_TRANSFORMERS`, or None where the folder is neither's."""
    if not (folder / "modules.json").exists():
        return None
    encoder = _read_optional(folder / _ENCODER_FILE)
    # Early versions of PyLate did not write its model_type.
    if encoder.get("model_type") == "ColBERT" or ("model_type" not in encoder and "query_prefix" in encoder):
        return PYLATE
    return SENTENCE_TRANSFORMERS if encoder.get("model_type") == "MultiVectorEncoder" else None


def read_multi_vector_files(folder: Path, layout: str) -> MultiVectorFiles:
    """Read the files; raises `ConversionError` for what this family does not compute."""
    modules = _read_modules(folder, layout)
    dense = folder / modules["Dense"]
    encoder = read_json(folder / _ENCODER_FILE)
    transformer = _read_optional(folder / "sentence_bert_config.json")
    if transformer.get("do_lower_case"):
        raise ConversionError(f"{folder / 'sentence_bert_config.json'} has do_lower_case; expected false")
    dim = _read_dense(dense)
    if layout == PYLATE:
        settings, words = _pylate_settings(encoder, folder)
    else:
        settings = _encoder_settings(encoder, transformer, folder)
        words = _mask_words(folder / modules["MultiVectorMask"] / "config.json")
    return MultiVectorFiles(layout, dense, dim, settings, words)


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _read_modules(folder: Path, layout: str) -> dict[str, str]:
    """Class name -> subfolder."""
    file = folder / "modules.json"
    try:
        rows = [(str(row["type"]).rpartition(".")[2], row["path"]) for row in read_json(file, list)]
    except (KeyError, TypeError) as error:
        raise ConversionError(f"{file} must list modules with type and path") from error
    names = [name for name, _ in rows]
    expected = _EXPECTED_MODULES[layout]
    if set(names) != expected or len(names) != len(expected) or names[:2] != ["Transformer", "Dense"] or rows[0][1]:
        raise ConversionError(
            f"{file} lists {', '.join(names)}; expected {', '.join(sorted(expected, reverse=True))}, each once, the "
            "Transformer at the root and the Dense behind it"
        )
    return dict(rows)


def _read_dense(folder: Path) -> int:
    file = folder / "config.json"
    if not file.exists():
        raise ConversionError(
            f"{folder.parent} has no {folder.name}/config.json; the projection of a ColBERT lies there"
        )
    dense = read_json(file)
    activation = str(dense.get("activation_function", "Identity")).rpartition(".")[2]
    if activation != "Identity" or dense.get("bias", True) or dense.get("use_residual"):
        raise ConversionError(
            f"{file}: expected no bias, residual and activation; found bias {dense.get('bias', True)}, "
            f"use_residual {dense.get('use_residual', False)}, activation {activation}"
        )
    if not isinstance(dense.get("out_features"), int):
        raise ConversionError(f"{file} has no out_features; expected the components of a vector")
    return dense["out_features"]


def _pylate_settings(encoder: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Fields that a file lacks have PyLate 1.6's defaults."""
    found = {name: value for name, value in encoder.items() if value is not None}
    prompts = [text for text in (found.get("prompts") or {}).values() if text]
    if prompts or not found.get("do_query_expansion", True):
        raise ConversionError(
            f"{folder / _ENCODER_FILE}: expected empty prompts and do_query_expansion; found prompts {prompts} and "
            f"do_query_expansion {found.get('do_query_expansion', True)}"
        )
    settings = {
        "query_marker": found.get("query_prefix", "[Q] "),
        "document_marker": found.get("document_prefix", "[D] "),
        "max_query_length": found.get("query_length", 32),
        "max_document_length": found.get("document_length", 180),
        "attend_to_mask_tokens": found.get("attend_to_expansion_tokens", False),
        "marker_mode": "insert",
    }
    return settings, found.get("skiplist_words", list(string.punctuation))


def _encoder_settings(encoder: dict[str, Any], transformer: dict[str, Any], folder: Path) -> dict[str, Any]:
    prompts = encoder.get("prompts") or {}
    expansion = transformer.get("query_expansion") or {}
    if expansion.get("strategy") != "fixed" or expansion.get("token") is not None:
        raise ConversionError(
            f"{folder / 'sentence_bert_config.json'}: expected query_expansion with strategy 'fixed' and no token "
            f"of its own; found {expansion or None}"
        )
    limit = transformer.get("document_length") or transformer.get("max_seq_length")
    if limit is None:
        limit = read_json(folder / "tokenizer_config.json").get("model_max_length")
    return {
        # The tokenizer splits at the space that follows a token in a prompt.
        "query_marker": (prompts.get("query") or "").rstrip(),
        "document_marker": (prompts.get("document") or "").rstrip(),
        "max_query_length": expansion.get("length"),
        "max_document_length": limit,
        "attend_to_mask_tokens": expansion.get("attend", False),
        "marker_mode": "insert",
    }


def _mask_words(file: Path) -> list[str]:
    mask = read_json(file)
    if mask.get("skiplist_tasks", ["document"]) != ["document"] or mask.get("keep_only_token_ids"):
        raise ConversionError(f"{file}: expected skiplist_tasks ['document'] and no keep_only_token_ids; found {mask}")
    return mask.get("skiplist_words") or []


def check_markers(settings: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    """Raise `ConversionError` unless both markers are one token: their libraries would add a random one, or none."""
    vocabulary = tokenizer.get_vocab()
    for name in ("query_marker", "document_marker"):
        if settings[name] not in vocabulary:
            raise ConversionError(
                f"{folder}: the {name.replace('_', ' ')} {settings[name]!r} is no token of the vocabulary; expected "
                f"the prefix or prompt to be one token, give it with processor_options {name}"
            )


def skiplist_options(files: MultiVectorFiles, processor: Any) -> dict[str, Any]:
    """Options of the family's processor for the skip list; `processor` is one with `mask_punctuation`."""
    tokenizer = processor.tokenizer
    ids = {tokenizer.convert_tokens_to_ids(word) for word in files.skiplist_words}
    if files.layout == SENTENCE_TRANSFORMERS and tokenizer.unk_token not in files.skiplist_words:
        ids.discard(tokenizer.unk_token_id)  # PyLate keeps it: then unknown tokens are not in the index
    if sorted(ids) == processor.skiplist_ids:
        return {"mask_punctuation": True}
    if not ids:
        return {"mask_punctuation": False}
    return {"mask_punctuation": True, "skiplist_tokens": tokenizer.convert_ids_to_tokens(sorted(ids))}


def write_pylate_files(folder: Path, config: Any, processor: Any) -> None:
    """Write the files with which PyLate 1.6 computes this family's vectors.

    PyLate would add a marker that the vocabulary lacks, and looks up every word of the skip list: it is given the
    tokens that this family's processor uses.
    """
    tokens = processor.tokenizer.convert_ids_to_tokens
    markers = tokens(processor.tokenizer.convert_tokens_to_ids([processor.query_marker, processor.document_marker]))
    dense = {
        "in_features": config.hidden_size,
        "out_features": config.dim,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
        "use_residual": False,
    }
    encoder = {
        "model_type": "ColBERT",
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "MaxSim",
        "query_prefix": markers[0],
        "document_prefix": markers[1],
        "query_length": processor.max_query_length,
        "document_length": processor.max_document_length,
        "attend_to_expansion_tokens": processor.attend_to_mask_tokens,
        "skiplist_words": tokens(processor.skiplist_ids),
        "do_query_expansion": True,
    }
    limit = config.max_position_embeddings - config.pad_token_id - 1
    write_json(folder / "modules.json", _MODULES)
    write_json(folder / DENSE_FOLDER / "config.json", dense)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})
    write_json(folder / _ENCODER_FILE, encoder)
