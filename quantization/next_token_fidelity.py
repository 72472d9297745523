"""What quantization changed in the next-token distributions of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LONGEST_ROW = 256
RANDOM_ROWS, RANDOM_LENGTH, RANDOM_SYMBOLS = 16, 128, 32
_LOGITS_AT_ONCE = 2**25  # numbers of one model for one row


def tokenized(tokenizer: Any, texts: Sequence[str], vocab_size: int) -> list[Tensor]:
    """The tokens of each text, int64, at most `LONGEST_ROW` of them; texts of fewer than two are left out.

    Raises:
        ValueError: no text has two tokens, or the tokenizer has more tokens than the model.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    rows = [torch.tensor(ids[:LONGEST_ROW], dtype=torch.long) for ids in encoded if len(ids) > 1]
    if not rows:
        raise ValueError("none of the texts has two tokens: there is nothing to predict")
    largest = max(int(row.max()) for row in rows)
    if largest >= vocab_size:
        raise ValueError(f"the tokenizer gives the id {largest}, but the model has {vocab_size} tokens")
    return rows


def random_tokens(vocab_size: int) -> list[Tensor]:
    """For models without a tokenizer: rows of tokens that repeat, each drawn from a few of its own; the same rows on
    every call and machine."""
    generator = torch.Generator().manual_seed(0)
    count = min(RANDOM_SYMBOLS, vocab_size)
    rows = []
    for _ in range(RANDOM_ROWS):
        # Not a permutation of all: there may be a million of them.
        symbols = torch.randint(vocab_size, (count,), generator=generator)
        rows.append(symbols[torch.randint(count, (RANDOM_LENGTH,), generator=generator)])
    return rows


@torch.no_grad()
def compare_next_tokens(full_precision: Any, quantized: Any, rows: Sequence[Tensor]) -> dict[str, Any]:
    """Comparison of two causal language models over one vocabulary, row by row.

    Args:
        full_precision, quantized: models in evaluation mode.
        rows: int64 (length,), of two tokens at least.

    Returns:
        Number of texts and of predicted tokens; perplexity of both and its relative change; Kullback-Leibler divergence
        KL(full precision || quantized) in nats, mean and maximum over the positions; the share of positions at which
        the likeliest next token is the same.
    """
    losses: dict[str, list[Tensor]] = {"full_precision": [], "quantized": []}
    divergences, agreements = [], []
    for row in rows:
        first, second = (_log_probabilities(model, row) for model in (full_precision, quantized))
        if not second.isfinite().all():
            raise ValueError("the quantized model gives values that are not finite; choose another scheme")
        targets = row[1 : len(first) + 1, None].to(first.device)
        for name, found in (("full_precision", first), ("quantized", second)):
            losses[name].append(-found.gather(1, targets)[:, 0])
        divergences.append((first.exp() * (first - second)).sum(1))
        agreements.append(first.argmax(1) == second.argmax(1))
    divergence = torch.cat(divergences).clamp(min=0)  # what rounding leaves below
    perplexities = {name: math.exp(float(torch.cat(values).mean())) for name, values in losses.items()}
    return {
        "texts": len(rows),
        "tokens": len(divergence),
        "perplexity": {**perplexities, "change": perplexities["quantized"] / perplexities["full_precision"] - 1},
        "divergence_nats": {"mean": float(divergence.mean()), "maximum": float(divergence.max())},
        "top_1_agreement": float(torch.cat(agreements).double().mean()),
    }


def _log_probabilities(model: Any, row: Tensor) -> Tensor:
    """(predictions, vocab_size) float64; of a large vocabulary, only as many positions as fit."""
    length = max(2, min(len(row), _LOGITS_AT_ONCE // model.config.vocab_size))
    logits = model(row[None, :length].to(model.device), use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(-1)
