"""LoRA adapters in PEFT's files, merged into the weights of a base checkpoint one tensor at a time.

PEFT's own `merge_and_unload` needs the whole model in memory; the formula is one line: W' = W + scale * B A with
scale = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2106.09685, 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rarezoo.conversion.checkpoint_files import (
    CheckpointReader,
    ConversionError,
    TensorEntry,
    listed,
    read_json,
    write_json,
)

CONFIG_FILE = "adapter_config.json"
_STEMS = ("adapter_model",)
_PREFIX = "base_model.model."
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.default)?(\.weight)?")
_BASE_COPY = re.compile(r"(?P<module>.+)\.base_layer\.weight")
_REPLACEMENT = re.compile(r"(?P<module>.+?)(\.modules_to_save(\.default)?)?\.weight")

# Initialisations that leave the base weights as they are; the others (pissa, olora, corda, loftq, lora_ga) change them
# before training, so that base + adapter on disk is not the trained model.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# Options that change neither the formula nor which weights take part beyond what is read below.
_HARMLESS_OPTIONS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    "velora_config",
}  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    """Names of the two factors of one weight, in the adapter's file."""

    a: str
    b: str
    is_embedding: bool
    scale: float


class LoraAdapter:
    """A PEFT LoRA adapter folder, matched with the weights of its base.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
        weights: name -> shape of the base model's weights, with the head listed also where it is tied.

    Raises:
        ConversionError: another PEFT method, an option that this formula does not cover, or tensors that do not belong
            to the base (all of them in one message).
    """

    def __init__(self, folder: Path, weights: Mapping[str, tuple[int, ...]]):
        self.folder = folder
        self.config = read_json(folder / CONFIG_FILE)
        _check_options(folder, self.config)
        self.weights = dict(weights)
        self._reader = CheckpointReader(folder, _STEMS)
        self._pairs: dict[str, _Pair] = {}
        self._replacements: dict[str, str] = {}
        self._base_copies: dict[str, str] = {}
        self._match_tensors()

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The adapter's own tensors."""
        return self._reader.entries

    @property
    def touched(self) -> tuple[str, ...]:
        """Names of the base weights that `merge` changes."""
        return tuple(name for name in self.weights if name in self._pairs or name in self._replacements)

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The merged weight: float32 for a weight with factors, unrounded; other weights as they are."""
        if name in self._base_copies:
            self._check_base_copy(name, weight)
        if name in self._replacements:
            weight = self._reader.read(self._replacements[name])
        if name in self._pairs:
            pair = self._pairs[name]
            a, b = self._reader.read(pair.a).float(), self._reader.read(pair.b).float()
            if pair.is_embedding:  # PEFT stores the factors of an embedding for its transpose
                a, b = b.T, a.T
            weight = weight.to(torch.float32, copy=True).addmm_(b, a, alpha=pair.scale)
        return weight

    def save(self, folder: Path, base: str, task_type: str | None, check: Mapping[str, torch.Tensor]) -> None:
        """Write the adapter as safetensors under PEFT's canonical names, without the copies of base weights.

        Args:
            folder: existing folder.
            base: value of `base_model_name_or_path`.
            task_type: PEFT's wrapper of the model that the adapter is for; "CAUSAL_LM" needs one that generates.
            check: the base weights of which the adapter holds copies.
        """
        for name, weight in check.items():
            self._check_base_copy(name, weight)
        tensors = {}
        for name, pair in self._pairs.items():
            module = _PREFIX + name.removesuffix(".weight")
            kind, end = ("lora_embedding_", "") if pair.is_embedding else ("lora_", ".weight")
            tensors[f"{module}.{kind}A{end}"] = self._reader.read(pair.a).contiguous()
            tensors[f"{module}.{kind}B{end}"] = self._reader.read(pair.b).contiguous()
        for name, stored in self._replacements.items():
            tensors[_PREFIX + name] = self._reader.read(stored).contiguous()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {**self.config, "base_model_name_or_path": base, "revision": None, "task_type": task_type}
        write_json(folder / CONFIG_FILE, config)

    @property
    def base_copies(self) -> tuple[str, ...]:
        """Names of the base weights of which the adapter stores a copy (PEFT does so for adapted heads)."""
        return tuple(self._base_copies)

    def _check_base_copy(self, name: str, weight: torch.Tensor) -> None:
        copy = self._reader.read(self._base_copies[name])
        same = copy.shape == weight.shape and (
            torch.equal(copy.to(weight.dtype), weight) or torch.equal(weight.to(copy.dtype), copy)
        )
        if not same:
            raise ConversionError(
                f"the adapter {self.folder} was trained on another base: its copy of {name} {list(copy.shape)} differs "
                f"from the base's {list(weight.shape)}; give the right base checkpoint with base="
            )

    def _match_tensors(self) -> None:
        factors: dict[str, dict[str, str]] = {}
        embeddings, unknown = set(), []
        for stored in self._reader.entries:
            name = stored.removeprefix(_PREFIX)
            pair, copy = _PAIR.fullmatch(name), _BASE_COPY.fullmatch(name)
            match = pair or copy or _REPLACEMENT.fullmatch(name)
            weight = self._weight_name(match["module"]) if match and name != stored else None
            if weight is None:
                unknown.append(stored)
            elif pair:
                factors.setdefault(weight, {})[pair["factor"]] = stored
                if pair["embedding"]:
                    embeddings.add(weight)
            elif copy:
                self._base_copies[weight] = stored
            else:
                self._replacements[weight] = stored
        missing = [f"factor of {weight}" for weight, names in factors.items() if len(names) < 2]
        missing += [
            f"factors of {weight}" for weight in self.weights if self._is_target(weight) and weight not in factors
        ]
        missing += [f"saved module {name}" for name in self._unsaved_modules()]
        wrong = [
            f"{name} {list(self._reader.entries[stored].shape)} instead of {list(self.weights[name])}"
            for name, stored in self._replacements.items()
            if self._reader.entries[stored].shape != tuple(self.weights[name])
        ]
        for weight, names in factors.items():
            if len(names) == 2:
                wrong += self._add_pair(weight, names["A"], names["B"], weight in embeddings)
        problems = [
            f"{title}: {listed(names)}"
            for title, names in (("Unknown", unknown), ("Missing", missing), ("Wrong shapes", wrong))
            if names
        ]
        if problems:
            raise ConversionError(
                f"the tensors of the adapter {self.folder} do not match its configuration and its base. "
                f"{'. '.join(problems)}. Check that the adapter was made for this base"
            )

    def _add_pair(self, weight: str, a: str, b: str, is_embedding: bool) -> list[str]:
        module = weight.removesuffix(".weight")
        rank = _by_pattern(self.config.get("rank_pattern"), module, self.config["r"])
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        self._pairs[weight] = _Pair(a, b, is_embedding, scale)
        rows, columns = self.weights[weight][::-1] if is_embedding else self.weights[weight]
        found = self._reader.entries[a].shape, self._reader.entries[b].shape
        if found == ((rank, columns), (rows, rank)):
            return []
        return [f"{weight} {list(found[0])} and {list(found[1])} instead of {[rank, columns]} and {[rows, rank]}"]

    def _weight_name(self, module: str) -> str | None:
        # Adapters made on the inner model (LLM2Vec does so) lack the outer prefix.
        for name in (f"{module}.weight", f"model.{module}.weight"):
            if name in self.weights:
                return name
        return None

    def _is_target(self, weight: str) -> bool:
        """Whether the configuration's module selection names this weight (PEFT's rules, for matrices)."""
        if len(self.weights[weight]) != 2:
            return False
        module = weight.removesuffix(".weight")
        if _selects(self.config.get("exclude_modules"), module):
            return False
        targets = self.config.get("target_modules")
        if targets == "all-linear":
            return not module.endswith(("embed_tokens", "lm_head"))
        layers = self.config.get("layers_to_transform")
        if layers is not None:
            number = re.search(r"\.(\d+)\.", module)
            if number is None or int(number[1]) not in ([layers] if isinstance(layers, int) else layers):
                return False
        return _selects(targets, module)

    def _unsaved_modules(self) -> list[str]:
        saved = [name.removesuffix(".weight") for name in self._replacements]
        wanted = self.config.get("modules_to_save") or []
        return [name for name in wanted if not any(_selects([name], module) for module in saved)]


def _selects(selection: str | list[str] | None, module: str) -> bool:
    if not selection:
        return False
    if isinstance(selection, str):
        return re.fullmatch(selection, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in selection)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_options(folder: Path, config: Mapping[str, Any]) -> None:
    def refuse(what: str) -> None:
        raise ConversionError(
            f"the adapter {folder} cannot be merged: {what}. Merge it with PEFT (merge_and_unload) on the machine that "
            "trained it, and convert the merged checkpoint"
        )

    if config.get("peft_type") != "LORA":
        refuse(f"expected peft_type 'LORA', found {config.get('peft_type')!r}")
    for option in ("r", "lora_alpha"):
        if not isinstance(config.get(option), (int, float)):
            refuse(f"its {CONFIG_FILE} has no number {option!r}")
    if config.get("bias", "none") != "none":
        refuse(f"expected bias 'none', found {config['bias']!r}: Mistral has no biases")
    if config.get("init_lora_weights", True) not in _PLAIN_INITIALISATIONS:
        refuse(f"init_lora_weights={config['init_lora_weights']!r} changed the base weights before training")
    used = [f"{name}={value!r}" for name, value in config.items() if value and name not in _HARMLESS_OPTIONS]
    if used:
        refuse(f"it uses {listed(used)}, which plain LoRA does not have")
