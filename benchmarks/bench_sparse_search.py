"""Exact search in 20,000 sparse documents against splade-index and scipy, on one thread.

Synthetic vectors of the shape that a SPLADE model gives: 174 terms per document and 45 per query, drawn from a
Zipf-like distribution over 32,000 vocabulary entries, gamma-distributed weights. Every engine gets the same vectors
and is timed through its public interface, 100 queries per call and one query per call, top 10; the index of rarezoo is
read from disk, memory-mapped, the others lie in memory. Recall is counted against float64 brute force.

    python benchmarks/bench_sparse_search.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from measure import interleaved, report, rounded
from numba import set_num_threads
from safetensors.numpy import load_file
from splade_index import SPLADE

from rarezoo.retrieval import SparseEmbeddings, SparseIndex

DOCUMENTS, QUERIES, VOCAB_SIZE, TOP_K = 20_000, 100, 32_000, 10
TERMS_PER_DOCUMENT, TERMS_PER_QUERY = 174, 45


def random_vectors(rows: int, terms: int, generator: np.random.Generator) -> scipy.sparse.csr_matrix:
    """`terms` distinct terms per row; the term of rank r is drawn with a probability proportional to 1 / (r + 60)."""
    cumulative = np.cumsum(1 / (np.arange(VOCAB_SIZE) + 60))
    indices = np.empty((rows, terms), dtype=np.int32)
    for row in range(rows):
        drawn = np.unique(np.searchsorted(cumulative, generator.random(2 * terms) * cumulative[-1]))
        indices[row] = np.sort(generator.permutation(drawn)[:terms])
    weights = (generator.gamma(2, 0.4, size=rows * terms) + 0.01).astype(np.float32)
    return scipy.sparse.csr_matrix((weights, indices.ravel(), np.arange(rows + 1) * terms), shape=(rows, VOCAB_SIZE))


class EncodedAlready:
    """What splade-index asks of a SparseEncoder, answering with the given vectors."""

    def __init__(self, documents: scipy.sparse.csr_matrix, queries: scipy.sparse.csr_matrix):
        parts = (torch.from_numpy(part) for part in (documents.indptr, documents.indices, documents.data))
        self.documents = torch.sparse_csr_tensor(*parts, size=documents.shape)
        rows = (queries[row] for row in range(queries.shape[0]))
        self.queries = [
            torch.sparse_coo_tensor(torch.from_numpy(row.indices[None]), torch.from_numpy(row.data), (VOCAB_SIZE,))
            for row in rows
        ]
        self.tokenizer = self

    def get_vocab(self) -> dict[str, int]:
        return {str(term): term for term in range(VOCAB_SIZE)}

    def encode_document(self, documents, **_) -> torch.Tensor:
        return self.documents

    def encode_query(self, queries, **_) -> list[torch.Tensor]:
        # The "texts" are row numbers; the dummy query of the compilation run is not one.
        return [self.queries[int(query)] if query.isdigit() else self.queries[0] for query in queries]


class ScipySearch:
    """CSR x CSC: the product with all documents, then the largest entries of every row."""

    def __init__(self, documents: scipy.sparse.csr_matrix):
        self.transposed = documents.T.tocsr()

    def search(self, queries: scipy.sparse.csr_matrix) -> list[list[int]]:
        scores = queries @ self.transposed
        found = []
        for row in range(scores.shape[0]):
            start, end = scores.indptr[row : row + 2]
            documents, values = scores.indices[start:end], scores.data[start:end]
            if len(values) > TOP_K:
                best = np.argpartition(-values, TOP_K)[:TOP_K]
                documents, values = documents[best], values[best]
            found.append(documents[np.lexsort((documents, -values))].tolist())
        return found


def seconds(action: Callable[[], object]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return rounded({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def seconds_of_first_use(folder: Path) -> float:
    """Opening and searching in a process whose loops are not compiled yet, less the same once they are cached."""
    program = f"""
import time, scipy.sparse, torch
from rarezoo.retrieval import SparseIndex
query = scipy.sparse.csr_matrix(([1.0], ([0], [7])), shape=(1, {VOCAB_SIZE}), dtype="float32")
start = time.process_time()
SparseIndex.open({str(folder)!r}).search(query)
print(time.process_time() - start)
"""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        runs = [subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True) for _ in range(2)]
    return float(runs[0].stdout) - float(runs[1].stdout)


def recall(found: list[list[int]], expected: np.ndarray) -> float:
    hits = sum(len(set(row) & set(best)) for row, best in zip(found, expected.tolist()))
    return hits / expected.size


def main() -> None:
    torch.set_num_threads(1)
    set_num_threads(1)
    generator = np.random.default_rng(0)
    documents = random_vectors(DOCUMENTS, TERMS_PER_DOCUMENT, generator)
    queries = random_vectors(QUERIES, TERMS_PER_QUERY, generator)
    exact = (queries.astype(np.float64) @ documents.astype(np.float64).T).toarray()
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :TOP_K]
    postings_per_query = int(np.bincount(documents.indices, minlength=VOCAB_SIZE)[queries.indices].sum() / QUERIES)

    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), documents, queries, expected, postings_per_query)


def measure(folder: Path, documents, queries, expected: np.ndarray, postings_per_query: int) -> None:
    embeddings = SparseEmbeddings([str(row) for row in range(DOCUMENTS)], documents)
    encoded = EncodedAlready(documents, queries)
    texts = [str(row) for row in range(DOCUMENTS)]
    names = [str(row) for row in range(QUERIES)]

    SparseIndex.build(embeddings[:100], folder / "compiles the loops")
    peers = {f"splade-index ({backend})": SPLADE(backend=backend) for backend in ("numpy", "numba")}
    building = {"rarezoo, on disk": seconds(lambda: SparseIndex.build(embeddings, folder / "index"))}
    for name, peer in peers.items():
        index = lambda peer=peer: peer.index(encoded, texts, show_progress=False, compile_numba_code=False)  # noqa: E731
        building[f"{name}, in memory"] = seconds(index)
    building["splade-index, saving"] = seconds(lambda: peers["splade-index (numba)"].save(folder / "peer"))
    peer_bytes = folder_bytes(folder / "peer")  # before opening it memory-mapped, which unpacks it there
    opening = {
        "rarezoo": seconds(lambda: SparseIndex.open(folder / "index")),
        "splade-index": seconds(lambda: SPLADE.load(folder / "peer", encoded)),
        "splade-index, mmap": seconds(lambda: SPLADE.load(folder / "peer", encoded, mmap=True)),
    }

    index = SparseIndex.open(folder / "index")
    scipy_search = ScipySearch(documents)

    rows = [queries[row] for row in range(QUERIES)]

    def peer_search(name: str, texts: list[str]) -> list[list[int]]:
        return peers[name].retrieve(texts, k=TOP_K, show_progress=False).doc_ids.tolist()

    # Name -> (search all queries in one call, search the query of that number).
    engines: dict[str, tuple[Callable[[], list], Callable[[int], list]]] = {
        "rarezoo": (lambda: index.search(queries, top_k=TOP_K), lambda row: index.search(rows[row], top_k=TOP_K)),
        "scipy": (lambda: scipy_search.search(queries), lambda row: scipy_search.search(rows[row])),
    }
    for name in peers:
        engines[name] = (
            lambda name=name: peer_search(name, names),
            lambda row, name=name: peer_search(name, names[row : row + 1]),
        )
    found = {name: together() for name, (together, _) in engines.items()}
    found["rarezoo"] = [[int(document) for document, _ in row] for row in found["rarezoo"]]
    all_at_once = interleaved({name: together for name, (together, _) in engines.items()}, 75)
    one_by_one = interleaved(
        {name: lambda single=single: [single(row) for row in range(QUERIES)] for name, (_, single) in engines.items()},
        15,
    )

    def search_figures(measured: dict[str, float]) -> dict:
        return {
            "cpu milliseconds per query": rounded({name: 1000 * value / QUERIES for name, value in measured.items()}),
            "rarezoo's time relative to": rounded(
                {name: measured["rarezoo"] / value for name, value in measured.items() if name != "rarezoo"}, 3
            ),
        }

    segment = load_file(next((folder / "index").glob("segment-*.safetensors")))
    postings = peers["splade-index (numba)"].scores
    figures = {
        "documents": DOCUMENTS,
        "postings": int(documents.nnz),
        "postings touched per query": postings_per_query,
        "100 queries per call": search_figures(all_at_once),
        "one query per call": search_figures(one_by_one),
        "recall@10": {name: recall(rows, expected) for name, rows in found.items()},
        "same order as float64": {name: bool((np.array(rows) == expected).all()) for name, rows in found.items()},
        "build seconds": building,
        "open seconds": opening,
        "bytes per posting": {
            "rarezoo, postings": (segment["documents"].nbytes + segment["weights"].nbytes) / documents.nnz,
            "rarezoo, whole folder": round(folder_bytes(folder / "index") / documents.nnz, 2),
            "splade-index, in memory": (postings["indices"].nbytes + postings["data"].nbytes) / documents.nnz,
            "splade-index, whole folder": round(peer_bytes / documents.nnz, 2),
        },
        "rarezoo, seconds to compile on first use": round(seconds_of_first_use(folder / "index"), 2),
    }
    report("sparse_search", (__doc__ or "").partition("\n")[0], figures, ("numba", "numpy", "scipy", "splade-index"))


if __name__ == "__main__":
    main()
