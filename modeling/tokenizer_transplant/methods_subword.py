"""Methods that build a new token's row from the base's tokens that spell it, or that an auxiliary encoder finds alike.

Sources: specification sections 4.1 (TokenAdapt: Tinycompany-AI/tokenadapt, arXiv 2505.09738), 4.2 (ReTok, FVT, the
sub-word methods of mergekit's tokensurgeon) and 4.5 (mappings, as Trans-Tokenizers make them).

By default a token is cut into base tokens whose bytes, joined, are its own, and an auxiliary vector belongs to a
token's true text. With `compatibility`, texts are what the peer takes them for: the id decoded alone and encoded again
(TokenAdapt: leading spaces and parts of characters may be lost), or mergekit's reconstruction.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .auxiliary_vectors import as_auxiliary_vectors
from .nearest_tokens import nearest_tokens
from .token_bytes import ROLES, mergekit_mark
from .transplant_matrix import SourceKind, TransplantMatrix, blend
from .transplanting import TransplantContext, check_count

_TEMPERATURE_FLOOR = 1e-5  # added to the temperature, as TokenAdapt does
_REPLACEMENT = "\ufffd"
_ENTRIES_AT_ONCE = 65_536  # pairs of auxiliary vectors that are compared at once


# --- TokenAdapt -------------------------------------------------------------------------------------------------------


def tokenadapt(
    context: TransplantContext,
    *,
    weight: float = 0.3,
    temperature: float = 0.3,
    top_k: int = 3,
    threshold: float = 0.0,
    local_score_temperature: float = 1.0,
    length_weight: float = 0.5,
) -> TransplantMatrix:
    """TokenAdapt: (1 - weight) times the local row plus weight times the global one (specification 4.1).

    The local row combines the pieces that spell the token, by their auxiliary cosine with it and by their length; the
    global one the `top_k` base tokens of the largest auxiliary cosine. Where one does not exist the other counts in
    full; where neither does, the row is undefined.

    Args:
        weight: of the global row, from 0 (only where there is no local row: hardly anything is searched) to 1.
        temperature: of both softmaxes; 1e-5 is added.
        top_k: base tokens of a global row.
        threshold: base tokens of a smaller cosine get no weight in the global row.
        local_score_temperature: of the softmax over the pieces' cosines that becomes part of their score.
        length_weight: share of the length in that score; lengths are in bytes (in characters, as the id decoded alone,
            with compatibility "tokenadapt").

    Raises:
        ValueError: without auxiliary vectors, and for options outside their range.
    """
    _check_options(weight, temperature, top_k, threshold, local_score_temperature, length_weight)
    auxiliary = as_auxiliary_vectors(context.require_auxiliary("tokenadapt"))
    temperature += _TEMPERATURE_FLOOR

    def local_rows(context: TransplantContext) -> TransplantMatrix:
        return _local_rows(context, auxiliary, temperature, local_score_temperature, length_weight)

    def global_rows(context: TransplantContext) -> TransplantMatrix:
        return _global_rows(context, auxiliary, temperature, top_k, threshold)

    if 0 < weight < 1:
        return blend([(local_rows(context), 1 - weight), (global_rows(context), weight)])
    first, second = (global_rows, local_rows) if weight else (local_rows, global_rows)
    matrix = first(context)
    missing = matrix.undefined()
    return matrix.replaced(missing, second(context.with_targets(context.targets[missing]))) if len(missing) else matrix


def _check_options(
    weight: float, temperature: float, top_k: int, threshold: float, score_temperature: float, length: float
) -> None:
    for name, value in (("weight", weight), ("length_weight", length)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, found {value}")
    if not (0 <= temperature < math.inf and 0 < score_temperature < math.inf):
        raise ValueError(f"temperatures must be positive numbers, found {temperature} and {score_temperature}")
    if math.isnan(threshold):
        raise ValueError(f"threshold must be a number, found {threshold}")
    check_count("top_k", top_k)


def _local_rows(
    context: TransplantContext, auxiliary: Any, temperature: float, score_temperature: float, length_weight: float
) -> TransplantMatrix:
    pieces = _spellings(context)
    texts = _new_texts(context, context.targets.tolist())
    piece_ids, used = _padded(pieces)
    known_ids = sorted({token_id for row in pieces for token_id in row})
    piece_texts = dict(zip(known_ids, _base_texts(context, known_ids)))
    cosines = _cosines_with_pieces(auxiliary, texts, pieces, piece_texts, used)
    similarity = _softmax(cosines / score_temperature, used)
    length = torch.zeros_like(similarity)
    length[used] = torch.tensor(_length_shares(context, texts, pieces, piece_texts), dtype=torch.float64)
    scores = (1 - length_weight) * similarity + length_weight * length
    weights = _softmax(scores / temperature, used)
    return TransplantMatrix.from_combinations(piece_ids, weights, context.base_rows)


def _length_shares(
    context: TransplantContext, texts: Sequence[str], pieces: Sequence[Sequence[int]], piece_texts: Mapping[int, str]
) -> list[float]:
    """Length of every piece as a share of its token's."""
    if context.compatibility == "tokenadapt":
        lengths = {token_id: len(text) for token_id, text in piece_texts.items()}
        totals = [len(text) for text in texts]
    else:
        lengths = {token_id: len(context.base.token_bytes[token_id] or b"") for token_id in piece_texts}
        totals = [sum(lengths[token_id] for token_id in row) for row in pieces]
    return [lengths[token_id] / max(total, 1) for total, row in zip(totals, pieces) for token_id in row]


def _cosines_with_pieces(
    auxiliary: Any,
    texts: Sequence[str],
    pieces: Sequence[Sequence[int]],
    piece_texts: Mapping[int, str],
    used: Tensor,
) -> Tensor:
    """Auxiliary cosine of every target with each of its pieces, 0 where either has no vector: as `used`, float64."""
    strings = sorted({*texts, *piece_texts.values()})
    place = {string: position for position, string in enumerate(strings)}
    vectors, has_vector = auxiliary.vectors(strings)
    norms = vectors.norm(dim=1, dtype=torch.float64)
    norms[~has_vector | (norms == 0)] = torch.inf
    left = torch.tensor([place[text] for text, row in zip(texts, pieces) for _ in row], dtype=torch.int64)
    right = torch.tensor([place[piece_texts[token_id]] for row in pieces for token_id in row], dtype=torch.int64)
    found = [
        (vectors[one].double() * vectors[other].double()).sum(1) / norms[one] / norms[other]
        for one, other in zip(left.split(_ENTRIES_AT_ONCE), right.split(_ENTRIES_AT_ONCE))
    ]
    cosines = torch.zeros(used.shape, dtype=torch.float64)
    if found:
        cosines[used] = torch.cat(found)
    return cosines


def _global_rows(
    context: TransplantContext, auxiliary: Any, temperature: float, top_k: int, threshold: float
) -> TransplantMatrix:
    searchable = _searchable_ids(context)
    keys, has_key = auxiliary.vectors(_base_texts(context, searchable))
    base_ids = torch.tensor(searchable, dtype=torch.int64)[has_key]
    texts = _new_texts(context, context.targets.tolist())
    queries, has_query = auxiliary.vectors(texts)
    has_query = has_query & torch.tensor([_is_text(context, text) for text in texts], dtype=torch.bool)
    indices = torch.full((len(texts), min(top_k, len(base_ids))), -1)
    weights = torch.zeros(indices.shape)
    if indices.shape[1] and bool(has_query.any()):
        found = nearest_tokens(queries[has_query], keys[has_key], top_k)
        shares = (found.similarities.double() / temperature).softmax(1)
        shares = shares.masked_fill(found.similarities < threshold, 0)
        total = shares.sum(1, keepdim=True)
        shares = torch.where(total > 0, shares / total.clamp(min=1e-300), 0)
        indices[has_query] = base_ids[found.indices].masked_fill(shares == 0, -1)
        weights[has_query] = shares.float()
        tied = (found.similarities[:, 1:] == found.similarities[:, :-1]).any(1)
        context.notes["targets with equal auxiliary similarities"] = int(tied.sum())
    return TransplantMatrix.from_combinations(indices, weights, context.base_rows)


def _searchable_ids(context: TransplantContext) -> list[int]:
    """Base ids that a global row may use: ordinary tokens that are whole characters (TokenAdapt: all)."""
    known = [token_id for token_id in context.base.used_ids if token_id < context.base_rows]
    if context.compatibility == "tokenadapt":
        return known
    texts = context.base.texts
    return [i for i in known if i not in context.base.special_ids and _is_text(context, texts[i] or "")]


def _is_text(context: TransplantContext, text: str) -> bool:
    """Whether an auxiliary encoder can know what the text means; TokenAdapt asks it for parts of characters too."""
    return context.compatibility == "tokenadapt" or (bool(text) and _REPLACEMENT not in text)


# --- combinations of the pieces that spell a token --------------------------------------------------------------------


def retok(context: TransplantContext) -> TransplantMatrix:
    """ReTok: the mean of the rows of the pieces that the base's tokenizer cuts the token into."""
    return _combined(_spellings(context), "mean", context)


def fvt(context: TransplantContext) -> TransplantMatrix:
    """Fast vocabulary transfer (arXiv 2402.09977): as ReTok, but cut by the base's model alone, without its
    pre-tokenizer, so that pieces may span words."""
    return _combined(_spellings(context, model_only=True), "mean", context)


def subword(context: TransplantContext, *, combination: str = "mean", order: str = "intended") -> TransplantMatrix:
    """The sub-word methods of mergekit's tokensurgeon.

    Args:
        combination: "mean", "sum", "first_last" (the input row is the last piece's, the head row the first's) or
            "weighted_mean" (weights 1 to m).
        order: of "weighted_mean". "intended": the last piece is heaviest in the input table, the first in the head;
            "mergekit": the reverse, which is what mergekit 0.1.5 computes.
    """
    if combination not in ("mean", "sum", "first_last", "weighted_mean"):
        raise ValueError(f"combination must be mean, sum, first_last or weighted_mean, found {combination!r}")
    if order not in ("intended", "mergekit"):
        raise ValueError(f"order must be 'intended' or 'mergekit', found {order!r}")
    if context.compatibility == "mergekit":
        order = "mergekit"
    return _combined(_spellings(context), combination, context, order)


def _combined(
    pieces: Sequence[Sequence[int]], combination: str, context: TransplantContext, order: str = "intended"
) -> TransplantMatrix:
    indices, used = _padded(pieces)
    lengths = used.sum(1, keepdim=True)
    place = torch.arange(indices.shape[1]).expand_as(indices)
    rising = torch.where(used, place + 1, 0) / (lengths * (lengths + 1) / 2).clamp(min=1)
    falling = torch.where(used, lengths - place, 0) / (lengths * (lengths + 1) / 2).clamp(min=1)
    if combination == "mean":
        return TransplantMatrix.from_combinations(indices, used / lengths.clamp(min=1), context.base_rows)
    if combination == "sum":
        return TransplantMatrix.from_combinations(indices, used.float(), context.base_rows)
    if combination == "weighted_mean":
        for_input, for_head = (rising, falling) if order == "intended" else (falling, rising)
        return TransplantMatrix.from_combinations(
            indices, for_input, context.base_rows, head_indices=indices, head_weights=for_head
        )
    last = indices.gather(1, (lengths - 1).clamp(min=0)) if indices.shape[1] else indices
    first = indices[:, :1]
    return TransplantMatrix.from_combinations(
        last, (last >= 0).float(), context.base_rows, head_indices=first, head_weights=(first >= 0).float()
    )


# --- mappings ---------------------------------------------------------------------------------------------------------


def mapping(
    context: TransplantContext, *, mapping: Mapping[str | int, Any] | str | os.PathLike, min_count: int = 10
) -> TransplantMatrix:
    """Rows that the caller maps: the weighted mean of the base tokens given for a new token.

    Args:
        mapping: {new: old} or {new: [(old, weight), …]}, tokens by raw string or id; or a file, as `read_mapping`
            takes it. Tokens of it that match a base token follow the mapping; tokens that it lacks are undefined.
        min_count: of a TSV file's counts that are used.

    Raises:
        ValueError: for unknown tokens, base ids without a row, and weights that are negative or all zero.
    """
    entries = resolved_mapping(context, mapping, min_count)
    rows = [entries.get(new_id, []) for new_id in context.targets.tolist()]
    indices, used = _padded([[base_id for base_id, _ in row] for row in rows])
    weights = torch.zeros(used.shape, dtype=torch.float64)
    weights[used] = torch.tensor([share for row in rows for _, share in row], dtype=torch.float64)
    return TransplantMatrix.from_combinations(indices, weights, context.base_rows, kind=SourceKind.MAPPED)


def resolved_mapping(
    context: TransplantContext, mapping: Mapping[str | int, Any] | str | os.PathLike, min_count: int = 10
) -> dict[int, list[tuple[int, float]]]:
    """A mapping as new id -> [(base id, share)], shares adding up to 1."""
    if isinstance(mapping, (str, os.PathLike)):
        mapping = read_mapping(mapping, min_count)
    if not isinstance(mapping, Mapping):
        raise TypeError(f"mapping must be {{new: base token or pairs}} or a file, found {mapping!r}")
    base_ids, new_ids = context.base.tokenizer.get_vocab(), context.new.tokenizer.get_vocab()
    resolved = {}
    for new, sources in mapping.items():
        try:
            pairs = [(sources, 1.0)] if isinstance(sources, (str, int)) else [(old, float(p)) for old, p in sources]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{new!r} must be mapped to a base token or to pairs [base token, weight], found {sources!r}"
            ) from error
        total = sum(share for _, share in pairs)
        if not 0 < total < math.inf or any(share < 0 for _, share in pairs):
            raise ValueError(f"the weights that {new!r} is mapped with must be positive and finite, found {pairs}")
        new_id = _token_id(new, new_ids, context.new.size, "new")
        kept = [(_token_id(old, base_ids, context.base_rows, "base"), share / total) for old, share in pairs if share]
        resolved[new_id] = kept
    return resolved


def read_mapping(path: str | os.PathLike, min_count: int = 10) -> dict[str | int, Any]:
    """A mapping from a file: JSON, a list of [new token, [[old token, weight], …]] (Trans-Tokenizers) or an object; or
    TSV, an alignment's lines `new token <tab> old token <tab> count`, of which counts below `min_count` are dropped.

    Raises ValueError for another ending and for lines of another form.
    """
    path = Path(path)
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {new: sources for new, sources in content}
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path.name} must hold JSON, a list [[new token, [[old token, weight], …]], …] or an object: {error}"
            ) from error
    if path.suffix != ".tsv":
        raise ValueError(f"expected a mapping in .json or .tsv, found {path.name}")
    counts: dict[str | int, Counter] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        fields = line.rstrip("\r").split("\t")
        if line and (len(fields) != 3 or not fields[2].isdecimal()):
            raise ValueError(f"{path.name}, line {number}: expected new token, old token and count, found {line!r}")
        if line and int(fields[2]) >= min_count:
            counts.setdefault(fields[0], Counter())[fields[1]] += int(fields[2])
    return {new: sorted(found.items(), key=lambda pair: (-pair[1], pair[0])) for new, found in counts.items()}


def _token_id(token: str | int, ids: Mapping[str, int], limit: int, which: str) -> int:
    token_id = ids.get(token, -1) if isinstance(token, str) else int(token)
    if not 0 <= token_id < limit:
        raise ValueError(f"the mapping names {token!r}, which has no row in the {which} vocabulary")
    return token_id


# --- what tokens are spelled with -------------------------------------------------------------------------------------


def _spellings(context: TransplantContext, *, model_only: bool = False) -> list[list[int]]:
    """For every target the base ids that spell it; [] where none do."""
    targets = context.targets.tolist()
    if context.compatibility == "tokenadapt":
        encoded = context.base.encoded(_new_texts(context, targets))
    elif context.compatibility == "mergekit":
        encoded = context.base.encoded([_mergekit_text(context, new_id) for new_id in targets])
    else:
        raw = [context.new.token_bytes[new_id] or b"" for new_id in targets]
        return context.base.pieces(raw, context.base_rows, model_only=model_only)
    return [[token_id for token_id in row if token_id < context.base_rows] for row in encoded]


def _new_texts(context: TransplantContext, ids: Sequence[int]) -> list[str]:
    """What auxiliary vectors of new tokens are looked up by."""
    if context.compatibility == "tokenadapt":
        return context.new.decoded_alone(ids)
    return [context.new.texts[token_id] or "" for token_id in ids]


def _base_texts(context: TransplantContext, ids: Sequence[int]) -> list[str]:
    if context.compatibility == "tokenadapt":
        return context.base.decoded_alone(ids)
    return [context.base.texts[token_id] or "" for token_id in ids]


def _mergekit_text(context: TransplantContext, new_id: int) -> str:
    """mergekit 0.1.5's text of a token: the raw string, its mark a space; a named special token by its role's name."""
    for role in ROLES:
        if context.new.roles.get(role) == new_id:
            return f"{role}_token"
    token = context.new.tokens[new_id] or ""
    mark = mergekit_mark(context.new)
    return " " + token[len(mark) :] if token.startswith(mark) else token


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Lists of ids as `(rows, longest)` int64, -1 in unused places, and which places are used."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    used = torch.arange(int(lengths.max()) if len(rows) else 0) < lengths[:, None]
    indices = torch.full(used.shape, -1)
    indices[used] = torch.tensor([token_id for row in rows for token_id in row], dtype=torch.int64)
    return indices, used


def _softmax(scores: Tensor, used: Tensor) -> Tensor:
    """Softmax over the used places of every row; 0 elsewhere, also in rows without any."""
    return scores.masked_fill(~used, -torch.inf).softmax(1).nan_to_num(0.0)
