"""What the tours of all families share: folder, headings, BM25, the process without rarezoo, quantization."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from transformers import TrainerCallback

FIGURES_FILE = "quickstart.json"

# Runs in a process of its own that cannot import rarezoo, as on a machine where it is not installed.
_WITHOUT_RAREZOO = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "rarezoo":
            raise ImportError("rarezoo is not installed here")
sys.meta_path.insert(0, Refuse())
import json
from transformers import AutoModel, AutoProcessor
folder, query, encoding, loadings = sys.argv[1], *map(json.loads, sys.argv[2:])
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
answers = []
for loading in loadings:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **loading)
    (vectors,) = model.encode_queries([query], processor, **encoding)
    answers.append({"class": type(model).__module__.split(".")[0] + "…" + type(model).__name__,
                    "bytes": sum(weight.nbytes for weight in model.parameters()),
                    "vectors": (vectors.toarray() if hasattr(vectors, "toarray") else vectors).tolist()})
print(json.dumps(answers))
"""


def claim_folder(output: Path, written: Iterable[str]) -> None:
    """Make the folder, without what an earlier tour left there; its file of figures tells that it is one.

    Args:
        output: the tour's folder.
        written: names of the folders that the tour writes there.

    Raises:
        FileExistsError: it holds something else.
    """
    if output.exists() and not (output / FIGURES_FILE).exists() and (output.is_file() or any(output.iterdir())):
        raise FileExistsError(f"{output} holds other files; choose a new folder for the quickstart")
    output.mkdir(parents=True, exist_ok=True)
    (output / FIGURES_FILE).write_text("{}\n", encoding="utf-8")
    for name in written:
        shutil.rmtree(output / name, ignore_errors=True)


def title(text: str) -> None:
    """The heading of a station."""
    typer.secho(f"\n{text}", bold=True)


def show(label: str, text: str) -> None:
    """A labelled text, in one line."""
    typer.echo(f"  {label + ':':8} {shortened(text)}")


def shortened(text: str) -> str:
    """The beginning of a text, at most 100 characters."""
    return textwrap.shorten(text, 100, placeholder=" …")


def write_corpus(path: Path, documents: Mapping[str, str]) -> None:
    """JSON lines of `_id` and `text`, as `rarezoo search --corpus` reads them."""
    lines = [json.dumps({"_id": name, "text": text}, ensure_ascii=False) + "\n" for name, text in documents.items()]
    path.write_text("".join(lines), encoding="utf-8")


def rank_with_bm25(documents: Mapping[str, str], queries: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The ten best documents of every query by bm25s with its default settings: {query id: {document id: score}}."""
    import bm25s

    names = list(documents)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(documents.values()), show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(list(queries.values()), show_progress=False)
    found, scores = index.retrieve(tokens, k=min(10, len(names)), show_progress=False)
    return {
        query: {names[i]: float(score) for i, score in zip(row, row_scores)}
        for query, row, row_scores in zip(queries, found, scores)
    }


def encode_without_rarezoo(
    model_folder: Path,
    query: str,
    encoding: Mapping[str, Any] | None = None,
    loadings: Sequence[Mapping[str, Any]] = ({},),
) -> list[dict[str, Any]]:
    """Load a checkpoint with `trust_remote_code=True` in a process that cannot import rarezoo, and encode a query.

    Args:
        model_folder: the checkpoint.
        query: the text.
        encoding: arguments of `encode_queries`.
        loadings: further arguments of `AutoModel.from_pretrained`, once for every answer.

    Returns:
        Per loading the model's `class`, the `bytes` of its weights, and the query's `vectors` as (nested) lists.

    Raises:
        RuntimeError: it cannot be loaded there.
    """
    arguments = [json.dumps(value) for value in (query, encoding or {}, list(loadings))]
    command = [sys.executable, "-c", _WITHOUT_RAREZOO, str(model_folder.resolve()), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if finished.returncode:
        raise RuntimeError(f"loading with trust_remote_code failed:\n{finished.stderr.strip()}")
    return json.loads(finished.stdout.strip().splitlines()[-1])


class QualityCurve(TrainerCallback):
    """Measures a model before training, every few steps, and at the end.

    Args:
        measure: takes the model and its processor.
        every: steps.

    Attributes:
        points: what was measured, as (step, value).
    """

    def __init__(self, measure: Callable[[Any, Any], Any], every: int):
        self.measure = measure
        self.every = every
        self.points: list[tuple[int, Any]] = []

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        self._add(state, model, processing_class)

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._add(state, model, processing_class)

    def _add(self, state, model, processor):
        self.points.append((state.global_step, self.measure(model, processor)))


def read_losses(model_folder: Path) -> list[dict[str, float]]:
    """The log entries of a training run that hold its losses."""
    log = json.loads((model_folder / "training_log.json").read_text(encoding="utf-8"))
    return [entry for entry in log if "ranking_loss" in entry]


def quantize_and_show(
    model_folder: Path,
    folder: Path,
    kept: tuple[str, str],
    change: Callable[[Path, Mapping[str, Any]], float],
    **arguments: Any,
) -> dict[str, dict[str, Any]]:
    """Quantize in 4 and in 8 bits, with one line on each.

    Args:
        model_folder: the checkpoint.
        folder: gets one folder per scheme.
        kept: what the outputs keep, between 0 and 1: its name, and its key in the report's `outputs`.
        change: of nDCG@10, from the folder of the quantized checkpoint and its report.
        arguments: of `quantize`.

    Returns:
        The report of each scheme.
    """
    from rarezoo.quantization import quantize

    name, key = kept
    typer.echo(f"{'scheme':8} {'file':>9} {'of full':>8} {'cosine':>8} {name:>18} {'nDCG@10 change':>15}")
    reports = {}
    for scheme in ("nf4", "int8"):
        report = quantize(model_folder, folder / scheme, scheme, compute_dtype="bfloat16", **arguments)
        outputs, files = report["outputs"], report["file_bytes"]
        typer.echo(
            f"{scheme:8} {files['quantized'] / 1e6:6.1f} MB {files['ratio']:8.2f} {outputs['cosine_mean']:8.4f} "
            f"{outputs[key]:18.1%} {change(folder / scheme, report):+15.4f}"
        )
        reports[scheme] = report
    return reports


def finish(output: Path, figures: dict[str, Any], started: float, example: str) -> None:
    """Write the figures and say how to go on.

    Args:
        output: the tour's folder, with `model`, `index` and `corpus.jsonl`.
        figures: gets the `seconds` since `started`, by `time.perf_counter()`.
        example: the end of a `rarezoo search` command.
    """
    figures["seconds"] = round(time.perf_counter() - started)
    text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
    (output / FIGURES_FILE).write_text(text, encoding="utf-8")
    typer.echo(f"\nDone in {figures['seconds']} s. Everything is in {output}; try\n")
    program = "rarezoo" if shutil.which("rarezoo") else os.path.relpath(Path(sys.executable).parent / "rarezoo")
    places = f"{output / 'index'} --model {output / 'model'} --corpus {output / 'corpus.jsonl'}"
    typer.echo(f"    {program} search {places} {example}\n")
