"""Rows of every supported form to tensors, and clear errors for the others."""

import json
import re

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rarezoo.mistral_splade import MistralSpladeProcessor
from rarezoo.training import RetrievalCollator, read_training_rows
from rarezoo.training.collator import RetrievalExample, parse_row

CORPUS = {"d1": "the capital of france is paris", "d2": "the cat sat", "7": "jupiter is a planet"}
QUERIES = {"q1": "what is the capital of france?", "3": "largest planet"}


@pytest.fixture(scope="module")
def processor(request):
    folder = request.path.parent / "fixtures" / "mistral_splade"
    return MistralSpladeProcessor(PreTrainedTokenizerFast.from_pretrained(folder), attention_mode="echo")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "q", "positive": "p"}, RetrievalExample("q", "p")),
        ({"anchor": "q", "positive": "p", "split": 3}, RetrievalExample("q", "p")),
        ({"anchor": "q", "positive": "p", "negative": "n"}, RetrievalExample("q", "p", ("n",))),
        ({"anchor": "q", "positive": "p", "negative": None}, RetrievalExample("q", "p")),
        ({"query": "q", "positive": "p", "negatives": ["a", "b"]}, RetrievalExample("q", "p", ("a", "b"))),
        (
            {"query": "q", "positive": "p", **{f"negative_{i}": f"n{i}" for i in (10, 9, 1)}},
            RetrievalExample("q", "p", ("n1", "n9", "n10")),
        ),
        (
            {"query": "q", "positive": "p", "negative": "n", "scores": [2, 0.5]},
            RetrievalExample("q", "p", ("n",), scores=(2.0, 0.5)),
        ),
        (
            {"query": "q", "positive": "p", "negative": "n", "margin": 1.5},
            RetrievalExample("q", "p", ("n",), margins=(1.5,)),
        ),
        (
            {"query_id": "q1", "positive_id": "d1", "negative_ids": ["d2", 7]},
            RetrievalExample(QUERIES["q1"], CORPUS["d1"], (CORPUS["d2"], CORPUS["7"])),
        ),
        (
            {"query_id": 3, "positive_id": 7, "negative_id_1": "d1", "negative_id_2": "d2"},
            RetrievalExample(QUERIES["3"], CORPUS["7"], (CORPUS["d1"], CORPUS["d2"])),
        ),
        (
            {"query": "q", "positive_id": "d1", "negative_id": "d2"},
            RetrievalExample("q", CORPUS["d1"], (CORPUS["d2"],)),
        ),
    ],
)
def test_parse_row(row, expected):
    assert parse_row(row, QUERIES, CORPUS) == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"positive": "p"}], "query, anchor or query_id; found columns: positive"),
        ([{"query": "q", "text": "p"}], "positive or positive_id"),
        ([{"query": 3, "positive": "p"}], "'query' must hold text, found int"),
        ([{"query": "q", "positive": "p", "negatives": ["a", 4]}], "'negatives' must hold text, found int"),
        ([{"query": "q", "positive": "p", "negatives": "abc"}], "'negatives' must hold a list"),
        ([{"query": "q", "positive": "p", "negatives": ["a"]}, {"query": "q", "positive": "p"}], "found 1 and 0"),
        ([{"query": "q", "positive": "p", "negative": "n", "scores": [1.0]}], "'scores' must hold 2"),
        ([{"query": "q", "positive": "p", "negative": "n", "scores": [1.0, "x"]}], "'scores' must hold numbers"),
        ([{"query": "q", "positive": "p", "negative": "n", "scores": [1.0, float("nan")]}], "finite"),
        ([{"query": "q", "positive": "p", "negative": "n", "margin": [1.0, 2.0]}], "'margin' must hold 1"),
        (
            [{"query": "q", "positive": "p", "negative": "n", **teacher} for teacher in ({"margin": 1.0}, {})],
            "teacher's margins",
        ),
        ([{"query_id": "q1", "positive": "p"}], "pass queries="),
        ([{"query": "q", "positive_id": "d9"}], "'d9', which is not in the corpus table"),
    ],
)  # fmt: skip
def test_clear_errors(processor, rows, message):
    with pytest.raises(ValueError, match=message):
        RetrievalCollator(processor, corpus=CORPUS)(rows)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"query": "q"}, "a training row needs a column positive or positive_id; found columns: query"),
        ({"query": "q", "positive": 4}, "column 'positive' must hold text"),
        ({"query": "q", "positive_id": "d9"}, "column 'positive_id' holds id 'd9'"),
        ({"query": "q", "positive": "p"}, "all rows of a batch need the same number of negatives, found 1 and 0"),
        ({"query": "q", "positive": "p", "negative": "n"}, "some rows have a teacher's margins"),
    ],
)
def test_errors_name_the_file_and_the_line(processor, tmp_path, second, message):
    path = tmp_path / "pairs.jsonl"
    first = {"query": "q", "positive": "p", "negative": "n", "margin": 1.0}
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line 2: {message}"):
        RetrievalCollator(processor, corpus=CORPUS)(read_training_rows(path))


def test_tensors(processor):
    rows = [
        {"query": "what is paris", "positive": "a", "negative_1": "b", "negative_2": "c d e", "scores": [3, 2, 1]},
        {"query": "who", "positive": "the cat", "negative_1": "e", "negative_2": "f", "scores": [1.5, 0, -1]},
    ]
    batch = RetrievalCollator(processor, prompt="Find it")(rows)
    assert set(batch) == {"queries", "documents", "teacher_scores"}
    expected_queries = processor.process_queries(["what is paris", "who"], prompt="Find it")
    expected_documents = processor.process_documents(["a", "the cat", "b", "e", "c d e", "f"])
    for side, expected in (("queries", expected_queries), ("documents", expected_documents)):
        assert set(batch[side]) == {"input_ids", "attention_mask", "pool_mask"}
        for name, tensor in batch[side].items():
            assert torch.equal(tensor, expected[name])
    assert torch.equal(batch["teacher_scores"], torch.tensor([[3.0, 2.0, 1.0], [1.5, 0.0, -1.0]]))


def test_margins(processor):
    rows = [{"anchor": "q", "positive": "p", "negative": "n", "margin": margin} for margin in (1, 2.5)]
    assert torch.equal(RetrievalCollator(processor)(rows)["teacher_margins"], torch.tensor([[1.0], [2.5]]))
