"""The tour of tokenizer transplantation: learn from this machine's text, get other tokenizers by several methods, learn
on with the embeddings alone, store the transplant by its matrix, load without the package, write."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from transformers.utils import logging

from rarezoo.cli.docstring_corpus import read_docstrings
from rarezoo.cli.output import megabytes
from rarezoo.cli.quickstart_stations import claim_folder, finish, predict_without_rarezoo, show, title
from rarezoo.cli.tiny_language_model import (
    HELD_OUT_CHARACTERS,
    SEQUENCE_LENGTH,
    SPECIAL_TOKENS,
    bits_per_byte,
    context_vectors,
    learn_texts,
    new_language_model,
)

STEPS = 1000
DONOR_STEPS = 400
AFTERCARE_STEPS = 100
HELD_OUT = 150
PICTURE = "bits_per_byte.png"
_BASE_TOKENS, _NEW_TOKENS = 1_000, 2_500
_HIDDEN_SIZE, _DONOR_HIDDEN_SIZE = 64, 48
_WORDS, _SUPERTOKENS = "another BPE", "supertokens"
_FOLDERS = ("model", "transplanted", "trained", "stored")
# Methods and their options, the baselines first. The donor is a model that already speaks the new tokenizer.
_BASELINES = ("normal", "mean")
_METHODS: dict[str, dict[str, Any]] = {
    "normal": {},
    "mean": {},
    "retok": {},
    "tokenadapt": {},
    "focus": {},
    "omp": {"k": 16},
}
_NEEDS = {
    "normal": "nothing: random rows",
    "mean": "nothing",
    "retok": "the old tokenizer",
    "tokenadapt": "auxiliary vectors",
    "focus": "auxiliary vectors",
    "omp": "a donor model",
}
_DONOR_METHOD = "omp"


def run(
    output: Path,
    steps: int = STEPS,
    donor_steps: int = DONOR_STEPS,
    aftercare_steps: int = AFTERCARE_STEPS,
    held_out: int = HELD_OUT,
    files: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the tour and return its figures.

    Args:
        output: folder for the checkpoints and the picture: new, empty, or that of an earlier tour, which is replaced.
        steps: optimiser steps of the language model.
        donor_steps: of the smaller one that speaks the new tokenizer.
        aftercare_steps: of the embeddings alone, after each transplantation.
        held_out: texts to measure with.
        files: how many files of Python's library to read; None takes all.
        seed: of the training, of the tokenizers and of random rows.

    Raises:
        FileExistsError: the folder holds something else.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # those of loading and saving, a moment each
    started = time.perf_counter()
    claim_folder(output, _FOLDERS)
    tour = _Tour(output, read_docstrings(files), held_out, seed)
    tour.train(steps, donor_steps)
    tour.transplant(aftercare_steps)
    tour.store()
    tour.load_without_rarezoo()
    tour.write()
    tour.draw()
    longer = f"train {tour.best.trained} {output / 'longer'} --set max_steps={10 * aftercare_steps}"
    finish(output, tour.figures, started, longer)
    return tour.figures


@dataclass(frozen=True)
class _Transplant:
    """A transplanted model, its folder, and that of the same after its embeddings have learned."""

    tokenizer: str
    method: str
    result: Any
    plain: Path
    trained: Path


class _Tour:
    """The stations of the tour; `figures` collects what they measured."""

    def __init__(self, output: Path, texts: tuple[list[str], list[str]], held_out: int, seed: int):
        title("1. Real text on this machine, in three tokenizers")
        self.output, self.seed = output, seed
        self.model_folder = output / "model"
        self.texts = texts[0]
        step = max(len(texts[1]) // held_out, 1)
        self.held_out = [text[:HELD_OUT_CHARACTERS] for text in texts[1][::step][:held_out]]
        rows = (json.dumps({"text": text}) + "\n" for text in self.texts)
        (output / "training.jsonl").write_text("".join(rows), encoding="utf-8")
        typer.echo(
            f"{len(self.texts):,} documentation strings of Python's library, {_characters(self.texts):,} characters, "
            f"to learn from;\nthe beginnings of {len(self.held_out)} others, {_characters(self.held_out):,} "
            "characters, to measure with. The first tokenizer is trained on one half, the others on the other."
        )
        self._train_tokenizers()

    def _train_tokenizers(self) -> None:
        from rarezoo.tokenizer_transplant.supertokens import train_supertokens, train_word_tokens

        half = len(self.texts) // 2  # another text for the others, as other people's tokenizers have seen
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few texts give fewer tokens
            self.tokenizer = train_word_tokens(self.texts[:half], _BASE_TOKENS, special_tokens=SPECIAL_TOKENS)
            self.new_tokenizers = {
                _WORDS: train_word_tokens(self.texts[half:], _NEW_TOKENS, special_tokens=SPECIAL_TOKENS),
                _SUPERTOKENS: train_supertokens(self.texts, _NEW_TOKENS, special_tokens=SPECIAL_TOKENS, seed=self.seed),
            }
        text = self.held_out[0][:60]
        known = self.tokenizer.get_vocab()
        self.figures: dict[str, Any] = {
            "texts": len(self.texts),
            "characters held out": _characters(self.held_out),
            "tokenizers": {},
        }
        for name, tokenizer in {"the model's": self.tokenizer, **self.new_tokenizers}.items():
            found = {
                "tokens": len(tokenizer),
                "tokens that the model has": sum(token in known for token in tokenizer.get_vocab()),
                "characters per token": _characters(self.held_out) / _tokens(tokenizer, self.held_out),
            }
            self.figures["tokenizers"][name] = found
            typer.echo(
                f"{name:12} {found['tokens']:6,} tokens, {found['tokens that the model has']:,} of them the model's; "
                f"{found['characters per token']:.2f} characters per token"
            )
            pieces = tokenizer.batch_decode([[token_id] for token_id in tokenizer(text)["input_ids"]])
            show("text", "|".join(pieces).replace("\n", "⏎"))

    def train(self, steps: int, donor_steps: int) -> None:
        title("2. Train a small Llama in the first tokenizer, and a smaller one in the second")
        self.model = self._learned("model", self.tokenizer, _HIDDEN_SIZE, steps)
        self.model.save_pretrained(self.model_folder)
        self.tokenizer.save_pretrained(self.model_folder)
        self.donor = self._learned("donor", self.new_tokenizers[_WORDS], _DONOR_HIDDEN_SIZE, donor_steps)
        typer.echo(
            "The model is the one to keep. The donor speaks the new tokenizer: omp describes new tokens by\ntheir "
            "place among its embeddings."
        )

    def _learned(self, name: str, tokenizer: Any, hidden_size: int, steps: int) -> Any:
        start = time.process_time()
        model = new_language_model(tokenizer, hidden_size, seed=self.seed)
        logging.enable_progress_bar()
        learn_texts(model, tokenizer, self.texts, steps, batch_size=8, learning_rate=3e-3, seed=self.seed)
        logging.disable_progress_bar()
        found = {
            "weights": model.num_parameters(),
            "steps": steps,
            "CPU seconds": round(time.process_time() - start, 1),
            "bits per byte": bits_per_byte(model, tokenizer, self.held_out),
        }
        self.figures[name] = found
        typer.echo(
            f"{name}: {found['weights']:,} weights, {steps} steps in {found['CPU seconds']:.0f} s of CPU time, "
            f"{found['bits per byte']:.3f} bits per byte of held-out text"
        )
        return model

    def transplant(self, steps: int) -> None:
        from tqdm import tqdm

        title(f"3. Give the model the other tokenizers, then let the embeddings alone learn {steps} steps")
        runs = [
            (name, method)
            for name in self.new_tokenizers
            for method in _METHODS
            if name == _WORDS or method != _DONOR_METHOD
        ]
        vectors = {
            name: context_vectors(self.texts, [self.tokenizer, tokenizer])
            for name, tokenizer in self.new_tokenizers.items()
        }
        self.transplants: list[_Transplant] = []
        self.bits: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in self.new_tokenizers}
        for name, method in tqdm(runs):
            transplant = self._transplant(name, method, vectors[name])
            before = bits_per_byte(transplant.result.model, transplant.result.tokenizer, self.held_out)
            self.bits[name][method] = before, self._bits_after(transplant, steps)
            self.transplants.append(transplant)
        self.figures["bits per byte"] = {
            name: {method: {"0 steps": a, f"{steps} steps": b} for method, (a, b) in found.items()}
            for name, found in self.bits.items()
        }
        self._show_bits(steps)
        self._judge()

    def _transplant(self, name: str, method: str, vectors: Mapping[str, Any]) -> _Transplant:
        from rarezoo.tokenizer_transplant import transplant_tokenizer

        result = transplant_tokenizer(
            self.model_folder,
            self.new_tokenizers[name],
            method,
            donor=self.donor if method == _DONOR_METHOD else None,
            auxiliary=vectors,
            seed=self.seed,
            **_METHODS[method],
        )
        place = Path(name.replace(" ", "-")) / method
        plain = self.output / "transplanted" / place
        result.save_pretrained(plain)
        return _Transplant(name, method, result, plain, self.output / "trained" / place)

    def _bits_after(self, transplant: _Transplant, steps: int) -> float:
        """Bits per byte after the recipe's training of the tables' rows."""
        from transformers import AutoModelForCausalLM

        from rarezoo.training import TransplantTrainingRecipe, train

        recipe = TransplantTrainingRecipe(
            model=str(transplant.plain.resolve()),
            training_data=str((self.output / "training.jsonl").resolve()),
            sequence_length=SEQUENCE_LENGTH,
            batch_size=4,
            warmup_steps=steps // 10,
            max_steps=steps,
            save_steps=0,
            seed=self.seed,
        )
        train(recipe, transplant.trained)
        model = AutoModelForCausalLM.from_pretrained(transplant.trained).eval()
        return bits_per_byte(model, transplant.result.tokenizer, self.held_out)

    def _show_bits(self, steps: int) -> None:
        typer.echo("Bits per byte of held-out text, fewer are better:")
        typer.echo(f"{'':34}" + "".join(f"{name:>22}" for name in self.bits))
        typer.echo(f"{'method':12}{'needs':22}" + f"{'0 steps':>11}{f'{steps} steps':>11}" * len(self.bits))
        for method, needs in _NEEDS.items():
            cells = ""
            for found in self.bits.values():
                values = [f"{value:11.3f}" for value in found[method]] if method in found else [f"{'-':>11}"] * 2
                cells += "".join(values)
            typer.echo(f"{method:12}{needs:22}{cells}")
        typer.echo(f"The model itself, in its own tokens: {self.figures['model']['bits per byte']:.3f}.")

    def _judge(self) -> None:
        """What the table says, whatever it says."""
        for name, found in self.bits.items():
            first, last = (min(found, key=lambda method: found[method][moment]) for moment in (0, 1))
            baseline = min(found[method][0] for method in _BASELINES)
            behind = [method for method in found if method not in _BASELINES and found[method][0] >= baseline]
            typer.echo(
                f"{name}: {first} is best before the training, {last} after it; "
                + (f"not better than the baselines: {', '.join(behind)}." if behind else "all beat the baselines.")
            )
        self.best = min(
            (run for run in self.transplants if run.tokenizer == _SUPERTOKENS and run.method not in _BASELINES),
            key=lambda run: self.bits[_SUPERTOKENS][run.method][1],
        )

    @torch.no_grad()
    def store(self) -> None:
        """A matrix of few weights instead of the tables."""
        from transformers import AutoModelForCausalLM

        from rarezoo.tokenizer_transplant import TransplantedForCausalLM
        from rarezoo.tokenizer_transplant.modeling_tokenizer_transplant import MATRIX_NAME

        title("4. Store the transplant alone")
        result, folder = self.best.result, self.output / "stored"
        stored = TransplantedForCausalLM.from_base(
            os.path.abspath(self.model_folder),
            result.matrix,
            result.tokenizer,
            self.tokenizer,
            provenance=result.report.provenance,
        )
        stored.save_pretrained(folder)
        result.tokenizer.save_pretrained(folder)
        matrix = (folder / MATRIX_NAME).stat().st_size
        tables = sum(table.weight.nbytes for table in (stored.get_input_embeddings(), stored.get_output_embeddings()))
        ids = result.tokenizer(self.held_out[:1], return_tensors="pt")
        again = AutoModelForCausalLM.from_pretrained(folder)
        same = torch.equal(again(**ids).logits, result.model(**ids).logits)
        self.figures["stored"] = {"matrix bytes": matrix, "table bytes": tables, "same logits": same}
        typer.echo(
            f"{self.best.method}, {self.best.tokenizer}: the new rows as sparse combinations of the old ones take "
            f"{megabytes(matrix)},\nthe new tables {megabytes(tables)}. In a model of width 4,096 the tables are "
            f"{4096 // _HIDDEN_SIZE} times as large, the matrix is not."
        )
        typer.echo(
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}) loads the base and applies the matrix: "
            + ("the same logits, bit for bit." if same else "OTHER LOGITS.")
        )

    @torch.no_grad()
    def load_without_rarezoo(self) -> None:
        from transformers import AutoModelForCausalLM

        title("5. Load them in a process that has never heard of rarezoo")
        text, tokenizer = self.held_out[0], self.best.result.tokenizer
        self.figures["largest difference without rarezoo"] = {}
        for name, folder in (("plain", self.best.trained), ("stored", self.output / "stored")):
            there = predict_without_rarezoo(folder, text)
            here = AutoModelForCausalLM.from_pretrained(folder).eval()(**tokenizer([text], return_tensors="pt")).logits
            difference = (here[0] - torch.tensor(there["logits"])).abs().max().item()
            self.figures["largest difference without rarezoo"][name] = difference
            same = "the same logits, bit for bit" if not difference else f"logits that differ by {difference:.0e}"
            typer.echo(f"{name + ':':8}{folder}: {there['class']}, {same}")
        typer.echo("The plain one is a Llama like any other; the stored one needs trust_remote_code=True there.")

    def write(self) -> None:
        from transformers import AutoModelForCausalLM

        title("6. Write on, greedily, 24 tokens")
        prompt = self.held_out[0][:40].rsplit(" ", 1)[0]
        show("text", prompt.replace("\n", " "))
        trained = AutoModelForCausalLM.from_pretrained(self.best.trained).eval()
        written = {}
        for name, model, tokenizer in (
            ("model", self.model, self.tokenizer),
            (_SUPERTOKENS, trained, self.best.result.tokenizer),
        ):
            ids = tokenizer([prompt], return_tensors="pt")
            output = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
            written[name] = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            typer.echo(f"  {name + ':':13}…{written[name]!r} ({len(written[name])} characters)")
        self.figures["written"] = written

    def draw(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, len(self.bits), figsize=(10, 3.2), constrained_layout=True)
        for axis, (name, found) in zip(axes, self.bits.items()):
            methods = list(found)[::-1]
            for moment, (label, color) in enumerate((("before", "tab:orange"), ("after", "tab:blue"))):
                axis.scatter([found[method][moment] for method in methods], methods, label=label, color=color, zorder=2)
            axis.hlines(methods, *zip(*(found[method] for method in methods)), color="lightgrey", zorder=1)
            axis.axvline(
                self.figures["model"]["bits per byte"], color="grey", linestyle="--", label="in its own tokens"
            )
            axis.set_title(name)
            axis.set_xlabel("bits per byte")
        axes[0].legend()
        figure.savefig(self.output / PICTURE, dpi=120)
        pyplot.close(figure)
        typer.echo(f"\nBits per byte before and after the training: {self.output / PICTURE}")


def _characters(texts: list[str]) -> int:
    return sum(map(len, texts))


def _tokens(tokenizer: Any, texts: list[str]) -> int:
    return sum(map(len, tokenizer(texts)["input_ids"]))
