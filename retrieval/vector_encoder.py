"""How the vectors of an index lie on disk: in a precision, and with the numbers of their centroids where it has such.

codec.safetensors                       not in "float32"
    centroids       float32  (num_centroids, dim)
    bucket_cutoffs, bucket_weights, average_residual  float32, of the residual codec; empty in other precisions
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from rarezoo.retrieval import storage
from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings
from rarezoo.retrieval.residual_codec import CentroidTree, ResidualCodec, default_num_centroids, train_centroids

CODEC_NAME = "codec.safetensors"
_RESIDUAL_BITS = {"1-bit": 1, "2-bit": 2, "4-bit": 4, "8-bit": 8}
PRECISIONS = ("float32", "float16", "int8", *_RESIDUAL_BITS)
_TRAINING_VECTORS_PER_CENTROID = 32
_NORM_TOLERANCE = 0.02
_CODEC_TENSORS: dict[str, type] = dict.fromkeys(
    ("centroids", "bucket_cutoffs", "bucket_weights", "average_residual"), np.float32
)


class VectorEncoder:
    """Vectors to what is stored of them, and back.

    Attributes:
        precision: one of `PRECISIONS`.
        dim: dimensions of a vector.
        centroids: (num_centroids, dim) float32; None in "float32".
        codec: of the residual precisions; None in others.
    """

    def __init__(self, precision: str, dim: int, centroids: np.ndarray | None, codec: ResidualCodec | None):
        self.precision = precision
        self.dim = dim
        self.centroids = centroids
        self.codec = codec

    @classmethod
    def train(
        cls,
        embeddings: MultiVectorEmbeddings,
        precision: str,
        num_centroids: int | None = None,
        codec: ResidualCodec | None = None,
        seed: int = 0,
    ) -> VectorEncoder:
        """For vectors like these; arguments and errors as `MultiVectorIndex.build`."""
        dim, bits = embeddings.dim, _RESIDUAL_BITS.get(precision)
        if precision == "float32":
            if num_centroids is not None or codec is not None:
                raise ValueError("an index in 'float32' has no centroids: leave out num_centroids and codec")
            return cls(precision, dim, None, None)
        if codec is not None:
            if codec.dim != dim or (bits is not None and codec.num_bits != bits):
                raise ValueError(f"{codec} does not fit the precision {precision!r} and vectors of {dim} dimensions")
            return cls(precision, dim, codec.centroids, codec if bits else None)
        if embeddings.num_vectors == 0:
            raise ValueError(
                f"there are no vectors to train the centroids of the precision {precision!r} on: add some documents, "
                "give a codec, or choose 'float32'"
            )
        num_centroids = num_centroids or default_num_centroids(embeddings.num_vectors)
        sample = _sample(embeddings, _TRAINING_VECTORS_PER_CENTROID * num_centroids, seed)
        if bits is None:
            return cls(precision, dim, train_centroids(sample, num_centroids, seed), None)
        _check_norms(sample, precision)
        trained = ResidualCodec.train(sample, bits, num_centroids, seed, least_squares=True)
        return cls(precision, dim, trained.centroids, trained)

    @classmethod
    def read(cls, folder: Path, precision: str, dim: int, verify: bool = False) -> VectorEncoder:
        """That of an index, memory-mapped; with `verify`, the file is compared with its checksum.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: it is damaged, or does not fit the precision and dimension.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"the index in {folder} is damaged: precision {precision!r}")
        if precision == "float32":
            return cls(precision, dim, None, None)
        path = folder / CODEC_NAME
        tensors = storage.map_tensors(path, _CODEC_TENSORS)
        if verify:
            storage.verify_checksum(path, tensors)
        centroids = tensors["centroids"]
        if centroids.ndim != 2 or centroids.shape[1] != dim:
            raise ValueError(f"{path} is damaged: 'centroids' has the shape {centroids.shape}, not (…, {dim})")
        if precision not in _RESIDUAL_BITS:
            return cls(precision, dim, centroids, None)
        try:
            codec = ResidualCodec(
                centroids, tensors["bucket_cutoffs"], tensors["bucket_weights"], tensors["average_residual"][0]
            )
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if codec.num_bits != _RESIDUAL_BITS[precision]:
            raise ValueError(f"{path} is damaged: {codec} in an index of the precision {precision!r}")
        return cls(precision, dim, centroids, codec)

    def write(self, folder: Path) -> None:
        """Write the file that `read` reads; none in "float32"."""
        if self.centroids is None:
            return
        none, codec = np.empty(0, dtype=np.float32), self.codec
        tensors = {
            "centroids": self.centroids,
            "bucket_cutoffs": none if codec is None else codec.bucket_cutoffs,
            "bucket_weights": none if codec is None else codec.bucket_weights,
            "average_residual": none if codec is None else np.array([codec.average_residual], dtype=np.float32),
        }
        storage.write_tensors(folder / CODEC_NAME, tensors)

    @cached_property
    def _tree(self) -> CentroidTree:
        assert self.centroids is not None
        return CentroidTree(self.centroids)

    @property
    def num_centroids(self) -> int:
        return 0 if self.centroids is None else len(self.centroids)

    @property
    def payload_types(self) -> dict[str, tuple[type, tuple[int, ...]]]:
        """Type, and shape behind the number of vectors, of everything that is stored per vector."""
        if self.codec is not None:
            stored: dict[str, tuple[type, tuple[int, ...]]] = {
                "residuals": (np.uint8, (self.codec.num_residual_bytes,))
            }
        else:
            stored = {"vectors": (getattr(np, self.precision), (self.dim,))}
        if self.precision == "int8":
            stored["scales"] = (np.float32, ())
        if self.centroids is not None:
            stored["codes"] = (np.uint16 if self.num_centroids <= 65536 else np.int32, ())
        return stored

    def encode(self, vectors: np.ndarray) -> dict[str, np.ndarray]:
        """What is stored of (n, dim) float32 or float16 vectors."""
        if self.precision == "float32":
            return {"vectors": vectors.astype(np.float32, copy=False)}
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        codes = self._tree.nearest(vectors)
        if self.codec is not None:
            _check_norms(vectors, self.precision)
            stored = {"residuals": self.codec.compress(vectors, codes)[1]}
        elif self.precision == "int8":
            scales = np.abs(vectors).max(axis=1, initial=0) / 127
            scales[scales == 0] = 1
            stored = {"vectors": np.rint(vectors / scales[:, None]).astype(np.int8), "scales": scales}
        else:
            stored = {"vectors": _as_float16(vectors)}
        return {**stored, "codes": codes.astype(self.payload_types["codes"][0])}

    def decode(self, tensors: dict[str, np.ndarray], starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(sum of lengths, dim) float32: some runs of stored vectors, one below the other."""
        if self.codec is not None:
            return self.codec.decompress_runs(tensors["codes"], tensors["residuals"], starts, lengths)
        vectors = rows_of_runs(tensors["vectors"], starts, lengths).astype(np.float32, copy=False)
        if self.precision == "int8":
            vectors *= rows_of_runs(tensors["scales"], starts, lengths)[:, None]
        return vectors


def _sample(embeddings: MultiVectorEmbeddings, size: int, seed: int) -> np.ndarray:
    """(at most size, dim) float32: vectors of all shards, drawn without replacement."""
    total = embeddings.num_vectors
    chosen = np.random.default_rng(seed).choice(total, size=min(size, total), replace=False)
    chosen.sort()
    parts, start = [], 0
    for shard in embeddings.iter_shards():
        inside = chosen[slice(*np.searchsorted(chosen, (start, start + shard.num_vectors)))] - start
        parts.append(shard.vectors[inside].astype(np.float32))
        start += shard.num_vectors
    return np.concatenate(parts)


def _as_float16(vectors: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = vectors.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError("a vector holds values beyond float16's range of 65,504: choose the precision 'float32'")
    return halves


def _check_norms(vectors: np.ndarray, precision: str) -> None:
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(np.abs(norms - 1) > _NORM_TOLERANCE)
    if len(wrong):
        raise ValueError(
            f"the precision {precision!r} keeps directions only and needs vectors of length 1, found the length "
            f"{norms[wrong[0]]:.4g}: normalise them or choose 'float32', 'float16' or 'int8'"
        )


def rows_of_runs(rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Runs of rows, one below the other: a view where they follow each other in `rows`."""
    if len(starts) == 0:
        return rows[:0]
    ends = starts + lengths
    if np.array_equal(starts[1:], ends[:-1]):
        return rows[starts[0] : ends[-1]]
    before = np.cumsum(lengths) - lengths
    return rows[np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))]
