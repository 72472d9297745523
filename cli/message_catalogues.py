"""Parallel texts that most machines have: the messages of installed programs, with their translations.

gettext keeps them in LANGUAGE/LC_MESSAGES/DOMAIN.mo below a few standard folders.
"""

from __future__ import annotations

import gettext
import re
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# What programs fill in, and markup: neither is language.
_DIRECTIVE = re.compile(
    r"%(?:\(\w+\)|\d+\$)?[-+#0']*(?:\*|\d+)?(?:\.(?:\*|\d+))?(?:hh|h|ll|l|L|q|j|z|t)?[diouxXeEfFgGaAcspnm%]"
    r"|%<PRI\w+>|\{[^{}]*\}|</?[A-Za-z][^<>]*>"
)
_WORD = re.compile(r"[^\W\d_]{2,}")
_CONTEXT_END = "\x04"
_LEAST_WORDS, _MOST_CHARACTERS = 8, 300


class Message(NamedTuple):
    """An English message: a program that prints it (its gettext domain), and its cleaned text."""

    domain: str
    text: str


def standard_folders() -> list[Path]:
    """The locale folders of Python, of its environment and of the system, and those inside installed packages."""
    prefixes = (sys.base_prefix, sys.prefix, "/usr")
    folders = [Path(gettext.bindtextdomain("messages")), *(Path(prefix, "share", "locale") for prefix in prefixes)]
    packages = Path(sysconfig.get_path("purelib"))
    folders += sorted({path.parents[2] for path in packages.rglob("LC_MESSAGES/*.mo")})
    return list(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def read_messages(folders: Iterable[Path]) -> dict[str, dict[Message, str]]:
    """The long messages of all catalogues in some locale folders, with their translations.

    Format directives and markup are cut out, white space becomes single spaces. Kept is what has at least 8 words in
    both languages, at most 300 characters, and no control characters. Where several programs have a message, the first
    one's translation counts. Catalogues that gettext cannot read are passed over: some are damaged on many machines.

    Args:
        folders: with files LANGUAGE/LC_MESSAGES/DOMAIN.mo.

    Returns:
        {language as gettext names it, such as "pt_BR": {message: translation}}, in an order that depends on the files
        only.
    """
    found: dict[str, dict[Message, str]] = {}
    messages: dict[str, Message] = {}  # one for a text, whichever programs and languages have it
    for folder in folders:
        for path in sorted(folder.glob("*/LC_MESSAGES/*.mo")):
            translations = found.setdefault(path.parent.parent.name, {})
            for english, translation in _long_messages(path):
                message = messages.setdefault(english.casefold(), Message(path.stem, english))
                translations.setdefault(message, translation)
    return found


def _long_messages(path: Path) -> Iterator[tuple[str, str]]:
    for key, translation in _entries(path):
        # Plural forms have a tuple as key.
        if isinstance(key, str) and len(key) > _LEAST_WORDS:
            english, translated = _cleaned(key.rpartition(_CONTEXT_END)[2]), _cleaned(translation)
            if english != translated and _usable(english) and _usable(translated):
                yield english, translated


def _entries(path: Path) -> list[tuple[Any, str]]:
    try:
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)
    except (OSError, ValueError, IndexError, LookupError, struct.error):
        return []
    # gettext offers no public way to list what a catalogue holds.
    return list(catalogue._catalog.items())  # type: ignore[attr-defined]


def _cleaned(text: str) -> str:
    return " ".join(_DIRECTIVE.sub(" ", text).split())


def _usable(text: str) -> bool:
    return len(text) <= _MOST_CHARACTERS and text.isprintable() and len(_WORD.findall(text)) >= _LEAST_WORDS
