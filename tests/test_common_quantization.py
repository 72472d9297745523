"""Every head loads in 4 and 8 bits through transformers' own option, and is saved and reloaded without a change."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from rarezoo.auto import FAMILIES
from rarezoo.quantization import save_quantized

from .cases import CASES, DEVICE, HEADS, auto

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*bitsandbytes::"),
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt"),
]

OPTIONS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4_double": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}


def rounded(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """The values that a scheme can hold, from its definition: the nearest code of each weight, scaled to the largest
    magnitude of its block of 64 weights (4 bits) or of its row (8 bits: -127 ... 127)."""
    if scheme == "int8":
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return (weight / scale).round() * scale
    codes = bitsandbytes.functional.get_4bit_type(scheme.split("_")[0], device=weight.device)
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = ((blocks / scale).unsqueeze(-1) - codes).abs().argmin(dim=-1)
    return (codes[nearest] * scale).reshape(weight.shape)


@pytest.fixture(scope="module", params=HEADS, ids="-".join)
def checkpoint(request, tmp_path_factory):
    """(case, AutoClass, folder of a checkpoint wide enough for 4-bit blocks)."""
    family, auto_class = request.param
    case, folder = CASES[family], tmp_path_factory.mktemp("checkpoint")
    case.build(auto_class, **case.quantization_config).save_pretrained(folder)
    return case, auto_class, folder


def load(auto_class, folder, **options):
    if options:
        options = dict(quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32)
    return auto(auto_class).from_pretrained(folder, device_map={"": DEVICE}, **options).eval()


def quantized_layers(case, auto_class) -> set[str]:
    """Names of all linear layers but the heads."""
    with torch.device("meta"):
        model = auto(auto_class).from_config(case.make_config())
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    heads = FAMILIES[case.family].full_precision_modules
    return {name for name in linear if name.rsplit(".", 1)[-1] not in heads}


@pytest.mark.parametrize("scheme", OPTIONS)
@torch.no_grad()
def test_loaded_saved_and_reloaded(checkpoint, scheme, tmp_path):
    case, auto_class, folder = checkpoint
    inputs = case.batch(auto_class)
    model = load(auto_class, folder, **OPTIONS[scheme])
    model.save_pretrained(tmp_path / "before_any_forward")
    answer = case.answer(model, auto_class, inputs)

    reloaded = load(auto_class, tmp_path / "before_any_forward")
    assert type(reloaded).__name__ == case.heads[auto_class]
    assert torch.equal(case.answer(reloaded, auto_class, inputs), answer)

    save_quantized(model, tmp_path / "after_a_forward")
    assert torch.equal(case.answer(model, auto_class, inputs), answer)
    reloaded = load(auto_class, tmp_path / "after_a_forward")
    assert torch.equal(case.answer(reloaded, auto_class, inputs), answer)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_heads_and_embeddings_stay_in_full_precision(checkpoint, scheme, tmp_path):
    case, auto_class, folder = checkpoint
    load(auto_class, folder, **OPTIONS[scheme]).save_pretrained(tmp_path)
    full, quantized = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    kept = {name for name, tensor in full.items() if name in quantized and quantized[name].dtype == tensor.dtype}
    for name in kept:
        assert torch.equal(full[name], quantized[name]), name
    quantizable = {f"{name}.weight" for name in quantized_layers(case, auto_class)}
    assert set(full) - kept == quantizable


@pytest.mark.parametrize("scheme", OPTIONS)
@torch.no_grad()
def test_answers_are_those_of_the_rounded_weights(checkpoint, scheme):
    case, auto_class, folder = checkpoint
    inputs = case.batch(auto_class)
    reference = load(auto_class, folder)
    full_precision = case.answer(reference, auto_class, inputs)
    for name in quantized_layers(case, auto_class):
        module = reference.get_submodule(name)
        module.weight.copy_(rounded(module.weight, scheme))
    expected = case.answer(reference, auto_class, inputs)
    error = case.answer(load(auto_class, folder, **OPTIONS[scheme]), auto_class, inputs) - expected
    # The kernels round activations: to bfloat16 beside 4-bit weights, to 8 bits of a row's range beside 8-bit weights.
    assert error.norm() < (0.06 if scheme == "int8" else 0.03) * expected.norm()
    if scheme != "int8":
        assert error.norm() < 0.2 * (expected - full_precision).norm()
