"""The `rarezoo` command on damaged checkpoints, full disks and mistaken values: one line, exit code 2, nothing lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rarezoo.cli.evaluate import _write_json
from rarezoo.cli.quantize import _SCHEMES
from rarezoo.mistral_splade import MistralSpladeConfig, MistralSpladeForRetrieval, MistralSpladeProcessor
from rarezoo.quantization import SCHEMES, quantize
from rarezoo.retrieval import read_run

from .commands import call, refused, write_collection
from .folders import file_limit

DOCUMENTS = {
    "paris": "the capital of france is paris",
    "copy": "the capital of france is paris",
    "jupiter": "jupiter is the largest planet in the solar system, by far",
    "cat": "the cat sat on the mat",
    "q1": "what is the capital of france?",
    "q2": "who sat on the mat",
}
QUERIES = {"q1": "what is the capital of france?", "q2": "who sat on the mat", "unjudged": "largest planet"}
QRELS = {"q1": {"paris": 1}, "q2": {"cat": 2, "q2": 1}, "absent": {"jupiter": 1}}


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    """A BEIR folder: two equal documents, two with the name of a query, one of them its answer, an unjudged query, an
    absent one."""
    return write_collection(tmp_path_factory.mktemp("collections") / "small", DOCUMENTS, QUERIES, QRELS)


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
        measured = json.loads(call("eval", folder, collection, "--output", tmp_path / f"{name} run", "--json").stdout)
        assert 0 < measured["metrics"]["nDCG@10"] < 1
        run = read_run(tmp_path / f"{name} run" / "run.trec")
        assert "q1" not in run["q1"] and "q2" in run["q2"], "a query is an answer to itself only if it is judged one"
        assert report["retrieval"]["nDCG@10"][name] == pytest.approx(measured["metrics"]["nDCG@10"], abs=1e-5)


# --- checkpoints that are not whole -----------------------------------------------------------------------------------


def edit_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused_everywhere(checkpoint: Path, collection: Path, folder: Path) -> list[str]:
    """What each verb that loads a model says; no verb may leave anything in `folder`."""
    folder.mkdir()
    found = [
        refused("explain", checkpoint, "the cat"),
        refused("encode", checkpoint, collection, folder / "embeddings"),
        refused("quantize", checkpoint, folder / "small", "--scheme", "bf16", "--no-fidelity"),
    ]
    assert list(folder.iterdir()) == []
    return found


def test_missing_weights_are_named(checkpoint, collection, tmp_path):
    edit_weights(checkpoint, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    for line in refused_everywhere(checkpoint, collection, tmp_path / "out"):
        assert "missing: model.layers.1.mlp.up_proj.weight. Check" in line and str(checkpoint) in line


@pytest.mark.parametrize(
    "fields, part",
    [
        ({"num_hidden_layers": 3}, "missing: model.layers.2."),
        ({"num_hidden_layers": 1}, "not expected: model.layers.1."),
        ({"vocab_size": 500}, "of another shape: lm_head.weight [192, 64] instead of [500, 64], model.embed_tokens"),
    ],
)
def test_weights_of_another_configuration_are_named(checkpoint, collection, tmp_path, fields, part):
    edit_config(checkpoint, **fields)
    for line in refused_everywhere(checkpoint, collection, tmp_path / "out"):
        assert part in line


@pytest.mark.parametrize("scheme", ["nf4", "int8", "bf16"])
def test_shapes_are_compared_whatever_is_quantized(checkpoint, tmp_path, scheme):
    edit_config(checkpoint, num_key_value_heads=2)
    line = refused("quantize", checkpoint, tmp_path / "small", "--scheme", scheme, "--no-fidelity")
    assert "model.layers.0.self_attn.k_proj.weight [32, 64] instead of [64, 64]" in line
    assert not (tmp_path / "small").exists()


def test_missing_head_is_named_and_a_tied_one_is_not_missing(checkpoint):
    edit_weights(checkpoint, lambda weights: weights.pop("lm_head.weight"))
    assert "missing: lm_head.weight" in refused("explain", checkpoint, "the cat")
    edit_config(checkpoint, tie_word_embeddings=True)
    assert call("explain", checkpoint, "the cat").stdout


def test_templates_are_not_made_up(checkpoint, collection, tmp_path):
    (checkpoint / "processor_config.json").unlink()
    for line in refused_everywhere(checkpoint, collection, tmp_path / "out"):
        assert f"{checkpoint} has no processor_config.json, which holds the templates" in line
    with pytest.raises(FileNotFoundError, match="has no processor_config"):
        quantize(checkpoint, tmp_path / "small", "bf16", fidelity=False)


def test_damaged_weights_are_named(checkpoint, collection, tmp_path):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for line in refused_everywhere(checkpoint, collection, tmp_path / "out"):
        assert f"{weights}: damaged weights" in line
    for arguments in (("card", checkpoint), ("push", checkpoint, "owner/name")):
        assert str(weights) in refused(*arguments)
    assert not (checkpoint / "README.md").exists()


@pytest.mark.parametrize(
    "fields, part",
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1; found 0"),
        ({"num_attention_heads": 0, "head_dim": None}, "config.json"),
        ({"hidden_size": -64}, "hidden_size must be at least 1; found -64"),
        ({"hidden_act": "round"}, "hidden_act must be one of"),
        ({"dtype": "float99"}, "float99"),
    ],
)
def test_impossible_configurations_are_named(checkpoint, collection, tmp_path, fields, part):
    edit_config(checkpoint, **fields)
    lines = refused_everywhere(checkpoint, collection, tmp_path / "out")
    for line in [*lines, refused("card", checkpoint), refused("push", checkpoint, "owner/name")]:
        assert part in line and f"{checkpoint / 'config.json'}" in line


@pytest.mark.parametrize("content", ["[1]", "{", '"a"'])
@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_damaged_json_is_named(checkpoint, tmp_path, name, content):
    (checkpoint / name).write_text(content)
    for arguments in (("explain", checkpoint, "the cat"), ("quantize", checkpoint, tmp_path / "small")):
        assert str(checkpoint / name) in refused(*arguments)
    if not name.startswith("tokenizer"):
        assert str(checkpoint / name) in refused("card", checkpoint)
    assert not (tmp_path / "small").exists()


def test_damaged_tokenizers_are_named(checkpoint):
    for content in ('{"a": 1}', '{"model": {"type": "none"}, "added_tokens": []}'):
        (checkpoint / "tokenizer.json").write_text(content)
        line = refused("explain", checkpoint, "the cat")
        assert str(checkpoint) in line and "tokenizer.json" in line


@pytest.mark.parametrize("content", ["[1]", "{"])
@pytest.mark.parametrize("name", ["training_recipe.json", "quantization_report.json", "evaluation.json"])
def test_damaged_records_are_named(checkpoint, name, content):
    (checkpoint / name).write_text(content)
    for arguments in (("card", checkpoint), ("push", checkpoint, "owner/name")):
        assert str(checkpoint / name) in refused(*arguments)


# --- full disks -------------------------------------------------------------------------------------------------------


# The weights of the bf16 copy take more than 100 kB, the tokenizer 13 kB, the configuration more than 1 kB.
@pytest.mark.parametrize("size", [50_000, 5_000, 500])
def test_quantize_leaves_nothing_on_a_full_disk(whole, tmp_path, size):
    target = tmp_path / "new" / "small"
    with file_limit(size):
        line = refused("quantize", whole, target, "--scheme", "bf16", "--no-fidelity")
    assert f"cannot write {target} (" in line and "File too large" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [50_000, 500])
def test_convert_leaves_nothing_on_a_full_disk(whole, tmp_path, size):
    target = tmp_path / "new" / "official"
    with file_limit(size):
        line = refused("convert", "mistral_splade", whole, target, "--to", "official")
    assert str(target) in line and "File too large" in line
    assert list(tmp_path.iterdir()) == []


def test_card_keeps_the_old_one_on_a_full_disk(checkpoint):
    (checkpoint / "README.md").write_text("mine")
    before = sorted(path.name for path in checkpoint.iterdir())
    with file_limit(500):
        line = refused("card", checkpoint, "--replace")
    assert f"cannot write {checkpoint / 'README.md'} (File too large)" in line
    assert (checkpoint / "README.md").read_text() == "mine"
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_a_result_is_whole_or_absent_on_a_full_disk(tmp_path):
    file = tmp_path / "evaluation.json"
    with pytest.raises(OSError, match=r"cannot write .*evaluation.json .File too large"), file_limit(500):
        _write_json(file, ["x" * 1000])
    assert list(tmp_path.iterdir()) == []


# --- measurements that are not lost -----------------------------------------------------------------------------------


@pytest.fixture
def no_encoding(monkeypatch):
    """A corpus must not be encoded: it is the long part."""
    monkeypatch.setattr("rarezoo.retrieval.encode_corpus", lambda *_, **__: pytest.fail("the corpus was encoded"))


@pytest.mark.usefixtures("no_encoding")
def test_eval_finds_mistakes_before_the_long_work(checkpoint, collection, tmp_path):
    spaced = write_collection(tmp_path / "spaced", {**DOCUMENTS, "a b": "rain"}, QUERIES, QRELS)
    line = refused("eval", checkpoint, spaced, "--output", tmp_path / "out")
    assert "the identifier 'a b' holds white space" in line and not (tmp_path / "out").exists()

    (checkpoint / "evaluation.json").write_text("{")
    assert str(checkpoint / "evaluation.json") in refused("eval", checkpoint, collection, "--save")

    assert "no folder ./none" in refused("eval", checkpoint, collection, "--query-model", "./none")
    assert "leave it out" in refused("eval", checkpoint, collection, "--query-model", tmp_path, "--save")


@pytest.mark.usefixtures("no_encoding")
def test_eval_refuses_queries_of_another_model(checkpoint, collection, tmp_path):

    def last_line(*arguments):
        """Behind the bar of the queries, which are encoded first."""
        return call(*arguments, code=2).stderr.splitlines()[-1]

    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    edit_weights(other, lambda weights: weights["lm_head.weight"].mul_(2))
    line = last_line("eval", checkpoint, collection, "--query-model", other)
    assert f"--query-model {other} is another model" in line
    wide = Path(shutil.copytree(checkpoint, tmp_path / "wide"))
    edit_config(wide, vocab_size=200)
    padding = torch.zeros(8, 64)

    def widen(weights):
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            weights[name] = torch.cat([weights[name], padding])

    edit_weights(wide, widen)
    line = last_line("eval", checkpoint, collection, "--query-model", wide)
    assert "its vectors have 200 dimensions, those of the documents 192" in line


@pytest.mark.filterwarnings("ignore:.*judged queries have no results")
def test_eval_prints_what_it_cannot_store(checkpoint, collection, monkeypatch):
    def fail(*_):
        raise OSError("cannot write")

    monkeypatch.setattr("rarezoo.cli.evaluate._write_json", fail)
    found = call("eval", checkpoint, collection, "--save", "--json", code=2)
    assert json.loads(found.stdout)["metrics"]["nDCG@10"] > 0


# --- what is cheap to see is seen first -------------------------------------------------------------------------------


_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # its import fails
from rarezoo.cli import app
app(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "arguments, part",
    [
        ("info mistral_spalde/tiny", "did you mean mistral_splade/tiny?"),
        ("convert mistral-splade ./nowhere out", "no folder ./nowhere"),
        ("convert mistral-splade {whole} {whole}", "already exists and is not an empty folder"),
        ("convert mistral_spalde {whole} out", "did you mean mistral_splade?"),
        ("train nowhere.yaml out", "no training recipe at nowhere.yaml"),
        ("train {whole} out", "no training recipe at {whole}/training_recipe.json"),
        ("train recipe.yaml {whole}", "{whole} is not empty"),
        ("quantize ./nowhere out", "no folder nowhere"),
        ("quantize no/where out", "no folder no/where"),
        ("quantize {whole} out --scheme int3", "unknown scheme 'int3'; known schemes: nf4, "),
        ("quantize {whole} {whole}", "already exists and is not an empty folder"),
    ],
)
def test_wrong_arguments_are_noticed_before_the_heavy_imports(whole, tmp_path, arguments, part):
    (tmp_path / "recipe.yaml").write_text("preset: tiny")
    finished = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, *arguments.format(whole=whole).split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 2, finished.stderr
    assert part.format(whole=whole) in finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_the_command_knows_every_scheme():
    assert _SCHEMES == tuple(SCHEMES)


# --- mistaken values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["mps", "xpu:0", "meta", "gpu"])
def test_devices_that_are_not_supported(whole, device):
    line = refused("explain", whole, "the cat", "--device", device)
    assert f"--device must be cpu, cuda or cuda:NUMBER; found '{device}'" in line


@pytest.mark.parametrize(
    "change, part",
    [
        ("max_steps=abc", "--set max_steps: expected a whole number or null; found 'abc'"),
        ("max_steps=true", "--set max_steps: expected a whole number or null; found True"),
        ("learning_rate=NaN", "--set learning_rate: expected a number; found nan"),
        ("bf16=maybe", "--set bf16: expected true or false; found 'maybe'"),
        ("config=5", "--set config: expected a JSON object; found 5"),
        ("objective=5", "--set objective: expected a JSON object; found 5"),
        ("objective.score_scale=x", "--set objective.score_scale: expected a number; found 'x'"),
        ("objective.nothing=1", "nothing"),
        ("nothing=1", "nothing"),
        ("nothing.at_all=1", "no section 'nothing'"),
    ],
)
def test_recipe_values_of_another_type(tmp_path, change, part):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"preset": "tiny", "training_data": "rows.jsonl"}))
    assert part in refused("train", recipe, tmp_path / "out", "--set", change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option, part",
    [
        ("config_options=5", "--option config_options: expected a JSON object or null; found 5"),
        ("processor_options=5", "--option processor_options: expected a JSON object or null; found 5"),
        ("tokenizer=5", "--option tokenizer: expected a text or null; found 5"),
        ("merge_adapter=maybe", "--option merge_adapter: expected true or false; found 'maybe'"),
        ("dtype=fp16", "--option dtype: it is an argument of the command itself"),
        ("max_shard_size=5", "--option max_shard_size: it is an argument of the command itself"),
        ("source=x", "--option source: it is an argument of the command itself"),
    ],
)
def test_converter_options_of_another_type(whole, tmp_path, option, part):
    assert part in refused("convert", "mistral_splade", whole, tmp_path / "out", "--option", option)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metadata", ["a: [", "- a", "a: b: c"])
def test_a_readme_with_broken_metadata_is_named(checkpoint, metadata):
    readme = checkpoint / "README.md"
    readme.write_text(f"---\n{metadata}\n---\n# mine\n")
    assert str(readme) in refused("card", checkpoint)
    assert readme.read_text().endswith("# mine\n")


def test_push_needs_an_owner(checkpoint):
    assert "must be OWNER/NAME; found 'one'" in refused("push", checkpoint, "one")
    assert not (checkpoint / "README.md").exists()


def test_push_without_a_network(checkpoint):
    """In a process of its own: the address of the Hub is read at import."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_none"}
    arguments = [sys.executable, "-m", "rarezoo.cli", "push", checkpoint, "owner/name"]
    finished = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2, finished.stderr
    assert "rarezoo: the Hub cannot be reached (" in finished.stderr and "Traceback" not in finished.stderr
