"""Merging LoRA adapters, compared with PEFT's own `merge_and_unload`, and the adapters that are refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MistralForCausalLM

from rarezoo.conversion import ConversionError
from rarezoo.conversion.lora_adapter import LoraAdapter


@pytest.fixture
def base(fixture_folder):
    return MistralForCausalLM.from_pretrained(fixture_folder)


@pytest.fixture
def shapes(base):
    return {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}


def save_random_adapter(base, folder, **options):
    """A PEFT adapter with both factors random, as PEFT saves it; returns what PEFT merges it to."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture
def copied_adapter(fixture_folder, tmp_path):
    """`copied_adapter(name)`: a copy of one of the fixture's adapters that a test may damage."""

    def copy(name="adapter_linear"):
        return shutil.copytree(fixture_folder / name, tmp_path / name)

    return copy


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.mlp\.(gate|up)_proj"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "down_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "use_rslora": True},
        {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3}},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    ],
    ids=["linear", "all-linear", "pattern", "head", "embedding", "rslora", "patterns", "saved", "layers", "excluded"],
)
def test_merging_equals_peft(options, base, shapes, tmp_path):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = save_random_adapter(base, tmp_path, **options)
    adapter = LoraAdapter(tmp_path, shapes)
    changed = {name for name in expected if not torch.equal(expected[name], before[name])}
    assert set(adapter.touched) == changed and changed
    for name, tensor in before.items():
        assert torch.allclose(adapter.merge(name, tensor), expected[name], rtol=0, atol=1e-6), name
        assert torch.equal(tensor, before[name]), "the base weight was changed in place"


def test_the_fixture_s_merged_weight(fixture_folder, shapes, base):
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = LoraAdapter(fixture_folder / "adapter_linear", shapes).merge(name, base.state_dict()[name])
    expected = load_file(fixture_folder / "lora.safetensors")
    expected = expected["adapter_linear.merged.layers.0.self_attn.q_proj.weight"]
    assert (merged - expected).abs().max() <= 1e-6


def test_half_precision_weights_are_merged_in_float32(fixture_folder, shapes, base):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(fixture_folder / "adapter_linear" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{x}.weight"].double() for x in "AB")
    weight = base.state_dict()[name].bfloat16()
    merged = LoraAdapter(fixture_folder / "adapter_linear", shapes).merge(name, weight)
    assert merged.dtype == torch.float32
    assert torch.allclose(merged.double(), weight.double() + 2.0 * b @ a, rtol=0, atol=1e-6)


def test_adapters_of_the_inner_model_and_with_the_adapter_s_name_are_read(copied_adapter, shapes, base):
    folder = copied_adapter()
    expected = LoraAdapter(folder, shapes)

    def rename(tensors):
        for name in list(tensors):
            new = name.replace("base_model.model.model.", "base_model.model.").replace(".weight", ".default.weight")
            tensors[new] = tensors.pop(name)

    name = "model.layers.0.mlp.down_proj.weight"
    weight = base.state_dict()[name]
    merged = expected.merge(name, weight)
    edit_tensors(folder, rename)
    assert torch.equal(LoraAdapter(folder, shapes).merge(name, weight), merged)


def test_a_bin_adapter_is_read(copied_adapter, shapes, base):
    folder = copied_adapter()
    name = "model.layers.0.mlp.down_proj.weight"
    expected = LoraAdapter(folder, shapes).merge(name, base.state_dict()[name])
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert torch.equal(LoraAdapter(folder, shapes).merge(name, base.state_dict()[name]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stored_copy_of_the_head_must_be_the_base_s(dtype, copied_adapter, shapes, base):
    adapter = LoraAdapter(copied_adapter("adapter_with_head"), shapes)
    assert adapter.base_copies == ("lm_head.weight",)
    head = base.lm_head.weight.detach()
    merged = adapter.merge("lm_head.weight", head.to(dtype))
    assert not torch.equal(merged, head)
    with pytest.raises(ConversionError, match=r"trained on another base: its copy of lm_head\.weight.*give the right"):
        adapter.merge("lm_head.weight", head + 0.01)


def test_a_saved_adapter_has_no_copy_of_the_head_and_peft_loads_it(copied_adapter, shapes, base, tmp_path):
    source = copied_adapter("adapter_with_head")
    adapter = LoraAdapter(source, shapes)
    target = tmp_path / "saved"
    target.mkdir()
    adapter.save(target, "owner/base", "CAUSAL_LM", {"lm_head.weight": base.lm_head.weight.detach()})
    stored = load_file(target / "adapter_model.safetensors")
    assert sorted(stored) == sorted(
        name for name in load_file(source / "adapter_model.safetensors") if "base_layer" not in name
    )
    assert json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, source)(ids).logits
        plain = MistralForCausalLM.from_pretrained(base.name_or_path)
        found = PeftModel.from_pretrained(plain, target)(ids).logits
    assert torch.equal(found, expected)
    with pytest.raises(ConversionError, match="another base"):
        adapter.save(target, "x", None, {"lm_head.weight": torch.zeros(160, 32)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, r"expected peft_type 'LORA', found 'IA3'"),
        ({"use_dora": True}, r"it uses use_dora=True, which plain LoRA does not have"),
        ({"lora_bias": True}, r"it uses lora_bias=True"),
        ({"bias": "all"}, r"expected bias 'none', found 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights='pissa_niter_4' changed the base weights"),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"it uses layer_replication"),
        ({"trainable_token_indices": [3]}, r"it uses trainable_token_indices"),
        ({"an_option_of_the_future": 7}, r"it uses an_option_of_the_future=7"),
        ({"r": None}, r"no number 'r'"),
    ],
)
def test_what_plain_lora_does_not_cover_is_refused(changes, message, copied_adapter, shapes):
    folder = copied_adapter()
    edit_config(folder, **changes)
    with pytest.raises(ConversionError, match=message):
        LoraAdapter(folder, shapes)


def test_every_adapter_tensor_is_accounted_for(copied_adapter, shapes):
    folder = copied_adapter()

    def edit(tensors):
        prefix = "base_model.model.model.layers"
        tensors[f"{prefix}.2.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
        tensors[f"{prefix}.0.mlp.up_proj.lora_magnitude_vector"] = torch.zeros(56)
        tensors["unprefixed.lora_A.weight"] = torch.zeros(4, 32)
        del tensors[f"{prefix}.0.mlp.up_proj.lora_B.weight"]
        for factor in "AB":
            del tensors[f"{prefix}.1.self_attn.q_proj.lora_{factor}.weight"]
        tensors[f"{prefix}.1.self_attn.v_proj.lora_A.weight"] = torch.zeros(3, 32)

    edit_tensors(folder, edit)
    edit_config(folder, modules_to_save=["norm"])
    with pytest.raises(ConversionError) as error:
        LoraAdapter(folder, shapes)
    message = str(error.value)
    for part in (
        "Unknown: base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector, "
        "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight, unprefixed.lora_A.weight.",
        "Missing: factor of model.layers.0.mlp.up_proj.weight, factors of model.layers.1.self_attn.q_proj.weight, "
        "saved module norm.",
        "Wrong shapes: model.layers.1.self_attn.v_proj.weight [3, 32] and [16, 4] instead of [4, 32] and [16, 4].",
    ):
        assert part in message, message


def test_a_resized_vocabulary_is_noticed(copied_adapter, shapes):
    folder = copied_adapter()
    edit_tensors(folder, lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(162, 32)}))
    with pytest.raises(ConversionError, match=r"model\.embed_tokens\.weight \[162, 32\] instead of \[160, 32\]"):
        LoraAdapter(folder, shapes)
