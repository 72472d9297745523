"""The lexinvariant tour: learn from this machine's text, read it enciphered, look up symbols never seen, load, write,
quantize."""

from __future__ import annotations

import json
import random
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from transformers.utils import logging

from rarezoo.cli.quickstart_stations import (
    claim_folder,
    finish,
    predict_without_rarezoo,
    quantize_and_show,
    show,
    title,
)

STEPS = 900
LOOKUP_STEPS = 850
WINDOWS = 200
PROMPTS = 1000
LENGTH = 128  # symbols that a window has to predict
LETTERS = " abcdefghijklmnopqrstuvwxyz"
PICTURE = "perplexity.png"
_FOLDERS = ("model", "standard", "lookup", "tokenizer", "quantized")
_SPANS = ((0, 8), (8, 16), (16, 32), (32, 64), (64, 128), (0, 128))
_MOVING_WINDOW = 16
_TABLES = 8
_IDS, _MANY_IDS, _PAIRS = 64, 1_000_000, 8
_RELABELINGS = 100
_LEARNING_RATE = 5e-3


def run(
    output: Path,
    steps: int = STEPS,
    lookup_steps: int = LOOKUP_STEPS,
    windows: int = WINDOWS,
    prompts: int = PROMPTS,
    files: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the tour and return its figures.

    Args:
        output: folder for the checkpoints, the quantized copies and the picture: new, empty, or that of an earlier
            tour, which is replaced.
        steps: optimiser steps of the model of text, and of its twin.
        lookup_steps: of the model that looks up.
        windows: held-out pieces of text to measure perplexity on.
        prompts: of LookUp.
        files: how many files of Python's library to read; None takes all.
        seed: of the training, the windows and the ciphers.

    Raises:
        FileExistsError: the folder holds something else.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # those of loading and saving, a moment each
    started = time.perf_counter()
    claim_folder(output, _FOLDERS)
    tour = _Tour(output, read_library_texts(files), windows, seed)
    tour.train(steps)
    tour.encipher()
    tour.look_up(lookup_steps, prompts)
    tour.load_without_rarezoo()
    tour.write()
    tour.quantize()
    tour.draw()
    finish(output, tour.figures, started, f"train {output / 'model'} {output / 'longer'} --set max_steps={5 * steps}")
    return tour.figures


def read_library_texts(files: int | None = None) -> tuple[list[str], list[str]]:
    """The top-level modules of Python's library, which every machine has, and every tenth of them held out."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    return [text for i, text in enumerate(texts) if i % 10 != 9], texts[9::10]


def letter_tokenizer() -> Any:
    """A tokenizer of 27 symbols: the letters in lower case, and one space for every run of anything else."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    # A BPE without merges splits into characters.
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(f"[^{LETTERS.strip()}]+"), " ")]
    )
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


class _Tour:
    """The stations of the tour; `figures` collects what they measured."""

    def __init__(self, output: Path, texts: tuple[list[str], list[str]], windows: int, seed: int):
        title("1. Real text on this machine, as 27 symbols")
        self.output, self.seed = output, seed
        self.model_folder = output / "model"
        self.tokenizer = letter_tokenizer()
        self.tokenizer.save_pretrained(output / "tokenizer")
        training, held_out = (self._symbols(part) for part in texts)
        rows = (json.dumps({"text": text}) + "\n" for text in texts[0])
        (output / "training.jsonl").write_text("".join(rows), encoding="utf-8")
        generator = torch.Generator().manual_seed(seed + 1)
        starts = torch.randint(len(held_out) - LENGTH, (windows, 1), generator=generator)
        self.windows = held_out[starts + torch.arange(LENGTH + 1)]
        self.keys = _random_keys(windows, generator)
        self.figures: dict[str, Any] = {
            "symbols for training": len(training),
            "symbols held out": len(held_out),
            "windows": windows,
        }
        typer.echo(
            f"{sum(map(len, texts)):,} modules of Python's library, in lower case, the rest one space: "
            f"{len(training):,} symbols to learn from, {len(held_out):,} in modules that are held out."
        )
        show("text", self._text(self.windows[0]))
        show("cipher", self._text(self.keys[0][self.windows[0]]))

    def _symbols(self, texts: list[str]) -> Tensor:
        encoded = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        return torch.tensor([symbol for ids in encoded for symbol in ids])

    def _text(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids)

    def train(self, steps: int) -> None:
        from rarezoo.lexinvariant import position_curve

        title("2. Train a lexinvariant model on it, and its standard twin")
        self.model = self._train("orthonormal", self.model_folder, steps)
        self.standard = self._train("learned", self.output / "standard", steps)
        self.curves = {
            "lexinvariant": position_curve(self.model, self.windows, _MOVING_WINDOW),
            f"lexinvariant, mean of {_TABLES} tables": position_curve(
                self.model, self.windows, _MOVING_WINDOW, num_tables=_TABLES
            ),
            "standard twin": position_curve(self.standard, self.windows, _MOVING_WINDOW),
        }
        typer.echo(f"Held-out perplexity by position; guessing gives {len(LETTERS)}:")
        typer.echo(f"{'':32}" + "".join(f"{first}-{last}".rjust(8) for first, last in _SPANS[:-1]) + "     all")
        self.figures["perplexity"] = {name: _by_position(curve) for name, curve in self.curves.items()}
        for name, values in self.figures["perplexity"].items():
            typer.echo(f"{name:32}" + "".join(f"{value:8.2f}" for value in values.values()))
        typer.echo(f"saved to {self.model_folder} and {self.output / 'standard'}")

    def _train(self, table: str, folder: Path, steps: int) -> Any:
        """The two differ in nothing but where the rows of their symbols come from."""
        return self._run_recipe(
            folder,
            training_data=str((self.output / "training.jsonl").resolve()),
            tokenizer=str((self.output / "tokenizer").resolve()),
            table=table,
            config={"unseen_logits": "sampled"},
            sequence_length=LENGTH + 1,
            learning_rate=_LEARNING_RATE,
            max_steps=steps,
        )

    def _run_recipe(self, folder: Path, **settings: Any) -> Any:
        from transformers import AutoModelForCausalLM

        from rarezoo.training import LanguageModelRecipe, train

        recipe = LanguageModelRecipe.small_from_scratch(**settings, logging_steps=25, seed=self.seed)
        logging.enable_progress_bar()
        start = time.process_time()
        train(recipe, folder)
        seconds = time.process_time() - start
        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.figures.setdefault("training", {})[folder.name] = {
            "weights": model.num_parameters(),
            "steps": recipe.max_steps,
            "CPU seconds": round(seconds, 1),
        }
        typer.echo(
            f"{folder.name}: {model.num_parameters():,} weights, {recipe.max_steps} steps of {recipe.batch_size} in "
            f"{seconds:.0f} s of CPU time"
        )
        return model

    def encipher(self) -> None:
        """A substitution cipher of its own for every window."""
        from rarezoo.lexinvariant import position_curve

        title("3. Read the same text enciphered, every piece by another random substitution")
        enciphered = self.keys.gather(1, self.windows)
        models = {"lexinvariant": self.model, "standard twin": self.standard}
        self.enciphered_curves: dict[str, Any] = {}
        figures: dict[str, Any] = {}
        typer.echo(f"{'perplexity':16} {'plain':>8} {'enciphered':>11}   difference of the loss")
        for name, model in models.items():
            plain, cipher = (_token_losses(model, ids) for ids in (self.windows, enciphered))
            self.enciphered_curves[name] = position_curve(model, enciphered, _MOVING_WINDOW)
            difference = cipher.mean(1) - plain.mean(1)
            figures[name] = {
                "plain": plain.mean().exp().item(),
                "enciphered": cipher.mean().exp().item(),
                "loss difference": difference.mean().item(),
                "standard error": (difference.std() / len(difference) ** 0.5).item(),
            }
            values = figures[name]
            typer.echo(
                f"{name:16} {values['plain']:8.2f} {values['enciphered']:11.2f}   {values['loss difference']:+.4f} ± "
                f"{values['standard error']:.4f} nats"
            )
        typer.echo("The lexinvariant model's tables are random: what a cipher changes is chance, like another seed.")
        self.figures["enciphered"] = figures | self._where_it_is_exact(models, enciphered)

    def _where_it_is_exact(self, models: Mapping[str, Any], enciphered: Tensor) -> dict[str, Any]:
        """Where the rows are renamed too, and where they follow from what occurs."""
        from transformers import AutoModelForCausalLM

        plain = _token_losses(self.model, self.windows)
        renamed = _token_losses(self.model, enciphered, permutations=self.keys.argsort(1))
        difference = (renamed - plain).abs().max().item()
        typer.echo(
            "With the same rows under the new names (permutations=…), no symbol's loss differs by more than "
            f"{difference:.0e}."
        )
        canonical = AutoModelForCausalLM.from_pretrained(self.model_folder, table="canonical").eval()
        plain, other = (_token_losses(canonical, ids) for ids in (self.windows, enciphered))
        same, perplexity = torch.equal(plain, other), plain.mean().exp().item()
        typer.echo(
            "The same checkpoint with table='canonical', for whose rows it was not trained: "
            f"{'the same losses, bit for bit' if same else 'OTHER LOSSES'}; perplexity {perplexity:.2f}."
        )
        return {
            "largest difference with renamed rows": difference,
            "canonical table": {"same losses": same, "perplexity": perplexity},
            "alpha-covariance": self._alpha_covariances({**models, "canonical table": canonical}),
        }

    def _alpha_covariances(self, models: Mapping[str, Any]) -> dict[str, float]:
        from rarezoo.lexinvariant import alpha_covariance

        values = {
            name: alpha_covariance(
                model, self.windows[0], _RELABELINGS, generator=torch.Generator().manual_seed(self.seed)
            )
            for name, model in models.items()
        }
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        typer.echo(f"Logits under {_RELABELINGS} relabelings of one text, alpha-covariance: {shown}.")
        return values

    def look_up(self, steps: int, prompts: int) -> None:
        from transformers import AutoModelForCausalLM

        from rarezoo.lexinvariant import evaluate_task, make_lookup

        title(f"4. Look up symbols: learn with {_IDS} ids, use with {_MANY_IDS:,}")
        folder = self.output / "lookup"
        known = self._run_recipe(
            folder,
            task="lookup",
            config={"vocab_size": _IDS, "table": "gaussian", "unseen_logits": "sampled"},
            batch_size=64,
            learning_rate=_LEARNING_RATE,
            max_steps=steps,
        )
        wide = AutoModelForCausalLM.from_pretrained(folder, vocab_size=_MANY_IDS, unseen_logits="collapsed").eval()
        unseen = random.Random(self.seed).sample(range(_IDS, _MANY_IDS), 64 * _IDS)
        answers = {}
        for name, model, symbols in (("ids of the training", known, range(_IDS)), ("ids never seen", wide, unseen)):
            tasks = make_lookup(
                prompts,
                symbols=list(symbols),
                pairs=_PAIRS,
                arrow=False,
                generator=torch.Generator().manual_seed(self.seed),
            )
            answers[name] = evaluate_task(model, tasks, batch_size=16).answers
        *pairs, asked = (tasks[0].input_ids[i : i + 2] for i in range(0, 3 * _PAIRS + 1, 3))  # a separator is third
        shown = "  ".join(f"{key}→{value}" for key, value in pairs)
        typer.echo(f"  prompt:  {shown}  {asked[0]}→?")
        show("answer", str(tasks[0].answer_ids[0]))
        typer.echo(
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, vocab_size={_MANY_IDS:_}, "
            "unseen_logits='collapsed'): the same weights, nothing resized"
        )
        typer.echo(
            f"right answers, {_PAIRS} pairs: {answers['ids of the training']:.1%} with the {_IDS} ids of the training, "
            f"{answers['ids never seen']:.1%} with ids never seen (chance: {1 / _PAIRS:.1%})"
        )
        self.figures["lookup"] = {"pairs": _PAIRS, "prompts": prompts, "right answers": answers}

    @torch.no_grad()
    def load_without_rarezoo(self) -> None:
        title("5. Load it in a process that has never heard of rarezoo")
        text, seed = self._text(self.windows[0]), 7
        there = predict_without_rarezoo(self.model_folder, text, lex_seeds=[seed])
        here = self.model(**self.tokenizer([text], return_tensors="pt"), lex_seeds=torch.tensor([seed])).logits[0]
        difference = (here - torch.tensor(there["logits"])).abs().max().item()
        self.figures["largest difference without rarezoo"] = difference
        typer.echo(f"AutoModelForCausalLM.from_pretrained({str(self.model_folder)!r}, trust_remote_code=True)")
        same = "the same logits, bit for bit" if not difference else f"logits that differ by {difference:.0e} at most"
        typer.echo(f"{there['class']}: {same}, with lex_seeds={seed}")

    def write(self) -> None:
        from transformers import set_seed

        title("6. Write on")
        prompt = self.windows[:1, : LENGTH - 32]
        show("text", self._text(prompt[0]))
        options = {"max_new_tokens": 48, "do_sample": True, "attention_mask": torch.ones_like(prompt)}
        self.figures["written"] = {}
        for name, model, tables in (("standard twin", self.standard, 1), ("lexinvariant", self.model, _TABLES)):
            set_seed(self.seed)
            written = model.generate(prompt, **options, lex_seeds=torch.tensor([self.seed]), num_tables=tables)
            self.figures["written"][name] = self._text(written[0, prompt.shape[1] :])
            typer.echo(f"  {name + ':':16} …{self.figures['written'][name]}")

    def quantize(self) -> None:
        from transformers import AutoModelForCausalLM

        title("7. Quantize the linear layers, the rest in bfloat16")
        before = self.figures["enciphered"]["lexinvariant"]["plain"]
        perplexities: dict[str, float] = {}

        def measure(folder: Path, _: Mapping[str, Any]) -> str:
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            perplexities[folder.name] = _token_losses(model, self.windows).mean().exp().item()
            return f"{perplexities[folder.name]:.2f}"

        reports = quantize_and_show(
            self.model_folder,
            self.output / "quantized",
            columns={
                "perplexity": measure,
                "change": lambda folder, _: f"{perplexities[folder.name] / before - 1:+.1%}",
            },
            fidelity=False,
        )
        self.figures["quantized"] = {
            scheme: report | {"perplexity": perplexities[scheme]} for scheme, report in reports.items()
        }

    def draw(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True, constrained_layout=True)
        colors = {"lexinvariant": "tab:blue", "standard twin": "tab:orange"}
        panels = (("held-out text", self.curves), ("the same, enciphered", self.enciphered_curves))
        for axis, (name, curves) in zip(axes, panels):
            for label, curve in curves.items():
                axis.plot(curve.context, curve.perplexity, label=label, color=colors.get(label, "tab:cyan"))
            axis.axhline(len(LETTERS), color="grey", linestyle="--", label="guessing")
            axis.set_title(name)
            axis.set_xlabel("symbols read before")
            axis.set_yscale("log", subs=(2, 5))
            for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                ticks("{x:.0f}")
            axis.legend()
        axes[0].set_ylabel(f"perplexity of the next {_MOVING_WINDOW}")
        figure.savefig(self.output / PICTURE, dpi=120)
        pyplot.close(figure)
        typer.echo(f"\nPerplexity by position, plain and enciphered: {self.output / PICTURE}")


def _random_keys(count: int, generator: torch.Generator) -> Tensor:
    """(count, 27): the cipher symbol of every plain one."""
    from rarezoo.lexinvariant import make_cipher

    return torch.stack([make_cipher(len(LETTERS), generator=generator).permutation for _ in range(count)])


@torch.no_grad()
def _token_losses(model: Any, ids: Tensor, **tables: Tensor) -> Tensor:
    """(windows, length), with a table of its own for every window: those of `position_curve`."""
    parts = []
    for places in torch.arange(len(ids)).split(16):
        given = {name: value[places] for name, value in tables.items()}
        parts.append(model.token_losses(ids[places], lex_seeds=places, **given)[0])
    return torch.cat(parts)


def _by_position(curve: Any) -> dict[str, float]:
    """Perplexity of the predictions at positions from 0, and over all."""
    return {
        "all" if (first, last) == (0, LENGTH) else f"{first}-{last}": curve.between(first, last)
        for first, last in _SPANS
    }
