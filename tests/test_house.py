"""The house rules: who imports whom, what `import rarezoo` costs, and that registration works however it is reached."""

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import rarezoo
from rarezoo.configs import list_presets

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "conversion", "quantization", "retrieval", "training", "cli", "model_cards")
FAMILY_LIBRARIES = {"torch", "transformers", "safetensors", "tokenizers", "numpy", "huggingface_hub", "tqdm"}
# What each room may import of the others; every room may import the table, the presets and the families.
NEIGHBOURS = {
    "configs": set(),
    "conversion": set(),
    "quantization": set(),
    "retrieval": set(),
    "training": set(),
    "model_cards": set(),
    "cli": set(ROOMS),
}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path):
    """(module name with its leading dots, node, whether it stands in a `try`) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tried = {id(node) for outer in ast.walk(tree) if isinstance(outer, ast.Try) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node, id(node) in tried
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node, id(node) in tried


def run_python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def answer_of(code: str, *arguments: str):
    """The JSON that the last line of a new process holds."""
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=240, env=dict(os.environ)
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


# --- who imports whom -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", python_files("modeling", *ROOMS, "tests", "benchmarks", "examples"), ids=relative)
def test_no_folder_is_imported_by_its_own_name(path):
    found = {name.split(".")[0] for name, _, _ in imports_of(path)}
    assert not found & {"modeling", *ROOMS}, f"{path} must import rarezoo.…"


@pytest.mark.parametrize("family", rarezoo.FAMILIES)
def test_families_stand_alone(family):
    """They travel with every checkpoint: siblings, the libraries that every reader has, and others inside a try."""
    folder = ROOT / "modeling" / family
    for path in folder.glob("*.py"):
        for name, node, in_try in imports_of(path):
            where = f"{path}, line {node.lineno}: {name}"
            top = name.split(".")[0]
            if name.startswith("."):
                assert not name.startswith("..") and (folder / f"{name[1:]}.py").is_file(), where
            elif not in_try:
                assert top in FAMILY_LIBRARIES or top in sys.stdlib_module_names, where
            assert top != "rarezoo", where


def test_code_that_families_share_is_the_same_file():
    """Families import nothing of each other; a module that two of them have says so, and is the same to the letter."""
    texts: dict[str, set[str]] = {}
    for path in sorted((ROOT / "modeling").glob("*/*.py")):
        if path.name != "__init__.py":
            texts.setdefault(path.name, set()).add(path.read_text(encoding="utf-8"))
    shared = {name for name, found in texts.items() if any(text.startswith("# Same file as") for text in found)}
    assert "text_encoding.py" in shared
    for name in shared:
        assert len(texts[name]) == 1, f"{name} differs between the families: copy the changed one over the other"
        assert sum(path.name == name for path in (ROOT / "modeling").glob("*/*.py")) > 1, f"only one family has {name}"


@pytest.mark.parametrize("family", rarezoo.FAMILIES)
def test_families_are_flat_and_transformers_follows_their_imports(family):
    """transformers finds relative imports with a regular expression, also in docstrings."""
    folder = ROOT / "modeling" / family
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"^\s*from\s+\.(\S+)\s+import|^\s*import\s+\.(\S+)", text, flags=re.MULTILINE):
            assert (folder / f"{''.join(name)}.py").is_file(), f"{path}: .{''.join(name)}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_keep_to_their_neighbours(room):
    allowed = {"", "auto", "configs", *rarezoo.FAMILIES, room} | NEIGHBOURS[room]
    for path in python_files(room):
        for name, node, _ in imports_of(path):
            assert not name.startswith("."), f"{path}, line {node.lineno}: write rarezoo.{room}…"
            if name.split(".")[0] != "rarezoo":
                continue
            names = [name.partition(".")[2].split(".")[0]]
            if name == "rarezoo" and isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names if alias.name in ROOMS]
            assert set(names) <= allowed, f"{path}, line {node.lineno}: {name}"


def test_the_table_imports_nothing_heavy():
    for path in (ROOT / "modeling").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                for name in names:
                    assert name == "rarezoo.auto" or name.split(".")[0] in sys.stdlib_module_names, f"{path}: {name}"


def test_every_family_has_all_that_belongs_to_it():
    folders = {path.name for path in (ROOT / "modeling").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(rarezoo.FAMILIES)
    for name, family in rarezoo.FAMILIES.items():
        assert "tiny" in list_presets(name)
        assert (ROOT / "conversion" / f"convert_{name}.py").is_file()
        assert (ROOT / "model_cards" / f"{name}.md").is_file()
        assert (ROOT / "docs" / f"{name.replace('_', '-')}.md").is_file()
        assert (ROOT / "tests" / "fixtures" / name / "README.md").is_file()
        row = f"| {family.summary} | {', '.join(family.auto_classes)} |"
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        assert f"[{family.title}](docs/{name.replace('_', '-')}.md) (`{name}`) {row}" in readme


# --- what `import rarezoo` costs --------------------------------------------------------------------------------------


def test_importing_takes_little_beyond_transformers():
    code = "import time, transformers; start = time.perf_counter(); import rarezoo; print(time.perf_counter() - start)"
    seconds = [float(run_python(code).stdout) for _ in range(5)]
    assert statistics.median(seconds) <= 0.2, seconds


def test_importing_is_silent():
    code = "import rarezoo; import transformers; rarezoo.FAMILIES['mistral_splade'].config"
    finished = run_python(code, "-W", "error::FutureWarning", "-W", "error::DeprecationWarning:rarezoo")
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_importing_loads_nothing_heavy():
    loaded = answer_of("import json, sys, rarezoo, rarezoo.cli; print(json.dumps(sorted(sys.modules)))")
    assert not {"torch", "transformers", "peft", "numpy", "scipy", "rarezoo.mistral_splade"} & set(loaded)


# --- public names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rarezoo.__all__)
def test_public_names(name):
    namespace: dict = {}
    exec(f"from rarezoo import {name}", namespace)
    assert namespace[name] is getattr(rarezoo, name)
    assert name in dir(rarezoo)


def test_all_families_are_public():
    for family in rarezoo.FAMILIES.values():
        names = {family.config, family.base_model, *family.auto_classes.values()} | {family.processor} - {None}
        assert names <= set(rarezoo.__all__)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'rarezoo' has no attribute 'MistralSplade'"):
        rarezoo.MistralSplade  # noqa: B018
    with pytest.raises(ImportError, match="NoSuchModel"):
        exec("from rarezoo import NoSuchModel")


# --- registration -----------------------------------------------------------------------------------------------------

_LOOK_UP = """
import json
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
import rarezoo as zoo
config = zoo.load_preset("mistral_splade", "tiny")
with torch.device("meta"):
    models = [auto.from_config(config) for auto in (AutoModel, AutoModelForMaskedLM)]
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets
print(json.dumps([
    type(AutoConfig.for_model("mistral_splade")).__module__,
    *(type(model).__name__ for model in models),
    PROCESSOR_MAPPING[type(config)].__name__,
    targets.get("mistral_splade"),
]))
"""


@pytest.mark.parametrize(
    "first",
    [
        "import rarezoo",
        "from transformers import AutoModel, AutoConfig, AutoProcessor, AutoTokenizer; import peft; import rarezoo",
        "import torch; from rarezoo.mistral_splade import MistralSpladeConfig",
        "import rarezoo, importlib.util; assert importlib.util.find_spec('transformers.models.auto.modeling_auto')",
        pytest.param("import transformers; import rarezoo", marks=pytest.mark.slow),
        pytest.param("import rarezoo; from transformers import AutoModel", marks=pytest.mark.slow),
        pytest.param("import rarezoo; import peft; import transformers", marks=pytest.mark.slow),
        pytest.param("from rarezoo import MistralSpladeForRetrieval", marks=pytest.mark.slow),
        pytest.param("import sentence_transformers; import rarezoo", marks=pytest.mark.slow),
    ],
)
def test_registration_in_every_import_order(first):
    found = answer_of(f"{first}\n{_LOOK_UP}")
    family = rarezoo.FAMILIES["mistral_splade"]
    assert found[0] == "rarezoo.mistral_splade.configuration_mistral_splade"
    assert found[1:3] == [family.auto_classes["AutoModel"], family.auto_classes["AutoModelForMaskedLM"]]
    assert found[3] == family.processor
    assert found[4] == list(family.lora_target_modules)


_PRECEDENCE = """
import json, sys
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoProcessor
folder, remote_first = sys.argv[1], sys.argv[2] == "remote first"
modules = []
if remote_first:
    modules.append(type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__module__.split(".")[0])
import rarezoo
for flag in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
    for auto in (AutoConfig, AutoModel, AutoModelForMaskedLM, AutoProcessor):
        modules.append(type(auto.from_pretrained(folder, **flag)).__module__.split(".")[0])
print(json.dumps(modules))
"""


@pytest.mark.parametrize("order", ["plugin first", "remote first"])
def test_the_installed_class_wins(order, splade_checkpoint):
    modules = answer_of(_PRECEDENCE, str(splade_checkpoint), order)
    if order == "remote first":
        assert modules.pop(0) == "transformers_modules"
    assert modules == ["rarezoo"] * 12


def test_a_tokenizer_whose_files_do_not_name_its_class(splade_checkpoint, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(splade_checkpoint / name, tmp_path / name)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class", None)
    settings.pop("processor_class", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found("the cat sat")["input_ids"] == tokenizer("the cat sat")["input_ids"]


def test_registering_again_changes_nothing():
    code = """
import json, sys
import rarezoo
from transformers import AutoModel, CONFIG_MAPPING
before = (len(sys.meta_path), len(CONFIG_MAPPING._extra_content), len(AutoModel._model_mapping._extra_content))
rarezoo.register()
rarezoo.register()
after = (len(sys.meta_path), len(CONFIG_MAPPING._extra_content), len(AutoModel._model_mapping._extra_content))
print(json.dumps([before, after, "mistral_splade" in CONFIG_MAPPING]))
"""
    before, after, known = answer_of(code)
    assert before == after
    assert known


def test_a_user_may_still_register_a_class_of_their_own():
    code = """
import json
import rarezoo
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, CONFIG_MAPPING
class OwnConfig(BertConfig):
    model_type = "own_bert"
class OwnModel(BertModel):
    config_class = OwnConfig
AutoConfig.register("own_bert", OwnConfig)
AutoModel.register(OwnConfig, OwnModel)
small = OwnConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
print(json.dumps([type(AutoModel.from_config(small)).__name__, "own_bert" in CONFIG_MAPPING, "bert" in CONFIG_MAPPING]))
"""
    assert answer_of(code) == ["OwnModel", True, True]


@pytest.mark.parametrize(
    ("tuner", "targets"),
    [
        ("IA3Config", {"k_proj", "v_proj", "down_proj"}),
        ("LNTuningConfig", {"input_layernorm", "post_attention_layernorm", "norm"}),
    ],
)
def test_tuners_of_other_layers_find_the_backbone_s(tuner, targets):
    import peft

    config = rarezoo.load_preset("mistral_splade", "tiny", num_hidden_layers=1, vocab_size=64)
    model = peft.get_peft_model(rarezoo.MistralSpladeForRetrieval(config), getattr(peft, tuner)())
    assert {name.split(".")[-1] for name in model.base_model.targeted_module_names} == targets


@pytest.mark.parametrize(
    "tuner", ["LoraConfig", "AdaLoraConfig", "VeraConfig", "LoHaConfig", "LoKrConfig", "FourierFTConfig", "MissConfig"]
)
def test_bare_peft_configurations_find_their_targets(tuner):
    import peft

    config = rarezoo.load_preset("mistral_splade", "tiny", num_hidden_layers=1, vocab_size=64)
    options = {"total_step": 10} if tuner == "AdaLoraConfig" else {}
    model = peft.get_peft_model(rarezoo.MistralSpladeForRetrieval(config), getattr(peft, tuner)(**options))
    adapted = {name.split(".")[-1] for name in model.base_model.targeted_module_names}
    assert adapted == set(rarezoo.FAMILIES["mistral_splade"].lora_target_modules)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and not any("lm_head" in name for name in trainable)


# --- versions and texts -----------------------------------------------------------------------------------------------


def requirements() -> dict[str, str]:
    """Name -> version range of everything that pyproject.toml asks for."""
    from packaging.requirements import Requirement

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text[text.index("\ndependencies") : text.index("[project.scripts]")]
    found = [Requirement(entry) for entry in re.findall(r'"([A-Za-z][^"]*)"', section)]
    return {requirement.name.lower(): str(requirement.specifier) for requirement in found}


def test_tested_versions_lie_in_the_ranges():
    from packaging.specifiers import SpecifierSet

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = dict(line.lower().split("==") for line in lines)
    assert lines == sorted(lines)
    wanted = {name: span for name, span in requirements().items() if name != "rarezoo"}
    assert set(wanted) <= set(pinned), "constraints.txt must pin what pyproject.toml asks for"
    for name, span in wanted.items():
        assert pinned[name] in SpecifierSet(span), f"{name}: {pinned[name]} is not in {span}"


def test_texts_hold_no_machine_paths_and_nothing_unfinished():
    """A repository that people clone names no folder of the machine on which it was written."""
    unfinished = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
    machine = re.compile(r"(?<![\w.~/-])/(root|work|opt)/\w")
    suffixes = {".py", ".md", ".toml", ".txt", ".yml", ".json", ""}
    skipped = {"fixtures", "__pycache__", "runs", "build", "dist", "site", "node_modules"}
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts)
        if hidden or skipped & set(parts) or path.suffix not in suffixes or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if unfinished.search(line) or machine.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
