"""MUVERA: one vector per text, whose inner products approximate MaxSim, so that any vector store finds candidates.

After arXiv 2405.19504. Random hyperplanes cut the space into 2^num_hyperplanes buckets. A query's vectors are summed
per bucket, a document's averaged, and a bucket where the document has none gets its vector nearest in Hamming distance:
so each query vector meets a document vector from about its own direction. The mean of several such vectors is at most
the best of them: inner products lie below MaxSim, but rank documents as it does. Several repetitions, put side by side,
make that steadier.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings


class Muvera:
    """Fixed-dimensional encodings of queries and documents. Both sides need the same arguments.

    Args:
        dim: of the vectors.
        num_repetitions: independent cuts; the error falls with their square root.
        num_hyperplanes: of each repetition; 2^num_hyperplanes buckets.
        projected_dim: dimensions that the vectors in a bucket are projected to by random signs; by default all stay.
        final_dim: dimensions that the whole encoding is folded to by a count sketch; by default it is not.
        seed: of everything random.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        dim: int,
        num_repetitions: int = 20,
        num_hyperplanes: int = 5,
        projected_dim: int | None = None,
        final_dim: int | None = None,
        seed: int = 0,
    ):
        sizes = {"dim": dim, "num_repetitions": num_repetitions, "num_hyperplanes": num_hyperplanes}
        optional = {"projected_dim": projected_dim, "final_dim": final_dim}
        sizes |= {name: value for name, value in optional.items() if value is not None}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} must be a whole number and at least 1; found {value!r}")
        if num_hyperplanes > 16:
            raise ValueError(f"num_hyperplanes must be at most 16 (65,536 buckets); found {num_hyperplanes}")
        self.dim = dim
        self.num_repetitions = num_repetitions
        self.num_buckets = 2**num_hyperplanes
        self.projected_dim = dim if projected_dim is None else projected_dim
        generator = np.random.default_rng(seed)
        shape = (num_repetitions, dim, num_hyperplanes)
        self._hyperplanes = generator.standard_normal(shape).astype(np.float32)
        self._projections = None
        if projected_dim is not None:
            signs = generator.choice(np.array([-1, 1], dtype=np.float32), (num_repetitions, dim, projected_dim))
            self._projections = signs / np.float32(np.sqrt(projected_dim))
        self._unfolded_dim = num_repetitions * self.num_buckets * self.projected_dim
        self.encoding_dim = self._unfolded_dim if final_dim is None else final_dim
        self._fold_signs = self._fold_targets = None
        if final_dim is not None:
            self._fold_signs = generator.choice(np.array([-1, 1], dtype=np.float32), self._unfolded_dim)
            self._fold_targets = generator.integers(0, final_dim, self._unfolded_dim)

    def __repr__(self) -> str:
        return (
            f"Muvera(dim={self.dim}, {self.num_repetitions} repetitions of {self.num_buckets} buckets of "
            f"{self.projected_dim}, encoding_dim={self.encoding_dim})"
        )

    def encode_queries(self, queries: MultiVectorEmbeddings) -> np.ndarray:
        """(n, encoding_dim) float32; a query without vectors becomes zeros."""
        return self._encode(queries, self._query_buckets)

    def encode_documents(self, documents: MultiVectorEmbeddings) -> np.ndarray:
        """(n, encoding_dim) float32; a document without vectors becomes zeros.

        The inner product with a query's encoding approximates their MaxSim.
        """
        return self._encode(documents, self._document_buckets)

    def _encode(self, texts: MultiVectorEmbeddings, fill: Callable) -> np.ndarray:
        if texts.dim != self.dim:
            raise ValueError(f"expected vectors of {self.dim} dimensions, found {texts.dim}")
        encodings = np.zeros((len(texts), self.encoding_dim), dtype=np.float32)
        # Both sides are divided, so that the inner product is the mean over the repetitions.
        scale = np.float32(1 / np.sqrt(self.num_repetitions))
        for row, (_, vectors) in enumerate(texts):
            if len(vectors):
                encodings[row] = self._folded(self._repetitions(vectors.astype(np.float32), fill)) * scale
        return encodings

    def _repetitions(self, vectors: np.ndarray, fill: Callable) -> np.ndarray:
        """(unfolded_dim,) float32 of one text (length, dim)."""
        powers = 1 << np.arange(self._hyperplanes.shape[2])
        parts = []
        for repetition in range(self.num_repetitions):
            signs = (vectors @ self._hyperplanes[repetition]) > 0
            projected = vectors if self._projections is None else vectors @ self._projections[repetition]
            parts.append(fill(projected, signs @ powers).ravel())
        return np.concatenate(parts)

    def _query_buckets(self, vectors: np.ndarray, buckets: np.ndarray) -> np.ndarray:
        sums = np.zeros((self.num_buckets, self.projected_dim), dtype=np.float32)
        np.add.at(sums, buckets, vectors)
        return sums

    def _document_buckets(self, vectors: np.ndarray, buckets: np.ndarray) -> np.ndarray:
        counts = np.bincount(buckets, minlength=self.num_buckets)
        means = self._query_buckets(vectors, buckets) / np.maximum(counts, 1)[:, None].astype(np.float32)
        empty = np.flatnonzero(counts == 0)
        means[empty] = vectors[np.argmin(_hamming_distances(empty, buckets), axis=1)]
        return means

    def _folded(self, encoding: np.ndarray) -> np.ndarray:
        if self._fold_targets is None or self._fold_signs is None:
            return encoding
        return np.bincount(self._fold_targets, encoding * self._fold_signs, minlength=self.encoding_dim)


def _hamming_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(n, m): number of bits in which two bucket numbers below 65,536 differ."""
    different = (left[:, None] ^ right[None, :]).astype(np.uint16)
    return np.unpackbits(different.view(np.uint8).reshape(*different.shape, 2), axis=2).sum(axis=2)
