"""The multi-vector index as users get it: at its defaults, opened without being read, and kept from other models."""

import tracemalloc

import numpy as np
import pytest
import torch

from rarezoo import ColBERTXMForRetrieval
from rarezoo.conversion import convert
from rarezoo.retrieval import MultiVectorEmbeddings, MultiVectorIndex
from rarezoo.retrieval.muvera import Muvera

from .commands import call, refused

DIM = 128


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def collection(seed, documents=600, length=20):
    """Documents of words from one of 30 topics, each with a direction of its own, and 20 queries of their words."""
    generator = np.random.default_rng(seed)
    words, own = unit(generator.standard_normal((300, DIM))), unit(generator.standard_normal((documents, 1, DIM)))
    topics = generator.integers(0, 300, (30, 40))
    chosen = topics[generator.integers(0, 30, documents)[:, None], generator.integers(0, 40, (documents, length))]
    asked = chosen[:20, generator.integers(0, length, 16)]
    rows, queries = (
        unit(words[part] + 0.3 * own[: len(part)] + 0.04 * generator.standard_normal((*part.shape, DIM)))
        for part in (chosen, asked)
    )
    names = [f"d{row}" for row in range(documents)]
    return MultiVectorEmbeddings(names, rows.reshape(-1, DIM), [length] * documents, "a model"), rows, list(queries)


def exact_best(rows, queries, k=10):
    """By MaxSim in float64."""
    scores = np.array([[(row.astype(np.float64) @ query.T).max(axis=0).sum() for row in rows] for query in queries])
    return [{f"d{position}" for position in order[:k]} for order in (-scores).argsort(axis=1)]


def recall(found, best):
    return np.mean([len({name for name, _ in results} & wanted) / len(wanted) for results, wanted in zip(found, best)])


@pytest.mark.parametrize(("precision", "least"), [("float32", 1.0), ("int8", 0.97), ("4-bit", 0.97), ("2-bit", 0.95)])
def test_recall_at_the_defaults(tmp_path, precision, least):
    """No argument but the precision, its number of centroids included; mean over three collections."""
    found = []
    for seed in range(3):
        embeddings, rows, queries = collection(seed)
        index = MultiVectorIndex.build(embeddings, tmp_path / str(seed), precision)
        found.append(recall(index.search(queries), exact_best(rows, queries)))
    assert np.mean(found) >= least, found


def test_opening_reads_no_vectors(tmp_path):
    """They are mapped: memory that numpy and Python ask for is far below the file's size."""
    embeddings, _, queries = collection(0, documents=1500)
    for precision in ("float32", "int8"):
        built = MultiVectorIndex.build(embeddings, tmp_path / precision, precision)
        expected = built.search(queries[:1], subset=["d3", "d4"])
        size = sum(path.stat().st_size for path in built.folder.iterdir())
        del built
        tracemalloc.start()
        try:
            index = MultiVectorIndex.open(tmp_path / precision)
            opened = tracemalloc.get_traced_memory()[1]
            found = index.search(queries[:1], subset=["d3", "d4"])
            searched = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert found == expected
        assert size > 3e6 and opened < 0.1 * size and searched < 0.25 * size, (precision, size, opened, searched)


def test_muvera_finds_candidates_for_the_index(tmp_path):
    """The first stage elsewhere, exact scores among its candidates here."""
    embeddings, rows, queries = collection(1)
    index = MultiVectorIndex.build(embeddings, tmp_path / "index")
    muvera = Muvera(DIM, num_repetitions=20, num_hyperplanes=5)
    asked = MultiVectorEmbeddings.from_list([str(number) for number in range(len(queries))], queries)
    products = muvera.encode_queries(asked) @ muvera.encode_documents(embeddings).T
    candidates = [[f"d{position}" for position in order[:60]] for order in (-products).argsort(axis=1)]
    found = [index.search([query], subset=names)[0] for query, names in zip(queries, candidates)]
    best = exact_best(rows, queries)
    assert recall(found, best) >= 0.95
    alone = index.search(queries)
    for results, names, everything in zip(found, candidates, alone):
        scores = dict(everything)
        assert len(results) == 10 and {name for name, _ in results} <= set(names)
        shared = [(name, score) for name, score in results if name in scores]
        np.testing.assert_allclose([score for _, score in shared], [scores[name] for name, _ in shared], atol=1e-5)


def test_queries_of_another_checkpoint_are_refused(colbert_fixtures, tmp_path):
    """Of the same shape, with the same tokenizer: only its weights are others."""
    convert("colbert_xm", colbert_fixtures / "checkpoint", tmp_path / "first")
    convert("colbert_xm", colbert_fixtures / "checkpoint", tmp_path / "second")
    other = ColBERTXMForRetrieval.from_pretrained(tmp_path / "second")
    with torch.no_grad():
        other.linear.weight.mul_(-1)
    other.save_pretrained(tmp_path / "second")
    corpus = tmp_path / "corpus.tsv"
    corpus.write_text("a\tthe moon pulls the sea\nb\train\n")
    call("encode", tmp_path / "first", corpus, tmp_path / "embeddings", "--language", "en")
    call("index", tmp_path / "embeddings", tmp_path / "index")
    before = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    assert "b" in call("search", tmp_path / "index", "rain", "--model", tmp_path / "first").stdout
    problem = refused("search", tmp_path / "index", "rain", "--model", tmp_path / "second")
    assert "encoded by" in problem
    call("encode", tmp_path / "second", corpus, tmp_path / "others", "--language", "en")
    assert "encoded by" in refused("index", "add", tmp_path / "index", tmp_path / "others")
    assert {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()} == before
