"""Supertokens: chunks, a trained tokenizer that loses nothing, long texts, and the comparison with word tokens."""

import hashlib
import json
import os
import pydoc_data.topics
import random
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import regex
from tokenizers import normalizers
from transformers import AutoTokenizer

from rarezoo.tokenizer_transplant.supertokens import (
    DEFAULT_CHUNK_LENGTHS,
    ChunkLengths,
    compare_tokenizers,
    cut_into_chunks,
    draw_comparison,
    encode_long_text,
    read_supertoken_settings,
    train_supertokens,
    train_word_tokens,
)

FIXTURE = json.loads(
    (Path(__file__).parent / "fixtures" / "tokenizer_transplant" / "supertoken_chunks.json").read_text("utf-8")
)
# The distribution that was published, under the names of the file in which it was.
PUBLISHED = """
vocab_size: 640
special_tokens: ["<|endoftext|>", "<|beginoftext|>", "<|image|>", "<|audio|>"]
dataset_name: "somebody/something"
separator: "#$TinyCompany@&"
test_distribution:
  "4-5": 0.044
  "6-7": 0.091
  "8-9": 0.146
  "10-11": 0.171
  "12-13": 0.185
  "14-15": 0.171
  "16-17": 0.146
  "18-19": 0.091
  "20-21": 0.044
  "22-23": 0.011
push_to_hub:
  repo_id: "somebody/something"
min_frequency: 2
initial_alphabet: null
max_token_length: 30
model_max_length: 8192
"""
SCRIPTS = [
    "The quick brown fox\tjumps  over\n\n the lazy dog.  ",
    "भारत में हिन्दी क्षत्रिय।",
    "العربية نصٌّ مُشَكَّل ۞ ؀١٢٣",
    "中文没有空格。日本語もそうです。",
    "ภาษาไทยไม่มีช่องว่าง",
    "한국어 e\u0301te\u0301 각",
    "👩🏽‍🚀👨‍👩‍👧‍👦🇩🇪🇫🇷 ok\r\n\r\n",
    "\x00\x01 \u200b\ufeff \U0010ffff \u2028",
    "<|endoftext|> in a text, <|unknown|> and #$TinyCompany@&",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!",
    "",
]


def help_texts():
    """English on the machine: Python's own help topics, the last fifth held out."""
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    return topics[: len(topics) * 4 // 5], topics[len(topics) * 4 // 5 :]


@pytest.fixture(scope="module")
def texts():
    return help_texts()[0]


@pytest.fixture(scope="module")
def held_out():
    return help_texts()[1]


@pytest.fixture(scope="module")
def supertokens(texts):
    return train_supertokens([*texts, *SCRIPTS], 3000)


# --- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: f"seed {case['seed']}")
def test_chunks_of_the_official_tool(case):
    lengths = ChunkLengths.from_mapping(FIXTURE["distribution"])
    found = cut_into_chunks(FIXTURE["text"], lengths, random.Random(case["seed"]), keep_graphemes=False)
    assert list(found) == case["augmented"].split(FIXTURE["separator"])


@pytest.mark.parametrize("text", SCRIPTS)
@pytest.mark.parametrize("lengths", [DEFAULT_CHUNK_LENGTHS, ChunkLengths(((1, 1), (2, 3)), (0.5, 0.5))])
def test_chunks_keep_the_text_and_its_graphemes(text, lengths):
    """Against the clusters of another library."""
    borders = {match.end() for match in regex.finditer(r"\X", text)} | {0}
    for seed in range(30):
        position = 0
        for chunk in cut_into_chunks(text, lengths, random.Random(seed)):
            assert chunk
            position += len(chunk)
            assert position in borders
        assert position == len(text)


def test_lengths_are_those_of_the_distribution():
    lengths = ChunkLengths(((2, 3), (10, 13)), (0.25, 0.75))
    chunks = list(cut_into_chunks("x" * 200_000, lengths, random.Random(0)))[:-2]
    counts = {length: sum(len(chunk) == length for chunk in chunks) / len(chunks) for length in (2, 3, 10, 11, 12, 13)}
    assert sum(counts.values()) == 1
    expected = {2: 0.125, 3: 0.125, 10: 0.1875, 11: 0.1875, 12: 0.1875, 13: 0.1875}
    assert counts == pytest.approx(expected, abs=0.01)


def test_a_letter_with_more_marks_than_any_window():
    text = "ab" + "\u0301" * 500 + "c"
    chunks = list(cut_into_chunks(text, ChunkLengths(((1, 1),), (1.0,)), random.Random(0)))
    assert chunks == ["a", "b" + "\u0301" * 500, "c"]


def test_the_published_distribution(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(PUBLISHED)
    with pytest.warns(UserWarning, match=r"sum up to 1\.1 instead of 1; they are scaled"):
        settings = read_supertoken_settings(path)
    assert settings["vocab_size"] == 640 and settings["special_tokens"][0] == "<|endoftext|>"
    assert settings["chunk_lengths"].ranges[0] == (4, 5) and len(settings["chunk_lengths"].ranges) == 10
    assert sum(settings["chunk_lengths"].weights) == pytest.approx(1, abs=1e-12)
    assert settings["chunk_lengths"].weights[4] == pytest.approx(0.185 / 1.1)
    with pytest.raises(ValueError, match=r"sum up to 1\.1 instead of 1$"):
        read_supertoken_settings(path, strict=True)
    tokenizer = train_supertokens(["so many words in so many texts " * 50], **{**settings, "vocab_size": 270})
    assert len(tokenizer) == 270


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        ({}, "sum up to 0"),
        ({"4": 1.0}, "expected a range of chunk lengths such as '4-5', found '4'"),
        ({"0-5": 1.0}, "1 <= shortest <= longest, found 0-5"),
        ({"5-4": 1.0}, "found 5-4"),
        ({"1-2": -0.5, "3-4": 1.5}, "at least 0"),
        ({"1-2": "much"}, "expected a number .* found 'much'"),
        ({"1-2": float("nan")}, "sum up to nan"),
    ],
)
def test_distributions_that_are_none(distribution, message):
    with pytest.raises(ValueError, match=message):
        ChunkLengths.from_mapping(distribution)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_nothing_is_lost(supertokens, held_out):
    for text in [*SCRIPTS, *held_out, "".join(SCRIPTS)]:
        ids = supertokens.encode(text)
        assert supertokens.decode(ids) == text
        assert supertokens(text)["input_ids"] == ids
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    generator = random.Random(0)
    for _ in range(200):
        text = "".join(generator.choices(characters, k=20))
        assert supertokens.decode(supertokens.encode(text)) == text


def test_what_the_tokenizer_is_made_of(supertokens, tmp_path):
    settings = json.loads(supertokens.backend_tokenizer.to_str())
    assert settings["pre_tokenizer"]["type"] == "ByteLevel" and settings["pre_tokenizer"]["use_regex"] is False
    assert settings["normalizer"] is None
    assert len(supertokens) == 3000
    assert supertokens.convert_ids_to_tokens([0, 1, 2, 3]) == [
        "<|endoftext|>", "<|beginoftext|>", "<|image|>", "<|audio|>",
    ]  # fmt: skip
    assert (supertokens.eos_token_id, supertokens.bos_token_id) == (0, 1)
    assert max(map(len, supertokens.get_vocab())) <= 30
    assert any("Ġ" in token[1:-1] and token[0] != "Ġ" for token in supertokens.get_vocab())  # across words
    supertokens.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(SCRIPTS[0]) == supertokens.encode(SCRIPTS[0]) and again.model_max_length == 8192
    assert again.decode(again.encode(SCRIPTS[0])) == SCRIPTS[0]


def test_the_same_seed_gives_the_same_tokenizer(texts, tmp_path):
    """Also in processes with other hash seeds, threads, and a generator for a list."""
    code = """
    import hashlib, pydoc_data.topics
    from rarezoo.tokenizer_transplant.supertokens import train_supertokens
    topics = pydoc_data.topics.topics
    tokenizer = train_supertokens((topics[name] for name in sorted(topics)[:20]), 1500, seed=3)
    print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())
    """
    found = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel},
            capture_output=True, text=True, check=True, timeout=240,
        ).stdout.split()[-1]
        for seed, parallel in (("1", "false"), ("2", "true"))
    ]  # fmt: skip
    here = [train_supertokens(texts[:20], 1500, seed=seed).backend_tokenizer.to_str() for seed in (3, 4)]
    assert {*found, hashlib.sha256(here[0].encode()).hexdigest()} == {found[0]}
    assert here[0] != here[1]


def test_fewer_tokens_than_words_need(supertokens, texts, held_out):
    words = train_word_tokens([*texts, *SCRIPTS], 3000)
    report = compare_tokenizers({"supertokens": supertokens, "words": words}, held_out)
    assert len(words) == len(supertokens)
    assert report["supertokens"]["bytes_per_token"] > 1.03 * report["words"]["bytes_per_token"]
    assert report["supertokens"]["lossless"] == report["words"]["lossless"] == 1
    assert report["supertokens"]["multi_word_share"] > 0.05
    assert report["words"]["multi_word_share"] == 0


def test_a_sample_bounds_the_chunks(texts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = train_supertokens(iter(texts), 600, max_chunks=3000)
    assert len(tokenizer) == 600
    assert (
        tokenizer.backend_tokenizer.to_str()
        == train_supertokens(texts, 600, max_chunks=3000).backend_tokenizer.to_str()
    )
    with pytest.warns(UserWarning, match=r"the texts give \d+ tokens instead of 600"):
        train_supertokens(texts, 600, max_chunks=20)


def test_texts_are_read_one_at_a_time():
    """Of a stream that never ends, no more is read than is asked for."""
    seen = []

    def stream():
        for number in range(5):
            seen.append(number)
            yield f"text number {number} of many texts"
        raise RuntimeError("the stream broke")

    with pytest.raises(RuntimeError, match="the stream broke"):
        train_supertokens(stream(), 300)
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("one text", {}, "found a single text; put it into a list"),
        ([], {}, "there are no texts to train on"),
        ([""], {}, "there are no texts to train on"),
        (["fine", None], {}, "text 2: expected a string, found NoneType"),
        (["fine", "a\ud800"], {}, "text 2 is not valid Unicode: .* at position 1"),
        (["fine"], {"vocab_size": 259}, "at least 260, the 256 bytes and 4 special tokens; found 259"),
        (["fine"], {"max_chunks": 0}, "max_chunks must be at least 1, found 0"),
    ],
)
def test_errors(texts, options, message):
    with pytest.raises(ValueError, match=message):
        train_supertokens(texts, **{"vocab_size": 300, **options})


# --- long texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_length", [1, 7, 64, 1000])
def test_blocks_are_joined_exactly(supertokens, held_out, block_length):
    generator = random.Random(block_length)
    repeated = [generator.choice("ab ") * generator.randrange(1, 200) for _ in range(5)]
    mixed = "".join(generator.choices([*"abcdefgh \n", " the", " of", "é", "中", "👩🏽‍🚀", "<|endoftext|>"], k=2000))
    for text in [*SCRIPTS, held_out[0][:5000], "".join(SCRIPTS) * 5, *repeated, mixed, "<|endoftext|>" * 20]:
        assert encode_long_text(supertokens, text, block_length=block_length) == supertokens.encode(text)


def test_only_tokenizers_without_words(supertokens, texts):
    words = train_word_tokens(texts, 400)
    with pytest.raises(ValueError, match=r"expected a tokenizer of train_supertokens"):
        encode_long_text(words, "a text")


# --- comparison -------------------------------------------------------------------------------------------------------


def test_figures_of_a_comparison():
    """Counted by hand: without merges every byte is a token."""
    bytes_alone = train_supertokens(["ab"], 260)
    found = compare_tokenizers({"bytes": bytes_alone}, ["ab cd", "é", "", "x" * 20], length_edges=(5, 20))["bytes"]
    assert (found["texts"], found["bytes"], found["tokens"], found["words"]) == (4, 27, 27, 4)
    assert (found["bytes_per_token"], found["tokens_per_word"]) == (1, 27 / 4)
    assert found["bytes_of_tokens"] == {1: 27} and found["multi_word_share"] == 0 and found["lossless"] == 1
    assert [(entry["from"], entry["to"], entry["texts"], entry["tokens"]) for entry in found["by_length"]] == [
        (0, 5, 2, 2), (5, 20, 1, 5), (20, None, 1, 20),
    ]  # fmt: skip
    json.dumps(found)


def test_a_tokenizer_that_loses_something_is_seen():
    lowercase = train_supertokens(["ab"], 260)
    lowercase.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert compare_tokenizers({"lower": lowercase}, ["Ab", "ab"])["lower"]["lossless"] == 0.5


def test_picture(supertokens, held_out, tmp_path):
    report = compare_tokenizers({"supertokens": supertokens}, held_out)
    draw_comparison(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("edges", "compared"), [((5, 5), ["a"]), ((), []), ((), [""])])
def test_comparisons_that_are_none(edges, compared, supertokens):
    with pytest.raises(ValueError, match=r"must ascend|expected tokenizers and texts"):
        compare_tokenizers({"supertokens": supertokens}, compared, edges)
