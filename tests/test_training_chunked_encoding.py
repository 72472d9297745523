"""Large batches in chunks: gradients against plain autograd of the whole batch, and the fixture's gradients."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rarezoo.training import SparseObjective, encode_in_chunks, flops_regularizer, info_nce_loss

from .reference import FIXTURES, reference_model

EXPECTED = json.loads((FIXTURES / "losses.json").read_text())


def fixture_inputs():
    tensors = load_file(FIXTURES / "echo.safetensors")
    sides = {
        side: {
            "input_ids": tensors[f"{side}.input_ids"],
            "attention_mask": tensors[f"{side}.attention_mask"],
            "pool_mask": tensors[f"{side}.embed_mask"],
        }
        for side in ("query", "document", "negative")
    }
    width = max(side["input_ids"].shape[1] for side in (sides["document"], sides["negative"]))
    documents = {
        name: torch.cat(
            [
                torch.nn.functional.pad(sides[side][name], (0, width - sides[side][name].shape[1]))
                for side in ("document", "negative")
            ]
        )
        for name in ("input_ids", "attention_mask", "pool_mask")
    }
    return sides["query"], documents


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(actual, expected, relative=1e-4):
    assert actual.keys() == expected.keys()
    for name in expected:
        difference = (actual[name] - expected[name]).abs().max().item()
        assert difference <= relative * expected[name].abs().max().item(), name


def encoder(model):
    return lambda inputs: model(**inputs).sparse_embedding


@pytest.mark.parametrize("mini_batch_size", [None, 1, 2, 4, 100])
def test_fixture_losses_and_gradients(mini_batch_size):
    model = reference_model().train()
    queries, documents = fixture_inputs()
    objective = SparseObjective(
        query_regularizer_weight=EXPECTED["lambda_q"], document_regularizer_weight=EXPECTED["lambda_d"]
    )
    loss, metrics = objective(
        encode_in_chunks(encoder(model), queries, mini_batch_size),
        encode_in_chunks(encoder(model), documents, mini_batch_size),
        step=5,
        max_steps=5,
    )
    assert loss.item() == pytest.approx(EXPECTED["splade_loss_total"], abs=1e-5)
    assert metrics["ranking_loss"].item() == pytest.approx(EXPECTED["info_nce_scale_1.0"], abs=1e-5)
    assert metrics["query_active_dimensions"].item() == pytest.approx(EXPECTED["l0_query_naver"], abs=1e-5)
    computed = gradients(model, loss)
    stored = load_file(FIXTURES / "loss_grads.safetensors")
    expected = {name[len("grad.") :]: value for name, value in stored.items() if name.startswith("grad.")}
    assert len(expected) == 6
    assert_close({name: computed[name] for name in expected}, expected)


def test_dropout_is_the_same_in_both_passes():
    """With dropout, equal gradients need equal masks: plain autograd over the same chunks with the same seed."""
    model = reference_model(attention_dropout=0.5, attn_implementation="eager").train()
    queries, _ = fixture_inputs()

    def loss_of(representations):
        return info_nce_loss(representations, representations.detach().flip(0)) + flops_regularizer(representations)

    lengths = queries["attention_mask"].sum(dim=1)
    order = lengths.argsort(stable=True)
    torch.manual_seed(5)
    kept = torch.cat(
        [encoder(model)({name: t[row : row + 1, : lengths[row]] for name, t in queries.items()}) for row in order]
    )
    kept = kept[order.argsort()]
    expected = gradients(model, loss_of(kept))

    torch.manual_seed(5)
    chunked = encode_in_chunks(encoder(model), queries, mini_batch_size=1)
    torch.manual_seed(99)  # what happens in between must not matter
    assert torch.allclose(chunked, kept, atol=1e-6)
    assert_close(gradients(model, loss_of(chunked)), expected)

    torch.manual_seed(6)
    other = encode_in_chunks(encoder(model), queries, mini_batch_size=1)
    assert not torch.allclose(other, kept, atol=1e-3), "dropout was not active"


def test_with_activation_checkpointing_inside():
    model = reference_model().train()
    queries, _ = fixture_inputs()
    expected = gradients(model, flops_regularizer(encoder(model)(queries)))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert_close(gradients(model, flops_regularizer(encode_in_chunks(encoder(model), queries, 2))), expected)


def test_memory_holds_one_chunk():
    """Tensors kept for the backward pass: the whole batch's without chunks, hardly any with them."""
    model = reference_model().train()
    queries, _ = fixture_inputs()
    queries = {name: tensor.repeat(8, 1) for name, tensor in queries.items()}

    def kept_elements(mini_batch_size):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            encode_in_chunks(encoder(model), queries, mini_batch_size)
        return sum(kept)

    assert kept_elements(4) < 0.05 * kept_elements(None)


def test_chunks_are_cut_to_their_own_length():
    seen = []

    def encode(inputs):
        seen.append(tuple(inputs["input_ids"].shape))
        return inputs["input_ids"].float().sum(dim=1, keepdim=True)

    lengths = torch.tensor([9, 2, 5, 2])
    attention_mask = (torch.arange(9) < lengths.unsqueeze(1)).long()
    right = {"input_ids": attention_mask * torch.tensor([[1], [2], [3], [4]]), "attention_mask": attention_mask}
    left = {name: tensor.flip(1) for name, tensor in right.items()}
    for inputs in (right, left):
        seen.clear()
        result = encode_in_chunks(encode, inputs, mini_batch_size=2)
        assert seen == [(2, 2), (2, 9)]
        assert result.squeeze(1).tolist() == [9.0, 4.0, 15.0, 8.0]


def test_empty_texts_keep_one_column():
    inputs = {"input_ids": torch.zeros(3, 4, dtype=torch.long), "attention_mask": torch.zeros(3, 4, dtype=torch.long)}
    result = encode_in_chunks(lambda chunk: chunk["input_ids"].float(), inputs, mini_batch_size=2)
    assert result.shape == (3, 1)


def test_clear_error():
    with pytest.raises(ValueError, match="mini_batch_size must be at least 1"):
        encode_in_chunks(lambda inputs: inputs, {"attention_mask": torch.ones(2, 3)}, 0)
