"""Folders of either kind of representation, opened by what they say of themselves."""

from __future__ import annotations

import os
from pathlib import Path

from rarezoo.retrieval import storage
from rarezoo.retrieval.metadata import MetadataOf
from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings
from rarezoo.retrieval.multi_vector_index import MultiVectorIndex
from rarezoo.retrieval.sparse_embeddings import SparseEmbeddings
from rarezoo.retrieval.sparse_index import SparseIndex


def _is_multi_vector(manifest: Path) -> bool:
    """What is damaged or of an unknown kind is left to the sparse reader, which says so."""
    if not manifest.is_file():
        raise FileNotFoundError(f"{manifest.parent} holds no {manifest.stem}: {manifest.name} is missing")
    return storage.read_json(manifest).get("kind") == "multi-vector"


def open_embeddings(folder: str | os.PathLike[str]) -> SparseEmbeddings | MultiVectorEmbeddings:
    """`SparseEmbeddings.open` or `MultiVectorEmbeddings.open`; their errors."""
    multi_vector = _is_multi_vector(Path(folder) / "embeddings.json")
    return (MultiVectorEmbeddings if multi_vector else SparseEmbeddings).open(folder)


def open_index(folder: str | os.PathLike[str]) -> SparseIndex | MultiVectorIndex:
    """`SparseIndex.open` or `MultiVectorIndex.open`; their errors."""
    multi_vector = _is_multi_vector(Path(folder) / "index.json")
    return (MultiVectorIndex if multi_vector else SparseIndex).open(folder)


def build_index(
    embeddings: SparseEmbeddings | MultiVectorEmbeddings,
    folder: str | os.PathLike[str],
    precision: str | None = None,
    metadata: MetadataOf | None = None,
) -> SparseIndex | MultiVectorIndex:
    """`SparseIndex.build` or `MultiVectorIndex.build`; their errors.

    Args:
        embeddings: of the documents.
        folder: new.
        precision: of multi-vectors, see `MultiVectorIndex.build`; None means "float32".
        metadata: of documents, by identifier: fields with str, int, float, bool, None or a list of those. A corpus'
            metadata is `{document.id: document.metadata for document in read_corpus(path)}`.

    Raises:
        TypeError: `embeddings` is something else.
        ValueError: also for a precision of sparse vectors, which have but one.
    """
    if isinstance(embeddings, MultiVectorEmbeddings):
        return MultiVectorIndex.build(embeddings, folder, precision or "float32", metadata=metadata)
    if not isinstance(embeddings, SparseEmbeddings):
        raise TypeError(
            "expected embeddings with identifiers, as encode_corpus and open_embeddings give them (from vectors: "
            "SparseEmbeddings(ids, rows), MultiVectorEmbeddings.from_list(ids, vectors)); found "
            f"{type(embeddings).__name__}"
        )
    if precision is not None:
        raise ValueError("precision: an index of sparse vectors is exact, in float32; leave it out")
    return SparseIndex.build(embeddings, folder, metadata)
