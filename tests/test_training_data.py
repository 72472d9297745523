"""Reading training rows and tables of texts."""

import gzip
import json
import pickle

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from rarezoo.training import read_text_table, read_texts, read_training_rows

ROWS = [{"query": 'say "hi"', "positive": "grüße"}, {"query": "b\u2028c", "positive": "d"}]


def write_jsonl(path, rows):
    opened = gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8")
    with opened as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.tsv", "rows.tsv.gz", "rows.parquet", "saved"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    if "jsonl" in name:
        write_jsonl(path, ROWS)
    elif "tsv" in name:
        text = "query\tpositive\n" + "".join(f"{row['query']}\t{row['positive']}\n" for row in ROWS)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    elif name == "saved":
        Dataset.from_list(ROWS).save_to_disk(str(path))
    else:
        Dataset.from_list(ROWS).to_parquet(str(path))
    rows = read_training_rows(path)
    assert len(rows) == 2
    assert [dict(row) for row in rows] == ROWS


def test_numbers_in_tsv(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("query\tpositive\tnegative\tmargin\tscores\nq\tp\tn\t1.5\t2,0.5\n")
    assert read_training_rows(path)[0] == {
        "query": "q",
        "positive": "p",
        "negative": "n",
        "margin": 1.5,
        "scores": [2.0, 0.5],
    }


def test_text_table(tmp_path):
    rows = [
        {"_id": "a", "text": "one"},
        {"id": 7, "text": "two", "title": "Second"},
        {"_id": "c", "text": "", "title": ""},
    ]
    assert read_text_table(write_jsonl(tmp_path / "corpus.jsonl", rows)) == {"a": "one", "7": "Second two", "c": ""}


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("missing.jsonl", None, FileNotFoundError, "no training data at"),
        ("rows.xlsx", "x", ValueError, r"expected \.jsonl"),
        ("rows.jsonl", "", ValueError, "holds no rows"),
        ("rows.jsonl", '{"query": "a"}\n{"query": ', ValueError, "line 2: not valid JSON"),
        ("rows.jsonl", "[1]\n", ValueError, "line 1: expected a JSON object, found list"),
        ("rows.tsv", "query\tpositive\na\n", ValueError, "line 2: expected 2 tab-separated values"),
        ("rows.tsv", "query\tpositive\na\tb\tc\n", ValueError, "line 2: expected 2 tab-separated values"),
    ],
)
def test_clear_errors(tmp_path, name, content, error, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=message):
        read_training_rows(path)


def test_text_table_without_ids(tmp_path):
    with pytest.raises(ValueError, match=r"corpus\.jsonl, line 1: expected columns '_id'"):
        read_text_table(write_jsonl(tmp_path / "corpus.jsonl", [{"text": "one"}]))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.tsv", "rows.parquet"])
def test_rows_know_where_they_stand(tmp_path, name):
    path = tmp_path / name
    if name == "rows.jsonl":
        path.write_text("\n".join(["", *map(json.dumps, ROWS)]))  # a blank line first
    elif name == "rows.tsv":
        path.write_text("query\tpositive\n" + "".join(f"{row['query']}\t{row['positive']}\n" for row in ROWS))
    else:
        Dataset.from_list(ROWS).to_parquet(str(path))
    rows = read_training_rows(path)
    places = [f"{path}, row 1", f"{path}, row 2"] if name == "rows.parquet" else [f"{path}, line 2", f"{path}, line 3"]
    assert [row.where for row in rows] == places
    assert [pickle.loads(pickle.dumps(row)).where for row in rows] == places, "workers of a loader get them too"
    assert rows[-1].where == places[-1]
    batch = next(iter(DataLoader(rows, batch_size=2, collate_fn=list)))
    assert batch == ROWS and [row.where for row in batch] == places


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, ending):
    def write(name, text):
        content = b"\xef\xbb\xbf" + text.encode()
        (tmp_path / f"{name}{ending}").write_bytes(gzip.compress(content) if ending else content)
        return tmp_path / f"{name}{ending}"

    assert read_text_table(write("plain.tsv", "0\ta\n1\tb\n")) == {"0": "a", "1": "b"}
    assert read_text_table(write("header.tsv", "id\ttext\n0\ta\n")) == {"0": "a"}
    assert list(read_training_rows(write("rows.jsonl", '{"query": "a", "positive": "b"}\n'))) == [
        {"query": "a", "positive": "b"}
    ]
    assert read_training_rows(write("triples.jsonl", "[1, 2, 3]\n"))[0]["query_id"] == 1
    assert read_texts(write("texts.txt", "a\nb\n")) == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", gzip.compress(b'{"query": "a", "positive": "b"}', mtime=0)[:20]],
    ids=["not UTF-8", "cut gzip"],
)
def test_files_that_are_not_text(tmp_path, content):
    path = tmp_path / ("rows.jsonl.gz" if content.startswith(b"\x1f") else "rows.jsonl")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: cannot be read as text"):
        read_training_rows(path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_raw_texts(tmp_path, name):
    """Only a line feed ends a line; what holds no text is left out."""
    texts = ["the cat", "sat\u2028on", " ", "", "the mat"]
    lines = texts if "txt" in name else [json.dumps({"text": text, "id": 1}) for text in texts]
    content = "\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_texts(tmp_path / name) == ["the cat", "sat\u2028on", "the mat"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "holds no texts"),
        ("a.txt", b"caf\xe9", "cannot be read as text in UTF-8"),
        ("a.txt.gz", b"plain", "cannot be read as text in UTF-8"),
        ("a.tsv", b"1\ta", r"expected \.txt with a text a line, or \.jsonl"),
        ("a.jsonl", b'{"text": "a"}\n{', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'["a"]', r"a\.jsonl, line 1: expected a JSON object"),
        ("a.jsonl", b'{"txt": "a"}', r"a\.jsonl, line 1: expected a string in the field 'text'"),
    ],
)
def test_raw_texts_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)


def test_no_file_of_raw_texts(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of texts at"):
        read_texts(tmp_path / "none.txt")
