"""What every family's checkpoints must hold: the same numbers, all the code, the whole map of classes."""

import ast
import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rarezoo
from rarezoo.auto import FAMILIES
from rarezoo.configs import list_presets, load_preset

from .cases import CASES, HEADS, MODELS, WITHOUT_WEIGHTS, auto


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same_weights(model, other):
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other_state[name].dtype and torch.equal(tensor, other_state[name]), name


@pytest.fixture(params=HEADS, ids="-".join)
def head(request):
    family, auto_class = request.param
    return CASES[family], auto_class


def test_every_family_has_a_case():
    assert {case.family for case in MODELS.values()} == FAMILIES.keys()
    assert all((Path(__file__).parent / name).is_file() for _, name in WITHOUT_WEIGHTS.values())
    for family, case in CASES.items():
        assert FAMILIES[family].auto_classes == case.heads
        assert FAMILIES[family].config_class().model_type == family


@torch.no_grad()
def test_save_load_save(head, tmp_path):
    """Bit-exact, and stable: a checkpoint that was loaded is written again with the same bytes, code included."""
    case, auto_class = head
    model, inputs = case.build(auto_class), case.batch(auto_class)
    model.save_pretrained(tmp_path / "first")
    loaded, report = auto(auto_class).from_pretrained(tmp_path / "first", output_loading_info=True)
    assert type(loaded).__name__ == case.heads[auto_class]
    assert not any(report.values()), report
    assert_same_weights(model, loaded)
    assert torch.equal(case.answer(loaded, auto_class, inputs), case.answer(model, auto_class, inputs))
    loaded.save_pretrained(tmp_path / "second")
    again = auto(auto_class).from_pretrained(tmp_path / "second")
    assert_same_weights(model, again)
    assert files_of(tmp_path / "second") == files_of(tmp_path / "first")


def test_shards_hold_the_same_weights(head, tmp_path):
    case, auto_class = head
    model = case.build(auto_class)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_weights(model, auto(auto_class).from_pretrained(tmp_path))


@pytest.mark.parametrize("family", CASES)
def test_every_head_reads_every_heads_checkpoint(family, tmp_path):
    """No weight is left out or made up when a checkpoint of one head is opened as another."""
    case = CASES[family]
    for saved_by in case.heads:
        model = case.build(saved_by)
        model.save_pretrained(tmp_path / saved_by)
        for auto_class in case.heads:
            loaded, report = auto(auto_class).from_pretrained(tmp_path / saved_by, output_loading_info=True)
            assert not any(report.values()), report
            if FAMILIES[family].base_model in (case.heads[saved_by], case.heads[auto_class]):
                assert_same_weights(model.base_model, loaded.base_model)
            else:
                assert_same_weights(model, loaded)


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_base_model_reads_a_heads_checkpoint(family, tmp_path):
    case = CASES[family]
    model = case.build()
    model.save_pretrained(tmp_path / "head")
    base_class = getattr(rarezoo, FAMILIES[family].base_model)
    base, report = base_class.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert_same_weights(model.base_model, base)
    base.save_pretrained(tmp_path / "base")
    assert_same_weights(base, base_class.from_pretrained(tmp_path / "base"))


def test_weight_names_are_plain(head, tmp_path):
    """The file holds the state dict's own names: nothing renamed on the way out."""
    case, auto_class = head
    model = case.build(auto_class)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_auto_map_is_complete(head, tmp_path):
    """Every AutoClass finds its class in the folder, whichever head was saved."""
    case, auto_class = head
    family = FAMILIES[case.family]
    case.build(auto_class).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    expected = {"AutoConfig": family.config, **case.heads}
    if family.processor:
        expected["AutoProcessor"] = family.processor
    assert {name: reference.split(".")[1] for name, reference in auto_map.items()} == expected
    if family.processor:
        case.make_processor().save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "processor_config.json").read_text())
        assert stored["auto_map"] == {"AutoProcessor": auto_map["AutoProcessor"]}
    for reference in auto_map.values():
        module, class_name = reference.split(".")
        tree = ast.parse((tmp_path / f"{module}.py").read_text())
        assert class_name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def test_copied_sources_stand_alone(head, tmp_path):
    """Imports are of libraries or of a sibling file that was copied too, by a single dot; `rarezoo` is not named."""
    case, auto_class = head
    case.build(auto_class).save_pretrained(tmp_path)
    copied = {path.stem: path.read_text() for path in tmp_path.glob("*.py")}
    assert copied
    for name, source in copied.items():
        assert "rarezoo" not in source, name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in copied, (name, ast.unparse(node))
        # transformers looks for siblings with this pattern, in docstrings too.
        for sibling in re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE):
            assert sibling in copied, (name, sibling)


@torch.no_grad()
def test_bfloat16_is_kept(head, tmp_path):
    case, auto_class = head
    model = case.build(auto_class)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "model.safetensors").values())
    for dtype in ("auto", None, torch.bfloat16):
        loaded = auto(auto_class).from_pretrained(tmp_path, **({} if dtype is None else {"dtype": dtype}))
        assert loaded.dtype == torch.bfloat16
        assert_same_weights(model, loaded)
    wide = auto(auto_class).from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    inputs = case.batch(auto_class)
    found, expected = (case.answer(m, auto_class, inputs).float() for m in (model.eval(), wide.to(model.device)))
    assert found.isfinite().all()
    # 8 significant bits per operation, a few operations deep.
    assert (found - expected).norm() < 0.03 * expected.norm()


@torch.no_grad()
def test_pickle_and_deep_copy(head):
    case, auto_class = head
    model, inputs = case.build(auto_class), case.batch(auto_class)
    expected = case.answer(model, auto_class, inputs)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin) is type(model)
        assert_same_weights(model, twin)
        assert torch.equal(case.answer(twin, auto_class, inputs), expected)
    for parameter in copy.deepcopy(model).parameters():
        parameter.zero_()
    assert torch.equal(case.answer(model, auto_class, inputs), expected)
    outputs = model(**inputs)
    assert pickle.loads(pickle.dumps(outputs)).keys() == outputs.keys()


@pytest.mark.parametrize("family", [name for name in CASES if FAMILIES[name].processor])
def test_processor_is_stored_whole(family, tmp_path):
    case = CASES[family]
    processor = case.make_processor()
    processor.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "auto_map": None} == {**processor.to_dict(), "auto_map": None}
    for twin in (loaded, pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
        for texts in (["a cat on the mat", "x"], ["what is the capital of france?"]):
            found, expected = twin(texts), processor(texts)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", CASES)
def test_presets_build_every_head(family):
    presets = list_presets(family)
    assert "tiny" in presets
    for preset in presets:
        config = load_preset(family, preset)
        for auto_class, class_name in CASES[family].heads.items():
            with torch.device("meta"):
                assert type(auto(auto_class).from_config(config)).__name__ == class_name
