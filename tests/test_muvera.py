"""MUVERA encodings against MaxSim in float64, and against the definition written out as loops."""

from __future__ import annotations

import numpy as np
import pytest

from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings
from rarezoo.retrieval.muvera import Muvera


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def clustered(documents: int = 600, queries: int = 20, dim: int = 32, length: int = 12):
    """Documents of words from one of 30 topics, and queries that repeat words of a document; all vectors noisy."""
    generator = np.random.default_rng(0)
    words = unit(generator.standard_normal((400, dim)))
    topics = generator.integers(0, 400, (30, 25))
    chosen = topics[generator.integers(0, 30, documents)[:, None], generator.integers(0, 25, (documents, length))]
    asked = chosen[:queries, generator.integers(0, length, 8)]
    noisy = [unit(words[part] + 0.08 * generator.standard_normal((*part.shape, dim))) for part in (chosen, asked)]
    return tuple(
        MultiVectorEmbeddings.from_list([str(row) for row in range(len(part))], list(part.astype(np.float32)))
        for part in noisy
    )


def max_sim(queries: MultiVectorEmbeddings, documents: MultiVectorEmbeddings) -> np.ndarray:
    rows = [vectors.astype(np.float64) for _, vectors in documents]
    return np.array([[(row @ query.T).max(axis=0).sum() for row in rows] for _, query in queries])


def test_it_is_what_the_paper_defines() -> None:
    generator = np.random.default_rng(1)
    document, query = (generator.standard_normal((length, 6)).astype(np.float32) for length in (5, 4))
    muvera = Muvera(6, num_repetitions=3, num_hyperplanes=3, seed=4)
    encode = [(muvera.encode_documents, document), (muvera.encode_queries, query)]
    encoded = [encoder(MultiVectorEmbeddings(["a"], rows, [len(rows)]))[0] for encoder, rows in encode]
    assert encoded[0].shape == (muvera.encoding_dim,) == (3 * 8 * 6,)
    blocks = [part.reshape(3, 8, 6) * np.sqrt(3) for part in encoded]
    for repetition in range(3):
        planes = muvera._hyperplanes[repetition]
        bits = [(rows @ planes > 0).astype(int) for rows in (document, query)]
        for bucket in range(8):
            wanted = np.array([bucket & 1, bucket >> 1 & 1, bucket >> 2 & 1])
            inside = [(part == wanted).all(axis=1) for part in bits]
            np.testing.assert_allclose(blocks[1][repetition, bucket], query[inside[1]].sum(axis=0), atol=1e-5)
            nearest = np.argmin((bits[0] != wanted).sum(axis=1))
            expected = document[inside[0]].mean(axis=0) if inside[0].any() else document[nearest]
            np.testing.assert_allclose(blocks[0][repetition, bucket], expected, atol=1e-5)


@pytest.mark.parametrize("projected_dim", [None, 256])
def test_with_many_buckets_the_inner_product_is_max_sim(projected_dim: int | None) -> None:
    """When every document vector has buckets of its own, each query vector meets the one nearest to it."""
    generator = np.random.default_rng(2)
    rows = unit(generator.standard_normal((40, 6, 64))).astype(np.float32)
    asked = unit(rows[:, :4] + 0.01 * generator.standard_normal((40, 4, 64))).astype(np.float32)
    documents, queries = (MultiVectorEmbeddings.from_list(list(map(str, range(40))), list(x)) for x in (rows, asked))
    muvera = Muvera(64, num_repetitions=20, num_hyperplanes=9, projected_dim=projected_dim)
    products = muvera.encode_queries(queries) @ muvera.encode_documents(documents).T
    exact = max_sim(queries, documents)
    np.testing.assert_allclose(np.diag(products), np.diag(exact), rtol=0.08)
    assert np.corrcoef(products.ravel(), exact.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("options", [{}, {"projected_dim": 16, "num_repetitions": 40}, {"final_dim": 8192}])
def test_first_stage_and_exact_scores_find_the_true_top_10(options: dict) -> None:
    documents, queries = clustered()
    muvera = Muvera(32, **options)
    products = muvera.encode_queries(queries) @ muvera.encode_documents(documents).T
    exact = max_sim(queries, documents)
    assert np.mean([np.corrcoef(*rows)[0, 1] for rows in zip(products, exact)]) > 0.75
    best = np.argsort(-exact, axis=1)[:, :10]
    candidates = np.argsort(-products, axis=1)[:, :100]
    rescored = [row[np.argsort(-scores[row])][:10] for row, scores in zip(candidates, exact)]
    recall = np.mean([len(set(found) & set(row)) / 10 for found, row in zip(rescored, best)])
    assert recall >= 0.97
    assert all(found[0] == row[0] for found, row in zip(rescored, best))


def test_seeds() -> None:
    documents, _ = clustered(documents=20, queries=2)
    options = {"projected_dim": 8, "final_dim": 100}
    first, again, other = (Muvera(32, seed=seed, **options).encode_documents(documents) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (20, 100) and first.dtype == np.float32 and not np.allclose(first, other)


def test_texts_without_vectors_become_zeros() -> None:
    texts = MultiVectorEmbeddings(["a", "b"], np.ones((1, 8), dtype=np.float16), [0, 1])
    muvera = Muvera(8)
    for encoded in (muvera.encode_queries(texts), muvera.encode_documents(texts)):
        assert not encoded[0].any() and encoded[1].any() and np.isfinite(encoded).all()


def test_mistakes_are_named() -> None:
    for name in ("num_repetitions", "num_hyperplanes", "projected_dim", "final_dim"):
        for value in (0, -3, 1.5):
            with pytest.raises(ValueError, match=f"{name} must be a whole number and at least 1; found {value}"):
                Muvera(8, **{name: value})
    with pytest.raises(ValueError, match="at most 16"):
        Muvera(8, num_hyperplanes=17)
    with pytest.raises(ValueError, match="expected vectors of 8 dimensions, found 4"):
        Muvera(8).encode_queries(MultiVectorEmbeddings(["a"], np.ones((1, 4)), [1]))
