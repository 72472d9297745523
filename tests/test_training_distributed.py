"""Several processes: the gradients of their parts of the batch are averaged, also with recomputed mini-batches."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from rarezoo.mistral_splade import MistralSpladeForRetrieval, MistralSpladeProcessor
from rarezoo.training import SparseObjective, SparseTrainingRecipe, train

ROWS = [
    {"query": query, "positive": positive}
    for query, positive in (
        ("who sat", "the cat sat on the mat"),
        ("capital of france", "paris is a city"),
        ("planets", "jupiter is large"),
        ("rivers", "the rhine is long and slow"),
        ("cats", "a dog is no cat"),
        ("bread", "milk and bread and salt"),
        ("who ran", "the dog ran over the hill"),
        ("echo", "the input is given twice"),
    )
]

SCRIPT = """
import json, sys, torch
from transformers import TrainingArguments
from rarezoo.mistral_splade import MistralSpladeForRetrieval, MistralSpladeProcessor
from rarezoo.training import RetrievalCollator, SparseObjective, SparseRetrievalTrainer

base, rows, output, mini_batch_size = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
torch.set_num_threads(1)
processor = MistralSpladeProcessor.from_pretrained(base)
seen = []

class RecordingCollator(RetrievalCollator):
    def __call__(self, batch):
        seen.append(batch)
        return super().__call__(batch)

trainer = SparseRetrievalTrainer(
    MistralSpladeForRetrieval.from_pretrained(base),
    TrainingArguments(
        output_dir=output, max_steps=1, per_device_train_batch_size=4, learning_rate=0.1, optim="sgd",
        max_grad_norm=0.0, lr_scheduler_type="constant", use_cpu=True, ddp_backend="gloo", report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    ),
    objective=SparseObjective(
        query_regularizer_weight=0.3, document_regularizer_weight=0.5, regularizer_warmup_steps=1
    ),
    mini_batch_size=mini_batch_size,
    train_dataset=rows,
    data_collator=RecordingCollator(processor),
    processing_class=processor,
)
trainer.train()
trainer.save_model(output)
state = {"rows": seen[0], "processes": trainer.accelerator.num_processes, "log": trainer.state.log_history[0]}
with open(f"{output}/process-{trainer.accelerator.process_index}.json", "w") as file:
    json.dump(state, file)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed") / "base"
    recipe = SparseTrainingRecipe(
        preset="tiny",
        vocabulary_size=80,
        config={"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.1},
        batch_size=4,
        max_steps=1,
        save_steps=0,
    )
    train(recipe, folder, rows=ROWS)
    return folder


def gradients(folder, rows, objective):
    processor = MistralSpladeProcessor.from_pretrained(folder)
    model = MistralSpladeForRetrieval.from_pretrained(folder).train()
    queries = model(**processor.process_queries([row["query"] for row in rows])).sparse_embedding
    documents = model(**processor.process_documents([row["positive"] for row in rows])).sparse_embedding
    loss, metrics = objective(queries, documents, step=0, max_steps=1)
    loss.backward()
    return metrics, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_two_processes_average_their_gradients(tmp_path, base, mini_batch_size):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [
        str(tmp_path / "script.py"),
        str(base),
        json.dumps(ROWS),
        str(tmp_path / "out"),
        json.dumps(mini_batch_size),
    ]
    result = subprocess.run(
        [*command, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr[-3000:]
    parts = [json.loads((tmp_path / "out" / f"process-{rank}.json").read_text()) for rank in (0, 1)]
    assert [part["processes"] for part in parts] == [2, 2]
    assert sorted(row["query"] for part in parts for row in part["rows"]) == sorted(row["query"] for row in ROWS)
    objective = SparseObjective(
        query_regularizer_weight=0.3, document_regularizer_weight=0.5, regularizer_warmup_steps=1
    )
    (metrics_0, first), (metrics_1, second) = (gradients(base, part["rows"], objective) for part in parts)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in before.items():
        expected = (first[name] + second[name]) / 2
        difference = (after[name] - tensor + 0.1 * expected).abs().max().item()
        assert difference <= 1e-5 * expected.abs().max().item() + 1e-8, name
    for name in ("ranking_loss", "query_flops", "document_active_dimensions"):
        mean = (metrics_0[name] + metrics_1[name]).item() / 2
        assert parts[0]["log"][name] == pytest.approx(mean, rel=1e-5)
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])
