"""The Mistral-SPLADE tour: learn on this machine's documentation strings, save, load, search, explain, quantize."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from transformers import TrainerCallback
from transformers.utils import logging

from rarezoo.cli.docstring_corpus import DocstringPair, read_docstring_pairs

DOCUMENTS = 4000
FURTHER_PAIRS = 4000
HELD_OUT_QUERIES = 800
STEPS = 90
FIGURES_FILE = "quickstart.json"
QUESTIONS = (
    "read the rows of a csv file",
    "open a zip archive",
    "wait until a thread has finished",
)

# Runs in a process of its own that cannot import rarezoo, as on a machine where it is not installed.
_LOAD_WITHOUT_RAREZOO = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "rarezoo":
            raise ImportError("rarezoo is not installed here")
sys.meta_path.insert(0, Refuse())
import json
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
row = model.encode_queries([sys.argv[2]], processor)
print(json.dumps({"class": type(model).__module__.split(".")[0] + "…" + type(model).__name__,
                  "indices": row.indices.tolist(), "weights": row.data.tolist()}))
"""


def run(
    output: Path, documents: int = DOCUMENTS, further_pairs: int = FURTHER_PAIRS, steps: int = STEPS, seed: int = 0
) -> dict[str, Any]:
    """Run the tour and return its figures.

    Args:
        output: folder for the checkpoint, the index, the quantized copies and the picture: new, empty, or that of an
            earlier tour, which is replaced.
        documents: documentation strings in the corpus; some of their first sentences are held out as queries, the
            others train.
        further_pairs: documentation strings that only train.
        steps: optimiser steps.
        seed: of the split and of the training.

    Raises:
        FileExistsError: the folder holds something else.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # those of loading and saving, a moment each
    started = time.perf_counter()
    _claim_folder(output)
    found = read_docstring_pairs(documents + further_pairs, seed)
    tour = _Tour(output, found[:documents], found[documents:], seed)
    tour.train(steps)
    tour.load_without_rarezoo()
    tour.build_index()
    tour.answer(QUESTIONS)
    tour.quantize()
    tour.draw()
    tour.figures["seconds"] = round(time.perf_counter() - started)
    (output / FIGURES_FILE).write_text(json.dumps(tour.figures, indent=2) + "\n", encoding="utf-8")
    typer.echo(f"\nDone in {tour.figures['seconds']} s. Everything is in {output}; try\n")
    program = "rarezoo" if shutil.which("rarezoo") else os.path.relpath(Path(sys.executable).parent / "rarezoo")
    places = f"{output / 'index'} --model {output / 'model'} --corpus {output / 'corpus.jsonl'}"
    typer.echo(f'    {program} search {places} "parse command line options"\n')
    return tour.figures


def _claim_folder(output: Path) -> None:
    """Make the folder, without what an earlier tour left there; its file of figures tells that it is one."""
    if output.exists() and not (output / FIGURES_FILE).exists() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"{output} holds other files; choose a new folder for the quickstart")
    output.mkdir(parents=True, exist_ok=True)
    (output / FIGURES_FILE).write_text("{}\n", encoding="utf-8")
    for name in ("model", "index", "embeddings", "quantized"):
        shutil.rmtree(output / name, ignore_errors=True)


class _Tour:
    """The stations of the tour; `figures` collects what they measured."""

    def __init__(self, output: Path, pairs: list[DocstringPair], further: list[DocstringPair], seed: int):
        self.output = output
        self.model_folder = output / "model"
        self.pairs = random.Random(seed).sample(pairs, len(pairs))
        self.seed = seed
        held_out = min(HELD_OUT_QUERIES, len(pairs) // 5)
        self.held_out, self.training = self.pairs[:held_out], self.pairs[held_out:] + further
        self.figures: dict[str, Any] = {
            "documents": len(pairs),
            "held-out queries": held_out,
            "training pairs": len(self.training),
        }
        self.history: list[dict[str, float]] = []
        self.curve: list[tuple[int, float]] = []
        _title("1. Real text on this machine")
        typer.echo(f"{len(pairs):,} documentation strings: the first sentence asks, the rest answers.")
        typer.echo(f"{held_out} first sentences are held out as queries over these documents.")
        typer.echo(
            f"The other {len(pairs) - held_out:,} pairs, and {len(further):,} further ones, are there to learn from."
        )
        _show("query", self.pairs[0].query)
        _show("answer", self.pairs[0].document)

    @property
    def qrels(self) -> dict[str, dict[str, int]]:
        return {pair.name: {pair.name: 1} for pair in self.held_out}

    def train(self, steps: int) -> None:
        """From nothing but the texts: a tokenizer, weights that match words by their rarity, then training."""
        from transformers import AutoModel, AutoProcessor

        from rarezoo.training import SparseTrainingRecipe, train

        _title("2. Train a small Mistral-SPLADE on it")
        recipe = SparseTrainingRecipe.small_from_scratch(max_steps=steps, logging_steps=5, seed=self.seed)
        rows = [{"query": pair.query, "positive": pair.document} for pair in self.training]
        self.figures["nDCG@10"] = {"BM25": self.bm25()}
        logging.enable_progress_bar()
        result = train(recipe, self.model_folder, rows=rows, callbacks=[_Curve(self, every=max(steps // 3, 1))])
        logging.disable_progress_bar()
        self.model = AutoModel.from_pretrained(self.model_folder)
        self.processor = AutoProcessor.from_pretrained(self.model_folder)
        log = json.loads((self.model_folder / "training_log.json").read_text(encoding="utf-8"))
        self.history = [entry for entry in log if "ranking_loss" in entry]
        weights = sum(weight.numel() for weight in self.model.parameters())
        quality = self.figures["nDCG@10"] | {"before": self.curve[0][1], "after": self.curve[-1][1]}
        self.figures["nDCG@10"] = quality
        self.figures["active dimensions"] = {
            side: round(self.history[-1][f"{side}_active_dimensions"], 1) for side in ("query", "document")
        }
        typer.echo(
            f"{weights:,} weights, {len(self.processor.tokenizer):,} tokens; {steps} steps of {recipe.batch_size} "
            f"pairs in {result['train_runtime']:.0f} s, measurements included"
        )
        typer.echo(
            f"nDCG@10   before training {quality['before']:.3f}   after {quality['after']:.3f}   "
            f"BM25 {quality['BM25']:.3f}"
        )
        typer.echo(f"active dimensions: {self.figures['active dimensions']}; saved to {self.model_folder}")

    def evaluate(self, model: Any, processor: Any) -> float:
        """nDCG@10 of the held-out queries over all documents."""
        from rarezoo.retrieval import evaluate_run

        queries = model.encode_queries([pair.query for pair in self.held_out], processor, batch_size=64)
        documents = model.encode_documents([pair.document for pair in self.pairs], processor, batch_size=64)
        return evaluate_run(self._ranking(queries, documents), self.qrels, ["nDCG@10"])["nDCG@10"]

    def _ranking(self, queries: Any, documents: Any) -> dict[str, dict[str, float]]:
        run = {}
        for pair, row in zip(self.held_out, (queries @ documents.T).tocsr()):
            best = row.data.argsort()[::-1][:10]
            run[pair.name] = {self.pairs[row.indices[i]].name: float(row.data[i]) for i in best}
        return run

    def bm25(self) -> float:
        """nDCG@10 of bm25s with its default settings on the same queries and documents."""
        import bm25s

        from rarezoo.retrieval import evaluate_run

        index = bm25s.BM25()
        index.index(bm25s.tokenize([pair.document for pair in self.pairs], show_progress=False), show_progress=False)
        queries = bm25s.tokenize([pair.query for pair in self.held_out], show_progress=False)
        found, scores = index.retrieve(queries, k=10, show_progress=False)
        run = {
            pair.name: {self.pairs[i].name: float(score) for i, score in zip(row, row_scores)}
            for pair, row, row_scores in zip(self.held_out, found, scores)
        }
        return evaluate_run(run, self.qrels, ["nDCG@10"])["nDCG@10"]

    def load_without_rarezoo(self) -> None:
        _title("3. Load it in a process that has never heard of rarezoo")
        query = self.held_out[0].query
        command = [sys.executable, "-c", _LOAD_WITHOUT_RAREZOO, str(self.model_folder.resolve()), query]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f"loading with trust_remote_code failed:\n{finished.stderr.strip()}")
        there = json.loads(finished.stdout.strip().splitlines()[-1])
        here = self.model.encode_queries([query], self.processor)
        same = there["indices"] == here.indices.tolist() and there["weights"] == here.data.tolist()
        self.figures["same vector without rarezoo"] = same
        typer.echo(f"AutoModel.from_pretrained({str(self.model_folder)!r}, trust_remote_code=True)")
        typer.echo(f"{there['class']}: {'the same vector, bit for bit' if same else 'ANOTHER VECTOR'}")

    def build_index(self) -> None:
        from rarezoo.retrieval import Document, build_index, encode_corpus

        _title("4. Index the corpus")
        documents = [Document(pair.name, pair.document) for pair in self.pairs]
        lines = [json.dumps({"_id": document.id, "text": document.text}) + "\n" for document in documents]
        (self.output / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
        start = time.perf_counter()
        embeddings = encode_corpus(self.model, self.processor, documents, self.output / "embeddings", batch_size=64)
        encoded = time.perf_counter()
        index: Any = build_index(embeddings, self.output / "index")
        self.index = index
        built = time.perf_counter()
        size = sum(path.stat().st_size for path in (self.output / "index").iterdir())
        typer.echo(
            f"{len(documents):,} documents encoded in {encoded - start:.1f} s, indexed in {built - encoded:.2f} s: "
            f"{self.index.num_postings:,} postings, {size / 1e6:.1f} MB on disk"
        )

    def answer(self, questions: Sequence[str]) -> None:
        from rarezoo.cli.explain import printable

        _title("5. Ask")
        texts = {pair.name: pair.document for pair in self.pairs}
        for question in questions:
            row = self.model.encode_queries([question], self.processor)
            typer.secho(f"\n{question}?", fg="cyan")
            for name, score in self.index.search(row, top_k=2)[0]:
                typer.echo(f"  {score:6.2f}  {name}")
                terms = self.index.matched_terms(row, name)
                matched = [
                    f"{printable(self.processor.token(term.vocabulary_index))} "
                    f"{term.query_weight * term.document_weight:.2f}"
                    for term in terms[:8]
                ]
                typer.echo(f"          matched: {'  '.join(matched)}")
                typer.echo(f"          {textwrap.shorten(texts[name], 100, placeholder=' …')}")

    def quantize(self) -> None:
        from rarezoo.quantization import EvaluationSet, quantize

        _title("6. Quantize the layers, the rest in bfloat16")
        queries, documents = self.held_out[:200], self.pairs[: len(self.held_out) * 2]
        evaluation = EvaluationSet(
            queries={pair.name: pair.query for pair in queries},
            documents={pair.name: pair.document for pair in documents},
            qrels={pair.name: self.qrels[pair.name] for pair in queries},
        )
        self.figures["quantized"] = {}
        typer.echo(
            f"{'scheme':8} {'file':>9} {'of full':>8} {'cosine':>8} {'top-10 terms kept':>18} {'nDCG@10 change':>15}"
        )
        for scheme in ("nf4", "int8"):
            folder = self.output / "quantized" / scheme
            report = quantize(self.model_folder, folder, scheme, compute_dtype="bfloat16", evaluation=evaluation)
            self.figures["quantized"][scheme] = report
            typer.echo(_quantization_line(scheme, report))

    def draw(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
        history = self.history[1:] or self.history  # the first entry is of one batch, the others are means of several
        steps = [entry["step"] for entry in history]
        axes[0].plot(steps, [entry["ranking_loss"] for entry in history])
        axes[0].set_title("InfoNCE loss")
        for side in ("query", "document"):
            axes[1].plot(steps, [entry[f"{side}_active_dimensions"] for entry in history], label=side)
        axes[1].set_title("active dimensions")
        axes[1].set_ylim(bottom=0)
        axes[1].legend()
        axes[2].plot(*zip(*self.curve), marker="o", label="Mistral-SPLADE")
        axes[2].axhline(self.figures["nDCG@10"]["BM25"], color="grey", linestyle="--", label="BM25")
        axes[2].set_title("nDCG@10, held-out queries")
        axes[2].legend()
        for axis in axes:
            axis.set_xlabel("step")
        figure.savefig(self.output / "training.png", dpi=120)
        pyplot.close(figure)
        typer.echo(f"\nLoss, active dimensions and nDCG@10 over training: {self.output / 'training.png'}")


class _Curve(TrainerCallback):
    """Measures nDCG@10 before training, every few steps, and at the end."""

    def __init__(self, tour: _Tour, every: int):
        self.tour = tour
        self.every = every

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        self._measure(state, model, processing_class)

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state, model, processing_class)

    def _measure(self, state, model, processor):
        self.tour.curve.append((state.global_step, self.tour.evaluate(model, processor)))


def _quantization_line(scheme: str, report: dict[str, Any]) -> str:
    outputs, files = report["outputs"], report["file_bytes"]
    return (
        f"{scheme:8} {files['quantized'] / 1e6:6.1f} MB {files['ratio']:8.2f} {outputs['cosine_mean']:8.4f} "
        f"{outputs['top_10_term_overlap']:18.1%} {report['retrieval']['nDCG@10']['change']:+15.4f}"
    )


def _title(text: str) -> None:
    typer.secho(f"\n{text}", bold=True)


def _show(label: str, text: str) -> None:
    typer.echo(f"  {label + ':':8} {textwrap.shorten(text, 100, placeholder=' …')}")
