"""What a vocabulary entry is called in an exported file: its surface form, or `<id:N>` where that would not be safe."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

# numpy strings of Seismic's queries hold 100 characters; Lucene's white space tokenizer cuts at 255.
MAXIMUM_LENGTH = 100
_ID_KEY = re.compile(r"<id:(0|[1-9][0-9]*)>")


def surface_forms(vocabulary: Any, vocab_size: int) -> list[str | None]:
    """The tokens by id, None for rows that the vocabulary does not name (heads are often padded).

    Args:
        vocabulary: a tokenizer, a sequence of tokens in the order of their ids, or None (no row is named).
        vocab_size: number of dimensions of the vectors.

    Raises:
        ValueError: the vocabulary names more rows than there are dimensions.
    """
    if vocabulary is None:
        return [None] * vocab_size
    if len(vocabulary) > vocab_size:
        raise ValueError(
            f"the vocabulary has {len(vocabulary)} tokens, but the vectors have only {vocab_size} dimensions: "
            "they do not belong together"
        )
    convert = getattr(vocabulary, "convert_ids_to_tokens", None)
    forms = convert(list(range(len(vocabulary)))) if convert else list(vocabulary)
    return forms + [None] * (vocab_size - len(forms))


def token_keys(vocabulary: Any, vocab_size: int, forbidden: str = "") -> list[str]:
    """One distinct key per vocabulary entry.

    The key is the surface form, unless that is empty, longer than 100 characters, shared by two entries, holds white
    space, control characters or one of `forbidden`, or looks like `<id:N>` itself. Then, and for rows that the
    vocabulary does not name, it is `<id:N>` with the entry's id N.

    Args:
        vocabulary: as in `surface_forms`.
        vocab_size: number of dimensions of the vectors.
        forbidden: characters that the target cannot take.

    Returns:
        `vocab_size` strings.
    """
    forms = surface_forms(vocabulary, vocab_size)
    occurrences = Counter(forms)
    return [
        form if form is not None and occurrences[form] == 1 and _is_safe(form, forbidden) else f"<id:{token_id}>"
        for token_id, form in enumerate(forms)
    ]


def _is_safe(form: str, forbidden: str) -> bool:
    return 0 < len(form) <= MAXIMUM_LENGTH and not (
        _ID_KEY.fullmatch(form)
        or any(character.isspace() or character in forbidden for character in form)
        or any(unicodedata.category(character) in ("Cc", "Cs") for character in form)  # control, surrogate
    )


class TokenLookup:
    """From keys back to ids: `<id:N>`, or any surface form that names exactly one entry (also those not safe above).

    Args:
        vocabulary: as in `surface_forms`.
        vocab_size: number of dimensions of the vectors.
    """

    def __init__(self, vocabulary: Any, vocab_size: int):
        self._vocab_size = vocab_size
        self._entries: dict[str, list[int]] = {}
        for token_id, form in enumerate(surface_forms(vocabulary, vocab_size)):
            if form is not None:
                self._entries.setdefault(form, []).append(token_id)

    def __call__(self, keys: Sequence[str | int], where: str) -> list[int]:
        """Ids of the keys of one row (integers are ids already).

        Raises:
            ValueError: an unknown or ambiguous key, an id outside the vocabulary, or two keys of one entry.
        """
        token_ids = [self._token_id(key, where) for key in keys]
        if len(set(token_ids)) < len(token_ids):
            twice = next(token_id for token_id, count in Counter(token_ids).items() if count > 1)
            raise ValueError(f"{where}: the vocabulary entry {twice} occurs twice in one vector")
        return token_ids

    def _token_id(self, key: str | int, where: str) -> int:
        if isinstance(key, str):
            named = _ID_KEY.fullmatch(key)
            if not named:
                return self._named(key, where)
            token_id = int(named[1])
        else:
            token_id = key
        if not 0 <= token_id < self._vocab_size:
            raise ValueError(f"{where}: {key!r} lies outside the vocabulary of {self._vocab_size} entries")
        return token_id

    def _named(self, key: str, where: str) -> int:
        entries = self._entries.get(key, [])
        if len(entries) == 1:
            return entries[0]
        if entries:
            raise ValueError(f"{where}: the token {key!r} is ambiguous, it names the entries {entries}")
        raise ValueError(
            f"{where}: the token {key!r} is not in the vocabulary"
            + ("; was the file written with another tokenizer?" if self._entries else ", because none was given")
        )
