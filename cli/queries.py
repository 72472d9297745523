"""Queries as the verbs that search encode them: by a model, or without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarezoo.cli.checkpoints import load_retriever

if TYPE_CHECKING:
    from rarezoo.retrieval import SparseEmbeddings


class QueryEncoder:
    """Texts to query embeddings that carry the model's fingerprint.

    Args:
        model: checkpoint folder, Hub repository, or a folder of `rarezoo export --to inference-free`.
    """

    def __init__(self, model: str, device: str | None = None, dtype: str | None = None):
        from rarezoo.retrieval import InferenceFreeQueryEncoder, model_fingerprint
        from rarezoo.retrieval.inference_free import IDF_FILE_NAME

        self._processor = None
        self._fingerprint = None
        self._encoder: Any
        if (Path(model) / IDF_FILE_NAME).is_file():
            self._encoder = InferenceFreeQueryEncoder.from_pretrained(model)
            self._token = self._encoder.tokenizer.convert_ids_to_tokens
        else:
            self._encoder, self._processor = load_retriever(model, device, dtype)
            self._fingerprint = model_fingerprint(self._encoder)
            self._token = self._processor.token

    def encode(self, ids: Sequence[str], texts: Sequence[str], show_progress_bar: bool = False) -> SparseEmbeddings:
        """One row per text."""
        from rarezoo.retrieval import SparseEmbeddings

        rows = self._encoder.encode_queries(list(texts), self._processor, show_progress_bar=show_progress_bar)
        return SparseEmbeddings(list(ids), rows, fingerprint=self._fingerprint)

    def token(self, token_id: int) -> str:
        """Surface form of a vocabulary entry."""
        return str(self._token(token_id))
