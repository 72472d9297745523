"""Index directories of the Stanford ColBERT code (PLAID): read what it wrote, write what it reads.

The files, as colbert-ai 0.2.22 has them (`colbert/indexing/collection_indexer.py`, `index_saver.py`):

    plan.json, metadata.json      the configuration (dim, nbits, …) and counts
    centroids.pt                  float16 (num_centroids, dim)
    avg_residual.pt               float32, one number
    buckets.pt                    float32 cutoffs (2^nbits - 1,) and weights (2^nbits,)
    ivf.pid.pt                    int32 passages, centroid by centroid, padded; int64 lengths (num_centroids,)
    N.codes.pt                    int32 (embeddings of chunk N,)
    N.residuals.pt                uint8 (embeddings of chunk N, dim * nbits / 8)
    N.metadata.json               passage_offset, num_passages, num_embeddings, embedding_offset
    doclens.N.json                number of embeddings per passage

Passages have no identifiers there but their numbers; `document_ids.json` is ours, and other readers pass it over.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rarezoo.retrieval import storage
from rarezoo.retrieval.identifiers import SeenIds, listed_ids
from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings
from rarezoo.retrieval.multi_vector_index import MultiVectorIndex
from rarezoo.retrieval.residual_codec import ResidualCodec

IDS_NAME = "document_ids.json"
_CHUNK_FILES = ("{}.codes.pt", "{}.residuals.pt", "{}.metadata.json", "doclens.{}.json")


class PlaidChunk(NamedTuple):
    """Consecutive passages: lengths (passages,) int64, codes (tokens,) int32, residuals (tokens, bytes) uint8."""

    lengths: np.ndarray
    codes: np.ndarray
    residuals: np.ndarray


class PlaidDirectory:
    """A PLAID directory, opened for reading; the chunks are read when they are asked for.

    Attributes:
        folder: where it is.
        config: the configuration that the directory records (dim, nbits, doc_maxlen, …).
        codec: centroids and buckets.
        num_passages: number of documents.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or does not fit the others. Pickled code is never run.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not (self.folder / "metadata.json").is_file():
            raise FileNotFoundError(f"{self.folder} holds no PLAID index: metadata.json is missing")
        self._metadata = storage.read_json(self.folder / "metadata.json")
        self.num_chunks: int = self._entry("metadata.json", self._metadata, "num_chunks", int)
        self.config: dict[str, Any] = self._entry("metadata.json", self._metadata, "config", dict)
        self._check_num_chunks()
        self.codec = self._read_codec()
        self._lengths = [self._checked_lengths(number) for number in range(self.num_chunks)]
        self.num_passages = sum(map(len, self._lengths))

    def __repr__(self) -> str:
        return f"PlaidDirectory({self.num_passages} passages, {self.num_chunks} chunks, {self.codec})"

    @property
    def ids(self) -> list[str]:
        """The documents' identifiers, if rarezoo wrote the directory, or else the passages' numbers."""
        path = self.folder / IDS_NAME
        if not path.is_file():
            return [str(number) for number in range(self.num_passages)]
        ids = storage.read_json(path)["ids"]
        if len(ids) != self.num_passages:
            raise ValueError(f"{path} is damaged: {len(ids)} identifiers for {self.num_passages} passages")
        return ids

    def _path(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        return path

    def _entry(self, file: str, content: dict[str, Any], name: str, kind: type) -> Any:
        value = content.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{self.folder / file} is damaged: {name!r} is missing or no {kind.__name__}")
        return value

    def _check_num_chunks(self) -> None:
        names = (path.name for pattern in _CHUNK_FILES for path in self.folder.glob(pattern.format("*")))
        numbers = (re.fullmatch(r"(?:doclens\.)?(\d+)\..*", name) for name in names)
        found = 1 + max((int(match[1]) for match in numbers if match), default=-1)
        if found > self.num_chunks:
            raise ValueError(
                f"{self.folder / 'metadata.json'} is damaged: it tells of {self.num_chunks} chunks, but there are "
                f"files of chunk {found - 1}"
            )

    def _checked_lengths(self, number: int) -> np.ndarray:
        """The vectors of each passage of a chunk, as many as its metadata tells."""
        metadata, doclens = f"{number}.metadata.json", f"doclens.{number}.json"
        counts = storage.read_json(self._path(metadata))
        told = [self._entry(metadata, counts, name, int) for name in ("num_passages", "num_embeddings")]
        lengths = self._read_lengths(self._path(doclens))
        if told != [len(lengths), int(lengths.sum())]:
            raise ValueError(
                f"{self.folder / metadata} and {doclens} contradict each other: {told[0]} passages of {told[1]} "
                f"vectors, and {len(lengths)} of {int(lengths.sum())}"
            )
        return lengths

    def _read_codec(self) -> ResidualCodec:
        centroids = _load(self._path("centroids.pt"))
        cutoffs, weights = _load(self._path("buckets.pt"))
        average = _load(self._path("avg_residual.pt"))
        try:
            codec = ResidualCodec(
                centroids.float().numpy(), cutoffs.float().numpy(), weights.float().numpy(), float(average)
            )
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the codec in {self.folder} is damaged: {error}") from error
        if (codec.dim, codec.num_bits) != (self.config["dim"], self.config["nbits"]):
            raise ValueError(
                f"{self.folder} is damaged: metadata.json tells of {self.config['dim']} dimensions and "
                f"{self.config['nbits']} bits, the codec has {codec.dim} and {codec.num_bits}"
            )
        return codec

    def iter_chunks(self) -> Iterator[PlaidChunk]:
        """The chunks in the order of the passages."""
        for number in range(self.num_chunks):
            codes = _load(self._path(f"{number}.codes.pt"))
            residuals = _load(self._path(f"{number}.residuals.pt"))
            chunk = PlaidChunk(self._lengths[number], codes.numpy(), residuals.numpy())
            self._check(number, chunk)
            yield chunk

    def _read_lengths(self, path: Path) -> np.ndarray:
        try:
            lengths = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: expected a list of lengths ({error})") from error
        if not isinstance(lengths, list) or not all(type(length) is int and 0 <= length < 2**31 for length in lengths):
            raise ValueError(f"{path} is damaged: expected a list of lengths, whole numbers from 0")
        return np.array(lengths, dtype=np.int64)

    def _check(self, number: int, chunk: PlaidChunk) -> None:
        num_vectors = int(chunk.lengths.sum())
        expected = (num_vectors, self.codec.num_residual_bytes)
        if chunk.codes.shape != expected[:1] or chunk.residuals.shape != expected or chunk.residuals.dtype != np.uint8:
            raise ValueError(
                f"chunk {number} of {self.folder} is damaged: doclens.{number}.json tells of {num_vectors} vectors, "
                f"the codes have the shape {chunk.codes.shape}, the residuals {chunk.residuals.shape}"
            )
        if num_vectors and not 0 <= chunk.codes.min() <= chunk.codes.max() < len(self.codec.centroids):
            raise ValueError(f"{self.folder / f'{number}.codes.pt'} is damaged: it names centroids that do not exist")

    def decompressed(self, fingerprint: str | None = None) -> MultiVectorEmbeddings:
        """All documents with their vectors as the codec gives them back, in memory.

        Args:
            fingerprint: of the model that encoded them, where it is known.
        """
        chunks = list(self.iter_chunks())
        vectors = [self.codec.decompress(chunk.codes, chunk.residuals) for chunk in chunks]
        vectors.append(np.empty((0, self.codec.dim), dtype=np.float32))
        lengths = np.concatenate([np.empty(0, dtype=np.int64), *(chunk.lengths for chunk in chunks)])
        return MultiVectorEmbeddings(self.ids, np.concatenate(vectors), lengths, fingerprint)


def write_plaid_directory(
    folder: str | os.PathLike[str],
    codec: ResidualCodec,
    chunks: Iterable[PlaidChunk],
    ids: Sequence[str] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Write a new directory, whole or not at all.

    Args:
        folder: new or empty.
        codec: its centroids are stored as float16: `ResidualCodec.train` gives such.
        chunks: consecutive passages; colbert-ai makes chunks of 25,000.
        ids: one identifier per passage, by default their numbers.
        config: what else the configuration should say (checkpoint, doc_maxlen, …); no paths are added.

    Raises:
        ValueError: colbert-ai cannot hold this: dim is no multiple of 8 * nbits, or centroids that float16 rounds; or
            the counts of identifiers and passages differ.
        FileExistsError: `folder` is not empty.
        CannotWriteError: full disk or read-only folder.
    """
    _check_codec(codec)
    with storage.folder_written_beside(Path(folder)) as partial:
        counts: list[dict[str, int]] = []
        passages = _Passages(len(codec.centroids))
        for number, chunk in enumerate(chunks):
            counts.append(_write_chunk(partial, number, chunk, counts))
            passages.add(chunk)
        num_passages = sum(count["num_passages"] for count in counts)
        if ids is not None:
            if len(ids) != num_passages:
                raise ValueError(f"expected one identifier per passage, found {len(ids)} for {num_passages}")
            SeenIds().add(ids)
            storage.write_json(partial / IDS_NAME, {"ids": list(ids)})
        _write_codec(partial, codec)
        _save(partial / "ivf.pid.pt", passages.inverted_lists())
        _write_metadata(partial, codec, counts, config or {})


def _check_codec(codec: ResidualCodec) -> None:
    if codec.dim % (8 * codec.num_bits):
        raise ValueError(
            f"colbert-ai needs a multiple of {8 * codec.num_bits} dimensions for {codec.num_bits} bits, "
            f"found {codec.dim}"
        )
    with np.errstate(over="ignore"):
        rounded = codec.centroids.astype(np.float16).astype(np.float32)
    if not np.array_equal(rounded, codec.centroids):
        raise ValueError(
            "PLAID directories hold centroids in float16, which would change these: round them before compressing"
        )


class _Passages:
    """Collects which passages have a vector with which centroid."""

    def __init__(self, num_centroids: int):
        self._num_centroids = num_centroids
        self._num_passages = 0
        self._pairs: list[np.ndarray] = []

    def add(self, chunk: PlaidChunk) -> None:
        passages = np.repeat(np.arange(len(chunk.lengths)) + self._num_passages, chunk.lengths)
        # One number per pair: sorted by centroid, then by passage.
        self._pairs.append(np.unique((chunk.codes.astype(np.int64) << 32) | passages))
        self._num_passages += len(chunk.lengths)

    def inverted_lists(self) -> tuple[Any, Any]:
        """Passages int32, centroid by centroid, and the lists' lengths int64, as torch tensors."""
        import torch

        pairs = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *self._pairs]))
        lengths = np.bincount(pairs >> 32, minlength=self._num_centroids)
        passages = (pairs & 0xFFFFFFFF).astype(np.int32)
        # Readers look at every list through windows as long as the longest: the last ones must not reach over the end.
        if lengths[-1] < lengths.max():
            passages = np.concatenate([passages, np.zeros(lengths.max(), dtype=np.int32)])
        return torch.from_numpy(passages), torch.from_numpy(lengths)


def _write_chunk(folder: Path, number: int, chunk: PlaidChunk, before: list[dict[str, int]]) -> dict[str, int]:
    import torch

    if len(chunk.codes) != int(chunk.lengths.sum()) or len(chunk.residuals) != len(chunk.codes):
        raise ValueError(
            f"chunk {number}: the lengths add up to {int(chunk.lengths.sum())} vectors, found {len(chunk.codes)} codes "
            f"and {len(chunk.residuals)} residuals"
        )
    _save(folder / f"{number}.codes.pt", torch.from_numpy(chunk.codes.astype(np.int32)))
    _save(folder / f"{number}.residuals.pt", torch.from_numpy(np.array(chunk.residuals, dtype=np.uint8)))
    _write_text(folder / f"doclens.{number}.json", json.dumps(chunk.lengths.tolist()))
    counts = {
        "passage_offset": sum(count["num_passages"] for count in before),
        "num_passages": len(chunk.lengths),
        "num_embeddings": len(chunk.codes),
        "embedding_offset": sum(count["num_embeddings"] for count in before),
    }
    storage.write_json(folder / f"{number}.metadata.json", counts)
    return counts


def _write_codec(folder: Path, codec: ResidualCodec) -> None:
    import torch

    _save(folder / "centroids.pt", torch.from_numpy(codec.centroids.astype(np.float16)))
    _save(folder / "avg_residual.pt", torch.tensor(codec.average_residual, dtype=torch.float32))
    buckets = codec.bucket_cutoffs.copy(), codec.bucket_weights.copy()
    _save(folder / "buckets.pt", tuple(torch.from_numpy(part) for part in buckets))


def _write_metadata(folder: Path, codec: ResidualCodec, counts: list[dict[str, int]], config: dict[str, Any]) -> None:
    num_embeddings = sum(count["num_embeddings"] for count in counts)
    average = num_embeddings / max(1, sum(count["num_passages"] for count in counts))
    common = {
        "config": {**config, "dim": codec.dim, "nbits": codec.num_bits},
        "num_chunks": len(counts),
        "num_partitions": len(codec.centroids),
    }
    storage.write_json(
        folder / "plan.json", {**common, "num_embeddings_est": num_embeddings, "avg_doclen_est": average}
    )
    storage.write_json(folder / "metadata.json", {**common, "num_embeddings": num_embeddings, "avg_doclen": average})


def export_plaid(index: MultiVectorIndex, folder: str | os.PathLike[str], config: dict[str, Any] | None = None) -> None:
    """Write the documents of an index with a residual precision as a PLAID directory, code by code.

    Raises:
        ValueError: the index has no residual codec, or colbert-ai cannot hold it.
        FileExistsError, CannotWriteError: as `write_plaid_directory`.
    """
    if index.codec is None:
        raise ValueError(
            f"PLAID directories hold residual codes, the index in {index.folder} vectors in {index.precision}: build "
            "it with a precision of '1-bit', '2-bit', '4-bit' or '8-bit'"
        )
    ids: list[str] = []

    def chunks() -> Iterator[PlaidChunk]:
        for names, lengths, stored in index.iter_stored():
            ids.extend(names)
            yield PlaidChunk(lengths, stored["codes"], stored["residuals"])

    write_plaid_directory(folder, index.codec, chunks(), ids, config)


def import_plaid(
    folder: str | os.PathLike[str],
    index_folder: str | os.PathLike[str],
    fingerprint: str | None = None,
    ids: Sequence[str] | None = None,
) -> MultiVectorIndex:
    """Make an index of a PLAID directory; the codes are taken over, nothing is compressed a second time.

    Args:
        folder: the PLAID directory.
        index_folder: new or empty.
        fingerprint: of the model that encoded the documents, where it is known.
        ids: one identifier per passage; by default those of the directory, see `PlaidDirectory.ids`.

    Raises:
        ValueError: a file is damaged, or the counts of identifiers and passages differ.
        FileExistsError, CannotWriteError: as `MultiVectorIndex.build`.
    """
    directory = PlaidDirectory(folder)
    names = directory.ids if ids is None else listed_ids(ids)
    if len(names) != directory.num_passages:
        raise ValueError(f"expected one identifier per passage, found {len(names)} for {directory.num_passages}")

    def parts() -> Iterator[tuple[list[str], np.ndarray, dict[str, np.ndarray]]]:
        start = 0
        for chunk in directory.iter_chunks():
            end = start + len(chunk.lengths)
            yield names[start:end], chunk.lengths, {"codes": chunk.codes, "residuals": chunk.residuals}
            start = end

    return MultiVectorIndex.build_from_stored(parts(), index_folder, directory.codec, fingerprint)


def _save(path: Path, content: Any) -> None:
    """torch.save, by way of memory: its own writer does not say why it failed."""
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    with storage.reported_for(path):
        path.write_bytes(buffer.getbuffer())


def _write_text(path: Path, text: str) -> None:
    with storage.reported_for(path):
        path.write_text(text, encoding="utf-8")


def _load(path: Path) -> Any:
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        summary = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is damaged, or holds something else than tensors ({summary})") from error
