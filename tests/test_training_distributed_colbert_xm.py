"""Several processes train multi-vector retrievers: gradients are averaged, negatives stay with their process."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from rarezoo import ColBERTXMForRetrieval, ColBERTXMProcessor
from rarezoo.training import LateInteractionCollator, LateInteractionObjective, train_language

ROWS = [
    {"query": query, "positive": positive, "negatives": [negative], "language": language}
    for query, positive, negative, language in (
        ("what pulls the sea", "the moon pulls the sea", "the cat sat on the mat", "en"),
        ("capital of france", "Paris is the capital; it lies on the Seine.", "rain in the hills", "en"),
        ("qui dort", "le chat dort sur le tapis", "la Loire est le plus long fleuve", "fr"),
        ("who sat", "the cat sat on the mat and looked at the rain", "prices rose in 2019", "en"),
        ("how do prices change", "prices rose 3 % in 2019", "the moon is far away from here", "en"),
        ("maji yake", "maji yake yanatoka ziwa", "paka", "sw"),
        ("where does the seine flow", "the Seine flows through Paris to the sea", "a cat", "en"),
        ("why is it wet", "rain", "the capital is large", "en"),
    )
]

SCRIPT = """
import json, sys, torch
from transformers import TrainingArguments
from rarezoo import ColBERTXMForRetrieval, ColBERTXMProcessor
from rarezoo.training import LateInteractionCollator, LateInteractionObjective, LateInteractionTrainer

base, output, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
processor = ColBERTXMProcessor.from_pretrained(base)
model = ColBERTXMForRetrieval.from_pretrained(base, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
if settings["freeze"]:
    model.freeze_embeddings_and_language_adapters()
seen = []

class RecordingCollator(LateInteractionCollator):
    def __call__(self, batch):
        seen.append(batch)
        return super().__call__(batch)

trainer = LateInteractionTrainer(
    model,
    TrainingArguments(
        output_dir=output, max_steps=1, per_device_train_batch_size=4, learning_rate=0.1, optim="sgd",
        weight_decay=0.0, max_grad_norm=0.0, lr_scheduler_type="constant", use_cpu=True, ddp_backend="gloo",
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    ),
    objective=LateInteractionObjective(in_batch_weight=settings["in_batch_weight"]),
    mini_batch_size=settings["mini_batch_size"],
    train_dataset=settings["rows"],
    data_collator=RecordingCollator(processor, model.config),
    processing_class=processor,
)
trainer.train()
trainer.save_model(output)
state = {"rows": seen[0], "processes": trainer.accelerator.num_processes, "log": trainer.state.log_history[0]}
with open(f"{output}/process-{trainer.accelerator.process_index}.json", "w") as file:
    json.dump(state, file)
"""

LANGUAGE_SCRIPT = """
import json, sys, torch
from rarezoo import ColBERTXMForRetrieval, ColBERTXMProcessor
from rarezoo.training import train_language

base, output, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
model = ColBERTXMForRetrieval.from_pretrained(base, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
model.add_language("eu_ES", init_from="en")
train_language(
    model, "eu", texts, ColBERTXMProcessor.from_pretrained(base), steps=3, batch_size=4, max_length=20,
    learning_rate=1e-2, use_cpu=True, ddp_backend="gloo", disable_tqdm=True,
)
torch.save(model.state_dict(), f"{output}/{torch.distributed.get_rank()}.bin")
"""


@pytest.fixture(scope="module")
def folder(colbert_fixtures):
    return colbert_fixtures / "checkpoint"


def in_two_processes(script, tmp_path, *arguments):
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(tmp_path / "script.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def gradients(folder, rows, objective):
    """Of one batch in one process."""
    processor = ColBERTXMProcessor.from_pretrained(folder)
    model = ColBERTXMForRetrieval.from_pretrained(folder)
    batch = LateInteractionCollator(processor, model.config)(rows)
    queries, documents = batch["queries"], batch["documents"]

    def by_query(tensor):  # the collator's order is all positives, then all negatives
        return torch.stack(tensor.split(len(rows)), dim=1)

    loss, metrics = objective(
        model(**queries).embeddings,
        by_query(model(**documents).embeddings),
        query_mask=queries["keep_mask"].bool(),
        document_mask=by_query(documents["keep_mask"].bool()),
    )
    loss.backward()
    return metrics, {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mini_batch_size", "in_batch_weight", "freeze"),
    [(None, 1.0, True), (3, 1.0, True), (3, 1.0, False), (3, 0.0, True)],
)
def test_two_processes_average_their_gradients(tmp_path, folder, mini_batch_size, in_batch_weight, freeze):
    settings = {"mini_batch_size": mini_batch_size, "in_batch_weight": in_batch_weight, "freeze": freeze, "rows": ROWS}
    output = tmp_path / "out"
    in_two_processes(SCRIPT, tmp_path, str(folder), str(output), json.dumps(settings))
    parts = [json.loads((output / f"process-{rank}.json").read_text()) for rank in (0, 1)]
    assert [part["processes"] for part in parts] == [2, 2]
    assert sorted(row["query"] for part in parts for row in part["rows"]) == sorted(row["query"] for row in ROWS)
    objective = LateInteractionObjective(in_batch_weight=in_batch_weight)
    (metrics_0, first), (metrics_1, second) = (gradients(folder, part["rows"], objective) for part in parts)
    _, whole = gradients(folder, [row for part in parts for row in part["rows"]], objective)
    before, after = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    for name, tensor in after.items():
        expected = (first[name] + second[name]) / 2
        if freeze and (".embeddings." in name or ".adapter_modules." in name):
            expected = torch.zeros_like(expected)
        difference = (tensor - before[name] + 0.1 * expected).abs().max().item()
        assert difference <= 1e-5 * expected.abs().max().item() + 1e-7, name
    for name in ("ranking_loss", "cross_entropy_loss", "accuracy"):
        mean = (metrics_0[name] + metrics_1[name]).item() / 2
        assert parts[0]["log"][name] == pytest.approx(mean, rel=1e-5, abs=1e-6), name
    name = "linear.weight"
    assert not torch.equal(first[name], second[name])
    # Own passages are a row's alone: two halves are one batch. Negatives of the batch are those of the process.
    of_halves = (first[name] + second[name]) / 2
    assert torch.allclose(of_halves, whole[name], atol=1e-6, rtol=1e-4) == (in_batch_weight == 0)


@pytest.mark.slow
def test_two_processes_train_a_language(tmp_path, folder):
    """As one process that accumulates the batches of both."""
    texts = [f"{row['positive']} {row['query']}" for row in ROWS] * 2
    in_two_processes(LANGUAGE_SCRIPT, tmp_path, str(folder), str(tmp_path), json.dumps(texts))
    model = ColBERTXMForRetrieval.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.add_language("eu_ES", init_from="en")
    processor = ColBERTXMProcessor.from_pretrained(folder)
    train_language(
        model, "eu", texts, processor, steps=3, batch_size=4, max_length=20, learning_rate=1e-2,
        gradient_accumulation_steps=2, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    first, second = (torch.load(tmp_path / f"{rank}.bin") for rank in (0, 1))
    stored = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        if ".eu_ES." not in name:
            assert torch.equal(first[name], stored[name]), name
        torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
