"""Environment and fixtures of all tests. The environment is set before torch and huggingface_hub are imported: both
read it at import."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

_CACHE = tempfile.mkdtemp(prefix="rarezoo-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _CACHE
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: a second thread mostly waits, and costs its waiting
os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# A finder in front of all others: the packages that a user without the plugin would not have cannot be imported.
_BLOCKER = """
import sys

class _Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rarezoo", "modeling"):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

sys.meta_path.insert(0, _Blocked())
"""


@pytest.fixture(scope="session")
def fixture_folder() -> Path:
    """The reference numbers of Mistral-SPLADE; its README tells what every file is."""
    return Path(__file__).parent / "fixtures" / "mistral_splade"


@pytest.fixture(scope="session")
def colbert_fixtures() -> Path:
    """The reference numbers of ColBERT-XM; its README tells what every file is."""
    return Path(__file__).parent / "fixtures" / "colbert_xm"


@pytest.fixture(scope="session")
def inputs(fixture_folder) -> dict:
    """The fixture's texts, prompt, templates and limits."""
    return json.loads((fixture_folder / "inputs.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tokenizer(fixture_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fixture_folder)


@pytest.fixture(scope="session")
def splade_checkpoint(fixture_folder, inputs, tokenizer, tmp_path_factory) -> Path:
    """A checkpoint folder with the fixture's weights, as `save_pretrained` of the model and of the processor write it.
    Read-only by agreement: copy it before changing it."""
    from safetensors.torch import load_file

    from rarezoo.mistral_splade import MistralSpladeConfig, MistralSpladeForRetrieval, MistralSpladeProcessor

    fields = json.loads((fixture_folder / "config.json").read_text(encoding="utf-8"))
    del fields["model_type"], fields["architectures"]
    model = MistralSpladeForRetrieval(MistralSpladeConfig(**fields)).eval()
    model.load_state_dict(load_file(fixture_folder / "model.safetensors"), strict=True)
    processor = MistralSpladeProcessor(
        tokenizer,
        attention_mode="echo",
        query_template=inputs["templates"]["query"],
        document_template=inputs["templates"]["document"],
        prompt=inputs["prompt"],
        max_query_length=inputs["max_length"],
        max_document_length=inputs["max_length"],
    )
    folder = tmp_path_factory.mktemp("splade") / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_without_rarezoo():
    """`run_without_rarezoo(code, **environment)`: what Python code prints in a process where `import rarezoo` fails."""

    def run(code: str, **environment: str) -> str:
        finished = subprocess.run(
            [sys.executable, "-c", _BLOCKER + textwrap.dedent(code)],
            env={**os.environ, **environment},
            cwd=_CACHE,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert finished.returncode == 0, f"exit code {finished.returncode}\n{finished.stdout}\n{finished.stderr}"
        return finished.stdout

    return run
