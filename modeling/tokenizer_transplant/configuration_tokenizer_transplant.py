"""Configuration of a model that is another one with a transplanted tokenizer."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PretrainedConfig

_AUTO_MAP = {
    "AutoConfig": "configuration_tokenizer_transplant.TransplantedConfig",
    "AutoModel": "modeling_tokenizer_transplant.TransplantedModel",
    "AutoModelForCausalLM": "modeling_tokenizer_transplant.TransplantedForCausalLM",
    "AutoModelForMaskedLM": "modeling_tokenizer_transplant.TransplantedForMaskedLM",
}
# What generation and the trainers read from the outer configuration.
_MIRRORED = ("is_encoder_decoder", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
# Fields that every configuration has, and that mean the base's when they are set in the outer one.
_SHARED = (*_MIRRORED, "output_hidden_states", "output_attentions", "return_dict")


@strict
class TransplantedConfig(PretrainedConfig):
    r"""
    Which base a transplanted model is made of, and what the base becomes. Fields of the base's configuration
    (`hidden_size`, `num_hidden_layers`, …) can be read from this one and set in it.

    Args:
        base_model_name_or_path (`str`, defaults to `""`):
            The base: a Hub name or a folder (where it does not exist, one of that name beside the checkpoint).
            Empty in a configuration that only describes an architecture.
        base_revision (`str`, *optional*):
            The base's revision on the Hub; a commit, where it was known.
        base_fingerprint (`str`, *optional*):
            Hash of the base's stored tensors, without which no matrix is applied.
        token_ids (`dict[str, int | None]`, *optional*), base_token_ids (`dict[str, int | None]`, *optional*):
            Ids of the special tokens by role ("bos", "eos", "pad", …) in the new tokenizer and in the base's.
        text_config (`PretrainedConfig` or `dict`, *optional*):
            The base's configuration with the new vocabulary; a Llama of the default size where none is given.
        tokenizer_transplant (`dict`, *optional*):
            Provenance: method, options, versions, hashes of both tokenizers, counts.
    """

    model_type = "transplanted"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs = {"text_config": AutoConfig}

    base_model_name_or_path: str = ""
    base_revision: str | None = None
    base_fingerprint: str | None = None
    token_ids: dict[str, int | None] | None = None
    base_token_ids: dict[str, int | None] | None = None
    tokenizer_transplant: dict[str, Any] | None = None
    is_encoder_decoder: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    # The last one: what is set after it reaches the base's configuration.
    text_config: dict[str, Any] | PretrainedConfig | None = None

    def __post_init__(self, **kwargs):
        # Every checkpoint carries the full map, whichever class saved it, so that each AutoClass finds its class.
        kwargs["auto_map"] = {**_AUTO_MAP, **(kwargs.get("auto_map") or {})}
        if not isinstance(self.text_config, PretrainedConfig):
            fields = dict(self.text_config or {"model_type": "llama"})
            self.text_config = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
        self.mirror()
        super().__post_init__(**kwargs)

    def mirror(self) -> None:
        """Take over what the base's configuration says about generation."""
        for name in _MIRRORED:
            setattr(self, name, getattr(self.text_config, name, None))

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("text_config")
        own = name.startswith("_") or hasattr(type(self), name) or name in self.__dict__
        shared = isinstance(inner, PretrainedConfig) and hasattr(inner, name) and (name in _SHARED or not own)
        if shared:
            setattr(inner, name, value)
        if own or not shared:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        inner = self.__dict__.get("text_config")
        if name not in self.__dict__ and isinstance(inner, PretrainedConfig):
            delattr(inner, name)
        else:
            super().__delattr__(name)

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("text_config")
        if name.startswith("_") or not isinstance(inner, PretrainedConfig):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inner, name)
