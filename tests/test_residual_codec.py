"""The residual codec against the bytes of colbert-ai 0.2.22 and against plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rarezoo.retrieval.residual_codec import (
    CentroidTree,
    ResidualCodec,
    default_num_centroids,
    nearest_centroids,
    train_centroids,
)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return load_file(Path(__file__).parent / "fixtures" / "colbert_xm" / "expected.safetensors")


def official(expected: dict[str, np.ndarray], num_bits: int) -> ResidualCodec:
    names = ("bucket_cutoffs", "bucket_weights")
    return ResidualCodec(expected["codec.centroids"], *(expected[f"codec.b{num_bits}.{name}"] for name in names))


def unit_vectors(count: int, dim: int, seed: int = 0, clusters: int = 40, noise: float = 0.05) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centers = generator.standard_normal((clusters, dim)) / np.sqrt(dim)
    vectors = centers[generator.integers(0, clusters, count)] + noise * generator.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def packed_slowly(vectors: np.ndarray, codec: ResidualCodec, codes: np.ndarray) -> np.ndarray:
    """numpy's packbits over the bits of each bucket number, lowest first."""
    buckets = np.searchsorted(codec.bucket_cutoffs, vectors - codec.centroids[codes], side="left")
    bits = (buckets[..., None] >> np.arange(codec.num_bits)) & 1
    return np.packbits(bits.reshape(len(vectors), -1).astype(np.uint8), axis=1)


@pytest.mark.parametrize("num_bits", [1, 2])
def test_the_official_bytes(expected, num_bits: int) -> None:
    codec = official(expected, num_bits)
    codes, residuals = codec.compress(expected["codec.embeddings"])
    assert codes.dtype == np.int32 and residuals.dtype == np.uint8
    np.testing.assert_array_equal(codes, expected[f"codec.b{num_bits}.codes"])
    np.testing.assert_array_equal(residuals, expected[f"codec.b{num_bits}.residuals"])
    decompressed = codec.decompress(codes, residuals)
    np.testing.assert_allclose(decompressed, expected[f"codec.b{num_bits}.decompressed"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_bits", [1, 2])
def test_the_official_buckets(expected, num_bits: int) -> None:
    trained = ResidualCodec.from_held_out(expected["codec.centroids"], expected["codec.embeddings"], num_bits)
    for name in ("bucket_cutoffs", "bucket_weights"):
        np.testing.assert_allclose(getattr(trained, name), expected[f"codec.b{num_bits}.{name}"], rtol=0, atol=1e-6)
    assert trained.average_residual == pytest.approx(float(expected[f"codec.b{num_bits}.avg_residual"][0]), abs=1e-6)


@pytest.mark.parametrize("num_bits", [1, 2, 4, 8])
def test_every_number_of_bits_against_numpy(num_bits: int) -> None:
    vectors = unit_vectors(500, 32)
    codec = ResidualCodec.train(vectors, num_bits, num_centroids=16)
    assert codec.num_bits == num_bits and codec.num_residual_bytes == 4 * num_bits
    codes, residuals = codec.compress(vectors)
    products = vectors.astype(np.float64) @ codec.centroids.T.astype(np.float64)
    np.testing.assert_allclose(np.take_along_axis(products, codes[:, None], 1)[:, 0], products.max(1), atol=1e-6)
    np.testing.assert_array_equal(residuals, packed_slowly(vectors, codec, codes))
    buckets = np.searchsorted(codec.bucket_cutoffs, vectors - codec.centroids[codes], side="left")
    sums = (codec.centroids[codes] + codec.bucket_weights[buckets]).astype(np.float64)
    sums /= np.linalg.norm(sums, axis=1, keepdims=True)
    np.testing.assert_allclose(codec.decompress(codes, residuals), sums, rtol=0, atol=1e-6)


def test_a_value_on_a_cutoff_lies_below_it() -> None:
    codec = ResidualCodec(np.zeros((1, 8)), [-0.5, 0.0, 0.5], [-1, -0.25, 0.25, 1])
    _, residuals = codec.compress(np.array([[-0.5, -0.4, 0.0, 0.1, 0.5, 0.6, -9, 9]], dtype=np.float32))
    # Buckets 0 1 1 2 2 3 0 3, the lower bit of each first.
    assert [f"{byte:08b}" for byte in residuals[0]] == ["00101001", "01110011"]


def test_more_bits_and_least_squares_lose_less() -> None:
    vectors = unit_vectors(4000, 32, clusters=300)
    errors = {}
    for least_squares in (False, True):
        for num_bits in (1, 2, 4):
            codec = ResidualCodec.train(vectors, num_bits, num_centroids=64, least_squares=least_squares)
            restored = codec.decompress(*codec.compress(vectors))
            errors[num_bits, least_squares] = float(((restored - vectors) ** 2).sum(1).mean())
            np.testing.assert_allclose(np.linalg.norm(restored, axis=1), 1, atol=1e-5)
    for least_squares in (False, True):
        assert errors[1, least_squares] > errors[2, least_squares] > errors[4, least_squares]
    assert all(errors[num_bits, True] < errors[num_bits, False] for num_bits in (1, 2, 4))


def test_equal_seeds_give_equal_codecs() -> None:
    vectors = unit_vectors(600, 16)
    first, again, other = (ResidualCodec.train(vectors, 2, seed=seed) for seed in (1, 1, 2))
    assert len(first.centroids) == default_num_centroids(600) == 256
    np.testing.assert_array_equal(first.centroids, again.centroids)
    np.testing.assert_array_equal(first.bucket_weights, again.bucket_weights)
    assert not np.array_equal(first.centroids, other.centroids)
    np.testing.assert_array_equal(first.centroids, first.centroids.astype(np.float16))
    np.testing.assert_allclose(np.linalg.norm(first.centroids, axis=1), 1, atol=1e-3)


def test_the_number_of_centroids() -> None:
    assert [default_num_centroids(count) for count in (1, 100, 1000, 400_000)] == [1, 100, 256, 8192]
    with pytest.raises(ValueError, match="found none"):
        default_num_centroids(0)


def test_two_levels_of_centroids() -> None:
    vectors = unit_vectors(12_000, 16, clusters=900, noise=0.05)
    centroids = train_centroids(vectors, 2048)
    assert centroids.shape == (2048, 16)
    exact = nearest_centroids(vectors, centroids)
    found = CentroidTree(centroids).nearest(vectors)
    assert found.dtype == np.int32 and (found == exact).mean() > 0.97
    cosines = [(vectors * centroids[codes]).sum(axis=1).mean() for codes in (exact, found)]
    assert cosines[0] > 0.93 and cosines[0] - cosines[1] < 2e-3


def test_few_vectors() -> None:
    for count in (1, 2, 3):
        vectors = unit_vectors(count, 8)
        codec = ResidualCodec.train(vectors, 2)
        restored = codec.decompress(*codec.compress(vectors))
        np.testing.assert_allclose(restored, vectors, atol=1e-2)
    codec = ResidualCodec.train(np.repeat(unit_vectors(1, 8), 50, axis=0), 2)  # fewer distinct ones than centroids
    assert np.isfinite(codec.decompress(*codec.compress(unit_vectors(3, 8)))).all()
    codes, residuals = codec.compress(np.empty((0, 8), dtype=np.float32))
    assert codec.decompress(codes, residuals).shape == (0, 8)


def test_mistakes_are_named() -> None:
    vectors = unit_vectors(50, 8)
    codec = ResidualCodec.train(vectors, 2)
    with pytest.raises(ValueError, match=r"expected vectors \(n, 8\), found the shape \(3, 16\)"):
        codec.compress(unit_vectors(3, 16))
    with pytest.raises(ValueError, match="not finite"):
        codec.compress(np.full((1, 8), np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match="num_bits must be 1, 2, 4 or 8; found 3"):
        ResidualCodec.train(vectors, 3)
    with pytest.raises(ValueError, match="expected 1 to 50 centroids for 50 vectors, found 51"):
        train_centroids(vectors, 51)
    with pytest.raises(ValueError, match=r"expected residuals \(2, 2\), found the shape \(2, 4\)"):
        codec.decompress(np.zeros(2, dtype=np.int32), np.zeros((2, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"codes 0 … 99 do not all name"):
        codec.decompress(np.array([0, 99]), np.zeros((2, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match="7 dimensions of 2 bits do not fill whole bytes"):
        ResidualCodec(np.ones((2, 7)), np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="expected 3 bucket cutoffs"):
        ResidualCodec(np.ones((2, 8)), np.zeros(1), np.zeros(4))
    with pytest.raises(ValueError, match="2, 4, 16 or 256 bucket weights"):
        ResidualCodec(np.ones((2, 8)), np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="ascend"):
        ResidualCodec(np.ones((2, 8)), [1, 0, 2], np.zeros(4))
    with pytest.raises(ValueError, match="centroids holds values that are not finite"):
        ResidualCodec(np.full((2, 8), np.inf), np.zeros(3), np.zeros(4))
