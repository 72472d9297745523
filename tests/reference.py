"""The model, the processor and the texts of Mistral-SPLADE's reference numbers (tests/fixtures/mistral_splade)."""

import json
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from rarezoo.mistral_splade import MistralSpladeConfig, MistralSpladeForRetrieval, MistralSpladeProcessor

FIXTURES = Path(__file__).parent / "fixtures" / "mistral_splade"
INPUTS = json.loads((FIXTURES / "inputs.json").read_text(encoding="utf-8"))


def reference_model(**overrides) -> MistralSpladeForRetrieval:
    """The fixture's weights; `overrides` are fields of the configuration."""
    settings = json.loads((FIXTURES / "config.json").read_text(encoding="utf-8"))
    for key in ("architectures", "model_type", "dtype"):
        settings.pop(key)
    model = MistralSpladeForRetrieval(MistralSpladeConfig(**{**settings, **overrides}))
    model.load_state_dict(load_file(FIXTURES / "model.safetensors"))
    return model


def reference_processor() -> MistralSpladeProcessor:
    return MistralSpladeProcessor(PreTrainedTokenizerFast.from_pretrained(FIXTURES), attention_mode="echo")
