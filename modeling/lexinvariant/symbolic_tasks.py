r"""Tasks on symbols without meaning: substitution ciphers, LookUp and Permutation (arXiv 2305.16349, sections 3.3 and
3.5), as text of characters or as arbitrary ids of any vocabulary.

    LookUp:       A->2\nC->4\nG->5\nC->                answer 4
    Permutation:  A 2 C->C A\nd e f->f d\n4 1 D->      answer D 4

The paper gives neither the number of pairs and demonstrations nor their lengths; the defaults are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .evaluation import evaluating, greedy_continuation, in_batches, random_relabelling

# What can be seen in print, without the characters of the arrow.
PRINTABLE = "".join(chr(code) for code in range(33, 127) if chr(code) not in "->")
_SHUFFLED_WHOLE = 4096  # the most symbols that are shuffled; of more, some are drawn until enough are different


@dataclass(frozen=True)
class SymbolicTask:
    """A prompt and its answer.

    Attributes:
        input_ids, answer_ids: the prompt and its answer; of characters, their ASCII codes.
        prompt, answer: the same as text; None where symbols are ids.
        rule: what the answer follows from. LookUp: the number of the pair that is asked for, `(index,)`; Permutation:
            the places in a line that the answer is taken from.
    """

    input_ids: list[int]
    answer_ids: list[int]
    prompt: str | None = None
    answer: str | None = None
    rule: tuple[int, ...] = ()


# --- symbols ----------------------------------------------------------------------------------------------------------


class _Symbols:
    """Draws symbols, uniformly or by frequency; symbols are characters, ids, or the number of ids 0, 1, ..."""

    def __init__(self, symbols: str | int | Sequence[int], frequencies: Tensor | None, generator):
        self.is_text, self.generator = isinstance(symbols, str), generator
        self.ids = range(symbols) if isinstance(symbols, int) else [ord(i) if self.is_text else int(i) for i in symbols]
        self.size = self.available = len(self.ids)
        if not self.size or min(self.ids) < 0:
            raise ValueError("symbols must be characters, non-negative ids, or their number, at least 1")
        if not isinstance(self.ids, range) and len(set(self.ids)) < self.size:
            raise ValueError("symbols must be different; found some twice")
        if self.is_text and not all(code < 128 and chr(code) not in "-> \n" for code in self.ids):
            raise ValueError("characters must be ASCII, without those of the arrow, space and newline")
        self.weights = None
        if frequencies is not None:
            self.weights = torch.as_tensor(frequencies, dtype=torch.float64)
            if self.weights.shape != (self.size,) or not ((self.weights >= 0) & self.weights.isfinite()).all():
                raise ValueError(f"frequencies must be {self.size} non-negative numbers, one for each symbol")
            self.available = int((self.weights > 0).sum())

    def different(self, count: int, without: Collection[int] = ()) -> list[int]:
        """`count` different symbols, none of those `without`."""
        without = self._own(without)
        total, drawn = count + len(without), dict[int, None]()
        if total > self.available:
            raise ValueError(f"the task needs {total} different symbols; there are {self.available}")
        # Drawn one after the other, those not wanted passed over: the order of what is left is as likely as any.
        if self.weights is not None:
            drawn = dict.fromkeys(self._by_weight(count, without, replacement=False))
        elif self.size <= _SHUFFLED_WHOLE:
            drawn = dict.fromkeys(torch.randperm(self.size, generator=self.generator)[:total].tolist())
        while self.weights is None and len(drawn) < total:
            drawn.update(dict.fromkeys(torch.randint(self.size, (total,), generator=self.generator).tolist()))
        return [symbol for symbol in (self.ids[place] for place in drawn) if symbol not in without][:count]

    def any(self, count: int, without: Collection[int]) -> list[int]:
        """`count` symbols, equal or not, none of those `without`."""
        without = self._own(without)
        if self.available <= len(without):
            raise ValueError(f"the task needs {len(without) + 1} different symbols; there are {self.available}")
        if self.weights is not None:
            return [self.ids[place] for place in self._by_weight(count, without, replacement=True)]
        drawn: list[int] = []
        while len(drawn) < count:
            places = torch.randint(self.size, (2 * count,), generator=self.generator).tolist()
            drawn += [self.ids[place] for place in places if self.ids[place] not in without]
        return drawn[:count]

    def _own(self, ids: Collection[int]) -> list[int]:
        return [symbol for symbol in ids if symbol in self.ids]

    def _by_weight(self, count: int, without: Collection[int], replacement: bool) -> list[int]:
        weights = self.weights.clone()
        weights[[self.ids.index(symbol) for symbol in without]] = 0
        return torch.multinomial(weights, count, replacement, generator=self.generator).tolist() if count else []

    def number(self, span: int | tuple[int, int], what: str) -> int:
        first, last = (span, span) if isinstance(span, int) else span
        if not 1 <= first <= last:
            raise ValueError(f"{what} must be a positive number or a range (first, last) of them; found {span!r}")
        return int(torch.randint(first, last + 1, (), generator=self.generator))

    def marks(self, arrow_id: int | None, newline_id: int | None) -> list[int]:
        """The ids of the arrow and of the end of a line; drawn where they are not given."""
        if self.is_text:
            if arrow_id is not None or newline_id is not None:
                raise ValueError("arrow_id and newline_id are for ids; in text they are '->' and a newline")
            return []
        given = {mark for mark in (arrow_id, newline_id) if mark is not None}
        if arrow_id is not None and arrow_id == newline_id:
            raise ValueError(f"arrow_id and newline_id must be different; found {arrow_id} for both")
        drawn = iter(self.different(2 - len(given), given))
        return [next(drawn) if mark is None else mark for mark in (arrow_id, newline_id)]

    def task(self, lines: list[tuple[list[int], list[int]]], marks: list[int], rule, arrow: bool = True):
        """The `SymbolicTask` of which the last line is the question, and its right side the answer."""
        *shown, (query, answer) = lines
        if self.is_text:
            spaced = [(" ".join(map(chr, left)), " ".join(map(chr, right))) for left, right in lines]
            text = "\n".join(f"{left}->{right}" if arrow else left + right for left, right in spaced)
            answer_text = spaced[-1][1]
            prompt = text[: len(text) - len(answer_text)]
            return SymbolicTask([ord(c) for c in prompt], [ord(c) for c in answer_text], prompt, answer_text, rule)
        between, newline = [marks[0]] if arrow else [], marks[1]
        ids = [symbol for left, right in shown for symbol in (*left, *between, *right, newline)]
        return SymbolicTask([*ids, *query, *between], answer, rule=rule)


# --- tasks ------------------------------------------------------------------------------------------------------------


def make_lookup(
    count: int,
    *,
    symbols: str | int | Sequence[int] = PRINTABLE,
    pairs: int | tuple[int, int] = (3, 10),
    frequencies: Tensor | None = None,
    arrow: bool = True,
    arrow_id: int | None = None,
    newline_id: int | None = None,
    generator: torch.Generator | None = None,
) -> list[SymbolicTask]:
    """Lists of pairs of which one is asked for (arXiv 2305.16349, section 3.5).

    Keys are different from each other and from all values; values may be equal.

    Args:
        count: number of prompts.
        symbols: characters, for prompts of text; ids, or the number of ids 0, 1, ..., for prompts of ids.
        pairs: number of pairs, or the first and last of a range.
        frequencies: (symbols,), in any unit (table 2 of the paper); without them all symbols are alike (table 1).
        arrow: whether there is one; without it small models learn the task in seconds, as a value follows its key.
        arrow_id, newline_id: for prompts of ids; by default new ones are drawn for every prompt.
        generator: of all that is random.

    Raises:
        ValueError: too few symbols, frequencies of another shape, an empty range.
    """
    source = _Symbols(symbols, frequencies, generator)
    tasks = []
    for _ in range(count):
        marks = source.marks(arrow_id, newline_id)
        keys = source.different(source.number(pairs, "pairs"), marks)
        values = source.any(len(keys), [*marks, *keys])
        asked = int(torch.randint(len(keys), (), generator=generator))
        order = [*range(len(keys)), asked]
        tasks.append(source.task([([keys[i]], [values[i]]) for i in order], marks, (asked,), arrow))
    return tasks


def make_permutation(
    count: int,
    *,
    symbols: str | int | Sequence[int] = PRINTABLE,
    length: int | tuple[int, int] = (2, 4),
    demonstrations: int | tuple[int, int] = (3, 6),
    frequencies: Tensor | None = None,
    arrow_id: int | None = None,
    newline_id: int | None = None,
    generator: torch.Generator | None = None,
) -> list[SymbolicTask]:
    """Lines of which the same places are taken in the same order (arXiv 2305.16349, section 3.5).

    The symbols of one line are different, so that one demonstration shows the rule; lines may share symbols.

    Args:
        count, symbols, frequencies, arrow_id, newline_id, generator: as in `make_lookup`.
        length: number of symbols in a line, or the first and last of a range.
        demonstrations: number of lines with their answers, or the first and last of a range.

    Raises:
        ValueError: too few symbols, frequencies of another shape, an empty range.
    """
    source = _Symbols(symbols, frequencies, generator)
    tasks = []
    for _ in range(count):
        marks = source.marks(arrow_id, newline_id)
        size, shown = source.number(length, "length"), source.number(demonstrations, "demonstrations")
        taken = source.number((1, size), "length")
        rule = torch.randperm(size, generator=generator)[:taken].tolist()
        lines = [source.different(size, marks) for _ in range(shown + 1)]
        tasks.append(source.task([(line, [line[place] for place in rule]) for line in lines], marks, tuple(rule)))
    return tasks


def task_batch(tasks: Sequence[SymbolicTask], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Prompts with their answers, padded on the left, for training.

    Returns:
        input_ids, attention_mask, labels: int64 (tasks, length); labels are -100 except at the answers.
    """
    texts = [[*task.input_ids, *task.answer_ids] for task in tasks]
    input_ids, attention_mask = _padded(texts, pad_token_id)
    labels = torch.full_like(input_ids, -100)
    for row, task in zip(labels, tasks):
        row[len(row) - len(task.answer_ids) :] = torch.tensor(task.answer_ids)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _padded(texts: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts))
    ids = torch.tensor([[pad_token_id] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    return ids, mask


@dataclass(frozen=True)
class TaskAccuracy:
    """Shares of 1: `symbols`, of the generated symbols that are right, `answers`, of the answers that are right as a
    whole; `correct` has whether each answer is."""

    symbols: float
    answers: float
    correct: list[bool]


def evaluate_task(
    model: torch.nn.Module | Callable[[list[int], int], Sequence[int]],
    tasks: Sequence[SymbolicTask],
    *,
    batch_size: int = 64,
    ignored_ids: Collection[int] = (),
    lex_seeds: Tensor | None = None,
    pad_token_id: int = 0,
    **model_kwargs,
) -> TaskAccuracy:
    """Accuracy of generated answers (arXiv 2305.16349, section 3.5, over 1000 prompts).

    Answers are generated greedily, as many symbols as the right one has; nothing of it is shown.

    Args:
        model: a causal language model, or a function of (prompt, number of symbols) that gives the symbols.
        tasks: from `make_lookup` and `make_permutation`, or of any other kind; those of like length go together.
        batch_size: prompts at a time, padded on the left; the last logits are (batch_size, vocab_size).
        ignored_ids: symbols of answers that do not count, such as the space between characters, `{32}`.
        lex_seeds: int64 (tasks,), the tables of a lexinvariant model. By default `0, 1, ...`.
        pad_token_id: any number in the vocabulary; it is never attended to.
        model_kwargs: further arguments of the model.

    Raises:
        ValueError: no tasks, one without an answer, seeds of another shape.
    """
    if not tasks or not all(task.input_ids and set(task.answer_ids) - set(ignored_ids) for task in tasks):
        raise ValueError("tasks must be at least one, each with a prompt and an answer that counts")
    if isinstance(model, torch.nn.Module):
        answers = _generated(model, tasks, batch_size, lex_seeds, pad_token_id, model_kwargs)
    else:
        answers = [list(model(task.input_ids, len(task.answer_ids))) for task in tasks]
    right = total = 0
    correct = []
    for task, answer in zip(tasks, answers):
        if len(answer) != len(task.answer_ids):
            raise ValueError(f"{len(task.answer_ids)} symbols were asked for; found {len(answer)}")
        hits = [found == wanted for found, wanted in zip(answer, task.answer_ids) if wanted not in ignored_ids]
        right, total = right + sum(hits), total + len(hits)
        correct.append(all(hits))
    return TaskAccuracy(right / total, sum(correct) / len(correct), correct)


def _generated(model, tasks, batch_size: int, lex_seeds: Tensor | None, pad_token_id: int, model_kwargs: dict):
    if lex_seeds is not None and lex_seeds.shape != (len(tasks),):
        raise ValueError(f"lex_seeds must have the shape ({len(tasks)},); found {tuple(lex_seeds.shape)}")
    if lex_seeds is None and hasattr(model, "token_losses"):
        lex_seeds = torch.arange(len(tasks))
    # Neighbours in this order want answers of the same length, and hardly any padding.
    order = sorted(range(len(tasks)), key=lambda i: (len(tasks[i].answer_ids), len(tasks[i].input_ids)))
    answers: list[list[int]] = [[]] * len(tasks)
    with evaluating(model):
        for part in in_batches({"places": torch.tensor(order)}, batch_size, "cpu"):
            places = part["places"].tolist()
            ids, mask = _padded([tasks[i].input_ids for i in places], pad_token_id)
            length = max(len(tasks[i].answer_ids) for i in places)
            seeds = {} if lex_seeds is None else {"lex_seeds": lex_seeds[places].to(model.device)}
            found = greedy_continuation(
                model, ids.to(model.device), length, mask.to(model.device), **seeds, **model_kwargs
            )
            for place, answer in zip(places, found.tolist()):
                answers[place] = answer[: len(tasks[place].answer_ids)]
    return answers


# --- ciphers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cipher:
    """A substitution cipher: `permutation`, int64 (vocab_size,), has the cipher symbol of every plain one."""

    permutation: Tensor

    def __post_init__(self):
        size = self.permutation.shape
        if len(size) != 1 or not torch.equal(self.permutation.sort().values, torch.arange(*size)):
            raise ValueError("a cipher gives every symbol another one's place: permutation must be one of 0, 1, ...")

    @classmethod
    def from_key(cls, key: Mapping[str, str] | Mapping[int, int], vocab_size: int = 128) -> Cipher:
        """The cipher that has a key, plain symbols to cipher symbols. Others stay what they are; where a cipher symbol
        has no plain one to make room for it, it gets one of the places that the plain ones leave."""
        numbers = {_number(plain): _number(cipher) for plain, cipher in key.items()}
        taken = set(numbers.values())
        if len(taken) < len(numbers) or not all(0 <= i < vocab_size for i in (*numbers, *taken)):
            raise ValueError(f"a key gives different symbols for different ones, all in 0..{vocab_size - 1}")
        permutation = torch.arange(vocab_size)
        for plain, cipher in zip(sorted(taken - set(numbers)), sorted(set(numbers) - taken)):
            permutation[plain] = cipher
        for plain, cipher in numbers.items():
            permutation[plain] = cipher
        return cls(permutation)

    @cached_property
    def inverse(self) -> Tensor:
        """int64 (vocab_size,): the plain symbol of every cipher symbol."""
        return self.permutation.argsort()

    def encipher(self, message):
        """Enciphers text, a list of ids or a tensor of ids; gives the same kind."""
        return _substituted(message, self.permutation)

    def decipher(self, message):
        """Undoes `encipher`."""
        return _substituted(message, self.inverse)


def make_cipher(
    vocab_size: int = 128,
    symbols: str | Sequence[int] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Cipher:
    """A random substitution cipher (arXiv 2305.16349, section 3.3).

    Args:
        vocab_size: number of all symbols.
        symbols: those that change places with each other, characters or ids; by default all.

    Raises:
        ValueError: symbols outside the vocabulary.
    """
    fixed: Collection[int] = ()
    if symbols is not None:
        moved = {_number(symbol) for symbol in symbols}
        if not all(0 <= symbol < vocab_size for symbol in moved):
            raise ValueError(f"symbols must lie in 0..{vocab_size - 1}; found {min(moved)}..{max(moved)}")
        fixed = set(range(vocab_size)) - moved
    return Cipher(random_relabelling(vocab_size, fixed, generator))


def _number(symbol: str | int) -> int:
    return ord(symbol) if isinstance(symbol, str) else int(symbol)


def _substituted(message, permutation: Tensor):
    numbers = torch.tensor([_number(symbol) for symbol in message]) if not isinstance(message, Tensor) else message
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(permutation):
        raise ValueError(f"the cipher has the symbols 0..{len(permutation) - 1}; found {int(numbers.max())}")
    changed = permutation.to(numbers.device)[numbers.long()]
    if isinstance(message, Tensor):
        return changed
    return "".join(map(chr, changed.tolist())) if isinstance(message, str) else changed.tolist()
