"""What the lexinvariant model and its standard twin learn in CPU minutes: text of this Python, and LookUp.

Text: the standard library's top-level modules in lower case, every run of other characters one space, 27 symbols; every
tenth file is held out. Two layers of width 64 by `LanguageModelRecipe.small_from_scratch`; the number of steps is what
the budget of CPU seconds allows, by the time of a few steps before. Perplexities over all 128 predicted symbols and by
position, with one table per window and averaged over eight: of 200 held-out windows, and of all that stand side by
side. The choice of 200 alone makes figures by position uncertain by 2 to 3 % (standard error), whatever the seed of the
training.

LookUp: lists of 3 to 10 pairs of random ids out of 64, Gaussian tables, only the answer is learned; accuracy on 1000
prompts of 8 pairs, with those ids and with ids below a million that training never showed. One thread throughout; the
whole of a run counts, with what the Trainer does around the steps.

    python benchmarks/bench_lexinvariant_training.py
"""

from __future__ import annotations

import re
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from measure import report
from transformers import AutoModelForCausalLM

from rarezoo.training import LanguageModelRecipe, lookup_ids, train

SEEDS = (0, 1, 2)
LENGTH, WINDOWS = 128, 200
# Positions of the predicted symbols.
SPANS = {"all": (0, LENGTH), **{f"{a}-{b}": (a, b) for a, b in ((0, 8), (8, 16), (16, 32), (32, 64), (64, LENGTH))}}
TEXT = {"vocab_size": 27, "unseen_logits": "sampled"}
LOOKUP = {"vocab_size": 64, "table": "gaussian", "unseen_logits": "sampled"}
# Of CPU seconds; a twentieth is kept for what the calibration misjudges.
BUDGETS = {"lexinvariant": 120, "standard": 40, "lookup": 30}
KEPT = 0.95
CALIBRATION_STEPS = (10, 40)


def read_corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols for training and held-out ones: space is 0, a to z are 1 to 26."""
    parts: tuple[list[str], list[str]] = ([], [])
    for number, path in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        text = path.read_text(encoding="utf-8", errors="ignore").lower()
        parts[number % 10 == 9].append(re.sub("[^a-z]+", " ", text))
    training, held_out = ("".join(part) for part in parts)
    symbols = {" ": 0, **{chr(code): code - 96 for code in range(97, 123)}}
    return tuple(torch.tensor([symbols[character] for character in text]) for text in (training, held_out))


def windows(symbols: torch.Tensor, length: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row} for row in symbols[: len(symbols) // length * length].view(-1, length)]


def run_within(seconds: float, recipe: dict, rows) -> tuple[AutoModelForCausalLM, dict]:
    """Train as many steps as the budget allows; the model, and what it took."""
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, steps: int) -> float:
            settings = LanguageModelRecipe.small_from_scratch(**recipe, max_steps=steps, logging_steps=50)
            start = time.process_time()
            train(settings, Path(folder) / name, rows=rows)
            return time.process_time() - start

        run("warm", 2)
        few, more = (run(f"{steps} steps", steps) for steps in CALIBRATION_STEPS)
        step = (more - few) / (CALIBRATION_STEPS[1] - CALIBRATION_STEPS[0])
        steps = int((KEPT * seconds - few) / step) + CALIBRATION_STEPS[0]
        spent = run("run", steps)
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "run").eval()
    return model, {"steps": steps, "CPU seconds": round(spent, 1)}


@torch.no_grad()
def window_losses(model, held_out: torch.Tensor, starts: torch.Tensor, num_tables: int = 1) -> torch.Tensor:
    """(windows, LENGTH) negative log-likelihoods, a table of its own for every window."""
    ids = held_out[starts[:, None] + torch.arange(LENGTH + 1)]
    losses = []
    for first in range(0, len(ids), 25):
        part = ids[first : first + 25]
        options = {"num_tables": num_tables} if num_tables > 1 else {}
        seeds = torch.arange(first, first + len(part))
        logits = model(part, lex_seeds=seeds, use_cache=False, **options).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
    return torch.cat(losses)


def by_position(loss: torch.Tensor) -> dict[str, float]:
    """Perplexities over all predicted symbols and by position."""
    return {name: round(loss[:, first:last].mean().exp().item(), 2) for name, (first, last) in SPANS.items()}


def standard_errors(loss: torch.Tensor) -> dict[str, float]:
    """Of `by_position` of so many windows, in per cent of the perplexity."""
    errors = {name: loss[:, first:last].mean(1).std() / len(loss) ** 0.5 for name, (first, last) in SPANS.items()}
    return {name: round(100 * error.item(), 1) for name, error in errors.items()}


def text_figures(model, held_out: torch.Tensor, tables: tuple[int, ...]) -> dict[str, dict[str, float]]:
    chosen = torch.randint(len(held_out) - LENGTH, (WINDOWS,), generator=torch.Generator().manual_seed(1))
    figures = {}
    for samples, starts in (("", chosen), (" of all windows", torch.arange(0, len(held_out) - LENGTH, LENGTH + 1))):
        for num_tables in tables:
            loss = window_losses(model, held_out, starts, num_tables)
            figures[f"perplexity{samples}" + (f", mean of {num_tables} tables" * (num_tables > 1))] = by_position(loss)
            if num_tables == 1:
                figures[f"standard error{samples}, %"] = standard_errors(loss)
    return figures


@torch.no_grad()
def lookup_accuracy(model, pairs: int, first_id: int, vocab_size: int, count: int = 1000) -> float:
    model.config.vocab_size, model.config.unseen_logits = vocab_size, "collapsed"
    correct = 0
    for first in range(0, count, 50):
        generator = torch.Generator().manual_seed(first)
        # 64 different ids in a block of their own for every batch of prompts
        ids = lookup_ids(50, pairs, 64, generator)
        if first_id:
            ids += int(torch.randint(first_id, vocab_size - 64, (), generator=generator))
        seeds = torch.arange(first, first + 50)
        logits = model(ids[:, :-1], lex_seeds=seeds, logits_to_keep=1, use_cache=False).logits[:, -1]
        correct += int((logits.argmax(-1) == ids[:, -1]).sum())
    return round(correct / count, 4)


def summary(runs: list[dict]) -> dict:
    """All runs, and the means of their figures."""

    def means(values: list) -> object:
        if isinstance(values[0], dict):
            return {name: means([value[name] for value in values]) for name in values[0]}
        return round(statistics.mean(values), 4)

    return {"mean": means(runs), "seeds": runs}


def multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def learn_text(table: str, seconds: float, rows, held_out) -> dict:
    runs = []
    for seed in SEEDS:
        recipe = {"config": {**TEXT, "table": table}, "sequence_length": LENGTH, "seed": seed}
        if table != "learned":
            # Heads that begin alike do not part in every run, in bfloat16 less often than in float32.
            recipe |= {"config": recipe["config"] | {"attn_scale_spread": 1.4}, "bf16": multiplies_bfloat16()}
        model, figures = run_within(seconds, recipe, rows)
        figures |= text_figures(model, held_out, tables=(1,) if table == "learned" else (1, 8))
        runs.append(figures)
        print(table, figures, flush=True)
    return summary(runs)


def learn_lookup(seconds: float) -> dict:
    runs = []
    for seed in SEEDS:
        model, figures = run_within(
            seconds,
            {"config": LOOKUP, "task": "lookup", "batch_size": 64, "learning_rate": 5e-3, "seed": seed},
            rows=None,
        )
        figures |= {f"accuracy, {pairs} pairs": lookup_accuracy(model, pairs, 0, 64) for pairs in (8, 10, 20)}
        figures["accuracy, 8 pairs, unseen ids up to 1,000,000"] = lookup_accuracy(model, 8, 64, 1_000_000)
        runs.append(figures)
        print("lookup", figures, flush=True)
    return summary(runs)


def main() -> None:
    torch.set_num_threads(1)
    training, held_out = read_corpus()
    # Not one longer, though then as many symbols would be predicted: its matrices take longer than the symbol is worth.
    rows = windows(training, LENGTH)
    figures = {
        "symbols for training": len(training),
        "symbols held out": len(held_out),
        "standard twin": learn_text("learned", BUDGETS["standard"], rows, held_out),
        "lexinvariant, orthonormal tables": learn_text("orthonormal", BUDGETS["lexinvariant"], rows, held_out),
        "lookup, Gaussian tables": learn_lookup(BUDGETS["lookup"]),
    }
    report("lexinvariant_training", __doc__.splitlines()[0], figures, ("torch", "transformers"))


if __name__ == "__main__":
    main()
