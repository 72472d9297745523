"""Teaching a multi-vector retriever a further language: masked language modelling that trains its adapter alone.

X-MOD (arXiv 2205.06266) learns a language after the fact by training new adapters on raw text with everything else
frozen; ColBERT-XM (arXiv 2402.15059, section 3.2) keeps its retrieval weights and takes such adapters as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DataCollatorForLanguageModeling, Trainer, XmodForMaskedLM
from transformers.trainer_utils import set_seed

from rarezoo.training.text_training import run_text_training, text_training_arguments
from rarezoo.training.trainer import autocast_removed, call_through, finite

NOT_PREDICTED = -100


def masked_language_loss(
    hidden_states: Tensor, labels: Tensor, decoder: nn.Module | None, embeddings: nn.Embedding, chunk_size: int = 256
) -> Tensor:
    """Cross-entropy of the masked tokens, mean over them: a float32 scalar.

    Logits are computed for `chunk_size` tokens at a time and again in the backward pass: with XLM-R's vocabulary, those
    of a whole batch would take gigabytes.

    Args:
        hidden_states: `(batch, length, hidden_size)`.
        labels: `(batch, length)`, the token's id where it is to be predicted, -100 elsewhere.
        decoder: hidden states to logits, the head of an X-MOD language model; None multiplies with the embeddings.
        embeddings: the model's.
        chunk_size: tokens at a time.
    """
    predicted = labels != NOT_PREDICTED
    hidden, targets = hidden_states[predicted], labels[predicted]

    def chunk_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, embeddings.weight) if decoder is None else decoder(hidden)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    pieces = zip(hidden.split(chunk_size), targets.split(chunk_size))
    losses = [checkpoint(chunk_loss, *piece, use_reentrant=False) for piece in pieces]
    # A batch of a few short texts may have nothing masked.
    return torch.stack(losses).sum() / max(len(targets), 1) if losses else 0.0 * hidden_states.sum()


def train_language(
    model: Any,
    code: str,
    texts: Iterable[str],
    processor: Any,
    *,
    language_model: str | Path | XmodForMaskedLM | None = None,
    steps: int = 1_000,
    batch_size: int = 32,
    max_length: int = 256,
    masked_share: float = 0.15,
    learning_rate: float = 1e-4,
    warmup_ratio: float = 0.1,
    chunk_size: int = 256,
    output_dir: str | Path | None = None,
    bf16: bool = False,
    seed: int = 0,
    **training_arguments: Any,
) -> dict[str, float]:
    """Train the adapter that `model.add_language(code)` added, in place, by masked language modelling on its texts.

    Nothing else changes: the vectors of all other languages stay bit-identical, and what trains, and what is in
    training mode, of `model` and of a `language_model` is afterwards as before. Of the masked tokens 80 % become
    `<mask>`, 10 % a random token, 10 % stay. Neither the paper nor X-MOD's gives steps and rates for a retriever's new
    language: the defaults are the usual ones of adapters.

    Args:
        model: a multi-vector retriever with an X-MOD backbone.
        code: the language; any name by which the model finds it.
        texts: raw texts in the language (`read_texts` reads files); long ones are cut into pieces, blank ones left
            out.
        processor: the retriever's processor; only its tokenizer is used.
        language_model: an X-MOD language model of the same vocabulary and width (such as facebook/xmod-base), as a
            model, folder or Hub name, whose head is used, frozen, on top of the hidden states. None multiplies them
            with the embeddings.
        steps: optimiser steps.
        batch_size: pieces per step and process.
        max_length: tokens of a piece, `<s>` and `</s>` included; at most as many as the model has positions.
        masked_share: share of the tokens that are to be predicted; of a batch, at least one token is.
        learning_rate: highest value; linear warm-up over `warmup_ratio` of the steps, then linear decay.
        chunk_size: masked tokens whose logits are in memory at one time.
        output_dir: folder for a checkpoint every tenth of the way; a run that finds one there goes on from it. None
            keeps none.
        bf16: compute in bfloat16 autocast.
        seed: of the order of the pieces, of masks and dropout.
        training_arguments: further arguments of transformers' `TrainingArguments`.

    Returns:
        `{"first_loss", "last_loss", "steps"}`, the losses being means over a hundredth of the run.

    Raises:
        TypeError: `processor` is no processor.
        ValueError: the model has no such language, there are no texts or blank ones alone, or the language model does
            not fit.
        FloatingPointError: the loss became infinite or NaN; the adapter is of no use then.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
    if not 0 < masked_share <= 1:
        raise ValueError(f"masked_share must be above 0 and at most 1, found {masked_share}")
    model.check_processor(processor)
    language = model.config.language_id(code)
    longest = model.config.max_position_embeddings - model.config.pad_token_id - 1
    pieces = _pieces(processor.tokenizer, texts, min(max_length, longest))
    set_seed(seed)
    settings = {
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": round(warmup_ratio * steps),
        "bf16": bf16,
        "seed": seed,
        **training_arguments,
    }
    with (
        _frozen_head(language_model, model) as head,
        _only_adapter_trains(model, model.config.languages[language]),
        text_training_arguments(output_dir, steps, batch_size, **settings) as args,
    ):
        trainer = _AdapterTrainer(
            model=model,
            args=args,
            train_dataset=pieces,
            data_collator=_Masking(processor.tokenizer, masked_share, seed),
            processing_class=processor,
        )
        # Otherwise the Trainer expects losses that are sums over the tokens of all accumulated batches.
        trainer.model_accepts_loss_kwargs = False
        trainer.language, trainer.chunk_size = language, chunk_size
        trainer.head = None if head is None else head.to(args.device)
        return run_text_training(trainer, output_dir)


class _AdapterTrainer(Trainer):
    language: int
    chunk_size: int
    head: nn.Module | None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        retriever = self.accelerator.unwrap_model(model)

        def loss() -> Tensor:
            ids = inputs["input_ids"]
            languages = torch.full((len(ids),), self.language, device=ids.device)
            output = retriever.roberta(input_ids=ids, attention_mask=inputs["attention_mask"], lang_ids=languages)
            embeddings = retriever.get_input_embeddings()
            return masked_language_loss(
                output.last_hidden_state, inputs["labels"], self.head, embeddings, self.chunk_size
            )

        # accelerate hangs its own on the forward pass of the whole retriever, which is not called here.
        with self.accelerator.autocast():
            value = call_through(model, loss)
        return (value, {}) if return_outputs else value

    def training_step(self, model, inputs, num_items_in_batch=None):
        return finite(super().training_step(model, inputs, num_items_in_batch), self.state.global_step + 1)


class _Masking:
    """Batches with masks that depend on nothing but the seed and the pieces in their order, so that a run that goes on
    draws those of an uninterrupted one."""

    def __init__(self, tokenizer: Any, share: float, seed: int):
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=share, seed=seed)
        self.seed = seed

    def __call__(self, pieces: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        content = repr([piece["input_ids"] for piece in pieces]).encode()
        self.collator.generator = torch.Generator().manual_seed(zlib.crc32(content) ^ self.seed)
        batch = self.collator(pieces)
        while (batch["labels"] == NOT_PREDICTED).all():  # few and short texts: draw again
            batch = self.collator(pieces)
        return batch


@contextmanager
def _left_as_found(module: nn.Module) -> Iterator[None]:
    """Which weights train, and which modules are in training mode, is afterwards as it was."""
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    modes = {name: inner.training for name, inner in module.named_modules()}
    try:
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.requires_grad = trained[name]
        for name, inner in module.named_modules():
            inner.training = modes[name]


@contextmanager
def _only_adapter_trains(model: Any, code: str) -> Iterator[None]:
    """All other weights are frozen for a while."""
    with _left_as_found(model), autocast_removed(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = f".adapter_modules.{code}." in name
        try:
            yield
        finally:
            model.zero_grad()


@contextmanager
def _frozen_head(language_model: str | Path | XmodForMaskedLM | None, model: Any) -> Iterator[nn.Module | None]:
    """The head of a language model, frozen for a while. It may share weights with the embeddings of the caller's."""
    if language_model is None:
        yield None
        return
    head = (language_model if isinstance(language_model, nn.Module) else _opened(language_model)).lm_head
    shape = (model.config.vocab_size, model.config.hidden_size)
    if tuple(head.decoder.weight.shape) != shape:
        raise ValueError(
            f"the language model's head must be of (vocab_size, hidden_size) = {shape}, "
            f"found {tuple(head.decoder.weight.shape)}"
        )
    device = head.decoder.weight.device
    with _left_as_found(head):
        yield head.eval().requires_grad_(False)
    head.to(device)


def _opened(source: str | Path) -> Any:
    loaded: Any = XmodForMaskedLM.from_pretrained(str(source), output_loading_info=True)
    language_model, report = loaded
    missing = sorted(name for name in report["missing_keys"] if name.startswith("lm_head."))
    if missing:
        raise ValueError(f"the language model has no head: {', '.join(missing)} are missing")
    return language_model


def _pieces(tokenizer: Any, texts: Iterable[str], max_length: int) -> list[dict[str, list[int]]]:
    """Ids of the texts, cut to `max_length` tokens each, special tokens included; those without others left out."""
    texts = list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("train_language() needs texts: at least one, all strings")
    if max_length < 3:
        raise ValueError(f"max_length must be at least 3, found {max_length}")
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    columns = ("input_ids", "attention_mask", "special_tokens_mask")
    pieces = [dict(zip(columns, piece)) for piece in zip(*(encoded[name] for name in columns))]
    pieces = [piece for piece in pieces if not all(piece["special_tokens_mask"])]
    if not pieces:
        raise ValueError(f"train_language() needs texts, but all {len(texts)} are blank: there is no token to mask")
    return pieces
