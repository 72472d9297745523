"""A transplanted model stored by its matrix, against its dense tables: bytes, and what opening it takes.

A Llama of one layer with 32,000 rows of width 4,096, untied, in bfloat16, and a matrix of 32,000 rows, every one a
combination of 16 base rows (what the format holds at most for k <= 16). Bytes: of the stored checkpoint's matrix and of
the two dense tables that it replaces. CPU seconds, on one thread, until the answer to one token: from the checkpoint
that stores the matrix (check of the base's hash, loading of the base, the two products), and from the plain model.

    python benchmarks/bench_transplant_checkpoint.py [--width 4096] [--rows 32000] [--entries 16]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from measure import interleaved, report, rounded
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rarezoo import TransplantedForCausalLM
from rarezoo.tokenizer_transplant import TransplantMatrix
from rarezoo.tokenizer_transplant.modeling_tokenizer_transplant import MATRIX_NAME


def make_base(folder: Path, rows: int, width: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=8
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def make_matrix(rows: int, entries: int) -> TransplantMatrix:
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(rows, (rows, entries), generator=generator)
    return TransplantMatrix.from_combinations(indices, torch.rand(rows, entries, generator=generator), rows)


def open_and_ask(folder: Path) -> None:
    """Opening maps files that only an answer reads: the head's whole table, and the layers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(torch.tensor([[5]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=4_096)
    parser.add_argument("--entries", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        base, by_matrix, plain = (Path(work) / name for name in ("base", "matrix", "plain"))
        make_base(base, arguments.rows, arguments.width)
        tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2)
        matrix = make_matrix(arguments.rows, arguments.entries)
        model = TransplantedForCausalLM.from_base(base, matrix, tokenizer)
        model.save_pretrained(by_matrix)
        model.merge_and_unload().save_pretrained(plain)
        del model
        table = torch.randn(arguments.rows, arguments.width, dtype=torch.bfloat16)
        started = time.process_time()
        matrix.apply(table)
        product = time.process_time() - started
        seconds = interleaved(
            {
                "matrix": lambda: open_and_ask(by_matrix),
                "plain": lambda: open_and_ask(plain),
            },
            rounds=3,
        )
        stored, dense = (by_matrix / MATRIX_NAME).stat().st_size, 2 * table.nbytes
        folder = sum(path.stat().st_size for path in by_matrix.iterdir())
        figures = {
            "rows": arguments.rows,
            "width": arguments.width,
            "entries_per_row": arguments.entries,
            "matrix_bytes": stored,
            "checkpoint_folder_bytes": folder,
            "dense_tables_bytes": dense,
            "share": round(stored / dense, 5),
            "cpu_seconds_of_one_product": round(product, 3),
            "cpu_seconds_to_open": rounded(seconds),
        }
        report("transplant_checkpoint", (__doc__ or "").splitlines()[0], figures, ("torch", "transformers"))


if __name__ == "__main__":
    main()
