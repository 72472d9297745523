"""A transplant matrix applied to a model: its tables, heads and biases, its configuration and what generation needs.

Which tensors belong to the vocabulary is not guessed from names or sizes: a skeleton of the model is built twice on the
meta device, with the configuration's `vocab_size` and with another, and what differs between the two is the answer.
The same comparison finds the numbers that modules remember (`vocab_size`, `num_embeddings`, `padding_idx`, …).
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .transplant_matrix import NEVER, SourceKind, TransplantMatrix

# Configuration fields that count the rows of a vocabulary table.
_SIZE_FIELDS = ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input")
# Roles that a tokenizer names itself; other ids of a configuration are translated by the copies of the matrix.
_ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
_SEQUENCE_FIELDS = ("bad_words_ids", "force_words_ids")
_MARKER = re.compile(r"<\|[^|<>]+\|>|</?[A-Za-z_]+>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class VocabularyTensor:
    """A tensor with one slice per token id.

    role: "input" for embedding tables, "head" for matrices that give logits, "bias" for vectors added to logits.
    dim: which of its dimensions runs over the ids.
    tied_to: the name whose tensor it shares where the model ties them, else None.
    """

    role: str
    dim: int
    tied_to: str | None = None


@dataclass(frozen=True)
class TokenIds:
    """What the ids of the base's configuration become.

    roles: role name ("bos", "eos", "pad", …) -> new id, or None where the new tokenizer has no such token.
    base_roles: the same of the base's tokenizer; empty where that is not known.
    copied: base id -> the lowest new id whose row is a copy of it.
    padding: new ids without a token, ascending: they must never be generated.
    """

    roles: dict[str, int | None]
    base_roles: dict[str, int | None] = field(default_factory=dict)
    copied: dict[int, int] = field(default_factory=dict)
    padding: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, matrix: TransplantMatrix, tokenizer: Any, base_tokenizer: Any = None) -> TokenIds:
        """From the matrix and the tokenizers (any objects with `bos_token_id`, `eos_token_id`, …)."""
        base_roles = _role_ids(base_tokenizer) if base_tokenizer is not None else {}
        return cls.from_roles(matrix, _role_ids(tokenizer), base_roles)

    @classmethod
    def from_roles(
        cls, matrix: TransplantMatrix, roles: dict[str, int | None], base_roles: dict[str, int | None]
    ) -> TokenIds:
        """From the matrix and the ids that were read from tokenizers before; roles that are not named have no token."""
        return cls({**dict.fromkeys(_ROLES), **roles}, base_roles, _copied_ids(matrix), padding_ids(matrix).tolist())

    def translate(self, base_id: int, as_role: str = "") -> int | None:
        """The new id with the role, or else with the row, of a base id; None where there is none. Where one base token
        plays several roles, `as_role` tells which one is meant."""
        for role in (as_role, *self.base_roles):
            if self.base_roles.get(role) == base_id and self.roles.get(role) is not None:
                return self.roles[role]
        return self.copied.get(base_id)

    def ends_of_text(self, base_ids: int | list[int] | None) -> int | list[int] | None:
        """The new ids at which generation stops: the new tokenizer's, and the counterparts of the base's others, except
        those that play another role now."""
        ends = [] if self.roles["eos"] is None else [self.roles["eos"]]
        others = {id_ for role, id_ in self.roles.items() if role != "eos"}
        for base_id in _as_list(base_ids):
            new_id = self.translate(base_id, "eos")
            if new_id is not None and new_id not in ends and new_id not in others:
                ends.append(new_id)
        if len(ends) < 2:
            return ends[0] if ends else None
        return ends if isinstance(base_ids, list) else ends[0]


def padding_ids(matrix: TransplantMatrix) -> Tensor:
    """Ids of the new tables without a token, `(n,)` int64, ascending."""
    return (matrix.kinds == SourceKind.PADDING).nonzero()[:, 0]


def vocabulary_tensors(model_class: type[Any], config: Any) -> dict[str, VocabularyTensor]:
    """The tensors of a model's state dict that have one slice per token id, by name.

    Raises ValueError where the configuration has no `vocab_size`, or no tensor depends on it.
    """
    larger = copy.deepcopy(config)
    _set_sizes(larger, _vocabulary_size(config) + 1)
    model = skeleton(model_class, config)
    shapes = {name: tensor.shape for name, tensor in skeleton(model_class, larger).state_dict().items()}
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    found = {}
    for name, tensor in model.state_dict().items():
        dims = [dim for dim, size in enumerate(tensor.shape) if shapes[name][dim] != size]
        if dims:
            role = _role(model, name, tensor.shape, dims[0])
            found[name] = VocabularyTensor(role, dims[0], ties.get(name))
    if not found:
        raise ValueError(f"no tensor of {model_class.__name__} depends on vocab_size: there is nothing to transplant")
    return found


@torch.no_grad()
def base_tables(model: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tables that methods read: input table `(rows, width)`, head `(rows, hidden_size)` (None where the model has
    none or ties it to the input table) and head bias `(rows,)` or None. No copies are made.

    Raises ValueError for quantized or offloaded tables, and for adapters that keep rows of their own.
    """
    wrapper, model = model, _without_adapter_wrapper(model)
    tensors = vocabulary_tensors(type(model), model.config)
    state = _checked_state(model, tensors)
    _refuse_adapter_biases(wrapper, tensors)
    inputs = [state[name] for name, tensor in tensors.items() if tensor.role == "input" and tensor.dim == 0]
    table = _first_input_table(model, inputs)
    return table, *head_tables(state, tensors, table)


def head_tables(
    state: dict[str, Tensor], tensors: dict[str, VocabularyTensor], table: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The head that is not tied to `table`, and the bias, each or None, among tensors by name."""
    heads = [state[name] for name, tensor in tensors.items() if tensor.role == "head" and name in state]
    heads = [head for head in heads if head.data_ptr() != table.data_ptr()]
    biases = [state[name] for name, tensor in tensors.items() if tensor.role == "bias" and name in state]
    return (heads[0] if heads else None), (biases[0].flatten() if biases else None)


@torch.no_grad()
def new_vocabulary_tensor(
    tensor: Tensor, kind: VocabularyTensor, matrix: TransplantMatrix, *, as_input: bool = False
) -> Tensor:
    """A tensor for the new vocabulary, in the dtype and on the device of the base's.

    Ids without a token get the mean of all others' rows, whose logit is at most the mean logit: it cannot win, and
    since exp(mean) <= mean(exp) each takes at most the average token's share of the probability. Where there is a bias,
    theirs is so low that the share is nothing.

    Args:
        tensor: the base's, with `matrix.base_rows` slices along `kind.dim`.
        as_input: whether a head takes the combinations of the input table, as it must where the two are tied.
    """
    moved = tensor.movedim(kind.dim, 0)
    if len(moved) != matrix.base_rows:
        raise ValueError(f"the matrix was made for tables of {matrix.base_rows} rows, this one has {len(moved)}")
    rows = moved.reshape(len(moved), -1)
    padding = padding_ids(matrix).to(rows.device)
    if kind.role == "bias":
        new = torch.stack([matrix.apply_bias(column) for column in rows.unbind(1)], 1)
        new[padding] = NEVER
    else:
        new = matrix.apply(rows, head=kind.role == "head" and not as_input)
        if len(padding):
            real = torch.ones(len(new), dtype=torch.bool, device=new.device)
            real[padding] = False
            new[padding] = new[real].mean(0, dtype=torch.promote_types(new.dtype, torch.float32)).to(new.dtype)
    return new.reshape(len(new), *moved.shape[1:]).movedim(0, kind.dim).contiguous()


@torch.no_grad()
def transplant_tables(model: Any, matrix: TransplantMatrix, token_ids: TokenIds) -> Any:
    """Give a model the new vocabulary, in place: tables, heads, biases, configuration and generation settings.

    Tied tensors stay one tensor, untied ones stay two; nothing else of the model changes, but for position rows of
    RoBERTa's kind, which are counted from the padding id and move with it.

    Args:
        model: a `PreTrainedModel`, plain, quantized (its tables are not), or a PEFT model whose adapter leaves the
            tables alone.

    Returns:
        The model.

    Raises:
        ValueError: tables of another size than the matrix was made for, quantized or offloaded; an adapter with rows of
            its own; an id in the configuration without a counterpart.
    """
    plain = _without_adapter_wrapper(model)
    tensors = vocabulary_tensors(type(plain), plain.config)
    state = _checked_state(plain, tensors)
    _refuse_adapter_biases(model, tensors)
    config, shifts = updated_config(type(plain), plain.config, matrix, token_ids)
    generation_config = None
    if getattr(plain, "generation_config", None) is not None:
        biased = any(tensor.role == "bias" for tensor in tensors.values())
        generation_config = updated_generation_config(plain.generation_config, token_ids, suppress=not biased)

    made: dict[int, Tensor] = {}
    inputs = {id(state[name]) for name, tensor in tensors.items() if tensor.role == "input"}
    for name, tensor in tensors.items():
        old = state[name]
        if id(old) not in made:
            new = new_vocabulary_tensor(old.detach(), tensor, matrix, as_input=id(old) in inputs)
            made[id(old)] = _like(old, new)
    for name, shift in shifts.items():
        made[id(state[name])] = _like(state[name], shifted_positions(state[name].detach(), shift))
    # Only now, when nothing can fail any more.
    for name in (*tensors, *shifts):
        _assign(plain, name, made[id(state[name])])
    _copy_settings(plain, skeleton(type(plain), plain.config), skeleton(type(plain), config))
    _replace_config(plain, config)
    if generation_config is not None:
        plain.generation_config = generation_config
    return model


def updated_config(
    model_class: type[Any] | None, config: Any, matrix: TransplantMatrix, token_ids: TokenIds
) -> tuple[Any, dict[str, int]]:
    """A model's configuration for the new vocabulary: its size, and every token id.

    model_class: None for one that is known to count no positions from the padding id.

    Raises ValueError where the configuration's size is not the matrix's, and for an id (such as an image marker's) that
    no new token stands for.

    Returns:
        config: a changed copy.
        shifts: of position tables whose rows are counted from the padding id (RoBERTa's kind), the names, and by how
            much their rows move because that id changes; see `shifted_positions`.
    """
    found = _vocabulary_size(config)
    if found != matrix.base_rows:
        raise ValueError(f"the matrix was made for a vocabulary of {matrix.base_rows} rows, the model has {found}")
    for role, new_id in token_ids.roles.items():
        if new_id is not None and not 0 <= new_id < len(matrix):
            raise ValueError(f"the new tokenizer's {role} token has the id {new_id}, the tables {len(matrix)} rows")
    new = copy.deepcopy(config)
    _set_sizes(new, len(matrix))
    for part in _parts(new):
        _update_role_ids(part, token_ids)
        _update_other_ids(part, token_ids)
    if model_class is None:
        return new, {}
    roomy = copy.deepcopy(new)  # torch builds no position table that the padding id lies beyond
    if getattr(roomy.get_text_config(), "max_position_embeddings", None) is not None:
        roomy.get_text_config().max_position_embeddings += getattr(roomy.get_text_config(), "pad_token_id", None) or 0
    shifts = _position_shifts(skeleton(model_class, config), skeleton(model_class, roomy))
    if shifts:
        text = new.get_text_config()
        text.max_position_embeddings = text.max_position_embeddings + next(iter(shifts.values()))
    return new, shifts


def updated_generation_config(generation_config: Any, token_ids: TokenIds, *, suppress: bool = True) -> Any:
    """A copy of generation settings for the new vocabulary.

    Args:
        suppress: whether ids without a token are listed in `suppress_tokens`, which `generate` never emits; a head with
            a bias needs no such list.
    """
    settings = copy.deepcopy(generation_config)
    settings.bos_token_id = token_ids.roles["bos"]
    settings.pad_token_id = token_ids.roles["pad"]
    settings.eos_token_id = token_ids.ends_of_text(generation_config.eos_token_id)
    if settings.eos_token_id is None and generation_config.eos_token_id is not None:
        warnings.warn(
            "the new tokenizer has no end-of-text token: generation will end by its length alone; set its eos_token",
            stacklevel=2,
        )
    for name in ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        value = getattr(generation_config, name, None)
        if value is not None:
            role = name.removeprefix("forced_").removesuffix("_token_id")
            translated = (token_ids.translate(id_, role) for id_ in _as_list(value))
            new = [id_ for id_ in translated if id_ is not None]
            setattr(settings, name, (new or None) if isinstance(value, list) else (new[0] if new else None))
    if generation_config.decoder_start_token_id is not None and settings.decoder_start_token_id is None:
        settings.decoder_start_token_id = _decoder_start(token_ids)
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        translated = (token_ids.translate(id_) for id_ in getattr(generation_config, name, None) or [])
        kept = sorted({id_ for id_ in translated if id_ is not None})
        if suppress and name == "suppress_tokens":
            kept = sorted({*kept, *token_ids.padding})
        setattr(settings, name, kept or None)
    _update_sequences(settings, token_ids)
    return settings


def fitting_chat_template(tokenizer: Any, base_tokenizer: Any = None) -> Any:
    """The chat template that a model with the new tokenizer should have: the tokenizer's own; or the base's, if all its
    markers are single tokens of the new tokenizer; or None, with a warning that names the missing ones."""
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.chat_template
    template = getattr(base_tokenizer, "chat_template", None)
    if not template:
        return None
    text = template if isinstance(template, str) else "\n".join(dict(template).values())
    missing = [
        f"{role}_token" for role in _ROLES if f"{role}_token" in text and getattr(tokenizer, f"{role}_token") is None
    ]
    missing += [marker for marker in _markers(text, base_tokenizer) if not _is_single_token(tokenizer, marker)]
    if missing:
        warnings.warn(
            f"the base's chat template is not kept: {', '.join(map(repr, missing))} must each be a single token of the "
            "new tokenizer; give the new tokenizer these, or a chat template of its own",
            stacklevel=2,
        )
        return None
    return template


def shifted_positions(table: Tensor, shift: int) -> Tensor:
    """A position table `(rows, hidden_size)` with `shift` more (or fewer) rows in front, which no position reads."""
    if shift <= 0:
        return table[-shift:].clone()
    return torch.cat([torch.zeros_like(table[:1]).expand(shift, -1), table])


def skeleton(model_class: type[Any], config: Any) -> Any:
    """The model on the meta device: all names, shapes and settings, no numbers."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def _position_shifts(old_skeleton: nn.Module, new_skeleton: nn.Module) -> dict[str, int]:
    shifts = {}
    new_modules = dict(new_skeleton.named_modules())
    for name, module in old_skeleton.named_modules():
        old, new = (vars(found).get("padding_idx") for found in (module, new_modules[name]))
        if "position" not in name or old is None or old == new:
            continue
        if not isinstance(module, nn.Embedding) or new is None:
            raise ValueError(
                f"{name} counts positions from the padding id {old}, but that of the new tokenizer is {new}: give the "
                f"new tokenizer a padding token{'' if isinstance(module, nn.Embedding) else f' with the id {old}'}"
            )
        shifts[f"{name}.weight"] = new - old
    return shifts


def _role(model: nn.Module, name: str, shape: torch.Size, dim: int) -> str:
    if shape.numel() == shape[dim]:
        return "bias"
    owner = model.get_submodule(name.rpartition(".")[0])
    return "input" if isinstance(owner, nn.Embedding) else "head"


def _without_adapter_wrapper(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def refuse_adapter(path: str | os.PathLike) -> None:
    """Raises ValueError for a folder that holds a PEFT adapter, not a model."""
    if (Path(path) / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} holds an adapter: merge it into its base first (PEFT's merge_and_unload), or transplant the base "
            "and load the adapter onto the result, if it has no embeddings, head or head bias of its own"
        )


def _refuse_adapter_biases(model: Any, tensors: dict[str, VocabularyTensor]) -> None:
    """An adapter that trains all biases stores the head's, which has one number per old token."""
    trains_all = any(
        getattr(settings, "bias", None) == "all" for settings in getattr(model, "peft_config", {}).values()
    )
    if trains_all and any(tensor.role == "bias" for tensor in tensors.values()):
        name = next(name for name, tensor in tensors.items() if tensor.role == "bias")
        raise ValueError(
            f"{name} is trained by an adapter (bias='all'), which keeps rows of the old vocabulary: merge the adapter "
            "first (merge_and_unload()), or train it again without the embeddings and the head"
        )


def _checked_state(model: Any, tensors: dict[str, VocabularyTensor]) -> dict[str, Tensor]:
    """Parameters and buffers by name, among them all vocabulary tensors, each a plain one of the size that the
    configuration says."""
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    missing = [name for name in tensors if name not in state]
    if missing:
        raise ValueError(
            f"{missing[0]} is wrapped by an adapter, which keeps rows of the old vocabulary: merge the adapter first "
            "(merge_and_unload()), or train it again without the embeddings and the head"
        )
    for name, tensor in tensors.items():
        found = state[name]
        if not found.is_floating_point():
            raise ValueError(
                f"{name} is quantized ({found.dtype}); expected floating-point numbers: load the base with the "
                "embeddings and the head in full precision (llm_int8_skip_modules), or dequantize it first"
            )
        if found.is_meta:
            raise ValueError(f"{name} is offloaded: load the model without offloading its tables")
        if found.shape[tensor.dim] != _vocabulary_size(model.config):
            size = _vocabulary_size(model.config)
            raise ValueError(f"{name} has {found.shape[tensor.dim]} rows, but the configuration's vocab_size is {size}")
    return state


def _first_input_table(model: Any, tables: list[Tensor]) -> Tensor:
    try:
        table = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        table = None
    known = {candidate.data_ptr() for candidate in tables}
    if table is not None and table.data_ptr() in known:
        return table
    if not tables:
        raise ValueError(f"{type(model).__name__} has no input embedding table (nn.Embedding)")
    return tables[0]


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


def _copy_settings(model: nn.Module, old_skeleton: nn.Module, new_skeleton: nn.Module) -> None:
    """Numbers that modules keep as plain attributes, and the buffers of constants that are not stored, where the two
    skeletons differ."""
    modules, new_modules = dict(model.named_modules()), dict(new_skeleton.named_modules())
    for name, old in old_skeleton.named_modules():
        for attribute, value in vars(old).items():
            new = vars(new_modules[name]).get(attribute)
            if isinstance(value, int | None) and isinstance(new, int | None) and new != value:
                setattr(modules[name], attribute, new)
        for attribute in ("position_ids", "token_type_ids"):  # of RoBERTa's kind: counted, and zeros
            value = new_modules[name]._buffers.get(attribute)
            if value is not None and value.shape != old._buffers[attribute].shape:
                present = modules[name]._buffers[attribute]
                count = torch.arange(value.shape[-1], device=present.device, dtype=present.dtype)
                setattr(modules[name], attribute, (count if attribute == "position_ids" else count * 0).expand(1, -1))


def _replace_config(model: nn.Module, config: Any) -> None:
    """The configuration's fields, in the objects that the modules share."""
    for part, updated in zip(_parts(model.config), _parts(config)):
        for name, value in vars(updated).items():
            old = vars(part).get(name)
            if not hasattr(value, "to_dict") and (old is not value) and old != value:
                setattr(part, name, value)


def _parts(config: Any) -> list[Any]:
    """The configuration and, of models for more than text, the part that describes the text model."""
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def _vocabulary_size(config: Any) -> int:
    size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(f"the configuration {type(config).__name__} has no vocab_size: the model reads no tokens")
    for name in _SIZE_FIELDS[1:]:
        other = getattr(config.get_text_config(), name, None)
        if other is not None and other != size:
            raise ValueError(f"the model has two vocabularies: vocab_size is {size}, {name} {other}; expected one")
    return size


def _set_sizes(config: Any, size: int) -> None:
    for part in _parts(config):
        for name in _SIZE_FIELDS:
            if getattr(part, name, None) is not None:
                setattr(part, name, size)


def _role_ids(tokenizer: Any) -> dict[str, int | None]:
    return {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}


def _copied_ids(matrix: TransplantMatrix) -> dict[int, int]:
    kinds, rows = matrix.kinds, matrix.input
    single = (rows.lengths == 1) & (rows.dense_positions < 0)
    for_tokens = (kinds == SourceKind.COPIED) | (kinds == SourceKind.SPECIAL) | (kinds == SourceKind.MAPPED)
    new_ids = (single & for_tokens).nonzero()[:, 0]
    base_ids = rows.base_ids[rows.offsets[new_ids]].tolist()
    copied: dict[int, int] = {}
    for new_id, base_id in zip(new_ids.tolist(), base_ids):
        copied.setdefault(base_id, new_id)
    return copied


def _as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list | tuple) else [ids]


def _update_role_ids(config: Any, token_ids: TokenIds) -> None:
    for role, new in token_ids.roles.items():
        name = f"{role}_token_id"
        old = getattr(config, name, None)
        if old is None and role not in ("bos", "eos", "pad"):
            continue
        setattr(config, name, token_ids.ends_of_text(old) if role == "eos" else new)


def _update_other_ids(config: Any, token_ids: TokenIds) -> None:
    roles = {f"{role}_token_id" for role in _ROLES}
    for name, value in list(vars(config).items()):
        if name in roles or not name.endswith(("_token_id", "_token_index")) or not isinstance(value, int):
            continue
        if value < 0:  # a mark in the inputs that is no token
            continue
        new = token_ids.translate(value)
        if new is None and name == "decoder_start_token_id":
            new = _decoder_start(token_ids)
        if new is None and name.startswith("forced_"):
            setattr(config, name, None)
            continue
        if new is None:
            raise ValueError(
                f"the configuration's {name} is {value}, but no token of the new tokenizer is a copy of that one: add "
                "the token to the new tokenizer, or map it with special_map"
            )
        setattr(config, name, new)


def _decoder_start(token_ids: TokenIds) -> int:
    for role in ("bos", "cls", "pad", "eos"):
        if token_ids.roles.get(role) is not None:
            return token_ids.roles[role]  # type: ignore[return-value]
    raise ValueError("a decoder needs a first token: the new tokenizer has none of bos, cls, pad and eos")


def _update_sequences(settings: Any, token_ids: TokenIds) -> None:
    """Settings made of sequences of ids: kept where every id has a counterpart."""
    for name in _SEQUENCE_FIELDS:
        sequences = getattr(settings, name, None)
        if sequences:
            new = [[token_ids.translate(id_) for id_ in sequence] for sequence in sequences]
            new = [sequence for sequence in new if None not in sequence]
            _warn_of_lost(name, len(sequences) - len(new))
            setattr(settings, name, new or None)
    if getattr(settings, "sequence_bias", None):
        pairs = settings.sequence_bias
        pairs = pairs.items() if isinstance(pairs, dict) else pairs
        new_pairs = [[[token_ids.translate(id_) for id_ in sequence], value] for sequence, value in pairs]
        new_pairs = [pair for pair in new_pairs if None not in pair[0]]
        _warn_of_lost("sequence_bias", len(pairs) - len(new_pairs))
        settings.sequence_bias = new_pairs or None


def _warn_of_lost(name: str, count: int) -> None:
    if count:
        warnings.warn(f"{count} entries of the generation setting {name} use tokens that no longer exist", stacklevel=3)


def _markers(template: str, base_tokenizer: Any) -> list[str]:
    """What the template writes that is a single token of the base."""
    added = {str(token) for token in base_tokenizer.get_added_vocab()}
    literal = {token for token in added if token in template}
    literal |= {found for found in _MARKER.findall(template) if _is_single_token(base_tokenizer, found)}
    return sorted(literal)


def _is_single_token(tokenizer: Any, text: str) -> bool:
    return len(tokenizer.encode(text, add_special_tokens=False)) == 1
