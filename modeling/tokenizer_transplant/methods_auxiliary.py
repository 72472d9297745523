"""Methods that compare tokens in an auxiliary space: FOCUS, WECHSEL, OFA and CLP-Transfer.

Sources: specification section 4.4; FOCUS arXiv 2305.14481, WECHSEL arXiv 2112.06598, OFA arXiv 2311.08849, CLP-Transfer
arXiv 2301.09626.

A token is looked up by its true text, a leading space included. Tokens that are no whole characters have no vector
then, and special tokens of the base give no rows to others. With `compatibility` "focus" or "wechsel" a token is looked
up by its id decoded alone, as those peers do, whatever that gives. Tokens without a vector are left undefined for a
fallback; with `compatibility` they are drawn as the peer draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .auxiliary_vectors import AuxiliaryVectors, as_auxiliary_vectors
from .nearest_tokens import MEMORY_BUDGET, nearest_tokens, sparsemax_tokens
from .token_bytes import Vocabulary
from .transplant_matrix import SourceKind, TransplantMatrix
from .transplanting import TransplantContext, check_count

_PEERS = ("focus", "wechsel")
_FOCUS_SEED = 42
_WECHSEL_SEED = 1234
# Cosines whose sum is below this part of the sum of their amounts cancel out: no weights can be made of them.
_LEAST_SUM = 1e-3


def focus(context: TransplantContext, *, key: str = "text", memory_budget: int = MEMORY_BUDGET) -> TransplantMatrix:
    """FOCUS: the matched tokens' rows, weighted with the sparsemax of their auxiliary cosines with the token.

    Args:
        key: what a token's vector is looked up by, "text" or "token", its raw string (for fastText models trained on
            text that the new tokenizer has cut).
        memory_budget: bytes for the comparison, see `sparsemax_tokens`.

    Raises:
        ValueError: without auxiliary vectors, and where no matched token has one.
    """
    if key not in ("text", "token"):
        raise ValueError(f"key must be 'text' or 'token', found {key!r}")
    vectors, has_vector = _token_vectors(context, "focus", context.new, key)
    anchors, base_ids = _anchors(context, "focus", has_vector)
    known = _known(context, has_vector)
    found = sparsemax_tokens(vectors[context.targets[known]], vectors[anchors], memory_budget=memory_budget)
    matrix = _combinations(context, known, base_ids, found.indices, found.weights)
    if context.compatibility != "focus":
        return matrix
    unknown = (~known).nonzero()[:, 0]
    drawn = _dense_rows(context, lambda table: _deepfocus_draws(len(unknown), table), SourceKind.RANDOM)
    return matrix.replaced(unknown, drawn)


def wechsel(
    context: TransplantContext,
    *,
    neighbors: int = 10,
    temperature: float = 0.1,
    base_auxiliary: Any = None,
    dictionary: Sequence[tuple[str, str]] | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> TransplantMatrix:
    """WECHSEL: the nearest base tokens' rows, weighted with the softmax of their auxiliary cosines.

    Args:
        neighbors: base tokens of every row.
        temperature: of the softmax.
        base_auxiliary: vectors of the base's tokens where they are another language's, in another space than the
            context's, which are then the new tokens'.
        dictionary: pairs (word of the base's language, word of the new one), by which the spaces of `base_auxiliary`
            are aligned: the orthogonal map that brings the pairs closest (Procrustes). Needed for a space of its own.
        memory_budget: bytes for the comparison, see `nearest_tokens`.

    Raises:
        ValueError: without auxiliary vectors, where no base token has one, and for options outside their range.
    """
    _check_neighbours(neighbors, temperature)
    vectors, has_vector = _token_vectors(context, "wechsel", context.new)
    if base_auxiliary is None:
        if dictionary is not None:
            raise ValueError("dictionary aligns the space of base_auxiliary: give that, too, or leave it out")
        base_vectors, base_has = _token_vectors(context, "wechsel", context.base)
    else:
        base_vectors, base_has = _aligned_base_vectors(context, base_auxiliary, dictionary)
    matrix = _nearest_rows(context, vectors, has_vector, base_vectors, base_has, neighbors, temperature, memory_budget)
    if context.compatibility != "wechsel":
        return matrix
    unknown = (~has_vector[context.targets]).nonzero()[:, 0]
    drawn = _dense_rows(
        context, lambda table: _wechsel_draws(context, table)[context.targets[unknown]], SourceKind.RANDOM
    )
    return matrix.replaced(unknown, drawn)


def ofa(
    context: TransplantContext,
    *,
    neighbors: int = 10,
    temperature: float = 0.1,
    factor_dimensions: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> TransplantMatrix:
    """OFA: as WECHSEL, in one multilingual space; matched tokens are copied.

    Args:
        neighbors, temperature, memory_budget: as in `wechsel`.
        factor_dimensions: combine the rows of the best factorisation of each table with so many dimensions (its
            truncated singular value decomposition) instead of the rows themselves; copied rows stay whole.

    Raises:
        ValueError: without auxiliary vectors, where no base token has one, and for options outside their range.
    """
    _check_neighbours(neighbors, temperature)
    width = context.input_table.shape[1]
    if factor_dimensions is not None and not 1 <= factor_dimensions <= width:
        raise ValueError(f"factor_dimensions must lie between 1 and {width}, found {factor_dimensions}")
    vectors, has_vector = _token_vectors(context, "ofa", context.new)
    base_vectors, base_has = _token_vectors(context, "ofa", context.base)
    matrix = _nearest_rows(context, vectors, has_vector, base_vectors, base_has, neighbors, temperature, memory_budget)
    if factor_dimensions is None:
        return matrix
    defined = (matrix.kinds != SourceKind.UNDEFINED).nonzero()[:, 0]
    rows = matrix.input.select(defined)
    projected = _dense_rows(context, lambda table: _projected(rows.apply(table.float()), table, factor_dimensions))
    return matrix.replaced(defined, projected)


def clp(
    context: TransplantContext, *, top_k: int | None = None, memory_budget: int = MEMORY_BUDGET
) -> TransplantMatrix:
    """CLP-Transfer: the matched tokens' rows, weighted with their cosines with the token, divided by the sum of these.

    The cosines are those of the donor's input rows, a small model that speaks the new tokenizer; without a donor, of
    auxiliary vectors. Tokens whose cosines cancel out are left undefined.

    Args:
        top_k: use the matched tokens of the largest cosines only; None uses all, and gives dense rows.
        memory_budget: bytes for the comparison, see `nearest_tokens`.

    Raises:
        ValueError: with neither donor nor auxiliary vectors, where no matched token has one, and for `top_k < 1`.
    """
    if top_k is not None:
        check_count("top_k", top_k)
    vectors, has_vector = _helper_vectors(context)
    anchors, base_ids = _anchors(context, "clp", has_vector)
    known = _known(context, has_vector)
    queries = vectors[context.targets[known]]
    if top_k is None:
        return _cosine_weighted_sums(context, known, queries, vectors[anchors], base_ids)
    found = nearest_tokens(queries, vectors[anchors], top_k, memory_budget=memory_budget)
    cosines = found.similarities.double()
    total = cosines.sum(1, keepdim=True)
    usable = total > _LEAST_SUM * cosines.abs().sum(1, keepdim=True)
    weights = torch.where(usable, cosines / torch.where(usable, total, 1.0), 0.0)
    indices = found.indices.masked_fill(~usable, -1)
    return _combinations(context, known, base_ids, indices, weights)


# --- vectors of tokens ------------------------------------------------------------------------------------------------


def _token_vectors(
    context: TransplantContext, method: str, vocabulary: Vocabulary, key: str = "text"
) -> tuple[Tensor, Tensor]:
    """Auxiliary vectors of all tokens by id, `(size, dim)`, and which tokens have one, `(size,)`."""
    return _vectors_by_id(context, as_auxiliary_vectors(context.require_auxiliary(method)), vocabulary, key)


def _vectors_by_id(
    context: TransplantContext, auxiliary: AuxiliaryVectors, vocabulary: Vocabulary, key: str = "text"
) -> tuple[Tensor, Tensor]:
    exists = torch.tensor([token is not None for token in vocabulary.tokens])
    if key == "token":
        strings = [token or "" for token in vocabulary.tokens]
    elif context.compatibility in _PEERS:
        strings = [""] * vocabulary.size
        for token_id, text in zip(vocabulary.used_ids, vocabulary.decoded_alone(vocabulary.used_ids)):
            strings[token_id] = text
    else:
        strings = [text or "" for text in vocabulary.texts]
        exists = torch.tensor(
            [bool(raw) and raw == text.encode() for raw, text in zip(vocabulary.token_bytes, strings)]
        )
    vectors, has_vector = auxiliary.vectors(strings)
    return vectors.float(), has_vector & exists


def _helper_vectors(context: TransplantContext) -> tuple[Tensor, Tensor]:
    """Vectors of the new tokens by id: the donor's rows, or auxiliary vectors."""
    if context.donor_input is None:
        if context.auxiliary is None:
            raise ValueError("method 'clp' needs donor=, a small model that uses the new tokenizer, or auxiliary=")
        return _token_vectors(context, "clp", context.new)
    vectors = torch.zeros(context.new.size, context.donor_input.shape[1])
    rows = min(context.new.size, len(context.donor_input))
    vectors[:rows] = context.donor_input[:rows].detach().float().cpu()
    exists = torch.tensor([token is not None for token in context.new.tokens])
    return vectors, exists & (vectors != 0).any(1)


def _anchors(context: TransplantContext, method: str, has_vector: Tensor) -> tuple[Tensor, Tensor]:
    """New ids and base ids of the matched tokens whose rows may be combined: those with a vector, and (but for a
    peer's results) no special tokens."""
    new_ids, base_ids = context.anchors
    usable = has_vector[new_ids] & _may_give_rows(context, base_ids)
    if not usable.any():
        raise ValueError(
            f"method {method!r} needs matched tokens with an auxiliary vector: of {len(new_ids)} matched ones none has"
        )
    return new_ids[usable], base_ids[usable]


def _may_give_rows(context: TransplantContext, base_ids: Tensor) -> Tensor:
    if context.compatibility in _PEERS:
        return torch.ones_like(base_ids, dtype=torch.bool)
    special = torch.tensor(sorted(context.base.special_ids), dtype=torch.int64)
    return ~torch.isin(base_ids, special)


def _known(context: TransplantContext, has_vector: Tensor) -> Tensor:
    """Which targets have a vector, `(targets,)` bool; the report tells how many have none."""
    known = has_vector[context.targets]
    context.notes["targets without auxiliary vector"] = int((~known).sum())
    return known


def _aligned_base_vectors(
    context: TransplantContext, base_auxiliary: Any, dictionary: Sequence[tuple[str, str]] | None
) -> tuple[Tensor, Tensor]:
    """The base tokens' vectors, rotated into the space of the new ones."""
    pairs = [] if dictionary is None or isinstance(dictionary, str) else list(dictionary)
    if not pairs or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise ValueError("base_auxiliary is a space of its own: dictionary= must give pairs (base word, new word)")
    base_side = as_auxiliary_vectors(base_auxiliary)
    new_side = as_auxiliary_vectors(context.require_auxiliary("wechsel"))
    base_words, base_found = base_side.vectors([base for base, _ in pairs])
    new_words, new_found = new_side.vectors([new for _, new in pairs])
    both = base_found & new_found
    if not both.any():
        raise ValueError(f"none of the {len(pairs)} pairs of the dictionary has a vector on both sides")
    left, _, right = torch.linalg.svd(base_words[both].double().T @ new_words[both].double(), full_matrices=False)
    vectors, has_vector = _vectors_by_id(context, base_side, context.base)
    return (vectors.double() @ (left @ right)).float(), has_vector


# --- rows -------------------------------------------------------------------------------------------------------------


def _check_neighbours(neighbors: int, temperature: float) -> None:
    check_count("neighbors", neighbors)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}")


def _combinations(
    context: TransplantContext, known: Tensor, base_ids: Tensor, indices: Tensor, weights: Tensor
) -> TransplantMatrix:
    """A row for every target: for the known ones weighted positions in `base_ids`, the others undefined."""
    all_indices = torch.full((len(known), indices.shape[1]), -1)
    all_weights = torch.zeros(all_indices.shape)
    all_indices[known] = torch.where(indices >= 0, base_ids[indices.clamp(min=0)], -1)
    all_weights[known] = weights.float()
    return TransplantMatrix.from_combinations(all_indices, all_weights, context.base_rows)


def _nearest_rows(
    context: TransplantContext,
    vectors: Tensor,
    has_vector: Tensor,
    base_vectors: Tensor,
    base_has: Tensor,
    neighbors: int,
    temperature: float,
    memory_budget: int,
) -> TransplantMatrix:
    """The softmax of the cosines with the nearest base tokens as weights."""
    base_ids = base_has.nonzero()[:, 0]
    base_ids = base_ids[(base_ids < context.base_rows) & _may_give_rows(context, base_ids)]
    if not len(base_ids):
        raise ValueError(f"none of the base's {len(base_has)} tokens has an auxiliary vector")
    known = _known(context, has_vector)
    if not known.any():  # word vectors that know none of the words have no width either
        nothing = torch.empty(0, 0)
        return _combinations(context, known, base_ids, nothing.long(), nothing)
    found = nearest_tokens(
        vectors[context.targets[known]], base_vectors[base_ids], neighbors, memory_budget=memory_budget
    )
    tied = (found.similarities[:, 1:] == found.similarities[:, :-1]).any(1)
    context.notes["targets with equal auxiliary similarities"] = int(tied.sum())
    return _combinations(
        context, known, base_ids, found.indices, (found.similarities.double() / temperature).softmax(1)
    )


def _cosine_weighted_sums(
    context: TransplantContext, known: Tensor, queries: Tensor, anchors: Tensor, base_ids: Tensor
) -> TransplantMatrix:
    """CLP-Transfer over all matched tokens.

    Sums over anchors of cosine times row are a product of the direction with one matrix of all anchors, so the matrix
    of all cosines is never needed; nor for their sum, and by Cauchy and Schwarz a bound of the sum of their amounts.
    """
    directions, others = functional.normalize(queries.double()), functional.normalize(anchors.double())
    total = directions @ others.sum(0)
    amounts = ((directions @ (others.T @ others)) * directions).sum(1).clamp(min=0).mul(len(others)).sqrt()
    usable = total > _LEAST_SUM * amounts
    shares = directions[usable] / total[usable, None]
    rows = _dense_rows(context, lambda table: shares @ (others.T @ table.detach()[base_ids].double().cpu()))
    nothing = torch.full((len(context.targets), 0), -1)
    matrix = TransplantMatrix.from_combinations(nothing, nothing.float(), context.base_rows)
    return matrix.replaced(known.nonzero()[:, 0][usable], rows)


def _projected(rows: Tensor, table: Tensor, dimensions: int) -> Tensor:
    """The rows in the span of the table's first right singular vectors."""
    directions = torch.linalg.svd(table.detach().double(), full_matrices=False).Vh[:dimensions]
    return rows.double() @ directions.T @ directions


def _dense_rows(
    context: TransplantContext, rows_of: Callable[[Tensor], Tensor], kind: SourceKind = SourceKind.DENSE
) -> TransplantMatrix:
    """Rows that a function makes of the input table and, where there is one, of the head."""
    rows = rows_of(context.input_table)
    head_rows = None if context.head_table is None else rows_of(context.head_table)
    nothing = torch.full((len(rows), 0), -1)
    return TransplantMatrix.from_combinations(
        nothing, nothing.float(), context.base_rows, dense=rows, head_dense=head_rows, kind=kind
    )


# --- the peers' draws -------------------------------------------------------------------------------------------------


def _deepfocus_draws(count: int, table: Tensor) -> Tensor:
    """deepfocus' draws, one row after the other: N(mean, standard deviation) per dimension, of all rows."""
    table = table.detach().float().cpu()
    generator = torch.Generator().manual_seed(_FOCUS_SEED)
    mean, deviation = table.mean(0), table.std(0)
    rows = [torch.normal(mean, deviation, generator=generator) for _ in range(count)]
    return torch.stack(rows) if rows else table[:0]


def _wechsel_draws(context: TransplantContext, table: Tensor) -> Tensor:
    """wechsel's draws, for all new tokens at once: N(mean, standard deviation) per dimension, of the base's tokens."""
    known = table.detach()[: context.base.size].float().cpu().numpy()
    shape = (context.new.size, table.shape[1])
    draws = np.random.RandomState(_WECHSEL_SEED).normal(known.mean(0), known.std(0), shape)
    return torch.from_numpy(draws).float()
