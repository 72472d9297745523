"""A language model small enough to learn this machine's documentation strings in a CPU minute, and what it costs to
write held-out text with it in any tokenizer: what the tour of tokenizer transplantation and the benchmark of its
methods share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import svds
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from transformers.trainer_utils import set_seed

from rarezoo.tokenizer_transplant import Vocabulary
from rarezoo.training.language_model import collate_tokens, pack_texts
from rarezoo.training.text_training import run_text_training, text_training_arguments

SPECIAL_TOKENS = ("<|endoftext|>",)
SEQUENCE_LENGTH = 96
HELD_OUT_CHARACTERS = 300
_CONTEXT_SMOOTHING = 0.75


def new_language_model(tokenizer: Any, hidden_size: int, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights, a head of its own, and a row for every token."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def learn_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | Sequence[Mapping[str, Any]],
    steps: int,
    *,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
) -> None:
    """Train whatever requires gradients with transformers' `Trainer`: AdamW, a tenth of warm-up, then linear decay.

    Args:
        texts: or rows that `pack_texts` made of them.
        steps, batch_size: rows of 96 tokens.
    """
    settings = {
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": steps // 10,
        "weight_decay": 0.01,
        "adam_beta2": 0.95,
        "seed": seed,
        "label_names": ["labels"],
    }
    with text_training_arguments(None, steps, batch_size, **settings) as arguments:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=pack_texts(texts, tokenizer, SEQUENCE_LENGTH),
            data_collator=collate_tokens,
        )
        run_text_training(trainer, None)
    model.eval()


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 32) -> float:
    """Bits that the model needs for a byte of the texts, each written in the tokenizer's tokens, from the start of a
    text to its last byte. Unlike perplexities, it compares models with different tokenizers.

    Args:
        model: a causal language model.
        tokenizer: has an end of text, which stands before a text as it stood between the texts of the training.
        texts: not empty.
    """
    rows = sorted(([tokenizer.eos_token_id, *ids] for ids in tokenizer(list(texts))["input_ids"]), key=len)
    nats = 0.0
    for start in range(0, len(rows), batch_size):
        batch = collate_tokens([{"input_ids": row} for row in rows[start : start + batch_size]])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        losses = nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        nats += losses.item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def context_vectors(
    texts: Sequence[str], tokenizers: Sequence[Any], dimensions: int = 64, window: int = 2
) -> dict[str, NDArray[np.float32]]:
    """Vectors of the strings of tokens, from what stands around them in texts: an auxiliary space without a download.

    Wherever one of the tokenizers writes a token, the tokens that the first of them writes before and behind it are
    its context. The vectors are the truncated singular value decomposition of the positive pointwise mutual information
    of strings and contexts (Levy, Goldberg and Dagan 2015: contexts smoothed with the power 0.75, singular values with
    the power 0.5).

    Args:
        texts: of the language.
        tokenizers: fast ones; the strings are those of all.
        dimensions: of the vectors.
        window: tokens of the context on either side.

    Returns:
        String, its leading space included, to `(dimensions,)`. Strings that do not occur, or only in contexts that tell
        nothing, have none.
    """
    reader, reader_starts, reader_ends = _spans(tokenizers[0], texts)
    padding = np.full(window, len(tokenizers[0]))  # before the first token and behind the last
    padded = np.concatenate([padding, reader, padding])
    size = len(tokenizers[0]) + 1
    strings: dict[str, int] = {}
    places = []
    for tokenizer in tokenizers:
        ids, starts, ends = _spans(tokenizer, texts)
        names = [strings.setdefault(text or "", len(strings)) for text in Vocabulary(tokenizer).texts]
        before = np.searchsorted(reader_ends, starts, "right") - 1 + window
        behind = np.searchsorted(reader_starts, ends, "left") + window
        contexts = [padded[before - step] + step * size for step in range(window)]
        contexts += [padded[behind + step] + (window + step) * size for step in range(window)]
        places.append((np.tile(np.array(names)[ids], len(contexts)), np.concatenate(contexts)))
    rows, columns = (np.concatenate(part) for part in zip(*places))
    table = sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(strings), 2 * window * size)).tocsr()
    information = _pointwise_information(table)
    vectors = _decomposed(information, dimensions)
    informed = information.sum(1) > 0  # the others' vectors are rounding errors
    return {string: vectors[row] for string, row in strings.items() if informed[row]}


def _spans(tokenizer: Any, texts: Sequence[str]) -> tuple[NDArray, NDArray, NDArray]:
    """Ids of all tokens of the texts one after another, and the characters where they start and end."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    borders = np.cumsum([0, *map(len, texts)])
    spans = np.concatenate(
        [np.array(part) + border for part, border in zip(encoded["offset_mapping"], borders) if part]
    )
    return np.concatenate([part for part in encoded["input_ids"] if part]), spans[:, 0], spans[:, 1]


def _pointwise_information(counts: sparse.csr_array) -> sparse.csr_array:
    """max(0, log(p(string, context) / (p(string) p(context)))), contexts smoothed."""
    total = counts.sum()
    of_strings = counts.sum(1) / total
    of_contexts = counts.sum(0) ** _CONTEXT_SMOOTHING
    of_contexts /= of_contexts.sum()
    found = counts.tocoo()
    rows, columns = found.coords
    information = np.log(found.data / total / (of_strings[rows] * of_contexts[columns])).clip(min=0)
    return sparse.coo_array((information, (rows, columns)), shape=counts.shape).tocsr()


def _decomposed(table: sparse.csr_array, dimensions: int) -> NDArray[np.float32]:
    """(rows, dimensions); the start of the iteration is fixed, so that it is the same everywhere."""
    left, values, _ = svds(table, k=dimensions, v0=np.ones(min(table.shape)))
    return (left * np.sqrt(values)).astype(np.float32)
