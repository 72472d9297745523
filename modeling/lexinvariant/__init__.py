"""Lexinvariant language model: any vocabulary, invariance to the names of symbols, a transformer's speed."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_lexinvariant import LexinvariantConfig as LexinvariantConfig
    from .modeling_lexinvariant import LexinvariantForCausalLM as LexinvariantForCausalLM
    from .modeling_lexinvariant import LexinvariantModel as LexinvariantModel

_LAZY = {
    "LexinvariantConfig": ".configuration_lexinvariant",
    "LexinvariantForCausalLM": ".modeling_lexinvariant",
    "LexinvariantModel": ".modeling_lexinvariant",
}

__all__ = list(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)
