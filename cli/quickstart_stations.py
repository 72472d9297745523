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

from rarezoo.cli.output import megabytes

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
"""

_ENCODE = """
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

_PREDICT = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, arguments = sys.argv[1], *map(json.loads, sys.argv[2:])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
arguments = {name: torch.tensor(value) for name, value in arguments.items()}
with torch.no_grad():
    logits = model(**tokenizer([text], return_tensors="pt"), **arguments).logits
print(json.dumps({"class": type(model).__module__.split(".")[0] + "…" + type(model).__name__,
                  "logits": logits[0].tolist()}))
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
    return _run_without_rarezoo(_ENCODE, model_folder, query, encoding or {}, list(loadings))


def predict_without_rarezoo(model_folder: Path, text: str, **arguments: list[int]) -> dict[str, Any]:
    """The same for a language model and its tokenizer.

    Args:
        model_folder: the checkpoint.
        text: what the model reads.
        arguments: of the model, made tensors.

    Returns:
        The model's `class`, and its `logits` at every token of the text, as nested lists.

    Raises:
        RuntimeError: it cannot be loaded there.
    """
    return _run_without_rarezoo(_PREDICT, model_folder, text, arguments)


def _run_without_rarezoo(program: str, model_folder: Path, *values: Any) -> Any:
    """What a program prints as JSON, given the folder and the values as JSON, where rarezoo cannot be imported."""
    arguments = [str(model_folder.resolve()), *map(json.dumps, values)]
    command = [sys.executable, "-c", _WITHOUT_RAREZOO + program, *arguments]
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
    columns: Mapping[str, Callable[[Path, Mapping[str, Any]], str]],
    **arguments: Any,
) -> dict[str, dict[str, Any]]:
    """Quantize in 4 and in 8 bits, with one line on each.

    Args:
        model_folder: the checkpoint.
        folder: gets one folder per scheme.
        columns: what the line tells besides the size: names, and functions of the folder of the quantized checkpoint
            and of its report.
        arguments: of `quantize`.

    Returns:
        The report of each scheme.
    """
    from rarezoo.quantization import quantize
    from rarezoo.quantization.fidelity import weight_file_bytes
    from rarezoo.quantization.quantize import quiet_casts

    widths = {name: max(8, len(name) + 1) for name in columns}
    header = "".join(f" {name:>{width}}" for name, width in widths.items())
    typer.echo(f"{'scheme':8} {'file':>9} {'of full':>8}{header}")
    reports = {}
    for scheme in ("nf4", "int8"):
        report = quantize(model_folder, folder / scheme, scheme, compute_dtype="bfloat16", **arguments)
        size = weight_file_bytes(folder / scheme)
        ratio = size / weight_file_bytes(model_folder)
        with quiet_casts():
            cells = "".join(f" {tell(folder / scheme, report):>{widths[name]}}" for name, tell in columns.items())
        typer.echo(f"{scheme:8} {megabytes(size):>9} {ratio:8.2f}{cells}")
        reports[scheme] = report
    return reports


def search_command(output: Path, question: str) -> str:
    """How to ask the tour's `index`, of `model` and `corpus.jsonl`, from the command line."""
    return f"search {output / 'index'} --model {output / 'model'} --corpus {output / 'corpus.jsonl'} {question}"


def finish(output: Path, figures: dict[str, Any], started: float, command: str) -> None:
    """Write the figures and say how to go on.

    Args:
        output: the tour's folder.
        figures: gets the `seconds` since `started`, by `time.perf_counter()`.
        command: of `rarezoo`, to try.
    """
    figures["seconds"] = round(time.perf_counter() - started)
    text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
    (output / FIGURES_FILE).write_text(text, encoding="utf-8")
    typer.echo(f"\nDone in {figures['seconds']} s. Everything is in {output}; try\n")
    program = "rarezoo" if shutil.which("rarezoo") else os.path.relpath(Path(sys.executable).parent / "rarezoo")
    typer.echo(f"    {program} {command}\n")
