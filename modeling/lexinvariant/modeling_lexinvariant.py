"""Lexinvariant language model (arXiv 2305.16349): a decoder without a learned vocabulary.

Every sequence has a table of symbol rows of its own; what a symbol is called means nothing, and the model can use only
how symbols repeat and stand together. Pre-norm layers without biases, T5's relative positions, a two-matrix MLP; keys
and queries of length 1 with a trained scale per head (google-research/meliad), or T5's plain products.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .collapsed_readout import CollapsedDistribution
from .configuration_lexinvariant import LexinvariantConfig
from .equal_scores import CUTTING_WARPERS, BreakTies, InSeededOrder, ThenBreakTies
from .linear_cross_entropy import linear_cross_entropy
from .symbol_history import NO_SYMBOL, first_positions, fixed_size, history_layer, new_symbols
from .symbol_rows import random_rows
from .symbol_tables import ExemptingTable, RandomTable, StoredTable, Table, make_table, orthonormal_rows

# Up to so many stored rows, products with all of them take less time than finding those of what occurred.
_FEW_SYMBOLS = 1024
# Rows of one sequence that may exist at once while its loss is computed.
_MOST_NUMBERS_OF_A_TABLE = 2**25


@dataclass
class Symbols:
    """What the symbols of a call mean: their rows, and what read-out needs.

    Attributes:
        table: rows of all symbols; None where rows follow from what has occurred.
        rows: (sequences, length, hidden_size) of the new tokens, float32, before scale and bias.
        met: symbols (batch, slots) met so far, exempt ones first; None where read-out does not need them.
        start: the slot of the first new token; a tensor () where the cache is of fixed size.
        first: (batch, slots), the slot at which each occurred first; None where read-out uses the rows of all symbols.
        met_rows: (sequences, slots, hidden_size); None as `first`.
        unseen_row: (hidden_size,), the row of the class of new symbols in a canonical table.
        num_tables: sequences per batch element.
    """

    table: Table | None
    rows: Tensor
    num_tables: int = 1
    met: Tensor | None = None
    start: int | Tensor = 0
    first: Tensor | None = None
    met_rows: Tensor | None = None
    unseen_row: Tensor | None = None


class LexinvariantRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        scaled = hidden.float() * torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(hidden.dtype)


class SymbolEmbedding(nn.Module):
    """Trained scale and bias behind the rows, and the trained rows where the configuration has some."""

    def __init__(self, config: LexinvariantConfig):
        super().__init__()
        self.config = config
        size = {"vector": config.hidden_size, "scalar": 1}.get(config.embedding_affine)
        self.scale = nn.Parameter(torch.ones(size)) if size else None
        self.bias = nn.Parameter(torch.zeros(size)) if size else None
        count = config.canonical_size + 1 if config.table == "canonical" else config.vocab_size
        self.weight = nn.Parameter(torch.empty(count, config.hidden_size)) if config.has_learned_rows else None
        exempt = len(config.exempt_token_ids) if config.table != "canonical" else 0
        self.exempt_weight = nn.Parameter(torch.empty(exempt, config.hidden_size)) if exempt else None

    def affine(self, rows: Tensor) -> Tensor:
        return rows if self.scale is None else self.scale * rows + self.bias

    def canonical_rows(self, device: torch.device) -> Tensor:
        """(canonical_size + 1, hidden_size): a row for every rank; the last is that of the class of new symbols."""
        if self.weight is not None:
            return self.weight
        ranks = torch.arange(self.config.canonical_size + 1, device=device)
        seed = torch.tensor(self.config.eval_seed, device=device)
        return random_rows(seed, ranks, self.config.hidden_size) * self.config.embedding_std

    def forward(self, input_ids: Tensor, lex_seeds: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Embeddings (batch, length, hidden_size) of symbols (batch, length) under seeds (batch,), or of their rows."""
        if rows is None:
            rows = resolve_symbols(self, input_ids, lex_seeds=lex_seeds).rows
        return self.affine(rows).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        parameter = next(iter(self.parameters()), None)
        return torch.get_default_dtype() if parameter is None else parameter.dtype


def resolve_symbols(
    embedding: SymbolEmbedding,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    embedding_table: Tensor | None = None,
    permutations: Tensor | None = None,
    lex_seeds: Tensor | None = None,
    num_tables: int = 1,
    symbol_table: Table | None = None,
) -> Symbols:
    """Rows of the new tokens, and what read-out needs of them and of those before.

    Args:
        input_ids: (batch, length), the new tokens.
        attention_mask: (batch, cached + length).
        embedding_table, permutations, lex_seeds, num_tables: as in `LexinvariantForCausalLM.forward`.
        symbol_table: what `resolve_table` made of them, where that is known.
    """
    config = embedding.config
    check_symbols(input_ids, attention_mask, config.vocab_size)
    batch, length = input_ids.shape
    canonical = config.table == "canonical" and embedding_table is None
    by_occurrence = config.table == "orthonormal" and embedding_table is None and config.vocab_size > config.hidden_size
    table = symbol_table
    if table is None:
        table = resolve_table(embedding, batch, input_ids.device, embedding_table, permutations, lex_seeds, num_tables)
    repeated = input_ids if num_tables == 1 else input_ids.repeat_interleave(num_tables, dim=0)
    if not config.is_collapsed:
        assert table is not None
        return Symbols(table, table.rows(repeated), num_tables)

    real = real_tokens(attention_mask, length, past_key_values)
    met = input_ids if real is None else input_ids.masked_fill(~real, NO_SYMBOL)
    exempt = len(config.exempt_token_ids)
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    start = past + exempt  # a new tensor, where the past is one: that of the cache changes
    layer = None if past_key_values is None else history_layer(past_key_values)
    keeps_rows = layer is not None and ("rows" in layer.history or "symbols" not in layer.history)
    if layer is not None:
        met = layer.append("symbols", met[..., None])[..., 0]
    if exempt:
        met = torch.cat([torch.tensor(config.exempt_token_ids, device=met.device).expand(batch, -1), met], dim=1)
    if isinstance(symbol_table, StoredTable) and not by_occurrence and config.vocab_size <= _FEW_SYMBOLS:
        if layer is not None:
            layer.history.pop("rows", None)
        return Symbols(symbol_table, symbol_table.rows(repeated), num_tables, met, start)

    first = first_positions(met)
    slots = torch.arange(length, device=met.device) + start
    if canonical:
        ranks = _checked_ranks(met, first, config.canonical_size)
        all_rows = embedding.canonical_rows(input_ids.device)
        met_rows = functional.embedding(ranks, all_rows)
        # A copy, since products are rounded by how a tensor lies in memory, and a loaded one may lie anywhere.
        unseen_row = all_rows[-1].clone()
        return Symbols(None, met_rows.index_select(1, slots), 1, met, start, first, met_rows, unseen_row)
    assert table is not None
    if layer is not None and not keeps_rows:
        met_rows = table.rows(met.clamp(min=0).repeat_interleave(num_tables, dim=0))
        return Symbols(table, met_rows.index_select(1, slots), num_tables, met, start, first, met_rows)
    exempt_ids = met[:, :exempt].repeat_interleave(num_tables, dim=0)
    exempt_rows, rows = table.rows(torch.cat([exempt_ids, repeated], dim=1)).tensor_split([exempt], dim=1)
    if by_occurrence:
        past_rows = None if layer is None or "rows" not in layer.history else layer.history["rows"].flatten(0, 1)
        rows = _orthogonalized(
            rows, past_rows, met[:, exempt:], first[:, exempt:] - exempt, slots - exempt, config.embedding_std
        )
    met_rows = rows
    if layer is not None:
        met_rows = layer.append("rows", rows.unflatten(0, (batch, num_tables))).flatten(0, 1)
    met_rows = torch.cat([exempt_rows, met_rows], dim=1) if exempt else met_rows
    return Symbols(table, rows, num_tables, met, start, first, met_rows)


def real_tokens(attention_mask: Tensor | None, length: int, past_key_values: Cache | None) -> Tensor | None:
    """(batch, length) bool, False where a new token is padding; None where none is.

    Args:
        attention_mask: (batch, cached + length), or as long as a cache of fixed size.
    """
    if attention_mask is None:
        return None
    if past_key_values is None or fixed_size(past_key_values) is None:
        return attention_mask[:, -length:].bool()
    places = torch.arange(length, device=attention_mask.device) + past_key_values.get_seq_length()
    return attention_mask.bool().index_select(1, places)


def _checked_ranks(met: Tensor, first: Tensor, canonical_size: int) -> Tensor:
    """Of every symbol met, how many others were met before it: (batch, slots); 0 at padding."""
    ranks = (new_symbols(met, first).cumsum(1) - 1).gather(1, first).masked_fill(met == NO_SYMBOL, 0)
    if torch.compiler.is_compiling():
        torch._assert_async(ranks.max() < canonical_size, "more different symbols than canonical_size")
    elif int(ranks.max()) >= canonical_size:
        raise ValueError(
            f"a sequence holds {int(ranks.max()) + 1} different symbols, but canonical_size is {canonical_size}"
        )
    return ranks


def resolve_table(
    embedding: SymbolEmbedding,
    batch: int,
    device: torch.device,
    embedding_table: Tensor | None = None,
    permutations: Tensor | None = None,
    lex_seeds: Tensor | None = None,
    num_tables: int = 1,
) -> Table | None:
    """Rows of all symbols for a batch, as drawn: those of an orthonormal table of more symbols than dimensions are made
    orthogonal as they occur. None of a canonical table, whose rows follow from what occurs.

    Args:
        embedding_table, permutations, lex_seeds, num_tables: as in `LexinvariantForCausalLM.forward`.
    """
    config = embedding.config
    if config.table == "orthonormal" and config.vocab_size > config.hidden_size:
        config = _gaussian(config)
    seeds = symbol_seeds(config, batch, lex_seeds, device, embedding.training)
    if num_tables < 1:
        raise ValueError(f"num_tables must be at least 1; found {num_tables}")
    if num_tables > 1 and (embedding_table is not None or config.table in ("learned", "canonical")):
        raise ValueError("num_tables averages over random tables: it goes with seeds, not with a given table")
    _check_explicit(config, batch, embedding_table, permutations)
    if config.table == "canonical" and embedding_table is None:
        return None
    return make_table(
        config,
        seeds.repeat_interleave(num_tables),
        torch.arange(num_tables, device=device).repeat(batch),
        learned=embedding.weight,
        exempt=embedding.exempt_weight,
        explicit=None if embedding_table is None else embedding_table.to(device),
        permutations=None if permutations is None else permutations.to(device).repeat_interleave(num_tables, dim=0),
        training=embedding.training and lex_seeds is None,
    )


@torch.no_grad()
def _orthogonalized(
    rows: Tensor, past_rows: Tensor | None, met: Tensor, first: Tensor, places: Tensor, std: float
) -> Tensor:
    """Gram-Schmidt over the different symbols in the order in which they occur; after hidden_size of them, rows stay as
    they are.

    Args:
        rows: (sequences, length, dim), of the new tokens as they were drawn.
        past_rows: (sequences, past or total, dim), of the tokens before them, orthogonal; zeros behind those.
        met, first: (batch, total), without exempt symbols, whose slots are negative in `first`.
        places: (length,), of the new tokens.
        std: of the numbers in a row; orthogonal ones have the length std * sqrt(dim).

    Returns:
        (sequences, length, dim)
    """
    sequences, length, dim = rows.shape
    drawn, rows = rows, rows.double()  # in float32, the last rows of a nearly full basis would depend on the cut
    repeats = sequences // len(met)
    new = new_symbols(met, first).repeat_interleave(repeats, dim=0)
    origin = first.repeat_interleave(repeats, dim=0).index_select(1, places)
    rank = new.cumsum(1) - 1
    new_here, rank_here = new.index_select(1, places), rank.index_select(1, places)
    count = rank_here[:, :1] + 1 - new_here[:, :1].long()
    slots = min(length, dim)
    chosen = new_here & (rank_here < dim)
    slot = torch.where(chosen, rank_here - count, slots)
    fresh = rows.new_zeros(sequences, slots + 1, dim)
    fresh = fresh.scatter(1, slot[..., None].expand(-1, -1, dim), rows)[:, :slots]
    if past_rows is not None:
        past_rows, past = past_rows.double(), past_rows.shape[1]
        before = torch.arange(past, device=rows.device) < places[0]
        basis = past_rows * (new[:, :past] & (rank[:, :past] < dim) & before)[..., None]
        for _ in range(2):  # what rounding left of the first projection
            fresh = fresh - (fresh @ basis.transpose(1, 2)) @ basis / (dim * std**2)
    fresh = orthonormal_rows(fresh) * std
    rows = torch.where(chosen[..., None], fresh.gather(1, slot.clamp(max=slots - 1)[..., None].expand_as(rows)), rows)
    if past_rows is None:
        known = rows
    elif past_rows.shape[1] == met.shape[1]:
        known = past_rows.index_copy(1, places, rows)
    else:
        known = torch.cat([past_rows, rows], dim=1)
    repeated = known.gather(1, origin.clamp(min=0)[..., None].expand(-1, -1, dim))
    return torch.where((origin >= 0)[..., None], repeated, drawn.double()).float()


def _gaussian(config: LexinvariantConfig) -> LexinvariantConfig:
    """The same configuration with the rows that Gram-Schmidt starts from."""
    changed = copy.copy(config)
    changed.table = "gaussian"
    return changed


def check_symbols(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> None:
    """Raises ValueError for ids outside 0..vocab_size - 1 and for a mask of another shape than (batch, length)."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have the shape (batch, length); found {tuple(input_ids.shape)}")
    if attention_mask is not None and (attention_mask.dim() != 2 or len(attention_mask) != len(input_ids)):
        raise ValueError(
            f"attention_mask must have the shape (batch, length) with batch {len(input_ids)}; found "
            f"{tuple(attention_mask.shape)}"
        )
    if torch.compiler.is_compiling() or not input_ids.numel():
        return
    low, high = input_ids.aminmax()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids must lie in 0..{vocab_size - 1}; found {int(low if low < 0 else high)}")


def symbol_seeds(config, batch: int, lex_seeds: Tensor | None, device: torch.device, training: bool) -> Tensor:
    """Seeds (batch,) of the tables: those given; else new ones while training, `config.eval_seed` in evaluation."""
    if lex_seeds is not None:
        if lex_seeds.shape != (batch,) or lex_seeds.dtype != torch.int64:
            raise ValueError(
                f"lex_seeds must be int64 of shape ({batch},); found {lex_seeds.dtype} of {tuple(lex_seeds.shape)}"
            )
        return lex_seeds.to(device)
    if training:
        # A new table at every visit of a sequence; on the CPU, so that one seed means the same on every device.
        return torch.randint(-(2**63), 2**63 - 1, (batch,)).to(device)
    return torch.full((batch,), config.eval_seed, device=device)


def _check_explicit(config, batch: int, table: Tensor | None, permutations: Tensor | None) -> None:
    vocab, size = config.vocab_size, config.hidden_size
    if table is not None and table.shape not in ((vocab, size), (batch, vocab, size)):
        raise ValueError(
            f"embedding_table must have the shape ({vocab}, {size}) or ({batch}, {vocab}, {size}); found "
            f"{tuple(table.shape)}"
        )
    if permutations is not None and permutations.shape != (batch, vocab):
        raise ValueError(f"permutations must have the shape ({batch}, {vocab}); found {tuple(permutations.shape)}")


# --- layers -----------------------------------------------------------------------------------------------------------


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    # In float32, as fused kernels do: of a bias of hundreds, 16 bits leave no room for the products.
    weights = torch.add(attention_mask, (query @ key.transpose(2, 3)).float(), alpha=scaling)
    weights = functional.softmax(weights, dim=-1).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class LexinvariantAttention(nn.Module):
    def __init__(self, config: LexinvariantConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.is_causal = False  # the mask says it, with the positions' bias
        inner = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        heads = config.num_attention_heads
        self.attn_scale = nn.Parameter(torch.ones(heads)) if config.qk_norm else None
        self.key_smear = nn.Parameter(torch.zeros(heads)) if config.key_smear else None
        own_bias = layer_idx == 0 or not config.relative_attention_bias_shared
        buckets = config.relative_attention_num_buckets
        self.relative_attention_bias = nn.Embedding(buckets, heads) if own_bias else None

    def forward(
        self,
        hidden_states: Tensor,
        bias: Tensor,
        attention: AttentionInputs,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: (sequences, length, hidden_size)
            bias: (heads, length, total), of the positions.
        """
        sequences, length, _ = hidden_states.shape
        shape = (sequences, length, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.key_smear is None and self.attn_scale is not None:
            key = _unit_length(key)
        if past_key_values is not None:
            # The tables of a batch element stand with its heads: caches are reordered by batch elements.
            key, value = past_key_values.update(
                *(part.reshape(attention.batch, -1, length, self.head_dim) for part in (key, value)), self.layer_idx
            )
            key, value = (part.reshape(sequences, -1, part.shape[2], self.head_dim) for part in (key, value))
        if self.key_smear is not None:
            # Behind the cache, which holds the keys as they are: any number of them can be taken back.
            key = self._smeared(key, attention.real)
            key = _unit_length(key) if self.attn_scale is not None else key
        scaling = self.head_dim**-0.5
        if self.attn_scale is not None:
            scale = self.attn_scale.abs().to(query.dtype)[:, None, None]
            query, bias, scaling = _unit_length(query) * scale, bias * scale, 1.0
        # Not a sum, which overflows in float16.
        mask = bias.to(query.dtype).masked_fill(attention.forbidden, torch.finfo(query.dtype).min)
        kernel: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        if mask.requires_grad and mask.device.type == "cpu" and self.config._attn_implementation == "sdpa":
            # A trained bias has no fused kernel there, and what sdpa does instead takes longer.
            kernel = eager_attention
        output, weights = kernel(
            self,
            query,
            key,
            value,
            mask,
            scaling=scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        if attention.attends is not None:
            output = output * attention.attends[..., None, None].to(output.dtype)
        return self.o_proj(output.reshape(sequences, length, -1)), weights

    def _smeared(self, key: Tensor, real: Tensor | None) -> Tensor:
        """k'_t = g k_t + (1 - g) k_{t-1}; the first token of a sequence has no predecessor."""
        assert self.key_smear is not None
        before = functional.pad(key, (0, 0, 1, 0))[:, :, :-1]
        if real is not None:
            before = before * functional.pad(real, (1, 0))[:, None, :-1, None].to(key.dtype)
        share = torch.sigmoid(self.key_smear)[:, None, None].to(key.dtype)
        return share * key + (1 - share) * before

    def position_bias(self, buckets: Tensor, total: int) -> Tensor:
        """(heads, length, total); buckets (length + total - 1,) as in `AttentionInputs`."""
        assert self.relative_attention_bias is not None
        return self.relative_attention_bias(buckets).T.unfold(1, total, 1).flip(1)


def distance_buckets(distances: Tensor, buckets: int, max_distance: int) -> Tensor:
    """T5's buckets of causal distances (arXiv 1910.10683, section 2.1): one for each small one, wider ones behind."""
    half = buckets // 2
    far = torch.log(distances.clamp(min=1).float() / half) / math.log(max_distance / half) * (buckets - half)
    return torch.where(distances < half, distances, (half + far.long()).clamp(max=buckets - 1))


def _unit_length(vectors: Tensor) -> Tensor:
    return vectors * torch.rsqrt(vectors.float().square().sum(-1, keepdim=True) + 1e-6).to(vectors.dtype)


@dataclass
class AttentionInputs:
    """What all layers need to attend.

    batch: number of batch elements (not of their tables).
    forbidden: (sequences or 1, 1, length, total) bool, where a position must not look.
    attends: (sequences or 1, length) bool, whether a position may look anywhere; None if all may.
    real: (sequences, total) bool, False at padding; None without padding.
    buckets: (length + total - 1,), of the distances from that of the last token to the first place, falling.
    """

    batch: int
    forbidden: Tensor
    attends: Tensor | None
    real: Tensor | None
    buckets: Tensor


class LexinvariantMLP(nn.Module):
    def __init__(self, config: LexinvariantConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden)))


class LexinvariantDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: LexinvariantConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = LexinvariantRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LexinvariantAttention(config, layer_idx)
        self.post_attention_layernorm = LexinvariantRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LexinvariantMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: Tensor, bias: Tensor, attention: AttentionInputs, past_key_values=None, **kwargs
    ) -> Tensor:
        normed = self.dropout(self.input_layernorm(hidden_states))
        hidden_states = hidden_states + self.self_attn(normed, bias, attention, past_key_values, **kwargs)[0]
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


# --- models -----------------------------------------------------------------------------------------------------------


class LexinvariantPreTrainedModel(PreTrainedModel):
    config_class = LexinvariantConfig
    config: LexinvariantConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LexinvariantDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": LexinvariantDecoderLayer, "attentions": LexinvariantAttention}

    def __init__(self, config: LexinvariantConfig, *args, **kwargs):
        # Fields that from_pretrained overrides are assigned one by one, without the checks across fields.
        config.validate()
        super().__init__(config, *args, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> SymbolEmbedding:
        """Change the number of symbols: the configuration, and a table of trained rows where there is one for them.

        Args:
            new_num_tokens, pad_to_multiple_of, mean_resizing: as in transformers.

        Raises:
            ValueError: symbols of `config.exempt_token_ids` would be lost.
        """
        embedding: SymbolEmbedding = self.get_input_embeddings()
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if embedding.weight is not None and self.config.table != "canonical":
            rows = nn.Embedding(*embedding.weight.shape, _weight=embedding.weight)
            embedding.weight = self._get_resized_embeddings(rows, size, pad_to_multiple_of, mean_resizing).weight
            size = len(embedding.weight)
        else:
            multiple = pad_to_multiple_of or 1
            size = -(-size // multiple) * multiple
        if any(number >= size for number in self.config.exempt_token_ids):
            raise ValueError(f"exempt_token_ids {self.config.exempt_token_ids} do not lie in 0..{size - 1}")
        self.config.vocab_size = self.vocab_size = size  # the latter as in transformers
        return embedding

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Custom code is not asked about modules without weights of their own, lest it overwrite loaded ones. The
        # functions below leave those alone, and attention and the whole model have a say about their parts.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        if isinstance(module, nn.Linear):
            std = config.initializer_range or module.in_features**-0.5
            initialization.normal_(module.weight, std=std)
        elif isinstance(module, nn.Embedding):
            initialization.zeros_(module.weight)
        elif isinstance(module, LexinvariantRMSNorm):
            initialization.ones_(module.weight)
        elif isinstance(module, SymbolEmbedding):
            if module.scale is not None:
                initialization.ones_(module.scale)
                initialization.zeros_(module.bias)
            for weight in (module.weight, module.exempt_weight):
                if weight is not None:
                    initialization.normal_(weight, std=config.embedding_std)
        elif isinstance(module, LexinvariantAttention):
            if module.attn_scale is not None:
                spread = torch.linspace(-config.attn_scale_spread, config.attn_scale_spread, config.num_attention_heads)
                scales = (config.attn_scale_init * spread.exp()).to(module.attn_scale)
                initialization.copy_(module.attn_scale, scales.view_as(module.attn_scale))
            if module.key_smear is not None:
                initialization.zeros_(module.key_smear)
            if config.initialization == "mimetic":
                _copying_projections(module)
        if isinstance(module, LexinvariantModel):
            initialization.constant_(module.norm.weight, config.final_norm_init)


def _copying_projections(attention: LexinvariantAttention) -> None:
    initialization.orthogonal_(attention.v_proj.weight)
    initialization.copy_(attention.o_proj.weight, 0.7 * attention.v_proj.weight.T)
    initialization.orthogonal_(attention.q_proj.weight)
    initialization.copy_(attention.k_proj.weight, attention.q_proj.weight)


class LexinvariantModel(LexinvariantPreTrainedModel):
    """The decoder without read-out."""

    _auto_class = "AutoModel"

    def __init__(self, config: LexinvariantConfig):
        super().__init__(config)
        self.embed_tokens = SymbolEmbedding(config)
        self.layers = nn.ModuleList(LexinvariantDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LexinvariantRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        embedding_table: Tensor | None = None,
        permutations: Tensor | None = None,
        lex_seeds: Tensor | None = None,
        num_tables: int = 1,
        symbols: Symbols | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids, attention_mask, embedding_table, permutations, lex_seeds, num_tables: as in
                `LexinvariantForCausalLM.forward`.
            inputs_embeds: (batch, length, hidden_size), behind scale and bias, instead of `input_ids`.
            symbols: the rows of `input_ids`, where they are known already.

        Returns:
            last_hidden_state (batch * num_tables, length, hidden_size), behind the final norm; hidden_states from that
            of the embeddings to that before the final norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        if inputs_embeds is None:
            if symbols is None:
                symbols = resolve_symbols(
                    self.embed_tokens,
                    input_ids,
                    attention_mask,
                    past_key_values,
                    embedding_table,
                    permutations,
                    lex_seeds,
                    num_tables,
                )
            num_tables = symbols.num_tables
            inputs_embeds = self.embed_tokens(input_ids, rows=symbols.rows).to(self.norm.weight.dtype)
        attention = self._attention_inputs(inputs_embeds, attention_mask, past_key_values, num_tables)
        hidden_states, bias = inputs_embeds, None
        for layer in self.layers:
            if layer.self_attn.relative_attention_bias is not None:
                bias = layer.self_attn.position_bias(attention.buckets, attention.forbidden.shape[-1])
            # By position: gradients of other tensors are lost by checkpointing of the reentrant kind.
            hidden_states = layer(hidden_states, bias, attention, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.dropout(self.norm(hidden_states)), past_key_values=past_key_values
        )

    def _attention_inputs(self, embeds: Tensor, attention_mask: Tensor | None, cache: Cache | None, num_tables: int):
        length, device = embeds.shape[1], embeds.device
        past = cache.get_seq_length() if cache is not None else 0
        total = fixed_size(cache) or length + past
        if attention_mask is not None and attention_mask.shape[1] != total:
            places = "places of the cache" if fixed_size(cache) else "tokens, with those in the cache"
            raise ValueError(f"attention_mask must cover {total} {places}; found {attention_mask.shape[1]}")
        here = torch.arange(length, device=device) + past
        last = here if self.config.attend_self else here - 1
        allowed = (torch.arange(total, device=device) <= last[:, None])[None]
        real = None
        if attention_mask is not None:
            real = attention_mask.bool().repeat_interleave(num_tables, dim=0)
            allowed = allowed & real[:, None]
        attends = None if real is None and self.config.attend_self else allowed.any(-1)
        buckets = distance_buckets(
            (past + length - 1 - torch.arange(length + total - 1, device=device)).clamp(min=0),
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        return AttentionInputs(len(embeds) // num_tables, ~allowed[:, None], attends, real, buckets)


class LexinvariantForCausalLM(LexinvariantPreTrainedModel, GenerationMixin):
    """The decoder with read-out by the same rows that it reads."""

    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: LexinvariantConfig):
        super().__init__(config)
        self.model = LexinvariantModel(config)
        self.post_init()

    def get_output_embeddings(self):
        return None

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        # One identity for the whole text, whatever the mode; every beam of a prompt gets it.
        if input_ids is not None:
            config, embedding = self.config, self.model.embed_tokens
            seeds = symbol_seeds(config, len(input_ids), kwargs.get("lex_seeds"), input_ids.device, embedding.training)
            kwargs["lex_seeds"] = seeds
        # A table for all sequences is no row of the batch.
        table = kwargs.get("embedding_table")
        shared = {"embedding_table": kwargs.pop("embedding_table")} if table is not None and table.dim() == 2 else {}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        kwargs |= shared
        if input_ids is not None:
            # Made once: permutations and shared rows would take longer than a token.
            names = ("embedding_table", "permutations", "lex_seeds")
            given = {name: kwargs.get(name) for name in names} | {"num_tables": kwargs.get("num_tables", 1)}
            table = resolve_table(self.model.embed_tokens, len(input_ids), input_ids.device, **given)
            kwargs["symbol_table"] = table.stored() if isinstance(table, RandomTable | ExemptingTable) else table
        return input_ids, kwargs

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs) -> Tensor | None:
        """The mask of padding for a cache of fixed size, as long as that; the model adds the rest itself."""
        if attention_mask is None:
            return None
        return functional.pad(attention_mask, (0, fixed_size(past_key_values) - attention_mask.shape[1]))

    def _get_logits_processor(self, generation_config, *args, model_kwargs=None, **kwargs):
        processors = super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        seeds = (model_kwargs or {}).get("lex_seeds")
        if not self.config.is_collapsed or seeds is None:
            return processors
        ordered = (
            InSeededOrder(processor, seeds) if isinstance(processor, CUTTING_WARPERS) else processor
            for processor in processors
        )
        if generation_config.do_sample:
            return LogitsProcessorList(ordered)
        # A beam search looks at this many continuations of every beam (more with several ends of text).
        count = 1 if (generation_config.num_beams or 1) == 1 else 4 * generation_config.num_beams
        return ThenBreakTies(ordered, BreakTies(seeds, count))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        embedding_table: Tensor | None = None,
        permutations: Tensor | None = None,
        lex_seeds: Tensor | None = None,
        num_tables: int = 1,
        symbol_table: Table | None = None,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids: (batch, length) int64.
            attention_mask: (batch, cached + length), 0 at padding, left or right: it is never attended to, never
                counts as met, and never enters the loss.
            past_key_values: a cache from an earlier call; it also keeps the symbols met so far.
            inputs_embeds: (batch, length, hidden_size), what `get_input_embeddings()(input_ids, lex_seeds)` gives,
                instead of `input_ids`; only where unseen logits are sampled.
            labels: (batch, length), usually `input_ids`; shifted inside, -100 where ignored.
            logits_to_keep: how many positions at the end get logits, or which; 0 for all.
            embedding_table: rows of all symbols, (vocab_size, hidden_size) or (batch, vocab_size, hidden_size), instead
                of what the configuration says.
            permutations: (batch, vocab_size), of the symbols, before their rows are looked up.
            lex_seeds: (batch,) int64, the identities of the sequences' tables. By default new ones while training,
                `config.eval_seed` for all in evaluation.
            num_tables: number of tables over which probabilities are averaged (arXiv 2305.16349, formula 5).
            symbol_table: what these four say, worked out before, as `generate` does for all tokens of a text.
            skip_logits: whether to compute the loss only; by default, while training with labels.
            kwargs: `num_items_in_batch`, by which the loss is divided instead of the number of pairs; `shift_labels`
                (batch, length), instead of what `labels` say: labels that stand where they are predicted, as training
                on parts of sequences gives them; what attention kernels take.

        Returns:
            loss: mean over pairs of real tokens. logits: (batch, length, vocab_size) float32; with num_tables above 1,
            logarithms of the mean probabilities.
        """
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        tables = (embedding_table, permutations, lex_seeds, num_tables)
        # Before the cache has taken in the new tokens.
        length = input_ids.shape[-1] if inputs_embeds is None else inputs_embeds.shape[1]
        real = real_tokens(attention_mask, length, past_key_values)
        embedding = self.model.embed_tokens
        if inputs_embeds is None:
            symbols = resolve_symbols(
                embedding, input_ids, attention_mask, past_key_values, *tables, symbol_table=symbol_table
            )
        elif self.config.is_collapsed or num_tables > 1:
            raise ValueError("input_ids are needed: which symbols occurred, and in how many tables, decides the logits")
        else:
            table = resolve_table(embedding, len(inputs_embeds), inputs_embeds.device, *tables)
            symbols = Symbols(table, inputs_embeds)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            symbols=symbols,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            targets, counted = self._targets(labels, kwargs.get("shift_labels"), real)
            items = kwargs.get("num_items_in_batch")
            importance = counted / (counted.sum() if items is None else items)
            loss = self._loss(
                hidden[:, : targets.shape[1]], symbols, targets, importance, keeps_products=not skip_logits
            )
        if not skip_logits:
            kept: Tensor | None = None
            if length > 1 and not (isinstance(logits_to_keep, int) and logits_to_keep == 1):
                kept = torch.arange(length, device=hidden.device)
                kept = kept[-logits_to_keep:] if isinstance(logits_to_keep, int) else kept[logits_to_keep]
            logits = self._logits(hidden, symbols, kept)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def token_losses(self, input_ids: Tensor, attention_mask: Tensor | None = None, **tables) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of every symbol, given those before it.

        Args:
            input_ids, attention_mask: (batch, length), as in `forward`.
            tables: `embedding_table`, `permutations`, `lex_seeds`, `num_tables`, as in `forward`.

        Returns:
            losses: (batch, length - 1) float32, in nats: that of `input_ids[:, t + 1]` at t, 0 where it does not count.
            counted: (batch, length - 1) bool, where a real token follows a real one.
        """
        symbols = resolve_symbols(self.model.embed_tokens, input_ids, attention_mask, **tables)
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, symbols=symbols, use_cache=False
        ).last_hidden_state
        targets, counted = self._targets(input_ids, None, real_tokens(attention_mask, input_ids.shape[1], None))
        return self._token_losses(hidden[:, :-1], symbols, targets).masked_fill(~counted, 0.0), counted

    def _scale(self) -> float:
        return self.config.hidden_size**-0.5 if self.config.logit_scale == "rsqrt_hidden" else 1.0

    def _logits(self, hidden: Tensor, symbols: Symbols, positions: Tensor | None) -> Tensor:
        """(batch, positions, vocab_size) at `positions` of the new tokens, or at the last one."""
        hidden = hidden[:, -1:] if positions is None else hidden[:, positions]
        if symbols.first is None:
            logits = self._logits_of_all(hidden, symbols, positions)
        else:
            logits = self._collapsed(hidden, symbols, positions).full_logits()
        return _averaged(logits, symbols.num_tables) if symbols.num_tables > 1 else logits

    def _targets(self, labels: Tensor, shift_labels: Tensor | None, real: Tensor | None):
        """What is predicted at the first positions, (batch, length - 1), and where it counts; of `shift_labels`, at all
        positions."""
        targets = labels[:, 1:] if shift_labels is None else shift_labels
        counted = targets != -100
        if real is not None:
            counted = counted & real[:, : targets.shape[1]]
            if shift_labels is None:
                counted = counted & real[:, 1:]
        targets = targets.masked_fill(~counted, 0)
        if targets.numel() and not torch.compiler.is_compiling():
            low, high = targets.aminmax()
            if low < 0 or high >= self.config.vocab_size:
                found = int(low if low < 0 else high)
                raise ValueError(f"labels must lie in 0..{self.config.vocab_size - 1} or be -100; found {found}")
        return targets, counted

    def _loss(self, hidden: Tensor, symbols: Symbols, targets: Tensor, importance: Tensor, keeps_products: bool):
        """Sum of negative log-likelihoods times importance (batch, length)."""
        table = symbols.table
        if keeps_products or symbols.met is not None or symbols.num_tables > 1:
            return (self._token_losses(hidden, symbols, targets) * importance).sum()
        if isinstance(table, StoredTable) and table.weight.dim() == 2:
            weight, places = table.weight.to(hidden.dtype), table.places(targets).flatten()
            return linear_cross_entropy(hidden.flatten(0, 1), weight, places, importance.flatten(), self._scale())
        if isinstance(table, RandomTable) and table.vocab_size * table.hidden_size <= _MOST_NUMBERS_OF_A_TABLE:
            # One sequence after the other, whose rows are computed once and forgotten.
            losses = [
                linear_cross_entropy(hidden[i], table.of(i).all_rows()[0].to(hidden.dtype), *labels, self._scale())
                for i, labels in enumerate(zip(targets, importance))
            ]
            return torch.stack(losses).sum()
        return (self._token_losses(hidden, symbols, targets) * importance).sum()

    def _token_losses(self, hidden: Tensor, symbols: Symbols, targets: Tensor) -> Tensor:
        """Negative log-likelihoods (batch, length) of `targets` (batch, length) under hidden states (sequences, length,
        hidden_size) of the first positions."""
        targets = targets.repeat_interleave(symbols.num_tables, dim=0)
        positions = torch.arange(targets.shape[1], device=hidden.device)
        if symbols.first is None:
            logits = self._logits_of_all(hidden, symbols, positions)
            losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            losses = losses.view_as(targets)
        else:
            distribution = self._collapsed(hidden, symbols, positions)
            losses = distribution.normalizer() - distribution.of(targets)
        if symbols.num_tables > 1:
            several = losses.unflatten(0, (-1, symbols.num_tables))
            losses = math.log(symbols.num_tables) - (-several).logsumexp(1)
        return losses

    def _collapsed(self, hidden: Tensor, symbols: Symbols, positions: Tensor | None) -> CollapsedDistribution:
        """Distributions at `positions` of the new tokens, or at the last one; hidden (sequences, positions,
        hidden_size)."""
        config = self.config
        assert symbols.met is not None and symbols.first is not None and symbols.met_rows is not None
        met, first = (part.repeat_interleave(symbols.num_tables, dim=0) for part in (symbols.met, symbols.first))
        seen = new_symbols(met, first)[:, None]
        if positions is not None:
            seen = seen & (torch.arange(met.shape[1], device=met.device) <= (positions + symbols.start)[:, None])
        products = (hidden @ symbols.met_rows.to(hidden.dtype).transpose(1, 2)).float()
        logits = products * self._scale()
        if symbols.unseen_row is not None:
            rest = (config.vocab_size - seen.sum(-1)).clamp(min=1)
            unseen = (hidden @ symbols.unseen_row.to(hidden.dtype)).float() * self._scale() - rest.log()
        else:
            unseen = self._unseen_logits(hidden, products, seen)
        return CollapsedDistribution(logits, unseen, met, first, seen, config.vocab_size)

    def _logits_of_all(self, hidden: Tensor, symbols: Symbols, positions: Tensor | None) -> Tensor:
        """Logits (sequences, positions, vocab_size) by the rows of all symbols; where unseen ones are collapsed, theirs
        are replaced."""
        assert symbols.table is not None
        products = symbols.table.products(hidden).float()
        if symbols.met is None:
            return products * self._scale()
        seen = self._seen_of_all(symbols, positions)
        seen = seen if symbols.num_tables == 1 else seen.repeat_interleave(symbols.num_tables, dim=0)
        unseen = self._unseen_logits(hidden, products, seen)
        return torch.where(seen, products * self._scale(), unseen[..., None])

    def _seen_of_all(self, symbols: Symbols, positions: Tensor | None) -> Tensor:
        """Which symbols were met up to `positions` of the new tokens, or up to the last: (batch, positions, vocab_size)
        bool"""
        met, vocab_size = symbols.met, self.config.vocab_size
        assert met is not None
        columns = met.remainder(vocab_size + 1)  # padding in the last, which is cut off
        if positions is None:
            seen = torch.zeros(len(met), vocab_size + 1, dtype=torch.bool, device=met.device)
            return seen.scatter_(1, columns, True)[:, None, :-1]
        first = met.new_full((len(met), vocab_size + 1), met.shape[1])
        places = torch.arange(met.shape[1], device=met.device).expand_as(met)
        first = first.scatter_reduce_(1, columns, places, "amin")[:, :-1]
        return first[:, None] <= (positions + symbols.start)[:, None]

    def _unseen_logits(self, hidden: Tensor, products: Tensor, seen: Tensor) -> Tensor:
        """The logit of each unseen symbol: (sequences, positions).

        Args:
            hidden: (sequences, positions, hidden_size).
            products, seen: (sequences, positions, n), with rows, and which of them belong to symbols seen, each once.
        """
        squared, std = hidden.float().square().sum(-1), self.config.embedding_std
        if self.config.table == "orthonormal":
            return self._outside_variance(squared * std**2, products, seen) * (self._scale() ** 2 / 2)
        return squared * (std**2 * self._scale() ** 2 / 2)

    def _outside_variance(self, squared: Tensor, products: Tensor, seen: Tensor) -> Tensor:
        """Of products with a row that is orthogonal to all that were seen: what of |h|^2 lies outside their span,
        shared by the dimensions that are left."""
        dim = self.config.hidden_size
        count = seen.sum(-1)
        inside = (products.square() * seen).sum(-1) / dim
        outside = (squared - inside).clamp(min=0) * dim / (dim - count).clamp(min=1)
        return torch.where(count < dim, outside, squared)


def _averaged(logits: Tensor, num_tables: int) -> Tensor:
    """Logarithms of mean probabilities: (batch * num_tables, …) -> (batch, …)"""
    several = logits.log_softmax(-1).unflatten(0, (-1, num_tables))
    return several.logsumexp(1) - math.log(num_tables)
