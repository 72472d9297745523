"""Give a pretrained model another tokenizer: one call, `transplant_tokenizer`, around a registry of methods.

A method is a function from a `TransplantContext` (and its own keyword options) to a `TransplantMatrix` with one row per
target: per token of the new tokenizer that no token of the base matches. Matching, special roles, fallbacks, mixing and
the report are written here once, for all of them.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from .auxiliary_vectors import as_auxiliary_vectors
from .table_surgery import TokenIds, base_tables, fitting_chat_template, refuse_adapter, transplant_tables
from .token_bytes import Matches, Vocabulary, match_vocabularies
from .transplant_matrix import CombinationRows, SourceKind, TransplantMatrix, blend, concatenate
from .transplant_report import REPORT_NAME, TransplantReport, as_json

Method = Callable[..., TransplantMatrix]

# name -> the sibling module that defines a function of that name; imported when the method is asked for
METHODS: dict[str, str] = {
    "tokenadapt": "methods_subword",
    "retok": "methods_subword",
    "fvt": "methods_subword",
    "subword": "methods_subword",
    "mapping": "methods_subword",
    "normal": "methods_statistical",
    "mean": "methods_statistical",
    "zero": "methods_statistical",
    "randn": "methods_statistical",
    "john_hewitt": "methods_statistical",
    "mean_resizing": "methods_statistical",
    "omp": "methods_donor",
    "common_interpolation": "methods_donor",
    "landmark_pca": "methods_donor",
    "stb": "methods_donor",
    "mp_rope": "methods_donor",
    "focus": "methods_auxiliary",
    "wechsel": "methods_auxiliary",
    "ofa": "methods_auxiliary",
    "clp": "methods_auxiliary",
}
_OWN_METHODS: dict[str, Method] = {}

# compatibility -> (matching rule, what fills the rows that the method leaves undefined) of that peer
_PEERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "tokenadapt": ("raw", (("normal", {"per_dimension": False}),)),
    "mergekit": ("normalized", ("zero",)),
    "focus": ("canonical", ("normal",)),
    "wechsel": ("special", ("normal",)),
}
_DEFAULT_FALLBACK = ("retok", "mean")
# WECHSEL computes a row for every token, and copies only special ones.
_OWN_RULES = {"wechsel": "special"}
# Types that are checked before a method starts, as its signature spells them: what is accepted, and its name.
_PLAIN_TYPES: dict[str, tuple[Any, str]] = {
    "int": (Integral, "an integer"),
    "float": (Real, "a number"),
    "str": (str, "a string"),
    "bool": (bool, "True or False"),
    "None": (type(None), "None"),
}
_MADE = (SourceKind.MAPPED, SourceKind.COMBINED, SourceKind.DENSE)


@dataclass(frozen=True)
class TransplantContext:
    """What a method may use.

    base, new: the two vocabularies (`Vocabulary`: tokens, bytes, texts, pieces).
    input_table: the base's input table, `(base rows, hidden_size)`; there may be more rows than `base.size` (padding),
        and also fewer.
    head_table: the base's head, of the same shape, or None where it has none or shares the input table.
    matched: `(new.size,)` int64, the base id whose row a new id copies, -1 for the others.
    targets: `(n,)` int64, ascending, the new ids for which the method is asked.
    donor_input, donor_head: the tables of a model that speaks the new tokenizer, `(≥ new.size, its hidden_size)`.
    auxiliary: what the caller gave as `auxiliary`: vectors of another space.
    compatibility: the peer whose results are to be reproduced, defects included, or None.
    seed: of all draws.
    notes: figures that a method adds for the report.
    """

    base: Vocabulary
    new: Vocabulary
    input_table: Tensor
    head_table: Tensor | None
    matched: Tensor
    targets: Tensor
    donor_input: Tensor | None = None
    donor_head: Tensor | None = None
    auxiliary: Any = None
    compatibility: str | None = None
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def base_rows(self) -> int:
        return len(self.input_table)

    @property
    def anchors(self) -> tuple[Tensor, Tensor]:
        """Matched tokens, which both vocabularies know: their new ids, ascending, and their base ids, `(n,)` int64."""
        new_ids = (self.matched >= 0).nonzero()[:, 0]
        return new_ids, self.matched[new_ids]

    def with_targets(self, targets: Tensor) -> TransplantContext:
        return replace(self, targets=targets)

    def generator(self) -> torch.Generator:
        """A generator at the start of the caller's seed."""
        return torch.Generator().manual_seed(self.seed)

    def require_donor(self, method: str) -> tuple[Tensor, Tensor | None]:
        """The donor's input table and head (None where it shares the input table). Raises ValueError without donor."""
        if self.donor_input is None:
            raise ValueError(f"method {method!r} needs donor=: a model (or its folder) that uses the new tokenizer")
        return self.donor_input, self.donor_head

    def require_auxiliary(self, method: str) -> Any:
        """What the caller gave as `auxiliary`. Raises ValueError if it is None."""
        if self.auxiliary is None:
            raise ValueError(
                f"method {method!r} needs auxiliary=: {{string: vector}}, an encoder, a fastText-like object or a "
                "safetensors table with its JSON strings"
            )
        return self.auxiliary


def register_method(name: str, method: Method) -> None:
    """Make a method of your own known under a name: a function `(context, *, own options) -> TransplantMatrix` that
    returns one row per `context.targets`. Raises ValueError for a name that is taken."""
    if name in METHODS or name in _OWN_METHODS:
        raise ValueError(f"there is already a method {name!r}")
    _OWN_METHODS[name] = method


def method_names() -> list[str]:
    """The names that `transplant_tokenizer(method=…)` knows; `help(find_method(name))` shows the options of one."""
    return [*METHODS, *_OWN_METHODS]


def find_method(name: str) -> Method:
    """The method of that name; its docstring tells its options. Raises ValueError that lists the known ones."""
    if name in _OWN_METHODS:
        return _OWN_METHODS[name]
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(method_names())}")
    return getattr(importlib.import_module(f".{METHODS[name]}", __package__), name)


def run_method(context: TransplantContext, name: str, options: Mapping[str, Any]) -> TransplantMatrix:
    """The method's rows for `context.targets`, checked. Raises ValueError for options that the method does not have or
    needs and does not get."""
    method = _checked_method(name, options)
    matrix = method(context, **options)
    if len(matrix) != len(context.targets) or matrix.base_rows != context.base_rows:
        raise ValueError(
            f"method {name!r} returned {len(matrix)} rows over {matrix.base_rows} base rows; expected "
            f"{len(context.targets)} over {context.base_rows}"
        )
    return matrix


def _checked_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of that name, if the options fit it."""
    method = find_method(name)
    own = [
        parameter
        for parameter in inspect.signature(method).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    accepted = [parameter.name for parameter in own]
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(f"method {name!r} has no option {', '.join(unknown)}; it has: {', '.join(accepted) or 'none'}")
    missing = [
        parameter.name for parameter in own if parameter.default is parameter.empty and parameter.name not in options
    ]
    if missing:
        raise ValueError(f"method {name!r} needs the option {' and '.join(missing)}")
    _check_types(method, options)
    return method


# --- combinators ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MethodMix:
    """Rows of several methods, added up with weights: see `mix`."""

    parts: tuple[tuple[str, Mapping[str, Any], float], ...]

    def __str__(self) -> str:
        return " + ".join(f"{weight:g} {name}" for name, _, weight in self.parts)


def mix(parts: Sequence[tuple[Any, float]]) -> MethodMix:
    """A method from others: `mix([("omp", 0.5), (("tokenadapt", {"top_k": 5}), 0.5)])`.

    parts: pairs of a method (its name, or its name and its options) and a weight that is not negative. Weights are
        normalised, in every row over the parts that define it.
    """
    try:
        named = [(*_named_method(method), float(weight)) for method, weight in parts]
    except (TypeError, ValueError) as error:
        raise TypeError(f"a mix needs pairs (method, weight), found {parts!r}: {error}") from error
    if not all(0 <= weight < math.inf for *_, weight in named) or not sum(weight for *_, weight in named) > 0:
        raise ValueError(
            f"a mix needs methods with finite weights that are not negative, and not all zero: {list(parts)}"
        )
    return MethodMix(tuple(named))


def _named_method(method: Any) -> tuple[str, Mapping[str, Any]]:
    """A method as (name, options)."""
    if isinstance(method, str):
        return method, {}
    if isinstance(method, (tuple, list)) and len(method) == 2 and isinstance(method[1], Mapping):
        return str(method[0]), dict(method[1])
    raise TypeError(f"a method is a name or a pair (name, {{option: value}}), found {method!r}")


def _run(context: TransplantContext, method: str | MethodMix, options: Mapping[str, Any]) -> TransplantMatrix:
    if isinstance(method, str):
        return run_method(context, method, options)
    if options:
        raise ValueError(f"give options to the methods of the mix; found {', '.join(sorted(options))} beside it")
    return blend([(run_method(context, name, own), weight) for name, own, weight in method.parts])


# --- the matrix -------------------------------------------------------------------------------------------------------


def plan_transplant(
    base_tokenizer: Any,
    new_tokenizer: Any,
    input_table: Tensor,
    head_table: Tensor | None = None,
    method: str | MethodMix = "tokenadapt",
    *,
    donor_tables: tuple[Tensor, Tensor | None] | None = None,
    auxiliary: Any = None,
    match: str | None = None,
    compatibility: str | None = None,
    special_map: Mapping[str, str] | None = None,
    fallback: Sequence[Any] | None = None,
    prefix_match: str = "no",
    byte_match: str = "no",
    magikarp: bool = False,
    rescale: str = "none",
    new_vocab_noise: float = 0.0,
    new_vocab_scale: float = 1.0,
    pad_to_multiple_of: int = 1,
    seed: int = 0,
    **options: Any,
) -> tuple[TransplantMatrix, TransplantReport]:
    """The transplant matrix and its report, from tokenizers and tables alone: nothing is changed, no model is needed.

    input_table, head_table: `(base rows, hidden_size)`; head_table is None where there is no head, or it is tied.
    donor_tables: input table and head of the donor, `(its rows, its hidden_size)`.
    Other arguments and errors: as `transplant_tokenizer`.
    """
    simple = {"prefix_match": prefix_match, "byte_match": byte_match, "magikarp": magikarp, "rescale": rescale}
    simple |= {"new_vocab_noise": new_vocab_noise, "new_vocab_scale": new_vocab_scale, "seed": seed}
    _check_types(plan_transplant, {**simple, "match": match, "compatibility": compatibility})
    _check_arguments(compatibility, rescale, pad_to_multiple_of, seed)
    if isinstance(fallback, str):
        raise TypeError(f"fallback must be a list of methods, found {fallback!r}: write [{fallback!r}]")
    if not isinstance(fallback, Sequence | None):
        raise TypeError(f"fallback must be a list of methods, found {fallback!r}")
    if not isinstance(special_map, Mapping | None):
        raise TypeError(f"special_map must be {{new token: base token}}, found {special_map!r}")
    if not (0 <= new_vocab_noise < math.inf and math.isfinite(new_vocab_scale)):
        raise ValueError(
            f"new_vocab_noise must be a number that is not negative, new_vocab_scale a number; found {new_vocab_noise} "
            f"and {new_vocab_scale}"
        )
    base, new = Vocabulary(base_tokenizer), Vocabulary(new_tokenizer)
    if head_table is not None and head_table.shape != input_table.shape:
        raise ValueError(f"the head has shape {tuple(head_table.shape)}, the input table {tuple(input_table.shape)}")
    _check_donor(donor_tables, new)
    peer_rule, peer_fallback = _PEERS.get(compatibility or "", ("bytes", _DEFAULT_FALLBACK))
    chain = _chain(method, options, peer_fallback if fallback is None else fallback)
    rule = match or (_OWN_RULES.get(method, peer_rule) if isinstance(method, str) else peer_rule)
    matches = match_vocabularies(
        base, new, len(input_table), rule=rule, special_map=special_map, compatibility=compatibility
    )
    donor_input, donor_head = donor_tables or (None, None)
    context = TransplantContext(
        base=base,
        new=new,
        input_table=input_table,
        head_table=head_table,
        matched=matches.base_ids,
        targets=torch.empty(0, dtype=torch.int64),
        donor_input=donor_input,
        donor_head=donor_head,
        # Once for all methods: an encoder encodes no string twice.
        auxiliary=None if auxiliary is None else as_auxiliary_vectors(auxiliary),
        compatibility=compatibility,
        seed=seed,
    )
    if method == "mapping":
        context, matches = _without_mapped(context, matches, options)
    zeroed = torch.empty(0, dtype=torch.int64)
    if magikarp:
        context, matches, zeroed = _well_trained(context, matches)
    partial = {"prefix_match": prefix_match, "byte_match": byte_match}
    if magikarp:
        partial["base_ids"] = context.anchors[1]
    matrix = _matrix(context, matches, chain, pad_to_multiple_of, zeroed, partial)
    if head_table is None:  # a head that is tied, with its bias, has the rows of the input table
        matrix = replace(matrix, head=None)
    if rescale == "mean_norm":
        matrix = _rescaled(matrix, context)
    if new_vocab_noise or new_vocab_scale != 1:
        matrix = _perturbed(matrix, context, new_vocab_noise, new_vocab_scale)
    settings = {
        "match": rule,
        "special_map": dict(special_map or {}),
        "auxiliary": as_json(auxiliary)
        if isinstance(auxiliary, (str, os.PathLike, type(None)))
        else type(auxiliary).__name__,
        "prefix_match": prefix_match,
        "byte_match": byte_match,
        "magikarp": magikarp,
        "rescale": rescale,
        "new_vocab_noise": new_vocab_noise,
        "new_vocab_scale": new_vocab_scale,
        "pad_to_multiple_of": pad_to_multiple_of,
    }
    provenance = _provenance(context, matrix, chain, settings)
    return matrix, TransplantReport(provenance, matrix, base, new, context.notes)


def _chain(method: Any, options: Mapping[str, Any], fallback: Sequence[Any]) -> list[tuple[Any, Mapping[str, Any]]]:
    """The method and its fallbacks, with their options; all are checked, also where no row needs them."""
    if not isinstance(method, str | MethodMix):
        raise TypeError(f"method must be a name or a mix, found {method!r}; its options are arguments of the call")
    chain = [(method, options), *map(_named_method, fallback)]
    for member, own in chain:
        for name, given in [part[:2] for part in member.parts] if isinstance(member, MethodMix) else [(member, own)]:
            _checked_method(name, given)
    return chain


def _provenance(
    context: TransplantContext,
    matrix: TransplantMatrix,
    chain: Sequence[tuple[Any, Mapping[str, Any]]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Plain JSON that tells how the matrix was made."""
    (method, options), *fallback = chain
    return {
        "format": 1,
        "method": str(method),
        "options": as_json([list(part) for part in method.parts] if isinstance(method, MethodMix) else options),
        "fallback": as_json([[name, own] if own else name for name, own in fallback]),
        "compatibility": context.compatibility,
        **settings,
        "seed": context.seed,
        "base_rows": context.base_rows,
        "rows": len(matrix),
        "tokens": len(context.new.used_ids),
        "counts": matrix.counts(),
        "base_tokenizer_sha256": context.base.fingerprint,
        "new_tokenizer_sha256": context.new.fingerprint,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
    }


def _check_types(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that is not of the plain type which the function's signature tells."""
    for name, value in values.items():
        names = str(inspect.signature(function).parameters[name].annotation).split(" | ")
        if not set(names) <= _PLAIN_TYPES.keys():
            continue
        kinds = tuple(_PLAIN_TYPES[name][0] for name in names)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            words = " or ".join(_PLAIN_TYPES[name][1] for name in names)
            raise ValueError(f"{name} must be {words}, found {value!r}")


def _check_arguments(compatibility: str | None, rescale: str, pad_to_multiple_of: int, seed: int) -> None:
    if compatibility is not None and compatibility not in _PEERS:
        raise ValueError(f"compatibility must be None or one of {', '.join(_PEERS)}; found {compatibility!r}")
    if rescale not in ("none", "mean_norm"):
        raise ValueError(f"rescale must be 'none' or 'mean_norm', found {rescale!r}")
    check_count("pad_to_multiple_of", pad_to_multiple_of)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie between 0 and 2**63 - 1, found {seed}")


def check_count(name: str, value: Any) -> None:
    """Raises ValueError for what is no integer from 1 on."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, found {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, found {value}")


def _check_donor(tables: tuple[Tensor, Tensor | None] | None, new: Vocabulary) -> None:
    if tables is None:
        return
    table_like = [torch.is_tensor(table) and table.dim() == 2 for table in tables]
    if len(tables) != 2 or not (table_like[0] and (table_like[1] or tables[1] is None)):
        raise TypeError(
            "the donor's tables must be (input table, head or None), each of the shape (rows, hidden_size); found "
            f"({', '.join(str(tuple(getattr(table, 'shape', (type(table).__name__,)))) for table in tables)})"
        )
    for table in tables:
        if table is not None and len(table) < new.size:
            raise ValueError(
                f"the donor's tables have {len(table)} rows, but the new tokenizer has ids up to {new.size - 1}: the "
                "donor must be a model that uses the new tokenizer"
            )


def _without_mapped(
    context: TransplantContext, matches: Matches, options: Mapping[str, Any]
) -> tuple[TransplantContext, Matches]:
    """What the caller maps is not copied, even where the base has the same token."""
    _checked_method("mapping", options)
    resolve = importlib.import_module(".methods_subword", __package__).resolved_mapping
    mapped = torch.tensor(sorted(resolve(context, **options)), dtype=torch.int64)
    base_ids, kinds = matches.base_ids.clone(), matches.kinds.clone()
    base_ids[mapped], kinds[mapped] = -1, int(SourceKind.UNDEFINED)
    matches = Matches(base_ids, kinds, matches.without_row)
    return replace(context, matched=base_ids), matches


def _well_trained(context: TransplantContext, matches: Matches) -> tuple[TransplantContext, Matches, Tensor]:
    """Without matches that either model has hardly trained, and the new ids whose rows are zeros."""
    trained = importlib.import_module(".methods_donor", __package__).well_trained_matches(context)
    kinds = torch.where(trained.matched >= 0, matches.kinds, int(SourceKind.UNDEFINED)).to(torch.uint8)
    context.notes["matches that were hardly trained"] = int((context.matched != trained.matched).sum())
    matches = Matches(trained.matched, kinds, matches.without_row)
    return replace(context, matched=trained.matched), matches, trained.zeroed


def _matrix(
    context: TransplantContext,
    matches: Matches,
    chain: Sequence[tuple[Any, Mapping[str, Any]]],
    multiple: int,
    zeroed: Tensor,
    partial: Mapping[str, Any],
) -> TransplantMatrix:
    """All rows: copies and zeros, then each method of the chain for the rows that are still undefined, the first with
    partial matches before it, then padding."""
    rows = -(-context.new.size // multiple) * multiple
    copies = TransplantMatrix.copies(matches.base_ids, context.base_rows)
    matrix = TransplantMatrix(matches.kinds, copies.input, context.base_rows)
    used = torch.zeros(context.new.size, dtype=torch.bool)
    used[torch.tensor(context.new.used_ids)] = True
    padding = (~used).nonzero()[:, 0]
    matrix = matrix.replaced(zeroed, TransplantMatrix.constant(len(zeroed), context.base_rows, SourceKind.ZERO))
    matrix = matrix.replaced(padding, _padding(len(padding), context))
    rows_by_method: dict[str, int] = {}
    for number, (method, options) in enumerate(chain):
        targets = matrix.undefined()
        if len(targets):
            asked = context.with_targets(targets)
            found = _run(asked, method, options)
            if number == 0 and (partial["prefix_match"], partial["byte_match"]) != ("no", "no"):
                donor_methods = importlib.import_module(".methods_donor", __package__)
                found = donor_methods.with_partial_matches(found, donor_methods.partial_matches(asked, **partial))
            matrix = matrix.replaced(targets, found)
            rows_by_method[str(method)] = len(targets) - len(found.undefined())
    undefined = matrix.undefined().tolist()
    if undefined:
        names = ", ".join(repr(context.new.tokens[new_id]) for new_id in undefined[:5])
        raise ValueError(
            f"{len(undefined)} tokens, such as {names}, have no row by "
            f"{' or '.join(str(method) for method, _ in chain)}: add 'mean' to fallback"
        )
    context.notes["rows by method"] = rows_by_method
    if matches.without_row:
        context.notes["tokens that the base's tokenizer has but its tables have not"] = len(matches.without_row)
    return concatenate([matrix, _padding(rows - len(matrix), context)])


def _padding(count: int, context: TransplantContext) -> TransplantMatrix:
    return TransplantMatrix.constant(count, context.base_rows, SourceKind.PADDING)


def _made(matrix: TransplantMatrix) -> Tensor:
    """Positions of the rows that a method made, `(n,)` int64."""
    return torch.isin(matrix.kinds, torch.tensor([int(kind) for kind in _MADE], dtype=torch.uint8)).nonzero()[:, 0]


def _rescaled(matrix: TransplantMatrix, context: TransplantContext) -> TransplantMatrix:
    """Rows that a method made, scaled to the mean norm of the base's token rows, in each table."""
    made = _made(matrix)
    part = matrix.select(made)
    ids = torch.tensor([token_id for token_id in context.base.used_ids if token_id < context.base_rows])

    def scaled(rows, table: Tensor):
        # Of the rows in float32: rounded ones would have other norms, and the result would be rounded twice.
        norms = rows.apply(table.detach().float()).norm(dim=1).cpu()
        target = table[ids.to(table.device)].float().norm(dim=1).mean().cpu()
        return rows.scaled(torch.where(norms > 0, target / norms.clamp(min=1e-30), 1.0))

    head = None
    if context.head_table is not None:
        head = scaled(part.rows_for(head=True), context.head_table)
    rescaled = TransplantMatrix(part.kinds, scaled(part.input, context.input_table), part.base_rows, head)
    return matrix.replaced(made, rescaled)


def _perturbed(matrix: TransplantMatrix, context: TransplantContext, noise: float, scale: float) -> TransplantMatrix:
    """Rows that a method made, plus Gaussian noise, then multiplied: independent draws for each table."""
    made = _made(matrix)
    part, generator = matrix.select(made), context.generator()

    def changed(rows: CombinationRows) -> CombinationRows:
        draws = noise * torch.randn(len(rows), context.input_table.shape[1], generator=generator)
        nothing = torch.empty(len(rows), 0)
        noisy = rows.plus(CombinationRows.from_padded(nothing.long(), nothing, draws)) if noise else rows
        return noisy.scaled(torch.full((len(rows),), scale))

    has_head = (context.head_table is not None and bool(noise)) or part.head is not None
    rows = changed(part.input)
    head = changed(part.rows_for(head=True)) if has_head else None
    return matrix.replaced(made, TransplantMatrix(part.kinds, rows, part.base_rows, head))


# --- the call ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TransplantResult:
    """What `transplant_tokenizer` returns.

    model: the model with new tables: the architecture it was, which saves and loads anywhere.
    tokenizer: the new tokenizer.
    report: where every row came from.
    matrix: how every row was made.
    """

    model: Any
    tokenizer: Any
    report: TransplantReport
    matrix: TransplantMatrix

    def save_pretrained(self, folder: str | os.PathLike, **save_options: Any) -> None:
        """Write model, tokenizer and `transplant_report.json` into a new folder, which appears when it is complete.

        save_options: for the model's `save_pretrained`. Raises FileExistsError for a folder that is not empty,
        ValueError for a PEFT model.
        """
        folder = Path(folder)
        if hasattr(self.model, "peft_config"):
            raise ValueError(
                "a PEFT model stores its adapter alone, without the new tables: merge it "
                "(result.model.merge_and_unload()), or transplant the base and load the adapter onto the result"
            )
        if getattr(self.model, "is_quantized", False):  # transformers cannot undo what it did when it loaded one
            save_options.setdefault("save_original_format", False)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} is a file or is not empty: give another folder, or empty it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
            new = Path(beside) / folder.name
            self.model.save_pretrained(new, **save_options)
            self.tokenizer.save_pretrained(new)
            self.report.save(new / REPORT_NAME)
            if folder.exists():
                folder.rmdir()
            new.rename(folder)


def transplant_tokenizer(
    model_or_path: Any,
    new_tokenizer: Any,
    method: str | MethodMix = "tokenadapt",
    *,
    base_tokenizer: Any = None,
    donor: Any = None,
    auxiliary: Any = None,
    match: str | None = None,
    compatibility: str | None = None,
    special_map: Mapping[str, str] | None = None,
    fallback: Sequence[Any] | None = None,
    prefix_match: str = "no",
    byte_match: str = "no",
    magikarp: bool = False,
    rescale: str = "none",
    new_vocab_noise: float = 0.0,
    new_vocab_scale: float = 1.0,
    pad_to_multiple_of: int = 1,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> TransplantResult:
    """Give a pretrained model another tokenizer: new embedding tables and head, everything else untouched.

    Rows of tokens that both tokenizers have are copied bit by bit; the method makes the others. The result is a plain
    model of the same architecture; its configuration holds the provenance as `tokenizer_transplant`.

    Args:
        model_or_path: a `PreTrainedModel`, which is changed in place, or a folder or Hub name to load it from.
        new_tokenizer: a fast tokenizer, a folder or Hub name; or a list of strings, which are added to the base's
            tokenizer (all old ids are kept).
        method: one of `method_names()`, or a `mix`.
        base_tokenizer: the model's present tokenizer; by default it is loaded from where the model came from.
        donor: for methods in the space of another model: a model that uses the new tokenizer, or where to load it; or
            its tables (input table, head or None).
        auxiliary: for methods in the space of an encoder: what `as_auxiliary_vectors` takes.
        match: which tokens are the same: "bytes" (the default), "raw", "normalized", "canonical", "canonical_fuzzy" or
            "special"; see `match_vocabularies`.
        compatibility: "tokenadapt", "mergekit", "focus" or "wechsel" reproduces that peer, its matching, fallback and
            defects included.
        special_map: {new token: base token} whose row it takes, before all other rules.
        fallback: methods (or pairs of one and its options), in order, for rows that the method leaves undefined; by
            default ReTok, then the mean.
        prefix_match, byte_match: "no", "yes", "embed" (input table) or "lm_head" (head): instead of what the method
            makes, the row of the base's longest prefix of the token, or of its single byte.
        magikarp: copy and use only tokens that base and donor have trained well (Fishing for Magikarp, arXiv
            2405.05417); those that neither has become zeros.
        rescale: "none", or "mean_norm": rows that a method made get the mean norm of the base's rows.
        new_vocab_noise, new_vocab_scale: standard deviation of Gaussian noise on the rows that a method made, and then
            their factor.
        pad_to_multiple_of: rows of the new tables are a multiple of it; padding rows are never generated.
        seed: of all draws.
        dtype: in which a model is loaded; by default the checkpoint's.
        trust_remote_code: whether code may be run that a model or tokenizer to be loaded brings.
        options: the method's own: `weight`, `temperature`, `top_k`, `threshold`, `k`, …; `help(find_method("omp"))`
            shows those of OMP.

    Raises:
        ValueError: unknown methods, rules and options; what a method needs and does not get; tables, tokenizers and
            donors that do not fit each other; adapters that saved embeddings; quantized tables.
        TypeError: tokenizers without a fast backend.
    """
    _check_types(transplant_tokenizer, {"trust_remote_code": trust_remote_code})
    model = model_or_path
    if isinstance(model_or_path, (str, os.PathLike)):
        model = _load_model(model_or_path, dtype, trust_remote_code)
    elif not hasattr(model, "config"):
        raise TypeError(f"the model must be a PreTrainedModel, a folder or a Hub name; found {type(model).__name__}")
    if model.config.model_type == "transplanted":  # already once: the plain model in it
        model = model.merge_and_unload()
    base_tokenizer = base_tokenizer_of(base_tokenizer, model_or_path, trust_remote_code)
    tokenizer = new_tokenizer_of(new_tokenizer, base_tokenizer, trust_remote_code)
    input_table, head_table, _ = base_tables(model)
    matrix, report = plan_transplant(
        base_tokenizer,
        tokenizer,
        input_table,
        head_table,
        method,
        donor_tables=donor_tables_of(donor, tokenizer, trust_remote_code),
        auxiliary=auxiliary,
        match=match,
        compatibility=compatibility,
        special_map=special_map,
        fallback=fallback,
        prefix_match=prefix_match,
        byte_match=byte_match,
        magikarp=magikarp,
        rescale=rescale,
        new_vocab_noise=new_vocab_noise,
        new_vocab_scale=new_vocab_scale,
        pad_to_multiple_of=pad_to_multiple_of,
        seed=seed,
        **options,
    )
    finish_tokenizer(tokenizer, base_tokenizer, compatibility)
    model = transplant_tables(model, matrix, TokenIds.of(matrix, tokenizer, base_tokenizer))
    model.config.tokenizer_transplant = report.provenance
    return TransplantResult(model, tokenizer, report, matrix)


def _load_model(path: str | os.PathLike, dtype: torch.dtype | str | None, trust_remote_code: bool) -> Any:
    """The model with the head that the checkpoint names."""
    _check_found(path)
    refuse_adapter(path)
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype must be 'auto' or one of torch's, such as 'bfloat16'; found {dtype!r}")
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    brought = getattr(config, "auto_map", None) or {}
    loading = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
    architectures = config.architectures or []
    for auto_class in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForImageTextToText,
    ):
        known = auto_class._model_mapping.get(type(config), None)
        names = [member.__name__ for member in (known if isinstance(known, (list, tuple)) else [known]) if member]
        names.append(str(brought.get(auto_class.__name__)).rpartition(".")[2])
        if set(names) & set(architectures):
            return auto_class.from_pretrained(path, **loading)
    for name in architectures:  # with a head of another kind, which AutoModel would leave out
        named = getattr(transformers, name, None)
        if named is not None and issubclass(named, transformers.PreTrainedModel):
            return named.from_pretrained(path, dtype=loading["dtype"])
    return transformers.AutoModel.from_pretrained(path, **loading)


def _check_found(source: str | os.PathLike) -> None:
    """Raises FileNotFoundError for a folder that is not there, which would be taken for a bad Hub name."""
    if not Path(source).exists() and (str(source).startswith((".", os.sep)) or isinstance(source, os.PathLike)):
        raise FileNotFoundError(f"there is no folder {source}")


def _load_tokenizer(source: str | os.PathLike, trust_remote_code: bool) -> Any:
    _check_found(source)
    try:
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (ImportError, OSError):
        raise
    except Exception as error:  # the library of tokenizers raises nothing more special
        for path in sorted(Path(source).glob("*.json")):
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise ValueError(f"{path} is damaged or truncated ({error}): download it again") from error
        raise ValueError(f"no tokenizer can be read from {source}: {error}") from error


def base_tokenizer_of(tokenizer: Any, model_or_path: Any, trust_remote_code: bool) -> Any:
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    source = tokenizer or model_or_path
    if not isinstance(source, (str, os.PathLike)):
        source = getattr(model_or_path.config, "_name_or_path", "")
    if not source:
        raise ValueError("the model does not tell where it came from: give its present tokenizer as base_tokenizer")
    return _load_tokenizer(source, trust_remote_code)


def new_tokenizer_of(new_tokenizer: Any, base_tokenizer: Any, trust_remote_code: bool) -> Any:
    """A tokenizer of our own, which may be changed."""
    if isinstance(new_tokenizer, (str, os.PathLike)):
        return _load_tokenizer(new_tokenizer, trust_remote_code)
    if isinstance(new_tokenizer, (list, tuple)):
        if not new_tokenizer or not all(isinstance(token, str | tokenizers.AddedToken) for token in new_tokenizer):
            raise TypeError(f"tokens to be added must be a list of strings, and not empty; found {new_tokenizer!r}")
        extended = copy.deepcopy(base_tokenizer)
        extended.add_tokens(list(new_tokenizer))
        return extended
    return copy.deepcopy(new_tokenizer)


def donor_tables_of(donor: Any, tokenizer: Any, trust_remote_code: bool) -> tuple[Tensor, Tensor | None] | None:
    if donor is None or isinstance(donor, tuple):
        return donor
    if isinstance(donor, (str, os.PathLike)):
        donors_tokenizer = _load_tokenizer(donor, trust_remote_code)
        theirs, ours = donors_tokenizer.get_vocab(), tokenizer.get_vocab()
        differing = [token for token, token_id in ours.items() if theirs.get(token) != token_id]
        if differing:
            raise ValueError(
                f"the donor's tokenizer is not the new one: {len(differing)} tokens differ, such as {min(differing)!r}"
            )
        if any(Path(donor).glob("*.safetensors")):  # its tables alone, mapped into memory
            streaming = importlib.import_module(".checkpoint_streaming", __package__)
            return streaming.StoredCheckpoint.open(donor, trust_remote_code=trust_remote_code).tables()[:2]
        donor = _load_model(donor, None, trust_remote_code)
    if not hasattr(donor, "config"):
        raise TypeError(
            f"donor must be a model, where to load it, or (input table, head or None); found {type(donor).__name__}"
        )
    input_table, head_table, _ = base_tables(donor)
    return input_table.detach(), None if head_table is None else head_table.detach()


def finish_tokenizer(tokenizer: Any, base_tokenizer: Any, compatibility: str | None) -> None:
    if compatibility != "tokenadapt":
        tokenizer.chat_template = fitting_chat_template(tokenizer, base_tokenizer)
        return
    # TokenAdapt borrows missing roles, and takes the old chat template whether or not its markers exist.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.bos_token
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = base_tokenizer.chat_template
