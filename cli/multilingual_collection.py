"""A retrieval data set in several languages that most machines have: translated messages ask for the English ones.

Documents are the English messages of installed programs, questions the translations of some of them. The questions'
messages are the same in every language, so that figures of languages compare; none of their translations train.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarezoo.cli.docstring_corpus import read_docstring_pairs
from rarezoo.cli.message_catalogues import Message, read_messages, standard_folders

ENGLISH = "en_XX"
_MOST_LANGUAGES = 6


@dataclass(frozen=True)
class FurtherLanguage:
    """A language that does not train with the others: X-MOD's code, the relative that shares most of its words, raw
    texts to learn from, and {document id: question}."""

    code: str
    relative: str
    texts: Sequence[str]
    questions: Mapping[str, str]


@dataclass(frozen=True)
class Collection:
    """Texts to search in, to ask and to learn from.

    Attributes:
        documents: {document id: English text}.
        questions: {X-MOD code of a language: {id of the document that answers: question}}.
        training_rows: with `query`, `positive`, `language` and `document_language`.
        further: one more language, None where there is none.
    """

    documents: Mapping[str, str]
    questions: Mapping[str, Mapping[str, str]]
    training_rows: Sequence[Mapping[str, Any]]
    further: FurtherLanguage | None = None

    @property
    def languages(self) -> list[str]:
        """Codes of all languages that train, English first."""
        return [ENGLISH, *(code for code in self.questions if code != ENGLISH)]


def collect_messages(
    documents: int, questions: int, seed: int = 0, folders: Iterable[Path] | None = None
) -> Collection | None:
    """A collection of translated messages; None unless there are two languages besides English.

    The languages are the five or fewer with the most messages, among those for which X-MOD has an adapter and which
    put spaces between words; the next one is the further language, where there is a third.

    Args:
        documents: English messages to search in.
        questions: messages whose translations ask, per language. A language counts when it has four times as many
            messages that all the chosen ones have.
        seed: of the choice of messages.
        folders: locale folders, see `read_messages`; by default those of this machine.
    """
    spoken = _by_adapter(read_messages(standard_folders() if folders is None else folders))
    chosen = sorted(spoken, key=lambda code: (-len(spoken[code]), code))[:_MOST_LANGUAGES]
    while len(chosen) > 1 and len(shared := _shared(spoken, chosen)) < 4 * questions:
        chosen.pop()
    if len(chosen) < 2:
        return None
    draw = random.Random(seed)
    asked = draw.sample(shared, questions)
    held_out = set(asked)
    others = sorted({message for code in chosen for message in spoken[code]} - held_out)
    found = sorted([*asked, *draw.sample(others, min(documents - questions, len(others)))])
    names = _names(found)
    trained = chosen[: max(2, len(chosen) - 1)]
    learned = {
        code: {message: text for message, text in spoken[code].items() if message not in held_out} for code in chosen
    }
    rows = [
        {"query": text, "positive": message.text, "language": code, "document_language": ENGLISH}
        for code in trained
        for message, text in learned[code].items()
    ]
    draw.shuffle(rows)
    asking = {code: {names[message]: spoken[code][message] for message in asked} for code in chosen}
    return Collection(
        {names[message]: message.text for message in found},
        {code: asking[code] for code in trained},
        rows,
        _further(chosen[-1], trained, learned, asking) if len(chosen) > len(trained) else None,
    )


def collect_documentation(documents: int, questions: int, seed: int = 0) -> Collection:
    """A collection of documentation strings, in English alone: the first sentence asks, the rest answers."""
    pairs = read_docstring_pairs(3 * documents, seed)
    random.Random(seed).shuffle(pairs)
    asked = pairs[: min(questions, len(pairs) // 5)]
    return Collection(
        {pair.name: pair.document for pair in pairs[:documents]},
        {ENGLISH: {pair.name: pair.query for pair in asked}},
        [{"query": pair.query, "positive": pair.document, "language": ENGLISH} for pair in pairs[len(asked) :]],
    )


def _by_adapter(found: Mapping[str, Mapping[Message, str]]) -> dict[str, dict[Message, str]]:
    """By X-MOD's codes, without English; of several variants of a language the one with the most messages."""
    from rarezoo.colbert_xm.language_codes import find_language
    from rarezoo.configs import read_preset

    codes = read_preset("colbert_xm", "colbert-xm")["config"]["languages"]
    kept: dict[str, dict[Message, str]] = {}
    for name in sorted(found):
        try:
            code = find_language(name, codes)
        except ValueError:  # no adapter
            continue
        if code != ENGLISH and len(found[name]) > len(kept.get(code, ())):
            kept[code] = dict(found[name])
    return kept


def _shared(spoken: Mapping[str, Mapping[Message, str]], codes: Sequence[str]) -> list[Message]:
    """The messages that all languages have, with translations that no other message has: each has one answer."""
    common = set(spoken[codes[0]]).intersection(*(spoken[code] for code in codes[1:]))
    for code in codes:
        counts = Counter(text.casefold() for text in spoken[code].values())
        common = {message for message in common if counts[spoken[code][message].casefold()] == 1}
    return sorted(common)


def _names(messages: Iterable[Message]) -> dict[Message, str]:
    """An identifier for each: its program, and a number."""
    counts: Counter[str] = Counter()
    names = {}
    for message in messages:
        counts[message.domain] += 1
        names[message] = f"{message.domain}-{counts[message.domain]}"
    return names


def _further(
    code: str,
    trained: Sequence[str],
    learned: Mapping[str, Mapping[Message, str]],
    asking: Mapping[str, Mapping[str, str]],
) -> FurtherLanguage:
    words = {name: set(re.findall(r"\w+", " ".join(learned[name].values()).casefold())) for name in [*trained, code]}
    relative = max(trained, key=lambda name: len(words[name] & words[code]) / len(words[name]))
    return FurtherLanguage(code, relative, list(learned[code].values()), asking[code])
