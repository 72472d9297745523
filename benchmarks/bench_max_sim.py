"""The 10 best of 1,000 documents by late interaction against PyLate, maxsim-cpu and colbert-ai, on one thread.

One query of 32 vectors, documents of 180 vectors, or of 20 to 340, of 128 dimensions. "random" documents are the
hardest case for an engine that excludes documents by approximate scores: unit vectors without any structure, of which
all scores are nearly equal. In "topical" documents some vectors lie near vectors of the query, in some documents more
than in others, as in real candidates.

PyLate's `rank.rerank` gets a list of tensors, `maxsim_cpu` numpy arrays, colbert-ai's C++ kernel one packed tensor; its
scores and those of `maxsim_cpu` are sorted by torch. rarezoo gets the list, or documents that were prepared once; how
long that takes is reported too. Engines are timed in turn in one process, with five queries per turn, as where one
engine serves, and once more with a single one, which finds the processor's caches filled by the other engines. The
order of their answers is compared with float64. Peers that are not installed are left out with a message:

    pip install --no-deps pylate==1.6.0 fastkmeans==0.5.0 colbert-ai==0.2.22
    pip install maxsim-cpu "sentence-transformers==5.3.0" datasets ujson GitPython flask python-dotenv scipy ninja
    python benchmarks/bench_max_sim.py

PyLate pins libraries that differ from rarezoo's, so they want an environment of their own; colbert-ai compiles its
kernel on first use.
"""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # read by maxsim_cpu at its first use
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from measure import interleaved, report, rounded
from torch.nn.functional import normalize

from rarezoo.colbert_xm.max_sim import PackedDocuments, max_sim, rerank

DOCUMENTS, QUERY_LENGTH, DIM, TOP_K, ROUNDS = 1_000, 32, 128, 10, 41
Engine = Callable[[], list[int]]
PREPARED, LISTS, SCORES = "rarezoo, prepared", "rarezoo, from a list", "rarezoo, all scores"


def random_documents(lengths: list[int]) -> list[torch.Tensor]:
    return [normalize(torch.randn(length, DIM), dim=1) for length in lengths]


def topical_documents(query: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """Random documents; every vector is drawn towards a random vector of the query, each document by its own weight."""
    return [
        normalize(document + torch.rand(1) * query[torch.randint(QUERY_LENGTH, (len(document),))], dim=1)
        for document in random_documents(lengths)
    ]


def best(scores: torch.Tensor) -> list[int]:
    return scores.flatten().sort(descending=True, stable=True).indices[:TOP_K].tolist()


def pylate_engine(query: torch.Tensor, documents: list[torch.Tensor]) -> Engine:
    from pylate import rank

    ids = [list(range(len(documents)))]

    def run() -> list[int]:
        found = rank.rerank(documents_ids=ids, queries_embeddings=[query], documents_embeddings=[documents])
        return [row["id"] for row in found[0][:TOP_K]]

    return run


def maxsim_cpu_engine(query: torch.Tensor, documents: list[torch.Tensor]) -> Engine:
    import maxsim_cpu

    query_array = query.numpy()
    if len({len(document) for document in documents}) == 1:
        stacked = torch.stack(documents).numpy()
        return lambda: best(torch.as_tensor(np.asarray(maxsim_cpu.maxsim_scores(query_array, stacked))))
    arrays = [document.numpy() for document in documents]
    return lambda: best(torch.as_tensor(np.asarray(maxsim_cpu.maxsim_scores_variable(query_array, arrays))))


def colbert_ai_engine(query: torch.Tensor, documents: list[torch.Tensor]) -> Engine:
    from colbert.infra import ColBERTConfig
    from colbert.modeling.colbert import ColBERT, colbert_score_packed

    ColBERT.try_load_torch_extensions(False)
    packed, lengths = torch.cat(documents), torch.tensor([len(document) for document in documents])
    config = ColBERTConfig()
    return lambda: best(colbert_score_packed(query[None], packed, lengths, config=config))


PEERS = {"pylate": pylate_engine, "maxsim-cpu": maxsim_cpu_engine, "colbert-ai": colbert_ai_engine}


def engines(query: torch.Tensor, documents: list[torch.Tensor]) -> dict[str, Engine]:
    prepared = PackedDocuments(documents)
    found: dict[str, Engine] = {
        PREPARED: lambda: rerank(query, prepared, TOP_K).positions.tolist(),
        LISTS: lambda: rerank(query, documents, TOP_K).positions.tolist(),
        SCORES: lambda: best(max_sim(query, documents)),
    }
    for name, engine in PEERS.items():
        try:
            found[name] = engine(query, documents)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return found


def exact_order(query: torch.Tensor, documents: list[torch.Tensor]) -> list[int]:
    scores = [(query.double() @ document.double().T).amax(1).sum() for document in documents]
    return best(torch.stack(scores).float())


def figures_of(query: torch.Tensor, documents: list[torch.Tensor]) -> dict:
    cases = engines(query, documents)
    expected = exact_order(query, documents)
    correct = {name: case() == expected for name, case in cases.items()}
    timed = {**cases, "preparation": lambda: PackedDocuments(documents)}
    return {
        "five queries in turn": times(interleaved(timed, ROUNDS // 2, calls=5)),
        "one query in turn": times(interleaved(timed, ROUNDS)),
        "top 10 of float64, in order": correct,
    }


def times(seconds: dict[str, float]) -> dict:
    milliseconds = {name: 1000 * value for name, value in seconds.items()}
    peers = [name for name in PEERS if name in milliseconds]
    return {
        "cpu milliseconds": rounded(milliseconds, 2),
        "times faster, documents prepared": rounded(
            {name: milliseconds[name] / milliseconds[PREPARED] for name in peers}, 1
        ),
        "times faster, from a list": rounded({name: milliseconds[name] / milliseconds[LISTS] for name in peers}, 1),
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    query = normalize(torch.randn(QUERY_LENGTH, DIM), dim=1)
    equal, varied = [180] * DOCUMENTS, torch.randint(20, 341, (DOCUMENTS,)).tolist()
    figures = {
        "random, 180 vectors": figures_of(query, random_documents(equal)),
        "topical, 180 vectors": figures_of(query, topical_documents(query, equal)),
        "topical, 20 to 340 vectors": figures_of(query, topical_documents(query, varied)),
    }
    packages = tuple(name for name in ("torch", *PEERS) if name == "torch" or name in figures_peers(figures))
    report("max_sim", (__doc__ or "").partition("\n")[0], figures, packages)


def figures_peers(figures: dict) -> set[str]:
    return {name for case in figures.values() for name in case["one query in turn"]["cpu milliseconds"]}


if __name__ == "__main__":
    main()
