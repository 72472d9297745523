"""A checkpoint folder with another vocabulary, written tensor by tensor: the model is never built.

Only the files that hold tables, heads or biases of the vocabulary are rewritten; all others are copied byte by byte.
The result stands beside its place until it is whole, and is then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from .table_surgery import (
    TokenIds,
    VocabularyTensor,
    new_vocabulary_tensor,
    shifted_positions,
    skeleton,
    updated_config,
    updated_generation_config,
    vocabulary_tensors,
)
from .transplant_matrix import TransplantMatrix
from .transplant_report import REPORT_NAME, TransplantReport
from .transplanting import base_tokenizer_of, donor_tables_of, finish_tokenizer, new_tokenizer_of, plan_transplant

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_WEIGHTS = (
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx"),
    *("original/*", "onnx/*", "openvino/*", "consolidated*"),
)
# What belongs to the old vocabulary, describes the old model, or holds its weights in another form.
_LEFT_BEHIND = (
    *("README.md", "config.json", "generation_config.json", "transplant_report.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("tekken.json", "chat_template*", "additional_chat_templates", "*.safetensors", "*.safetensors.index.json"),
    *(pattern.removesuffix("/*") for pattern in _OTHER_WEIGHTS),
    *("checkpoint-*", "runs", ".*"),
)
# Causal language models whose tensors of the vocabulary are an input table and a head of these names, and which count
# no positions from the padding id. The import of a model's code takes longer than the rewriting of its tables; of these
# it is not needed.
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
PLAIN_DECODERS = frozenset(
    f"{name}ForCausalLM"
    for name in (
        *("Apertus", "Cohere", "Cohere2", "Gemma", "Gemma2", "Gemma3", "Glm4", "GptOss", "Granite", "Llama", "Mistral"),
        *("Mixtral", "Olmo", "Olmo2", "Olmo3", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe", "SmolLM3", "StableLm"),
    )
)


@dataclass(frozen=True)
class StoredCheckpoint:
    """A folder with `config.json` and safetensors weights.

    folder: the folder.
    config: its configuration.
    files: stored name -> file name.
    vocabulary: stored name -> what it is; of a tied head that is stored too, with `tied_to`.
    names: name in the model's state dict -> stored name, for the tensors of the vocabulary.
    trust_remote_code: whether the class may come from the folder.
    plain_decoder: whether it is one of `PLAIN_DECODERS`, whose class is not looked at.
    """

    folder: Path
    config: Any
    files: dict[str, str]
    vocabulary: dict[str, VocabularyTensor]
    names: dict[str, str]
    trust_remote_code: bool = False
    plain_decoder: bool = False

    @classmethod
    def open(cls, folder: str | os.PathLike, *, trust_remote_code: bool = False) -> StoredCheckpoint:
        """Raises FileNotFoundError where there are no safetensors weights, ValueError where they are damaged,
        quantized, or not those of the configuration's class."""
        folder = Path(folder)
        files = _files_of(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        plain = _plain_vocabulary(config, _shapes(folder, files))
        if plain is not None:
            names = {name: name for name in plain}
            checkpoint = cls(folder, config, files, plain, names, trust_remote_code, plain_decoder=True)
            checkpoint._check_tensors()
            return checkpoint
        model_class = _model_class(config, folder, trust_remote_code)
        tensors = vocabulary_tensors(model_class, config)
        found = {name: _stored_name(name, files, model_class.base_model_prefix) for name in tensors}
        names = {name: stored for name, stored in found.items() if stored is not None}
        there = {tensors[name].tied_to or name for name in names}
        missing = [name for name, tensor in tensors.items() if (tensor.tied_to or name) not in there]
        if missing:
            raise ValueError(
                f"{folder} holds no {missing[0]}, which {model_class.__name__} needs: correct `architectures`"
            )
        vocabulary = {names[name]: tensors[name] for name in names}
        checkpoint = cls(folder, config, files, vocabulary, names, trust_remote_code)
        checkpoint._check_tensors()
        checkpoint._check_others()
        return checkpoint

    @cached_property
    def model_class(self) -> type[Any]:
        """The class that `architectures` names."""
        return _model_class(self.config, self.folder, self.trust_remote_code)

    def read(self, name: str) -> Tensor:
        """A stored tensor, memory-mapped."""
        with _opened(self.folder / self.files[name]) as file:
            return file.get_tensor(name)

    def tables(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The input table, the head (None where there is none or it is tied) and the head's bias or None, as
        `table_surgery.base_tables` gives them of a model."""
        inputs = [name for name, tensor in self.vocabulary.items() if tensor.role == "input" and tensor.dim == 0]
        heads = [name for name, tensor in self.vocabulary.items() if tensor.role == "head"]
        biases = [name for name, tensor in self.vocabulary.items() if tensor.role == "bias"]
        table = self.read((inputs or heads)[0])
        head = self.read(heads[0]) if heads and not self.takes_input_rows(heads[0]) else None
        return table, head, self.read(biases[0]).flatten() if biases else None

    def takes_input_rows(self, name: str) -> bool:
        """Whether a tensor is the input table, or tied to it. Ties that the configuration claims, but whose two stored
        tensors differ, are none (transformers does not tie them either)."""
        tensor = self.vocabulary[name]
        if tensor.role != "head" or tensor.tied_to is None:
            return tensor.role == "input"
        table = self.names.get(tensor.tied_to)
        return table is None or torch.equal(self.read(name), self.read(table))

    def new_tensor(self, name: str, matrix: TransplantMatrix) -> Tensor:
        """The tensor for the new vocabulary."""
        tensor = self.vocabulary[name]
        return new_vocabulary_tensor(self.read(name), tensor, matrix, as_input=self.takes_input_rows(name))

    def _check_tensors(self) -> None:
        rows = self.config.get_text_config().vocab_size
        for name, tensor in self.vocabulary.items():
            found = self.read(name)
            if not found.is_floating_point():
                raise ValueError(
                    f"{name} in {self.folder} is quantized ({found.dtype}): dequantize the checkpoint first"
                )
            if found.shape[tensor.dim] != rows:
                raise ValueError(
                    f"{name} in {self.folder} has {found.shape[tensor.dim]} rows; its vocab_size is {rows}"
                )

    def _check_others(self) -> None:
        rows = self.config.get_text_config().vocab_size
        used = {self.stored_name(name) for name in self.state_names()}
        for name in self.files.keys() - used:
            if rows in self.read(name).shape:
                raise ValueError(
                    f"{name} in {self.folder} seems to belong to the vocabulary, but is no part of "
                    f"{self.model_class.__name__}, which the configuration names: correct its `architectures`"
                )

    def stored_name(self, name: str) -> str | None:
        """The name under which a tensor of the state dict is stored, or None."""
        return _stored_name(name, self.files, self.model_class.base_model_prefix)

    def state_names(self) -> list[str]:
        """Names in the state dict of the class."""
        return list(skeleton(self.model_class, self.config).state_dict())


def transplant_checkpoint(
    folder: str | os.PathLike,
    new_tokenizer: Any,
    out: str | os.PathLike,
    method: Any = "tokenadapt",
    *,
    base_tokenizer: Any = None,
    donor: Any = None,
    compatibility: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> TransplantReport:
    """Give a checkpoint another tokenizer without building its model: `transplant_tokenizer` for a folder on disk.

    The tensors are those that `transplant_tokenizer` gives, bit for bit; the shards stay what they were, and those
    without a table are copied. Nothing is left of an unfinished result.

    Args:
        folder: the base's folder, with safetensors weights, or its name on the Hub.
        new_tokenizer, method, base_tokenizer, donor, compatibility, options: as of `transplant_tokenizer`.
        out: the folder to make; it must not exist, or be empty.
        trust_remote_code: whether code may be run that the base, the tokenizer or the donor brings.

    Returns:
        Where every row came from; also written as `transplant_report.json`.

    Raises:
        FileNotFoundError: no safetensors weights. FileExistsError: `out` is not empty.
        ValueError: weights that are damaged, quantized or not those of the configuration's class; and as of
            `transplant_tokenizer`.
    """
    _check_target(Path(out))
    checkpoint = StoredCheckpoint.open(_local(folder), trust_remote_code=trust_remote_code)
    base_tokenizer = base_tokenizer_of(base_tokenizer, checkpoint.folder, trust_remote_code)
    tokenizer = new_tokenizer_of(new_tokenizer, base_tokenizer, trust_remote_code)
    input_table, head_table, _ = checkpoint.tables()
    matrix, report = plan_transplant(
        base_tokenizer,
        tokenizer,
        input_table,
        head_table,
        method,
        donor_tables=donor_tables_of(donor, tokenizer, trust_remote_code),
        compatibility=compatibility,
        **options,
    )
    finish_tokenizer(tokenizer, base_tokenizer, compatibility)
    rewrite_checkpoint(checkpoint, out, matrix, TokenIds.of(matrix, tokenizer, base_tokenizer), tokenizer, report)
    return report


def rewrite_checkpoint(
    checkpoint: StoredCheckpoint,
    out: str | os.PathLike,
    matrix: TransplantMatrix,
    token_ids: TokenIds,
    tokenizer: Any,
    report: TransplantReport | None = None,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint with a new vocabulary: the tensors, configuration and settings that `transplant_tables` would
    give the loaded model.

    Args:
        out: the folder to make; it must not exist, or be empty.
        tokenizer: stored with it.
        report: stored as `transplant_report.json`, its provenance in the configuration.
        provenance: stored in the configuration where there is no report.
    """
    out = Path(out)
    _check_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        new = Path(beside) / out.name
        new.mkdir()
        model_class = None if checkpoint.plain_decoder else checkpoint.model_class
        config, shifts = updated_config(model_class, checkpoint.config, matrix, token_ids)
        _copy_other_files(checkpoint.folder, new)
        _write_weights(checkpoint, new, matrix, shifts)
        if report is not None:
            report.save(new / REPORT_NAME)
            provenance = report.provenance
        if provenance is not None:
            config.tokenizer_transplant = provenance
        config.save_pretrained(new)
        _write_generation_config(checkpoint, new, token_ids)
        tokenizer.save_pretrained(new)
        if out.exists():
            out.rmdir()
        new.rename(out)


def _check_target(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder: give another, or remove it")


def _local(folder: str | os.PathLike) -> Path:
    """The folder, or the downloaded snapshot of a Hub repository."""
    if Path(folder).is_dir():
        return Path(folder)
    return Path(snapshot_download(str(folder), ignore_patterns=list(_OTHER_WEIGHTS)))


def _write_weights(checkpoint: StoredCheckpoint, out: Path, matrix: TransplantMatrix, shifts: dict[str, int]) -> None:
    moved = {checkpoint.stored_name(name): shift for name, shift in shifts.items()}
    if None in moved:
        raise ValueError(f"{checkpoint.folder} holds no {', '.join(shifts)}, whose rows must move with the padding id")
    grown_bytes = grown_numbers = 0
    for file_name in sorted(set(checkpoint.files.values())):
        names = [name for name, file in checkpoint.files.items() if file == file_name]
        if not any(name in checkpoint.vocabulary or name in moved for name in names):
            shutil.copyfile(checkpoint.folder / file_name, out / file_name)
            continue
        with _opened(checkpoint.folder / file_name) as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in names}
        for name in names:
            old = tensors[name]
            if name in checkpoint.vocabulary:
                tensors[name] = checkpoint.new_tensor(name, matrix)
            elif name in moved:
                tensors[name] = shifted_positions(old, moved[name])
            grown_bytes += tensors[name].nbytes - old.nbytes
            grown_numbers += tensors[name].numel() - old.numel()
        save_file(tensors, out / file_name, metadata=metadata or {"format": "pt"})
    if (checkpoint.folder / _INDEX).exists() and not (checkpoint.folder / _SINGLE).exists():
        index = json.loads((checkpoint.folder / _INDEX).read_text(encoding="utf-8"))
        for key, grown in (("total_size", grown_bytes), ("total_parameters", grown_numbers)):
            if key in index.get("metadata", {}):
                index["metadata"][key] = int(index["metadata"][key]) + grown
        (out / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_other_files(folder: Path, out: Path) -> None:
    for path in sorted(folder.iterdir()):
        if any(path.match(pattern) for pattern in _LEFT_BEHIND):
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)


def _write_generation_config(checkpoint: StoredCheckpoint, out: Path, ids: TokenIds) -> None:
    if (checkpoint.folder / "generation_config.json").exists():
        settings = GenerationConfig.from_pretrained(checkpoint.folder)
    elif checkpoint.plain_decoder or checkpoint.model_class.can_generate():
        settings = GenerationConfig.from_model_config(checkpoint.config)
    else:
        return
    biased = any(tensor.role == "bias" for tensor in checkpoint.vocabulary.values())
    updated_generation_config(settings, ids, suppress=not biased).save_pretrained(out)


def _files_of(folder: Path) -> dict[str, str]:
    """Stored names and the files they are in, in the order of the files."""
    if (folder / _SINGLE).exists():
        with _opened(folder / _SINGLE) as file:
            return dict.fromkeys(file.keys(), _SINGLE)
    if not (folder / _INDEX).exists():
        adapter = (
            " (it holds an adapter: merge it into its base first)" if (folder / "adapter_config.json").exists() else ""
        )
        raise FileNotFoundError(
            f"{folder} holds neither {_SINGLE} nor {_INDEX}{adapter}; save the model as safetensors"
        )
    files = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    for file_name in set(files.values()):
        with _opened(folder / file_name) as file:
            stored = {name for name, other in files.items() if other == file_name}
            if stored != set(file.keys()):
                raise ValueError(f"{folder / _INDEX} and {file_name} disagree about what it holds; download them again")
    return files


def _shapes(folder: Path, files: dict[str, str]) -> dict[str, list[int]]:
    """Stored name -> shape."""
    shapes: dict[str, list[int]] = {}
    for file_name in sorted(set(files.values())):
        with _opened(folder / file_name) as file:
            shapes.update({name: file.get_slice(name).get_shape() for name in file.keys()})
    return shapes


def _plain_vocabulary(config: Any, shapes: dict[str, list[int]]) -> dict[str, VocabularyTensor] | None:
    """The tensors of the vocabulary of a plain decoder, or None where only the model's code can tell: for other classes
    and names, and where another tensor has as many slices in some dimension as there are ids."""
    of_transformers = type(config).__module__.startswith("transformers.models.")
    if not of_transformers or not config.architectures or config.architectures[0] not in PLAIN_DECODERS:
        return None
    table_of_head = _TABLE if config.tie_word_embeddings else None
    tensors = {_TABLE: VocabularyTensor("input", 0), _HEAD: VocabularyTensor("head", 0, table_of_head)}
    found = {name for name, shape in shapes.items() if config.vocab_size in shape}
    if found != set(tensors) and (table_of_head is None or found != {_TABLE}):
        return None
    return {name: tensor for name, tensor in tensors.items() if name in found}


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but the index in its folder names it; download it again")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); download it again") from error


def _model_class(config: Any, folder: Path, trust_remote_code: bool) -> type[Any]:
    if not config.architectures:
        raise ValueError(f"the configuration in {folder} names no architectures: save it from the model")
    name = config.architectures[0]
    if hasattr(transformers, name):
        return getattr(transformers, name)
    for reference in (getattr(config, "auto_map", None) or {}).values():
        if trust_remote_code and reference.endswith(f".{name}"):
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            return get_class_from_dynamic_module(reference, str(folder))
    for auto_class in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModel"):
        known = getattr(transformers, auto_class)._model_mapping.get(type(config), None)
        if getattr(known, "__name__", None) == name:
            return known
    raise ValueError(f"the class {name} of {folder} is not known: import its library, or pass trust_remote_code=True")


def _stored_name(name: str, files: dict[str, str], prefix: str) -> str | None:
    """The name under which a file holds a tensor of the model: its own, with or without the prefix of the base model,
    or one that ends alike, where that is the only one (older layouts of composite models)."""
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in files:
            return candidate
    ending = "." + ".".join(name.split(".")[-2:])
    alike = [stored for stored in files if stored.endswith(ending)]
    return alike[0] if len(alike) == 1 else None
