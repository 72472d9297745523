"""Mistral-SPLADE's classes: backbone, masks, pooling rules, precision, and what happens at the edges."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, MistralConfig, MistralForCausalLM, MistralModel
from transformers.utils import logging

from rarezoo import MistralSpladeConfig, MistralSpladeForRetrieval, MistralSpladeModel

from .cases import CASES, DEVICE

CASE = CASES["mistral_splade"]


@pytest.fixture(scope="module")
def echo(fixture_folder):
    return load_file(fixture_folder / "echo.safetensors", device=DEVICE)


@pytest.fixture
def warnings_of(monkeypatch):
    """What the family's model file says through its logger, repeated messages included."""
    from rarezoo.mistral_splade import modeling_mistral_splade

    said = []
    monkeypatch.setattr(modeling_mistral_splade.logger, "warning_once", said.append)
    return said


def documents(echo):
    return dict(
        input_ids=echo["document.input_ids"],
        attention_mask=echo["document.attention_mask"],
        pool_mask=echo["document.embed_mask"],
    )


def assert_close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@torch.no_grad()
def test_backbone_is_stock_mistral(splade_checkpoint, echo):
    """The base class, opened from a retriever's checkpoint, is transformers' Mistral bit for bit."""
    ours = MistralSpladeModel.from_pretrained(splade_checkpoint).to(DEVICE).eval()
    fields = {name: value for name, value in ours.config.to_dict().items() if name in MistralConfig().to_dict()}
    stock = MistralModel(MistralConfig(**{**fields, "model_type": "mistral"})).to(DEVICE).eval()
    stock.load_state_dict(ours.state_dict())
    arguments = {name: value for name, value in documents(echo).items() if name != "pool_mask"}
    assert torch.equal(ours(**arguments).last_hidden_state, stock(**arguments).last_hidden_state)


def test_weight_names_are_mistrals(fixture_folder):
    """So that every tool for Mistral reads the checkpoint; the official file loads as it is."""
    expected = load_file(fixture_folder / "model.safetensors").keys()
    for auto_class in CASE.heads:
        assert CASE.build(auto_class).state_dict().keys() == expected
    assert MistralForCausalLM(MistralConfig(**CASE.config)).state_dict().keys() == expected


@torch.no_grad()
def test_both_heads_hold_the_same_numbers(splade_checkpoint, echo):
    """Pooling the masked-LM head's logits by hand gives the retriever's vector, logit scale included."""
    arguments = documents(echo)
    retriever = AutoModel.from_pretrained(splade_checkpoint, logit_scale=0.6).to(DEVICE)
    masked_lm = AutoModelForMaskedLM.from_pretrained(splade_checkpoint, logit_scale=0.6).to(DEVICE)
    pool_mask = arguments.pop("pool_mask")
    logits = masked_lm(**arguments).logits
    expected = torch.where(pool_mask.bool().unsqueeze(-1), logits, -1.0).amax(dim=1).relu().log1p()
    assert_close(retriever(**arguments, pool_mask=pool_mask).sparse_embedding, expected)


def test_loss_of_the_masked_lm_head():
    """Cross-entropy at each labelled position itself, without a shift."""
    model = CASE.build("AutoModelForMaskedLM")
    inputs = CASE.batch("AutoModelForMaskedLM")
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"].roll(1, dims=0), -100)
    outputs = model(**inputs, labels=labels)
    log_probabilities = outputs.logits.log_softmax(dim=-1)
    picked = labels != -100
    expected = -log_probabilities[picked].gather(1, labels[picked].unsqueeze(1)).mean()
    assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_bidirectional_without_padding(attention):
    """With no mask given and none needed, the kernels still must not fall back to a causal one."""
    ids = CASE.rows((8,))[0].unsqueeze(0).to(DEVICE)
    causal = CASE.build(attention=attention, attention_mode="plain")
    both_ways = CASE.build(attention=attention, attention_mode="bidirectional")
    other_end = ids.clone()
    other_end[0, -1] = 5
    for mask in (None, torch.ones_like(ids)):
        changed = [
            (model.model(ids, mask).last_hidden_state - model.model(other_end, mask).last_hidden_state)[0, 0]
            .abs()
            .max()
            for model in (causal, both_ways)
        ]
        assert changed[0] == 0 and changed[1] > 1e-3


@torch.no_grad()
def test_mode_given_at_loading_is_the_mode(tmp_path):
    """`attention_mode` can be replaced when a checkpoint is opened, and is stored as opened."""
    inputs = CASE.batch("AutoModel")
    CASE.build(attention_mode="echo").save_pretrained(tmp_path / "echo")
    expected = CASE.build(attention_mode="bidirectional")(**inputs).sparse_embedding
    loaded = AutoModel.from_pretrained(tmp_path / "echo", attention_mode="bidirectional").to(DEVICE)
    assert torch.equal(loaded(**inputs).sparse_embedding, expected)
    loaded.save_pretrained(tmp_path / "both")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "both").to(DEVICE)(**inputs).sparse_embedding, expected)
    back = AutoModel.from_pretrained(tmp_path / "both", attention_mode="plain").to(DEVICE)
    assert torch.equal(back(**inputs).sparse_embedding, CASE.build(attention_mode="plain")(**inputs).sparse_embedding)


@torch.no_grad()
def test_repeat_mode_with_positions_through_the_padding():
    """Explicit `position_ids` are used as given: without them packed copies count on through the row."""
    model, inputs = CASE.build(attention_mode="repeat"), CASE.batch("AutoModel")
    positions = torch.arange(inputs["input_ids"].shape[1], device=DEVICE).expand_as(inputs["input_ids"])
    expected = model(**inputs).sparse_embedding
    assert torch.equal(model(**inputs, position_ids=positions).sparse_embedding, expected)
    assert (model(**inputs, position_ids=2 * positions).sparse_embedding - expected).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pooling", ["max", "sum", "mean", "last"])
def test_rows_that_pool_nothing_are_zero(attention, pooling):
    """Nothing marked, or nothing but padding: zeros, no NaN forward or backward, the other rows as without them."""
    model, inputs = CASE.build(attention=attention, pooling=pooling), CASE.batch("AutoModel")
    expected = model(**inputs).sparse_embedding
    nothing_marked = {name: tensor.clone() for name, tensor in inputs.items()}
    nothing_marked["pool_mask"][1] = 0
    only_padding = {name: tensor.clone() for name, tensor in nothing_marked.items()}
    only_padding["attention_mask"][1] = 0
    for case in (nothing_marked, only_padding):
        found = model(**case).sparse_embedding
        assert found[1].eq(0).all()
        assert_close(found[[0, 2]], expected[[0, 2]])
        model.zero_grad()
        found.sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), name
    alone = model(input_ids=inputs["input_ids"], pool_mask=torch.zeros_like(inputs["pool_mask"])).sparse_embedding
    assert alone.eq(0).all()


@pytest.mark.parametrize("pooling", ["max", "sum", "last"])
@torch.no_grad()
def test_shift_under_left_padding(pooling):
    """A text that is pooled from its first token: the padding before it predicts that token, but is no position."""
    model = CASE.build(attention_mode="plain", logit_shift=1, pooling=pooling)
    right, left = (CASE.batch("AutoModel", padding_side=side) for side in ("right", "left"))
    for inputs in (right, left):
        inputs["pool_mask"] = inputs["attention_mask"]
    expected = model(**right).sparse_embedding
    assert_close(model(**left).sparse_embedding, expected)
    del left["pool_mask"]
    assert_close(model(**left).sparse_embedding, expected)
    # A text of one token has no position whose next token is marked.
    single = torch.tensor([[7]], device=DEVICE)
    assert model(input_ids=single).sparse_embedding.eq(0).all()


@torch.no_grad()
def test_without_a_pool_mask(warnings_of):
    """The attention mask is pooled; where a second copy should be, that is said."""
    inputs = CASE.batch("AutoModel")
    everything = {**inputs, "pool_mask": inputs["attention_mask"]}
    del inputs["pool_mask"]
    for mode in ("plain", "bidirectional", "echo", "repeat"):
        warnings_of.clear()
        model = CASE.build(attention_mode=mode)
        assert torch.equal(model(**inputs).sparse_embedding, model(**everything).sparse_embedding)
        assert [("all positions are pooled" in message) for message in warnings_of] == [True] * (
            mode in ("echo", "repeat")
        )


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
@torch.no_grad()
def test_pool_mask_of_any_kind(kind):
    model, inputs = CASE.build(), CASE.batch("AutoModel")
    expected = model(**inputs).sparse_embedding
    inputs["pool_mask"] = inputs["pool_mask"].to(kind)
    assert torch.equal(model(**inputs).sparse_embedding, expected)


@pytest.mark.parametrize("cut", [(slice(None), slice(1, None)), (slice(1, None), slice(None))])
def test_pool_mask_of_another_shape_is_refused(cut):
    model, inputs = CASE.build(), CASE.batch("AutoModel")
    inputs["pool_mask"] = inputs["pool_mask"][cut]
    with pytest.raises(ValueError, match=r"expected a pool_mask of shape \(batch, length\) = \(3, 9\); found"):
        model(**inputs)


def test_special_tokens_are_kept_unless_excluded():
    """Exclusion is opt-in: by default <s>, </s> and <unk> are dimensions like any other."""
    special = [0, 1, 2]
    model, inputs = CASE.build(), CASE.batch("AutoModel")
    assert model.config.excluded_token_ids == []
    everything = model(**inputs).sparse_embedding
    assert (everything[:, special] > 0).any(dim=0).all()
    model.config.excluded_token_ids = special
    found = model(**inputs).sparse_embedding
    assert found[:, special].eq(0).all()
    assert torch.equal(found[:, 3:], everything[:, 3:])
    found.sum().backward()
    assert model.lm_head.weight.grad[special].eq(0).all()
    assert model.lm_head.weight.grad[3:].abs().max() > 0


@torch.no_grad()
def test_representations_are_float32_in_any_precision():
    """Low precision ends at the logits; a row's entries barely depend on its batch."""
    inputs = CASE.batch("AutoModel")
    expected = CASE.build()(**inputs).sparse_embedding
    model = CASE.build().to(torch.bfloat16)
    found = model(**inputs).sparse_embedding
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.03 * expected.norm()
    # More than the 256 steps that bfloat16 has between two powers of two: nothing was rounded after the logits.
    assert not torch.equal(found, found.bfloat16().float())
    for row, ids in enumerate(CASE.rows()):
        alone = model(**CASE.batch("AutoModel", [ids])).sparse_embedding[0]
        differing = (alone > 0) != (found[row] > 0)
        assert torch.where(differing, torch.maximum(alone, found[row]), 0.0).max() < 0.05
        assert (alone - found[row]).abs().max() < 0.05
    full = CASE.build()
    with torch.autocast(DEVICE.split(":")[0], dtype=torch.bfloat16):
        mixed = full(**inputs).sparse_embedding
    assert mixed.dtype == torch.float32
    assert (mixed - expected).norm() < 0.03 * expected.norm()


def test_gradient_only_where_active():
    """A weight of zero passes no gradient: the head's rows without an active entry keep theirs at zero."""
    model, inputs = CASE.build(), CASE.batch("AutoModel")
    embedding = model(**inputs).sparse_embedding
    embedding.sum().backward()
    active = (embedding > 0).any(dim=0)
    assert 0 < active.sum() < len(active)
    gradient = model.lm_head.weight.grad.abs().amax(dim=1)
    assert torch.equal(gradient > 0, active)


def test_old_rope_field(tmp_path):
    """`rope_theta` at the top level, as in checkpoints before transformers 5."""
    CASE.make_config().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["rope_parameters"]
    stored["rope_theta"] = 1e6
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters == {"rope_theta": 1e6, "rope_type": "default"}
    model = MistralSpladeForRetrieval(config)
    inverse = model.model.rotary_emb.inv_freq
    expected = 1.0 / 1e6 ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    torch.testing.assert_close(inverse.cpu(), expected)


def test_head_dim_default_is_mistrals():
    config = MistralSpladeConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    assert config.head_dim == 16
    assert MistralSpladeConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8).head_dim == 8


def test_mistral_checkpoint_opens_as_a_retriever(fixture_folder, echo):
    """A plain Mistral folder, without any of our fields, gives the retriever with the defaults."""
    logging.set_verbosity_error()
    try:
        model, report = MistralSpladeForRetrieval.from_pretrained(fixture_folder, output_loading_info=True)
    finally:
        logging.set_verbosity_warning()
    assert not any(report.values()), report
    assert model.config.attention_mode == "echo" and model.config.head_dim == 8
    with torch.no_grad():
        assert_close(model.to(DEVICE)(**documents(echo)).sparse_embedding, echo["document.rep_max"])


def test_head_that_can_only_be_called(splade_checkpoint, echo):
    """A quantized vocabulary head gives, tile by tile, what its own logits give."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    options = dict(quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["model"]))
    arguments = documents(echo)
    retriever = AutoModel.from_pretrained(splade_checkpoint, dtype=torch.float32, **options).eval()
    masked_lm = AutoModelForMaskedLM.from_pretrained(splade_checkpoint, dtype=torch.float32, **options).eval()
    assert type(retriever.lm_head).__name__ == "Linear8bitLt"
    with torch.no_grad():
        found = retriever(**arguments).sparse_embedding
        pool_mask = arguments.pop("pool_mask").bool().unsqueeze(-1)
        expected = torch.where(pool_mask, masked_lm(**arguments).logits, -1.0).amax(dim=1).relu().log1p()
    assert (found - echo["document.rep_max"]).abs().max() > 1e-4
    # int8 layers scale by the largest activation of a row, so that the rows of a batch do not matter.
    assert F.cosine_similarity(found, expected).min() > 1 - 1e-6
    assert_close(found, expected, tolerance=1e-3)
