"""Corpus, query and relevance readers: every accepted layout, streaming, and one clear error for every bad input."""

import gzip
import json
import tracemalloc

import pytest

from rarezoo.retrieval import Document, Query, read_corpus, read_qrels, read_queries


def write(path, content):
    """Write text or bytes, gzip-compressed when the name ends in .gz."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def json_lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_beir_folder(tmp_path, suffix):
    write(
        tmp_path / f"corpus.jsonl{suffix}",
        json_lines(
            {"_id": "d1", "title": "Paris", "text": "capital of France", "metadata": {"url": "x"}},
            {"_id": "d2", "title": "", "text": " jupiter\u2028is large "},
            {"_id": "d3", "title": "Only a title", "text": ""},
            {"_id": "d4", "text": ""},
        ),
    )
    write(tmp_path / f"queries.jsonl{suffix}", json_lines({"_id": "q1", "text": "where is Paris?", "metadata": {}}))
    write(tmp_path / "qrels" / f"test.tsv{suffix}", "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n")
    write(tmp_path / "qrels" / f"dev.tsv{suffix}", "query-id\tcorpus-id\tscore\nq1\td3\t1\n")
    assert list(read_corpus(tmp_path)) == [
        Document("d1", "Paris capital of France", {"url": "x"}),
        Document("d2", " jupiter\u2028is large "),
        Document("d3", "Only a title"),
        Document("d4", ""),
    ]
    assert list(read_queries(tmp_path)) == [Query("q1", "where is Paris?")]
    assert read_qrels(tmp_path) == {"q1": {"d1": 2, "d2": 0}}
    assert read_qrels(str(tmp_path), split="dev") == {"q1": {"d3": 1}}
    with pytest.raises(FileNotFoundError, match="splits found: dev, test"):
        read_qrels(tmp_path, split="train")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("id_field", ["_id", "id", "docid"])
@pytest.mark.parametrize("text_field", ["text", "contents", "content"])
def test_jsonl_fields(tmp_path, suffix, id_field, text_field):
    content = json_lines({id_field: 7, text_field: "seven", "title": None}, {id_field: "ü", text_field: "acht"})
    path = write(tmp_path / f"documents.jsonl{suffix}", "\ufeff" + content.replace("\n", "\r\n\n"))
    assert list(read_corpus(path)) == [Document("7", "seven"), Document("ü", "acht")]
    assert list(read_queries(path)) == [Query("7", "seven"), Query("ü", "acht")]


def test_tsv(tmp_path):
    path = write(tmp_path / "collection.tsv", "id\ttext\n1\tfirst text\n\n2\t\n3\tid\n")
    assert list(read_corpus(path)) == [Document("1", "first text"), Document("2", ""), Document("3", "id")]


def test_text_file_has_one_document_a_line(tmp_path):
    path = write(tmp_path / "lines.txt.gz", "first\r\n\n  \n second\x0cpart \nthird")
    assert list(read_corpus(path)) == [Document("1", "first"), Document("4", "second\x0cpart"), Document("5", "third")]


def test_folder_of_text_files(tmp_path):
    write(tmp_path / "b.txt", "two\nlines\n")
    write(tmp_path / "a" / "z.txt.gz", "packed")
    write(tmp_path / "a" / "empty.txt", "")
    write(tmp_path / "a" / "picture.png", b"\xff")
    assert list(read_corpus(tmp_path)) == [
        Document("a/empty.txt", ""),
        Document("a/z.txt.gz", "packed"),
        Document("b.txt", "two\nlines\n"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", '{"id": "1", "text": "a"}\n{"id": "2", "text": \n', r"c\.jsonl, line 2: not valid JSON"),
        ("c.jsonl", "[" * 100_000, r"c\.jsonl, line 1: not valid JSON"),
        ("c.jsonl", '["1", "a"]\n', "line 1: expected a JSON object, found list"),
        ("c.jsonl", '{"text": "a"}\n', "line 1: no field '_id' or 'id' or 'docid'; found .'text'"),
        ("c.jsonl", '{"id": "1", "body": "a"}\n', "line 1: no field 'text' or 'contents' or 'content'; found"),
        ("c.jsonl", '{"id": "1", "text": null}\n', "line 1: text and title must be strings, found None"),
        ("c.jsonl", '{"id": "1", "text": "a", "title": 3}\n', "line 1: text and title must be strings"),
        ("c.jsonl", '{"id": true, "text": "a"}\n', "line 1: the id must be a string or an integer, found True"),
        ("c.jsonl", '{"id": 1.5, "text": "a"}\n', "line 1: the id must be a string or an integer, found 1.5"),
        ("c.jsonl", '{"id": " ", "text": "a"}\n', "line 1: an id must not be empty"),
        ("c.jsonl", '{"id": "a\\nb", "text": "a"}\n', "line 1: an id must not be empty or hold tabs, line breaks"),
        ("c.jsonl", '{"id": "1", "text": "a \\ud800 b"}\n', "line 1: the entry '1' holds unpaired surrogates"),
        ("c.jsonl", '{"id": "1", "text": "a"}\n{"id": 1, "text": "b"}\n', "line 2: the id '1' occurs twice"),
        ("c.jsonl", "\n\n", r"c\.jsonl: holds no document"),
        ("c.tsv", "1\ta\n2\tb\tc\n", r"c\.tsv, line 2: expected 2 columns .id, tab, text., found 3"),
        ("c.tsv", "1 a\n", "line 1: expected 2 columns .id, tab, text., found 1"),
        ("c.tsv", "1\ta\n1\tb\n", "line 2: the id '1' occurs twice"),
        ("c.txt", "", "holds no document"),
        ("c.txt", b"good\nna\xefve\n", r"c\.txt, line 2: not UTF-8 .byte 0xef at position 2.; convert the file"),
        ("c.csv", "1,a\n", r"c\.csv: unknown kind of file; expected .jsonl, .tsv, .txt .also with .gz., or a folder"),
    ],
)
def test_bad_corpus_is_one_clear_error(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        list(read_corpus(path))


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl: no such file or folder"):
        read_corpus(tmp_path / "absent.jsonl")
    with pytest.raises(FileNotFoundError, match=r"neither corpus\.jsonl .* nor any \.txt file"):
        read_corpus(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no queries\.jsonl or queries\.jsonl\.gz; expected a BEIR folder"):
        read_queries(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_qrels(tmp_path / "qrels.tsv")


def test_text_file_in_folder_that_is_not_utf8_is_named(tmp_path):
    write(tmp_path / "bad.txt", b"caf\xe9")
    with pytest.raises(ValueError, match=r"bad\.txt: not UTF-8 .byte 0xe9"):
        list(read_corpus(tmp_path))


@pytest.mark.parametrize("damage", ["cut short", "not gzip"])
def test_damaged_gzip(tmp_path, damage):
    packed = gzip.compress(json_lines(*({"id": number, "text": "x"} for number in range(500))).encode())
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2] if damage == "cut short" else b"plain text\n")
    with pytest.raises(ValueError, match=r"c\.jsonl\.gz, after line \d+: damaged gzip data"):
        list(read_corpus(path))


def test_queries_name_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="holds no query"):
        list(read_queries(write(tmp_path / "q.tsv", "\n")))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("query-id\tcorpus-id\tscore\nq 1\td 1\t1\n", {"q 1": {"d 1": 1}}),
        ("q1\td1\t+1\nq1\td2\t+2\n", {"q1": {"d1": 1, "d2": 2}}),
        ("q1\td1\t1\r\nq1\td2\t-1\r\n", {"q1": {"d1": 1, "d2": -1}}),
        ("q1 0 d1 3\nq2\tQ0\td1\t0\nq1 0 d1 3\n", {"q1": {"d1": 3}, "q2": {"d1": 0}}),
    ],
)
def test_qrels_layouts(tmp_path, content, expected):
    assert read_qrels(write(tmp_path / "qrels.txt.gz", content)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q1 0 d1\n", "line 1: expected 4 columns .* found 3"),
        ("q1\td1\t1\nq1\td1\n", "line 2: expected 3 columns separated by tabs .* found 2"),
        ("q1\td1\t1\nq1\td2\tgood\n", "line 2: the grade 'good' is not an integer"),
        ("q1\td1\t1.0\nq1\td2\t2\n", "line 1: the grade '1.0' is not an integer"),
        ("q1 0 d1 1.0\n", "line 1: the grade '1.0' is not an integer"),
        ("q1 0 d1 1\nq1 0 d1 2\n", "line 2: query 'q1' and document 'd1' already have the grade 1"),
        ("query-id\tcorpus-id\tscore\n", "holds no relevance judgement"),
    ],
)
def test_bad_qrels(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_qrels(write(tmp_path / "qrels.tsv", content))


def test_large_corpus_is_streamed(tmp_path):
    path = tmp_path / "corpus.jsonl"
    with path.open("w") as file:
        for number in range(3000):
            file.write(json.dumps({"id": number, "text": "word " * 2000}) + "\n")
    assert path.stat().st_size > 30_000_000
    tracemalloc.start()
    total = sum(len(document.text) for document in read_corpus(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 3000 * 10_000
    assert peak < 2_000_000


def test_reading_starts_before_the_file_is_read(tmp_path):
    path = write(tmp_path / "c.jsonl", '{"id": "1", "text": "a"}\nbroken\n')
    documents = read_corpus(path)
    assert next(documents) == Document("1", "a")
    with pytest.raises(ValueError, match="line 2"):
        next(documents)
