"""Gradients of a step of ColBERT-XM's trainer, as the optimiser meets them: whole batches, chunks, accumulation."""

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from rarezoo import ColBERTXMForRetrieval, ColBERTXMProcessor
from rarezoo.colbert_xm.max_sim import max_sim_pairs
from rarezoo.training import LateInteractionCollator, LateInteractionObjective, LateInteractionTrainer

ROWS = [
    {"query": "what pulls the sea", "positive": "the moon pulls the sea, twice a day", "negatives": ["a cat", "rain"]},
    {"query": "capital", "positive": "Paris is the capital.", "negatives": ["rain in the hills", "the sea"]},
    {"query": "quel fleuve", "positive": "la Loire", "negatives": ["le chat", "la pluie"], "language": "fr"},
    {"query": "who sat", "positive": "the cat sat on the mat and looked", "negatives": ["prices", "a moon"]},
    {"query": "maji", "positive": "maji yake yanatoka ziwa", "negatives": ["paka", "mto"], "language": "sw"},
    {"query": "why is it wet", "positive": "rain", "negatives": ["the capital is large", "cats"]},
]
SCORES = [[3.0, 1.0, 0.5], [2.0, 2.5, 0.0], [4.0, 1.0, 1.0], [1.0, 0.0, -1.0], [2.0, 1.5, 0.2], [0.3, 0.1, 0.0]]


class Recorded(LateInteractionCollator):
    """Keeps the rows of every batch."""

    def __call__(self, rows):
        self.__dict__.setdefault("batches", []).append(list(rows))
        return super().__call__(rows)


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def folder(colbert_fixtures):
    return colbert_fixtures / "checkpoint"


@pytest.fixture(scope="module")
def processor(folder):
    return ColBERTXMProcessor.from_pretrained(folder)


def without_dropout(folder):
    model = ColBERTXMForRetrieval.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.freeze_embeddings_and_language_adapters()
    return model


def gradients(path, folder, processor, objective, batch_size, accumulation_steps=1, mini_batch_size=None):
    """Of the one step of a run; and the rows of its batches."""
    model, kept = without_dropout(folder), KeepGradients()
    collator = Recorded(processor, model.config)
    trainer = LateInteractionTrainer(
        model,
        TrainingArguments(
            output_dir=str(path), per_device_train_batch_size=batch_size, max_steps=1, max_grad_norm=0.0,
            gradient_accumulation_steps=accumulation_steps, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False,
        ),
        objective=objective,
        mini_batch_size=mini_batch_size,
        train_dataset=[{**row, "scores": scores} for row, scores in zip(ROWS, SCORES)],
        data_collator=collator,
        processing_class=processor,
        callbacks=[kept],
    )  # fmt: skip
    trainer.train()
    return kept.gradients, collator.batches


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-6 * max(1, scale), name
    assert scale > 0.01


def test_chunks_and_accumulation_have_the_gradients_of_the_whole_batch(tmp_path, folder, processor):
    """In three languages; with losses over a query's own passages, of which accumulated batches lose none."""
    own = LateInteractionObjective(in_batch_weight=0.0, distillation_weight=0.5, distillation_alpha=0.7)
    whole, _ = gradients(tmp_path, folder, processor, own, 6)
    assert not any(".embeddings." in name or ".adapter_modules." in name for name in whole)
    assert_same(gradients(tmp_path, folder, processor, own, 6, mini_batch_size=1)[0], whole)
    assert_same(gradients(tmp_path, folder, processor, own, 2, accumulation_steps=3)[0], whole)
    assert_same(gradients(tmp_path, folder, processor, own, 3, accumulation_steps=2, mini_batch_size=2)[0], whole)
    in_batch = LateInteractionObjective()
    whole, _ = gradients(tmp_path, folder, processor, in_batch, 6)
    assert_same(gradients(tmp_path, folder, processor, in_batch, 6, mini_batch_size=4)[0], whole)


def test_accumulated_in_batch_negatives_are_those_of_each_part(tmp_path, folder, processor):
    """As colbert-ai's `accumsteps`: the mean of the parts' losses, here by plain calls of the model."""
    found, parts = gradients(tmp_path, folder, processor, LateInteractionObjective(), 2, accumulation_steps=3)
    model = without_dropout(folder).train()
    assert [len(part) for part in parts[:3]] == [2, 2, 2]
    for part in parts[:3]:
        batch = LateInteractionCollator(processor, model.config)(part)
        queries, documents = (model(**batch[side]).embeddings for side in ("queries", "documents"))
        documents = documents.unflatten(0, (3, 2)).transpose(0, 1)
        mask = batch["documents"]["keep_mask"].bool().unflatten(0, (3, 2)).transpose(0, 1)
        own = max_sim_pairs(queries, documents, document_mask=mask)
        other = max_sim_pairs(queries, documents.flip(0), document_mask=mask.flip(0))
        zeros = torch.zeros(2, dtype=torch.long)
        loss = torch.nn.functional.cross_entropy(own, zeros)
        loss = loss + torch.nn.functional.cross_entropy(torch.cat([own[:, :1], other], dim=1), zeros)
        (loss / 3).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(found, expected)
