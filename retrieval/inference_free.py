"""Queries without a model: each distinct query token weighs its inverse document frequency.

Documents keep their learned sparse vectors; a query costs a tokenizer call and a table lookup. This is what
SPLADE-doc models, OpenSearch's "doc" models (Geng et al. 2024, arXiv 2411.04403) and the `SparseStaticEmbedding` module
of sentence-transformers do.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import scipy.sparse

from rarezoo.retrieval import storage
from rarezoo.retrieval.corpus import Document

IDF_FILE_NAME = "inference_free_query.safetensors"
_TENSORS: dict[str, type] = {"idf": np.float32}
_TEXTS_PER_CALL = 1024


def inverse_document_frequencies(
    tokenizer: Any,
    documents: Iterable[Document | str],
    vocab_size: int | None = None,
    show_progress_bar: bool = False,
) -> np.ndarray:
    """Count in how many documents each token occurs, and weigh rare tokens up.

        idf(t) = ln(1 + (N - n_t + 0.5) / (n_t + 0.5))

    with N documents that hold at least one token and n_t documents that hold t: the form of Lucene's BM25Similarity,
    which OpenSearch's recipe for inference-free queries uses too. It is positive for every token, and largest for
    tokens that no document holds. Special tokens (with `<unk>`) weigh 0.

    Args:
        tokenizer: of the model that encodes the documents.
        documents: texts, or `Document`s as from `read_corpus`; streamed.
        vocab_size: length of the result; the model's `config.vocab_size` where that is larger than the tokenizer.
        show_progress_bar: show one.

    Returns:
        (vocab_size,) float32.

    Raises:
        ValueError: no document with any token, or `vocab_size` is smaller than the tokenizer.
    """
    from transformers.utils.logging import tqdm

    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    _check_vocab_size(tokenizer, vocab_size)
    special_ids = np.array(tokenizer.all_special_ids, dtype=np.int64)
    frequencies = np.zeros(vocab_size, dtype=np.int64)
    num_documents = 0
    texts = (document if isinstance(document, str) else document.text for document in documents)
    with tqdm(desc="Counting tokens", unit="document", disable=not show_progress_bar) as bar:
        for batch in _batches(texts, _TEXTS_PER_CALL):
            for token_ids in _distinct_token_ids(tokenizer, batch):
                token_ids = token_ids[~np.isin(token_ids, special_ids)]
                frequencies[token_ids] += 1
                num_documents += len(token_ids) > 0
            bar.update(len(batch))
    if num_documents == 0:
        raise ValueError("no document holds any token: inverse document frequencies need a corpus with text")
    idf = np.log1p((num_documents - frequencies + 0.5) / (frequencies + 0.5))
    idf[special_ids] = 0
    return idf.astype(np.float32)


class InferenceFreeQueryEncoder:
    """Encodes queries as a model does, with a table in place of the model.

    Args:
        tokenizer: of the model that encoded the documents.
        idf: (vocab_size,) weights per token, finite and not negative; numpy array or torch tensor. Weights of special
            tokens are not used.

    Raises:
        ValueError: a wrong shape, fewer weights than the tokenizer has tokens, or a negative, NaN or infinite weight.
    """

    def __init__(self, tokenizer: Any, idf: Any):
        weights = np.array(idf.float().numpy(force=True) if hasattr(idf, "numpy") else idf, dtype=np.float32)
        if weights.ndim != 1:
            raise ValueError(f"expected idf of shape (vocab_size,), found {weights.shape}")
        _check_vocab_size(tokenizer, len(weights))
        wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if wrong.size:
            raise ValueError(f"weights must be finite and not negative; token {wrong[0]} has {weights[wrong[0]]}")
        self.tokenizer = tokenizer
        self.idf = weights
        self._special_ids = np.array(tokenizer.all_special_ids, dtype=np.int64)

    @classmethod
    def from_corpus(
        cls,
        tokenizer: Any,
        documents: Iterable[Document | str],
        vocab_size: int | None = None,
        show_progress_bar: bool = False,
    ) -> InferenceFreeQueryEncoder:
        """Take the weights from a corpus; arguments and errors as `inverse_document_frequencies`."""
        return cls(tokenizer, inverse_document_frequencies(tokenizer, documents, vocab_size, show_progress_bar))

    @property
    def vocab_size(self) -> int:
        """Number of dimensions of the vectors."""
        return len(self.idf)

    def encode_queries(
        self,
        texts: str | Sequence[str],
        processor: Any = None,
        *,
        prompt: str | None = None,
        batch_size: int = 32,
        top_k: int | None = None,
        output: str = "scipy",
        show_progress_bar: bool = False,
    ):
        """Sparse vectors of queries; takes what the models' `encode_queries` take.

        Args:
            texts: one text or several.
            processor: not needed; when given, its tokenizer must have the vocabulary of this encoder.
            prompt: must be None: without a model there is nothing that an instruction could change.
            batch_size: texts per tokenizer call.
            top_k: weights kept per row, of equal weights the lower token id.
            output: "scipy" (csr_matrix), "torch" (sparse CSR tensor) or "dense" (tensor).
            show_progress_bar: show one.

        Returns:
            (texts, vocab_size) float32, in the order of `texts`; a text without known tokens gives a row of zeros.

        Raises:
            ValueError: a prompt, another vocabulary, or an argument outside its range.
        """
        from transformers.utils.logging import tqdm

        self._check_arguments(processor, prompt, batch_size, top_k, output)
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows: list[np.ndarray] = []
        with tqdm(total=len(texts), desc="Encoding queries", unit="text", disable=not show_progress_bar) as bar:
            for batch in _batches(texts, batch_size):
                rows.extend(self._active(token_ids, top_k) for token_ids in _distinct_token_ids(self.tokenizer, batch))
                bar.update(len(batch))
        return _as_output(self._stacked(rows), output)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the weights and the tokenizer to a new folder, whole or not at all.

        Raises:
            FileExistsError: `folder` exists and is not empty.
            OSError: it cannot be written.
        """
        with storage.folder_written_beside(Path(folder)) as partial:
            storage.write_tensors(partial / IDF_FILE_NAME, {"idf": self.idf})
            self.tokenizer.save_pretrained(partial)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **hub_arguments: Any) -> InferenceFreeQueryEncoder:
        """Open what `save_pretrained` wrote.

        Args:
            path: a folder, or a repository on the Hub.
            hub_arguments: `revision`, `subfolder`, `token`, … as for other `from_pretrained` methods.

        Raises:
            OSError: there are no such files.
            ValueError: a damaged file, or weights that do not fit the tokenizer.
        """
        from transformers import AutoTokenizer
        from transformers.utils import cached_file

        file = cast(str, cached_file(path, IDF_FILE_NAME, **hub_arguments))
        tensors = storage.map_tensors(Path(file), _TENSORS, mmap=False)
        return cls(AutoTokenizer.from_pretrained(path, **hub_arguments), tensors["idf"])

    def _check_arguments(self, processor: Any, prompt: str | None, batch_size: int, top_k: int | None, output: str):
        if output not in ("scipy", "torch", "dense"):
            raise ValueError(f"output must be 'scipy', 'torch' or 'dense'; found {output!r}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1; found {top_k}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; found {batch_size}")
        if prompt is not None:
            raise ValueError(f"queries encoded without a model take no prompt; found {prompt!r}")
        if processor is not None and processor.tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise ValueError("the processor's tokenizer and the query weights have different vocabularies")

    def _active(self, token_ids: np.ndarray, top_k: int | None) -> np.ndarray:
        token_ids = token_ids[(self.idf[token_ids] > 0) & ~np.isin(token_ids, self._special_ids)]
        if top_k is not None:
            heaviest = np.argsort(-self.idf[token_ids], kind="stable")[:top_k]
            token_ids = np.sort(token_ids[heaviest])
        return token_ids

    def _stacked(self, rows: list[np.ndarray]) -> scipy.sparse.csr_matrix:
        pointers = np.cumsum([0, *(len(row) for row in rows)])
        indices = np.concatenate([np.empty(0, dtype=np.int64), *rows]).astype(np.int32)
        matrix = scipy.sparse.csr_matrix((self.idf[indices], indices, pointers), shape=(len(rows), self.vocab_size))
        matrix.has_sorted_indices = True
        return matrix


def _check_vocab_size(tokenizer: Any, vocab_size: int) -> None:
    if vocab_size < len(tokenizer):
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, but there are only {vocab_size} weights")


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(itertools.islice(texts, size)):
        yield batch


def _distinct_token_ids(tokenizer: Any, texts: list[str]) -> Iterator[np.ndarray]:
    """For every text its distinct token ids, ascending, without the special tokens that a template would add."""
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    for token_ids in encoded["input_ids"]:
        yield np.unique(np.array(token_ids, dtype=np.int64))


def _as_output(matrix: scipy.sparse.csr_matrix, output: str):
    if output == "scipy":
        return matrix
    import torch

    if output == "dense":
        return torch.from_numpy(matrix.toarray())
    pointers, indices = (torch.from_numpy(part.astype(np.int64)) for part in (matrix.indptr, matrix.indices))
    return torch.sparse_csr_tensor(
        pointers, indices, torch.from_numpy(matrix.data), matrix.shape, check_invariants=True
    )
