"""Supertokens: an ordinary byte-level BPE whose training text is cut at random lengths instead of at spaces, so that
tokens may span several words ("tion of the").

Random chunks stand in for pre-tokenization while the merges are learned (Tinycompany-AI/SuperTokenizer). The trained
tokenizer knows nothing of them: its pre-tokenizer only maps bytes to their printable alphabet, so that encoding is
deterministic and decoding gives back every text to the letter, in any script.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .token_bytes import Vocabulary

# Extended grapheme clusters (Unicode's UAX 29): what readers take for one character, of however many code points. The
# library's clusters end behind a virama, Unicode's since 15.1 (rule GB9c) with the consonant that it joins.
_VIRAMA = "[\u094d\u09cd\u0acd\u0b4d\u0c4d\u0d4d]"
_CLUSTER = rf"\X(?:(?<={_VIRAMA}|{_VIRAMA}\u200d)(?=\p{{L}})\X)*"
_GRAPHEMES = pre_tokenizers.Split(Regex(_CLUSTER), behavior="isolated")
_BATCH = 1_000


@dataclass(frozen=True)
class ChunkLengths:
    """How long the chunks of the training text are, in characters: a range is drawn, then a length uniform in it.

    Attributes:
        ranges: (shortest, longest), both included.
        weights: of the ranges; their sum is 1.

    Raises:
        ValueError: ranges and weights do not belong together, a range is empty, or a weight negative.
    """

    ranges: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        if not self.ranges or len(self.ranges) != len(self.weights):
            raise ValueError(f"expected a weight for every range, found {self.ranges} and {self.weights}")
        for low, high in self.ranges:
            if not 1 <= low <= high:
                raise ValueError(f"a range of chunk lengths must be 1 <= shortest <= longest, found {low}-{high}")
        if not all(0 <= weight < math.inf for weight in self.weights) or sum(self.weights) <= 0:
            raise ValueError(f"weights of chunk lengths must be at least 0 and not all 0, found {self.weights}")

    @property
    def shortest(self) -> int:
        return min(low for low, _ in self.ranges)

    @classmethod
    def from_mapping(cls, distribution: Mapping[str, float], *, strict: bool = False) -> ChunkLengths:
        """From `{"4-5": 0.044, …}`, the form of SuperTokenizer's settings.

        Args:
            strict: probabilities that do not sum up to 1 are an error instead of being scaled, with a warning.
        """
        ranges = []
        for name in distribution:
            found = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", str(name))
            if found is None:
                raise ValueError(f"expected a range of chunk lengths such as '4-5', found {name!r}")
            ranges.append((int(found[1]), int(found[2])))
        wrong = [
            value for value in distribution.values() if isinstance(value, bool) or not isinstance(value, int | float)
        ]
        if wrong:
            raise ValueError(f"expected a number as the probability of a range, found {wrong[0]!r}")
        weights = tuple(float(value) for value in distribution.values())
        total = sum(weights)
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            message = f"the probabilities of the chunk lengths sum up to {total:.6g} instead of 1"
            if strict or not 0 < total < math.inf:
                raise ValueError(message)
            warnings.warn(f"{message}; they are scaled to it", stacklevel=2)
            weights = tuple(weight / total for weight in weights)
        return cls(tuple(ranges), weights)


# The lengths that SuperTokenizer's code falls back to. The published settings file has others (and sums up to 1.1), see
# `read_supertoken_settings`; these gave one to two per cent more bytes per token on all texts that we measured.
DEFAULT_CHUNK_LENGTHS = ChunkLengths(((1, 5), (6, 18), (18, 28)), (0.02, 0.70, 0.28))


def read_supertoken_settings(path: str | Path, *, strict: bool = False) -> dict[str, Any]:
    """Arguments of `train_supertokens` from a settings file of SuperTokenizer (its train.yaml).

    What concerns data sets, uploading and the separator is left aside: texts are given by the caller, nothing is
    pushed, and chunks need no separator.

    Args:
        strict: see `ChunkLengths.from_mapping`. The published file does not pass.

    Raises:
        ImportError: PyYAML is not installed.
        ValueError: the file holds no mapping, or a distribution that is none.
    """
    try:
        import yaml
    except ImportError:
        raise ImportError("reading settings in YAML needs PyYAML: pip install pyyaml") from None
    settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold the settings of a supertokenizer, found {type(settings).__name__}")
    taken = ("vocab_size", "min_frequency", "max_token_length", "model_max_length", "special_tokens")
    arguments = {name: settings[name] for name in taken if settings.get(name) is not None}
    if settings.get("test_distribution") is not None:
        arguments["chunk_lengths"] = ChunkLengths.from_mapping(settings["test_distribution"], strict=strict)
    return arguments


# --- chunks -----------------------------------------------------------------------------------------------------------


def cut_into_chunks(
    text: str, lengths: ChunkLengths, generator: random.Random, *, keep_graphemes: bool = True
) -> Iterator[str]:
    """Pieces of random lengths that together are the text.

    A rest that is shorter than the shortest length is a chunk without a draw. The order of draws is SuperTokenizer's:
    one `choices` among the ranges, one `randint` in the range, capped by the rest.

    Args:
        keep_graphemes: where a cut would part a letter from its marks, or an emoji from its modifiers, it moves behind
            them. False gives SuperTokenizer's chunks, cut between any two code points.
    """
    start, end = 0, len(text)
    shortest = lengths.shortest
    while start < end:
        rest = end - start
        length = rest
        if rest >= shortest:
            low, high = generator.choices(lengths.ranges, lengths.weights)[0]
            length = generator.randint(min(low, rest), min(high, rest))
        cut = start + length
        if keep_graphemes:
            cut = _grapheme_end(text, start, cut)
        yield text[start:cut]
        start = cut


def _grapheme_end(text: str, start: int, cut: int) -> int:
    """The first border between two grapheme clusters at `cut` or behind it; `start` is one."""
    if cut >= len(text):
        return len(text)
    if text[cut - 1 : cut + 1].isascii():
        return cut + (text[cut - 1 : cut + 1] == "\r\n")
    reach = 8
    while True:
        end = min(cut + reach, len(text))
        for _, (_, border) in _GRAPHEMES.pre_tokenize_str(text[start:end]):
            # The last cluster of the window may go on behind it.
            if start + border >= cut and (start + border < end or end == len(text)):
                return start + border
        reach *= 2


def _all_chunks(
    texts: Iterable[str], lengths: ChunkLengths, generator: random.Random, keep_graphemes: bool
) -> Iterator[str]:
    for text in _checked(texts):
        yield from cut_into_chunks(text, lengths, generator, keep_graphemes=keep_graphemes)


def _checked(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise ValueError("expected an iterable of texts, found a single text; put it into a list")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ValueError(f"text {number}: expected a string, found {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {number} is not valid Unicode: {error.reason} at position {error.start}") from None
        yield text


def _sampled(chunks: Iterable[str], count: int, generator: random.Random) -> Iterable[str]:
    """At most `count` of the chunks, each set of them equally likely (reservoir sampling, Vitter's algorithm R)."""
    chunks = iter(chunks)
    kept = list(itertools.islice(chunks, count))
    for seen, chunk in enumerate(chunks, count + 1):
        place = generator.randrange(seen)
        if place < count:
            kept[place] = chunk
    return kept


# --- training ---------------------------------------------------------------------------------------------------------


def train_supertokens(
    texts: Iterable[str],
    vocab_size: int = 128_000,
    *,
    chunk_lengths: ChunkLengths | Mapping[str, float] = DEFAULT_CHUNK_LENGTHS,
    seed: int = 0,
    min_frequency: int = 2,
    max_token_length: int = 30,
    special_tokens: Sequence[str] = ("<|endoftext|>", "<|beginoftext|>", "<|image|>", "<|audio|>"),
    keep_graphemes: bool = True,
    max_chunks: int | None = None,
    model_max_length: int = 8192,
    show_progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose tokens may span words.

    Every chunk is a sequence of its own for the trainer: no separator stands in the text, nothing is deleted from it,
    and the same seed and texts give the same tokenizer. The result decodes every text exactly as it was, encodes
    without any randomness, adds nothing to a text, and opens through `AutoTokenizer` anywhere.

    Args:
        texts: read once, one at a time; may be a generator. The library's trainer, however, keeps all different chunks
            in memory, about 1.4 kB for each, and a gigabyte of text has some 70 million: see `max_chunks`.
        vocab_size: entries, special tokens and the 256 bytes included; few texts may give fewer, with a warning.
        chunk_lengths: or a mapping for `ChunkLengths.from_mapping`.
        min_frequency: how often a pair must occur to be merged.
        max_token_length: of a token, in bytes.
        special_tokens: have the first ids, in this order. `<|endoftext|>` and `<|beginoftext|>`, where they are among
            them, become the end and the beginning of a text.
        keep_graphemes: see `cut_into_chunks`.
        max_chunks: keep a random sample of so many chunks, which bounds the memory; None takes all.
        model_max_length: of the tokenizer.

    Raises:
        ValueError: no texts, a text that is no valid Unicode string, or a vocabulary too small for bytes and special
            tokens.
    """
    lengths = chunk_lengths if isinstance(chunk_lengths, ChunkLengths) else ChunkLengths.from_mapping(chunk_lengths)
    if max_chunks is not None and max_chunks < 1:
        raise ValueError(f"max_chunks must be at least 1, found {max_chunks}")
    generator = random.Random(seed)
    chunks: Iterable[str] = _all_chunks(texts, lengths, generator, keep_graphemes)
    if max_chunks is not None:
        chunks = _sampled(chunks, max_chunks, generator)
    return _train(
        chunks,
        vocab_size,
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        special_tokens,
        model_max_length,
        min_frequency=min_frequency,
        max_token_length=max_token_length,
        show_progress=show_progress,
    )


def train_word_tokens(
    texts: Iterable[str],
    vocab_size: int = 128_000,
    *,
    min_frequency: int = 2,
    special_tokens: Sequence[str] = ("<|endoftext|>", "<|beginoftext|>", "<|image|>", "<|audio|>"),
    model_max_length: int = 8192,
    show_progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train the tokenizer that supertokens are measured against: the same BPE, its text cut at words as GPT-2 does.

    Arguments and errors: as for `train_supertokens`.
    """
    return _train(
        _checked(texts),
        vocab_size,
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        special_tokens,
        model_max_length,
        min_frequency=min_frequency,
        show_progress=show_progress,
    )


def _train(
    sequences: Iterable[str],
    vocab_size: int,
    pre_tokenizer: Any,
    special_tokens: Sequence[str],
    model_max_length: int,
    **trainer_settings: Any,
) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special_tokens):
        raise ValueError(
            f"vocab_size must be at least {len(alphabet) + len(special_tokens)}, the {len(alphabet)} bytes and "
            f"{len(special_tokens)} special tokens; found {vocab_size}"
        )
    sequences = iter(sequences)
    first = next(sequences, None)
    if first is None:
        raise ValueError("there are no texts to train on")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special_tokens],
        **trainer_settings,
    )
    backend.train_from_iterator(_batches(itertools.chain([first], sequences)), trainer)
    if backend.get_vocab_size() < vocab_size:
        warnings.warn(
            f"the texts give {backend.get_vocab_size():,} tokens instead of {vocab_size:,}: nothing else occurs "
            f"{trainer_settings['min_frequency']} times",
            stacklevel=3,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>" if "<|endoftext|>" in special_tokens else None,
        bos_token="<|beginoftext|>" if "<|beginoftext|>" in special_tokens else None,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def _batches(sequences: Iterator[str]) -> Iterator[list[str]]:
    """The trainer takes lists faster than single strings; it counts the strings in them one by one."""
    while batch := list(itertools.islice(sequences, _BATCH)):
        yield batch


# --- long texts -------------------------------------------------------------------------------------------------------


def encode_long_text(tokenizer: PreTrainedTokenizerFast, text: str, *, block_length: int = 32_768) -> list[int]:
    """The ids of `tokenizer.encode(text, add_special_tokens=False)`, exactly, in time linear in the text's length.

    Without a regular expression to cut it, a whole document is one word for the BPE, whose cost grows faster than the
    word. Here blocks are encoded by themselves, and the tokens around each seam once more together. Whether a token
    ends at some place depends on its two neighbours alone: a sequence of tokens is the BPE encoding of its text if and
    only if every two neighbours are that of theirs (no merge across a border can come first). So the blocks may be
    joined as soon as the tokens at both edges of the re-encoded stretch are those that stood there before; until then
    the stretch grows.

    Args:
        tokenizer: as `train_supertokens` makes them.
        block_length: characters that are encoded at a time.

    Raises:
        ValueError: the tokenizer has a normalizer, another pre-tokenizer, or another model than BPE without dropout.
    """
    backend = tokenizer.backend_tokenizer
    _check_plain_bpe(backend)
    if block_length < 1:
        raise ValueError(f"block_length must be at least 1, found {block_length}")
    cuts = _block_cuts(text, block_length, [str(token) for token in tokenizer.added_tokens_decoder.values()])
    pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
    blocks = backend.encode_batch(pieces, add_special_tokens=False)
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for start, block in zip(cuts, blocks):
        right_ids, right_spans = block.ids, [(start + first, start + last) for first, last in block.offsets]
        if ids:
            right_ids, right_spans = _join(backend, text, ids, spans, right_ids, right_spans)
        ids += right_ids
        spans += right_spans
    return ids


def _check_plain_bpe(backend: Tokenizer) -> None:
    pre_tokenizer, model = backend.pre_tokenizer, backend.model
    plain = isinstance(pre_tokenizer, pre_tokenizers.ByteLevel) and not pre_tokenizer.use_regex
    plain = plain and not pre_tokenizer.add_prefix_space and backend.normalizer is None
    if not plain or not isinstance(model, models.BPE) or model.dropout or model.ignore_merges:
        raise ValueError(
            "expected a tokenizer of train_supertokens: BPE without dropout, no normalizer, and the pre-tokenizer "
            f"ByteLevel(use_regex=False); found {type(model).__name__}, {backend.normalizer}, {pre_tokenizer}"
        )


def _block_cuts(text: str, block_length: int, added_tokens: Sequence[str]) -> list[int]:
    """Borders of blocks, none inside an added token (which the tokenizer cuts out before the BPE)."""
    cuts = [0]
    while cuts[-1] < len(text):
        cut = min(cuts[-1] + block_length, len(text))
        moved = True
        while moved:
            moved = False
            for token in added_tokens:
                place = text.find(token, max(cut - len(token) + 1, 0), cut + len(token) - 1)
                if place >= 0 and place < cut < place + len(token):
                    cut, moved = place + len(token), True
        cuts.append(cut)
    return cuts


def _join(
    backend: Tokenizer,
    text: str,
    ids: list[int],
    spans: list[tuple[int, int]],
    right_ids: list[int],
    right_spans: list[tuple[int, int]],
) -> tuple[list[int], list[tuple[int, int]]]:
    """Take the tokens before the seam that it may affect off `ids` and `spans`, and return all that follow."""
    reach = 8
    while True:
        left = _character_border(spans, max(len(ids) - reach, 0), -1)
        right = _character_border(right_spans, min(reach, len(right_ids)), 1)
        start = spans[left][0]
        seam: Encoding = backend.encode(text[start : right_spans[right - 1][1]], add_special_tokens=False)
        left_agrees = left == 0 or seam.ids[0] == ids[left]
        right_agrees = right == len(right_ids) or seam.ids[-1] == right_ids[right - 1]
        if left_agrees and right_agrees:
            del ids[left:], spans[left:]
            seam_spans = [(start + first, start + last) for first, last in seam.offsets]
            return seam.ids + right_ids[right:], seam_spans + right_spans[right:]
        reach *= 2


def _character_border(spans: Sequence[tuple[int, int]], place: int, step: int) -> int:
    """The next place from `place` on, in the direction of `step`, before whose token a character begins: tokens that
    are parts of one character have the same span."""
    while 0 < place < len(spans) and spans[place - 1][1] > spans[place][0]:
        place += step
    return place


# --- comparison -------------------------------------------------------------------------------------------------------


def compare_tokenizers(
    tokenizers: Mapping[str, PreTrainedTokenizerFast],
    texts: Sequence[str],
    length_edges: Sequence[int] = (100, 1_000, 10_000),
) -> dict[str, dict[str, Any]]:
    """How far each tokenizer compresses the same texts, in plain numbers.

    Args:
        tokenizers: by name.
        texts: held out from the tokenizers' training.
        length_edges: ascending; the figures are also given for texts below the first length in characters, from there
            to below the second, and so on.

    Returns:
        For each name: `vocabulary_size`, `texts`, `bytes`, `words` (between white space), `tokens`, `bytes_per_token`,
        `tokens_per_word` (fertility; None without words), `lossless` (share of the texts that decoding gives back
        exactly), `multi_word_share` (share of the tokens in the texts that reach from one word into another),
        `bytes_of_tokens` (bytes of a token -> how many such tokens are in the texts) and `by_length`: for each class
        of lengths that has texts, `from` and `to` (None: no limit) and the figures from `texts` to `tokens_per_word`.

    Raises:
        ValueError: no tokenizers, no texts, or texts without any character.
    """
    texts = list(_checked(texts))
    if not tokenizers or not any(texts):
        raise ValueError(f"expected tokenizers and texts, found {len(tokenizers)} and {len(texts)}")
    edges = [0, *length_edges, None]
    if any(low >= high for low, high in itertools.pairwise(edges[:-1])):
        raise ValueError(f"length_edges must ascend from above 0, found {list(length_edges)}")
    return {name: _figures(tokenizer, texts, edges) for name, tokenizer in tokenizers.items()}


def _figures(tokenizer: PreTrainedTokenizerFast, texts: list[str], edges: Sequence[int | None]) -> dict[str, Any]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    counts = [len(ids) for ids in encoded]
    used = Counter(itertools.chain.from_iterable(encoded))
    vocabulary = Vocabulary(tokenizer)
    of_bytes: Counter[int] = Counter()
    for token_id, count in used.items():
        of_bytes[len(vocabulary.token_bytes[token_id] or b"")] += count
    across = sum(count for token_id, count in used.items() if _spans_words(vocabulary.token_bytes[token_id]))
    by_length = []
    for low, high in itertools.pairwise(edges):
        places = [i for i, text in enumerate(texts) if len(text) >= low and (high is None or len(text) < high)]
        if places:
            chosen = _compression([texts[i] for i in places], [counts[i] for i in places])
            by_length.append({"from": low, "to": high, **chosen})
    exact = sum(tokenizer.decode(ids) == text for ids, text in zip(encoded, texts))
    return {
        "vocabulary_size": len(tokenizer),
        **_compression(texts, counts),
        "lossless": exact / len(texts),
        "multi_word_share": across / max(sum(counts), 1),
        "bytes_of_tokens": dict(sorted(of_bytes.items())),
        "by_length": by_length,
    }


def _compression(texts: Sequence[str], counts: Sequence[int]) -> dict[str, Any]:
    size, words, tokens = (
        sum(len(text.encode()) for text in texts),
        sum(len(text.split()) for text in texts),
        sum(counts),
    )
    return {
        "texts": len(texts),
        "bytes": size,
        "words": words,
        "tokens": tokens,
        "bytes_per_token": size / tokens if tokens else None,
        "tokens_per_word": tokens / words if words else None,
    }


def _spans_words(token: bytes | None) -> bool:
    """White space with something else on both sides."""
    return token is not None and len(token.split()) > 1


def draw_comparison(figures: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draw what `compare_tokenizers` found: bytes per token by length of the text, and how long tokens are.

    Args:
        path: of the picture; its ending tells the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    by_length, lengths = figure.subplots(1, 2)
    for name, found in figures.items():
        classes = [_class_name(entry) for entry in found["by_length"]]
        by_length.plot(classes, [entry["bytes_per_token"] for entry in found["by_length"]], marker="o", label=name)
        sizes = found["bytes_of_tokens"]
        lengths.step(list(sizes), [count / found["tokens"] for count in sizes.values()], where="mid", label=name)
    by_length.margins(y=0.1)
    by_length.set(xlabel="characters of the text", ylabel="bytes per token", ylim=(0, None))
    lengths.set(xlabel="bytes of a token", ylabel="share of the tokens")
    for axis in (by_length, lengths):
        axis.legend()
    figure.savefig(path, dpi=120)


def _class_name(entry: Mapping[str, Any]) -> str:
    return f"from {entry['from']:,}" if entry["to"] is None else f"{entry['from']:,} to {entry['to'] - 1:,}"
