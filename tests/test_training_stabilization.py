"""The language-model phase before retrieval training."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from rarezoo.training import stabilization_loss, stabilize

from .reference import FIXTURES, INPUTS, reference_model, reference_processor

TEXTS = INPUTS["documents"] + INPUTS["negatives"] + INPUTS["plain_texts"]


def whole_logits_loss(model, input_ids):
    """The formula with all logits at once, in float64."""
    hidden = model.model(input_ids=input_ids).last_hidden_state[:, :-1]
    logits = (model.lm_head(hidden) * model.config.logit_scale).double().flatten(0, 1)
    labels = input_ids[:, 1:].flatten()
    return F.cross_entropy(logits, labels) + F.cross_entropy(torch.log1p(logits.relu()), labels)


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 1024])
def test_loss_and_gradients(chunk_size):
    model = reference_model(logit_scale=0.7)
    input_ids = load_file(FIXTURES / "plain.safetensors")["input_ids_right"][:, :9]
    expected = whole_logits_loss(model, input_ids)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = stabilization_loss(model, input_ids, chunk_size)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - gradients[name]).abs().max().item()
        assert difference <= 1e-4 * gradients[name].abs().max().item() + 1e-8, name


class LargestLogits(TorchDispatchMode):
    """Most rows of any tensor `(rows, vocab_size)` that an operation returns, weights aside."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() > 1 and result.shape[-1] == 160 and result.shape[0] != 32:
            self.rows = max(self.rows, result.numel() // 160)
        return result


def test_memory_does_not_grow_with_the_batch():
    model = reference_model()
    input_ids = torch.arange(4 * 64).view(4, 64) % 160
    with LargestLogits() as whole:
        whole_logits_loss(model, input_ids).backward()
    with LargestLogits() as chunked:
        stabilization_loss(model, input_ids, chunk_size=16).backward()
    assert whole.rows == 4 * 63
    assert chunked.rows == 16


def test_training_makes_the_weights_predict_the_next_token(tmp_path):
    model = reference_model()
    processor = reference_processor()
    report = stabilize(
        model, processor, TEXTS, steps=60, batch_size=2, block_length=64, learning_rate=1e-2, disable_tqdm=True
    )
    assert report["steps"] == 60
    assert report["last_loss"] < 0.5 * report["first_loss"]
    ids = processor.tokenizer(TEXTS[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        weights = torch.log1p(model.lm_head(model.model(input_ids=ids).last_hidden_state).relu())
    loss = F.cross_entropy(weights[0, :-1], ids[0, 1:])
    assert loss < 0.6 * torch.log(torch.tensor(160.0)), "log(1 + relu(z)) alone has to carry the prediction"


def test_bfloat16_counts_during_training_only(capfd):
    """Its losses are others; afterwards the model computes in float32 again, and nothing has been printed."""
    settings = {"steps": 2, "batch_size": 2, "block_length": 32, "learning_rate": 0.0, "disable_tqdm": True}
    processor, model = reference_processor(), reference_model().eval()
    before = model.encode_documents(TEXTS[:2], processor)
    in_bfloat16 = stabilize(model, processor, TEXTS, bf16=True, **settings)
    found = model.encode_documents(TEXTS[:2], processor)
    assert (found != before).nnz == 0
    in_float32 = stabilize(reference_model(), processor, TEXTS, **settings)
    assert in_bfloat16 != in_float32
    assert in_bfloat16["first_loss"] == pytest.approx(in_float32["first_loss"], rel=0.02)
    assert capfd.readouterr().out == ""


def test_a_loss_that_is_not_finite_ends_the_training():
    with pytest.raises(FloatingPointError, match=r"the loss became (nan|inf) at step \d+\. Continue"):
        stabilize(
            reference_model(), reference_processor(), TEXTS, steps=20, batch_size=2, learning_rate=1e30,
            disable_tqdm=True,
        )  # fmt: skip


def test_checkpoints_and_resuming(tmp_path):
    def run(steps, folder):
        model = reference_model()
        stabilize(
            model, reference_processor(), TEXTS, steps=steps, batch_size=2, block_length=32, learning_rate=1e-3,
            lr_scheduler_type="constant", warmup_steps=0, output_dir=folder, disable_tqdm=True,
        )  # fmt: skip
        return model.state_dict()

    run(10, tmp_path / "parts")
    longer = run(20, tmp_path / "parts")
    whole = run(20, tmp_path / "whole")
    assert all(torch.equal(longer[name], whole[name]) for name in whole)


def test_lora_and_head_adapter():
    model = get_peft_model(reference_model(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    frozen = model.get_base_model().model.embed_tokens.weight.detach().clone()
    report = stabilize(
        model,
        reference_processor(),
        TEXTS,
        steps=20,
        batch_size=2,
        block_length=64,
        learning_rate=2e-2,
        disable_tqdm=True,
    )
    assert report["last_loss"] < report["first_loss"]
    assert torch.equal(model.get_base_model().model.embed_tokens.weight, frozen)


@pytest.mark.parametrize(
    ("overrides", "texts", "steps", "message"),
    [
        ({"attention_mode": "bidirectional"}, TEXTS, 1, "needs a causal model"),
        ({}, [], 1, "at least one"),
        ({}, [""], 1, "at least two tokens"),
        ({}, ["a", 3], 1, "all strings"),
        ({}, TEXTS, 0, "steps must be at least 1"),
    ],
)
def test_clear_errors(overrides, texts, steps, message):
    with pytest.raises(ValueError, match=message):
        stabilize(reference_model(**overrides), reference_processor(), texts, steps=steps)
