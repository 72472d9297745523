"""Encoding jobs: a corpus, read as a stream, becomes a folder of shards that a killed job finds again.

Shard number s holds the texts s * shard_size … of the corpus, whatever the number of processes; process r of N writes
the shards r, r + N, …; every shard is written beside and renamed when whole.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy.sparse
from tqdm.auto import tqdm

from rarezoo.auto import family_of_model_type
from rarezoo.retrieval import multi_vector_embeddings, sparse_embeddings, storage
from rarezoo.retrieval.fingerprint import (
    adapter_fingerprint,
    model_fingerprint,
    processor_fingerprint,
    vocabulary_fingerprint,
)
from rarezoo.retrieval.identifiers import SeenIds
from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings
from rarezoo.retrieval.shards import MANIFEST_NAME, list_shards, shard_name
from rarezoo.retrieval.sparse_embeddings import SparseEmbeddings

# Jobs begun by rarezoo's first version do not know them, and may be resumed.
_LATER_SETTINGS = ("vocabulary", "dtype")


class Text(Protocol):
    """What is encoded: `Document` and `Query` are such."""

    @property
    def id(self) -> str: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class _Processes:
    """This process among those of `accelerate launch`."""

    rank: int
    total: int
    wait_for_everyone: Callable[[], None]


def _processes() -> _Processes:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        return _Processes(0, 1, lambda: None)
    import torch
    from accelerate import PartialState

    # Without a GPU, accelerate joins the processes only when it is told that they run on the CPU.
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.accelerator.is_available()
    state = PartialState(cpu=use_cpu)
    if state.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate's PartialState knows {state.num_processes}: create "
            "it with PartialState(cpu=True) on machines without a GPU, or not before encode_corpus"
        )
    return _Processes(state.process_index, state.num_processes, state.wait_for_everyone)


def encode_corpus(
    model: Any,
    processor: Any,
    documents: Iterable[Text],
    folder: str | os.PathLike[str],
    kind: str = "document",
    batch_size: int = 32,
    shard_size: int = 2048,
    top_k: int | None = None,
    language: str | Callable[[str], str] | None = None,
) -> SparseEmbeddings | MultiVectorEmbeddings:
    """Encode a corpus into a folder of shards; called again after an interruption, it goes on where it stopped.

    Under `accelerate launch` every process calls this with the same arguments and its own iterator over the same
    corpus; the files are the same, byte by byte, as those of one process with the same number of threads. No batch
    reaches over the end of a shard, and at most one shard of texts is held in memory.

    Args:
        model: a retriever: its `encode_documents` and `encode_queries` return CSR (n, vocab_size), or for a family of
            multi-vectors (length, dim) per text.
        processor: the model's.
        documents: objects with `id` and `text`, for instance `read_corpus(path)`; read once, in order.
        folder: new, empty, or holding the same job.
        kind: "document" or "query".
        batch_size: texts per forward pass; may change when a job is resumed.
        shard_size: texts per file. An interruption loses at most one shard per process.
        top_k: weights kept per text; by default the model's own `top_k_document` or `top_k_query`. Of sparse vectors.
        language: of the texts, or a function that tells it; by default the model's own. Of multi-vectors.

    Returns:
        The embeddings, memory-mapped.

    Raises:
        TypeError: a document has no `id` and `text`.
        ValueError: the folder holds a job with other settings or of another corpus, an identifier comes twice, or a
            vector is not finite.
        FileExistsError: the folder holds something else.
        CannotWriteError: full disk or read-only folder; finished shards stay and the job can be resumed.
    """
    vectors = make_vectors(model, processor, kind, top_k, language)
    job = _Job(vectors, model, processor, Path(folder), kind, batch_size, shard_size)
    processes = _processes()
    if processes.rank == 0:
        job.start()
    processes.wait_for_everyone()
    job.check_settings()
    count = job.write_shards(documents, processes)
    processes.wait_for_everyone()
    if processes.rank == 0:
        job.finish(count)
    processes.wait_for_everyone()
    return vectors.open(folder)


class _SparseVectors:
    """What a job does with sparse vectors.

    Attributes:
        settings: those by which their files differ.
    """

    open = staticmethod(SparseEmbeddings.open)
    read_manifest = staticmethod(sparse_embeddings.read_manifest)

    def __init__(self, model: Any, processor: Any, kind: str, top_k: int | None):
        self._encode = model.encode_documents if kind == "document" else model.encode_queries
        self._processor = processor
        self._top_k = top_k if top_k is not None else getattr(model.config, f"top_k_{kind}")
        self._vocab_size = model.config.vocab_size
        self.settings = {"vocabulary": vocabulary_fingerprint(processor.tokenizer), "top_k": self._top_k}

    def encode(self, texts: list[str], batch_size: int) -> scipy.sparse.csr_matrix:
        return self._encode(texts, self._processor, batch_size=batch_size, top_k=self._top_k)

    def write_shard(self, path: Path, ids: list[str], blocks: list, places: np.ndarray, source: str) -> None:
        """`places[i]` is where text i lies in the concatenated blocks."""
        rows = sparse_embeddings.canonical_rows(scipy.sparse.vstack(blocks, format="csr")[places], ids)
        sparse_embeddings.write_shard(path, ids, rows, source)

    def write_manifest(self, folder: Path, num_shards: int, complete: bool, **settings: Any) -> None:
        sparse_embeddings.write_manifest(folder, num_shards, self._vocab_size, complete=complete, **settings)


class _MultiVectors:
    """What a job does with several vectors per text; as `_SparseVectors`."""

    open = staticmethod(MultiVectorEmbeddings.open)
    read_manifest = staticmethod(multi_vector_embeddings.read_manifest)

    def __init__(self, model: Any, processor: Any, kind: str, language: str | Callable[[str], str] | None):
        self._encode = model.encode_documents if kind == "document" else model.encode_queries
        self._processor = processor
        self._language = language
        self._dim = model.config.dim
        if language is None or isinstance(language, str):
            name = model.config.languages[model.config.language_id(language)]
            used = [name]
        else:
            name = getattr(language, "__qualname__", type(language).__qualname__)
            used = model.config.languages
        # The fingerprint leaves them out, but the vectors of one job come from one set of adapters.
        self.settings = {"language": name, "adapters": adapter_fingerprint(model, used)}

    def encode(self, texts: list[str], batch_size: int) -> list[np.ndarray]:
        found = self._encode(texts, self._processor, batch_size=batch_size, language=self._language)
        return [vectors.numpy() for vectors in found]

    def write_shard(self, path: Path, ids: list[str], blocks: list, places: np.ndarray, source: str) -> None:
        texts = [vectors for block in blocks for vectors in block]
        arranged = [texts[place] for place in places]
        lengths = np.array([len(vectors) for vectors in arranged], dtype=np.int32)
        rows, lengths = multi_vector_embeddings.canonical_vectors(np.concatenate(arranged), lengths, ids)
        multi_vector_embeddings.write_shard(path, ids, rows, lengths, source)

    def write_manifest(self, folder: Path, num_shards: int, complete: bool, **settings: Any) -> None:
        multi_vector_embeddings.write_manifest(folder, num_shards, self._dim, "float32", complete=complete, **settings)


def make_vectors(
    model: Any, processor: Any, kind: str, top_k: int | None, language: str | Callable[[str], str] | None
) -> _SparseVectors | _MultiVectors:
    """By what the model's family produces."""
    if kind not in ("document", "query"):
        raise ValueError(f"kind must be 'document' or 'query'; found {kind!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1; found {top_k}")
    family = family_of_model_type(getattr(model.config, "model_type", None))
    if family is None or family.representation == "sparse":
        if language is not None:
            raise ValueError(f"language: {type(model).__name__} reads all languages alike, leave it out")
        return _SparseVectors(model, processor, kind, top_k)
    if top_k is not None:
        raise ValueError(f"top_k: the vectors of {type(model).__name__} are not sparse, leave it out")
    return _MultiVectors(model, processor, kind, language)


class _Job:
    def __init__(self, vectors, model, processor, folder: Path, kind: str, batch_size: int, shard_size: int):
        for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; found {value}")
        self.vectors = vectors
        self.folder = folder
        self.batch_size = batch_size
        self.shard_size = shard_size
        self.kind = kind
        self.settings = {
            "fingerprint": model_fingerprint(model, processor),
            "processor": processor_fingerprint(processor),
            # The fingerprint is the same in every precision, but the weights differ.
            "dtype": str(model.dtype).removeprefix("torch."),
            "encoded": kind,
            "shard_size": shard_size,
            **vectors.settings,
        }

    def start(self) -> None:
        """Write the manifest of a new job: the first thing written, so that a bad target is known at once."""
        with storage.reported_for(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            entries = sorted(entry.name for entry in self.folder.iterdir())
        if MANIFEST_NAME in entries:
            return
        if any(not entry.endswith(storage.PARTIAL_SUFFIX) for entry in entries):
            raise FileExistsError(
                f"{self.folder} holds other files ({entries[0]}, …) and no {MANIFEST_NAME}: choose an empty folder"
            )
        self.vectors.write_manifest(self.folder, 0, complete=False, **self.settings)

    def check_settings(self) -> None:
        manifest = self.vectors.read_manifest(self.folder)
        differing = [
            f"{name}: {manifest.get(name)!r} there, {value!r} now"
            for name, value in self.settings.items()
            if manifest.get(name, value if name in _LATER_SETTINGS else None) != value
        ]
        if differing:
            raise ValueError(
                f"{self.folder} holds the embeddings of another job ({'; '.join(differing)}). "
                "Use the same model and settings to resume it, or choose another folder."
            )

    def write_shards(self, documents: Iterable[Text], processes: _Processes) -> int:
        """Write this process's missing shards; returns the number of shards of the whole corpus."""
        seen = SeenIds()
        stream = iter(documents)
        total = len(documents) if isinstance(documents, Sized) else None
        description = f"Encoding {'documents' if self.kind == 'document' else 'queries'}"
        with tqdm(total=total, desc=description, unit="text", disable=processes.rank != 0) as bar:
            for number in itertools.count():
                texts = list(itertools.islice(stream, self.shard_size))
                if not texts:
                    return number
                _check_texts(texts)
                seen.add([text.id for text in texts])
                if number % processes.total == processes.rank:
                    self._write_shard(number, texts, bar)
                else:
                    bar.update(len(texts))
        raise AssertionError("unreachable")

    def _write_shard(self, number: int, texts: list[Text], bar: tqdm) -> None:
        path = self.folder / shard_name(number)
        source = _digest(texts)
        if path.exists():
            _check_source(path, source)
            bar.update(len(texts))
            return
        blocks, places = self._encode_texts(texts, bar)
        self.vectors.write_shard(path, [text.id for text in texts], blocks, places, source)

    def _encode_texts(self, texts: list[Text], bar: tqdm) -> tuple[list, np.ndarray]:
        """Batches of similar length, so that little is computed on padding; and where each text lies in them."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row].text))
        blocks = []
        for start in range(0, len(order), self.batch_size):
            batch = [texts[row].text for row in order[start : start + self.batch_size]]
            blocks.append(self.vectors.encode(batch, self.batch_size))
            bar.update(len(batch))
        return blocks, np.argsort(order)

    def finish(self, num_shards: int) -> None:
        """Check that the folder holds the corpus' shards and no others, and write the final manifest."""
        expected = [shard_name(number) for number in range(num_shards)]
        surplus = sorted(set(list_shards(self.folder)) - set(expected))
        if surplus:
            raise ValueError(
                f"{self.folder} holds {surplus[0]}, but the corpus now ends before it: it has lost texts since "
                "the job began. Encode it into another folder."
            )
        for leftover in self.folder.glob(f".*{storage.PARTIAL_SUFFIX}"):
            leftover.unlink()
        self.vectors.write_manifest(self.folder, num_shards, complete=True, **self.settings)


def _check_texts(texts: Iterable[Any]) -> None:
    for text in texts:
        if not hasattr(text, "id") or not hasattr(text, "text"):
            raise TypeError(
                f"expected objects with id and text, such as Document(id, text) and what read_corpus gives; found "
                f"{text!r:.80}"
            )


def _digest(texts: list[Text]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        for value in (text.id, text.text):
            encoded = value.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()


def _check_source(path: Path, source: str) -> None:
    try:
        found = storage.read_source(path)
    except ValueError as error:
        raise ValueError(f"{error}. Remove the file and run the job again to encode it anew.") from error
    if found != source:
        raise ValueError(
            f"{path} was encoded from other texts: the corpus has changed since the job began. "
            "Encode it into another folder."
        )
