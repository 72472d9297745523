"""Vectors in one to eight bits per dimension: the nearest centroid and a quantised residual, as ColBERTv2 stores them.

The codec gives the bytes of the `ResidualCodec` of colbert-ai 0.2.22 (`colbert/indexing/codecs/residual.py`,
https://github.com/stanford-futuredata/ColBERT, described in arXiv 2112.01488): `plaid_directory` reads and writes what
it writes.
"""

from __future__ import annotations

import math
import warnings
from types import ModuleType
from typing import Any

import numpy as np

_BLOCK = 4096
_ITERATIONS = 10
_BUCKET_ITERATIONS = 50
# Above this number of centroids they are trained, and approximately found, in two levels.
_TWO_LEVELS_ABOVE = 1024
_HELD_OUT_FRACTION, _MAX_HELD_OUT = 0.05, 50_000
_NORM_FLOOR = np.float32(1e-12)


def compiled_loops() -> ModuleType:
    """The module `multi_vector_kernels`; an ImportError says what to install."""
    try:
        from rarezoo.retrieval import multi_vector_kernels
    except ImportError as error:
        raise ImportError(
            f"multi-vector search runs on compiled loops and needs numba: pip install 'rarezoo[retrieval]' ({error})"
        ) from error
    return multi_vector_kernels


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows of length one, as torch's `normalize` gives them; zero rows stay zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _NORM_FLOOR)


def default_num_centroids(num_vectors: int) -> int:
    """2^floor(log2(16 * sqrt(vectors))), colbert-ai's choice; for small collections no more than there are vectors."""
    if num_vectors < 1:
        raise ValueError("centroids are trained on at least one vector, found none")
    return min(2 ** math.floor(math.log2(16 * math.sqrt(num_vectors))), num_vectors)


def train_centroids(vectors: np.ndarray, num_centroids: int, seed: int = 0) -> np.ndarray:
    """k-means centroids, normalised; more than 1024 are trained in two levels, clusters within clusters.

    Args:
        vectors: (n, dim) float32.
        num_centroids: at most n.
        seed: equal seeds, equal centroids.

    Returns:
        (num_centroids, dim) float32, rounded to what float16 holds: PLAID directories store them so.

    Raises:
        ValueError: fewer vectors than centroids.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if not 1 <= num_centroids <= len(vectors):
        raise ValueError(f"expected 1 to {len(vectors)} centroids for {len(vectors)} vectors, found {num_centroids}")
    if num_centroids <= _TWO_LEVELS_ABOVE:
        centroids, _ = _k_means(vectors, num_centroids, seed)
    else:
        _, labels = _k_means(vectors, math.isqrt(num_centroids), seed)
        shares = _shares(np.bincount(labels, minlength=math.isqrt(num_centroids)), num_centroids)
        parts = [_k_means(vectors[labels == label], share, seed)[0] for label, share in enumerate(shares) if share]
        centroids = np.concatenate(parts)
    return normalised(centroids).astype(np.float16).astype(np.float32)


def _k_means(vectors: np.ndarray, num_clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroids (num_clusters, dim) and the cluster of every vector (n,)."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    k_means = KMeans(num_clusters, init="random", n_init=1, max_iter=_ITERATIONS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct vectors than clusters: no harm here
        k_means.fit(vectors)
    return k_means.cluster_centers_, k_means.labels_


def _shares(counts: np.ndarray, total: int) -> np.ndarray:
    """`total` split in proportion to `counts`, whole numbers, never more than the count itself."""
    exact = counts * (total / counts.sum())
    shares = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(shares - exact, kind="stable")
    shares[by_remainder[: total - shares.sum()]] += 1
    return shares


def nearest_centroids(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(n,) int32: for every vector (n, dim) the centroid with the largest inner product, of equals the first."""
    codes = np.empty(len(vectors), dtype=np.int32)
    transposed = np.ascontiguousarray(centroids.T)
    # Blocks whose inner products stay in the processor's cache until their maxima are found.
    rows = max(64, 2**21 // max(1, len(centroids)))
    for start in range(0, len(vectors), rows):
        block = vectors[start : start + rows].astype(np.float32, copy=False)
        codes[start : start + rows] = np.argmax(block @ transposed, axis=1)
    return codes


def _least_squares_buckets(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm in one dimension: cutoffs halfway between weights, weights at the means of their buckets."""
    ordered = np.sort(values, axis=None).astype(np.float64)
    sums = np.concatenate([[0], np.cumsum(ordered)])
    for _ in range(_BUCKET_ITERATIONS):
        ends = np.concatenate([[0], np.searchsorted(ordered, (weights[1:] + weights[:-1]) / 2), [len(ordered)]])
        counts = np.diff(ends)
        weights = np.where(counts > 0, (sums[ends[1:]] - sums[ends[:-1]]) / np.maximum(counts, 1), weights)
    return (weights[1:] + weights[:-1]) / 2, weights


class CentroidTree:
    """Finds the nearest centroid of many vectors quickly, and nearly always exactly, by looking into few groups.

    Args:
        centroids: (num_centroids, dim) float32.
        num_groups_searched: groups, of about sqrt(num_centroids) each, that are searched per vector.
    """

    def __init__(self, centroids: np.ndarray, num_groups_searched: int = 16):
        self._centroids = centroids
        self._num_groups_searched = num_groups_searched
        self._groups: list[np.ndarray] = []
        if len(centroids) > _TWO_LEVELS_ABOVE:
            num_groups = math.isqrt(len(centroids))
            means, labels = _k_means(centroids, num_groups, seed=0)
            self._groups = [np.flatnonzero(labels == group) for group in range(num_groups)]
            self._means = np.ascontiguousarray(normalised(means).T)

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """(n,) int32 centroids of vectors (n, dim); exact for up to 1024 centroids."""
        if not self._groups:
            return nearest_centroids(vectors, self._centroids)
        block_size = 16 * _BLOCK
        blocks = [self._nearest(vectors[start : start + block_size]) for start in range(0, len(vectors), block_size)]
        return np.concatenate(blocks) if blocks else np.empty(0, dtype=np.int32)

    def _nearest(self, vectors: np.ndarray) -> np.ndarray:
        vectors = vectors.astype(np.float32, copy=False)
        searched = self._num_groups_searched
        groups = np.argpartition(vectors @ self._means, -searched, axis=1)[:, -searched:]
        order = np.argsort(groups.ravel(), kind="stable")
        ends = np.cumsum(np.bincount(groups.ravel(), minlength=len(self._groups)))
        best = np.full(len(vectors), -np.inf, dtype=np.float32)
        codes = np.zeros(len(vectors), dtype=np.int32)
        for group, members in enumerate(self._groups):
            rows = order[ends[group - 1] if group else 0 : ends[group]] // searched
            if len(rows) == 0 or len(members) == 0:
                continue
            products = vectors[rows] @ self._centroids[members].T
            nearest = np.argmax(products, axis=1)
            scores = products[np.arange(len(rows)), nearest]
            better = scores > best[rows]
            best[rows[better]] = scores[better]
            codes[rows[better]] = members[nearest[better]]
        return codes


class ResidualCodec:
    """Centroid number and packed residual of unit vectors, and back.

    Args:
        centroids: (num_centroids, dim) float32; dim * num_bits must be a whole number of bytes.
        bucket_cutoffs: (2**num_bits - 1,) float32, ascending.
        bucket_weights: (2**num_bits,) float32, the value that a bucket is read as; num_bits is 1, 2, 4 or 8.
        average_residual: mean absolute residual, as PLAID directories record it.

    Raises:
        ValueError: wrong shapes, or values that are not finite.
    """

    def __init__(self, centroids: Any, bucket_cutoffs: Any, bucket_weights: Any, average_residual: float = 0.0):
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self.bucket_cutoffs = np.ascontiguousarray(bucket_cutoffs, dtype=np.float32)
        self.bucket_weights = np.ascontiguousarray(bucket_weights, dtype=np.float32)
        self.average_residual = float(average_residual)
        self._check()
        self._table = self._weights_of_bytes()

    def _check(self) -> None:
        if self.centroids.ndim != 2 or 0 in self.centroids.shape:
            raise ValueError(f"expected centroids (num_centroids, dim), found the shape {self.centroids.shape}")
        if self.bucket_weights.ndim != 1 or len(self.bucket_weights) not in (2, 4, 16, 256):
            raise ValueError(
                f"expected 2, 4, 16 or 256 bucket weights (1, 2, 4 or 8 bits), found {self.bucket_weights.shape}"
            )
        if self.bucket_cutoffs.shape != (len(self.bucket_weights) - 1,):
            raise ValueError(
                f"expected {len(self.bucket_weights) - 1} bucket cutoffs, found the shape {self.bucket_cutoffs.shape}"
            )
        for name in ("centroids", "bucket_cutoffs", "bucket_weights"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} holds values that are not finite")
        if (np.diff(self.bucket_cutoffs) < 0).any():
            raise ValueError("bucket_cutoffs must ascend")
        if self.dim * self.num_bits % 8:
            raise ValueError(f"{self.dim} dimensions of {self.num_bits} bits do not fill whole bytes")

    @property
    def num_bits(self) -> int:
        """Bits per dimension."""
        return len(self.bucket_weights).bit_length() - 1

    @property
    def dim(self) -> int:
        return self.centroids.shape[1]

    @property
    def num_residual_bytes(self) -> int:
        """Bytes of the packed residual of one vector, without its centroid number."""
        return self.dim * self.num_bits // 8

    def __repr__(self) -> str:
        return f"ResidualCodec({len(self.centroids)} centroids, dim={self.dim}, num_bits={self.num_bits})"

    @classmethod
    def train(
        cls,
        vectors: np.ndarray,
        num_bits: int = 2,
        num_centroids: int | None = None,
        seed: int = 0,
        least_squares: bool = False,
    ) -> ResidualCodec:
        """Train centroids on most vectors, and cutoffs and weights on the residuals of the others, held out.

        Args:
            vectors: (n, dim) unit vectors, a sample of the collection.
            num_bits: 1, 2, 4 or 8.
            num_centroids: by default `default_num_centroids(n)`; give it when `vectors` is a sample.
            seed: equal seeds, equal codecs.
            least_squares: as in `from_held_out`.

        Raises:
            ValueError: no vectors, fewer than centroids, or another number of bits.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        num_centroids = default_num_centroids(len(vectors)) if num_centroids is None else num_centroids
        shuffled = vectors[np.random.default_rng(seed).permutation(len(vectors))]
        num_held_out = min(int(_HELD_OUT_FRACTION * len(vectors)), _MAX_HELD_OUT, len(vectors) - num_centroids)
        held_out, rest = shuffled[: max(0, num_held_out)], shuffled[max(0, num_held_out) :]
        # Of a handful of vectors none can be spared.
        centroids = train_centroids(rest, num_centroids, seed)
        return cls.from_held_out(centroids, held_out if len(held_out) else rest, num_bits, least_squares)

    @classmethod
    def from_held_out(
        cls, centroids: np.ndarray, held_out: np.ndarray, num_bits: int, least_squares: bool = False
    ) -> ResidualCodec:
        """Cutoffs at the quantiles i / 2^num_bits of the residuals of all dimensions, weights at those in between.

        Args:
            centroids: (num_centroids, dim) float32.
            held_out: (n, dim) vectors that the centroids were not trained on.
            num_bits: 1, 2, 4 or 8.
            least_squares: move cutoffs and weights on to where the squared error is least (Lloyd's quantiser); any
                reader of the format reads them, and the error at 4 bits is less than a third of the quantiles'.
        """
        if num_bits not in (1, 2, 4, 8):
            raise ValueError(f"num_bits must be 1, 2, 4 or 8; found {num_bits!r}")
        if len(held_out) == 0:
            raise ValueError("expected at least one held-out vector, found none")
        centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        residuals = held_out.astype(np.float32, copy=False) - centroids[nearest_centroids(held_out, centroids)]
        quantiles = np.arange(2**num_bits) / 2**num_bits
        cutoffs = np.quantile(residuals, quantiles[1:])
        weights = np.quantile(residuals, quantiles + 0.5 / 2**num_bits)
        if least_squares:
            cutoffs, weights = _least_squares_buckets(residuals, weights)
        return cls(centroids, cutoffs, weights, float(np.abs(residuals).mean()))

    def compress(self, vectors: np.ndarray, codes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Codes (n,) int32 and residuals (n, dim * num_bits / 8) uint8 of vectors (n, dim).

        Args:
            vectors: float32 or float16.
            codes: the vectors' centroids where they are known (see `CentroidTree`); by default the nearest ones.

        Raises:
            ValueError: another dimension, or vectors that are not finite.
        """
        vectors = self._checked(vectors)
        codes = nearest_centroids(vectors, self.centroids) if codes is None else codes
        residuals = np.zeros((len(vectors), self.num_residual_bytes), dtype=np.uint8)
        compiled_loops().pack_residuals(vectors, self.centroids, codes, self.bucket_cutoffs, self.num_bits, residuals)
        return codes, residuals

    def _checked(self, vectors: np.ndarray) -> np.ndarray:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(f"expected vectors (n, {self.dim}), found the shape {vectors.shape}")
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if not np.isfinite(vectors).all():
            raise ValueError("the vectors hold values that are not finite")
        return vectors

    def decompress(self, codes: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        """Unit vectors (n, dim) float32 of codes (n,) and residuals (n, dim * num_bits / 8) uint8.

        Raises:
            ValueError: shapes do not fit, or a code names no centroid.
        """
        if residuals.shape != (len(codes), self.num_residual_bytes):
            raise ValueError(
                f"expected residuals ({len(codes)}, {self.num_residual_bytes}), found the shape {residuals.shape}"
            )
        if len(codes) and not 0 <= codes.min() <= codes.max() < len(self.centroids):
            raise ValueError(
                f"the codes {codes.min()} … {codes.max()} do not all name one of {len(self.centroids)} centroids"
            )
        whole = np.zeros(1, dtype=np.int64), np.array([len(codes)], dtype=np.int64)
        return self.decompress_runs(codes, residuals, *whole)

    def decompress_runs(
        self, codes: np.ndarray, residuals: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """As `decompress`, unchecked, of runs of rows: `starts` (runs,) int64 and their `lengths` (runs,) int64."""
        vectors = np.empty((int(lengths.sum()), self.dim), dtype=np.float32)
        compiled_loops().decompress_rows(codes, residuals, self.centroids, self._table, starts, lengths, vectors)
        return vectors

    def _weights_of_bytes(self) -> np.ndarray:
        """(256, 8 // num_bits) float32: the weights that each byte stands for."""
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
        groups = bits.reshape(256, 8 // self.num_bits, self.num_bits)
        buckets = (groups.astype(np.int64) << np.arange(self.num_bits)).sum(axis=2)
        return np.ascontiguousarray(self.bucket_weights[buckets])
