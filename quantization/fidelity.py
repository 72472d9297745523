"""What quantization changed: outputs, retrieval quality, file size, memory and speed against full precision.

Retrievers are compared by their vectors, language models by their distributions of the next token."""

from __future__ import annotations

import builtins
import inspect
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from tqdm.auto import tqdm

from rarezoo.auto import family_of_model_type
from rarezoo.quantization.checkpoint_loading import load_config, load_model, load_processor, load_tokenizer
from rarezoo.quantization.next_token_fidelity import compare_next_tokens, random_tokens, tokenized

REPORT_JSON = "quantization_report.json"
REPORT_MARKDOWN = "quantization_report.md"
TOP_TERMS = 10
TOP_DOCUMENTS = 10
QUERY_TEXTS = 8
LATENCY_TEXTS = 8
LATENCY_ROUNDS = 7
NO_RANKING = "a language model ranks no documents: leave the evaluation set out, or give texts to predict"


@dataclass(frozen=True)
class EvaluationSet:
    """A retrieval test collection.

    Attributes:
        queries: query id -> text.
        documents: document id -> text.
        qrels: query id -> {document id: relevance grade, an integer}.
        language: of all texts, where the model has language adapters; None for its default.
    """

    queries: Mapping[str, str]
    documents: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    language: str | None = None

    def __post_init__(self) -> None:
        if not self.queries or not self.documents:
            raise ValueError(
                f"an evaluation set needs queries and documents; found {len(self.queries)} queries and "
                f"{len(self.documents)} documents"
            )
        if not any(query in self.qrels for query in self.queries):
            raise ValueError("no query of the evaluation set has a relevance judgement; check the query ids")


def sample_documentation(count: int = 32) -> list[str]:
    """Real texts that every Python has: the documentation strings of its built-in functions and types."""
    built_in = [getattr(builtins, name) for name in sorted(dir(builtins)) if name.islower() and name[0] != "_"]
    texts = [text for item in built_in if callable(item) and (text := inspect.getdoc(item))]
    return list(dict.fromkeys(texts))[:count]


def compare_embeddings(full_precision: csr_matrix, quantized: csr_matrix) -> dict[str, Any]:
    """Row-by-row comparison of two (n, vocab_size) matrices of sparse vectors.

    Returns:
        Mean and minimum cosine; relative error ||quantized - full|| / ||full|| over all rows; mean share of the
        heaviest `TOP_TERMS` terms that both have; mean active dimensions of each. Two empty rows count as equal.
    """
    if full_precision.shape != quantized.shape:
        raise ValueError(f"expected matrices of one shape; found {full_precision.shape} and {quantized.shape}")
    first, second = csr_matrix(full_precision, dtype=np.float64), csr_matrix(quantized, dtype=np.float64)
    if not np.isfinite(second.data).all():
        raise ValueError("the quantized model gives values that are not finite; choose another scheme")
    products = np.asarray(first.multiply(second).sum(1)).ravel()
    norms = np.sqrt(np.asarray(first.multiply(first).sum(1)) * np.asarray(second.multiply(second).sum(1))).ravel()
    both_empty = (np.diff(first.indptr) == 0) & (np.diff(second.indptr) == 0)
    cosines = np.where(both_empty, 1.0, products / np.where(norms > 0, norms, 1.0))
    error = np.sqrt((first - second).multiply(first - second).sum()) / max(np.sqrt(first.multiply(first).sum()), 1e-12)
    overlaps = [_overlap(_heaviest(first, row), _heaviest(second, row)) for row in range(first.shape[0])]
    return {
        "texts": first.shape[0],
        "cosine_mean": float(cosines.mean()),
        "cosine_minimum": float(cosines.min()),
        "relative_error": float(error),
        f"top_{TOP_TERMS}_term_overlap": float(np.mean(overlaps)),
        "active_dimensions": {
            "full_precision": float(np.diff(first.indptr).mean()),
            "quantized": float(np.diff(second.indptr).mean()),
        },
    }


def compare_multi_vectors(
    models: Mapping[str, Any], processor: Any, texts: list[str], documents: Mapping[str, Sequence[torch.Tensor]]
) -> dict[str, Any]:
    """Comparison of several vectors per text, token by token, and of the order in which MaxSim puts the texts.

    Args:
        models, processor: of both sides.
        texts: the first `QUERY_TEXTS` of them are the queries.
        documents: the vectors (length, dim) of every text, of both sides.

    Returns:
        Mean and minimum cosine; relative error ||quantized - full|| / ||full|| over all vectors; their number; mean
        Spearman correlation of the scores of all texts for each query.
    """
    from scipy.stats import spearmanr

    first, second = (torch.cat(list(documents[name])).double() for name in ("full_precision", "quantized"))
    if not second.isfinite().all():
        raise ValueError("the quantized model gives values that are not finite; choose another scheme")
    cosines = torch.nn.functional.cosine_similarity(first, second, dim=1)
    scores = []
    for name, model in models.items():
        queries = model.encode_queries(texts[:QUERY_TEXTS], processor=processor)
        scores.append(model.score(queries, list(documents[name])).numpy())
    correlations = [spearmanr(*rows).statistic if len(texts) > 1 else 1.0 for rows in zip(*scores)]
    return {
        "texts": len(texts),
        "vectors": len(first),
        "cosine_mean": float(cosines.mean()),
        "cosine_minimum": float(cosines.min()),
        "relative_error": float((first - second).norm() / first.norm()),
        "score_rank_correlation": float(np.mean(correlations)),
    }


def _compare_outputs(models: Mapping[str, Any], processor: Any, texts: list[str]) -> dict[str, Any]:
    encoded = {name: model.encode_documents(texts, processor=processor) for name, model in models.items()}
    if _is_multi_vector(models["quantized"]):
        return compare_multi_vectors(models, processor, texts, encoded)
    return compare_embeddings(encoded["full_precision"], encoded["quantized"])


def _is_multi_vector(model: Any) -> bool:
    family = family_of_model_type(getattr(getattr(model, "config", None), "model_type", None))
    return family is not None and family.representation == "multi-vector"


def _heaviest(matrix: csr_matrix, row: int) -> set[int]:
    place = slice(matrix.indptr[row], matrix.indptr[row + 1])
    order = np.argsort(-matrix.data[place], kind="stable")[:TOP_TERMS]
    return set(matrix.indices[place][order].tolist())


def _overlap(expected: set, found: set) -> float:
    size = max(len(expected), len(found))
    return len(expected & found) / size if size else 1.0


def rank(model: Any, processor: Any, evaluation: EvaluationSet) -> dict[str, dict[str, float]]:
    """The `TOP_DOCUMENTS` best documents of every judged query, as `rarezoo eval` ranks them.

    Of sparse vectors only scores above 0 count; a document with the identifier of the query only where the judgements
    name that pair; equal scores rank by falling document id, which is trec_eval's order.

    Returns:
        {query id: {document id: score}}, best first.
    """
    judged = {query: text for query, text in evaluation.queries.items() if query in evaluation.qrels}
    options: dict[str, Any] = {"processor": processor, "show_progress_bar": True}
    if evaluation.language is not None:
        options["language"] = evaluation.language
    queries = model.encode_queries(list(judged.values()), **options)
    documents = model.encode_documents(list(evaluation.documents.values()), **options)
    names, multi_vector = list(evaluation.documents), _is_multi_vector(model)
    run = {}
    for row, query in enumerate(judged):
        if multi_vector:
            scores = model.score([queries[row]], documents)[0].numpy()
            candidates = np.arange(len(scores))
        else:
            scores = (documents @ queries[row].T).toarray().ravel()
            candidates = np.flatnonzero(scores > 0)
        itself = {query} - evaluation.qrels[query].keys()
        found = [(float(scores[i]), names[i]) for i in candidates if names[i] not in itself]
        run[query] = {name: score for score, name in sorted(found, reverse=True)[:TOP_DOCUMENTS]}
    return run


def compare_runs(
    full_precision: Mapping[str, Mapping[str, float]],
    quantized: Mapping[str, Mapping[str, float]],
    evaluation: EvaluationSet,
) -> dict[str, Any]:
    """nDCG@10 of two results of `rank`, and the mean share of the first documents that both have."""
    quality = {"full_precision": _ndcg(full_precision, evaluation), "quantized": _ndcg(quantized, evaluation)}
    overlaps = [_overlap(set(documents), set(quantized[query])) for query, documents in full_precision.items()]
    return {
        "queries": len(full_precision),
        "documents": len(evaluation.documents),
        "nDCG@10": {**quality, "change": quality["quantized"] - quality["full_precision"]},
        f"top_{TOP_DOCUMENTS}_document_overlap": float(np.mean(overlaps)),
    }


def _compare_retrieval(models: Mapping[str, Any], processor: Any, evaluation: EvaluationSet) -> dict[str, Any]:
    runs = {name: rank(model, processor, evaluation) for name, model in models.items()}
    return compare_runs(runs["full_precision"], runs["quantized"], evaluation)


def _ndcg(run: Mapping[str, Mapping[str, float]], evaluation: EvaluationSet) -> float:
    """Mean over all judged queries; one without results counts as 0, which a warning says."""
    import ir_measures

    # Ranks in place of scores: ir-measures' programs order equal scores differently.
    ranks = {
        query: {name: float(-place) for place, name in enumerate(documents)}
        for query, documents in run.items()
        if documents and query in evaluation.qrels
    }
    judged = {query: dict(grades) for query, grades in evaluation.qrels.items()}
    missing = [query for query in judged if query not in ranks]
    if missing:
        shown = f"{', '.join(map(repr, missing[:3]))}{', …' if len(missing) > 3 else ''}"
        warnings.warn(
            f"{len(missing)} of {len(judged)} judged queries have no results and count as 0: {shown}", stacklevel=3
        )
    values = [value.value for value in ir_measures.iter_calc([ir_measures.nDCG @ 10], judged, ranks)] if ranks else []
    return math.fsum(values) / len(judged)


def measure_latency(models: Mapping[str, Any], call: Callable[[Any], object]) -> dict[str, float]:
    """Median milliseconds of `call(model)`, one thread, the models taking turns, and how many times as fast the
    quantized one is.

    On a CPU it is processor time, which other programs of the machine disturb less than time on the wall.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with _one_thread():
        for model in models.values():
            call(model)
        for _ in range(LATENCY_ROUNDS):
            for name, model in models.items():
                clock = time.process_time if model.device.type == "cpu" else time.perf_counter
                start = clock()
                call(model)
                times[name].append((clock() - start) * 1000)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "speedup": medians["full_precision"] / medians["quantized"]}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_MEMORY_PROGRAM = """
import gc, importlib.util, json, sys, warnings
warnings.filterwarnings("ignore")
import psutil, torch, transformers
import rarezoo
from transformers import AutoProcessor
for library in ("bitsandbytes", "torchao"):  # their code is not the model's memory
    if importlib.util.find_spec(library):
        importlib.import_module(library)
folder, auto_class, item = sys.argv[1], sys.argv[2], json.loads(sys.stdin.read())
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
processor = AutoProcessor.from_pretrained(folder) if isinstance(item, str) else None
rarezoo.FAMILIES[transformers.AutoConfig.from_pretrained(folder).model_type].model_class(auto_class)
gc.collect()
before = psutil.Process().memory_info().rss
model = getattr(transformers, auto_class).from_pretrained(folder).eval()
if processor is not None:
    model.encode_documents([item], processor=processor)
else:
    with torch.no_grad():
        model(torch.tensor([item], device=model.device))
gc.collect()
print("resident", psutil.Process().memory_info().rss - before)
"""


def measure_memory(folders: Mapping[str, Path], auto_class: str, item: str | list[int]) -> dict[str, Any]:
    """Growth of resident memory, in bytes, by loading a checkpoint and one call, each in a new process.

    Args:
        folders: {"full_precision": folder, "quantized": folder}.
        auto_class: the AutoClass that opens them.
        item: the text that a retriever encodes, or the tokens that a language model reads.
    """
    children = {
        name: subprocess.Popen(
            [sys.executable, "-c", _MEMORY_PROGRAM, str(folder), auto_class],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, folder in folders.items()
    }
    sizes = {}
    for name, child in children.items():
        output, errors = child.communicate(json.dumps(item))
        found = [line.split()[1] for line in output.splitlines() if line.startswith("resident ")]
        if child.returncode or not found:
            raise RuntimeError(f"measuring the memory of the {name} model failed:\n{errors[-2000:]}")
        sizes[name] = int(found[0])
    return {**sizes, "ratio": sizes["quantized"] / sizes["full_precision"]}


def weight_file_bytes(folder: Path) -> int:
    """Size of a checkpoint's weight files, in bytes."""
    return sum(path.stat().st_size for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))


def measure_fidelity(
    folders: Mapping[str, Path],
    texts: list[str] | None = None,
    evaluation: EvaluationSet | None = None,
) -> dict[str, Any]:
    """Compare two checkpoint folders of one model.

    Args:
        folders: {"full_precision": folder, "quantized": folder}.
        texts: texts to encode, or to predict; defaults to the evaluation set's documents, or to
            `sample_documentation()`. A language model without a tokenizer is compared on random symbols.
        evaluation: adds nDCG@10 of both retrievers.

    Returns:
        Sections `outputs`, `retrieval` (None without an evaluation set), `file_bytes`, `resident_bytes`, and
        `encode_milliseconds` of a retriever or `forward_milliseconds` of a language model.

    Raises:
        ValueError: the quantized model's outputs are not finite; an evaluation set for a language model, or texts for
            one without a tokenizer.
    """
    family, _ = load_config(folders["quantized"])
    measures = _language_model_measures if family.representation == "text" else _retriever_measures
    files = {name: weight_file_bytes(folder) for name, folder in folders.items()}
    steps: dict[str, Callable[[], Any]] = {
        **measures(folders, texts, evaluation),
        "file_bytes": lambda: {**files, "ratio": files["quantized"] / files["full_precision"]},
    }
    return {name: measure() for name, measure in tqdm(steps.items(), desc="Comparing with full precision", unit="step")}


def _load_models(folders: Mapping[str, Path], auto_class: str) -> dict[str, Any]:
    models = {name: load_model(folder, auto_class) for name, folder in folders.items()}
    # bitsandbytes loads onto a GPU by itself where there is one.
    models["full_precision"].to(models["quantized"].device)
    return models


def _retriever_measures(
    folders: Mapping[str, Path], texts: list[str] | None, evaluation: EvaluationSet | None
) -> dict[str, Callable[[], Any]]:
    compared = texts or (list(evaluation.documents.values())[:256] if evaluation else sample_documentation())
    processor = load_processor(folders["quantized"])
    models = _load_models(folders, "AutoModel")
    batch = compared[:LATENCY_TEXTS]

    def latency() -> dict[str, Any]:
        times = measure_latency(models, lambda model: model.encode_documents(batch, processor=processor))
        return {**times, "batch_size": len(batch)}

    return {
        "outputs": lambda: _compare_outputs(models, processor, compared),
        "retrieval": lambda: _compare_retrieval(models, processor, evaluation) if evaluation else None,
        "encode_milliseconds": latency,
        "resident_bytes": lambda: measure_memory(folders, "AutoModel", compared[0]),
    }


def _language_model_measures(
    folders: Mapping[str, Path], texts: list[str] | None, evaluation: EvaluationSet | None
) -> dict[str, Callable[[], Any]]:
    if evaluation is not None:
        raise ValueError(NO_RANKING)
    tokenizer = load_tokenizer(folders["quantized"])
    if texts and tokenizer is None:
        raise ValueError(
            f"{folders['full_precision']} has no tokenizer for the texts: save one into it, or leave them out and "
            "compare on random symbols"
        )
    models = _load_models(folders, "AutoModelForCausalLM")
    vocab_size = models["quantized"].config.vocab_size
    if tokenizer is None:
        rows, origin = random_tokens(vocab_size), "random symbols"
    else:
        origin = "given texts" if texts else "documentation of Python's built-ins"
        rows = tokenized(tokenizer, texts or sample_documentation(), vocab_size)
    longest = max(rows, key=len)

    @torch.no_grad()
    def forward(model: Any) -> None:
        model(longest[None].to(model.device))

    return {
        "outputs": lambda: {"on": origin, **compare_next_tokens(models["full_precision"], models["quantized"], rows)},
        "retrieval": lambda: None,
        "forward_milliseconds": lambda: {**measure_latency(models, forward), "tokens": len(longest)},
        "resident_bytes": lambda: measure_memory(folders, "AutoModelForCausalLM", longest.tolist()),
    }


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as a page for people."""
    lines = [f"# {report['scheme']}: what quantization changed", "", report["summary"]]
    if report["quantized_modules"]:
        lines.append(
            f"{report['quantized_modules']} modules quantized by {report['library']}, the rest in "
            f"{report['compute_dtype']}. Not quantized: {', '.join(report['full_precision_modules'])}."
        )
    lines.append("")
    if "outputs" not in report:
        return "\n".join(lines)
    outputs = report["outputs"]
    rows = [
        ("weight files, MB", report["file_bytes"], 1e6, ".1f"),
        ("resident memory, MB", report["resident_bytes"], 1e6, ".1f"),
    ]
    if "perplexity" in outputs:
        times = report["forward_milliseconds"]
        rows.append((f"reading {times['tokens']} tokens, one thread, ms", times, 1, ".1f"))
        rows.append(("perplexity", outputs["perplexity"], 1, ".3f"))
    else:
        times = report["encode_milliseconds"]
        rows.append((f"encoding {times['batch_size']} texts, one thread, ms", times, 1, ".1f"))
    if "active_dimensions" in outputs:
        rows.append(("active dimensions per text", outputs["active_dimensions"], 1, ".1f"))
    if report.get("retrieval"):
        rows.append(("nDCG@10", report["retrieval"]["nDCG@10"], 1, ".4f"))
    lines += ["| | full precision | quantized |", "|---|---|---|"]
    for title, values, unit, form in rows:
        cells = [format(values[name] / unit, form) for name in ("full_precision", "quantized")]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} |")
    lines += ["", _outputs_in_words(outputs)]
    if report.get("retrieval"):
        shared = report["retrieval"][f"top_{TOP_DOCUMENTS}_document_overlap"]
        lines.append(f"Of the first {TOP_DOCUMENTS} documents of a query, {shared:.1%} are the same.")
    return "\n".join([*lines, ""])


def _outputs_in_words(outputs: Mapping[str, Any]) -> str:
    if "perplexity" in outputs:
        divergence = outputs["divergence_nats"]
        return (
            f"On {outputs['tokens']} tokens of {outputs['texts']} texts ({outputs['on']}): perplexity "
            f"{outputs['perplexity']['change']:+.2%}; Kullback-Leibler divergence from full precision "
            f"{divergence['mean']:.5f} nats on average and {divergence['maximum']:.4f} at most; the likeliest next "
            f"token is the same at {outputs['top_1_agreement']:.1%} of the positions."
        )
    return (
        f"On {outputs['texts']} texts: cosine {outputs['cosine_mean']:.4f} on average and "
        f"{outputs['cosine_minimum']:.4f} at least, relative error {outputs['relative_error']:.4f}, "
        + (
            f"{outputs[f'top_{TOP_TERMS}_term_overlap']:.1%} of the {TOP_TERMS} heaviest terms shared."
            if "active_dimensions" in outputs
            else f"rank correlation of MaxSim scores {outputs['score_rank_correlation']:.4f}."
        )
    )
