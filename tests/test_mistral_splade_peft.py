"""LoRA on Mistral-SPLADE against PEFT's reference numbers, with the vocabulary head among the targets."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM

from .cases import DEVICE

peft = pytest.importorskip("peft")

ADAPTERS = ("adapter_linear", "adapter_with_head")
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def echo(fixture_folder):
    return load_file(fixture_folder / "echo.safetensors", device=DEVICE)


@pytest.fixture(scope="module")
def expected(fixture_folder):
    return load_file(fixture_folder / "lora.safetensors", device=DEVICE)


@pytest.fixture
def load(splade_checkpoint):
    return lambda **fields: AutoModel.from_pretrained(splade_checkpoint, **fields).to(DEVICE).eval()


@pytest.fixture
def adapter_folder(fixture_folder, splade_checkpoint, tmp_path):
    """`adapter_folder(name)`: a copy of the reference adapter that names our checkpoint as its base.

    `task_type=None`: PEFT wraps adapters of causal language models, as the references are, in a class that generates.
    """

    def copy(name, task_type=None):
        folder = shutil.copytree(fixture_folder / name, tmp_path / f"{name}_{task_type}")
        config = peft.LoraConfig.from_pretrained(folder)
        config.base_model_name_or_path = str(splade_checkpoint)
        config.task_type = task_type
        config.save_pretrained(folder)
        return folder

    return copy


def batch(echo, kind):
    return dict(
        input_ids=echo[f"{kind}.input_ids"],
        attention_mask=echo[f"{kind}.attention_mask"],
        pool_mask=echo[f"{kind}.embed_mask"],
    )


def assert_reference(model, echo, expected, name):
    for kind in ("query", "document"):
        found = model(**batch(echo, kind)).sparse_embedding
        torch.testing.assert_close(found, expected[f"{name}.{kind}.rep_max"], atol=TOLERANCE, rtol=0)
        assert (found - echo[f"{kind}.rep_max"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_reference_adapters(load, echo, expected, adapter_folder, name):
    """The adapter at work and merged, at PEFT's scale alpha / r, through each way to open it."""
    causal = adapter_folder(name, task_type="CAUSAL_LM")
    assert_reference(AutoModel.from_pretrained(causal).to(DEVICE).eval(), echo, expected, name)
    folder = adapter_folder(name)
    wrapped = peft.PeftModel.from_pretrained(load(), folder).eval()
    assert_reference(wrapped, echo, expected, name)
    with wrapped.disable_adapter():
        found = wrapped(**batch(echo, "document")).sparse_embedding
        torch.testing.assert_close(found, echo["document.rep_max"], atol=1e-5, rtol=0)
    wrapped.merge_adapter()
    assert_reference(wrapped, echo, expected, name)
    wrapped.unmerge_adapter()
    assert_reference(wrapped, echo, expected, name)
    merged = wrapped.merge_and_unload()
    assert_reference(merged, echo, expected, name)
    if name == "adapter_linear":
        weight = merged.model.layers[0].self_attn.q_proj.weight
        reference = expected["adapter_linear.merged.layers.0.self_attn.q_proj.weight"]
        torch.testing.assert_close(weight, reference, atol=1e-6, rtol=0)


@torch.no_grad()
def test_merging_a_head_adapter_changes_the_head_alone(load, adapter_folder, tmp_path, echo, expected):
    """The head's update is not dropped, and the embeddings stay as they are; also after saving."""
    original = load()
    merged = peft.PeftModel.from_pretrained(load(), adapter_folder("adapter_with_head")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    reopened = AutoModel.from_pretrained(tmp_path / "merged").to(DEVICE).eval()
    for model in (merged, reopened):
        assert not torch.equal(model.lm_head.weight, original.lm_head.weight)
        assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
        assert_reference(model, echo, expected, "adapter_with_head")


@torch.no_grad()
def test_adapter_on_a_tied_head(load, echo, tmp_path):
    """The head adapts, the embeddings that it shares do not; untied before merging, merged equals unmerged."""
    model = load()
    model.config.tie_word_embeddings = True
    model.lm_head.weight.copy_(0.25 * model.model.embed_tokens.weight)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path).to(DEVICE).eval()
    embeddings = model.model.embed_tokens.weight
    assert model.lm_head.weight is embeddings
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, r=4)
    wrapped = peft.get_peft_model(model, config).eval()
    unmerged = wrapped(**batch(echo, "document")).sparse_embedding
    with wrapped.disable_adapter():
        assert (wrapped(**batch(echo, "document")).sparse_embedding - unmerged).abs().max() > 1e-2

    before = embeddings.clone()
    model.config.tie_word_embeddings = False
    model.lm_head.base_layer.weight = torch.nn.Parameter(before.clone())
    merged = wrapped.merge_and_unload()
    assert torch.equal(merged.model.embed_tokens.weight, before)
    assert not torch.equal(merged.lm_head.weight, before)
    torch.testing.assert_close(merged(**batch(echo, "document")).sparse_embedding, unmerged, atol=TOLERANCE, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    reopened = AutoModel.from_pretrained(tmp_path / "merged").to(DEVICE).eval()
    torch.testing.assert_close(reopened(**batch(echo, "document")).sparse_embedding, unmerged, atol=TOLERANCE, rtol=0)


def test_gradients_of_a_head_adapter_equal_autograds(splade_checkpoint, load, echo):
    """The low-rank head is never multiplied out, forward or backward; the formula over all logits agrees."""
    config = dict(target_modules=["q_proj", "lm_head"], init_lora_weights=False, r=4)
    torch.manual_seed(0)
    fused = peft.get_peft_model(load(), peft.LoraConfig(**config)).eval()
    torch.manual_seed(0)
    masked_lm = AutoModelForMaskedLM.from_pretrained(splade_checkpoint).to(DEVICE)
    naive = peft.get_peft_model(masked_lm, peft.LoraConfig(**config)).eval()
    inputs = batch(echo, "document")
    found = fused(**inputs).sparse_embedding
    pool_mask = inputs.pop("pool_mask").bool().unsqueeze(-1)
    expected = torch.where(pool_mask, naive(**inputs).logits, -1.0).amax(dim=1).relu().log1p()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    references = dict(naive.named_parameters())
    trained = {name: parameter for name, parameter in fused.named_parameters() if parameter.requires_grad}
    assert sum("lm_head" in name for name in trained) == 2
    for name, parameter in trained.items():
        reference = references[name].grad
        assert (parameter.grad - reference).norm() <= 1e-4 * reference.norm(), name
    assert fused.base_model.model.lm_head.base_layer.weight.grad is None


@torch.no_grad()
def test_several_adapters(load, echo, expected, adapter_folder):
    """Both reference adapters in one model, switched; together they are more than either."""
    model = peft.PeftModel.from_pretrained(load(), adapter_folder("adapter_linear"), adapter_name="linear")
    model.load_adapter(adapter_folder("adapter_with_head"), adapter_name="head")
    model.eval()
    for adapter, name in (("head", "adapter_with_head"), ("linear", "adapter_linear")):
        model.set_adapter(adapter)
        assert_reference(model, echo, expected, name)
    model.base_model.set_adapter(["linear", "head"])
    found = model(**batch(echo, "document")).sparse_embedding
    for name in ADAPTERS:
        assert (found - expected[f"{name}.document.rep_max"]).abs().max() > 1e-2
    merged = model.merge_and_unload(adapter_names=["linear", "head"])
    torch.testing.assert_close(merged(**batch(echo, "document")).sparse_embedding, found, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_encoding_with_an_adapter(load, echo, expected, adapter_folder, inputs):
    """The retriever's own methods work on a model that was opened through its adapter's folder, or is wrapped."""
    folder = adapter_folder("adapter_linear")
    model = AutoModel.from_pretrained(folder).to(DEVICE).eval()
    wrapped = peft.PeftModel.from_pretrained(load(), folder).eval()
    reference = expected["adapter_linear.document.rep_max"].cpu()
    for encoder in (model, wrapped):
        found = encoder.encode_documents(inputs["documents"], output="dense")
        torch.testing.assert_close(found, reference, atol=TOLERANCE, rtol=0)


def test_a_batch_of_several_adapters_on_the_head(load):
    """PEFT's `adapter_names`: every row with its own adapter, also where rows and positions are of one number."""
    model = load()
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="a")
    wrapped.add_adapter("b", config)
    wrapped.eval()
    ids = torch.randint(3, 90, (4, 4), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pool_mask": torch.ones_like(ids)}
    with torch.no_grad():
        single = {}
        for name in ("a", "b"):
            wrapped.set_adapter(name)
            single[name] = wrapped(**inputs).sparse_embedding
        names = ["a", "b", "b", "a"]
        found = wrapped(**inputs, adapter_names=names).sparse_embedding
    assert (single["a"] - single["b"]).abs().max() > 0.1
    expected = torch.stack([single[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
