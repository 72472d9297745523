"""rarezoo: Hugging Face-compatible models that the mainstream libraries leave out.

`import rarezoo` registers every family with transformers' AutoClasses and with PEFT. Classes are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rarezoo.auto import FAMILIES as FAMILIES
from rarezoo.auto import Family as Family
from rarezoo.auto import register as register

if TYPE_CHECKING:
    from rarezoo.colbert_xm import ColBERTXMConfig as ColBERTXMConfig
    from rarezoo.colbert_xm import ColBERTXMForRetrieval as ColBERTXMForRetrieval
    from rarezoo.colbert_xm import ColBERTXMModel as ColBERTXMModel
    from rarezoo.colbert_xm import ColBERTXMProcessor as ColBERTXMProcessor
    from rarezoo.configs import list_presets as list_presets
    from rarezoo.configs import load_preset as load_preset
    from rarezoo.lexinvariant import LexinvariantConfig as LexinvariantConfig
    from rarezoo.lexinvariant import LexinvariantForCausalLM as LexinvariantForCausalLM
    from rarezoo.lexinvariant import LexinvariantModel as LexinvariantModel
    from rarezoo.mistral_splade import MistralSpladeConfig as MistralSpladeConfig
    from rarezoo.mistral_splade import MistralSpladeForMaskedLM as MistralSpladeForMaskedLM
    from rarezoo.mistral_splade import MistralSpladeForRetrieval as MistralSpladeForRetrieval
    from rarezoo.mistral_splade import MistralSpladeModel as MistralSpladeModel
    from rarezoo.mistral_splade import MistralSpladeProcessor as MistralSpladeProcessor
    from rarezoo.tokenizer_transplant import TransplantedConfig as TransplantedConfig
    from rarezoo.tokenizer_transplant import TransplantedForCausalLM as TransplantedForCausalLM
    from rarezoo.tokenizer_transplant import TransplantedForMaskedLM as TransplantedForMaskedLM
    from rarezoo.tokenizer_transplant import TransplantedModel as TransplantedModel

__version__ = "0.1.0"

_LAZY = {"list_presets": "rarezoo.configs", "load_preset": "rarezoo.configs"}
for _family in FAMILIES.values():
    for _name in (_family.config, _family.base_model, *_family.auto_classes.values(), _family.processor):
        if _name:
            _LAZY[_name] = f"rarezoo.{_family.name}"

__all__ = ["FAMILIES", "Family", "register", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'rarezoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
