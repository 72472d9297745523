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
