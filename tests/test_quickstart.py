"""The tour: its data, and all its stations, small and (slow) as a newcomer sees it."""

import json
import sys

import pytest
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from rarezoo.cli import quickstart
from rarezoo.cli.docstring_corpus import _split, read_docstring_pairs
from rarezoo.retrieval import SparseIndex
from rarezoo.training import SparseTrainingRecipe


@pytest.fixture(autouse=True)
def verbosity():
    """The tour is quiet about loading and saving; other tests read those messages."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.mark.parametrize(
    ("text", "query", "document"),
    [
        (
            "Return the absolute path of a file.\n\nSymbolic links, e.g. shortcuts, are followed to the file that they"
            "\nname, as often as it takes to find one that is no link.",
            "Return the absolute path of a file.",
            "Symbolic links, e.g. shortcuts, are followed to the file that they name, as often as it takes to find one "
            "that is no link.",
        ),
        ("Read rows, e.g. from a file. " + "A row is a list of texts. " * 4, "Read rows, e.g. from a file.", None),
        ("Only one sentence, however long it may be, answers no question at all", None, None),
        ("Too short.\n\n" + "A long rest that would do well as a document. " * 4, None, None),
    ],
)
def test_first_sentence_and_rest(text, query, document):
    pair = _split("module.name", text)
    assert (pair and pair.query) == query
    if document:
        assert pair.document == document


def test_pairs_have_one_answer_each():
    pairs = read_docstring_pairs(500)
    assert len(pairs) == 500
    for values in ([pair.name for pair in pairs], [pair.query.lower() for pair in pairs]):
        assert len(set(values)) == 500
    assert read_docstring_pairs(500) == pairs
    assert {pair.name for pair in read_docstring_pairs(500, seed=1)} != {pair.name for pair in pairs}
    parts = [pair.name.split(".")[0] for pair in pairs]
    assert {"test", "idlelib"}.isdisjoint(parts) and len(set(parts)) > 20
    assert set(parts[:300]) <= sys.stdlib_module_names, "the standard library comes first"
    assert "torch" in {pair.name.split(".")[0] for pair in read_docstring_pairs(8000)}


def test_other_peoples_folders_are_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").touch()
    with pytest.raises(FileExistsError, match="holds other files; choose a new folder for the quickstart"):
        quickstart.run(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "precious"]


def test_a_small_tour(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "left.over").touch()
    (tmp_path / "quickstart.json").touch()  # as an earlier tour leaves it
    figures = quickstart.run(tmp_path, documents=300, further_pairs=50, steps=3)
    assert json.loads((tmp_path / "quickstart.json").read_text()) == json.loads(json.dumps(figures))
    assert (figures["documents"], figures["held-out queries"], figures["training pairs"]) == (300, 60, 290)
    assert set(figures["nDCG@10"]) == {"before", "after", "BM25"}
    assert all(0.3 < value < 1 for value in figures["nDCG@10"].values()), "all three find documents by their words"
    assert figures["same vector without rarezoo"] is True
    assert set(figures["quantized"]) == {"nf4", "int8"}
    for report in figures["quantized"].values():
        assert all(report["retrieval"]["nDCG@10"][name] > 0.3 for name in ("full_precision", "quantized"))
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")

    assert not (tmp_path / "model" / "left.over").exists()
    model, processor = (auto.from_pretrained(tmp_path / "model") for auto in (AutoModel, AutoProcessor))
    index = SparseIndex.open(tmp_path / "index")
    assert len(index) == 300
    printed = capsys.readouterr().out
    for question in quickstart.QUESTIONS:
        (best, score), _ = index.search(model.encode_queries([question], processor), top_k=2)[0]
        assert f"{question}?" in printed
        assert f"{score:6.2f}  {best}" in printed
    assert "matched: " in printed and "the same vector, bit for bit" in printed
    assert SparseTrainingRecipe.load(tmp_path / "model").max_steps == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_tour_learns(tmp_path):
    figures = quickstart.run(tmp_path)
    quality = figures["nDCG@10"]
    assert quality["after"] > quality["before"], quality
    assert quality["after"] > quality["BM25"] - 0.01, quality
    assert figures["active dimensions"]["document"] < 100
    for report in figures["quantized"].values():
        assert report["outputs"]["cosine_mean"] > 0.99
        # A quarter of the queries over two fifths of the documents: other figures, but easier rather than harder.
        assert quality["after"] - 0.05 < report["retrieval"]["nDCG@10"]["full_precision"] < quality["after"] + 0.2
        assert report["file_bytes"]["ratio"] < 0.5
