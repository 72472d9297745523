"""The verbs of `rarezoo` that write and read vectors: what they refuse, and what they leave behind."""

import json
import shutil
from pathlib import Path

import pytest

from .commands import call, refused, write_jsonl

DOCUMENTS = {"paris": "the capital of france is paris", "cat": "the cat sat on the mat"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli retrieval") / "corpus.jsonl"
    return write_jsonl(path, ({"_id": name, "text": text} for name, text in DOCUMENTS.items()))


@pytest.fixture(scope="module")
def embeddings(splade_checkpoint, corpus) -> Path:
    folder = corpus.with_name("embeddings")
    call("encode", splade_checkpoint, corpus, folder)
    return folder


@pytest.fixture(scope="module")
def index(embeddings) -> Path:
    folder = embeddings.with_name("index")
    call("index", embeddings, folder)
    return folder


@pytest.fixture(scope="module")
def foreign(splade_checkpoint, corpus) -> Path:
    """A checkpoint whose vocabulary is as large, but in which two tokens have changed places."""
    folder = corpus.with_name("foreign")
    shutil.copytree(splade_checkpoint, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# --- vocabularies -----------------------------------------------------------------------------------------------------


def test_export_refuses_the_tokens_of_another_vocabulary(embeddings, splade_checkpoint, foreign, tmp_path):
    line = refused("export", embeddings, tmp_path / "wrong.jsonl", "--to", "opensearch", "--model", foreign)
    assert "every dimension would get a wrong name" in line
    assert list(tmp_path.iterdir()) == []
    call("export", embeddings, tmp_path / "right.jsonl", "--to", "opensearch", "--model", splade_checkpoint)


def test_search_refuses_a_table_of_another_vocabulary(index, splade_checkpoint, foreign, corpus, tmp_path):
    for name, checkpoint in (("right", splade_checkpoint), ("wrong", foreign)):
        call("export", checkpoint, tmp_path / name, "--to", "inference-free", "--corpus", corpus)
    assert "their dimensions mean other words" in refused("search", index, "paris", "--model", tmp_path / "wrong")
    call("search", index, "paris", "--model", tmp_path / "right")


def test_folders_that_do_not_name_their_vocabulary_are_read(embeddings, index, foreign, splade_checkpoint, tmp_path):
    """As the first release wrote them."""
    for folder, name in ((embeddings, "embeddings.json"), (index, "index.json")):
        shutil.copytree(folder, tmp_path / folder.name)
        manifest = json.loads((folder / name).read_text())
        del manifest["vocabulary"]
        (tmp_path / folder.name / name).write_text(json.dumps(manifest))
    old = tmp_path / "embeddings"
    call("export", old, tmp_path / "vectors.jsonl", "--to", "opensearch", "--model", foreign)
    call("index", old, tmp_path / "rebuilt")
    call("search", tmp_path / "index", "paris", "--model", splade_checkpoint)


# --- help -------------------------------------------------------------------------------------------------------------


def test_a_wrong_folder_is_of_no_kind(embeddings, tmp_path):
    """Whoever works with several vectors per document is not told of sparse ones."""
    expected = f"rarezoo: {tmp_path} holds no embeddings: embeddings.json is missing"
    assert refused("index", tmp_path, tmp_path / "new") == expected
    assert f"{tmp_path} holds no index: index.json is missing" in refused("index", "add", tmp_path, embeddings)
    assert not (tmp_path / "new").exists()


def test_index_alone_shows_its_help():
    """As `rarezoo` alone does: on standard error, with the exit code of a wrong command line."""
    shown = call("index", code=2).stderr
    assert shown == call("index", "--help").stdout
    assert [line.split()[0] for line in shown.split("Commands:")[1].splitlines() if line] == [
        "build",
        "add",
        "delete",
        "compact",
    ]


# --- metadata ---------------------------------------------------------------------------------------------------------

METADATA = {"paris": {"lang": "en", "year": 2020, "tags": ["city", "capital"]}, "cat": {"lang": "fr", "year": "2020"}}


@pytest.fixture(scope="module")
def with_metadata(embeddings, tmp_path_factory) -> Path:
    """A corpus that says more of the same documents, and the index of it."""
    folder = tmp_path_factory.mktemp("with metadata")
    rows = ({"_id": name, "text": text, "metadata": METADATA[name]} for name, text in DOCUMENTS.items())
    corpus = write_jsonl(folder / "corpus.jsonl", rows)
    call("index", embeddings, folder / "index", "--metadata", corpus)
    return folder / "index"


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ([], {"paris", "cat"}),
        (["lang=en"], {"paris"}),
        (['lang="en"'], {"paris"}),
        (["lang=en", "lang=fr"], {"paris", "cat"}),
        (['lang=["en", "fr"]', "year=2020"], {"paris"}),
        (['year="2020"'], {"cat"}),
        (["tags=capital"], {"paris"}),
        (["lang=en", "tags=town"], set()),
        (["unknown=NaN"], set()),
    ],
)
def test_search_where(with_metadata, splade_checkpoint, conditions, expected):
    options = [word for condition in conditions for word in ("--where", condition)]
    arguments = ("search", with_metadata, "the capital", "--model", splade_checkpoint, *options)
    answers = json.loads(call(*arguments, "--json").stdout)["answers"]
    assert {answer["id"]: answer["metadata"] for answer in answers} == {name: METADATA[name] for name in expected}
    shown = call(*arguments).stdout
    for name in expected:
        assert f"     {json.dumps(METADATA[name])}\n" in shown
    if not expected:
        assert shown == "nothing found: no document with the metadata of --where shares a term with the query\n"


def test_a_run_file_of_filtered_answers(with_metadata, splade_checkpoint, tmp_path):
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "paris"}, {"_id": "q2", "text": "a cat"}])
    arguments = ("--queries", queries, "--run", tmp_path / "run.txt", "--where", "lang=fr")
    call("search", with_metadata, "--model", splade_checkpoint, *arguments)
    assert {line.split()[2] for line in (tmp_path / "run.txt").read_text().splitlines()} == {"cat"}


def test_answers_without_metadata_say_nothing_of_them(index, splade_checkpoint):
    shown = call("search", index, "the capital", "--model", splade_checkpoint, "--json").stdout
    assert all("metadata" not in answer for answer in json.loads(shown)["answers"])


def test_metadata_of_documents_that_are_added(with_metadata, splade_checkpoint, tmp_path):
    corpus = write_jsonl(tmp_path / "new.jsonl", [{"_id": "new", "text": "capital", "metadata": {"lang": "en"}}])
    call("encode", splade_checkpoint, corpus, tmp_path / "embeddings")
    shutil.copytree(with_metadata, tmp_path / "index")
    call("index", "add", tmp_path / "index", tmp_path / "embeddings", "--metadata", corpus)
    call("index", "delete", tmp_path / "index", "paris")
    call("index", "compact", tmp_path / "index")
    arguments = (tmp_path / "index", "the capital", "--model", splade_checkpoint, "--where", "lang=en", "--json")
    (answer,) = json.loads(call("search", *arguments).stdout)["answers"]
    assert (answer["id"], answer["metadata"]) == ("new", {"lang": "en"})


def test_mistakes_with_metadata(embeddings, corpus, with_metadata, splade_checkpoint, tmp_path):
    def building(*rows):
        path = write_jsonl(tmp_path / "rows.jsonl", ({"text": "t", **row} for row in rows))
        return refused("index", embeddings, tmp_path / "index", "--metadata", path)

    assert "no document has metadata; expected JSONL rows" in refused(
        "index", embeddings, tmp_path / "index", "--metadata", corpus
    )
    assert "'dog' is none of the new documents" in building({"_id": "dog", "metadata": {"a": 1}})
    assert "'cat': the field 'a' holds dict" in building({"_id": "cat", "metadata": {"a": {"b": 1}}})
    assert "'cat': expected an object of fields and values, found str" in building({"_id": "cat", "metadata": "x"})
    assert not (tmp_path / "index").exists()
    search = ("search", with_metadata, "paris", "--model", splade_checkpoint, "--where")
    assert "--where 'lang': expected FIELD=VALUE" in refused(*search, "lang")
    assert "the field 'lang' is compared with dict" in refused(*search, 'lang={"en": 1}')
