"""ColBERT-XM: multilingual late interaction, one vector per token, from X-MOD with an adapter per language."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_colbert_xm import ColBERTXMConfig as ColBERTXMConfig
    from .modeling_colbert_xm import ColBERTXMForRetrieval as ColBERTXMForRetrieval
    from .modeling_colbert_xm import ColBERTXMModel as ColBERTXMModel
    from .processing_colbert_xm import ColBERTXMProcessor as ColBERTXMProcessor

_LAZY = {
    "ColBERTXMConfig": ".configuration_colbert_xm",
    "ColBERTXMForRetrieval": ".modeling_colbert_xm",
    "ColBERTXMModel": ".modeling_colbert_xm",
    "ColBERTXMProcessor": ".processing_colbert_xm",
}

__all__ = list(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)
