"""MaxSim search in 10,000 documents of 40 vectors: exact and compressed, against PyLate's PLAID, on one thread.

Synthetic vectors of 128 dimensions, 50 queries of 32. A vector is the direction of one of 1,000 words, plus one that
its document shares with its topic, plus noise; queries repeat words of one document and of its topic. The noise is such
that the mean squared distance to the nearest of 8,192 centroids is about that of ColBERTv2 on MS MARCO passages, 0.24
(8.39e6 for 35.1e6 vectors: stanford-futuredata/ColBERT, issue 360). Recall@10 is counted against float64 brute force.
The indexes are read from disk, memory-mapped. How much is found of queries that are not like any document is measured
with queries to which noise is added, up to nothing but noise.

PyLate (its Stanford code, 2 bits) needs an environment of its own, whose Python is given. Its extensions are compiled
before the clock starts. It works in several processes, so wall time is compared there.

    python benchmarks/bench_multi_vector_index.py --peer-python PATH
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import interleaved, report, rounded
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits

from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings
from rarezoo.retrieval.multi_vector_index import PRECISIONS, MultiVectorIndex

DOCUMENTS, LENGTH, DIM, QUERIES, QUERY_LENGTH, TOP_K = 10_000, 40, 128, 50, 32, 10
WORDS, TOPICS, WORDS_PER_TOPIC, NOISE, SHARED = 1_000, 200, 120, 0.042, 0.3
PEER_DOCUMENTS = (1_000, DOCUMENTS)
# Cosines between the queries' vectors and those with noise, and options of `search`.
COSINES = (1.0, 0.7, 0.45, 0.0)
SEARCHES: dict[str, dict] = {
    "defaults": {},
    "16 cells, 4096 candidates": {"num_cells": 16, "num_candidates": 4096},
    "all stored vectors scored": {"exhaustive": True},
}

_PEER = """
import importlib.metadata, json, sys, time
import numpy as np, torch
from pylate import indexes
torch.set_num_threads(1)
folder = sys.argv[1]
documents, queries = (np.load(f"{folder}/{name}.npy") for name in ("documents", "queries"))

def build(name, documents):
    index = indexes.PLAID(index_folder=folder, index_name=name, override=True, nbits=2, use_fast=False)
    ids = [str(row) for row in range(len(documents))]
    index.add_documents(documents_ids=ids, documents_embeddings=list(documents))
    return index

def search(index):
    return [index(queries_embeddings=[torch.from_numpy(query)], k=10)[0] for query in queries]

search(build("compiles the extensions", documents[:100]))
start = time.perf_counter()
index = build("index", documents)
building = time.perf_counter() - start
seconds = []
for _ in range(5):
    start = time.perf_counter()
    found = search(index)
    seconds.append(time.perf_counter() - start)
version = importlib.metadata.version("pylate")
ids = [[int(row["id"]) for row in rows] for rows in found]
print(json.dumps({"version": version, "build": building, "search": sorted(seconds)[2], "found": ids}))
"""


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def random_vectors(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Documents (DOCUMENTS, LENGTH, DIM) and queries (QUERIES, QUERY_LENGTH, DIM)."""
    words = unit(generator.standard_normal((WORDS, DIM)))
    topic_directions = unit(generator.standard_normal((TOPICS, DIM)))
    topics = generator.integers(0, WORDS, (TOPICS, WORDS_PER_TOPIC))
    topic = generator.integers(0, TOPICS, DOCUMENTS)
    own = topics[topic[:, None], generator.integers(0, WORDS_PER_TOPIC, (DOCUMENTS, LENGTH))]
    any_words = generator.integers(0, WORDS, (DOCUMENTS, LENGTH))
    chosen = np.where(generator.random((DOCUMENTS, LENGTH)) < 0.4, any_words, own)
    shared = unit(topic_directions[topic] + unit(generator.standard_normal((DOCUMENTS, DIM))))

    asked = generator.choice(DOCUMENTS, QUERIES, replace=False)
    repeated = chosen[asked[:, None], generator.integers(0, LENGTH, (QUERIES, QUERY_LENGTH))]
    related = topics[topic[asked][:, None], generator.integers(0, WORDS_PER_TOPIC, (QUERIES, QUERY_LENGTH))]
    query_words = np.where(generator.random((QUERIES, QUERY_LENGTH)) < 0.3, related, repeated)
    query_shared = unit(shared[asked] + 0.5 * unit(generator.standard_normal((QUERIES, DIM))))

    def vectors(numbers: np.ndarray, direction: np.ndarray) -> np.ndarray:
        noise = NOISE * generator.standard_normal((*numbers.shape, DIM))
        return unit(words[numbers] + SHARED * direction[:, None] + noise)

    return vectors(chosen, shared), vectors(query_words, query_shared)


def exact_best(documents: np.ndarray, queries: np.ndarray) -> list[set[int]]:
    """The TOP_K documents of every query, by float64 brute force."""
    best = []
    for query in queries.astype(np.float64):
        blocks = [
            (documents[start : start + 1000].astype(np.float64) @ query.T).max(axis=1).sum(axis=1)
            for start in range(0, len(documents), 1000)
        ]
        best.append(set(np.argsort(-np.concatenate(blocks), kind="stable")[:TOP_K].tolist()))
    return best


def recall(found: list[list[tuple[str, float]]], expected: list[set[int]]) -> float:
    hits = sum(len({int(name) for name, _ in row} & best) for row, best in zip(found, expected))
    return round(hits / (TOP_K * len(expected)), 4)


def container(documents: np.ndarray) -> MultiVectorEmbeddings:
    ids = [str(row) for row in range(len(documents))]
    return MultiVectorEmbeddings(ids, documents.reshape(-1, DIM), np.full(len(documents), documents.shape[1]))


def seconds(action: Callable[[], object]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return rounded({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, 2)


def bytes_per_vector(index: MultiVectorIndex) -> dict[str, float]:
    parts = [load_file(path) for path in index.folder.glob("segment-*.safetensors")]
    stored = sum(
        part[name].nbytes for part in parts for name in part if name in ("vectors", "scales", "residuals", "codes")
    )
    lists = sum(part["cell_documents"].nbytes for part in parts if "cell_documents" in part)
    folder = sum(path.stat().st_size for path in index.folder.iterdir())
    sizes = {"vector and centroid number": stored, "with inverted lists": stored + lists, "whole folder": folder}
    return rounded({name: size / index.num_vectors for name, size in sizes.items()}, 2)


def squared_residual(index: MultiVectorIndex, documents: np.ndarray) -> float:
    codec = index.codec
    assert codec is not None
    codes = np.concatenate([stored["codes"] for _, _, stored in index.iter_stored()])
    return round(float(((documents.reshape(-1, DIM) - codec.centroids[codes]) ** 2).sum(axis=1).mean()), 3)


def milliseconds_per_query(seconds: dict[str, float]) -> dict[str, float]:
    return rounded({name: 1000 * value / QUERIES for name, value in seconds.items()}, 2)


def compare_precisions(folder: Path, documents: np.ndarray, queries: np.ndarray) -> dict:
    embeddings, expected = container(documents), exact_best(documents, queries)
    building = {
        precision: seconds(
            lambda precision=precision: MultiVectorIndex.build(embeddings, folder / precision, precision)
        )
        for precision in PRECISIONS
    }
    indexes = {precision: MultiVectorIndex.open(folder / precision) for precision in PRECISIONS}
    rows = [[query] for query in queries]
    cases = {name: lambda index=index: [index.search(row) for row in rows] for name, index in indexes.items()}
    one_by_one = interleaved(cases, 5)
    together = interleaved({name: lambda index=index: index.search(queries) for name, index in indexes.items()}, 5)
    return {
        "documents": DOCUMENTS,
        "vectors": embeddings.num_vectors,
        "mean squared distance to the centroids": squared_residual(indexes["2-bit"], documents),
        "build seconds": building,
        "bytes per vector": {name: bytes_per_vector(index) for name, index in indexes.items()},
        "recall@10": {name: recall(index.search(queries), expected) for name, index in indexes.items()},
        "recall@10, all stored vectors scored": {
            name: recall(index.search(queries, exhaustive=True), expected) for name, index in indexes.items()
        },
        "cpu milliseconds per query, one per call": milliseconds_per_query(one_by_one),
        f"cpu milliseconds per query, {QUERIES} per call": milliseconds_per_query(together),
        "time relative to exact search, one per call": rounded(
            {name: value / one_by_one["float32"] for name, value in one_by_one.items()}, 3
        ),
    }


def compare_distances(folder: Path, documents: np.ndarray, queries: np.ndarray) -> dict:
    """recall@10 of the indexes that `compare_precisions` built."""
    noise = unit(np.random.default_rng(1).standard_normal(queries.shape))
    figures: dict = {}
    for cosine in COSINES:
        noisy = unit(cosine * queries + np.sqrt(1 - cosine**2) * noise)
        expected = exact_best(documents, noisy)
        figures[f"cosine {cosine}"] = {
            precision: {
                name: recall(MultiVectorIndex.open(folder / precision).search(noisy, **options), expected)
                for name, options in SEARCHES.items()
            }
            for precision in PRECISIONS[1:]
        }
    return figures


def compare_with_pylate(folder: Path, documents: np.ndarray, queries: np.ndarray, peer_python: str) -> dict:
    expected, embeddings = exact_best(documents, queries), container(documents)
    for name, rows in (("documents", documents), ("queries", queries)):
        np.save(folder / f"{name}.npy", rows)
    finished = subprocess.run([peer_python, "-c", _PEER, str(folder)], capture_output=True, text=True, cwd=folder)
    if finished.returncode:
        raise SystemExit(f"the peer failed:\n{finished.stderr[-3000:]}")
    peer = json.loads(finished.stdout.splitlines()[-1])
    figures = {
        f"PyLate {peer['version']}, PLAID, 2 bits": {
            "build seconds": round(peer["build"], 2),
            "milliseconds per query": round(1000 * peer["search"] / QUERIES, 2),
            "recall@10": recall([[(str(row), 0.0) for row in rows] for rows in peer["found"]], expected),
        }
    }
    for precision in ("2-bit", "float32"):
        building = seconds(
            lambda precision=precision: MultiVectorIndex.build(embeddings, folder / precision, precision)
        )
        index = MultiVectorIndex.open(folder / precision)
        searching = [seconds(lambda index=index: [index.search([query]) for query in queries]) for _ in range(6)][1:]
        figures[f"rarezoo, {precision}"] = {
            "build seconds": building["wall"],
            "milliseconds per query": round(1000 * sorted(row["wall"] for row in searching)[2] / QUERIES, 2),
            "recall@10": recall(index.search(queries), expected),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer-python", help="Python of an environment in which PyLate can be imported")
    peer_python = parser.parse_args().peer_python
    torch.set_num_threads(1)
    documents, queries = random_vectors(np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        MultiVectorIndex.build(container(documents[:500]), Path(folder) / "compiles", "2-bit").search(queries[:1])
        figures = compare_precisions(Path(folder), documents, queries)
        figures["recall@10 of queries with noise"] = compare_distances(Path(folder), documents, queries)
        if peer_python:
            figures["wall time beside PyLate, by number of documents"] = beside = {}
            for count in PEER_DOCUMENTS:
                (peer_folder := Path(folder) / f"peer {count}").mkdir()
                beside[count] = compare_with_pylate(peer_folder, documents[:count], queries, peer_python)
    packages = ("numba", "numpy", "scikit-learn", "scipy")
    report("multi_vector_index", (__doc__ or "").partition("\n")[0], figures, packages)


if __name__ == "__main__":
    main()
