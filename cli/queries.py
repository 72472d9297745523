"""Queries as the verbs that search encode them: by a model, or without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarezoo.auto import family_of_model_type
from rarezoo.cli.checkpoints import language_of, load_retriever

if TYPE_CHECKING:
    from rarezoo.retrieval import MultiVectorEmbeddings, SparseEmbeddings


class QueryEncoder:
    """Texts to query embeddings that carry the model's fingerprint.

    Args:
        encoder: a retriever, or `InferenceFreeQueryEncoder`.
        processor: the retriever's; None for the other.
        language: of the queries, for families that tell languages apart.
    """

    def __init__(self, encoder: Any, processor: Any = None, language: str | None = None):
        from rarezoo.retrieval import model_fingerprint
        from rarezoo.retrieval.fingerprint import vocabulary_fingerprint

        self._encoder = encoder
        self._processor = processor
        family = family_of_model_type(getattr(getattr(encoder, "config", None), "model_type", None))
        self._multi_vector = family is not None and family.representation == "multi-vector"
        if language is not None and not self._multi_vector:
            raise ValueError(f"--language: {type(encoder).__name__} reads all languages alike, leave it out")
        self._language = language_of(language, encoder) if language is not None else None
        # Weights of an inference-free query come from a corpus: they fit the vectors of any model with that vocabulary.
        self._fingerprint = model_fingerprint(encoder, processor) if processor is not None else None
        self._vocabulary = vocabulary_fingerprint((processor or encoder).tokenizer)

    @classmethod
    def load(
        cls, model: str, device: str | None = None, dtype: str | None = None, language: str | None = None
    ) -> QueryEncoder:
        """From a checkpoint folder, a Hub repository, or a folder of `rarezoo export --to inference-free`."""
        from rarezoo.retrieval import InferenceFreeQueryEncoder
        from rarezoo.retrieval.inference_free import IDF_FILE_NAME

        if (Path(model) / IDF_FILE_NAME).is_file():
            return cls(InferenceFreeQueryEncoder.from_pretrained(model), language=language)
        return cls(*load_retriever(model, device, dtype), language)

    def encode(
        self, ids: Sequence[str], texts: Sequence[str], show_progress_bar: bool = False
    ) -> SparseEmbeddings | MultiVectorEmbeddings:
        """One row, or one group of vectors, per text."""
        from rarezoo.retrieval import MultiVectorEmbeddings, SparseEmbeddings

        if self._multi_vector:
            vectors = self._encoder.encode_queries(
                list(texts), self._processor, language=self._language, show_progress_bar=show_progress_bar
            )
            return MultiVectorEmbeddings.from_list(list(ids), vectors, self._fingerprint)
        rows = self._encoder.encode_queries(list(texts), self._processor, show_progress_bar=show_progress_bar)
        return SparseEmbeddings(list(ids), rows, self._fingerprint, self._vocabulary)

    def token(self, token_id: int) -> str:
        """Surface form of a vocabulary entry."""
        if self._processor is not None:
            return self._processor.token(token_id)
        return str(self._encoder.tokenizer.convert_ids_to_tokens(token_id))
