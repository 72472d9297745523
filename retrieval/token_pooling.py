"""Fewer vectors per document: similar vectors are clustered, Ward's method, and each cluster is replaced by its mean.

Two libraries do this, with different results, and both ways are offered:

- "colbert": colbert-ai 0.2.22, `colbert.modeling.checkpoint.pool_embeddings_hierarchical`. Ward's method runs on the
  rows of the distance matrix as if they were observations, the number of clusters counts the protected vectors too, and
  these come last.
- "pylate": PyLate 1.6.0, `ColBERT.pool_embeddings_hierarchical`. Ward's method runs on the distances themselves, the
  number of clusters counts the pooled vectors only, and the protected ones come first.

Neither normalises the means; MaxSim needs no vectors of length one, but residual codecs do (`normalised=True`).
"""

from __future__ import annotations

import numpy as np
from scipy.cluster import hierarchy

from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings
from rarezoo.retrieval.residual_codec import normalised as normalised_rows

_DEFAULT_PROTECTED = {"colbert": 0, "pylate": 1}


def pool_tokens(
    embeddings: MultiVectorEmbeddings,
    factor: int,
    protected: int | None = None,
    mode: str = "colbert",
    normalised: bool = False,
) -> MultiVectorEmbeddings:
    """Pool the vectors of every document.

    Args:
        embeddings: documents, with vectors of length one.
        factor: about how many vectors become one; 1 changes nothing but their order.
        protected: how many vectors at the start of a document are kept as they are (the marker, the prompt); by default
            0 in the mode "colbert" and 1 in "pylate".
        mode: "colbert" or "pylate", see above.
        normalised: give the means length one.

    Returns:
        The same documents, in memory; every document that had vectors has at least one.

    Raises:
        ValueError: an unknown mode, or numbers out of range.
    """
    if mode not in _DEFAULT_PROTECTED:
        raise ValueError(f"mode must be 'colbert' or 'pylate'; found {mode!r}")
    protected = _DEFAULT_PROTECTED[mode] if protected is None else protected
    if factor < 1:
        raise ValueError(f"factor must be at least 1; found {factor}")
    if protected < 0:
        raise ValueError(f"protected must be at least 0; found {protected}")
    pool = _pool_as_colbert if mode == "colbert" else _pool_as_pylate
    pooled = [pool(vectors, factor, protected) for _, vectors in embeddings]
    vectors = np.concatenate([np.empty((0, embeddings.dim), dtype=embeddings.dtype), *pooled])
    if normalised:
        vectors = normalised_rows(vectors.astype(np.float32)).astype(vectors.dtype)
    lengths = np.array([len(document) for document in pooled], dtype=np.int32)
    return MultiVectorEmbeddings(list(embeddings.ids), vectors, lengths, embeddings.fingerprint)


def _pool_as_colbert(vectors: np.ndarray, factor: int, protected: int) -> np.ndarray:
    kept, rest = vectors[:protected], vectors[protected:]
    num_clusters = max(1, len(vectors) // factor)
    if len(rest) > 1:  # Ward's method begins with two
        distances = _cosine_distances(rest)
        rest = _cluster_means(rest, hierarchy.linkage(distances, method="ward", metric="euclidean"), num_clusters)
    return np.concatenate([rest, kept])


def _pool_as_pylate(vectors: np.ndarray, factor: int, protected: int) -> np.ndarray:
    kept, rest = vectors[:protected], vectors[protected:]
    num_clusters = max(1, len(rest) // factor)
    if num_clusters < len(rest):
        distances = _cosine_distances(rest)[np.triu_indices(len(rest), k=1)]
        rest = _cluster_means(rest, hierarchy.linkage(distances, method="ward"), num_clusters)
    return np.concatenate([kept, rest])


def _cosine_distances(vectors: np.ndarray) -> np.ndarray:
    """(n, n) float32, of rows of length one."""
    vectors = vectors.astype(np.float32, copy=False)
    return 1 - vectors @ vectors.T


def _cluster_means(vectors: np.ndarray, linkage: np.ndarray, num_clusters: int) -> np.ndarray:
    """(at most num_clusters, dim): ties can leave fewer clusters than asked for."""
    labels = hierarchy.fcluster(linkage, t=num_clusters, criterion="maxclust")
    means = [vectors[labels == label].mean(axis=0, dtype=np.float32) for label in np.unique(labels)]
    return np.stack(means).astype(vectors.dtype)
