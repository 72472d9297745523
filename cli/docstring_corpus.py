"""Text that every machine has: documentation strings of Python's library and of installed packages.

As a retrieval data set: the first sentence of a documentation string is the query, the beginning of the rest the
document that answers it. As text for language models: whole documentation strings of Python's library.
"""

from __future__ import annotations

import ast
import inspect
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A full stop before white space, unless it belongs to an abbreviation; or an empty line.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)(?<!\betc\.)\s+|\n\s*\n")
_DOCUMENT_CHARACTERS = 400
_TEXT_CHARACTERS = 100
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "site-packages",
    "__pycache__",
    "idlelib",
    "lib2to3",
    "_vendor",
    "vendor",
}


@dataclass(frozen=True)
class DocstringPair:
    """`name` is the dotted name of the documented object, `query` its first sentence, `document` the rest."""

    name: str
    query: str
    document: str


def read_docstring_pairs(limit: int, seed: int = 0) -> list[DocstringPair]:
    """Up to `limit` pairs: the standard library's first, which every machine has, then those of installed packages.

    Within both, the order depends on `seed` and on what is installed only. Objects whose document or first sentence
    occurs more than once are dropped, so that each query has one answer. Raises `ValueError` where the machine has
    fewer than 200 usable documentation strings.
    """
    candidates: list[DocstringPair] = []
    for scheme in ("stdlib", "purelib"):
        folder = Path(sysconfig.get_path(scheme))
        files = sorted(_python_files(folder))
        random.Random(seed).shuffle(files)
        found: list[DocstringPair] = []
        for path in files:
            found.extend(_pairs_of_file(path, folder))
            if len(found) >= limit:
                break
        random.Random(seed).shuffle(found)
        candidates.extend(found)
    unique = _without_repetitions(candidates)
    if len(unique) < 200:
        raise ValueError(f"found only {len(unique)} documentation strings with a summary and a body; expected 200")
    return unique[:limit]


def read_docstrings(files: int | None = None) -> tuple[list[str], list[str]]:
    """Documentation strings of Python's library of 100 characters or more, each once, to learn from and held out: those
    of every tenth file.

    Args:
        files: how many files to read; None takes all.
    """
    paths = sorted(_python_files(Path(sysconfig.get_path("stdlib"))))[:files]
    is_held_out: dict[str, bool] = {}
    for number, path in enumerate(paths):
        for node in _documented(path):
            text = ast.get_docstring(node) or ""
            if len(text) >= _TEXT_CHARACTERS:
                is_held_out.setdefault(text, number % 10 == 9)
    return [text for text, held in is_held_out.items() if not held], [
        text for text, held in is_held_out.items() if held
    ]


def _python_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.py"):
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts[:-1]):
            yield path


def _pairs_of_file(path: Path, folder: Path) -> Iterator[DocstringPair]:
    module = ".".join(path.relative_to(folder).with_suffix("").parts)
    for node in _documented(path):
        text = ast.get_docstring(node)
        pair = _split(f"{module}.{node.name}" if not isinstance(node, ast.Module) else module, text or "")
        if pair is not None:
            yield pair


def _documented(path: Path) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """What may have a documentation string in a file; nothing where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _split(name: str, text: str) -> DocstringPair | None:
    parts = _SENTENCE_END.split(inspect.cleandoc(text), maxsplit=1)
    if len(parts) < 2:
        return None
    query, document = (" ".join(part.split()) for part in parts)
    if 20 <= len(query) <= 200 and len(document) >= 80 and document.isascii() and query.isascii():
        return DocstringPair(name, query, document[:_DOCUMENT_CHARACTERS])
    return None


def _without_repetitions(pairs: list[DocstringPair]) -> list[DocstringPair]:
    """Names are identifiers, and each query must have one answer: what occurs twice is dropped."""
    kept = pairs
    for key in (lambda pair: pair.name, lambda pair: pair.query.lower(), lambda pair: pair.document[:200].lower()):
        counts = Counter(map(key, pairs))
        kept = [pair for pair in kept if counts[key(pair)] == 1]
    return kept
