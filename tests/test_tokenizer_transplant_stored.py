"""Checkpoints that store the base's name and the transplant matrix: they open as the plain model's equals."""

import copy
import json
import pickle
import shutil
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from rarezoo import TransplantedConfig, TransplantedForCausalLM, TransplantedForMaskedLM, TransplantedModel
from rarezoo.configs import load_preset, read_preset
from rarezoo.tokenizer_transplant.transplanting import transplant_tokenizer

from .cases import FIXTURES
from .loopback_hub import USER, LoopbackHub

BASE, DONOR = (FIXTURES / "tokenizer_transplant" / name for name in ("base_model", "donor_model"))
IDS = torch.arange(20, 32)[None]


def stored(base, out, model_class=TransplantedForCausalLM, **options):
    """The plain result of a transplantation, and a folder that stores the same by its matrix."""
    result = transplant_tokenizer(base, DONOR, "retok", base_tokenizer=BASE, **options)
    tokenizers = (result.tokenizer, AutoTokenizer.from_pretrained(BASE))
    model = model_class.from_base(base, result.matrix, *tokenizers, provenance=result.report.provenance)
    model.save_pretrained(out)
    result.tokenizer.save_pretrained(out)
    return result, model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "llama"
    result, model = stored(BASE, folder, pad_to_multiple_of=64)
    return result, model, folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=576, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=2
    )
    base = transformers.BertForMaskedLM(config)
    torch.nn.init.normal_(base.cls.predictions.bias)
    base.save_pretrained(folder / "base")
    result, model = stored(folder / "base", folder / "bert", TransplantedForMaskedLM)
    return result, model, folder / "bert"


def assert_same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@torch.no_grad()
def test_equals_the_plain_model(llama):
    result, model, folder = llama
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    expected = result.model.eval()(IDS).logits
    for checked in (model, loaded):
        assert type(checked) is TransplantedForCausalLM and not checked.training
        assert torch.equal(checked(IDS).logits, expected)
        plain = checked.merge_and_unload()
        assert type(plain) is transformers.LlamaForCausalLM
        assert_same_state(plain, result.model)
        assert plain.config.tokenizer_transplant == result.report.provenance
        assert plain.generation_config.to_dict() == result.model.generation_config.to_dict()
        assert checked.config.vocab_size == 576 and checked.config.hidden_size == 24
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == result.tokenizer.get_vocab()
    assert AutoConfig.from_pretrained(folder).tokenizer_transplant == result.report.provenance


def test_holds_no_weights(llama, tmp_path):
    """No tensor of the base is stored; and what was loaded is stored again with the same bytes."""
    folder = llama[2]
    assert [path.name for path in folder.glob("*.safetensors")] == ["transplant_matrix.safetensors"]
    shapes = {tuple(tensor.shape) for tensor in load_file(folder / "transplant_matrix.safetensors").values()}
    assert all(len(shape) == 1 for shape in shapes)
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


@torch.no_grad()
def test_merged_model_is_stored_plain(llama, tmp_path):
    result, _, folder = llama
    AutoModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is transformers.LlamaForCausalLM
    assert_same_state(plain, result.model)


@torch.no_grad()
def test_every_class_opens_the_checkpoint(llama, bert):
    for (result, _, folder), model_class, auto_class in (
        (llama, TransplantedModel, AutoModel),
        (bert, TransplantedModel, AutoModel),
        (bert, TransplantedForMaskedLM, AutoModelForMaskedLM),
    ):
        for loaded in (auto_class.from_pretrained(folder), model_class.from_pretrained(folder)):
            assert type(loaded) is model_class
            if model_class is TransplantedModel:
                expected = result.model.eval().base_model(IDS)[0]
            else:
                expected = result.model.eval()(IDS)[0]
                assert_same_state(loaded.merge_and_unload(), result.model)
            assert torch.equal(loaded(IDS)[0], expected)


@torch.no_grad()
def test_generates_like_the_plain_model(llama):
    result, _, folder = llama
    model, plain = AutoModelForCausalLM.from_pretrained(folder), result.model.eval()
    mask = torch.ones_like(IDS)
    for settings in (
        dict(do_sample=False),
        dict(do_sample=False, num_beams=3),
        dict(do_sample=False, use_cache=False),
        dict(do_sample=True, temperature=3.0, top_k=0),
        dict(do_sample=False, cache_implementation="static"),
    ):
        settings |= dict(attention_mask=mask, max_new_tokens=8, min_new_tokens=8)
        torch.manual_seed(0)
        expected = plain.generate(IDS, **settings)
        torch.manual_seed(0)
        assert torch.equal(model.generate(IDS, **settings), expected)
        assert expected.shape == (1, 20) and expected.max() < 536


def test_loss_and_gradients(llama):
    result, _, folder = llama
    model, plain = AutoModelForCausalLM.from_pretrained(folder), copy.deepcopy(result.model).eval()
    losses = [checked(IDS, labels=IDS).loss for checked in (model, plain)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (_, left), (_, right) in zip(model.model.named_parameters(), plain.named_parameters()):
        assert torch.equal(left.grad, right.grad)
    model.train()
    model.gradient_checkpointing_enable()
    assert model.model.model.gradient_checkpointing


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_load_options_reach_the_base(llama, dtype, attention):
    result, _, folder = llama
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.model.config._attn_implementation == attention
    expected = result.model.eval()(IDS).logits
    assert (model(IDS).logits.float() - expected).norm() < (0.03 if dtype is torch.bfloat16 else 1e-6) * expected.norm()


@torch.no_grad()
def test_settings_of_the_base_reach_it(llama, tmp_path):
    """Those that the caller gives, in the configuration, by name or afterwards; all others stay what they were."""
    _, model, folder = llama
    config = AutoConfig.from_pretrained(folder, output_hidden_states=True)
    config.use_cache = False
    config.rms_norm_eps = 0.5
    given = AutoModelForCausalLM.from_pretrained(folder, config=config)
    named = AutoModelForCausalLM.from_pretrained(folder, output_hidden_states=True, use_cache=False, rms_norm_eps=0.5)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    expected = copy.deepcopy(plain.merge_and_unload())
    for layer in (module for module in expected.modules() if hasattr(module, "variance_epsilon")):
        layer.variance_epsilon = 0.5
    for changed in (given, named):
        answer = changed(IDS)
        assert torch.equal(answer.logits, expected(IDS).logits) and not torch.equal(answer.logits, plain(IDS).logits)
        assert len(answer.hidden_states) == 3 and answer.past_key_values is None
        assert changed.merge_and_unload().config.rms_norm_eps == changed.config.rms_norm_eps == 0.5
        assert_same_state(changed, model)
    assert plain(IDS).hidden_states is None and plain(IDS).past_key_values is not None
    plain.config.use_cache = False
    assert plain(IDS).past_key_values is None
    config = TransplantedConfig(text_config=transformers.LlamaConfig(tie_word_embeddings=True, bos_token_id=7))
    assert config.text_config.tie_word_embeddings and config.bos_token_id == config.text_config.bos_token_id == 7


def test_wrong_base_is_refused(llama, tmp_path):
    """Another table, other inner weights, a renamed folder; a base that was only sharded anew is the same base."""
    _, model, folder = llama
    base = transformers.LlamaForCausalLM.from_pretrained(BASE)
    base.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    same = AutoModelForCausalLM.from_pretrained(folder, base_model_name_or_path=str(tmp_path / "sharded"))
    assert_same_state(same, model)
    with torch.no_grad():
        base.model.embed_tokens.weight[300, 3] += 1e-3
    base.save_pretrained(tmp_path / "table")
    inner = transformers.LlamaForCausalLM.from_pretrained(BASE)
    with torch.no_grad():
        inner.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    inner.save_pretrained(tmp_path / "inner")
    for name in ("table", "inner"):
        with pytest.raises(ValueError, match=r"is not the base that .* was made for: expected the fingerprint"):
            AutoModelForCausalLM.from_pretrained(folder, base_model_name_or_path=str(tmp_path / name))
    with pytest.raises(OSError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained(folder, base_model_name_or_path=str(tmp_path / "nowhere"))


def test_a_base_beside_the_checkpoint(llama, tmp_path):
    """A relative path means a folder from here or from the checkpoint, so that both can travel together."""
    _, model, folder = llama
    shutil.copytree(folder, tmp_path / "new")
    shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((tmp_path / "new/config.json").read_text())
    (tmp_path / "new/config.json").write_text(json.dumps({**config, "base_model_name_or_path": "../base"}))
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), model)


@torch.no_grad()
def test_changed_weights_are_not_lost(llama, tmp_path):
    """Saved by the matrix alone they would be: refused, and merging keeps them."""
    folder = llama[2]
    for change in (
        lambda model: model.model.model.layers[0].mlp.up_proj.weight.mul_(1.01),
        lambda model: model.model.lm_head.weight.data.add_(1e-4),
        lambda model: model.bfloat16(),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(tmp_path / "before")
        change(model)
        with pytest.raises(ValueError, match=r"use merge_and_unload\(\).save_pretrained"):
            model.save_pretrained(tmp_path / "after")
        assert not (tmp_path / "after").exists()
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(init_lora_weights=False)
    )
    with pytest.raises(ValueError, match="merged or cast since"):
        adapted.merge_and_unload().save_pretrained(tmp_path / "after")
    built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with pytest.raises(ValueError, match="built from a configuration"):
        built.save_pretrained(tmp_path / "after")


def test_adapters(llama, bert, tmp_path):
    """A bare LoraConfig finds the base's layers; training moves the adapter alone; the adapter finds its way back."""
    for (_, _, folder), auto_class in ((llama, AutoModelForCausalLM), (bert, AutoModelForMaskedLM)):
        model = auto_class.from_pretrained(folder)
        adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False))
        names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert names and all("lora_" in name for name in names)
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        adapted.eval().save_pretrained(tmp_path / auto_class.__name__)
        again = peft.PeftModel.from_pretrained(auto_class.from_pretrained(folder), tmp_path / auto_class.__name__)
        with torch.no_grad():
            expected = adapted(input_ids=IDS).logits
            assert torch.equal(again.eval()(input_ids=IDS).logits, expected)
            direct = auto_class.from_pretrained(tmp_path / auto_class.__name__)
            assert torch.equal(direct(input_ids=IDS).logits, expected)
            assert not torch.equal(auto_class.from_pretrained(folder)(IDS).logits, expected)


@pytest.mark.filterwarnings("ignore")
def test_quantized_base(tmp_path):
    """4-bit inner layers, full-precision new tables; QLoRA trains."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    fields = json.loads((BASE / "config.json").read_text()) | dict(hidden_size=64, intermediate_size=64, head_dim=32)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(tmp_path / "base")
    result, _ = stored(tmp_path / "base", tmp_path / "new")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", quantization_config=settings)
    assert model.is_loaded_in_4bit and model.model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    tables = [result.model.lm_head.weight, result.model.model.embed_tokens.weight]
    found = [model.model.lm_head.weight, model.model.model.embed_tokens.weight]
    assert all(torch.equal(left.float(), right.to(left.dtype).float()) for left, right in zip(found, tables))
    adapted = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), peft.LoraConfig())
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert any(parameter.grad is not None for name, parameter in adapted.named_parameters() if "lora_B" in name)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base whose layers are wide enough for 4-bit blocks: itself, and stored in 4 and in 8 bits."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    fields = json.loads((BASE / "config.json").read_text()) | dict(hidden_size=64, intermediate_size=64, head_dim=32)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(folder / "full")
    for name, settings in QUANTIZED.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "full", quantization_config=settings)
        model.save_pretrained(folder / name)
    return folder


QUANTIZED = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantized_before", [False, True], ids=["loaded_so", "stored_so"])
@pytest.mark.parametrize("name", QUANTIZED)
@torch.no_grad()
def test_a_quantized_model_is_stored_either_way(name, quantized_before, wide, tmp_path):
    """By its matrix and plain, whether its base is quantized in the file or when it is loaded; and dequantized."""
    pytest.importorskip("bitsandbytes")
    base, options = (wide / name, {}) if quantized_before else (wide / "full", {"quantization_config": QUANTIZED[name]})
    result, _ = stored(base, tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", **options)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again", **options)(IDS).logits, expected)
    model.merge_and_unload().save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain) is transformers.LlamaForCausalLM and plain.is_quantized
    assert torch.equal(plain(IDS).logits, expected)
    if quantized_before:
        result.save_pretrained(tmp_path / "result")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "result")(IDS).logits, expected)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "new", **options).dequantize()
    assert (whole(IDS).logits - expected).norm() < 0.05 * expected.norm()
    with pytest.raises(ValueError, match=r"use merge_and_unload\(\).save_pretrained"):
        whole.save_pretrained(tmp_path / "lost")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUANTIZED)
def test_an_adapter_merged_into_quantized_layers_is_not_lost(name, wide, tmp_path):
    pytest.importorskip("bitsandbytes")
    stored(wide / "full", tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", quantization_config=QUANTIZED[name])
    with torch.no_grad():
        before = model(IDS).logits
    adapter = peft.LoraConfig(init_lora_weights=False)
    merged = peft.get_peft_model(model, adapter).eval().merge_and_unload()
    with torch.no_grad():
        assert not torch.equal(merged(IDS).logits, before)
    with pytest.raises(ValueError, match="merged or cast since"):
        merged.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_transplanted_again(llama):
    """From a folder that stores a matrix, or its model: the plain model in it gets the third tokenizer."""
    result, model, folder = llama
    expected = transplant_tokenizer(copy.deepcopy(result.model), BASE, "retok", base_tokenizer=result.tokenizer)
    for given in (folder, copy.deepcopy(model)):
        found = transplant_tokenizer(given, BASE, "retok", base_tokenizer=result.tokenizer)
        assert type(found.model) is transformers.LlamaForCausalLM
        assert_same_state(found.model, expected.model)


@torch.no_grad()
def test_pickle_and_deep_copy(llama):
    _, model, _ = llama
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin) is TransplantedForCausalLM
        assert_same_state(twin, model)


def test_preset_builds_every_class():
    config = load_preset("tokenizer_transplant", "tiny")
    assert type(config) is TransplantedConfig
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = read_preset("tokenizer_transplant", "tiny")["parameters"]
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    for auto_class, name in config.auto_map.items():
        if auto_class == "AutoConfig":
            continue
        text = config.text_config if auto_class != "AutoModelForMaskedLM" else transformers.BertConfig()
        with torch.device("meta"):
            model = getattr(transformers, auto_class).from_config(TransplantedConfig(text_config=text.to_dict()))
        assert type(model).__name__ == name.split(".")[1]


PUBLISH = """
import torch, rarezoo
from transformers import AutoModelForCausalLM, AutoTokenizer
from rarezoo.tokenizer_transplant import transplant_tokenizer
base = AutoModelForCausalLM.from_pretrained({base!r})
base_tokenizer = AutoTokenizer.from_pretrained({base!r})
base.push_to_hub("{user}/base")
base_tokenizer.push_to_hub("{user}/base")
result = transplant_tokenizer("{user}/base", {donor!r}, "retok")
model = rarezoo.TransplantedForCausalLM.from_base("{user}/base", result.matrix, result.tokenizer, base_tokenizer)
model.push_to_hub("{user}/new")
result.tokenizer.push_to_hub("{user}/new")
torch.save(result.model.state_dict(), {work!r} + "/state.pt")
with torch.no_grad():
    base.model.norm.weight.mul_(2)
base.push_to_hub("{user}/base")
"""

READ = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    AutoModelForCausalLM.from_pretrained("{user}/new", trust_remote_code=False)
except ValueError as error:
    print(error)
state = torch.load({work!r} + "/state.pt")
for place in ("{user}/new", {work!r} + "/again"):
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    found = model.merge_and_unload().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert model.generate(torch.arange(20, 32)[None], max_new_tokens=3, min_new_tokens=3).shape == (1, 15)
    model.save_pretrained({work!r} + "/again")
assert len(AutoTokenizer.from_pretrained("{user}/new")) == 536
try:
    AutoModelForCausalLM.from_pretrained("{user}/new", trust_remote_code=True, base_revision="main")
except ValueError as error:
    print(error)
assert not any(name.split(".")[0] == "rarezoo" for name in sys.modules)
"""


def test_from_a_hub_without_the_plugin(tmp_path, run_without_rarezoo):
    """By the code of the checkpoint alone. The base has moved on since: its commit of then is loaded."""
    with LoopbackHub() as hub:
        names = dict(base=str(BASE), donor=str(DONOR), user=USER, work=str(tmp_path))
        environment = hub.environment(tmp_path / "publisher")
        subprocess.run([sys.executable, "-c", PUBLISH.format(**names)], env=environment, check=True, timeout=240)
        stored_files = hub.files(f"{USER}/new")
        said = run_without_rarezoo(READ.format(**names), **hub.environment(tmp_path / "reader"))
    assert "trust_remote_code=True" in said and "(revision main) is not the base" in said
    assert {name for name in stored_files if name.endswith(".safetensors")} == {"transplant_matrix.safetensors"}
    sources = [path.read_text() for path in (tmp_path / "again").glob("*.py")]
    assert len(sources) == 4 and "rarezoo" not in "".join(sources)
