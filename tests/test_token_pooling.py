"""Token pooling against colbert-ai's output, and against a plain transcription of PyLate's rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.cluster.hierarchy import fcluster, linkage

from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings
from rarezoo.retrieval.token_pooling import pool_tokens


def container(vectors: np.ndarray, lengths) -> MultiVectorEmbeddings:
    return MultiVectorEmbeddings([f"d{row}" for row in range(len(lengths))], vectors, np.asarray(lengths), "a model")


def unit_rows(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("factor", "protected"), [(2, 0), (3, 1)])
def test_as_colbert_ai_does(factor: int, protected: int) -> None:
    expected = load_file(Path(__file__).parent / "fixtures" / "colbert_xm" / "expected.safetensors")
    documents = container(expected["pool.in"], expected["pool.in_lengths"])
    pooled = pool_tokens(documents, factor, protected)
    np.testing.assert_array_equal(pooled.lengths, expected[f"pool.f{factor}p{protected}.lengths"])
    np.testing.assert_allclose(pooled.vectors, expected[f"pool.f{factor}p{protected}.out"], rtol=0, atol=1e-6)
    assert list(pooled.ids) == list(documents.ids) and pooled.fingerprint == "a model"


@pytest.mark.parametrize(("factor", "protected"), [(2, 0), (2, 1), (3, 1), (3, 4)])
def test_as_pylate_does(factor: int, protected: int) -> None:
    lengths = [17, 30, 9, 5]
    vectors = unit_rows(sum(lengths))
    pooled = [rows for _, rows in pool_tokens(container(vectors, lengths), factor, protected, mode="pylate")]
    for found, document in zip(pooled, np.split(vectors, np.cumsum(lengths)[:-1])):
        kept, rest = document[:protected], document[protected:]
        np.testing.assert_array_equal(found[:protected], kept)
        count = max(len(rest) // factor, 1)
        expected = rest
        if count < len(rest):
            distances = (1 - rest @ rest.T)[np.triu_indices(len(rest), k=1)]
            labels = fcluster(linkage(distances, method="ward"), t=count, criterion="maxclust")
            expected = np.stack([rest[labels == label].mean(axis=0) for label in range(1, labels.max() + 1)])
        np.testing.assert_allclose(found[protected:], expected, rtol=0, atol=1e-6)


def test_the_modes_differ_as_documented() -> None:
    documents = container(unit_rows(20), [20])
    colbert, pylate = (pool_tokens(documents, 2, 3, mode=mode) for mode in ("colbert", "pylate"))
    assert colbert.num_vectors == 20 // 2 + 3 and pylate.num_vectors == 17 // 2 + 3
    np.testing.assert_array_equal(colbert.vectors[-3:], documents.vectors[:3])
    np.testing.assert_array_equal(pylate.vectors[:3], documents.vectors[:3])
    np.testing.assert_array_equal(pool_tokens(documents, 2, mode="pylate").vectors[0], documents.vectors[0])


@pytest.mark.parametrize("mode", ["colbert", "pylate"])
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("protected", [0, 1, 3, 7])
def test_documents_of_no_to_three_vectors(mode: str, factor: int, protected: int) -> None:
    lengths = [0, 1, 2, 3, 0]
    documents = container(unit_rows(6), lengths)
    pooled = pool_tokens(documents, factor, protected, mode)
    assert len(pooled) == 5 and np.isfinite(pooled.vectors).all()
    for before, after in zip(lengths, pooled.lengths):
        assert (after == 0) == (before == 0) and after <= before
        assert after >= min(before, protected)
    if protected >= 3:
        np.testing.assert_array_equal(pooled.vectors, documents.vectors)


@pytest.mark.parametrize("mode", ["colbert", "pylate"])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("protected", [0, 1])
def test_values_of_documents_of_one_to_three_vectors(mode: str, factor: int, protected: int) -> None:
    """What is not protected becomes one mean; with one protected of three vectors, "colbert" counts it too."""
    lengths = [1, 2, 3]
    documents = container(unit_rows(6), lengths)
    pooled = [vectors for _, vectors in pool_tokens(documents, factor, protected, mode)]
    for found, document in zip(pooled, np.split(documents.vectors.astype(np.float64), [1, 3])):
        kept, rest = document[:protected], document[protected:]
        mean = rest.mean(axis=0, keepdims=True) if len(rest) else rest
        expected = np.concatenate([mean, kept] if mode == "colbert" else [kept, mean])
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_normalised_means_and_float16() -> None:
    documents = container(unit_rows(40).astype(np.float16), [25, 15])
    plain, unit = pool_tokens(documents, 3), pool_tokens(documents, 3, normalised=True)
    assert plain.dtype == unit.dtype == np.float16
    assert np.linalg.norm(plain.vectors.astype(np.float32), axis=1).min() < 0.9
    np.testing.assert_allclose(np.linalg.norm(unit.vectors.astype(np.float32), axis=1), 1, atol=2e-3)


def test_mistakes_are_named() -> None:
    documents = container(unit_rows(4), [4])
    with pytest.raises(ValueError, match="mode must be 'colbert' or 'pylate'; found 'ward'"):
        pool_tokens(documents, 2, mode="ward")
    with pytest.raises(ValueError, match="factor must be at least 1; found 0"):
        pool_tokens(documents, 0)
    with pytest.raises(ValueError, match="protected must be at least 0; found -1"):
        pool_tokens(documents, 2, -1)
