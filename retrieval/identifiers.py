"""Identifiers of texts: packed into two arrays, listed, digested, and watched for duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class PackedIds(Sequence[str]):
    """Identifiers as UTF-8 bytes and offsets: a read-only sequence of strings that costs nothing to open.

    Args:
        id_bytes: (total bytes,) uint8.
        id_offsets: (n + 1,) int64, increasing, from 0 to the total.
    """

    def __init__(self, id_bytes: np.ndarray, id_offsets: np.ndarray):
        self.id_bytes = id_bytes
        self.id_offsets = id_offsets

    @classmethod
    def pack(cls, ids: Iterable[str]) -> PackedIds:
        """Pack strings.

        Raises:
            TypeError: an identifier is not a string.
            ValueError: an identifier holds half of a surrogate pair.
        """
        encoded = []
        for identifier in ids:
            if not isinstance(identifier, str):
                raise TypeError(f"identifiers must be str, found {type(identifier).__name__}: {identifier!r}")
            encoded.append(_utf8(identifier))
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(identifier) for identifier in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.id_offsets) - 1

    @overload
    def __getitem__(self, position: int) -> str: ...
    @overload
    def __getitem__(self, position: slice) -> list[str]: ...
    def __getitem__(self, position: int | slice) -> str | list[str]:
        if isinstance(position, slice):
            return self.take(np.arange(len(self))[position])
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of {len(self)} identifiers")
        position %= len(self)
        return self.take(np.array([position]))[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.take(np.arange(len(self))))

    def take(self, positions: np.ndarray) -> list[str]:
        """The identifiers at these positions (not negative)."""
        buffer = self.id_bytes.data
        starts, ends = self.id_offsets[positions].tolist(), self.id_offsets[positions + 1].tolist()
        return [str(buffer[start:end], "utf-8") for start, end in zip(starts, ends)]


def listed_ids(ids: Iterable[str]) -> list[str]:
    """The identifiers as a list.

    Raises:
        TypeError: one string, which would be taken for its characters, or an identifier that is not a string.
    """
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"expected several identifiers, found the one {ids!r}: write [{ids!r}]")
    ids = list(ids)
    wrong = next((identifier for identifier in ids if not isinstance(identifier, str)), None)
    if wrong is not None:
        raise TypeError(f"identifiers must be str, found {type(wrong).__name__}: {wrong!r}")
    return ids


def _utf8(identifier: str) -> bytes:
    try:
        return identifier.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"the identifier {identifier!r} holds half of a surrogate pair, which no file in UTF-8 can hold: rename it"
        ) from None


def digest_ids(ids: Iterable[str]) -> np.ndarray:
    """(n,) array of 16-byte BLAKE2b digests (numpy type "S16"): equal identifiers, equal digests.

    To look identifiers up: those that cannot be stored have digests too, which none that is stored has.
    """
    return _digests(identifier.encode("utf-8", "surrogatepass") for identifier in ids)


def _digests(encoded: Iterable[bytes]) -> np.ndarray:
    return np.array([hashlib.blake2b(identifier, digest_size=16).digest() for identifier in encoded], dtype="S16")


class SeenIds:
    """Notices an identifier that comes twice in a stream; holds 16 bytes per identifier, not the identifiers."""

    def __init__(self) -> None:
        self._digests = np.empty(0, dtype="S16")

    def add(self, ids: Sequence[str]) -> np.ndarray:
        """Take the next identifiers of the stream; returns their digests, in their order.

        Raises:
            ValueError: one of them has come before, or holds half of a surrogate pair.
        """
        unsorted = _digests(map(_utf8, ids))
        order = np.argsort(unsorted, kind="stable")
        digests = unsorted[order]
        positions = np.searchsorted(self._digests, digests)
        repeated = np.zeros(len(digests), dtype=bool)
        repeated[1:] = digests[1:] == digests[:-1]
        inside = positions < len(self._digests)
        repeated[inside] |= self._digests[positions[inside]] == digests[inside]
        if repeated.any():
            raise ValueError(f"duplicate identifier {ids[int(order[repeated].min())]!r}: every text needs its own")
        self._digests = np.insert(self._digests, positions, digests)
        return unsorted
