"""The `rarezoo` command: what it answers, on real files, and how it fails."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import rarezoo
from rarezoo.cli import app
from rarezoo.cli.search import snippet

from .commands import call, write_collection, write_jsonl

VERBS = (
    "quickstart list info convert supertokens transplant train train-language encode index search explain eval "
    "quantize export card push"
).split()
SCRIPT = Path(sys.executable).with_name("rarezoo")
DOCUMENTS = {
    "paris": "the capital of france is paris",
    "jupiter": "jupiter is the largest planet in the solar system, by far",
    "cat": "the cat sat on the mat",
    "berlin": "the capital of germany is berlin",
    "dog": "the dog ran over the hill to the river",
}
QUERIES = {"q1": "what is the capital of france?", "q2": "who sat on the mat", "unjudged": "largest planet"}
QRELS = {"q1": {"paris": 1}, "q2": {"cat": 2, "dog": 1}}


def answer(*arguments):
    """What a command answers with --json."""
    return json.loads(call(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    """A BEIR folder."""
    return write_collection(tmp_path_factory.mktemp("collections") / "small", DOCUMENTS, QUERIES, QRELS)


@pytest.fixture(scope="module")
def model(splade_checkpoint):
    return rarezoo.MistralSpladeForRetrieval.from_pretrained(splade_checkpoint).eval()


@pytest.fixture(scope="module")
def embeddings(splade_checkpoint, collection, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "embeddings"
    call("encode", splade_checkpoint, collection, folder, "--batch-size", 2, "--shard-size", 3)
    return folder


@pytest.fixture(scope="module")
def index(embeddings) -> Path:
    folder = embeddings.with_name("index")
    call("index", embeddings, folder)
    return folder


@pytest.fixture(scope="module")
def scores(model):
    """Every query against every document, without the command line and without an index."""
    matrix = model.score(model.encode_queries(list(QUERIES.values())), model.encode_documents(list(DOCUMENTS.values())))
    return {query: dict(zip(DOCUMENTS, map(float, row))) for query, row in zip(QUERIES, matrix)}


def ranked(scores: dict[str, float]) -> list[str]:
    return sorted((name for name, score in scores.items() if score > 0), key=lambda name: -scores[name])


# --- the command itself -----------------------------------------------------------------------------------------------


def test_help_is_quick_and_names_every_verb():
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        finished = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - start)
        assert finished.returncode == 0
    assert min(seconds) < 0.5, seconds
    shown = [line.split()[0] for line in finished.stdout.split("Commands:")[1].splitlines() if line.strip()]
    assert shown == VERBS


@pytest.mark.parametrize("verb", [*VERBS, "index build", "index add", "index delete", "index compact"])
def test_every_verb_explains_itself(verb):
    shown = call(*verb.split(), "--help").stdout
    assert shown.startswith("Usage: ") and f" {verb} " in shown.splitlines()[0]


def test_version_and_module():
    assert call("--version").stdout == f"rarezoo {rarezoo.__version__}\n"
    finished = subprocess.run([sys.executable, "-m", "rarezoo.cli", "--version"], capture_output=True, text=True)
    assert finished.stdout == f"rarezoo {rarezoo.__version__}\n"


# --- what it answers --------------------------------------------------------------------------------------------------


def test_list():
    rows = answer("list")
    assert [row["name"] for row in rows] == list(rarezoo.FAMILIES)
    shown = call("list").stdout
    for row in rows:
        assert row["auto_classes"] == rarezoo.FAMILIES[row["name"]].auto_classes
        assert row["presets"] == rarezoo.list_presets(row["name"])
        assert f"{row['name']}: {row['title']}" in shown
        assert all(preset in shown for preset in row["presets"])


def test_info_of_a_preset():
    found = answer("info", "mistral_splade/mistral-7b-v0.1")
    assert found["parameters"] == 7_241_732_096
    assert found["config"]["num_hidden_layers"] == 32
    assert "7,241,732,096" in call("info", "mistral_splade/mistral-7b-v0.1").stdout


def test_info_of_a_family():
    for name in ("mistral_splade", "mistral-splade"):
        presets = [f"mistral_splade/{preset}" for preset in rarezoo.list_presets("mistral_splade")]
        assert answer("info", name)["presets"] == presets
        assert set(presets) <= set(call("info", name).stdout.split())
    assert answer("info", "colbert-xm/tiny") == answer("info", "colbert_xm/tiny")


def test_info_looks_for_a_repository_with_the_name_of_a_preset(splade_checkpoint, tmp_path, monkeypatch):
    """Only the owner tells it from a preset: a hint, no refusal. A folder is never taken for a preset."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as offline:
        offline.setattr("rarezoo.cli.info._describe_checkpoint", lambda model: 1 / 0)
        found = CliRunner().invoke(app, ["info", "antoinelouis/colbert-xm"])
    assert isinstance(found.exception, ZeroDivisionError), "the Hub is asked"
    assert "the Hub repository antoinelouis/colbert-xm; the preset is colbert_xm/colbert-xm" in found.stderr
    shutil.copytree(splade_checkpoint, "mistral-splade/tiny")
    assert answer("info", "mistral-splade/tiny")["checkpoint"] == "mistral-splade/tiny"
    assert answer("info", "mistral_splade/tiny")["preset"] == "mistral_splade/tiny"


def test_info_for_people_leaves_out_what_says_nothing(splade_checkpoint, tmp_path):
    checkpoint = shutil.copytree(splade_checkpoint, tmp_path / "checkpoint")
    recipe = {"preset": "tiny", "model": None, "objective": {"flops_threshold": None, "kl_weight": 0.0}}
    (checkpoint / "training_recipe.json").write_text(json.dumps(recipe))
    shown = call("info", checkpoint).stdout
    for name in ("id2label", "chunk_size_feed_forward", "problem_type", "flops_threshold", "model = null"):
        assert name not in shown, name
    assert 'preset = "tiny"' in shown and "kl_weight" in shown and "vocab_size = 160" in shown
    assert 'hidden_act = "silu"' in shown, "a default of the family is not one of every model"
    assert (
        "id2label" in answer("info", checkpoint)["config"] and "model" in answer("info", checkpoint)["training_recipe"]
    )


def test_info_of_a_checkpoint(splade_checkpoint, model, inputs):
    found = answer("info", splade_checkpoint)
    assert found["family"] == "mistral_splade"
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["config"]["attention_mode"] == "echo"
    assert found["processor"]["document_template"] == inputs["templates"]["document"]
    assert found["files"]["model.safetensors"] == (splade_checkpoint / "model.safetensors").stat().st_size
    assert "quantization" not in found
    shown = call("info", splade_checkpoint).stdout
    assert f"{found['parameters']:,}" in shown
    assert 'attention_mode = "echo"' in shown


def test_explain(splade_checkpoint, model):
    text = "the cat sat on the mat"
    for options, kind in (([], "document"), (["--query"], "query")):
        expected = model.explain(text, top_k=4, kind=kind)
        found = answer("explain", splade_checkpoint, text, "--top-k", 4, *options)
        assert [row["token"] for row in found] == [token for token, _ in expected]
        assert [row["weight"] for row in found] == pytest.approx([weight for _, weight in expected], abs=1e-5)
    shown = call("explain", splade_checkpoint, text, "--top-k", 4, "--query").stdout.splitlines()
    assert len(shown) == len(expected)
    assert shown[0].split()[0] == f"{expected[0][1]:.4f}"


def test_encode_is_what_the_model_says_and_goes_on(splade_checkpoint, collection, embeddings, model):
    from rarezoo.retrieval import SparseEmbeddings

    found = SparseEmbeddings.open(embeddings)
    assert list(found.ids) == list(DOCUMENTS)
    expected = model.encode_documents(list(DOCUMENTS.values()))
    assert np.abs((found.matrix - expected).toarray()).max() < 1e-5
    shards = {path: path.stat().st_mtime_ns for path in embeddings.glob("*.safetensors")}
    assert len(shards) == 2
    again = answer("encode", splade_checkpoint, collection, embeddings, "--batch-size", 2, "--shard-size", 3)
    assert again["texts"] == 5
    assert again["active_dimensions"] == pytest.approx(expected.nnz / 5, abs=0.01)
    assert {path: path.stat().st_mtime_ns for path in embeddings.glob("*.safetensors")} == shards


@pytest.mark.slow
def test_two_processes_write_the_same_files(splade_checkpoint, collection, embeddings, tmp_path):
    script = tmp_path / "command.py"
    script.write_text(
        "import os, pathlib\n"
        f"pathlib.Path({str(tmp_path)!r}, 'process' + os.environ['RANK']).touch()\n"
        "from rarezoo.cli import main\n"
        "main()\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # With --cpu, accelerate starts a single process unless there is MPI; --multi_gpu starts them all, and without GPUs
    # they run on the CPU.
    launch = f"accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port {port}"
    options = "--mixed_precision no --dynamo_backend no"
    command = ["-m", *launch.split(), *options.split(), script, "encode"]
    finished = subprocess.run(
        [sys.executable, *command, splade_checkpoint, collection, tmp_path / "out", "--batch-size=2", "--shard-size=3"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    assert {path.name for path in tmp_path.glob("process*")} == {"process0", "process1"}
    assert len(finished.stdout.splitlines()) == 1
    names = sorted(path.name for path in embeddings.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    from rarezoo.retrieval import SparseEmbeddings

    one, two = SparseEmbeddings.open(embeddings), SparseEmbeddings.open(tmp_path / "out")
    assert list(one.ids) == list(two.ids)
    assert np.abs((one.matrix - two.matrix).toarray()).max() < 1e-6


def test_search_agrees_with_brute_force(splade_checkpoint, index, collection, scores):
    for query, text in QUERIES.items():
        found = answer("search", index, text, "--model", splade_checkpoint, "--corpus", collection, "--terms", 1000)
        assert found["query"] == text
        assert [row["id"] for row in found["answers"]] == ranked(scores[query])
        for rank, row in enumerate(found["answers"], 1):
            assert row["rank"] == rank
            assert row["score"] == pytest.approx(scores[query][row["id"]], rel=1e-4)
            assert row["text"] == DOCUMENTS[row["id"]]
            contributions = [term["contribution"] for term in row["terms"]]
            assert sum(contributions) == pytest.approx(row["score"], rel=1e-4)
            assert contributions == sorted(contributions, reverse=True)


def test_search_for_people(splade_checkpoint, index, collection, scores):
    arguments = ("search", index, QUERIES["q1"], "--model", splade_checkpoint, "--corpus", collection, "--top-k", 2)
    shown = call(*arguments).stdout.splitlines()
    best = ranked(scores["q1"])[:2]
    assert [line.split()[2] for line in shown if line.split()[0] in ("1.", "2.")] == best
    assert shown[2].strip() == DOCUMENTS[best[0]]
    assert shown[1].startswith("     ") and shown[1].split()[-1].replace(".", "").isdigit()


def test_a_run_file(splade_checkpoint, index, collection, scores, tmp_path):
    run = tmp_path / "run.trec"
    found = answer(
        "search", index, "--model", splade_checkpoint, "--queries", collection, "--run", run, "--top-k", 2
    )  # fmt: skip
    rows = [line.split() for line in run.read_text().splitlines()]
    assert found["answers"] == len(rows) == 6
    for query in QUERIES:
        assert [row[2] for row in rows if row[0] == query] == ranked(scores[query])[:2]


def test_an_index_changes(splade_checkpoint, embeddings, collection, tmp_path, scores):
    more = tmp_path / "more.tsv"
    more.write_text("rome\tthe capital of italy is rome\n")
    call("encode", splade_checkpoint, more, tmp_path / "more")
    index = tmp_path / "index"
    assert answer("index", "build", embeddings, index)["documents"] == 5
    assert answer("index", "add", index, tmp_path / "more")["documents"] == 6
    best = ranked(scores["q1"])[0]
    assert answer("index", "delete", index, best)["documents"] == 5
    postings = answer("index", "compact", index)["postings"]
    found = answer("search", index, QUERIES["q1"], "--model", splade_checkpoint)["answers"]
    assert "rome" in {row["id"] for row in found}
    assert [row["id"] for row in found if row["id"] != "rome"] == ranked(scores["q1"])[1:]
    from rarezoo.retrieval import SparseEmbeddings

    everything = SparseEmbeddings.concatenate([SparseEmbeddings.open(path) for path in (embeddings, tmp_path / "more")])
    gone = list(everything.ids).index(best)
    assert postings == everything.matrix.nnz - everything.matrix[gone].nnz


def reciprocal_rank(scores: dict[str, float], grades: dict[str, int]) -> float:
    return next((1 / rank for rank, name in enumerate(ranked(scores), 1) if grades.get(name, 0) > 0), 0.0)


def test_eval(splade_checkpoint, collection, scores, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(splade_checkpoint, checkpoint)
    output = tmp_path / "output"
    arguments = ("eval", checkpoint, collection, "--metrics", "nDCG@10,RR", "--output", output, "--save")
    found = answer(*arguments)
    assert (found["dataset"], found["split"], found["queries"], found["documents"]) == ("small", "test", 2, 5)
    expected = np.mean([reciprocal_rank(scores[query], grades) for query, grades in QRELS.items()])
    assert found["metrics"]["RR"] == pytest.approx(expected, abs=1e-5)
    gains = []
    for query, grades in QRELS.items():
        dcg = sum(grades.get(name, 0) / np.log2(rank + 1) for rank, name in enumerate(ranked(scores[query]), 1))
        gains.append(dcg / sum(g / np.log2(r + 1) for r, g in enumerate(sorted(grades.values(), reverse=True), 1)))
    assert found["metrics"]["nDCG@10"] == pytest.approx(np.mean(gains), abs=1e-5)
    assert json.loads((output / "metrics.json").read_text()) == found
    assert json.loads((checkpoint / "evaluation.json").read_text()) == [found]
    assert {line.split()[0] for line in (output / "run.trec").read_text().splitlines()} == set(QRELS)
    assert answer(*arguments) == found
    assert json.loads((checkpoint / "evaluation.json").read_text()) == [found]
    assert f"value: {found['metrics']['nDCG@10']}" in call("card", checkpoint, "--show").stdout
    call("card", checkpoint, "--license", "apache-2.0")
    assert "license: apache-2.0" in (checkpoint / "README.md").read_text()


def test_eval_leaves_nothing_behind(splade_checkpoint, collection, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in splade_checkpoint.iterdir()}
    call("eval", splade_checkpoint, collection)
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in splade_checkpoint.iterdir()} == before


@pytest.mark.parametrize("to", ["anserini", "qdrant", "opensearch", "elasticsearch", "seismic", "scipy"])
def test_exported_embeddings_come_back(to, embeddings, splade_checkpoint, tokenizer, tmp_path):
    from rarezoo.retrieval import SparseEmbeddings, import_embeddings

    suffix = ".npz" if to == "scipy" else ".jsonl"
    call("export", embeddings, tmp_path / f"vectors{suffix}", "--to", to, "--model", splade_checkpoint)
    found = import_embeddings(tmp_path / f"vectors{suffix}", to, tokenizer)
    expected = SparseEmbeddings.open(embeddings)
    assert list(found.ids) == list(expected.ids)
    tolerance = 0.00501 if to == "anserini" else 1e-6
    assert np.abs((found.matrix - expected.matrix).toarray()).max() <= tolerance


def test_queries_without_a_model(splade_checkpoint, collection, index, model, tokenizer, tmp_path):
    folder = tmp_path / "inference-free"
    call("export", splade_checkpoint, folder, "--to", "inference-free", "--corpus", collection)
    found = answer("search", index, "capital of france", "--model", folder)["answers"]
    ids = sorted(set(tokenizer("capital of france", add_special_tokens=False)["input_ids"]))
    texts = [set(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in DOCUMENTS.values()]
    counts = [sum(token in text for text in texts) for token in ids]
    weights = {token: np.log1p((5 - count + 0.5) / (count + 0.5)) for token, count in zip(ids, counts)}
    documents = model.encode_documents(list(DOCUMENTS.values())).toarray()
    expected = {name: sum(weights[t] * row[t] for t in ids) for name, row in zip(DOCUMENTS, documents)}
    assert [row["id"] for row in found] == ranked(expected)
    assert [row["score"] for row in found] == pytest.approx([expected[row["id"]] for row in found], rel=1e-4)


@pytest.mark.slow
def test_an_onnx_graph_gives_the_same_vectors(splade_checkpoint, model, tmp_path):
    import onnxruntime

    call("export", splade_checkpoint, tmp_path / "onnx", "--to", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    processor = rarezoo.MistralSpladeProcessor.from_pretrained(tmp_path / "onnx")
    for texts in (["a"], list(DOCUMENTS.values()), ["the cat " * 20, "mat"]):
        inputs = processor.process_documents(texts)
        (found,) = session.run(None, {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()})
        with torch.no_grad():
            expected = model(**inputs).sparse_embedding.numpy()
        assert np.abs(found - expected).max() < 1e-5


def test_convert_there_and_back(fixture_folder, tmp_path):
    report = answer("convert", "mistral_splade", fixture_folder, tmp_path / "ours", "--option", "role=null")
    assert report["to"] == "rarezoo"
    assert answer("info", tmp_path / "ours")["family"] == "mistral_splade"
    call("convert", "mistral_splade", tmp_path / "ours", tmp_path / "official", "--to", "official")
    original = load_file(fixture_folder / "model.safetensors")
    returned = load_file(tmp_path / "official" / "model.safetensors")
    assert set(original) == set(returned)
    assert all(torch.equal(original[name], returned[name]) for name in original)
    shown = call("convert", "mistral_splade", fixture_folder, tmp_path / "half", "--dtype", "bfloat16").stdout
    assert "bfloat16" in shown
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


def test_quantize(splade_checkpoint, tmp_path):
    report = answer("quantize", splade_checkpoint, tmp_path / "bf16", "--scheme", "bf16", "--no-fidelity")
    assert report["scheme"] == "bf16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "bf16" / "model.safetensors").values()} == {torch.bfloat16}
    found = answer("info", tmp_path / "bf16")
    assert found["quantization"]["scheme"] == "bf16"
    assert len(answer("explain", tmp_path / "bf16", "the cat", "--top-k", 3)) == 3


def test_train(splade_checkpoint, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = zip(inputs["queries"], inputs["documents"], inputs["negatives"])
    pairs = [{"query": query, "positive": positive, "negative": negative} for query, positive, negative in rows]
    write_jsonl(Path("pairs.jsonl"), pairs)
    recipe = {"model": str(splade_checkpoint), "training_data": "pairs.jsonl", "batch_size": 3, "max_steps": 50}
    Path("recipe.json").write_text(json.dumps(recipe))
    changes = ["--set", "max_steps=3", "--set", "learning_rate=0.01", "--set", "objective.query_regularizer=l1"]
    result = answer("train", "recipe.json", "model", *changes)
    assert result["steps"] == 3
    stored = answer("info", "model")["training_recipe"]
    assert (stored["max_steps"], stored["learning_rate"], stored["batch_size"]) == (3, 0.01, 3)
    assert stored["objective"]["query_regularizer"] == "l1"
    before, after = (load_file(folder / "model.safetensors") for folder in (splade_checkpoint, Path("model")))
    assert before.keys() == after.keys()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert "3 steps" in call("train", "model", "again").stdout  # a checkpoint's own recipe
    assert "not empty" in error_line("train", "recipe.json", "model")
    assert "unknown SparseTrainingRecipe fields colour" in error_line("train", "recipe.json", "x", "--set", "colour=1")
    assert "no section 'batch_size'" in error_line("train", "recipe.json", "x", "--set", "batch_size.size=1")
    assert "no training recipe at nothing.yaml" in error_line("train", "nothing.yaml", "x")
    assert not Path("x").exists()


def test_push_to_a_hub(splade_checkpoint, tmp_path):
    """Through the installed script: huggingface_hub reads its endpoint when it is imported."""
    from .loopback_hub import USER, LoopbackHub

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(splade_checkpoint, checkpoint)
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        finished = subprocess.run(
            [SCRIPT, "push", checkpoint, f"{USER}/splade", "--license", "apache-2.0", "--json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert finished.returncode == 0, finished.stderr
        pushed = json.loads(finished.stdout)
        shown = subprocess.run(
            [SCRIPT, "info", f"{USER}/splade", "--json"], env=environment, capture_output=True, text=True, timeout=240
        )
        assert shown.returncode == 0, shown.stderr
    assert pushed["repository"] == f"{USER}/splade" and len(pushed["commit"]) == 40
    files = json.loads(shown.stdout)["files"]
    assert files["model.safetensors"] == (splade_checkpoint / "model.safetensors").stat().st_size
    assert {"README.md", "config.json", "modeling_mistral_splade.py", "processor_config.json"} <= set(files)


def test_snippets():
    text = "word " * 60 + "the capital of france is paris " + "word " * 60
    assert snippet("short   text\nhere", ["▁text"]) == "short text here"
    found = snippet(text, ["▁capital", "▁france", "▁paris", "."], width=60)
    assert "capital of france is paris" in found and found.startswith("… ") and found.endswith(" …")
    assert snippet(text, ["zebra"], width=20) == "word word word word …"
    assert len(snippet("x" * 500, [], width=50)) <= 54


# --- how it fails -----------------------------------------------------------------------------------------------------


def error_line(*arguments) -> str:
    """The one line of a command that a user can put right."""
    result = call(*arguments, code=2)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("rarezoo: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ("sell", "No such command 'sell'"),
        ("serch index", "Did you mean 'search'? See `rarezoo --help`."),
        ("encode model", "Missing argument 'CORPUS'. See `rarezoo encode --help`."),
        ("index build embeddings", "Missing argument 'INDEX'. See `rarezoo index build --help`."),
        ("list --color", "No such option: --color"),
        ("encode {model} {collection} out --batch-size 0", "greater than or equal to 1"),
        ("info mistral_splade/huge", "known presets: mistral-1b"),
        ("info mistral-splade/huge", "known presets: mistral-1b"),
        ("info mistral_spalde", "did you mean mistral_splade?"),
        ("info mistral_spalde/tiny", "no preset or checkpoint mistral_spalde/tiny; did you mean mistral_splade/tiny?"),
        ("info splade/tiny", "did you mean mistral_splade/tiny?"),
        ("info colbert-mx/colbertxm", "did you mean colbert_xm/colbert-xm?"),
        (
            "info tiny",
            "did you mean mistral_splade/tiny or colbert_xm/tiny or lexinvariant/tiny or tokenizer_transplant/tiny?",
        ),
        ("info {tmp}/nothing", "expected a checkpoint folder or a Hub repository OWNER/NAME"),
        ("info {collection}", "is a folder without config.json"),
        ("info {collection}/corpus.jsonl", "is a file"),
        ("info {fixtures}", "has model_type 'mistral'; expected one of colbert_xm, lexinvariant, mistral_splade"),
        ("info {fixtures}/adapter_linear", "is a LoRA adapter without its base"),
        ("explain {fixtures} text", "has model_type 'mistral'"),
        ("explain {model} text --device tpu9", "--device must be cpu, cuda or cuda:NUMBER"),
        ("explain {model} text --dtype int8", "--dtype must be float32, bfloat16 or float16"),
        ("encode {model} {tmp}/no-corpus {tmp}/out", "no-corpus"),
        ("encode {model} {collection} {fixtures}", "choose an empty folder"),
        ("index {tmp}/nothing {tmp}/index", "nothing"),
        ("index {embeddings} {index}", "not an empty folder"),
        ("index delete {index} unheard-of", "has no document 'unheard-of'"),
        ("index add {index} {embeddings}", "holds a document 'paris' already"),
        ("search {tmp}/nothing query --model {model}", "nothing"),
        ("search {index} --model {model}", "give either a QUERY, or --queries FILE together with --run FILE"),
        ("search {index} query --queries file --model {model}", "give either a QUERY"),
        ("search {index} france --model {model} --corpus {tmp}/other.tsv", "expected the corpus that was indexed"),
        ("search {index} query --model {tmp}/other-model", "encode"),
        ("eval {model} {collection} --metrics nDCG@10,nonsense", "unknown metric 'nonsense'"),
        ("eval {model} {collection} --split train", "train"),
        ("eval {model} {tmp}", "qrels"),
        ("eval owner/name {collection} --save", "--save writes into a checkpoint folder"),
        ("export {embeddings} {tmp}/out --to lucene", "--to must be one of anserini"),
        ("export {embeddings} {collection}/corpus.jsonl --to qdrant", "exists"),
        ("export {model} {tmp}/out --to inference-free", "give --corpus"),
        ("convert mistral_splade {tmp}/nothing {tmp}/out", "nothing"),
        ("convert bert {fixtures} {tmp}/out", "unknown family 'bert'; known families: mistral_splade"),
        ("convert colbert-mx {fixtures} {tmp}/out", "unknown family 'colbert-mx'; did you mean colbert_xm?"),
        ("quickstart mistral_spalde", "unknown family 'mistral_spalde'; did you mean mistral_splade?"),
        ("convert mistral_splade {fixtures} {tmp}/out --option role", "--option must be NAME=VALUE"),
        ("convert mistral_splade {fixtures} {tmp}/out --option colour=red", "unknown option colour"),
        ("convert mistral_splade {fixtures} {collection}", "not an empty folder"),
        ("quantize {model} {tmp}/out --scheme int3", "int3"),
        ("quantize {fixtures} {tmp}/out", "has model_type 'mistral'"),
        ("card {tmp}", "config.json"),
        ("push {tmp} owner/name", "config.json"),
        ("quickstart bert", "unknown family 'bert'"),
    ],
)
def test_a_users_error_is_one_line(
    arguments, fragment, splade_checkpoint, collection, embeddings, index, fixture_folder, model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.tsv").write_text("1\tanother text\n")
    if "other-model" in arguments:
        with torch.no_grad():
            other = rarezoo.MistralSpladeForRetrieval.from_pretrained(splade_checkpoint)
            other.lm_head.weight.mul_(2)
        other.save_pretrained(tmp_path / "other-model")
        rarezoo.MistralSpladeProcessor.from_pretrained(splade_checkpoint).save_pretrained(tmp_path / "other-model")
    before = sorted(path.name for path in tmp_path.iterdir())
    places = {
        "model": splade_checkpoint,
        "collection": collection,
        "embeddings": embeddings,
        "index": index,
        "fixtures": fixture_folder,
        "tmp": tmp_path,
    }
    line = error_line(*(part.format(**places) for part in arguments.split()))
    assert fragment in line
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "something was left behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_named(splade_checkpoint):
    assert "PyTorch finds no GPU" in error_line("explain", splade_checkpoint, "text", "--device", "cuda")


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(app, ["--debug", "info", "mistral_splade/huge"])
    assert isinstance(result.exception, KeyError)
    finished = subprocess.run([SCRIPT, "--debug", "info", "mistral_splade/huge"], capture_output=True, text=True)
    assert finished.returncode == 1 and "Traceback" in finished.stderr


@pytest.mark.parametrize(
    "fault", [RuntimeError("a fault"), KeyError("name"), ZeroDivisionError(), TypeError("a fault")]
)
def test_faults_of_the_program_are_not_hidden(fault, monkeypatch):
    def fail(family):
        raise fault

    monkeypatch.setattr("rarezoo.configs.list_presets", fail)
    assert CliRunner().invoke(app, ["list"]).exception is fault


def test_a_missing_extra_is_named(splade_checkpoint, collection, monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    assert "rarezoo[eval]" in error_line("eval", splade_checkpoint, collection)


def test_an_interruption_is_one_line(monkeypatch):
    def interrupt(family):
        raise KeyboardInterrupt

    monkeypatch.setattr("rarezoo.configs.list_presets", interrupt)
    result = call("list", code=130)
    assert result.stderr.startswith("rarezoo: interrupted; ") and len(result.stderr.splitlines()) == 1
