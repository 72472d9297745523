"""The `rarezoo` command on damaged checkpoints, full disks and mistaken values: one line, exit code 2, nothing lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rarezoo.cli import app
from rarezoo.mistral_splade import MistralSpladeConfig, MistralSpladeForRetrieval, MistralSpladeProcessor

DOCUMENTS = {
    "paris": "the capital of france is paris",
    "copy": "the capital of france is paris",
    "jupiter": "jupiter is the largest planet in the solar system, by far",
    "cat": "the cat sat on the mat",
    "q2": "who sat on the mat",
}
QUERIES = {"q1": "what is the capital of france?", "q2": "who sat on the mat", "unjudged": "largest planet"}
QRELS = {"q1": {"paris": 1}, "q2": {"cat": 2, "q2": 1}, "absent": {"jupiter": 1}}


def call(*arguments, code: int = 0):
    """The result of a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    problem = "" if result.exception is None or isinstance(result.exception, SystemExit) else repr(result.exception)
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{problem}"
    return result


def refused(*arguments) -> str:
    """The one line on standard error of a command that ends with exit code 2."""
    problems = [line for line in call(*arguments, code=2).stderr.splitlines() if line.startswith("rarezoo: ")]
    assert len(problems) == 1, problems
    return problems[0]


def write_collection(folder: Path, documents: dict[str, str], qrels: dict[str, dict[str, int]]) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", QUERIES)):
        rows = "".join(json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items())
        (folder / f"{name}.jsonl").write_text(rows)
    rows = [f"{query}\t{name}\t{grade}" for query, grades in qrels.items() for name, grade in grades.items()]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    """A BEIR folder: two equal documents, a document with the name of a query, an unjudged query, an absent one."""
    return write_collection(tmp_path_factory.mktemp("collections") / "small", DOCUMENTS, QRELS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer) -> Path:
    """A checkpoint that nobody changes."""
    folder = tmp_path_factory.mktemp("checkpoints") / "whole"
    torch.manual_seed(0)
    config = MistralSpladeConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=192, pad_token_id=0,
    )  # fmt: skip
    MistralSpladeForRetrieval(config).save_pretrained(folder)
    MistralSpladeProcessor(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(whole, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


# --- one measurement, two verbs ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*judged queries have no results")
def test_eval_and_quantize_measure_the_same(whole, collection, tmp_path):
    report = json.loads(
        call("quantize", whole, tmp_path / "small", "--scheme", "bf16", "--evaluation", collection, "--json").stdout
    )
    for name, folder in (("full_precision", whole), ("quantized", tmp_path / "small")):
        measured = json.loads(call("eval", folder, collection, "--json").stdout)
        assert 0 < measured["metrics"]["nDCG@10"] < 1
        assert report["retrieval"]["nDCG@10"][name] == pytest.approx(measured["metrics"]["nDCG@10"], abs=1e-5)
