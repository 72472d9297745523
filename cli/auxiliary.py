"""Vectors of token texts, from what a command line can name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rarezoo.cli.checkpoints import check_found

_FASTTEXT = (".bin", ".ftz")
_GENSIM = (".vec", ".kv")


class _NamedVectors(os.PathLike):
    """Vectors that remember where they came from, which goes into the provenance of the result."""

    def __init__(self, source: str, vectors: Any):
        self._source = source
        self._vectors = vectors

    def __fspath__(self) -> str:
        return self._source

    def vectors(self, strings: Sequence[str]) -> Any:
        return self._vectors.vectors(strings)


def open_auxiliary(source: str, cache_folder: Path | None, compatibility: str | None, trust_remote_code: bool) -> Any:
    """What `transplant_tokenizer` takes as `auxiliary`.

    Args:
        source: `NAME.safetensors` with its strings in `NAME.json` or `NAME_strings.json`; fastText's `.bin` or `.ftz`;
            word2vec's text format `.vec` or gensim's `.kv`; else an encoder's folder or Hub repository.
        cache_folder: where an encoder keeps its vectors between runs.
        compatibility: with "tokenadapt" every encoder gives the mean of its last hidden states, as that peer does; else
            one of sentence-transformers has its own pooling.
        trust_remote_code: run the code of an encoder's repository.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ImportError: the library that reads the format is not installed.
    """
    check_found(source)
    suffix = Path(source).suffix
    if suffix in (*_FASTTEXT, *_GENSIM, ".safetensors") and cache_folder is not None:
        raise ValueError("--auxiliary-cache keeps what an encoder computes; vectors in a file need none, leave it out")
    from rarezoo.tokenizer_transplant import as_auxiliary_vectors

    if suffix == ".safetensors":
        vectors = source
    elif suffix in _FASTTEXT:
        vectors = _fasttext_model(source)
    elif suffix in _GENSIM:
        vectors = _word_vectors(source)
    else:
        vectors = _encoder(source, compatibility, trust_remote_code)
    return _NamedVectors(source, as_auxiliary_vectors(vectors, cache_folder=cache_folder))


def _fasttext_model(path: str) -> Any:
    try:
        import fasttext
    except ImportError:
        raise ImportError(f"reading {path} needs fastText: pip install fasttext") from None
    return fasttext.load_model(path)


def _word_vectors(path: str) -> Any:
    try:
        from gensim.models import KeyedVectors
    except ImportError:
        raise ImportError(f"reading {path} needs gensim: pip install gensim") from None
    return KeyedVectors.load(path) if path.endswith(".kv") else KeyedVectors.load_word2vec_format(path)


def _encoder(source: str, compatibility: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import cached_file

    pools = cached_file(source, "modules.json", _raise_exceptions_for_missing_entries=False) is not None
    if pools and compatibility != "tokenadapt":
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(source, trust_remote_code=trust_remote_code)
    model = AutoModel.from_pretrained(source, trust_remote_code=trust_remote_code)
    return model, AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
