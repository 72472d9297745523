"""colbert-ai's and xm-retrievers' files: triples by id, queries and collections."""

import gzip
import json
import pickle

import pytest

from rarezoo.training import read_text_table, read_training_rows
from rarezoo.training.collator import parse_row

LINES = [[7, [0, 9.5], [2, 1.25], [1, -3]], [8, [1, 4], [0, 2.0], [2, 0]]]
BY_ID = [[7, 0, 2], ["8", "1", "0"]]


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["triples.jsonl", "triples.jsonl.gz", "triples.json"])
def test_triples(tmp_path, name):
    text = lines_of(LINES[:1]) + "\n" + lines_of(LINES[1:])
    rows = read_training_rows(write(tmp_path / name, text.rstrip("\n")))
    assert len(rows) == 2
    assert rows[0] == {"query_id": 7, "positive_id": 0, "negative_ids": [2, 1], "scores": [9.5, 1.25, -3]}
    assert rows[-1]["query_id"] == 8 and rows[1].where.endswith("line 3")
    assert rows[0:2] == [rows[0], rows[1]] == list(rows) == list(pickle.loads(pickle.dumps(rows)))
    with pytest.raises(IndexError):
        rows[2]


def test_rows_of_ids_and_their_texts(tmp_path):
    rows = read_training_rows(write(tmp_path / "triples.jsonl", lines_of(BY_ID)))
    assert rows[0] == {"query_id": 7, "positive_id": 0, "negative_ids": [2]}
    queries = read_text_table(write(tmp_path / "queries.tsv", '7\twho is "there"\n8\tb\u2028c\n'))
    assert queries == {"7": 'who is "there"', "8": "b\u2028c"}
    collection = read_text_table(write(tmp_path / "collection.tsv.gz", "zero\none\r\n\nthree"))
    assert collection == {"0": "zero", "1": "one", "2": "", "3": "three"}, "the id is the line's number"
    titled = read_text_table(write(tmp_path / "titled.tsv", "0\ttext\ttitle\n1\tother\t\n"))
    assert titled == {"0": "title | text", "1": " | other"}
    headed = read_text_table(write(tmp_path / "headed.tsv", "_id\ttitle\ttext\na\tA\tb\n"))
    assert headed == {"a": "A b"}
    example = parse_row(rows[1], queries, collection)
    assert (example.query, example.positive, example.negatives) == ("b\u2028c", "one", ("zero",))
    with pytest.raises(
        ValueError, match=r"triples\.jsonl, line 1: column 'positive_id' holds id 0, which is not in the"
    ):
        parse_row(rows[0], queries, {"1": "one"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2", "not valid JSON"),
        ("[1]", r"expected a list \[query id, positive, negative, …\]"),
        ('{"query": "a"}', "expected a list"),
        ("[1, [2, 1.0], 3]", "all be ids or all be"),
        ("[1, [2, NaN], [3, 1.0]]", "finite score"),
        ('[1, [2, "x"], [3, 1.0]]', "finite score"),
        ("[1, [2], [3, 1.0]]", "finite score"),
        ("[1, 2, null]", "a passage id must be a number or a text, found None"),
        ("[true, 2, 3]", "the query id must be a number or a text, found True"),
    ],
)
def test_lines_that_are_no_triples(tmp_path, line, message):
    path = write(tmp_path / "triples.jsonl", f"[1, 2, 3]\n{line}\n")
    with pytest.raises(ValueError, match=rf"triples\.jsonl, line 2: .*{message}"):
        read_training_rows(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\ta\n2\n", "line 2: expected 2 tab-separated"),
        ("1\ta\tb\tc\n", "line 1: expected 3 tab-separated"),
        ("1\ta\n1\tb\n", "line 2: the id '1' occurs twice"),
        ("", "holds no rows"),
    ],
)
def test_tables_that_are_none(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_text_table(write(tmp_path / "collection.tsv", text))
