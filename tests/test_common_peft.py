"""LoRA on every family: defaults that work, adapters that open through the AutoClasses, exact merging, 4-bit bases."""

import pytest
import torch
from transformers import BitsAndBytesConfig

from rarezoo.auto import FAMILIES

from .cases import CASES, DEVICE, HEADS, auto

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module", params=HEADS, ids="-".join)
def checkpoint(request, tmp_path_factory):
    family, auto_class = request.param
    case, folder = CASES[family], tmp_path_factory.mktemp("checkpoint")
    case.build(auto_class, **case.quantization_config).save_pretrained(folder)
    return case, auto_class, folder


def load(auto_class, folder, **arguments):
    return auto(auto_class).from_pretrained(folder, **arguments).to(DEVICE).eval()


def train(case, auto_class, model, steps=4) -> list[float]:
    """Push the answer towards a fixed target; the loss of every step."""
    inputs = case.batch(auto_class)
    target = case.answer(model, auto_class, inputs).detach().roll(1, dims=-1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.mse_loss(case.answer(model, auto_class, inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def assert_close(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("make_config", ["LoraConfig", "AdaLoraConfig", "LoHaConfig"])
def test_default_targets(checkpoint, make_config):
    """A bare configuration adapts the family's projections, and nothing else trains."""
    case, auto_class, folder = checkpoint
    arguments = {"total_step": 10} if make_config == "AdaLoraConfig" else {}
    model = peft.get_peft_model(load(auto_class, folder), getattr(peft, make_config)(**arguments))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    targets = FAMILIES[case.family].lora_target_modules
    assert {name.split(".lora_")[0].split(".hada_")[0].rsplit(".", 1)[-1] for name in trained} == set(targets)


def test_lora_is_trained_saved_and_reopened(checkpoint, tmp_path):
    case, auto_class, folder = checkpoint
    inputs = case.batch(auto_class)
    original = load(auto_class, folder)
    model = peft.get_peft_model(load(auto_class, folder), peft.LoraConfig())
    with torch.no_grad():
        expected_start = case.answer(original, auto_class, inputs)
        assert torch.equal(case.answer(model, auto_class, inputs), expected_start)  # B starts at zero
    losses = train(case, auto_class, model)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = case.answer(model, auto_class, inputs)
    assert (trained - expected_start).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}

    with torch.no_grad():
        reopened = load(auto_class, tmp_path / "adapter")
        assert type(reopened) is type(original)
        assert torch.equal(case.answer(reopened, auto_class, inputs), trained)
        wrapped = peft.PeftModel.from_pretrained(load(auto_class, folder), tmp_path / "adapter").eval()
        assert torch.equal(case.answer(wrapped, auto_class, inputs), trained)
        with wrapped.disable_adapter():
            assert torch.equal(case.answer(wrapped, auto_class, inputs), expected_start)

        merged = wrapped.merge_and_unload()
        assert type(merged) is type(original)
        assert merged.state_dict().keys() == original.state_dict().keys()
        assert_close(case.answer(merged, auto_class, inputs), trained)
        for name, tensor in original.state_dict().items():
            parent, kind = name.split(".")[-2:]
            adapted = kind == "weight" and parent in FAMILIES[case.family].lora_target_modules
            assert torch.equal(merged.state_dict()[name], tensor) == (not adapted), name
        merged.save_pretrained(tmp_path / "merged")
        assert_close(case.answer(load(auto_class, tmp_path / "merged"), auto_class, inputs), trained)


def test_gradient_checkpointing_with_a_frozen_base(checkpoint):
    """The adapters' gradients are those without checkpointing, although no input of a layer requires one."""
    case, auto_class, folder = checkpoint
    inputs = case.batch(auto_class)

    def gradients(**options):
        torch.manual_seed(0)
        model = peft.get_peft_model(load(auto_class, folder), peft.LoraConfig(init_lora_weights=False)).train()
        if options:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        answer = case.answer(model, auto_class, inputs)
        (answer * torch.randn(answer.shape, generator=torch.Generator().manual_seed(2)).to(answer)).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for use_reentrant in (True, False):
        for name, gradient in gradients(use_reentrant=use_reentrant).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:.*bitsandbytes::")
def test_lora_on_a_four_bit_base(checkpoint, tmp_path):
    pytest.importorskip("bitsandbytes")
    case, auto_class, folder = checkpoint
    inputs = case.batch(auto_class)
    options = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantization = dict(quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32)
    base = peft.prepare_model_for_kbit_training(load(auto_class, folder, **quantization))
    model = peft.get_peft_model(base, peft.LoraConfig())
    losses = train(case, auto_class, model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)

    # Evaluated under no_grad only now: from then on 4-bit layers on some CPUs no longer train.
    with torch.no_grad():
        trained = case.answer(model, auto_class, inputs)
        for reopened in (
            load(auto_class, tmp_path, **quantization),
            peft.PeftModel.from_pretrained(load(auto_class, folder, **quantization), tmp_path).eval(),
        ):
            assert_close(case.answer(reopened, auto_class, inputs), trained, tolerance=1e-4)
