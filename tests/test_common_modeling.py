"""What every family's forward and backward passes must hold, under every variant of the configuration."""

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from rarezoo.auto import FAMILIES

from .cases import CASES, DEVICE, MODEL_HEADS, MODELS, VARIANTS, VOCABULARY_HEADS, auto

TOLERANCE = 1e-5


@pytest.fixture(params=MODEL_HEADS, ids="-".join)
def head(request):
    family, auto_class = request.param
    return MODELS[family], auto_class


@pytest.fixture(params=VARIANTS, ids="-".join)
def variant(request):
    family, auto_class, name = request.param
    case = MODELS[family]
    return case, auto_class, case.variants[name]


def assert_close(found, expected):
    assert expected.abs().max() > 0.1  # a comparison of zeros would prove nothing
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_eager_attention_equals_sdpa(variant):
    case, auto_class, fields = variant
    eager, sdpa = (case.build(auto_class, attention=kind, **fields) for kind in ("eager", "sdpa"))
    for padding_side in ("right", "left"):
        inputs = case.batch(auto_class, padding_side=padding_side)
        assert_close(case.answer(sdpa, auto_class, inputs), case.answer(eager, auto_class, inputs))
    # Without padding, and without a mask, sdpa gets no mask at all and decides about causality by itself.
    inputs = case.batch(auto_class, rows=case.rows((7, 7)))
    expected = case.answer(eager, auto_class, inputs)
    assert_close(case.answer(sdpa, auto_class, inputs), expected)
    mask = inputs.pop("attention_mask")
    for model in (sdpa, eager):
        assert_close(case.answers[auto_class](model(**inputs), {"attention_mask": mask}), expected)


@torch.no_grad()
def test_left_padding_equals_right_padding(variant):
    case, auto_class, fields = variant
    model = case.build(auto_class, **fields)
    left, right = (case.answer(model, auto_class, case.batch(auto_class, None, side)) for side in ("left", "right"))
    assert_close(left, right)


@torch.no_grad()
def test_batch_equals_single_rows(variant):
    case, auto_class, fields = variant
    model = case.build(auto_class, **fields)
    singles = [case.answer(model, auto_class, case.batch(auto_class, [row])) for row in case.rows()]
    assert_close(case.answer(model, auto_class, case.batch(auto_class)), torch.cat(singles))


@torch.no_grad()
def test_padding_ids_do_not_matter(variant):
    case, auto_class, fields = variant
    model, inputs = case.build(auto_class, **fields), case.batch(auto_class)
    expected = case.answer(model, auto_class, inputs)
    inputs["input_ids"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 77)
    assert_close(case.answer(model, auto_class, inputs), expected)


@torch.no_grad()
def test_embeddings_instead_of_ids(head):
    case, auto_class = head
    model, inputs = case.build(auto_class), case.batch(auto_class)
    expected = case.answer(model, auto_class, inputs)
    inputs["inputs_embeds"] = case.embed(model.get_input_embeddings(), inputs)
    del inputs["input_ids"]
    assert torch.equal(case.answer(model, auto_class, inputs), expected)


@torch.no_grad()
def test_outputs_as_a_tuple_and_with_hidden_states(head):
    case, auto_class = head
    model, inputs = case.build(auto_class, attention="eager"), case.batch(auto_class)
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    config = model.config
    batch, length = inputs["input_ids"].shape
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(batch, length, config.hidden_size)] * (
        config.num_hidden_layers + 1
    )
    assert [tuple(weights.shape) for weights in outputs.attentions] == [
        (batch, config.num_attention_heads, length, length)
    ] * config.num_hidden_layers
    assert torch.equal(model(**inputs, return_dict=False)[0], outputs[0])


def gradients(case, auto_class, model, inputs) -> dict[str, torch.Tensor]:
    """Of a fixed random projection of the answer."""
    model.zero_grad()
    answer = case.answer(model, auto_class, inputs)
    weights = torch.randn(answer.shape, generator=torch.Generator().manual_seed(2)).to(answer)
    (answer * weights).sum().backward()
    used = [(name, parameter) for name, parameter in model.named_parameters() if case.trained(name)]
    return {name: parameter.grad.clone() for name, parameter in used}


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_gradient_checkpointing(head, use_reentrant):
    case, auto_class = head
    model, inputs = case.build(auto_class).train(), case.batch(auto_class)
    expected = gradients(case, auto_class, model, inputs)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    runs = []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == model.config.num_hidden_layers
    for layer in layers:
        next(layer.children()).register_forward_pre_hook(lambda *_: runs.append(1))
    found = gradients(case, auto_class, model, inputs)
    assert len(runs) == 2 * len(layers)  # once forward, once again for the backward pass
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6 * case.gradient_size, rtol=1e-5, msg=name)


def test_no_dropout_of_its_own_in_training(head):
    """Training mode without dropout probabilities computes what evaluation computes."""
    case, auto_class = head
    model, inputs = case.build(auto_class), case.batch(auto_class)
    model.config.use_cache = False  # training keeps none, and kernels round by how tensors lie in memory
    expected = case.answer(model, auto_class, inputs)
    assert torch.equal(case.answer(model.train(), auto_class, inputs), expected)


@torch.no_grad()
def test_resized_vocabulary(head, tmp_path):
    """Old entries keep their weights and answers; the new size is stored."""
    case, auto_class = head
    model, inputs = case.build(auto_class), case.batch(auto_class)
    expected = case.answer(model, auto_class, inputs)
    size = model.config.vocab_size
    for new_size in (size + 9, size - 10):
        model.resize_token_embeddings(new_size)
        assert model.config.vocab_size == new_size
        stored = getattr(model.get_input_embeddings(), "weight", None)
        assert stored is None or stored.shape[0] == new_size
        inputs["input_ids"] = inputs["input_ids"].clamp(max=new_size - 1)
        found = case.answer(model, auto_class, inputs)
        if model.get_output_embeddings() is not None:
            assert model.get_output_embeddings().weight.shape[0] == found.shape[-1] == new_size
        if new_size > size:
            assert torch.equal(found[..., : expected.shape[-1]], expected)
            assert found.shape[-1] in (expected.shape[-1], new_size)
        stored = model if case.family in CASES else model.merge_and_unload()
        stored.save_pretrained(tmp_path / str(new_size))
        loaded = auto(auto_class).from_pretrained(tmp_path / str(new_size)).to(DEVICE)
        assert torch.equal(case.answer(loaded, auto_class, inputs), found)


@pytest.mark.parametrize("family_head", VOCABULARY_HEADS, ids="-".join)
@torch.no_grad()
def test_tied_head(family_head, tmp_path):
    """`tie_word_embeddings`: one tensor, stored once, still one after loading; a tied head is the embedding matrix."""
    case, auto_class = MODELS[family_head[0]], family_head[1]
    tied, inputs = case.build(auto_class, tie_word_embeddings=True), case.batch(auto_class)
    embedding, output = tied.get_input_embeddings().weight, tied.get_output_embeddings().weight
    assert embedding.data_ptr() == output.data_ptr()
    expected = case.answer(tied, auto_class, inputs)

    untied = case.build(auto_class)
    assert untied.get_input_embeddings().weight.data_ptr() != untied.get_output_embeddings().weight.data_ptr()
    untied.load_state_dict(tied.state_dict())
    assert torch.equal(case.answer(untied, auto_class, inputs), expected)

    tied.save_pretrained(tmp_path)
    loaded, report = auto(auto_class).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    loaded.to(DEVICE)
    assert loaded.config.tie_word_embeddings
    assert loaded.get_input_embeddings().weight.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()
    assert torch.equal(case.answer(loaded, auto_class, inputs), expected)


def test_flags_of_the_model_class(head):
    case, auto_class = head
    model = case.build(auto_class)
    assert model.supports_gradient_checkpointing and model._supports_sdpa
    if case.heads[auto_class] != FAMILIES[case.family].base_model:
        assert model.base_model is not model and model.base_model_prefix in dict(model.named_children())
    for module_class in model._no_split_modules:
        assert module_class in {type(module).__name__ for module in model.modules()}
    assert model.config.architectures == [case.heads[auto_class]] or model.config.architectures is None
