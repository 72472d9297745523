"""Models that are another model with a transplanted tokenizer: a checkpoint stores the matrix, not the weights.

`from_pretrained` loads the base by its name, checks that it is the one the matrix was made for, and applies the matrix;
from then on the model is the base's own class with new tables, behind a class that remembers where it came from.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.initialization import no_init_weights
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .configuration_tokenizer_transplant import TransplantedConfig
from .table_surgery import TokenIds, refuse_adapter, transplant_tables
from .transplant_matrix import TransplantMatrix

MATRIX_NAME = "transplant_matrix.safetensors"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# How to reach a repository on the Hub; the base is reached in the same way, but at its own revision.
_REACHED_BY = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
_OF_THE_CHECKPOINT = ("revision", "subfolder", "code_revision", "trust_remote_code", "adapter_kwargs", "_from_auto")
# What a loaded model knows about its quantization and devices, and PEFT and the trainers ask for.
_LOADED_STATE = (
    *("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method"),
    *("hf_device_map",),
)
_SAMPLED_ROWS = 64
_AS_LOADED = "_as_loaded"  # marks the parameters of a quantized base; merging an adapter puts others in their place


class TransplantedPreTrainedModel(PreTrainedModel):
    """A base model with new tables, as `self.model`.

    Build one with `from_base` (from a matrix) or `from_pretrained` (from a checkpoint). Built from a configuration
    alone it has random weights and nothing to refer to: it can be used, but only `merge_and_unload` saves it.
    """

    config_class = TransplantedConfig
    config: TransplantedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _base_auto_class: Any = AutoModel

    def __init__(self, config: TransplantedConfig, base_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.transplant_matrix: TransplantMatrix | None = None
        self._loaded_sums: dict[str, int] = {}
        if base_model is None:
            attention = config._attn_implementation
            self.model = self._base_auto_class.from_config(config.text_config, attn_implementation=attention)
            self.post_init()
            return
        self.model = base_model
        with no_init_weights():
            self.post_init()
        for name in _LOADED_STATE:
            if hasattr(base_model, name):
                setattr(self, name, getattr(base_model, name))
        config.text_config = base_model.config
        config.mirror()
        if getattr(base_model, "generation_config", None) is not None:
            self.generation_config = base_model.generation_config

    @classmethod
    def from_base(
        cls,
        base_model_name_or_path: str | Path,
        matrix: TransplantMatrix,
        tokenizer: Any,
        base_tokenizer: Any = None,
        *,
        revision: str | None = None,
        provenance: dict[str, Any] | None = None,
        **load_options: Any,
    ):
        """The base with the matrix applied; `save_pretrained` then stores the matrix alone.

        Args:
            base_model_name_or_path: a folder or Hub name with safetensors weights; it is remembered as it is given.
            matrix: as `transplant_tokenizer` returns it.
            tokenizer, base_tokenizer: the new tokenizer, and that of the base (for ids by role).
            revision: of the base on the Hub; the commit that it stands for is remembered.
            provenance: kept in the configuration.
            load_options: of the base's `from_pretrained`, such as `dtype` and `quantization_config`.

        Raises FileNotFoundError where the base has no safetensors weights, and ValueError where the matrix does not fit
        it, or the folder holds an adapter.
        """
        reached = {name: load_options[name] for name in _REACHED_BY if name in load_options}
        base = str(base_model_name_or_path)
        refuse_adapter(base)
        ids = TokenIds.of(matrix, tokenizer, base_tokenizer)
        base_config = AutoConfig.from_pretrained(base, revision=revision, **reached)
        # A branch moves on: the commit that it stands for now is what the matrix was made for.
        revision = extract_commit_hash(cached_file(base, "config.json", revision=revision, **reached), None) or revision
        config = TransplantedConfig(
            base_model_name_or_path=base,
            base_revision=revision,
            base_fingerprint=base_fingerprint(base, revision=revision, **reached),
            token_ids=ids.roles,
            base_token_ids=ids.base_roles,
            text_config=base_config,
            tokenizer_transplant=provenance,
        )
        config.architectures = [cls.__name__]
        return cls._applied(config, base, matrix, load_options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load the base that the checkpoint names, check its hash, and apply the stored matrix.

        Args:
            pretrained_model_name_or_path: folder or Hub name of the checkpoint.
            config: its configuration, or None; fields of it that are not the stored ones reach the base.
            kwargs: `base_model_name_or_path` and `base_revision`, where the base is elsewhere now; how to reach the
                Hub; and options of the base's `from_pretrained` (`dtype`, `device_map`, `quantization_config`,
                `attn_implementation`, …). Trust in the checkpoint's code is not passed on to the base.

        Raises:
            ValueError: the base is not the one the matrix was made for.
            OSError: checkpoint or base cannot be found.
        """
        if pretrained_model_name_or_path is None:  # a configuration and a state dict, as the base's class takes them
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        reached = {name: kwargs[name] for name in _REACHED_BY if name in kwargs}
        own = {name: kwargs.pop(name) for name in _OF_THE_CHECKPOINT if name in kwargs}
        located = {name: own[name] for name in ("revision", "subfolder") if own.get(name) is not None}
        with_info = kwargs.pop("output_loading_info", False)
        if getattr(config, "model_type", None) != cls.config_class.model_type:
            config, kwargs = cls.config_class.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **located, **kwargs
            )
        config = copy.deepcopy(config)
        attention = getattr(config, "_attn_implementation_internal", None)
        if attention is not None:  # taken out of the options by AutoConfig
            kwargs.setdefault("attn_implementation", attention)
        stored = cls.config_class.from_pretrained(pretrained_model_name_or_path, **located, **reached)
        kwargs |= _changed_fields(config, stored)
        path = cached_file(pretrained_model_name_or_path, MATRIX_NAME, **located, **reached)
        base = base_of(config.base_model_name_or_path, pretrained_model_name_or_path)
        with torch.device("cpu"):  # whatever the caller's default is
            matrix = TransplantMatrix.load(path)
            found = base_fingerprint(base, revision=config.base_revision, **reached)
        if found != config.base_fingerprint:
            raise ValueError(
                f"{base} (revision {config.base_revision}) is not the base that {pretrained_model_name_or_path} was "
                f"made for: expected the fingerprint {config.base_fingerprint}, found {found}. Give the right one as "
                "base_model_name_or_path and base_revision, or transplant the tokenizer again"
            )
        model = cls._applied(config, base, matrix, kwargs)
        model.config._name_or_path = str(pretrained_model_name_or_path)
        if model.can_generate():
            with suppress(OSError):  # without the file, those of the base, translated
                model.generation_config = model.model.generation_config = GenerationConfig.from_pretrained(
                    pretrained_model_name_or_path, **located, **reached
                )
        adapter = dict(own.get("adapter_kwargs") or {})
        if "_adapter_model_path" in adapter:  # an AutoClass was given the folder of a PEFT adapter
            model.load_adapter(adapter.pop("_adapter_model_path"), adapter_kwargs=adapter)
        nothing: dict[str, Any] = {
            "missing_keys": set(),
            "unexpected_keys": set(),
            "mismatched_keys": set(),
            "error_msgs": [],
        }
        return (model, nothing) if with_info else model

    @classmethod
    def _applied(cls, config: TransplantedConfig, base: str, matrix: TransplantMatrix, options: dict[str, Any]):
        options.setdefault("dtype", "auto")
        loaded = cls._base_auto_class.from_pretrained(base, revision=config.base_revision, **options)
        with torch.device("cpu"):
            ids = TokenIds.from_roles(matrix, config.token_ids or {}, config.base_token_ids or {})
            transplant_tables(loaded, matrix, ids)
        loaded.config.tokenizer_transplant = config.tokenizer_transplant
        model = cls(config, loaded)
        model.config.dtype = loaded.dtype
        model.transplant_matrix = matrix
        for _, parameter in _quantized_parameters(model):
            setattr(parameter, _AS_LOADED, True)
        model._loaded_sums = _sums(model)
        return model.eval()

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Store the configuration, the matrix and the code: the weights are the base's.

        Args:
            kwargs: `repo_id`, … of `push_to_hub`; what only concerns weights, such as `max_shard_size`, is not needed.

        Raises ValueError for a model whose weights are no longer those of base and matrix (trained, merged, cast): what
        has changed would be lost. `merge_and_unload().save_pretrained(…)` stores all of it.
        """
        if self.transplant_matrix is None or _sums(self) != self._loaded_sums:
            raise ValueError(
                "the weights are not those of the base with the matrix applied (built from a configuration, trained, "
                "merged or cast since), so the matrix alone cannot store them: use "
                "merge_and_unload().save_pretrained(...), which writes a plain model"
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        if self._auto_class is not None:
            custom_object_save(self, str(folder), config=config)
        config.save_pretrained(folder)
        self.transplant_matrix.save(folder / MATRIX_NAME)
        if self.can_generate():
            self.generation_config.save_pretrained(folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def merge_and_unload(self) -> PreTrainedModel:
        """The plain model of the base's class, which needs nothing of this one; not a copy."""
        if self.can_generate():
            self.model.generation_config = self.generation_config
        if getattr(self.model, "is_quantized", False):  # transformers cannot undo what it did when it loaded one
            self.model._weight_conversions = []
        return self.model

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.model.set_output_embeddings(value)


class TransplantedModel(TransplantedPreTrainedModel):
    """The base's model without a head."""

    _auto_class = "AutoModel"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ):
        """Arguments and outputs are the base's; None means its default."""
        given = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        return self.model(**_without_none(**given, inputs_embeds=inputs_embeds), **kwargs)


class TransplantedForMaskedLM(TransplantedPreTrainedModel):
    """The base with its masked language model's head."""

    _auto_class = "AutoModelForMaskedLM"
    _base_auto_class = AutoModelForMaskedLM

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ):
        """Arguments and outputs are the base's; None means its default."""
        given = dict(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        given |= dict(position_ids=position_ids, inputs_embeds=inputs_embeds, labels=labels)
        return self.model(**_without_none(**given), **kwargs)


class TransplantedForCausalLM(TransplantedPreTrainedModel, GenerationMixin):
    """The base with its language model's head."""

    _auto_class = "AutoModelForCausalLM"
    _base_auto_class = AutoModelForCausalLM

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ):
        """Arguments and outputs are the base's; None means its default."""
        given = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, labels=labels)
        given |= dict(past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache)
        if self.model._supports_logits_to_keep():
            given["logits_to_keep"] = logits_to_keep
        return self.model(**_without_none(**given), **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, **kwargs
    ):  # `generate` looks for these names
        return self.model.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    @property
    def _is_stateful(self) -> bool:
        return self.model._is_stateful


def _changed_fields(config: TransplantedConfig, stored: TransplantedConfig) -> dict[str, Any]:
    """What the caller has changed in the base's configuration."""
    fields, before = config.text_config.to_dict(), stored.text_config.to_dict()
    return {name: value for name, value in fields.items() if name not in before or before[name] != value}


def base_fingerprint(base: str, *, revision: str | None = None, **reached: Any) -> str:
    """SHA-256 of a checkpoint's safetensors weights: name, dtype and shape of every tensor, all bytes of those with one
    row per token (what the matrix is applied to), and evenly spaced rows of the others. It does not depend on shards.

    Args:
        base: folder or Hub name. revision, reached: of the Hub.

    Raises FileNotFoundError where there are no safetensors weights.
    """
    rows = AutoConfig.from_pretrained(base, revision=revision, **reached).get_text_config().vocab_size
    digest = hashlib.sha256()
    for name, file in sorted(_stored_tensors(base, revision, reached).items()):
        with safe_open(file, "pt") as opened:
            part = opened.get_slice(name)
            shape = part.get_shape()
            digest.update(f"{name} {part.get_dtype()} {shape}\n".encode())
            if not shape:
                digest.update(_bytes_of(opened.get_tensor(name)))
            elif rows in shape or len(shape) == 1:
                digest.update(_bytes_of(part[:]))
            else:
                for row in sorted({(shape[0] - 1) * i // (_SAMPLED_ROWS - 1) for i in range(_SAMPLED_ROWS)}):
                    digest.update(_bytes_of(part[row : row + 1]))
    return digest.hexdigest()


def _stored_tensors(base: str, revision: str | None, reached: dict[str, Any]) -> dict[str, str]:
    """Names of the stored tensors and the files that hold them."""
    settings: dict[str, Any] = dict(revision=revision, _raise_exceptions_for_missing_entries=False, **reached)
    single = cached_file(base, _SINGLE, **settings)
    if single is not None:
        with safe_open(single, "pt") as opened:
            return dict.fromkeys(opened.keys(), single)
    index = cached_file(base, _INDEX, **settings)
    if index is None:
        raise FileNotFoundError(f"{base} holds neither {_SINGLE} nor {_INDEX}: save the base as safetensors")
    files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    paths = {name: cached_file(base, name, revision=revision, **reached) for name in sorted(set(files.values()))}
    return {name: paths[file] for name, file in files.items()}


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def base_of(base: str, checkpoint: str | Path) -> str:
    """A base's folder that was stored as a relative path is looked for here first, then beside the checkpoint."""
    if not base:
        raise ValueError(f"{checkpoint} names no base (base_model_name_or_path is empty)")
    sibling = Path(checkpoint) / base
    if Path(base).exists() or not sibling.exists():
        if base.startswith((".", os.sep)) and not Path(base).exists():
            raise FileNotFoundError(
                f"the base of {checkpoint} is not at {base}: tell where it is now by base_model_name_or_path"
            )
        return base
    return str(sibling)


def _sums(model: torch.nn.Module) -> dict[str, int]:
    """For every floating-point tensor the sum of its bits, which notices whatever training, merging or casting does.
    Quantized tensors, which their layers repack in place, count as long as they are those that were loaded; the scales
    that only a state dict shows are left out."""
    own = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())}
    sums = {name: int(getattr(tensor, _AS_LOADED, False)) for name, tensor in _quantized_parameters(model)}
    for name, tensor in model.state_dict().items():
        if name in own and tensor.is_floating_point() and not tensor.is_meta:
            bits = tensor.detach().contiguous().flatten().view(torch.uint8)
            whole = len(bits) - len(bits) % 8
            sums[name] = int(bits[:whole].view(torch.int64).sum()) + int(bits[whole:].sum())
    return sums


def _quantized_parameters(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in model.named_parameters() if not tensor.is_floating_point()]


def _without_none(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}
