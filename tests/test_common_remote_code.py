"""Every checkpoint carries its code: it loads where `rarezoo` cannot be imported, and yields to it where it can."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor

from rarezoo.auto import FAMILIES

from .cases import CASES, auto

peft = pytest.importorskip("peft")

LOAD_ANSWER_SAVE = """
import json, os, pickle, sys
import torch, transformers
from safetensors.torch import load_file, save_file

work, heads, texts = json.loads(os.environ["CASE"])

def load(auto_class, folder, trust_remote_code=True):
    loaded = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=trust_remote_code)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    return loaded

def answers(folder):
    result = {}
    for auto_class in heads:
        model = load(auto_class, folder).eval()
        assert type(model) is type(load(auto_class, folder))
        assert type(pickle.loads(pickle.dumps(model))) is type(model)
        with torch.no_grad():
            result[auto_class] = model(**load_file(f"{work}/{auto_class}_inputs.safetensors"))[0]
    if texts:
        processor = load("AutoProcessor", folder)
        result.update({f"processor.{name}": value for name, value in processor(texts).items()})
        return result, [model, processor]
    return result, [model]

with torch.no_grad():
    adapted = load("AutoModel", f"{work}/adapter").eval()(**load_file(f"{work}/AutoModel_inputs.safetensors"))
    save_file({"adapted": adapted[0]}, f"{work}/adapted.safetensors")
try:
    load("AutoModel", f"{work}/first", trust_remote_code=False)
except ValueError as error:
    print(error)
for source, target in (("first", "second"), ("second", "third")):
    result, to_save = answers(f"{work}/{source}")
    save_file(result, f"{work}/{source}_answers.safetensors")
    for item in to_save:
        item.save_pretrained(f"{work}/{target}")
assert not any(name.split(".")[0] == "rarezoo" for name in sys.modules)
"""

REMOTE_FIRST = """
import pickle
from transformers import AutoConfig, AutoModel
remote = AutoModel.from_pretrained({folder!r}, trust_remote_code=True)
assert type(remote).__module__.startswith("transformers_modules."), type(remote)
import rarezoo
for trust in ({{}}, {{"trust_remote_code": True}}, {{"trust_remote_code": False}}):
    installed = AutoModel.from_pretrained({folder!r}, **trust)
    assert type(installed).__module__.startswith("rarezoo."), type(installed)
    assert type(installed.config).__module__.startswith("rarezoo."), type(installed.config)
for model in (remote, installed):
    assert type(pickle.loads(pickle.dumps(model))) is type(model)
"""

TEXTS = ["a cat on the mat", "what is the capital of france?"]


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, tmp_path_factory):
    """(case, folder with the checkpoint `first` and the inputs, expected answers)."""
    case, work = CASES[request.param], tmp_path_factory.mktemp(request.param)
    expected = {}
    for auto_class in case.heads:
        inputs = case.batch(auto_class)
        save_file(inputs, work / f"{auto_class}_inputs.safetensors")
        with torch.no_grad():
            expected[auto_class] = case.build(auto_class)(**inputs)[0]
    case.build().save_pretrained(work / "first")
    if FAMILIES[case.family].processor:
        processor = case.make_processor()
        processor.save_pretrained(work / "first")
        expected.update({f"processor.{name}": value for name, value in processor(TEXTS).items()})
    return case, work, expected


def add_adapter(case, work) -> torch.Tensor:
    """Save a LoRA adapter whose base is the checkpoint; the adapted answer."""
    model = auto("AutoModel").from_pretrained(work / "first")
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False)).eval()
    adapted.save_pretrained(work / "adapter")
    with torch.no_grad():
        return adapted(**load_file(work / "AutoModel_inputs.safetensors"))[0]


def test_without_the_plugin(checkpoint, run_without_rarezoo):
    """Where nobody has heard of rarezoo: refused without trust; with it, answers bit-equal, saved there, loaded from
    there, twice."""
    case, work, expected = checkpoint
    texts = TEXTS if FAMILIES[case.family].processor else []
    adapted = add_adapter(case, work)
    said = run_without_rarezoo(LOAD_ANSWER_SAVE, CASE=json.dumps([str(work), list(case.heads), texts]))
    assert "trust_remote_code=True" in said
    assert torch.equal(load_file(work / "adapted.safetensors")["adapted"], adapted)
    for source in ("first", "second"):
        answers = load_file(work / f"{source}_answers.safetensors")
        assert answers.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(answers[name], value.cpu()), (source, name)
    # What was saved there is whole, for the plugin too.
    maps = [json.loads((work / name / "config.json").read_text())["auto_map"] for name in ("first", "second", "third")]
    assert maps[0] == maps[1] == maps[2]
    model = case.build()
    for auto_class, class_name in case.heads.items():
        loaded, report = auto(auto_class).from_pretrained(work / "third", output_loading_info=True)
        assert type(loaded).__name__ == class_name and not any(report.values())
        state = (loaded.base_model if model.base_model is model else loaded).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("trust", [None, True, False])
def test_installed_classes_win(checkpoint, trust):
    """With the plugin no flag is needed, and the flag changes nothing."""
    case, work, _ = checkpoint
    arguments = {} if trust is None else {"trust_remote_code": trust}
    family, folder = FAMILIES[case.family], work / "first"
    assert type(AutoConfig.from_pretrained(folder, **arguments)) is family.config_class()
    for auto_class in case.heads:
        assert type(auto(auto_class).from_pretrained(folder, **arguments)) is family.model_class(auto_class)
    if family.processor:
        assert type(AutoProcessor.from_pretrained(folder, **arguments)) is family.processor_class()


def test_installed_classes_win_after_remote_code_was_loaded(checkpoint):
    _, work, _ = checkpoint
    code = REMOTE_FIRST.format(folder=str(work / "first"))
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
