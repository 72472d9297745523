"""The guard around the bitsandbytes defect: 4-bit layers that are saved, dequantized or trained after a forward."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig, MistralForCausalLM

from rarezoo.quantization import dequantize, restore_four_bit_layout, save_quantized

bitsandbytes = pytest.importorskip("bitsandbytes")

packs_in_place = pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(),
    reason="this CPU has no AVX512-BF16, so bitsandbytes does not pack 4-bit weights in place",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=512,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mistral")
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def input_ids():
    return torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(1))


def load_four_bit(folder, quant_type="nf4", double=False, dtype=torch.float32):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=dtype).eval()


@torch.no_grad()
def logits(model, input_ids):
    return model.eval()(input_ids).logits.float()


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "quant_type, double, dtype",
    [
        ("nf4", False, torch.float32),
        ("nf4", True, torch.bfloat16),
        ("fp4", False, torch.bfloat16),
        ("fp4", True, torch.float32),
    ],
)
def test_saved_after_a_forward_reloads_exactly(checkpoint, input_ids, tmp_path, quant_type, double, dtype):
    model = load_four_bit(checkpoint, quant_type, double, dtype)
    before = logits(model, input_ids)

    save_quantized(model, tmp_path / "saved")

    assert torch.equal(logits(model, input_ids), before), "the live model changed"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert reloaded.dtype == dtype
    assert torch.equal(logits(reloaded, input_ids), before), "the saved model differs"
    # Once more: a reloaded model that answered is saved again.
    save_quantized(reloaded, tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), input_ids), before)


@packs_in_place
@pytest.mark.parametrize("quant_type, double", [("nf4", False), ("fp4", True)])
def test_the_defect_is_there_without_the_guard(checkpoint, input_ids, tmp_path, quant_type, double):
    """Fails when bitsandbytes is repaired: the guard may then go."""
    model = load_four_bit(checkpoint, quant_type, double)
    before = logits(model, input_ids)
    model.save_pretrained(tmp_path / "unguarded")
    error = relative_error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "unguarded"), input_ids), before)
    assert error > (1e-3 if double else 0.1)


def independent_weight(folder, name, quant_type):
    """4-bit block quantization from its definition: the nearest code of weight / absmax, in blocks of 64."""
    from safetensors.torch import load_file

    weight = load_file(folder / "model.safetensors")[name]
    code = bitsandbytes.functional.get_4bit_type(quant_type, device="cpu").float()
    blocks = weight.double().reshape(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / absmax)[..., None] - code.double()).abs().argmin(-1)
    return (code.double()[nearest] * absmax).reshape(weight.shape)


@pytest.mark.parametrize(
    "quant_type, double, answered",
    [("nf4", False, False), ("nf4", False, True), ("nf4", True, True), ("fp4", True, False), ("fp4", False, True)],
)
def test_dequantize(checkpoint, input_ids, tmp_path, quant_type, double, answered):
    model = load_four_bit(checkpoint, quant_type, double)
    if answered:
        logits(model, input_ids)
    plain = dequantize(model)

    name = "model.layers.1.mlp.down_proj"
    assert type(plain.get_submodule(name)) is torch.nn.Linear
    found = plain.get_submodule(name).weight.double()
    expected = independent_weight(checkpoint, f"{name}.weight", quant_type)
    # Double quantization and packing each round the block scales; the codes are the same.
    assert relative_error(found, expected) < (5e-3 if double or answered else 1e-6)
    assert not hasattr(plain.config, "quantization_config")


@packs_in_place
def test_dequantize_is_wrong_without_the_guard(checkpoint, input_ids):
    model = load_four_bit(checkpoint)
    logits(model, input_ids)
    name = "model.layers.1.mlp.down_proj"
    found = model.dequantize().get_submodule(name).weight.double()
    assert relative_error(found, independent_weight(checkpoint, f"{name}.weight", "nf4")) > 0.5


def test_reloaded_dequantized_model_can_be_saved(checkpoint, input_ids, tmp_path):
    save_quantized(load_four_bit(checkpoint), tmp_path / "quantized")
    plain = dequantize(AutoModelForCausalLM.from_pretrained(tmp_path / "quantized"))
    expected = logits(plain, input_ids)
    plain.save_pretrained(tmp_path / "plain")
    save_quantized(plain, tmp_path / "plain_by_us")
    for folder in ("plain", "plain_by_us"):
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert not hasattr(reloaded.config, "quantization_config")
        assert torch.equal(logits(reloaded, input_ids), expected)


def test_dequantize_int8(checkpoint, input_ids):
    quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantization, dtype=torch.float32)
    original = MistralForCausalLM.from_pretrained(checkpoint)
    weight = original.model.layers[0].self_attn.q_proj.weight.double()
    scale = weight.abs().amax(1, keepdim=True) / 127
    found = dequantize(model).model.layers[0].self_attn.q_proj.weight.double()
    # Half a step, and 2 x 127 / 2048 steps because bitsandbytes rounds weight and scale to float16 first.
    assert ((found - weight).abs() <= 0.63 * scale).all()


def test_dequantize_refuses_what_it_cannot_do(checkpoint):
    with pytest.raises(ValueError, match="MistralForCausalLM is not quantized"):
        dequantize(MistralForCausalLM.from_pretrained(checkpoint))


def lora_gradients(model, input_ids):
    model.train()
    model.zero_grad()
    model(input_ids, labels=input_ids).loss.backward()
    return {name: copy.deepcopy(p.grad) for name, p in model.named_parameters() if p.requires_grad}


def test_training_goes_on_after_an_evaluation(checkpoint, input_ids):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(load_four_bit(checkpoint), adapter)
    fresh = lora_gradients(model, input_ids)
    assert all(gradient.norm() > 0 for gradient in fresh.values())

    logits(model, input_ids)
    restored = restore_four_bit_layout(model)
    after = lora_gradients(model, input_ids)

    assert restored == (14 if bitsandbytes.functional.has_avx512bf16() else 0)
    for name, gradient in after.items():
        assert relative_error(gradient, fresh[name]) < 0.02, name  # packing rounded the block scales to bfloat16


@packs_in_place
@pytest.mark.filterwarnings("ignore:bitsandbytes::gemv_4bit")
def test_training_after_an_evaluation_is_broken_without_the_guard(checkpoint, input_ids):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(load_four_bit(checkpoint), adapter)
    logits(model, input_ids)
    assert any(gradient is None for gradient in lora_gradients(model, input_ids).values())


def test_refuses_a_folder_in_use(checkpoint, tmp_path):
    model = load_four_bit(checkpoint)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save_quantized(model, tmp_path / "used")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["precious.txt", "used"]


def test_leaves_nothing_behind_when_saving_fails(checkpoint, tmp_path, monkeypatch):
    model = load_four_bit(checkpoint)

    def full_disk(folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_quantized(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
