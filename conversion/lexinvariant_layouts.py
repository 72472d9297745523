"""The layouts in which decoders for the lexinvariant family are found, each opened as configuration, tensors and rules.

| layout | recognised by |
|---|---|
| `rarezoo` | our own `config.json` |
| `flax` | a tree of google-research/meliad, flattened into a `.npz` or `.safetensors` file, or a folder with one |
| `t5` | `config.json` of a T5 whose MLP is ReLU without a gate; its decoder is taken |

No checkpoint of the paper was published; the first of the foreign layouts is that of the code whose defaults equal the
paper's numbers. Its names are those of the source; between them, `decoder`, `layer_stack`, `tbase`, `_kvq`, `params`
and `target` may stand or be missing, as the versions of that code differ.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from huggingface_hub.errors import StrictDataclassError

from rarezoo.conversion.checkpoint_files import (
    CheckpointReader,
    ConversionError,
    RenamedTensors,
    TensorEntry,
    locate_checkpoint,
    read_json,
)
from rarezoo.conversion.engine import Rule, drop, keep, rename
from rarezoo.lexinvariant import LexinvariantConfig, LexinvariantForCausalLM

FAMILY = LexinvariantConfig.model_type
FLAX_CONFIG = "decoder_config.json"  # beside a Flax file: fields of our configuration that the tensors do not tell
_TREE_PARTS = ("params", "target", "decoder", "layer_stack", "tbase", "_kvq")
_ROWS = "model.embed_tokens.weight"
_OURS = "model.layers.{layer}."
_THEIRS = "transformer{layer}."
_FLAX_ROWS = "embed.embedding"


def _transposed(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.T for tensor in tensors]


def _kernel(theirs: str, ours: str) -> Rule:
    """Flax multiplies from the left: (input, output)."""
    return rename(f"{_THEIRS}{theirs}.kernel", f"{_OURS}{ours}.weight", _transposed, _transposed)


# Flax names, without the parts in between -> ours. The lines marked so are parameters that the Flax code does not have.
FLAX_RULES: tuple[Rule, ...] = (
    _kernel("queries_layer", "self_attn.q_proj"),
    _kernel("keys_layer", "self_attn.k_proj"),
    _kernel("values_layer", "self_attn.v_proj"),
    _kernel("post_attn_mlp.output_layer", "self_attn.o_proj"),
    _kernel("ffn.hidden0", "mlp.up_proj"),
    _kernel("ffn.output_layer", "mlp.down_proj"),
    rename(f"{_THEIRS}attention_scale", f"{_OURS}self_attn.attn_scale"),
    rename(f"{_THEIRS}pre_attn_layernorm.scale", f"{_OURS}input_layernorm.weight"),
    rename(f"{_THEIRS}pre_ffn_layernorm.scale", f"{_OURS}post_attention_layernorm.weight"),
    rename("final_layernorm.scale", "model.norm.weight"),
    rename(f"{_THEIRS}key_smear", f"{_OURS}self_attn.key_smear"),  # ours
    rename("embed.scale", "model.embed_tokens.scale"),  # ours
    rename("embed.bias", "model.embed_tokens.bias"),  # ours
    rename("embed.exempt", "model.embed_tokens.exempt_weight"),  # ours
)
_OWN_BIAS = rename(
    f"{_THEIRS}relative_positions.rel_embedding",
    f"{_OURS}self_attn.relative_attention_bias.weight",
    _transposed,
    _transposed,
)
_SHARED_BIAS = rename(
    "relative_positions.rel_embedding",
    "model.layers.0.self_attn.relative_attention_bias.weight",
    _transposed,
    _transposed,
)


@dataclass
class Source:
    """An opened checkpoint.

    Attributes:
        layout: its name.
        folder: where tokenizer and licence lie.
        config: what it says, with the caller's options.
        weights: its tensors.
        rules: from its names to ours.
        notes: what the report should say.
    """

    layout: str
    folder: Path
    config: LexinvariantConfig
    weights: CheckpointReader
    rules: list[Rule]
    notes: list[str] = field(default_factory=list)


def open_checkpoint(source: str | os.PathLike, config_options: Mapping[str, Any] | None = None) -> Source:
    """Open a checkpoint of any layout.

    Args:
        source: folder, Hub repository, or a `.npz` or `.safetensors` file of a Flax tree.
        config_options: fields of `LexinvariantConfig` that replace what the source says.

    Raises:
        ConversionError: another layout, or a network that this family cannot be.
        FileNotFoundError: no such source.
    """
    options = dict(config_options or {})
    path = Path(source).expanduser()
    if path.is_file():
        return _open_flax(path, options)
    folder = locate_checkpoint(source)
    if not (folder / "config.json").exists():
        return _open_flax(_flax_file(folder), options)
    fields = read_json(folder / "config.json")
    if fields.get("model_type") == FAMILY:
        return _open_own(folder, options)
    if fields.get("model_type") == "t5":
        return _open_t5(folder, fields, options)
    raise ConversionError(
        f"{folder / 'config.json'} describes a {fields.get('model_type')!r} model; expected rarezoo's layout "
        f"(model_type {FAMILY!r}), a T5 ('t5'), or a folder without config.json that holds a Flax tree"
    )


def _build_config(fields: Mapping[str, Any], folder: Path) -> LexinvariantConfig:
    unknown = sorted(set(fields) - set(LexinvariantConfig().to_dict()))
    if unknown:
        raise ConversionError(f"unknown fields in the configuration of {folder}: {', '.join(unknown)}")
    try:
        config = LexinvariantConfig(**fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(f"the configuration of {folder} is not valid: {error}") from error
    config.architectures = [LexinvariantForCausalLM.__name__]
    return config


# --- rarezoo's folders ------------------------------------------------------------------------------------------------


def _open_own(folder: Path, options: Mapping[str, Any]) -> Source:
    try:
        config = LexinvariantConfig.from_pretrained(folder, local_files_only=True)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(f"the configuration of {folder} is not valid: {error}") from error
    if options:
        config = _build_config({**told_fields(config), **options}, folder)
    weights = CheckpointReader(folder)
    rules = [*keep(*(name for name in weights.entries if name != _ROWS)), *_row_rules(_ROWS, weights, config)]
    return Source("rarezoo", folder, config, weights, rules)


def told_fields(config: LexinvariantConfig) -> dict[str, Any]:
    """The fields that differ from the defaults, without those that belong to a folder of ours."""
    own = ("auto_map", "model_type", "architectures", "transformers_version", "dtype")
    return {name: value for name, value in config.to_diff_dict().items() if name not in own}


def _row_rules(name: str, weights: CheckpointReader, config: LexinvariantConfig) -> list[Rule]:
    """Of the learned rows, which tables of random ones do without."""
    if name not in weights:
        return []
    if config.has_learned_rows:
        return [rename(name, _ROWS)]
    return [drop(name, f"the rows of a {config.table!r} table are not learned")]


# --- Flax trees -------------------------------------------------------------------------------------------------------


def _flax_file(folder: Path) -> Path:
    found = sorted([*folder.glob("*.npz"), *folder.glob("*.safetensors")])
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ConversionError(
            f"{folder} has no config.json; expected one .npz or .safetensors file of a Flax tree, found {names}"
        )
    return found[0]


def _open_flax(file: Path, options: Mapping[str, Any]) -> Source:
    if file.suffix not in (".npz", ".safetensors"):
        raise ConversionError(
            f"{file}: expected a .npz or .safetensors file with a flattened tree of parameters. Where flax is "
            "installed, make one of a checkpoint in its own format (msgpack): "
            f"tree = flax.serialization.msgpack_restore(open({str(file)!r}, 'rb').read()); "
            "numpy.savez('tree.npz', **flax.traverse_util.flatten_dict(tree['optimizer']['target'], sep='/')), "
            "or whatever branch of the tree holds the parameters"
        )
    reader = NumpyTensors(file) if file.suffix == ".npz" else CheckpointReader(file)
    weights = RenamedTensors(file, [(reader, flax_name)])
    stated = read_json(file.parent / FLAX_CONFIG) if (file.parent / FLAX_CONFIG).exists() else {}
    told = {**stated, **options}
    fields = {**_flax_fields(weights, file), **told}
    config = _build_config(fields, file)
    rules = flax_rules(config)
    if _FLAX_ROWS in weights and not config.has_learned_rows:
        rules.append(drop(_FLAX_ROWS, f"the rows of a {config.table!r} table are not learned"))
    notes = []
    if "vocab_size" not in fields:
        notes.append(f"The tree has no embeddings: vocab_size is {config.vocab_size}, and may be any other.")
    if "attend_self" not in told:
        notes.append("attend_self is false, as in google-research/meliad.")
    if "logit_scale" not in told and _FLAX_ROWS in weights:
        notes.append(
            "Logits are divided by sqrt(hidden_size); google-research/meliad divides them by sqrt(vocab_size): for its "
            f"temperature multiply model.norm.weight by {(config.hidden_size / config.vocab_size) ** 0.5:.6g}."
        )
    return Source("flax", file.parent, config, weights, rules, notes)


def flax_rules(config: LexinvariantConfig) -> list[Rule]:
    """From names as `flax_name` gives them to ours, for one configuration."""
    rules = [*FLAX_RULES, _SHARED_BIAS if config.relative_attention_bias_shared else _OWN_BIAS]
    if config.has_learned_rows:
        rules.append(rename(_FLAX_ROWS, _ROWS))
    return rules


def flax_name(name: str) -> str:
    """The name of a parameter with dots and without the parts that differ between versions, such as
    `transformer0.keys_layer.kernel`."""
    return ".".join(part for part in re.split(r"[/.]", name) if part not in _TREE_PARTS)


def full_flax_name(name: str) -> str:
    """The path in the tree of a name from `flax_name`."""
    layer, _, rest = name.partition(".")
    if not layer.startswith("transformer"):
        return f"decoder/{name.replace('.', '/')}"
    in_layer = rest.startswith("relative_positions")
    in_keys = rest.startswith(("keys", "values", "queries", "attention_scale", "pre_attn_layernorm", "key_smear"))
    between = "" if in_layer else "tbase/_kvq/" if in_keys else "tbase/"
    return f"decoder/layer_stack/{layer}/{between}{rest.replace('.', '/')}"


def _flax_fields(weights: CheckpointReader, file: Path) -> dict[str, Any]:
    """The configuration that the shapes tell."""
    shapes = {name: entry.shape for name, entry in weights.entries.items()}
    layers = {match[1] for name in shapes if (match := re.match(r"transformer(\d+)\.", name))}
    shared = "relative_positions.rel_embedding" in shapes
    needed = {
        "keys": "transformer0.keys_layer.kernel",
        "mlp": "transformer0.ffn.hidden0.kernel",
        "bias": "relative_positions.rel_embedding" if shared else "transformer0.relative_positions.rel_embedding",
    }
    missing = [name for name in needed.values() if len(shapes.get(name, ())) != 2]
    if missing:
        raise ConversionError(
            f"{file} is not a decoder of google-research/meliad: it lacks the matrices {', '.join(missing)} "
            "(expected the flattened tree of parameters, with names joined by '/')"
        )
    (hidden_size, inner), (heads, buckets) = shapes[needed["keys"]], shapes[needed["bias"]]
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "head_dim": inner // heads,
        "intermediate_size": shapes[needed["mlp"]][1],
        "relative_attention_num_buckets": buckets,
        "relative_attention_bias_shared": shared,
        "qk_norm": "transformer0.attention_scale" in shapes,
        "key_smear": "transformer0.key_smear" in shapes,
        "attend_self": False,
        "embedding_affine": "none",
    }
    if "embed.scale" in shapes:
        fields["embedding_affine"] = "scalar" if shapes["embed.scale"] == (1,) else "vector"
    if _FLAX_ROWS in shapes:
        fields |= {"vocab_size": shapes[_FLAX_ROWS][0], "table": "learned"}
    return fields


class NumpyTensors(CheckpointReader):
    """The arrays of a `.npz` file, by name."""

    def __init__(self, file: Path):
        self.folder = file
        try:
            self._arrays = numpy.load(file, allow_pickle=False)
            self.entries = {}
            for name in self._arrays.files:
                tensor = self.read(name)
                self.entries[name] = TensorEntry(file, tuple(tensor.shape), tensor.dtype)
        except (ValueError, OSError, EOFError) as error:
            raise ConversionError(f"{file} is damaged or not a .npz file of plain arrays ({error})") from error

    def read(self, name: str) -> torch.Tensor:
        array = self._arrays[name]
        if array.dtype.str == "|V2":  # as numpy writes bfloat16, which it does not have
            return torch.from_numpy(array.view(numpy.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def release(self, names) -> None:
        """Arrays are read anew each time."""

    def close(self) -> None:
        """The file stays open: only its table of contents is in memory."""


# --- T5 ---------------------------------------------------------------------------------------------------------------

_T5_LAYER = "decoder.block.{layer}.layer."
_T5_ROWS = ("shared.weight", "decoder.embed_tokens.weight")


def _open_t5(folder: Path, fields: Mapping[str, Any], options: Mapping[str, Any]) -> Source:
    activation = fields.get("feed_forward_proj", "relu")
    if activation != "relu":
        raise ConversionError(f"{folder}: expected a T5 whose MLP is ReLU without a gate; found {activation!r}")
    weights = RenamedTensors(folder, [(CheckpointReader(folder), _t5_name)])
    shapes = {name: entry.shape for name, entry in weights.entries.items()}
    rows = next((name for name in _T5_ROWS if name in shapes), None)
    if rows is None:
        raise ConversionError(f"{folder} has no embeddings; expected {' or '.join(_T5_ROWS)}")
    scaled = fields.get("scale_decoder_outputs", fields.get("tie_word_embeddings", True))
    said = {
        "vocab_size": shapes[rows][0],
        "hidden_size": fields.get("d_model"),
        "num_hidden_layers": fields.get("num_decoder_layers") or fields.get("num_layers"),
        "num_attention_heads": fields.get("num_heads"),
        "head_dim": fields.get("d_kv"),
        "intermediate_size": fields.get("d_ff"),
        "rms_norm_eps": fields.get("layer_norm_epsilon"),
        "relative_attention_num_buckets": fields.get("relative_attention_num_buckets"),
        "relative_attention_max_distance": fields.get("relative_attention_max_distance"),
        "pad_token_id": fields.get("pad_token_id"),
        "eos_token_id": fields.get("eos_token_id"),
        "relative_attention_bias_shared": True,
        "qk_norm": False,
        "embedding_affine": "none",
        "logit_scale": "rsqrt_hidden" if scaled else "none",
        "table": "learned",
    }
    config = _build_config({**{name: value for name, value in said.items() if value is not None}, **options}, folder)
    rules = [*t5_rules(config), *_row_rules(rows, weights, config), *_dropped_by_t5(weights, rows, config, folder)]
    return Source("t5", folder, config, weights, rules, ["Only the decoder was taken, without cross-attention."])


def _t5_name(name: str) -> str:
    """A stack that was saved alone has no prefix."""
    return f"decoder.{name}" if name.startswith(("block.", "final_layer_norm.", "embed_tokens.")) else name


def t5_rules(config: LexinvariantConfig) -> list[Rule]:
    """T5 does not divide by sqrt(head_dim) before the softmax: the queries are multiplied by it instead."""
    scale = config.head_dim**0.5
    attention = f"{_T5_LAYER}0.SelfAttention."
    return [
        rename(f"{attention}q.weight", f"{_OURS}self_attn.q_proj.weight", lambda tensors: [tensors[0] * scale]),
        *(rename(f"{attention}{part}.weight", f"{_OURS}self_attn.{part}_proj.weight") for part in "kvo"),
        rename(
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "model.layers.0.self_attn.relative_attention_bias.weight",
        ),
        rename(f"{_T5_LAYER}0.layer_norm.weight", f"{_OURS}input_layernorm.weight"),
        rename(f"{_T5_LAYER}2.layer_norm.weight", f"{_OURS}post_attention_layernorm.weight"),
        rename(f"{_T5_LAYER}2.DenseReluDense.wi.weight", f"{_OURS}mlp.up_proj.weight"),
        rename(f"{_T5_LAYER}2.DenseReluDense.wo.weight", f"{_OURS}mlp.down_proj.weight"),
        rename("decoder.final_layer_norm.weight", "model.norm.weight"),
    ]


def _dropped_by_t5(weights: CheckpointReader, rows: str, config: LexinvariantConfig, folder: Path) -> list[Rule]:
    rules = []
    for name in weights.entries:
        if name.startswith("encoder."):
            rules.append(drop(name, "there is no encoder"))
        elif re.fullmatch(r"decoder\.block\.\d+\.layer\.1\..*", name):
            rules.append(drop(name, "there is nothing to attend to across"))
        elif name in (*_T5_ROWS, "lm_head.weight") and name != rows:
            if config.has_learned_rows and not torch.equal(weights.read(name), weights.read(rows)):
                raise ConversionError(
                    f"{folder}: {name} differs from {rows}, but this family reads and writes by one table; choose one "
                    "without learned rows in config_options"
                )
            rules.append(drop(name, f"the same as {rows}"))
    return rules
