"""Late-interaction scores: for every query vector the best match among the document's vectors, summed over the query.

`max_sim` scores queries against documents, `max_sim_pairs` every query against candidates of its own (for training).
`rerank` gives the best documents for one query in the order of their exact scores, which it reaches by excluding most
documents with cheap approximations of known error. `PackedDocuments` prepares documents that are reranked repeatedly.

The score is that of ColBERT (arXiv 2004.12832, section 3.3). Maxima range over the document's own vectors only: unlike
in `colbert-ai`'s packed kernel and in PyLate, no zero row and no initial 0 competes with negative similarities.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SIMILARITIES = ("cosine", "l2")

# Vectors of documents that are compared at once: on a CPU, they and their similarities stay in the cache.
_BLOCK_VECTORS = {"cpu": 12_288, "cuda": 262_144}
_HUGE_BYTES = 2**22  # from here on, numpy asks for huge pages
_KEPT_BYTES = 2**25
_ALIGNMENT = 64  # bytes
_BLOCK_SIMILARITIES = {"cpu": 2**18, "cuda": 2**26}
_QUERY_ROWS = 4_096
_KERNEL_VECTORS = 2**15  # fewer are compared in the time that numba takes to be imported
_FEW_CANDIDATES = 4  # times top_k: so many exact scores cost less than excluding some of them
_ROW_STEP = 256  # rows of products are multiples of it: oneDNN compiles a kernel for every shape that it has not met

_OVERFLOW = 2.0**120  # far below where sums of products could become infinite, and their differences NaN
_FLOAT32_UNIT_ROUNDOFF = 2.0**-24


class Ranking(NamedTuple):
    """The best documents of one query, best first; torch tensors or numpy arrays, as the query was.

    positions: `(min(top_k, documents),)` int64, positions in the documents that were given.
    scores: the same shape, float32.
    """

    positions: Any
    scores: Any


class PackedDocuments:
    """The vectors of many documents in one tensor, prepared once for `rerank`; `max_sim` takes it too.

    Holds float32 vectors and, where `rerank` has a pass in bfloat16 over so many, a copy in bfloat16: 6 bytes per
    component. Documents without vectors are allowed.

    documents, lengths, mask: as `documents`, `document_lengths`, `document_mask` of `max_sim`; taken as float32.

    Attributes: `vectors`, `(total vectors, dim)` float32; `lengths`, the number of vectors of every document;
    `len(packed)`, the number of documents. Raises ValueError for NaN and infinite components.
    """

    def __init__(self, documents, *, lengths=None, mask=None):
        with torch.no_grad():
            items = _items(documents, lengths, mask, "document")
            self.lengths = [len(item) for item in items]
            self.vectors = _packed(items)
            self._split()
            self._rough: Tensor | None = None  # the vectors in bfloat16
            # (documents,) float64: not below the norm of any vector, and of any vector minus its copy in bfloat16.
            self._norms, self._errors = self._prepared()
            _refuse_non_finite("document", self._items, self._norms, range(len(self)))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        """Without the views of single documents, with each of which pickle would write all vectors again."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_items", "_lengths")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._split()

    def _split(self) -> None:
        self._items = list(self.vectors.split(self.lengths))
        self._lengths = np.array(self.lengths, np.int64)

    def _prepared(self) -> tuple[Tensor, Tensor]:
        kernel = _kernel_for(self._items)
        if kernel is not None:
            self._rough = _new_memory(self.vectors.numel(), torch.bfloat16).view(self.vectors.shape)
            squares = kernel.rounded_to_bfloat16(self.vectors, self._rough, self._lengths)
            bounds = _upper_bounds(squares.sqrt(), self.vectors.shape[1])
            return bounds[:, 0], bounds[:, 1]
        norms = torch.zeros(len(self), device=self.vectors.device, dtype=torch.float64)
        for positions, block in _blocks(self._items, _BLOCK_VECTORS["cpu"], reused_as=torch.float32):
            norms[positions] = _largest_norms(block)
        return norms, torch.zeros_like(norms)


def max_sim(
    queries,
    documents,
    *,
    query_lengths=None,
    query_mask=None,
    document_lengths=None,
    document_mask=None,
    similarity: str = "cosine",
):
    """Scores of all queries against all documents: `(queries, documents)`, float32.

    queries, documents: torch tensors or numpy arrays of floating-point vectors, in one of these forms:
        a list of `(n_i, dim)`;
        `(n, length, dim)`, padded, with a mask `(n, length)`, True (or the integer 1, as in a model's output) for the
        vectors that count, or with lengths `(n,)`; without either all vectors count;
        `(total, dim)`, packed, with lengths `(n,)`; without lengths it is one query or one document.
        `documents` may also be `PackedDocuments`.
    similarity: "cosine", the dot product (the model normalises its vectors), or "l2", the negated squared distance.

    The result is a numpy array if both sides are, else a tensor on their device. Products are computed and summed in
    float32 whatever the inputs' dtype is, except that float64 inputs give float64 scores. Gradients flow to both sides;
    where several vectors of a document are equally good, to one of them. A document without vectors scores -inf.
    Neither memory nor scores (beyond float32 rounding) depend on how long the other documents are: they are compared in
    blocks of similar length, filled up with repeated vectors, which change no maximum.

    Raises TypeError or ValueError for queries without vectors, vectors that hold NaN or infinity, and dims, dtypes,
    lengths or masks that do not fit.
    """
    as_numpy = _is_numpy(queries) and _is_numpy(documents, or_neutral=True)
    query_items = _items(queries, query_lengths, query_mask, "query")
    document_items = _items(documents, document_lengths, document_mask, "document")
    _check_pair(query_items, document_items)
    _check_similarity(similarity)
    device_type = query_items[0].device.type if query_items else "cpu"
    with torch.autocast(device_type, enabled=False):
        scores = _all_scores(query_items, document_items, similarity)
    if scores.isnan().any():
        row, column = scores.isnan().nonzero()[0].tolist()
        raise ValueError(f"the score of query {row} and document {column} is NaN: their products overflow")
    return scores.detach().numpy() if as_numpy else scores


def max_sim_pairs(queries, documents, *, query_mask=None, document_mask=None, similarity: str = "cosine") -> Tensor:
    """Scores of every query against candidates of its own, for training: `(batch, candidates)`, float32.

    queries: `(batch, query_length, dim)`; documents: `(batch, candidates, document_length, dim)`.
    query_mask: `(batch, query_length)`, document_mask: `(batch, candidates, document_length)`, True for the vectors
        that count; all count without it.
    similarity, dtypes, gradients, documents without vectors: as in `max_sim`, but all similarities are held at once.
    """
    _check_similarity(similarity)
    queries, documents = _as_tensor(queries, "query"), _as_tensor(documents, "document")
    if queries.dim() != 3 or documents.dim() != 4 or len(queries) != len(documents):
        shapes = f"{tuple(queries.shape)} and {tuple(documents.shape)}"
        raise ValueError(f"expected (batch, length, dim) and (batch, candidates, length, dim), not {shapes}")
    _check_dims(queries, documents)
    dtype = _working_dtype([queries, documents])
    with torch.autocast(queries.device.type, enabled=False):
        similarities = _pair_similarities(queries.to(dtype), documents.to(dtype), similarity)
    if document_mask is not None:
        mask = _checked_mask(document_mask, documents.shape[:3], "document").to(documents.device)
        similarities = similarities.masked_fill(~mask[..., None], -torch.inf)
    best = similarities.max(2).values
    if query_mask is not None:
        mask = _checked_mask(query_mask, queries.shape[:2], "query").to(queries.device)
        if not mask.any(1).all():
            raise ValueError(f"query {int((~mask.any(1)).nonzero()[0])} has no vectors")
        best = best.masked_fill(~mask[:, None, :], 0)
    return best.sum(-1)


def rerank(query, documents, top_k: int = 10, *, query_mask=None, document_lengths=None, document_mask=None) -> Ranking:
    """The `top_k` best documents for one query, guaranteed, with their exact scores.

    query: one query, `(query_length, dim)` or `(1, query_length, dim)`, `query_mask` as in `max_sim`.
    documents, document_lengths, document_mask: as in `max_sim`; `PackedDocuments` where they serve several queries.
    top_k: at least 1; all documents are returned where there are fewer.

    The exact score is the MaxSim of the float32 vectors computed in float64, one document at a time, and rounded to
    float32: it depends on nothing but the query and that document. Documents with equal scores stand in the order of
    their positions, documents without vectors last, with -inf.

    Most documents are excluded earlier, by a pass in bfloat16 (over many vectors in float32, where numba is installed
    and the processor has AVX-512 BF16: `max_sim_kernel.py`) and one in float32, each with an error bound
    (`_error_bounds`): what the bound cannot exclude goes on to the next pass, so that hard cases cost time, never a
    wrong order.

    Raises TypeError or ValueError as `max_sim`, and for top_k < 1.
    """
    top_k = _checked_top_k(top_k)
    as_numpy = _is_numpy(query) and _is_numpy(documents, or_neutral=True)
    with torch.no_grad():
        query_items = _items(query, None, query_mask, "query")
        if len(query_items) != 1:
            raise ValueError(f"rerank takes one query, (length, dim), but was given {len(query_items)}")
        document_items = _items(documents, document_lengths, document_mask, "document")
        _check_pair(query_items, document_items)
        rows = query_items[0].float()
        _refuse_non_finite("query", [rows], rows.sum()[None], [0])
        prepared = documents if isinstance(documents, PackedDocuments) else None
        with torch.autocast(rows.device.type, enabled=False):
            ranking = _Reranking(rows, document_items, prepared).best(top_k)
    return Ranking(*(part.numpy() for part in ranking)) if as_numpy else ranking


# --- scores -----------------------------------------------------------------------------------------------------------


def _all_scores(queries: list[Tensor], documents: list[Tensor], similarity: str) -> Tensor:
    dtype = _working_dtype(queries + documents)
    device = queries[0].device if queries else None
    scores = torch.full((len(queries), len(documents)), -torch.inf, dtype=dtype, device=device)
    if not queries:
        return scores
    groups = [torch.cat(group).to(dtype) for group in _grouped(queries, _QUERY_ROWS)]
    lengths = [[len(query) for query in group] for group in _grouped(queries, _QUERY_ROWS)]
    for group in groups:
        if not group.detach().sum().isfinite():
            _refuse_non_finite("query", queries, dtype=dtype)
    order, found, sums_of_first = [], [], []
    needs_gradient = torch.is_grad_enabled() and any(item.requires_grad for item in queries + documents)
    reused_as = None if needs_gradient else dtype
    for positions, block in _blocks(documents, _block_vectors(groups), reused_as=reused_as):
        block = block.to(dtype)
        best: list[Tensor] = []
        for group in groups:
            similarities = _similarities(group, block, similarity, needs_gradient)
            if not best:
                # With any one vector that is finite, one that is not has a similarity that is not.
                sums_of_first.append(similarities.detach()[..., 0].sum(1))
            best.append(_best(similarities))
            del similarities  # or the next ones would lie in other memory, outside the cache
        sums = [part.sum(-1) for part, sizes in zip(best, lengths) for part in part.split(sizes, dim=-1)]
        found.append(torch.stack(sums))
        order += positions
    if not found:
        return scores
    _refuse_non_finite("document", documents, torch.cat(sums_of_first), order, dtype)
    return scores.index_copy(1, torch.tensor(order, device=device), torch.cat(found, dim=1))


def _similarities(queries: Tensor, block: Tensor, similarity: str, needs_gradient: bool = False) -> Tensor:
    """`(documents, length, query vectors)` from `(query vectors, dim)` and `(documents, length, dim)`."""
    rows = block.flatten(0, 1)
    similarities = rows @ queries.T if needs_gradient else _products(rows, queries)
    if similarity == "l2":
        squares = block.flatten(0, 1).square().sum(-1)[:, None] + queries.square().sum(-1)
        similarities = 2 * similarities - squares
    return similarities.view(len(block), -1, len(queries))


def _products(rows: Tensor, queries: Tensor) -> Tensor:
    """`rows @ queries.T`, without gradients. In float32 on a CPU by the function of oneDNN that Inductor's code calls:
    the library behind `@` takes twice as long on some processors, and there is no public choice between them."""
    if rows.dtype is not torch.float32 or rows.device.type != "cpu" or not _has_onednn_linear():
        return rows @ queries.T
    count = len(rows)
    rows = _with_spare_rows(rows)
    return torch.ops.mkldnn._linear_pointwise.default(rows, queries, None, "none", [], "")[:count]


def _with_spare_rows(rows: Tensor) -> Tensor:
    """The rows and those behind them in the same memory, whatever they hold, up to a multiple of `_ROW_STEP`."""
    count = _rounded_up(len(rows))
    elements = rows.untyped_storage().nbytes() // rows.element_size() - rows.storage_offset()
    return rows.as_strided((count, rows.shape[1]), rows.stride()) if count * rows.shape[1] <= elements else rows


def _has_onednn_linear() -> bool:
    available = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _best(similarities: Tensor) -> Tensor:
    """`(documents, query vectors)`"""
    if not similarities.requires_grad:
        return similarities.amax(1)
    return similarities.max(1).values  # remembers positions, where amax would keep all similarities for its gradient


def _pair_similarities(queries: Tensor, documents: Tensor, similarity: str) -> Tensor:
    """`(batch, candidates, document_length, query_length)`"""
    similarities = torch.einsum("bqd,bcld->bclq", queries, documents)
    if similarity == "l2":
        squares = documents.square().sum(-1)[..., None] + queries.square().sum(-1)[:, None, None, :]
        similarities = 2 * similarities - squares
    return similarities


def _grouped(items: list[Tensor], rows: int) -> list[list[Tensor]]:
    """The items in order, in groups of at most `rows` vectors or of one item."""
    groups: list[list[Tensor]] = []
    size = rows
    for item in items:
        if size + len(item) > rows:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += len(item)
    return groups


def _block_vectors(groups: list[Tensor]) -> int:
    kind = "cpu" if groups[0].device.type == "cpu" else "cuda"
    return min(_BLOCK_VECTORS[kind], _BLOCK_SIMILARITIES[kind] // max(len(group) for group in groups))


def _blocks(
    items: list[Tensor], vectors: int, positions: Sequence[int] | None = None, reused_as: torch.dtype | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Documents of similar length, as their positions and `(documents, length, dim)`, at most `vectors` of them or one
    document. Shorter ones are filled up with their first vector, which changes no maximum; empty ones are left out.

    With `reused_as`, a dtype, all blocks lie in the same memory, so that each is gone when the next one is asked for.
    """
    planned = _planned_blocks(items, vectors, positions)
    buffer = None
    if reused_as is not None and planned:
        dim, device = items[0].shape[1], items[0].device
        rows = _rounded_up(max(len(block) * longest for block, longest in planned))
        buffer = _memory.of("block", rows * dim, reused_as, device).view(rows, dim)
    for block, longest in planned:
        yield block, _filled_up([items[position] for position in block], longest, buffer)


def _planned_blocks(
    items: list[Tensor], vectors: int, positions: Sequence[int] | None = None
) -> list[tuple[list[int], int]]:
    """The positions of every block's documents, shortest first, and the length of its longest document."""
    chosen = range(len(items)) if positions is None else positions
    lengths = {position: items[position].shape[0] for position in chosen}
    planned: list[tuple[list[int], int]] = []
    block: list[int] = []
    for position in sorted((position for position in chosen if lengths[position]), key=lengths.__getitem__):
        if block and lengths[position] * (len(block) + 1) > vectors:
            planned.append((block, lengths[block[-1]]))
            block = []
        block.append(position)
    return [*planned, (block, lengths[block[-1]])] if block else planned


def _rounded_up(rows: int) -> int:
    return -(-rows // _ROW_STEP) * _ROW_STEP


def _filled_up(items: list[Tensor], length: int, buffer: Tensor | None) -> Tensor:
    parts = []
    for item in items:
        parts.append(item)
        if item.shape[0] < length:
            parts.append(item[:1].expand(length - item.shape[0], -1))
    rows = torch.cat(parts) if buffer is None else torch.cat(parts, out=buffer[: len(items) * length])
    return rows.view(len(items), length, -1)


# --- memory -----------------------------------------------------------------------------------------------------------


class _ThreadMemory(threading.local):
    """Memory for intermediate results, which a thread keeps and overwrites: to be given fresh pages takes the system
    longer than many a product. More than `_KEPT_BYTES` of a kind (very long documents or queries) are not kept."""

    def __init__(self):
        self.kept: dict[str, Tensor] = {}

    def of(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`(count,)`, whatever it holds; the same memory for the same name."""
        size = count * dtype.itemsize
        if device.type != "cpu" or size > _KEPT_BYTES:
            return torch.empty(count, dtype=dtype, device=device)
        if name not in self.kept or len(self.kept[name]) < size:
            self.kept[name] = _new_memory(max(size, _HUGE_BYTES), torch.uint8)
        return self.kept[name][:size].view(dtype)


_memory = _ThreadMemory()


def _new_memory(count: int, dtype: torch.dtype) -> Tensor:
    """`(count,)` on the CPU. numpy asks for it in huge pages where it is large, which torch does not: to find the small
    ones costs a product of large matrices up to a fifth of its time."""
    array = np.empty(count * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -array.ctypes.data % _ALIGNMENT
    return torch.from_numpy(array)[start : start + count * dtype.itemsize].view(dtype)


def _packed(items: list[Tensor]) -> Tensor:
    """The vectors of all items in float32, `(total vectors, dim)`."""
    if not items:
        return torch.empty(0, 0)
    total, dim = sum(len(item) for item in items), items[0].shape[1]
    if items[0].device.type != "cpu":
        return torch.cat(items).float()
    packed = _new_memory(total * dim, torch.float32).view(total, dim)
    return torch.cat([item.float() for item in items], out=packed)


# --- exact order ------------------------------------------------------------------------------------------------------


class _Approximate(NamedTuple):
    """Scores of documents, and bounds of their distance from the exact scores."""

    positions: Tensor  # (documents,) int64
    scores: Tensor  # (documents,) float64
    bounds: Tensor  # (documents,) float64


class _Reranking:
    """One query and its documents, with the exact scores known so far."""

    def __init__(self, query: Tensor, documents: list[Tensor], prepared: PackedDocuments | None):
        self.query, self.documents, self.prepared = query, documents, prepared
        self.query_float64 = query.to(torch.float64, memory_format=torch.contiguous_format)
        self.known: dict[int, Tensor] = {}

    def best(self, top_k: int) -> Ranking:
        lengths = self.prepared.lengths if self.prepared else [document.shape[0] for document in self.documents]
        candidates = [position for position, length in enumerate(lengths) if length]
        many = _FEW_CANDIDATES * top_k
        if len(candidates) > many and (kernel := self._kernel()) is not None:
            candidates = self._narrowed(self._approximate_bfloat16(kernel, candidates), top_k)
        if len(candidates) > many:
            candidates = self._narrowed(self._approximate_float32(candidates), top_k)
        empty = [position for position, length in enumerate(lengths) if not length] if len(candidates) < top_k else []
        scores = torch.cat([self._exact(candidates), self.query.new_full((len(empty),), -torch.inf)])
        best = scores.sort(descending=True, stable=True)
        positions = torch.tensor(candidates + empty, dtype=torch.int64, device=best.indices.device)
        return Ranking(positions[best.indices[:top_k]], best.values[:top_k])

    def _narrowed(self, approximate: _Approximate, top_k: int) -> list[int]:
        """The documents that may belong to the `top_k` best. `top_k` documents reach `floor`; a document that is
        certainly below it is below all of them, whatever the order among equal scores."""
        positions, scores, bounds = approximate
        floor = self._exact(positions[scores.topk(top_k).indices].tolist()).min()
        excluded = scores + bounds < floor  # false for infinite bounds
        return sorted(positions[~excluded].tolist())

    def _exact(self, positions: list[int]) -> Tensor:
        if not positions:
            return self.query.new_empty(0)
        new, sums_of_first = [position for position in positions if position not in self.known], []
        for position in new:
            # The copy in float64 is contiguous and lies at the start of its own allocation: the same layout and
            # alignment, and so the same order of additions, however and wherever the document lies in memory.
            document = self.documents[position].float().to(torch.float64, memory_format=torch.contiguous_format)
            similarities = self.query_float64 @ document.T
            self.known[position] = similarities.amax(1).sum()
            if self.prepared is None:  # a maximum hides -inf
                sums_of_first.append(similarities[0].sum())
        if sums_of_first:
            _refuse_non_finite("document", self.documents, torch.stack(sums_of_first), new)
        return torch.stack([self.known[position] for position in positions]).float()

    def _kernel(self) -> Any:
        if self.prepared is None:
            return _kernel_for(self.documents)
        return None if self.prepared._rough is None else _bfloat16_kernel()

    def _approximate_bfloat16(self, kernel: Any, candidates: list[int]) -> _Approximate:
        query = self.query.bfloat16()
        dim = query.shape[1]
        if self.prepared is None:
            lengths = np.array([self.documents[position].shape[0] for position in candidates], np.int64)
            addresses = np.array([self.documents[position].data_ptr() for position in candidates], np.int64)
            maxima, squares = kernel.max_sim_maxima(query, addresses, lengths, torch.float32)
            norms, errors = _upper_bounds(squares.sqrt(), dim).unbind(1)
            _refuse_non_finite("document", self.documents, norms, candidates)
        else:
            rough, lengths = self.prepared._rough, self.prepared._lengths
            addresses = rough.data_ptr() + (np.cumsum(lengths) - lengths) * (dim * rough.element_size())
            maxima, _ = kernel.max_sim_maxima(query, addresses, lengths, torch.bfloat16)
            norms, errors = self.prepared._norms, self.prepared._errors
            if len(candidates) < len(lengths):
                maxima, norms, errors = maxima[candidates], norms[candidates], errors[candidates]
        bounds = _error_bounds(self.query_float64, torch.bfloat16, norms, errors)
        return _Approximate(torch.tensor(candidates, device=maxima.device), maxima.sum(1, dtype=torch.float64), bounds)

    def _approximate_float32(self, candidates: list[int]) -> _Approximate:
        order, best, norms = [], [], []
        vectors = _block_vectors([self.query])
        for positions, block in _blocks(self.documents, vectors, candidates, reused_as=torch.float32):
            if self.prepared is None:
                norms.append(_largest_norms(block))
                _refuse_non_finite("document", self.documents, norms[-1], positions)
            best.append(_similarities(self.query, block, "cosine").amax(1))
            order += positions
        maxima, largest = torch.cat(best), torch.cat(norms) if norms else self.prepared._norms[order]
        bounds = _error_bounds(self.query_float64, torch.float32, largest, torch.zeros_like(largest))
        return _Approximate(torch.tensor(order, device=maxima.device), maxima.sum(1, dtype=torch.float64), bounds)


def _error_bounds(query: Tensor, dtype: torch.dtype, norms: Tensor, errors: Tensor) -> Tensor:
    """How far a score from products of `dtype` can be from the exact score, `(documents,)` float64, if the products
    themselves are float32.

    query `(query vectors, dim)` float64; norms and errors `(documents,)`: bounds of |d| and of |d - d'| over the
    document's vectors d, d' being d rounded to `dtype`.

    Proof. For a query vector q, rounded to q', and a document vector d, rounded to d':
        <q, d> - <q', d'> = <q - q', d> + <q', d - d'>, which Cauchy-Schwarz bounds by |q - q'| |d| + |q'| |d - d'|.
    <q', d'> is computed in float32, in any order, every product rounded at most once and added: the error is at most
    gamma |q'| |d'|, where gamma = n u / (1 - n u) for n = dim + 1 roundings of u = 2^-24. (dim + 8) 2^-23 is more than
    twice that, enough for kernels whose additions truncate. Where float32 matrix products are allowed to round their
    factors to bfloat16 or TF32, 2^-6 covers that. Numbers below 2^-126 may have become 0 anywhere: `underflow`. No sum
    becomes infinite on its way, nor the score when it is rounded to float32, where the sum of all |q'| |d'| is below
    `_OVERFLOW`; elsewhere the bound is infinite. If all computed similarities of a document are within r of the exact
    ones, so is their maximum, and the errors of the query vectors add up. The exact score's own rounding to float32,
    2^-24 of at most |q| |d| per query vector, and the float64 roundings here are within the slack of gamma.
    """
    dim = query.shape[1]
    rounded = query.to(dtype).double()
    gamma = (dim + 8) * 2 * _FLOAT32_UNIT_ROUNDOFF
    if dtype is torch.float32 and not _float32_products_are_full():
        gamma += 2.0**-6
    underflow = 2.0**-126 * query.numel() * (1 + norms)
    lost, kept = _norms(query - rounded).sum(), _norms(rounded).sum()
    bounds = lost * norms + kept * errors + gamma * kept * (norms + errors) + underflow
    return torch.where(kept * (norms + errors) < _OVERFLOW, bounds, torch.inf)


def _norms(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1)


def _largest_norms(block: Tensor) -> Tensor:
    """Upper bounds of the norms in every document of a float32 block, in float64."""
    return _upper_bounds(_norms(block).amax(1), block.shape[2])


def _upper_bounds(norms: Tensor, dim: int) -> Tensor:
    """Numbers not below norms that were computed in float32, in float64; they cover the rounding of the norms and
    squares that became 0."""
    return norms.double() * (1 + (dim + 8) * _FLOAT32_UNIT_ROUNDOFF) + dim * 2.0**-62


def _float32_products_are_full() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the precision was set for single backends
        return False


def _kernel_for(documents: list[Tensor]) -> Any:
    """`max_sim_kernel` where it takes these documents and they are enough for it."""
    if not documents or documents[0].device.type != "cpu" or sum(map(len, documents)) < _KERNEL_VECTORS:
        return None
    kernel = _bfloat16_kernel()
    if kernel is None or documents[0].shape[1] % kernel.LANES or not documents[0].shape[1]:
        return None
    fitting = all(document.dtype is torch.float32 and document.is_contiguous() for document in documents)
    return kernel if fitting else None


@lru_cache
def _bfloat16_kernel() -> Any:
    """The compiled functions of `max_sim_kernel.py`; None without numba or AVX-512 BF16."""
    if not hasattr(torch.cpu, "get_capabilities") or not torch.cpu.get_capabilities().get("avx512_bf16"):
        return None
    try:
        from .max_sim_kernel import LANES, max_sim_maxima, rounded_to_bfloat16
    except ImportError:
        return None
    except Exception as error:  # of numba's or LLVM's: another version than those known
        warnings.warn(f"reranking goes on without its compiled loops, which numba refuses: {error}", stacklevel=2)
        return None
    return SimpleNamespace(LANES=LANES, max_sim_maxima=max_sim_maxima, rounded_to_bfloat16=rounded_to_bfloat16)


# --- inputs -----------------------------------------------------------------------------------------------------------


def _items(vectors, lengths, mask, name: str) -> list[Tensor]:
    """The `(n_i, dim)` tensors of all queries or documents, whichever form they come in."""
    if lengths is not None and mask is not None:
        raise ValueError(f"give {name}_lengths or {name}_mask, not both")
    if isinstance(vectors, (PackedDocuments, list, tuple)):
        if lengths is not None or mask is not None:
            raise ValueError(f"{name}_lengths and {name}_mask do not go with a list or PackedDocuments")
        return vectors._items if isinstance(vectors, PackedDocuments) else _listed_items(vectors, name)
    tensor = _as_tensor(vectors, name)
    if tensor.dim() == 2:
        return _packed_items(tensor, lengths, mask, name)
    if tensor.dim() != 3:
        expected = f"({name} vectors, dim) or (n, length, dim)"
        raise ValueError(f"expected a {name} tensor of shape {expected}, not {tuple(tensor.shape)}")
    return _padded_items(tensor, lengths, mask, name)


def _listed_items(vectors, name: str) -> list[Tensor]:
    items = [_as_tensor(item, name) for item in vectors]
    for position, item in enumerate(items):
        if item.dim() != 2 or item.shape[1] != items[0].shape[-1]:
            expected = f"(n, {items[0].shape[-1]})" if items[0].dim() == 2 else "(n, dim)"
            raise ValueError(f"{name} {position} has shape {tuple(item.shape)}, expected {expected}")
        if item.device != items[0].device:
            raise ValueError(f"{name} {position} is on {item.device}, {name} 0 on {items[0].device}")
    return items


def _packed_items(tensor: Tensor, lengths, mask, name: str) -> list[Tensor]:
    if mask is not None:
        tensor = tensor[_checked_mask(mask, tensor.shape[:1], name).to(tensor.device)]
    if lengths is None:
        return [tensor]
    sizes = _checked_lengths(lengths, name)
    if sum(sizes) != len(tensor):
        raise ValueError(f"{name}_lengths add up to {sum(sizes)}, but there are {len(tensor)} vectors")
    return list(tensor.split(sizes))


def _padded_items(tensor: Tensor, lengths, mask, name: str) -> list[Tensor]:
    count, longest = tensor.shape[:2]
    if lengths is not None:
        sizes = _checked_lengths(lengths, name)
        if len(sizes) != count or max(sizes, default=0) > longest:
            raise ValueError(f"expected {count} {name}_lengths, none above {longest}, not {sizes}")
        return [item[:size] for item, size in zip(tensor.unbind(), sizes)]
    if mask is None:
        return list(tensor.unbind())
    mask = _checked_mask(mask, tensor.shape[:2], name).to(tensor.device)
    return list(tensor[mask].split(mask.sum(1).tolist()))


def _as_tensor(vectors, name: str) -> Tensor:
    if isinstance(vectors, np.ndarray):
        if vectors.dtype not in (np.float16, np.float32, np.float64):
            raise TypeError(f"{name} vectors must be floating-point numbers, not {vectors.dtype}")
        return _from_numpy(np.ascontiguousarray(vectors))
    if not isinstance(vectors, Tensor):
        raise TypeError(f"{name} vectors must be torch tensors or numpy arrays, not {type(vectors).__name__}")
    if vectors.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{name} vectors must be floating-point numbers, not {vectors.dtype}")
    return vectors


def _from_numpy(array: np.ndarray) -> Tensor:
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nothing here writes to it
        return torch.from_numpy(array)


def _is_numpy(vectors, or_neutral: bool = False) -> bool:
    """Whether these are numpy arrays; PackedDocuments and empty lists, which are neither, count if `or_neutral`."""
    if isinstance(vectors, (list, tuple)) and vectors:
        return all(isinstance(item, np.ndarray) for item in vectors)
    return isinstance(vectors, np.ndarray) or (or_neutral and isinstance(vectors, (PackedDocuments, list, tuple)))


def _working_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _checked_lengths(lengths, name: str) -> list[int]:
    sizes = lengths.tolist() if isinstance(lengths, (Tensor, np.ndarray)) else list(lengths)
    if not all(isinstance(size, (int, np.integer)) and not isinstance(size, bool) and size >= 0 for size in sizes):
        raise ValueError(f"{name}_lengths must be a list of whole numbers, none negative, not {lengths}")
    return [int(size) for size in sizes]


def _checked_mask(mask, shape: torch.Size, name: str) -> Tensor:
    mask = torch.as_tensor(mask)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"{name}_mask must be boolean, or of the integers 0 and 1: True or 1 for the vectors that count, not "
            f"{mask.dtype}"
        )
    if mask.shape != shape:
        raise ValueError(f"{name}_mask has shape {tuple(mask.shape)}, expected {tuple(shape)}")
    chosen = mask != 0
    if mask.dtype != torch.bool and not torch.equal(chosen.to(mask.dtype), mask):
        found = mask[chosen & (mask != 1)][0].item()
        raise ValueError(
            f"{name}_mask of {mask.dtype} must hold 0 and 1 only, 1 for the vectors that count, not {found}"
        )
    return chosen


def _check_pair(queries: list[Tensor], documents: list[Tensor]) -> None:
    for position, query in enumerate(queries):
        if not len(query):
            raise ValueError(f"query {position} has no vectors")
    if queries and documents and any(len(document) for document in documents):
        _check_dims(queries[0], documents[0])


def _check_dims(queries: Tensor, documents: Tensor) -> None:
    if not queries.shape[-1]:
        raise ValueError(f"query vectors have no components: their shape is {tuple(queries.shape)}")
    if queries.shape[-1] != documents.shape[-1]:
        raise ValueError(f"query vectors have {queries.shape[-1]} dimensions, document vectors {documents.shape[-1]}")
    if queries.device != documents.device:
        raise ValueError(f"queries are on {queries.device}, documents on {documents.device}")


def _check_similarity(similarity: str) -> None:
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, not {similarity!r}")


def _checked_top_k(top_k: int) -> int:
    if isinstance(top_k, bool) or not isinstance(top_k, (int, np.integer)):
        raise TypeError(f"top_k must be a whole number, not {type(top_k).__name__}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    return int(top_k)  # the products of numpy's small integers overflow


def _refuse_non_finite(
    name: str,
    items: Sequence[Tensor],
    sums: Tensor | None = None,
    positions: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise ValueError for items that are not finite in `dtype`. Only those are looked at of which the given sums or
    norms are not finite: those of large numbers may be infinite too. `positions` are the items of the sums."""
    suspects: Iterable[int] = range(len(items)) if positions is None else positions
    if sums is not None and positions is not None:
        suspects = sorted(positions[index] for index in (~sums.isfinite()).nonzero()[:, 0].tolist())
    for position in suspects:
        if not items[position].to(dtype).isfinite().all():
            raise ValueError(f"{name} {position} holds NaN, infinity or numbers too large for {dtype}")
