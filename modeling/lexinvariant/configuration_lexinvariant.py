"""Configuration of the lexinvariant language model: a decoder whose symbols get new vectors in every sequence."""

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

TABLES = ("gaussian", "orthonormal", "permuted", "learned", "mixed", "subset_permuted", "canonical")
UNSEEN_LOGITS = ("sampled", "collapsed")
_AFFINES = ("vector", "scalar", "none")
_INITIALIZATIONS = ("standard", "mimetic")
_LOGIT_SCALES = ("rsqrt_hidden", "none")
# Which tables have a row of trained numbers for every symbol.
LEARNED_TABLES = ("learned", "mixed", "subset_permuted")
# Whose unseen rows have one known law, by which their logits are replaced.
_COLLAPSIBLE = ("gaussian", "orthonormal", "canonical")

_AUTO_MAP = {
    "AutoConfig": "configuration_lexinvariant.LexinvariantConfig",
    "AutoModel": "modeling_lexinvariant.LexinvariantModel",
    "AutoModelForCausalLM": "modeling_lexinvariant.LexinvariantForCausalLM",
}


@strict
class LexinvariantConfig(PretrainedConfig):
    r"""
    The defaults are the 150M character model of "Lexinvariant Language Models" (arXiv 2305.16349) where the paper
    speaks, and the public Flax decoder whose defaults equal all its published numbers (google-research/meliad) where it
    does not. What neither has is off by default.

    Args:
        vocab_size (`int`, defaults to 128):
            Number of symbols. Without learned rows nothing depends on it: it may be changed at any time.
        table (`str`, defaults to `"gaussian"`):
            Where the row of a symbol comes from. `"gaussian"`: independent normal numbers, new in every sequence;
            `"orthonormal"`: random orthogonal rows of the same length; `"permuted"`: one table for the batch, its rows
            shuffled in every sequence; `"learned"`: an ordinary language model; `"mixed"`: each symbol's learned row
            or, with `randomize_prob`, a random one; `"subset_permuted"`: learned rows of which, with `randomize_prob`
            each, some change places; `"canonical"`: the row of the symbol's rank of first occurrence, which makes the
            model invariant bit for bit.
        unseen_logits (`str`, defaults to `"sampled"`):
            Of symbols that have not occurred: `"sampled"`, from rows like any other, or `"collapsed"`, their common
            expectation, which needs no rows and makes time and memory independent of the vocabulary.
        learned_table (`bool`, defaults to `False`):
            Of `"permuted"` and `"canonical"` tables: whether their rows are trained.
        canonical_size (`int`, defaults to 512):
            Number of ranks that a `"canonical"` table has: the most different symbols in a sequence.
        randomize_prob (`float`, defaults to 0.2):
            Of `"mixed"` and `"subset_permuted"` tables (arXiv 2305.16349, section 3.6).
        randomize_scope (`str`, defaults to `"symbol"`):
            What `randomize_prob` chooses: `"symbol"`s of each sequence, or whole `"sequence"`s.
        exempt_token_ids (`list[int]`):
            Symbols with a trained row of their own, the same in every sequence, such as the end of a text.
        eval_seed (`int`, defaults to 0):
            Seed of the rows in evaluation, where none is given.
        num_attention_heads, head_dim, intermediate_size, hidden_act:
            As in transformers; heads need not add up to `hidden_size`.
        relative_attention_num_buckets, relative_attention_max_distance (`int`, default to 32 and 128):
            T5's causal buckets of the distance; there are no absolute positions.
        relative_attention_bias_shared (`bool`, defaults to `False`):
            One bias for all layers, stored in the first.
        qk_norm (`bool`, defaults to `True`):
            Keys and queries of length 1, with a trained scale per head; else 1/sqrt(head_dim).
        attend_self (`bool`, defaults to `True`):
            Whether a position attends to itself.
        embedding_affine (`str`, defaults to `"vector"`):
            Trained scale and bias behind the rows: `"vector"`, `"scalar"` or `"none"`.
        embedding_std (`float`, defaults to 1.0):
            Standard deviation of the components of random rows.
        logit_scale (`str`, defaults to `"rsqrt_hidden"`):
            Of the products with the rows: 1/sqrt(hidden_size), or `"none"`.
        dropout, attention_dropout (`float`, default to 0):
            On the input of attention, the output of the MLP and the input of the read-out; on attention weights.
        initialization (`str`, defaults to `"standard"`):
            `"mimetic"`: orthogonal W_v, W_o = 0.7 W_v^T, W_q = W_k orthogonal, which copies random rows from the start.
        attn_scale_init (`float`, defaults to 1.0), final_norm_init (`float`, defaults to 1.0):
            First values of the attention scales and of the final norm; 0.2 for the latter starts at the loss ln V.
        attn_scale_spread (`float`, defaults to 0.0):
            The heads' first scales go from `attn_scale_init` * exp(-spread) to `attn_scale_init` * exp(spread) in equal
            ratios: heads that begin alike stay alike for long, until one of them parts from the others by chance.
        key_smear (`bool`, defaults to `False`):
            Keys are mixed with their predecessors' in a trained proportion per head.
    """

    model_type = "lexinvariant"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 128
    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 4096
    hidden_act: str = "relu"
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-6
    initializer_range: float | None = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_attention_bias_shared: bool = False
    qk_norm: bool = True
    attend_self: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    embedding_affine: str = "vector"
    embedding_std: float = 1.0
    logit_scale: str = "rsqrt_hidden"
    table: str = "gaussian"
    unseen_logits: str = "sampled"
    learned_table: bool = False
    canonical_size: int = 512
    randomize_prob: float = 0.2
    randomize_scope: str = "symbol"
    exempt_token_ids: list[int] | tuple[int, ...] = ()
    eval_seed: int = 0
    initialization: str = "standard"
    attn_scale_init: float = 1.0
    attn_scale_spread: float = 0.0
    final_norm_init: float = 1.0
    key_smear: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        # Every checkpoint carries the full map, whichever class saved it, so that each AutoClass finds its class.
        kwargs["auto_map"] = {**_AUTO_MAP, **(kwargs.get("auto_map") or {})}
        self.exempt_token_ids = list(self.exempt_token_ids)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Cross-field checks; runs at construction and when the configuration is saved."""
        # Imported here for speed: it brings torch.
        from transformers.activations import ACT2FN

        for field, allowed in (
            ("hidden_act", ACT2FN),
            ("table", TABLES),
            ("unseen_logits", UNSEEN_LOGITS),
            ("embedding_affine", _AFFINES),
            ("logit_scale", _LOGIT_SCALES),
            ("initialization", _INITIALIZATIONS),
            ("randomize_scope", ("symbol", "sequence")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}; found {getattr(self, field)!r}")
        for field in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "intermediate_size",
            "relative_attention_num_buckets",
            "canonical_size",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1; found {getattr(self, field)}")
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError(
                "relative_attention_max_distance must be more than half of relative_attention_num_buckets "
                f"({self.relative_attention_num_buckets}); found {self.relative_attention_max_distance}"
            )
        for field in ("randomize_prob", "dropout", "attention_dropout"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} must lie in 0..1; found {getattr(self, field)}")
        if self.unseen_logits == "collapsed" and self.table not in _COLLAPSIBLE:
            raise ValueError(
                f"unseen_logits='collapsed' needs a table of {', '.join(_COLLAPSIBLE)}; found {self.table!r}"
            )
        if self.table == "orthonormal" and self.unseen_logits == "sampled" and self.vocab_size > self.hidden_size:
            raise ValueError(
                f"no more than hidden_size ({self.hidden_size}) rows are orthogonal: for vocab_size {self.vocab_size} "
                "set unseen_logits='collapsed'"
            )
        wrong = [number for number in self.exempt_token_ids if not 0 <= number < self.vocab_size]
        if wrong or len(set(self.exempt_token_ids)) != len(self.exempt_token_ids):
            raise ValueError(
                f"exempt_token_ids must be different numbers in 0..{self.vocab_size - 1}; found "
                f"{wrong or self.exempt_token_ids}"
            )
        if self.exempt_token_ids and self.has_learned_rows and self.table != "canonical":
            raise ValueError(
                f"exempt_token_ids is for random rows; a {self.table!r} table has a learned row for every symbol"
            )

    @property
    def has_learned_rows(self) -> bool:
        """Whether the model holds a trained table."""
        return self.table in LEARNED_TABLES or (self.learned_table and self.table in ("permuted", "canonical"))

    @property
    def is_collapsed(self) -> bool:
        """Whether unseen symbols share one logit."""
        return self.unseen_logits == "collapsed" or self.table == "canonical"
