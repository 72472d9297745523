"""Preparing a causal language model for sparse retrieval, so that its representations do not collapse.

A language model's logits are mostly negative, or far above zero everywhere: log(1 + relu(z)) of them is empty or dense,
and a retrieval loss alone can push a whole vocabulary below zero, where no gradient comes back ("dying ReLU"). CSPLADE
(arXiv 2504.10816) first trains on raw text with L = CE(z) + CE(log(1 + relu(z))): the model keeps predicting the next
token from z, and learns to do so from the non-negative weights as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase, Trainer

from rarezoo.training.text_training import run_text_training, text_training_arguments
from rarezoo.training.trainer import autocast_removed, call_through, finite


def stabilization_loss(model: Any, input_ids: Tensor, chunk_size: int = 1024) -> Tensor:
    """`CE(z) + CE(log(1 + relu(z)))` of the next token, z the logits times the model's logit scale.

    Logits are computed for `chunk_size` positions at a time and again in the backward pass: memory holds
    `chunk_size * vocab_size` of them, whatever the batch.

    Args:
        model: a causal retriever with a vocabulary head, or a PEFT model around one.
        input_ids: `(batch, length)` without padding, `length` at least 2.
        chunk_size: positions at a time.

    Returns:
        A float32 scalar, mean over the `batch * (length - 1)` predicted tokens.
    """
    retriever = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(retriever, retriever.base_model_prefix)
    hidden = backbone(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    labels = input_ids[:, 1:].flatten()
    head, scale = retriever.get_output_embeddings(), retriever.config.logit_scale
    total = hidden.new_zeros((), dtype=torch.float32)
    for hidden_chunk, label_chunk in zip(hidden.split(chunk_size), labels.split(chunk_size)):
        total = total + checkpoint(_summed_loss, head, hidden_chunk, label_chunk, scale, use_reentrant=False)
    return total / len(labels)


def _summed_loss(head: nn.Module, hidden: Tensor, labels: Tensor, scale: float) -> Tensor:
    logits = head(hidden)
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float() * scale
        weights = torch.log1p(torch.relu(logits))
        return F.cross_entropy(logits, labels, reduction="sum") + F.cross_entropy(weights, labels, reduction="sum")


def stabilize(
    model: Any,
    processor: Any,
    texts: Iterable[str],
    steps: int = 10_000,
    *,
    batch_size: int = 32,
    block_length: int = 2048,
    learning_rate: float = 1e-4,
    warmup_steps: int | None = None,
    chunk_size: int = 1024,
    output_dir: str | Path | None = None,
    bf16: bool = False,
    seed: int = 0,
    **training_arguments: Any,
) -> dict[str, float]:
    """Train `model` in place on raw text with `stabilization_loss`, before any retrieval training.

    The defaults for steps, batch, length, warm-up and the cosine schedule are CSPLADE's; its learning rate is not
    known.

    Args:
        model: a causal retriever (attention mode echo, plain or repeat), or a PEFT model around one.
        processor: the retriever's processor; only its tokenizer is used.
        texts: raw texts. They are joined, with an end-of-text token behind each, and cut into blocks.
        steps: optimiser steps.
        batch_size: blocks per step and process.
        block_length: tokens per block; less if the texts have fewer tokens altogether.
        learning_rate: highest value of the cosine schedule.
        warmup_steps: steps of linear warm-up; default a tenth of `steps`.
        chunk_size: positions whose logits are in memory at one time.
        output_dir: folder for a checkpoint every tenth of the way; a run that finds one there goes on from it. None
            keeps none.
        bf16: compute in bfloat16 autocast.
        seed: of the order of the blocks.
        training_arguments: further arguments of transformers' `TrainingArguments`.

    Returns:
        `{"first_loss", "last_loss", "steps"}`.

    Raises:
        ValueError: the model is bidirectional, or there are no texts of two tokens.
        FloatingPointError: the loss became infinite or NaN.
    """
    retriever = model.get_base_model() if hasattr(model, "get_base_model") else model
    if retriever.config.attention_mode == "bidirectional":
        raise ValueError(
            "stabilize() predicts the next token and needs a causal model; attention_mode='bidirectional' sees it"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
    blocks = _blocks(processor.tokenizer, texts, block_length)
    settings = {
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 10 if warmup_steps is None else warmup_steps,
        "bf16": bf16,
        "seed": seed,
        **training_arguments,
    }
    with text_training_arguments(output_dir, steps, batch_size, **settings) as args, autocast_removed(model):
        trainer = _StabilizationTrainer(model=model, args=args, train_dataset=blocks, processing_class=processor)
        trainer.chunk_size = chunk_size
        return run_text_training(trainer, output_dir)


class _StabilizationTrainer(Trainer):
    chunk_size: int

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        retriever = self.accelerator.unwrap_model(model)
        # accelerate hangs its own on the forward pass of the whole retriever, which is not called here.
        with self.accelerator.autocast():
            loss = call_through(model, lambda: stabilization_loss(retriever, inputs["input_ids"], self.chunk_size))
        return (loss, {}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        return finite(super().training_step(model, inputs, num_items_in_batch), self.state.global_step + 1)


def _blocks(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], block_length: int) -> list[dict[str, Tensor]]:
    """Blocks of equal length; what is left over at the end is dropped unless it is all there is."""
    texts = list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("stabilize() needs texts: at least one, all strings")
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for ids in encoded for token in (*ids, *end)], dtype=torch.long)
    if len(tokens) < 2:
        raise ValueError(f"stabilize() needs texts of at least two tokens, found {len(tokens)}")
    length = min(block_length, len(tokens))
    return [{"input_ids": block} for block in tokens.split(length) if len(block) == length]
