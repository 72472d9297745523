"""Mistral-SPLADE: sparse retrieval vectors from a Mistral language model that reads the text twice."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_mistral_splade import MistralSpladeConfig as MistralSpladeConfig
    from .modeling_mistral_splade import MistralSpladeForMaskedLM as MistralSpladeForMaskedLM
    from .modeling_mistral_splade import MistralSpladeForRetrieval as MistralSpladeForRetrieval
    from .modeling_mistral_splade import MistralSpladeModel as MistralSpladeModel
    from .processing_mistral_splade import MistralSpladeProcessor as MistralSpladeProcessor

_LAZY = {
    "MistralSpladeConfig": ".configuration_mistral_splade",
    "MistralSpladeForMaskedLM": ".modeling_mistral_splade",
    "MistralSpladeForRetrieval": ".modeling_mistral_splade",
    "MistralSpladeModel": ".modeling_mistral_splade",
    "MistralSpladeProcessor": ".processing_mistral_splade",
}

__all__ = list(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)
