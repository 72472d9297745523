"""Tokenizer transplantation: give a pretrained model another tokenizer, by any of the known methods."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .auxiliary_vectors import as_auxiliary_vectors as as_auxiliary_vectors
    from .checkpoint_streaming import transplant_checkpoint as transplant_checkpoint
    from .configuration_tokenizer_transplant import TransplantedConfig as TransplantedConfig
    from .modeling_tokenizer_transplant import TransplantedForCausalLM as TransplantedForCausalLM
    from .modeling_tokenizer_transplant import TransplantedForMaskedLM as TransplantedForMaskedLM
    from .modeling_tokenizer_transplant import TransplantedModel as TransplantedModel
    from .supertokens import ChunkLengths as ChunkLengths
    from .supertokens import compare_tokenizers as compare_tokenizers
    from .supertokens import draw_comparison as draw_comparison
    from .supertokens import encode_long_text as encode_long_text
    from .supertokens import read_supertoken_settings as read_supertoken_settings
    from .supertokens import train_supertokens as train_supertokens
    from .supertokens import train_word_tokens as train_word_tokens
    from .token_bytes import Vocabulary as Vocabulary
    from .token_bytes import match_vocabularies as match_vocabularies
    from .transplant_matrix import SourceKind as SourceKind
    from .transplant_matrix import TransplantMatrix as TransplantMatrix
    from .transplant_report import TransplantReport as TransplantReport
    from .transplanting import TransplantContext as TransplantContext
    from .transplanting import TransplantResult as TransplantResult
    from .transplanting import find_method as find_method
    from .transplanting import method_names as method_names
    from .transplanting import mix as mix
    from .transplanting import plan_transplant as plan_transplant
    from .transplanting import register_method as register_method
    from .transplanting import transplant_tokenizer as transplant_tokenizer
    from .vocabulary_trimming import trim_tokenizer as trim_tokenizer

_LAZY = {
    "ChunkLengths": ".supertokens",
    "SourceKind": ".transplant_matrix",
    "TransplantContext": ".transplanting",
    "TransplantMatrix": ".transplant_matrix",
    "TransplantReport": ".transplant_report",
    "TransplantResult": ".transplanting",
    "TransplantedConfig": ".configuration_tokenizer_transplant",
    "TransplantedForCausalLM": ".modeling_tokenizer_transplant",
    "TransplantedForMaskedLM": ".modeling_tokenizer_transplant",
    "TransplantedModel": ".modeling_tokenizer_transplant",
    "Vocabulary": ".token_bytes",
    "as_auxiliary_vectors": ".auxiliary_vectors",
    "compare_tokenizers": ".supertokens",
    "draw_comparison": ".supertokens",
    "encode_long_text": ".supertokens",
    "find_method": ".transplanting",
    "match_vocabularies": ".token_bytes",
    "method_names": ".transplanting",
    "mix": ".transplanting",
    "plan_transplant": ".transplanting",
    "read_supertoken_settings": ".supertokens",
    "register_method": ".transplanting",
    "train_supertokens": ".supertokens",
    "train_word_tokens": ".supertokens",
    "transplant_checkpoint": ".checkpoint_streaming",
    "transplant_tokenizer": ".transplanting",
    "trim_tokenizer": ".vocabulary_trimming",
}

__all__ = list(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
