"""ColBERT-XM's adapters: what choosing one of 81 languages costs, and what loading one language needs.

Dispatch: two layers of the published width, one thread, taking turns, medians of CPU time, against transformers' own
X-MOD with the same weights, and against the floor: the same network in which the one adapter is called without any
choice. Loading: a checkpoint with all languages, of which one is kept, in a fresh process; resident memory that it grew
by at its peak, after every weight has been touched, per byte of the weights.

    python benchmarks/bench_colbert_xm.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import interleaved, report
from transformers import XmodModel

from rarezoo import ColBERTXMForRetrieval, ColBERTXMModel, load_preset
from rarezoo.colbert_xm.modeling_colbert_xm import LanguageAdapterOutput

ROUNDS = 31
SIZES = {"1 text of 32 tokens": (1, 32), "8 texts of 128 tokens": (8, 128)}

LOADING = """
import gc, sys, warnings
import torch
from transformers import AutoModel
import rarezoo
from rarezoo import ColBERTXMForRetrieval
torch.set_num_threads(1)

def status(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024

gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # forget the peak
before = status("VmRSS:")
model = AutoModel.from_pretrained(sys.argv[1], languages=["de"])
touched = sum(float(parameter.detach().sum()) for parameter in model.parameters())
assert touched == touched
print(status("VmHWM:") - before, sum(parameter.nbytes for parameter in model.parameters()))
"""


class DirectOutput(LanguageAdapterOutput):
    """The floor: one adapter, called without a choice."""

    def lang_adapter(self, lang_ids, hidden_states):
        normalised = self.LayerNorm(hidden_states)
        return self.dropout(self.adapter_modules["de_DE"](normalised)) + normalised


def measure_dispatch() -> dict:
    config = load_preset("colbert_xm", "colbert-xm", num_hidden_layers=2, vocab_size=1000)
    ours = ColBERTXMModel(config).eval()
    stock = XmodModel(config, add_pooling_layer=False).eval()
    stock.load_state_dict(ours.state_dict())
    floor = ColBERTXMModel(config).eval()
    floor.load_state_dict(ours.state_dict())
    for layer in floor.encoder.layer:
        layer.output.__class__ = DirectOutput
    german = config.language_id("de")
    return {name: _compare(ours, stock, floor, german, *size) for name, size in SIZES.items()}


def _compare(ours, stock, floor, german: int, batch: int, length: int) -> dict:
    input_ids = torch.randint(5, 1000, (batch, length))
    one, several = torch.full((batch,), german), torch.arange(batch) % 4
    work = {
        "rarezoo": lambda: ours(input_ids, lang_ids=one),
        "floor": lambda: floor(input_ids),
        "transformers": lambda: stock(input_ids, lang_ids=one),
    }
    if batch > 1:
        work |= {
            "rarezoo, 4 languages": lambda: ours(input_ids, lang_ids=several),
            "transformers, 4 languages": lambda: stock(input_ids, lang_ids=several),
        }
    difference = (ours(input_ids, lang_ids=one)[0] - stock(input_ids, lang_ids=one)[0]).abs().max()
    assert difference < 1e-6, difference
    seconds = interleaved(work, ROUNDS)
    return {
        "cpu milliseconds": {name: round(value * 1000, 3) for name, value in seconds.items()},
        "rarezoo's time relative to the floor": round(seconds["rarezoo"] / seconds["floor"], 3),
        "transformers' time relative to rarezoo's": round(seconds["transformers"] / seconds["rarezoo"], 3),
    }


def measure_loading(folder: Path) -> dict:
    config = load_preset("colbert_xm", "colbert-xm", num_hidden_layers=4, vocab_size=60000)
    model = ColBERTXMForRetrieval(config)
    model.save_pretrained(folder)
    stored = sum(parameter.nbytes for parameter in model.parameters())
    del model
    command = [sys.executable, "-c", LOADING, str(folder)]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, kept = map(int, finished.stdout.split()[-2:])
    return {
        "megabytes of the checkpoint": round(stored / 1e6, 1),
        "megabytes of the weights kept": round(kept / 1e6, 1),
        "megabytes of resident memory at the peak": round(peak / 1e6, 1),
        "peak relative to the weights kept": round(peak / kept, 3),
    }


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures = {"dispatch, 81 languages, 2 layers of width 768": measure_dispatch()}
    with tempfile.TemporaryDirectory() as folder:
        figures["loading one of 81 languages, 4 layers of width 768"] = measure_loading(Path(folder))
    report("colbert_xm", __doc__.splitlines()[0], figures, ("torch", "transformers"))


if __name__ == "__main__":
    main()
