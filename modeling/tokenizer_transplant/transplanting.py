"""Give a pretrained model another tokenizer: one call, `transplant_tokenizer`, around a registry of methods.

A method is a function from a `TransplantContext` (and its own keyword options) to a `TransplantMatrix` with one row per
target: per token of the new tokenizer that no token of the base matches. Matching, special roles, fallbacks, mixing and
the report are written here once, for all of them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .token_bytes import Vocabulary
from .transplant_matrix import TransplantMatrix

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
    """The names that `transplant_tokenizer(method=…)` knows."""
    return [*METHODS, *_OWN_METHODS]


def find_method(name: str) -> Method:
    """The method of that name. Raises ValueError that lists the known ones."""
    if name in _OWN_METHODS:
        return _OWN_METHODS[name]
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(method_names())}")
    return getattr(importlib.import_module(f".{METHODS[name]}", __package__), name)


def run_method(context: TransplantContext, name: str, options: Mapping[str, Any]) -> TransplantMatrix:
    """The method's rows for `context.targets`, checked. Raises ValueError for options that the method does not have."""
    method = find_method(name)
    accepted = [
        parameter.name
        for parameter in inspect.signature(method).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(f"method {name!r} has no option {', '.join(unknown)}; it has: {', '.join(accepted) or 'none'}")
    matrix = method(context, **options)
    if len(matrix) != len(context.targets) or matrix.base_rows != context.base_rows:
        raise ValueError(
            f"method {name!r} returned {len(matrix)} rows over {matrix.base_rows} base rows; expected "
            f"{len(context.targets)} over {context.base_rows}"
        )
    return matrix
