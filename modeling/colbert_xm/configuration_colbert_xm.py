"""Configuration of ColBERT-XM: a stock X-MOD backbone plus the projection to token vectors."""

from collections.abc import Sequence

from huggingface_hub.dataclasses import strict
from transformers import XmodConfig

from .colbert_metadata import SIMILARITIES, is_stanford_layout, read_metadata, stored_dim
from .language_codes import check_code, find_language

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
    "dim",
)

_AUTO_MAP = {
    "AutoConfig": "configuration_colbert_xm.ColBERTXMConfig",
    "AutoModel": "modeling_colbert_xm.ColBERTXMForRetrieval",
    "AutoProcessor": "processing_colbert_xm.ColBERTXMProcessor",
}


@strict
class ColBERTXMConfig(XmodConfig):
    r"""
    X-MOD's own fields keep their names and meaning; the defaults are those of `antoinelouis/colbert-xm` (arXiv
    2402.15059), with one language.

    Args:
        dim (`int`, defaults to 128):
            Components of a token vector.
        similarity (`str`, defaults to `"cosine"`):
            Of two vectors, inside MaxSim: `"cosine"`, or `"l2"` for minus the squared distance (colbert-ai's names).
        languages (`list[str]`):
            Codes of the adapters, in the order of their indices (`lang_ids`). Given to `from_pretrained`, it names the
            adapters to keep, as X-MOD codes, ISO codes or BCP-47 tags; the others are not loaded.
        default_language (`str`, *optional*):
            Of inputs whose language is not given; the first language where it is not set.
    """

    model_type = "colbert_xm"

    vocab_size: int = 250002
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    dim: int = 128
    similarity: str = "cosine"

    def __post_init__(self, **kwargs):
        # Every checkpoint carries the full map, whichever class saved it, so that each AutoClass finds its class.
        kwargs["auto_map"] = {**_AUTO_MAP, **(kwargs.get("auto_map") or {})}
        self.languages = list(self.languages)
        if self.default_language is None and self.languages:
            self.default_language = self.languages[0]
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Cross-field checks; runs at construction and when the configuration is saved."""
        # Imported here for speed: it brings torch.
        from transformers.activations import ACT2FN

        for field, value, allowed in (
            ("similarity", self.similarity, SIMILARITIES),
            ("hidden_act", self.hidden_act, ACT2FN),
        ):
            if value not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(map(str, allowed))}; found {value!r}")
        if self.pad_token_id is None:
            raise ValueError("pad_token_id must be set: positions are counted from it")
        for field in (*_SIZES, "adapter_reduction_factor"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1; found {getattr(self, field)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.is_decoder or self.add_cross_attention:
            raise ValueError(
                "is_decoder and add_cross_attention must be False: the family reads text in both directions"
            )
        for code in self.languages:
            check_code(code)
        if not self.languages or len(set(self.languages)) != len(self.languages):
            raise ValueError(f"languages must be one or more different codes; found {self.languages}")
        if self.default_language not in self.languages:
            raise ValueError(
                f"default_language must be one of {', '.join(self.languages)}; found {self.default_language!r}"
            )

    def language_id(self, language: str | None) -> int:
        """Index of the adapter for an X-MOD code, ISO code or BCP-47 tag; None means `default_language`.

        Raises:
            ValueError: there is no such adapter; the message lists the codes.
        """
        code = self.default_language if language is None else find_language(language, self.languages)
        return self.languages.index(code)

    def keep_languages(self, languages: str | Sequence[str]) -> None:
        """Drop all but these languages, in their old order; the default becomes the first given if it is dropped.

        Raises:
            ValueError: there is no such adapter, or none is kept.
        """
        wanted = [languages] if isinstance(languages, str) else list(languages)
        codes = [find_language(language, self.languages) for language in wanted]
        if not codes:
            raise ValueError("languages must name at least one language to keep; found none")
        if self.default_language not in codes:
            self.default_language = codes[0]
        self.languages = [code for code in self.languages if code in codes]

    def choose_languages(
        self, languages: str | Sequence[str] | None = None, default_language: str | None = None
    ) -> None:
        """What the arguments of `from_pretrained` of these names mean: the adapters to keep (None keeps all), and the
        new default (None leaves it, if it is kept).

        Raises:
            ValueError: there is no such adapter, or none is kept.
        """
        if languages is not None:
            self.keep_languages(languages)
        if default_language is not None:
            self.default_language = find_language(default_language, self.languages)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers; an official checkpoint (an X-MOD `config.json`) is read with its `artifact.metadata`, and
        where that does not say `dim`, with the shape of its projection.

        Raises:
            ValueError: a checkpoint of another model; transformers would fill all that it lacks with random weights.
        """
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") not in (cls.model_type, XmodConfig.model_type):
            raise ValueError(
                f"{pretrained_model_name_or_path} has model_type {config.get('model_type')!r}; expected "
                f"{cls.model_type!r}, or {XmodConfig.model_type!r}: a checkpoint of colbert-ai or a bare X-MOD"
            )
        if is_stanford_layout(config, pretrained_model_name_or_path, **kwargs):
            metadata = read_metadata(pretrained_model_name_or_path, **kwargs)
            fields = ("_name_or_path", "architectures", "model_type", "position_embedding_type")
            config = {name: value for name, value in config.items() if name not in fields}
            config.update(model_type=cls.model_type, similarity=metadata["similarity"])
            dim = metadata["dim"] or stored_dim(pretrained_model_name_or_path, **kwargs)
            if dim is not None:
                config["dim"] = dim
        return config, unused

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, but `languages` names the adapters to keep of those in `config_dict`."""
        choice = {name: kwargs.pop(name, None) for name in ("languages", "default_language")}
        found = super().from_dict(config_dict, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        config.choose_languages(**choice)
        return found
