"""Where the parts of a Mistral-SPLADE checkpoint are: the layouts in which such models are published.

No official weights exist, so the layouts are those of the models it is made from:

- `hf`: a transformers folder of `MistralForCausalLM`, or of a Llama without biases, which computes the same;
- `peft`: a LoRA adapter folder, its base elsewhere;
- `tevatron`: `query_model/` and `passage_model/`, two encoders (as LACONIC and other Tevatron code writes them);
- `naver`: an adapter in `lora/`, or whole weights, beside the files of a sentence-transformers `SparseEncoder`;
- `rarezoo`: our own, one folder or the pair `query/` and `document/`, with an unmerged adapter in `lora/`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, MistralConfig

from rarezoo.conversion.checkpoint_files import CheckpointReader, ConversionError, locate_checkpoint, read_json
from rarezoo.conversion.lora_adapter import CONFIG_FILE as ADAPTER_CONFIG
from rarezoo.conversion.sentence_transformers_files import (
    POOLING_FOLDER,
    SparseEncoderFiles,
    read_sparse_encoder_files,
)
from rarezoo.mistral_splade import MistralSpladeConfig

ADAPTER_FOLDER = "lora"
PAIR = {"query": "query_model", "document": "passage_model"}
RETRIEVAL_FIELDS = tuple(MistralSpladeConfig.__annotations__)
BACKBONE_FIELDS = (*MistralConfig.__annotations__, "rope_theta", "rope_scaling")


@dataclass
class Encoder:
    """One encoder of a source: where its parts are, and what the source says about it.

    Attributes:
        role: "", or "query" / "document" of a pair.
        folder: of the encoder; its tokenizer and small files are looked for here first.
        weights: folder with `config.json` and the (base) weights.
        adapter: folder of a LoRA adapter on top of them.
        backbone: fields of `MistralConfig`.
        settings: retrieval fields of `MistralSpladeConfig`.
        sparse_encoder: what sentence-transformers' files say.
        folders: where the tokenizer and small files may be, in order.
        dropped, notes: for the report.
    """

    role: str
    folder: Path
    weights: Path
    adapter: Path | None = None
    backbone: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    sparse_encoder: SparseEncoderFiles | None = None
    folders: list[Path] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def detect_layout(folder: Path) -> str:
    """Name of the folder's layout. Raises `ConversionError` when it is none of them."""
    if any((folder / name).is_dir() for name in PAIR.values()):
        return "tevatron"
    if all((folder / role / "config.json").exists() for role in PAIR):
        return "rarezoo"
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if config.get("model_type") == MistralSpladeConfig.model_type:
        return "rarezoo"
    if (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).exists() or (folder / POOLING_FOLDER).is_dir():
        return "naver"
    if (folder / ADAPTER_CONFIG).exists():
        return "peft"
    if config:
        return "hf"
    raise ConversionError(
        f"{folder} is none of the known layouts; expected config.json with weights, {ADAPTER_CONFIG}, "
        f"query_model/ and passage_model/, or {ADAPTER_FOLDER}/{ADAPTER_CONFIG}"
    )


def find_encoders(
    folder: Path, layout: str, base: str | os.PathLike | None = None, role: str | None = None
) -> list[Encoder]:
    """The encoders of a source, two of them for a pair.

    Args:
        folder: of the source.
        layout: from `detect_layout`.
        base: overrides the base that an adapter names.
        role: "query" or "document": only that one of a pair.
    """
    if role not in (None, *PAIR):
        raise ConversionError(f"role must be query or document; found {role!r}")
    subfolders = _pair_folders(folder, layout)
    if subfolders is None:
        if role is not None:
            raise ConversionError(f"{folder} holds one encoder for queries and documents; leave role out")
        return [_find_encoder("", folder, layout, base)]
    _check_pooler(folder)
    encoders = []
    for name, subfolder in subfolders.items():
        if role in (None, name):
            encoder = _find_encoder(name, subfolder, detect_layout(subfolder), base)
            encoder.folders.append(folder)
            encoders.append(encoder)
    return encoders


def _pair_folders(folder: Path, layout: str) -> dict[str, Path] | None:
    if layout == "tevatron":
        subfolders = {role: folder / name for role, name in PAIR.items()}
    elif layout == "rarezoo" and not (folder / "config.json").exists():
        subfolders = {role: folder / role for role in PAIR}
    else:
        return None
    missing = [path.name for path in subfolders.values() if not path.is_dir()]
    if missing:
        raise ConversionError(f"{folder} lacks {missing[0]}/, half of the pair; give one encoder's own folder")
    return subfolders


def _find_encoder(role: str, folder: Path, layout: str, base: str | os.PathLike | None) -> Encoder:
    dropped = _check_pooler(folder)
    if layout == "peft":
        adapter, weights = folder, _find_base(folder, base)
    elif layout in ("naver", "rarezoo") and (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).exists():
        adapter = folder / ADAPTER_FOLDER
        weights = folder if base is None and CheckpointReader.has_weights(folder) else _find_base(adapter, base)
    else:
        adapter, weights = None, folder
        if base is not None:
            raise ConversionError(f"base is given, but {folder} holds no adapter that would need one")
    encoder = Encoder(role, folder, weights, adapter, folders=[folder, weights], dropped=dropped)
    config = read_json(weights / "config.json")
    encoder.backbone = _backbone_fields(weights, config)
    encoder.settings = _retrieval_fields(config)
    if layout == "naver":
        _read_sparse_encoder(encoder)
    elif layout == "rarezoo" and (folder / POOLING_FOLDER).is_dir():
        encoder.sparse_encoder = read_sparse_encoder_files(folder)  # our export for its modules: the prompts are there
    return encoder


def _read_sparse_encoder(encoder: Encoder) -> None:
    files = read_sparse_encoder_files(encoder.folder)
    encoder.sparse_encoder = files
    encoder.settings.update(pooling=files.pooling, activation=files.activation)
    root = encoder.folder / "config.json"
    if root.exists() and encoder.folder != encoder.weights:
        encoder.settings.update(_retrieval_fields(read_json(root)))
    if "attention_mode" not in encoder.settings:
        encoder.settings["attention_mode"] = "plain"
        encoder.notes.append(
            "The source does not say how its code masks attention; a causal mask is assumed. "
            "If it was trained without one, give attention_mode 'bidirectional'."
        )
    for file in encoder.folder.glob("*.py"):
        encoder.dropped[file.name] = "the source's own code; rarezoo's takes its place"


def _check_pooler(folder: Path) -> dict[str, str]:
    """Tevatron's pooler is a projection of dense models; only one without tensors can be left out."""
    pooler = folder / "pooler.pt"
    if not pooler.exists():
        return {}
    tensors = torch.load(pooler, map_location="cpu", weights_only=True)
    if tensors:
        raise ConversionError(
            f"{pooler} projects the representation to another space ({', '.join(map(str, tensors))}): this is a dense "
            "retriever. If the model was used without it, move the file away"
        )
    return {"pooler.pt": "a pooler without tensors", "pooler_config.json": "a pooler without tensors"}


def _find_base(adapter: Path, base: str | os.PathLike | None) -> Path:
    """Folder of the adapter's base: the given one, or the one that the adapter names."""
    config = read_json(adapter / ADAPTER_CONFIG)
    name = base if base is not None else config.get("base_model_name_or_path")
    if not name:
        raise ConversionError(f"{adapter / ADAPTER_CONFIG} names no base; give the base checkpoint with base=")
    if base is None:
        # A relative path was written from a working directory that nobody knows: these are the likely ones.
        for parent in (adapter, adapter.parent, Path.cwd()):
            folder = (parent / name).resolve()
            if (folder / "config.json").exists() and CheckpointReader.has_weights(folder):
                return folder
    try:
        folder = locate_checkpoint(name, config.get("revision") if base is None else None)
    except FileNotFoundError as error:
        source = "given" if base is not None else f"named in {adapter / ADAPTER_CONFIG}"
        raise FileNotFoundError(
            f"the base {name!r} {source} is not here ({error}); give the base checkpoint with base="
        ) from error
    if not (folder / "config.json").exists():
        raise ConversionError(f"the base {folder} has no config.json; expected a checkpoint folder with weights")
    return folder


def _backbone_fields(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Mistral's fields of a checkpoint's configuration."""
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise ConversionError(f"{folder} is quantized ({method}); convert the full-precision checkpoint")
    model_type = config.get("model_type")
    if model_type in (MistralConfig.model_type, MistralSpladeConfig.model_type):
        return {name: config[name] for name in BACKBONE_FIELDS if name in config}
    if model_type != LlamaConfig.model_type:
        raise ConversionError(
            f"{folder / 'config.json'} has model_type {model_type!r}; this family holds Mistral backbones (and Llama "
            "ones without biases)"
        )
    llama = LlamaConfig.from_dict(config)
    if llama.attention_bias or llama.mlp_bias:
        raise ConversionError(f"{folder} is a Llama with biases, which Mistral does not have")
    fields = {name: getattr(llama, name) for name in MistralConfig.__annotations__ if hasattr(llama, name)}
    return {**fields, "sliding_window": None}


def _retrieval_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Our fields of a configuration; of a foreign one, whether it says that attention is not causal."""
    if config.get("model_type") == MistralSpladeConfig.model_type:
        return {name: config[name] for name in RETRIEVAL_FIELDS if name in config}
    architectures = config.get("architectures") or []
    # LLM2Vec's class names: MistralBiForMNTP, LlamaBiModel.
    named = any(re.search(r"Bi(For|Model)", name) for name in architectures)
    if named or config.get("is_causal") is False or config.get("bidirectional") is True:
        return {"attention_mode": "bidirectional"}
    return {}
