"""The Mistral-SPLADE tour: learn on this machine's documentation strings, save, load, search, explain, quantize."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from transformers.utils import logging

from rarezoo.cli.docstring_corpus import DocstringPair, read_docstring_pairs
from rarezoo.cli.quickstart_stations import (
    QualityCurve,
    claim_folder,
    encode_without_rarezoo,
    finish,
    quantize_and_show,
    rank_with_bm25,
    read_losses,
    search_command,
    shortened,
    show,
    title,
    write_corpus,
)

DOCUMENTS = 4000
FURTHER_PAIRS = 4000
HELD_OUT_QUERIES = 800
STEPS = 90
QUESTIONS = (
    "read the rows of a csv file",
    "open a zip archive",
    "wait until a thread has finished",
)


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
    claim_folder(output, ("model", "index", "embeddings", "quantized"))
    found = read_docstring_pairs(documents + further_pairs, seed)
    tour = _Tour(output, found[:documents], found[documents:], seed)
    tour.train(steps)
    tour.load_without_rarezoo()
    tour.build_index()
    tour.answer(QUESTIONS)
    tour.quantize()
    tour.draw()
    finish(output, tour.figures, started, search_command(output, '"parse command line options"'))
    return tour.figures


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
        title("1. Real text on this machine")
        typer.echo(f"{len(pairs):,} documentation strings: the first sentence asks, the rest answers.")
        typer.echo(f"{held_out} first sentences are held out as queries over these documents.")
        typer.echo(
            f"The other {len(pairs) - held_out:,} pairs, and {len(further):,} further ones, are there to learn from."
        )
        show("query", self.pairs[0].query)
        show("answer", self.pairs[0].document)

    @property
    def qrels(self) -> dict[str, dict[str, int]]:
        return {pair.name: {pair.name: 1} for pair in self.held_out}

    def train(self, steps: int) -> None:
        """From nothing but the texts: a tokenizer, weights that match words by their rarity, then training."""
        from transformers import AutoModel, AutoProcessor

        from rarezoo.training import SparseTrainingRecipe, train

        title("2. Train a small Mistral-SPLADE on it")
        recipe = SparseTrainingRecipe.small_from_scratch(max_steps=steps, logging_steps=5, seed=self.seed)
        rows = [{"query": pair.query, "positive": pair.document} for pair in self.training]
        self.figures["nDCG@10"] = {"BM25": self.bm25()}
        logging.enable_progress_bar()
        curve = QualityCurve(self.evaluate, every=max(steps // 3, 1))
        result = train(recipe, self.model_folder, rows=rows, callbacks=[curve])
        logging.disable_progress_bar()
        self.model = AutoModel.from_pretrained(self.model_folder)
        self.processor = AutoProcessor.from_pretrained(self.model_folder)
        self.history, self.curve = read_losses(self.model_folder), curve.points
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
        """nDCG@10 of BM25 on the same queries and documents."""
        from rarezoo.retrieval import evaluate_run

        documents = {pair.name: pair.document for pair in self.pairs}
        run = rank_with_bm25(documents, {pair.name: pair.query for pair in self.held_out})
        return evaluate_run(run, self.qrels, ["nDCG@10"])["nDCG@10"]

    def load_without_rarezoo(self) -> None:
        title("3. Load it in a process that has never heard of rarezoo")
        query = self.held_out[0].query
        (there,) = encode_without_rarezoo(self.model_folder, query)
        same = there["vectors"] == self.model.encode_queries([query], self.processor).toarray().tolist()
        self.figures["same vector without rarezoo"] = same
        typer.echo(f"AutoModel.from_pretrained({str(self.model_folder)!r}, trust_remote_code=True)")
        typer.echo(f"{there['class']}: {'the same vector, bit for bit' if same else 'ANOTHER VECTOR'}")

    def build_index(self) -> None:
        from rarezoo.retrieval import Document, build_index, encode_corpus

        title("4. Index the corpus")
        documents = [Document(pair.name, pair.document) for pair in self.pairs]
        write_corpus(self.output / "corpus.jsonl", {pair.name: pair.document for pair in self.pairs})
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

        title("5. Ask")
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
                typer.echo(f"          {shortened(texts[name])}")

    def quantize(self) -> None:
        from rarezoo.quantization import EvaluationSet

        title("6. Quantize the layers, the rest in bfloat16")
        queries, documents = self.held_out[:200], self.pairs[: len(self.held_out) * 2]
        self.figures["quantized"] = quantize_and_show(
            self.model_folder,
            self.output / "quantized",
            columns={
                "cosine": lambda _, report: f"{report['outputs']['cosine_mean']:.4f}",
                "top-10 terms kept": lambda _, report: f"{report['outputs']['top_10_term_overlap']:.1%}",
                "nDCG@10 change": lambda _, report: f"{report['retrieval']['nDCG@10']['change']:+.4f}",
            },
            evaluation=EvaluationSet(
                queries={pair.name: pair.query for pair in queries},
                documents={pair.name: pair.document for pair in documents},
                qrels={pair.name: self.qrels[pair.name] for pair in queries},
            ),
        )

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
