"""Orthogonal matching pursuit and a whole transplant against mergekit's tokensurgeon, CPU seconds on one thread.

Function: 4,096 random targets, 6,875 random anchors. `mergekit.tokensurgeon.batch_omp` gets batches of 512 targets, as
its command does; rarezoo gets all targets at once, and the time of its Gram matrix is part of its own. mergekit's
batches and rarezoo's runs alternate. Reported are how many of the anchors taken are the same, step by step, and how far
the weights differ where all of a target's anchors are the same.

Command: `mergekit-tokensurgeon BASE DONOR OUT -k 64` against `rarezoo transplant BASE DONOR OUT --method omp
--compatibility mergekit -k 64`, both from the shell, with imports, loading and saving. Base and donor are untied Llama
models with random tables and byte-level tokenizers of 8,000 and 9,000 tokens, trained on sources of Python's standard
library. Rows of the new tables that differ go back to near ties, which rarezoo decides in float64.

mergekit wants an environment of its own; without it, rarezoo is timed alone:

    pip install mergekit==0.1.5
    python benchmarks/bench_matching_pursuit.py
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from measure import report
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rarezoo.tokenizer_transplant.sparse_coding import orthogonal_matching_pursuit

try:
    from mergekit.tokensurgeon import batch_omp
except ImportError:
    batch_omp = None
    print("mergekit is not installed: rarezoo is timed alone")

TARGETS, ANCHORS, BATCH = 4_096, 6_875, 512
SHAPES = ((256, 64), (1_024, 64), (2_048, 32))  # width, anchors per target
COMMAND_WIDTHS = (256, 1_024)
COMMAND_ROUNDS = 2
OUR_COMMAND = ("-m", "rarezoo.cli", "transplant", "--method", "omp", "--compatibility", "mergekit", "-k", "64")


def seconds(run: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def function_figures(width: int, sparsity: int) -> dict:
    torch.manual_seed(0)
    anchors, targets = torch.randn(ANCHORS, width), torch.randn(TARGETS, width)
    batches, ours, theirs, theirs_found = targets.split(BATCH), [], [], []
    orthogonal_matching_pursuit(targets[:BATCH], anchors, 4)
    for position, batch in enumerate(batches):
        if position % 3 == 0:
            taken, found = seconds(lambda: orthogonal_matching_pursuit(targets, anchors, sparsity))
            ours.append(taken)
        if batch_omp is not None:
            taken, batch_found = seconds(lambda batch=batch: batch_omp(batch, anchors, sparsity))
            theirs.append(taken)
            theirs_found.append(batch_found)
    figures = {"rarezoo": round(statistics.median(ours), 3)}
    if theirs:
        total = statistics.median(theirs) * len(batches)
        indices, weights = (torch.cat(parts) for parts in zip(*theirs_found))
        same = indices == found.indices
        whole = same.all(1)
        figures |= {
            "mergekit": round(total, 3),
            "mergekit / rarezoo": round(total / figures["rarezoo"], 2),
            "same anchors": same.float().mean().item(),
            "targets of which all anchors are the same": whole.float().mean().item(),
            "largest difference of weights": (weights - found.weights)[whole].abs().max().item(),
        }
    return figures


def save_model(folder: Path, size: int, texts: list[str], width: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    fast.save_pretrained(folder)
    torch.manual_seed(size)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def command_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def command_figures(width: int, folder: Path) -> dict:
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    sources = [path for path in sources if "site-packages" not in path.parts and "test" not in path.parts]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sources]
    save_model(folder / "base", 8_000, texts[:400], width)
    save_model(folder / "donor", 9_000, texts[50:450], width)
    arguments = [str(folder / "base"), str(folder / "donor")]
    commands = {"rarezoo": [sys.executable, *OUR_COMMAND, *arguments, str(folder / "rarezoo")]}
    if batch_omp is not None:
        program = Path(sys.executable).with_name("mergekit-tokensurgeon")
        commands["mergekit"] = [str(program), *arguments, str(folder / "mergekit"), "-k", "64"]
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(COMMAND_ROUNDS):
        for name, command in commands.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            taken[name].append(command_seconds(command))
    figures = {name: round(statistics.median(values), 2) for name, values in taken.items()}
    if batch_omp is not None:
        tables = [load_file(folder / name / "model.safetensors") for name in commands]
        names = ("model.embed_tokens.weight", "lm_head.weight")
        figures["mergekit / rarezoo"] = round(figures["mergekit"] / figures["rarezoo"], 2)
        differences = torch.cat([(tables[0][name] - tables[1][name]).abs().amax(1) for name in names])
        figures["rows that differ by more than 1e-5"] = int((differences > 1e-5).sum())
        figures["largest difference of the others"] = differences[differences <= 1e-5].max().item()
    return figures


def main() -> None:
    torch.set_num_threads(1)
    figures = {}
    for width, sparsity in SHAPES:
        figures[f"function, width {width}, k {sparsity}"] = function_figures(width, sparsity)
    for width in COMMAND_WIDTHS:
        with tempfile.TemporaryDirectory() as folder:
            figures[f"command, 8,000 to 9,000 tokens, width {width}, k 64"] = command_figures(width, Path(folder))
    packages = ("torch", "transformers") + (("mergekit",) if batch_omp is not None else ())
    report("matching_pursuit", "CPU seconds; function: 4,096 targets, 6,875 anchors", figures, packages)


if __name__ == "__main__":
    main()
