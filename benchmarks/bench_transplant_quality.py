"""What a language model is worth after its tokenizer was replaced, by every method, before and after training of its
embeddings.

A Llama of two layers (hidden size 64, a head of its own) learns text in 1,000 byte-level BPE tokens. It is then given
another byte-level BPE of 2,500 tokens, and 2,500 supertokens, by every method (its own tokenizer was trained on one
half of the text, the new ones on the other); all rows of its tables, and nothing else, are trained for 100 steps of
4 x 96 tokens. Measured are bits per byte of held-out text, texts of at most 300
characters from their start, over three seeds of models and draws. Methods in a donor's space get a narrower model
(hidden size 48) that learned the same text in the new tokens; methods in an auxiliary space get vectors of the tokens'
contexts in the same text (no encoder; see `context_vectors`), or those of an encoder, with --encoder. Options of the
methods are their defaults but for `k`, 16 anchors, and where a name tells.

    python benchmarks/bench_transplant_quality.py [FOLDER] [--encoder NAME]

Text: documentation strings of Python's library; or the lines of the .txt and .txt.gz files in FOLDER and below it that
have 100 characters or more, such as wikitext-2's.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import os
import statistics
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from measure import report, rounded
from tqdm import tqdm
from transformers.utils import logging

from rarezoo.cli.docstring_corpus import read_docstrings
from rarezoo.cli.tiny_language_model import (
    HELD_OUT_CHARACTERS,
    SEQUENCE_LENGTH,
    SPECIAL_TOKENS,
    bits_per_byte,
    context_vectors,
    learn_texts,
    new_language_model,
)
from rarezoo.tokenizer_transplant import mix, transplant_tokenizer
from rarezoo.tokenizer_transplant.auxiliary_vectors import as_auxiliary_vectors
from rarezoo.tokenizer_transplant.supertokens import train_supertokens, train_word_tokens
from rarezoo.training.language_model import pack_texts
from rarezoo.training.tokenizer_transplant import only_embeddings_train

SEEDS = (0, 1, 2)
BASE_TOKENS, NEW_TOKENS = 1_000, 2_500
HIDDEN_SIZE, DONOR_HIDDEN_SIZE = 64, 48
BASE_STEPS, DONOR_STEPS, STEPS = 800, 400, 100
LEARNING_RATE, AFTERCARE_LEARNING_RATE = 3e-3, 1e-3
MAX_TEXTS, HELD_OUT = 4_000, 150
ANCHORS = {"k": 16}

BASELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    name: (name, {}) for name in ("randn", "normal", "john_hewitt", "mean_resizing", "zero", "mean")
}
# `subword` with combination "mean" is `retok`, `common_interpolation` has two distances, `tokenadapt` two halves.
INFORMED: dict[str, tuple[Any, dict[str, Any]]] = {
    "retok": ("retok", {}),
    "fvt": ("fvt", {}),
    "subword, sum": ("subword", {"combination": "sum"}),
    "subword, first_last": ("subword", {"combination": "first_last"}),
    "subword, weighted_mean": ("subword", {"combination": "weighted_mean"}),
    "mapping": ("mapping", {}),
    "tokenadapt": ("tokenadapt", {}),
    "tokenadapt, local": ("tokenadapt", {"weight": 0.0}),
    "tokenadapt, global": ("tokenadapt", {"weight": 1.0}),
    "focus": ("focus", {}),
    "wechsel": ("wechsel", {}),
    "ofa": ("ofa", {}),
    "clp": ("clp", {}),
    "clp, 16 nearest": ("clp", {"top_k": 16}),
    "omp": ("omp", ANCHORS),
    "common_interpolation": ("common_interpolation", ANCHORS),
    "common_interpolation, cosine": ("common_interpolation", {**ANCHORS, "cosine_similarity": True}),
    "common_interpolation, barycentric": ("common_interpolation", {**ANCHORS, "weight_scheme": "barycentric"}),
    "common_interpolation, least_squares": ("common_interpolation", {**ANCHORS, "weight_scheme": "least_squares"}),
    "landmark_pca": ("landmark_pca", {}),
    "stb": ("stb", ANCHORS),
    "mp_rope": ("mp_rope", {**ANCHORS, "donor_heads": 4, "base_heads": 4}),
    "mix of omp and tokenadapt": (mix([(("omp", ANCHORS), 0.5), ("tokenadapt", 0.5)]), {}),
}


def read_texts(folder: Path | None) -> tuple[list[str], list[str]]:
    """Texts to learn from, and the beginnings of held-out ones."""
    if folder is None:
        learned, held_out = read_docstrings()
    else:
        files = sorted([*folder.rglob("*.txt"), *folder.rglob("*.txt.gz")])
        lines = dict.fromkeys(line.strip() for file in files for line in _lines(file))
        texts = [line for line in lines if len(line) >= 100]
        learned = [text for number, text in enumerate(texts) if number % 10 != 9]
        held_out = texts[9::10]
    step = max(1, len(held_out) // HELD_OUT)
    return learned[:MAX_TEXTS], [text[:HELD_OUT_CHARACTERS] for text in held_out[::step][:HELD_OUT]]


def _lines(file: Path) -> list[str]:
    opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")
    with opened:
        return opened.read().split("\n")


def trained_tokenizers(texts: list[str]) -> tuple[Any, dict[str, Any]]:
    """The base's, of one half of the texts, and the new ones, of the other, by name."""
    half = len(texts) // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few texts give fewer tokens
        base = train_word_tokens(texts[:half], BASE_TOKENS, special_tokens=SPECIAL_TOKENS)
        return base, {
            "another BPE": train_word_tokens(texts[half:], NEW_TOKENS, special_tokens=SPECIAL_TOKENS),
            "supertokens": train_supertokens(texts[half:], NEW_TOKENS, special_tokens=SPECIAL_TOKENS),
        }


def trained_model(tokenizer: Any, texts: list[str], hidden_size: int, steps: int, seed: int) -> Any:
    model = new_language_model(tokenizer, hidden_size, seed=seed)
    learn_texts(model, tokenizer, texts, steps, batch_size=8, learning_rate=LEARNING_RATE, seed=seed)
    return model


def overlapping_pieces(texts: list[str], base: Any, new: Any) -> dict[int, list[tuple[int, float]]]:
    """For `mapping`: the base tokens that stand where a new token stands, with their counts in the text; not for tokens
    that both have, whose rows are copied."""
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    known = base.get_vocab()
    shared = {token_id for token, token_id in new.get_vocab().items() if token in known}
    for text in texts:
        ours, theirs = (tokenizer(text, return_offsets_mapping=True) for tokenizer in (new, base))
        spans, pieces = np.array(ours["offset_mapping"]), np.array(theirs["offset_mapping"])
        first = np.searchsorted(pieces[:, 1], spans[:, 0], "right")
        behind = np.searchsorted(pieces[:, 0], spans[:, 1], "left")
        for token_id, start, stop in zip(ours["input_ids"], first, behind):
            if token_id not in shared:
                counts[token_id].update(theirs["input_ids"][start:stop])
    return {token_id: list(found.items()) for token_id, found in counts.items()}


class Replacement:
    """A base model and another tokenizer: bits per byte by method.

    Args:
        base, donor: language models of the old and of the new tokenizer.
        auxiliary: vectors of strings.
        texts, held_out: to learn from, and to measure with.
    """

    def __init__(
        self, base: Any, old: Any, new: Any, donor: Any, auxiliary: Any, texts: list[str], held_out: list[str]
    ):
        self.base, self.old, self.new, self.donor, self.auxiliary = base, old, new, donor, auxiliary
        self.texts, self.held_out = texts, held_out
        self.rows = pack_texts(texts, new, SEQUENCE_LENGTH)
        self.mapping = overlapping_pieces(texts, old, new)

    def measure(self, method: Any, options: dict[str, Any], seed: int) -> dict[str, float]:
        if method == "mapping":
            options = {"mapping": self.mapping}
        result = transplant_tokenizer(
            copy.deepcopy(self.base),
            self.new,
            method,
            base_tokenizer=self.old,
            donor=self.donor,
            auxiliary=self.auxiliary,
            seed=seed,
            **options,
        )
        before = bits_per_byte(result.model, self.new, self.held_out)
        with only_embeddings_train(result.model):
            learn_texts(
                result.model,
                self.new,
                self.rows,
                STEPS,
                batch_size=4,
                learning_rate=AFTERCARE_LEARNING_RATE,
                seed=seed,
            )
        return {"0 steps": before, f"{STEPS} steps": bits_per_byte(result.model, self.new, self.held_out)}


def one_seed(seed: int, tokenizers: tuple, auxiliary: dict, texts: list[str], held_out: list[str]) -> dict[str, Any]:
    """Bits per byte of the base and, by new tokenizer, of its donor and of all methods."""
    old, new_tokenizers = tokenizers
    base = trained_model(old, texts, HIDDEN_SIZE, BASE_STEPS, seed)
    figures: dict[str, Any] = {"base": bits_per_byte(base, old, held_out)}
    for name, new in new_tokenizers.items():
        donor = trained_model(new, texts, DONOR_HIDDEN_SIZE, DONOR_STEPS, seed + 100)
        replacement = Replacement(base, old, new, donor, auxiliary[name], texts, held_out)
        figures[name] = {"donor": bits_per_byte(donor, new, held_out)}
        for method, (member, options) in tqdm((BASELINES | INFORMED).items(), desc=f"seed {seed}, {name}"):
            figures[name][method] = replacement.measure(member, options, seed)
    return figures


def means(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {name: means([value[name] for value in values]) for name in values[0]}
    return round(statistics.mean(values), 4)


def deviations(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {name: deviations([value[name] for value in values]) for name in values[0]}
    return round(statistics.stdev(values), 4)


def findings(mean: dict[str, Any]) -> dict[str, Any]:
    """What the means over the seeds say of one new tokenizer."""
    start, end = "0 steps", f"{STEPS} steps"
    best_baseline = min(mean[name][start] for name in BASELINES)
    ranked = {moment: sorted(INFORMED, key=lambda name: mean[name][moment]) for moment in (start, end)}
    return {
        "best baseline, 0 steps": best_baseline,
        "informed methods that do not beat every baseline, 0 steps": [
            name for name in INFORMED if mean[name][start] >= best_baseline
        ],
        "best method, 0 steps": {name: mean[name][start] for name in ranked[start][:1]},
        f"best method, {STEPS} steps": {name: mean[name][end] for name in ranked[end][:1]},
        "methods that beat retok, 0 steps": [n for n in ranked[start] if mean[n][start] < mean["retok"][start]],
        f"methods that beat retok, {STEPS} steps": [n for n in ranked[end] if mean[n][end] < mean["retok"][end]],
        f"methods after {STEPS} steps above the untrained normal draw": [
            name for name in INFORMED if mean[name][end] >= mean["normal"][start]
        ],
        f"best baseline, {STEPS} steps": min(mean[name][end] for name in BASELINES),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--encoder", help="auxiliary encoder: a name or folder for sentence-transformers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.process_time()
    texts, held_out = read_texts(arguments.folder)
    old, new_tokenizers = trained_tokenizers(texts)
    if arguments.encoder is None:
        auxiliary = {name: context_vectors(texts, [old, new]) for name, new in new_tokenizers.items()}
    else:
        auxiliary = dict.fromkeys(new_tokenizers, as_auxiliary_vectors(arguments.encoder))
    runs = [one_seed(seed, (old, new_tokenizers), auxiliary, texts, held_out) for seed in SEEDS]
    mean = means(runs)
    everything = {"the base's BPE": old, **new_tokenizers}
    held_out_bytes = sum(len(text.encode()) for text in held_out)
    figures = {
        "text": {
            "source": arguments.folder.name if arguments.folder else "documentation strings of Python's library",
            "bytes to learn from": sum(len(text.encode()) for text in texts),
            "bytes held out": held_out_bytes,
        },
        "bytes per token, held out": rounded(
            {name: held_out_bytes / sum(map(len, t(held_out)["input_ids"])) for name, t in everything.items()}
        ),
        "tokens": {name: len(tokenizer) for name, tokenizer in everything.items()},
        "tokens that the base has": {
            name: len(old.get_vocab().keys() & tokenizer.get_vocab().keys())
            for name, tokenizer in new_tokenizers.items()
        },
        "auxiliary vectors": arguments.encoder or "contexts in the text",
        "bits per byte, mean of the seeds": mean,
        "bits per byte, standard deviation": deviations(runs),
        "findings": {name: findings(mean[name]) for name in new_tokenizers},
        "CPU seconds": round(time.process_time() - started),
    }
    report("transplant_quality", " ".join(__doc__.split("\n\n")[0].split()), figures, ("torch", "transformers"))


if __name__ == "__main__":
    main()
