"""transformers' own common tests, fetched for the installed version, on every class of every family."""

import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers

from .cases import MODELS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HERE = Path(__file__).parent

# Modules of transformers' test tree that its source distribution leaves out, as far as the common tests name them.
MISSING_MODULES = {
    "__init__.py": "",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'output_hidden_states': True, 'return_dict': False,"
    " 'dtype': 'float16', 'tie_word_embeddings': True, 'architectures': ['AModel'], 'bos_token_id': 7}\n",
}

# Why a common test may skip; anything else that skips fails here.
ACCEPTED_SKIPS = {
    r"requires (accelerator|multiple|MPS|deepspeed|the kernels library|Flash Attention)": "not on every machine",
    r"not (a )?composite|No subconfigs|does not support SDPA": "only for models that are made of other models",
    r"No conversion found": "our checkpoints hold the state dict's own names",
    r"No (decoder-only|sequence-to-sequence) language modeling head": "no such head in the family",
    r"does not support grouped_mm|no sparse experts|output_router_logits": "no mixture of experts",
    r"_keep_in_fp32_modules": "no module insists on float32",
    r"does not have position embeddings|partial rope|axial RoPE": "plain rotary positions",
    r"does not (have|support) RoPE": "learned positions",
    r"does not have a TP plan": "X-MOD, BERT and the lexinvariant model have none",
    r"does not support sliding window mask": "only with a `use_sliding_window` field; ours are in test_common_modeling",
    r"does not support output_attentions": "their test reads annotations, strings here; values are not compared",
    r"Not a prioritized model": "transformers' own choice of models for its overfitting test",
}


def run(*command, **arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **arguments)


def fetch(command: list, folder: Path) -> None:
    """Run pip to fill `folder` once; skip where there is no pip or no package index."""
    if not folder.is_dir():
        finished = run("-m", "pip", *command)
        if finished.returncode != 0:
            pytest.skip(f"pip {command[0]} failed: {finished.stderr.strip().splitlines()[-1]}")


@pytest.fixture
def test_tree(tmp_path, pytestconfig) -> Path:
    """A folder with transformers' `tests/`, what it lacks, and our module among them; downloads are kept."""
    downloads = pytestconfig.cache.mkdir("transformers_suite")
    version = transformers.__version__
    source, packages = downloads / f"transformers-{version}", downloads / "parameterized"
    wanted = f"transformers=={version}"
    fetch(["download", "--no-deps", "--no-binary", "transformers", "--dest", source, wanted], source)
    fetch(["install", "--target", packages, "parameterized"], packages)
    (archive,) = source.glob("transformers-*.tar.gz")
    tests = tmp_path / "tests"
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            path = Path(member.name)
            if path.parts[1:-1] == ("tests",) and path.suffix == ".py":
                tests.mkdir(exist_ok=True)
                (tests / path.name).write_bytes(opened.extractfile(member).read())
    for name, content in MISSING_MODULES.items():
        path = tests / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    (tests / "test_rarezoo_models.py").write_text((HERE / "hf_suite" / "common_model_tests.py").read_text())
    (tmp_path / "site").symlink_to(packages)
    return tmp_path


def test_transformers_common_tests(test_tree):
    report = test_tree / "report.xml"
    finished = run(
        *("-m", "pytest", "tests/test_rarezoo_models.py", "-q", "-p", "no:cacheprovider", "--tb=short"),
        *("-W", "ignore", "-o", "junit_family=xunit1", f"--junitxml={report}"),
        cwd=test_tree,
        env={
            **os.environ,
            "RAREZOO_CASES": str(HERE / "cases.py"),
            "PYTHONPATH": str(test_tree / "site"),
            "RUN_SLOW": "1",
        },
    )
    said = finished.stdout[-6000:] + finished.stderr[-2000:]
    assert finished.returncode == 0, said
    results = list(ElementTree.parse(report).iter("testcase"))
    skipped = {result.get("name"): element for result in results if (element := result.find("skipped")) is not None}
    passed = [result for result in results if len(result) == 0]
    classes = sum(len(case.suite_configs) for case in MODELS.values())
    assert len(passed) > 90 * classes, said
    reasons = [reason for case in MODELS.values() for skips in case.suite_skips.values() for reason in skips.values()]
    unexplained = {
        name: element.get("message")
        for name, element in skipped.items()
        if not any(
            re.search(pattern, element.get("message"), flags=re.IGNORECASE)
            for pattern in [*ACCEPTED_SKIPS, *map(re.escape, reasons)]
        )
    }
    assert not unexplained, "\n".join(f"{name}: {why}" for name, why in unexplained.items())
