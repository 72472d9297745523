"""The verbs of `rarezoo` on a multi-vector family: the same files, the same errors, MaxSim in place of dot products."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, XmodConfig, XmodForMaskedLM

from rarezoo import ColBERTXMForRetrieval
from rarezoo.conversion import convert
from rarezoo.model_cards import build_card
from rarezoo.quantization import quantize
from rarezoo.retrieval import MultiVectorEmbeddings, MultiVectorIndex

from .commands import call, refused, write_collection, write_jsonl

DOCUMENTS = {
    "paris": "Paris is the capital; it lies on the Seine.",
    "loire": "la Loire est le plus long fleuve",
    "moon": "the moon pulls the sea, and the sea rises twice a day!",
    "blank": " ",
}
QUERIES = {"q1": "what is the capital of france?", "q2": "how do tides work"}
QRELS = {"q1": {"paris": 1}, "q2": {"moon": 1}}


@pytest.fixture(scope="module")
def checkpoint(colbert_fixtures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "colbert"
    convert("colbert_xm", colbert_fixtures / "checkpoint", folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return ColBERTXMForRetrieval.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    return write_collection(tmp_path_factory.mktemp("collections") / "small", DOCUMENTS, QUERIES, QRELS)


@pytest.fixture(scope="module")
def embeddings(checkpoint, collection) -> Path:
    folder = collection.with_name("embeddings")
    shown = call("encode", checkpoint, collection, folder, "--language", "fr-CA", "--shard-size", 3, "--batch-size", 2)
    assert (
        shown.stdout.startswith(f"{folder}: 4 texts, ") and "vectors of 16 dimensions each on average" in shown.stdout
    )
    return folder


def test_encode(embeddings, model):
    """Shards of the model's own vectors, in the order of the corpus."""
    opened = MultiVectorEmbeddings.open(embeddings)
    assert list(opened.ids) == list(DOCUMENTS)
    expected = model.encode_documents(list(DOCUMENTS.values()), language="fr")
    assert opened.lengths.tolist() == [len(vectors) for vectors in expected]
    torch.testing.assert_close(torch.from_numpy(opened.vectors.copy()), torch.cat(expected), atol=1e-6, rtol=0)
    opened.verify()


def test_an_encoding_job_goes_on(checkpoint, collection, embeddings, tmp_path):
    """The same files after an interruption; another language is another job."""
    folder = tmp_path / "embeddings"
    arguments = ("encode", checkpoint, collection, folder, "--shard-size", 3)
    call(*arguments, "--language", "fr")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "shard-00001.safetensors").unlink()
    call(*arguments, "--language", "fra")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "language: 'fr_XX' there, 'en_XX' now" in refused(*arguments)


def test_an_official_folder_as_it_is(colbert_fixtures, checkpoint, collection, embeddings, tmp_path):
    """colbert-ai's own layout serves every verb that reads a model, as its conversion does."""
    official = colbert_fixtures / "checkpoint"
    call(
        "encode",
        official,
        collection,
        tmp_path / "embeddings",
        "--language",
        "fr",
        "--shard-size",
        3,
        "--batch-size",
        2,
    )
    found, expected = (MultiVectorEmbeddings.open(folder) for folder in (tmp_path / "embeddings", embeddings))
    assert (found.vectors == expected.vectors).all() and found.fingerprint == expected.fingerprint
    call("index", tmp_path / "embeddings", tmp_path / "index")
    for verb in (("search", tmp_path / "index", "capital", "--model"), ("eval",), ("info",)):
        tail = [collection] if verb == ("eval",) else []
        ours, theirs = (json.loads(call(*verb, model, *tail, "--json").stdout) for model in (checkpoint, official))
        assert ours == theirs or verb == ("info",)
    texts = tmp_path / "texts.txt"
    texts.write_text("rain in the hills\nthe cat sat\n")
    call("train-language", official, "eu_ES", texts, tmp_path / "eu", "--steps", 1)
    assert AutoModel.from_pretrained(tmp_path / "eu").config.languages[-1] == "eu_ES"
    assert "official checkpoint must be converted first" in refused("quantize", official, tmp_path / "quantized")


@pytest.mark.slow
@pytest.mark.parametrize(("language", "code"), [("fr-CA", "fr_XX"), (None, "en_XX")])
def test_an_onnx_graph_reads_one_language(checkpoint, model, tmp_path, language, code):
    import onnxruntime

    options = ("--language", language) if language else ()
    shown = call("export", checkpoint, tmp_path / "onnx", "--to", "onnx", *options).stdout
    assert f"the graph reads {code}, of 4 language(s)" in shown
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert (config["languages"], config["default_language"]) == ([code], code)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    processor = AutoProcessor.from_pretrained(tmp_path / "onnx", max_document_length=128)  # as many as there are
    for texts in (["a"], list(DOCUMENTS.values()), ["the sea " * 200, "la Loire"]):
        inputs = processor.process_documents(texts)
        found = session.run(["embeddings"], {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()})[
            0
        ]
        with torch.no_grad():
            expected = model(**inputs, lang_ids=model.language_ids(code, texts)).embeddings
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=0)
    assert inputs["input_ids"].shape[1] == 128


def test_the_language_of_an_export(checkpoint, splade_checkpoint, embeddings, tmp_path):
    def line(source, to, language):
        return refused("export", source, tmp_path / "out", "--to", to, "--language", language)

    assert "no adapter for the language 'de'; expected one of en_XX" in line(checkpoint, "onnx", "de")
    assert "reads all languages alike, leave it out" in line(splade_checkpoint, "onnx", "fr")
    assert "--language is of --to onnx" in line(embeddings, "qdrant", "fr")
    assert not (tmp_path / "out").exists()


def test_a_bare_language_model_is_refused(tmp_path, collection):
    small = dict(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    XmodForMaskedLM(XmodConfig(**small)).save_pretrained(tmp_path / "xmod")
    line = refused("encode", tmp_path / "xmod", collection, tmp_path / "embeddings")
    assert "has model_type 'xmod'; expected one of colbert_xm, " in line
    assert "Other layouts are read by `rarezoo convert" in line


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_index_and_search(checkpoint, collection, embeddings, model, tmp_path, precision):
    index = tmp_path / "index"
    call("index", embeddings, index, "--precision", precision)
    search = ("search", index, "capital", "--model", checkpoint, "--language", "fr")
    shown = json.loads(call(*search, "--corpus", collection, "--json").stdout)
    scores = model.score(
        model.encode_queries("capital", language="fr"), model.encode_documents(list(DOCUMENTS.values()), language="fr")
    )[0]
    expected = dict(zip(DOCUMENTS, scores.tolist()))
    assert [answer["id"] for answer in shown["answers"]] == sorted(DOCUMENTS, key=lambda name: -expected[name])
    for answer in shown["answers"]:
        assert answer["score"] == pytest.approx(expected[answer["id"]], abs=1e-4 if precision == "float32" else 0.2)
        assert answer["text"] == DOCUMENTS[answer["id"]]
    text = call(*search, "--top-k", 1).stdout
    assert text.splitlines()[0].split()[2] == shown["answers"][0]["id"]


def test_add_delete_compact(checkpoint, collection, embeddings, tmp_path):
    index, more = tmp_path / "index", tmp_path / "more.jsonl"
    more.write_text(json.dumps({"_id": "rain", "text": "rain"}) + "\n")
    call("index", embeddings, index)
    call("encode", checkpoint, more, tmp_path / "more", "--language", "fr")
    answer = json.loads(call("index", "add", index, tmp_path / "more", "--json").stdout)
    assert answer["documents"] == 5 and answer["vectors"] == MultiVectorIndex.open(index).num_vectors
    call("index", "delete", index, "paris", "blank")
    call("index", "compact", index)
    assert [name in MultiVectorIndex.open(index) for name in ("paris", "rain", "moon")] == [False, True, True]


def test_eval_and_queries_of_a_file(checkpoint, collection, embeddings, model, tmp_path):
    arguments = ("eval", checkpoint, collection, "--output", tmp_path / "out", "--language", "en", "--json")
    answer = json.loads(call(*arguments).stdout)
    queries = model.encode_queries(list(QUERIES.values()))
    scores = model.score(queries, model.encode_documents(list(DOCUMENTS.values())))
    names = list(DOCUMENTS)
    ranks = [int((row > row[names.index(answer)]).sum()) for row, answer in zip(scores, ("paris", "moon"))]
    assert answer["metrics"]["RR@10"] == pytest.approx(sum(1 / (1 + rank) for rank in ranks) / 2, abs=1e-4)
    assert json.loads(call(*arguments).stdout) == answer, "from what the folder holds"
    index, run = tmp_path / "out" / "index", tmp_path / "run.trec"
    (tmp_path / "queries.tsv").write_text("".join(f"{name}\t{text}\n" for name, text in QUERIES.items()))
    call("search", index, "--queries", tmp_path / "queries.tsv", "--run", run, "--model", checkpoint)
    assert len(run.read_text().splitlines()) == 8


def test_saved_results_say_their_conditions(checkpoint, collection, tmp_path):
    """Precision, language and dtype tell the results of one collection apart, in the checkpoint and on its card."""
    saved = shutil.copytree(checkpoint, tmp_path / "saved")
    command = ("eval", saved, collection, "--save", "--metrics", "nDCG@10")
    for options in ((), ("--precision", "2-bit"), ("--language", "fr"), ("--dtype", "bfloat16"), ("--language", "en")):
        call(*command, *options)
    entries = json.loads((saved / "evaluation.json").read_text())
    conditions = [tuple(entry.get(name) for name in ("language", "precision", "dtype")) for entry in entries]
    assert conditions == [
        ("en_XX", "2-bit", None), ("fr_XX", None, None), ("en_XX", None, "bfloat16"), ("en_XX", None, None),
    ]  # fmt: skip
    card = build_card(saved)
    for words in ("en_XX, 2-bit index", "fr_XX", "en_XX, bfloat16 model", "en_XX"):
        assert f"\n| small ({words}) | test | nDCG@10 |" in str(card)
    results = {result.dataset_config: result for result in ModelCard(str(card)).data.eval_results}
    assert len(results) == 4
    compressed = results["en_XX, 2-bit index"]
    assert (compressed.dataset_name, compressed.dataset_type) == ("small (en_XX, 2-bit index)", "small")
    assert compressed.metric_value == entries[0]["metrics"]["nDCG@10"]


def test_precision_is_checked_before_anything_is_encoded(
    checkpoint, splade_checkpoint, collection, embeddings, tmp_path, monkeypatch
):
    call("eval", checkpoint, collection, "--output", tmp_path / "out")
    monkeypatch.setattr("rarezoo.cli.checkpoints.load_retriever", None)
    wrong = ("--precision", "3-bit")
    assert "precision must be one of" in refused("eval", checkpoint, collection, *wrong)
    assert "precision must be one of" in refused("index", embeddings, tmp_path / "x", *wrong, "--metadata", "nowhere")
    assert "sparse vectors is exact" in refused("eval", splade_checkpoint, collection, "--precision", "2-bit")
    known = ("--output", tmp_path / "out", "--precision", "2-bit")
    assert "an index of another precision" in refused("eval", checkpoint, collection, *known)


def test_mistakes(checkpoint, splade_checkpoint, collection, embeddings, tmp_path):
    index = tmp_path / "index"
    call("index", embeddings, index)
    sparse = tmp_path / "sparse index"
    call("encode", splade_checkpoint, collection, tmp_path / "sparse")
    call("index", tmp_path / "sparse", sparse)
    for arguments, message in (
        (("encode", checkpoint, collection, tmp_path / "x", "--language", "de"), "expected one of en_XX, fr_XX"),
        (("encode", checkpoint, collection, tmp_path / "x", "--top-k", 3), "are not sparse, leave it out"),
        (("encode", splade_checkpoint, collection, tmp_path / "x", "--language", "de"), "reads all languages alike"),
        (("index", embeddings, tmp_path / "x", "--precision", "3-bit"), "precision must be one of"),
        (("search", index, "capital", "--model", splade_checkpoint), "--model gives sparse vectors"),
        (("search", index, "capital", "--model", splade_checkpoint, "--language", "de"), "reads all languages alike"),
        (("search", sparse, "capital", "--model", checkpoint), "holds sparse vectors, --model gives several vectors"),
        (("explain", checkpoint, "capital"), "have no terms"),
        (("search", index, "capital", "--model", checkpoint, "--terms", 3), "which have no terms; leave it out"),
        (("export", embeddings, tmp_path / "x", "--to", "qdrant"), "several vectors per text"),
        (
            ("export", checkpoint, tmp_path / "x", "--to", "inference-free", "--corpus", collection),
            "inference-free takes a sparse model",
        ),
    ):  # fmt: skip
        assert message in refused(*arguments), arguments
    assert not (tmp_path / "x").exists()


def test_nothing_found_has_no_terms_to_do_with_it(checkpoint, embeddings, tmp_path):
    index = tmp_path / "index"
    call("index", embeddings, index)
    search = ("search", index, "capital", "--model", checkpoint)
    shown = call(*search, "--where", "topic=seas").stdout
    assert shown == "nothing found: no document has the metadata of --where\n"
    call("index", "delete", index, *DOCUMENTS)
    assert call(*search).stdout == "nothing found: the index holds no documents\n"


def test_what_a_conversion_left_out_is_counted(colbert_fixtures, tmp_path):
    arguments = (colbert_fixtures / "checkpoint", tmp_path / "small", "--option", 'languages=["ja", "fr"]')
    lines = call("convert", "colbert-xm", *arguments).stdout.splitlines()
    left_out = [line for line in lines if "left out" in line]
    assert left_out == [
        "  left out 16 tensors or files, such as roberta.encoder.layer.0.output.adapter_modules.en_XX.dense1.bias: a "
        "language that is not kept"
    ]


def test_languages_are_detected(checkpoint, collection, model, tmp_path):
    pytest.importorskip("py3langid")
    call("encode", checkpoint, collection, tmp_path / "embeddings", "--language", "detect")
    opened = MultiVectorEmbeddings.open(tmp_path / "embeddings")
    expected = model.encode_documents(list(DOCUMENTS.values()), language=["en", "fr", "en", "en"])
    torch.testing.assert_close(torch.from_numpy(opened.vectors.copy()), torch.cat(expected), atol=1e-6, rtol=0)
    assert "language: 'LanguageDetector' there, 'fr_XX' now" in refused(
        "encode", checkpoint, collection, tmp_path / "embeddings", "--language", "fr"
    )
    call("eval", checkpoint, collection, "--language", "detect")


# --- a further language -----------------------------------------------------------------------------------------------

SENTENCES = ["the moon pulls the sea", "the cat sat on the mat", "the sea rises and the cat sat"] * 6
QUICK = ("--steps", 12, "--batch-size", 6, "--learning-rate", "1e-2")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "eu.txt"
    path.write_text("\n\n".join(SENTENCES) + "\n")
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("init_from", ["fr-CA", None])
def test_train_a_language(checkpoint, sentences, tmp_path, dtype, init_from):
    """The file holds the other weights bit for bit, and an adapter that is not the one it began with."""
    source = tmp_path / "source"
    opened = AutoModel.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    opened.save_pretrained(source)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(source)
    options = ("--init-from", init_from) if init_from else ()
    shown = call("train-language", source, "eu_ES", sentences, tmp_path / "out", *QUICK, *options)
    assert shown.stdout.startswith(f"{tmp_path / 'out'}: eu_ES added, 12 steps on 18 texts, loss ")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    new = {name for name in after if ".eu_ES." in name}
    assert set(after) - new == set(before) and len(new) == 2 * 4
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in before)
    for name in new:
        assert after[name].dtype == getattr(torch, dtype)
        assert not torch.equal(after[name], before[name.replace("eu_ES", "fr_XX")]), name
    added, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()) and added.config.languages == [*opened.config.languages, "eu_ES"]
    texts = list(DOCUMENTS.values())
    for code in opened.config.languages:
        pairs = zip(added.encode_documents(texts, language=code), opened.encode_documents(texts, language=code))
        assert all(torch.equal(found, expected) for found, expected in pairs), code
    assert added.encode_queries("eguzkia", language="eu")[0].isfinite().all()


@pytest.mark.parametrize("precision", ["float32", "2-bit"])
def test_search_where(checkpoint, embeddings, precision, tmp_path):
    """The metadata of a corpus' rows go into the index and filter what is searched."""
    metadata = {"paris": {"lang": "en"}, "loire": {"lang": "fr"}, "moon": {"lang": "en", "year": 2020}}
    rows = [{"_id": name, "text": text, "metadata": metadata.get(name)} for name, text in DOCUMENTS.items()]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows)
    call("index", embeddings, tmp_path / "index", "--precision", precision, "--metadata", corpus)
    arguments = ("search", tmp_path / "index", "how do tides work", "--model", checkpoint, "--language", "fr", "--json")
    for options, expected in (([], {"paris", "loire", "moon", "blank"}), (["--where", "lang=en"], {"paris", "moon"})):
        answers = json.loads(call(*arguments, *options).stdout)["answers"]
        assert {answer["id"]: answer.get("metadata") for answer in answers} == {
            name: metadata.get(name) for name in expected
        }


def test_the_same_seed_gives_the_same_language(checkpoint, sentences, tmp_path):
    """Of JSON lines, with the head of a language model, and answered as JSON."""
    lines = write_jsonl(tmp_path / "eu.jsonl", [{"text": text, "id": number} for number, text in enumerate(SENTENCES)])
    config = AutoModel.from_pretrained(checkpoint).config
    fields = {name: getattr(config, name) for name in XmodConfig.__annotations__ if hasattr(config, name)}
    XmodForMaskedLM(XmodConfig(**fields)).save_pretrained(tmp_path / "base")
    arguments = (*QUICK, "--language-model", tmp_path / "base", "--json", "--seed", 3)
    answers = [
        json.loads(call("train-language", checkpoint, "eu_ES", file, tmp_path / name, *arguments).stdout)
        for name, file in (("first", lines), ("second", sentences))
    ]
    assert answers[0].pop("folder") == str(tmp_path / "first") and answers[1].pop("folder")
    assert answers[0] == answers[1]
    assert (answers[0]["language"], answers[0]["texts"], answers[0]["steps"]) == ("eu_ES", 18, 12)
    assert answers[0]["last_loss"] < answers[0]["first_loss"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_mistakes_in_training_a_language(checkpoint, splade_checkpoint, sentences, tmp_path):
    """One line, and no trace of the output."""

    def line(model=checkpoint, code="eu_ES", texts=sentences, output=None, options=()):
        return refused("train-language", model, code, texts, output or tmp_path / "out", *options)

    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "table.tsv").write_text("1\ta\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert "must have the form xx_YY, such as 'eu_ES'" in line(code="train")
    assert "there is an adapter for 'fr_XX' already" in line(code="fr_XX")
    assert "no adapter for the language 'de'; expected one of en_XX" in line(options=["--init-from", "de"])
    assert "no file of texts at" in line(texts=tmp_path / "none.txt")
    assert "holds no texts" in line(texts=tmp_path / "empty.txt")
    assert "cannot read texts from" in line(texts=tmp_path / "table.tsv")
    assert "broken.jsonl, line 2: expected a string in the field 'text'" in line(texts=tmp_path / "broken.jsonl")
    assert "cannot be read as text in UTF-8" in line(texts=tmp_path / "latin.txt")
    assert "already exists and is not an empty folder" in line(output=tmp_path / "full")
    assert "has no language adapters" in line(model=splade_checkpoint)
    assert "no folder nowhere" in line(model="nowhere")
    assert "no folder nowhere" in line(options=["--language-model", "nowhere"])
    quantized = quantize(checkpoint, tmp_path / "small", scheme="nf4", fidelity=False)
    assert quantized and "add the language to the full checkpoint" in line(model=tmp_path / "small")
    found = call("train-language", checkpoint, "eu_ES", sentences, tmp_path / "out", *QUICK[:-1], "1e30", code=2)
    assert "the loss became nan at step" in found.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
