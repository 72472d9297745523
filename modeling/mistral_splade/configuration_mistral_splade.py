"""Configuration of Mistral-SPLADE: a stock Mistral backbone plus the fields that turn its logits into a sparse
vector."""

import math

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig

ATTENTION_MODES = ("echo", "plain", "bidirectional", "repeat")
POOLINGS = ("max", "sum", "mean", "last")
ACTIVATIONS = ("log1p_relu", "log1p_log1p_relu")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

_AUTO_MAP = {
    "AutoConfig": "configuration_mistral_splade.MistralSpladeConfig",
    "AutoModel": "modeling_mistral_splade.MistralSpladeForRetrieval",
    "AutoModelForMaskedLM": "modeling_mistral_splade.MistralSpladeForMaskedLM",
    "AutoProcessor": "processing_mistral_splade.MistralSpladeProcessor",
}


@strict
class MistralSpladeConfig(MistralConfig):
    r"""
    Mistral's own fields keep their names, defaults and meaning (`head_dim` is a field of its own and is not derived
    from `hidden_size` where it is given; a top-level `rope_theta` of old checkpoints is accepted). The retrieval
    fields are:

    Args:
        attention_mode (`str`, defaults to `"echo"`):
            How the backbone gets to see the whole text. `"echo"`: causal, the text is given twice through templates
            and the second occurrence is pooled (Echo-Mistral-SPLADE, arXiv 2408.11119; templates of arXiv
            2402.15449). `"repeat"`: causal, the ids are doubled without templates (CSPLADE, arXiv 2504.10816).
            `"plain"`: causal, the text once. `"bidirectional"`: no causal mask, the text once. Fixed when the model
            is built.
        pooling (`str`, defaults to `"max"`):
            Over the pooled positions: `"max"` (SPLADE-max), `"sum"`, `"mean"` or `"last"`.
        activation (`str`, defaults to `"log1p_relu"`):
            `"log1p_relu"`: log(1 + relu(z)); `"log1p_log1p_relu"`: log(1 + log(1 + relu(z))) (OpenSearch v3 encoders;
            sentence-transformers calls it `log1p_relu`).
        logit_shift (`int`, defaults to 0):
            0 pools the logits at the text's own positions, as all published decoder SPLADE code does. 1 pools
            position i where token i + 1 is marked, that is, the logits that predict the text's tokens.
        logit_scale (`float`, defaults to 1.0):
            Factor on the logits before the activation; Lion-SP (arXiv 2502.15526) uses `hidden_size ** -0.25`.
        head_chunk_size (`int`, defaults to 512):
            Vocabulary entries per tile of the fused head. Working memory is batch x pooled length x head_chunk_size
            logits (four times as many, in bfloat16, where a CPU screens first); the result does not depend on it.
        top_k_query, top_k_document (`int`, *optional*):
            Largest weights that `encode_queries` / `encode_documents` keep per row by default; None keeps all.
        excluded_token_ids (`list[int]`, defaults to none):
            Vocabulary dimensions that are always zero, for example special tokens. Opt-in: peers keep them.
    """

    model_type = "mistral_splade"

    attention_mode: str = "echo"
    pooling: str = "max"
    activation: str = "log1p_relu"
    logit_shift: int = 0
    logit_scale: float | int = 1.0
    head_chunk_size: int = 512
    top_k_query: int | None = None
    top_k_document: int | None = None
    excluded_token_ids: list[int] | tuple[int, ...] = ()

    def __post_init__(self, **kwargs):
        # Every checkpoint carries the full map, whichever head saved it, so that each AutoClass finds its class.
        kwargs["auto_map"] = {**_AUTO_MAP, **(kwargs.get("auto_map") or {})}
        self.excluded_token_ids = list(self.excluded_token_ids)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Cross-field checks; runs at construction and when the configuration is saved."""
        # Imported here for speed: it brings torch.
        from transformers.activations import ACT2FN

        for field, value, allowed in (
            ("attention_mode", self.attention_mode, ATTENTION_MODES),
            ("pooling", self.pooling, POOLINGS),
            ("activation", self.activation, ACTIVATIONS),
            ("logit_shift", self.logit_shift, (0, 1)),
            ("hidden_act", self.hidden_act, ACT2FN),
        ):
            if value not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(map(str, allowed))}; found {value!r}")
        if not 0 < self.logit_scale < math.inf:
            raise ValueError(f"logit_scale must be a positive number; found {self.logit_scale}")
        for field in (*_SIZES, "head_chunk_size", "top_k_query", "top_k_document"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1; found {value}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        outside = [token_id for token_id in self.excluded_token_ids if not 0 <= token_id < self.vocab_size]
        if outside:
            raise ValueError(f"excluded_token_ids must lie in 0..{self.vocab_size - 1}; found {outside}")
