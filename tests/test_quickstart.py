"""The tours: their data, and all their stations, small and (slow) as a newcomer sees them."""

import itertools
import json
import math
import struct
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from transformers.utils import logging

from rarezoo.cli import (
    quickstart_colbert_xm,
    quickstart_lexinvariant,
    quickstart_mistral_splade,
    quickstart_tokenizer_transplant,
)
from rarezoo.cli.docstring_corpus import _split, read_docstring_pairs, read_docstrings
from rarezoo.cli.message_catalogues import Message, read_messages, standard_folders
from rarezoo.cli.multilingual_collection import collect_documentation, collect_messages
from rarezoo.retrieval import MultiVectorIndex, SparseIndex
from rarezoo.training import (
    LanguageModelRecipe,
    LateInteractionRecipe,
    SparseTrainingRecipe,
    TransplantTrainingRecipe,
)


@pytest.fixture(autouse=True)
def verbosity():
    """The tour is quiet about loading and saving; other tests read those messages."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.mark.parametrize(
    ("text", "query", "document"),
    [
        (
            "Return the absolute path of a file.\n\nSymbolic links, e.g. shortcuts, are followed to the file that they"
            "\nname, as often as it takes to find one that is no link.",
            "Return the absolute path of a file.",
            "Symbolic links, e.g. shortcuts, are followed to the file that they name, as often as it takes to find one "
            "that is no link.",
        ),
        ("Read rows, e.g. from a file. " + "A row is a list of texts. " * 4, "Read rows, e.g. from a file.", None),
        ("Only one sentence, however long it may be, answers no question at all", None, None),
        ("Too short.\n\n" + "A long rest that would do well as a document. " * 4, None, None),
    ],
)
def test_first_sentence_and_rest(text, query, document):
    pair = _split("module.name", text)
    assert (pair and pair.query) == query
    if document:
        assert pair.document == document


def test_pairs_have_one_answer_each():
    pairs = read_docstring_pairs(500)
    assert len(pairs) == 500
    for values in ([pair.name for pair in pairs], [pair.query.lower() for pair in pairs]):
        assert len(set(values)) == 500
    assert read_docstring_pairs(500) == pairs
    assert {pair.name for pair in read_docstring_pairs(500, seed=1)} != {pair.name for pair in pairs}
    parts = [pair.name.split(".")[0] for pair in pairs]
    assert {"test", "idlelib"}.isdisjoint(parts) and len(set(parts)) > 20
    assert set(parts[:300]) <= sys.stdlib_module_names, "the standard library comes first"
    assert "torch" in {pair.name.split(".")[0] for pair in read_docstring_pairs(8000)}


def write_catalogue(folder, language, domain, messages):
    """A .mo file, as gettext's manual describes it ("The Format of GNU MO Files")."""
    entries = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **messages}.items())
    header, blocks = 28, [[text.encode() for text in column] for column in zip(*entries)]
    place, tables, strings = header + 16 * len(entries), b"", b""
    for text in itertools.chain(*blocks):
        tables += struct.pack("<2I", len(text), place + len(strings))
        strings += text + b"\0"
    path = folder / language / "LC_MESSAGES" / f"{domain}.mo"
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = 0x950412DE, 0, len(entries), header, header + 8 * len(entries), 0, place
    path.write_bytes(struct.pack("<7I", *numbers) + tables + strings)


# In every language a verb, a noun and a place, word by word.
PARTS = {
    "": (
        "open close read write delete copy move rename".split(),
        "picture letter table window garden bottle".split(),
        "city forest kitchen".split(),
        "please {} the old {} which the user has left in the {}",
    ),
    "fr": (
        "ouvrir fermer lire écrire supprimer copier déplacer renommer".split(),
        "image lettre tableau fenêtre jardin bouteille".split(),
        "ville forêt cuisine".split(),
        "veuillez {} ancien objet {} que utilisateur avait laissé dans la {}",
    ),
    "de": (
        "öffnen schließen lesen schreiben löschen kopieren verschieben umbenennen".split(),
        "Bild Brief Tabelle Fenster Garten Flasche".split(),
        "Stadt Wald Küche".split(),
        "bitte das {} und zwar alte Objekt {} vom Benutzer in der {} gelassen",
    ),
    "es": (
        "abrir cerrar leer escribir borrar copiar mover renombrar".split(),
        "imagen carta tabla ventana jardín botella".split(),
        "ciudad bosque cocina".split(),
        "por favor {} el viejo objeto {} que el usuario dejó en la {}",
    ),
}


def sentences(language):
    *words, pattern = PARTS[language]
    return [pattern.format(*choice) for choice in itertools.product(*words)]


@pytest.fixture(scope="module")
def locales(tmp_path_factory):
    """144 messages in three languages and English."""
    folder = tmp_path_factory.mktemp("locale")
    for language in ("fr", "de", "es"):
        write_catalogue(folder, language, "butler", dict(zip(sentences(""), sentences(language))))
    return folder


LONG = "the file that you have named cannot be read"
LANG = "die Datei die Sie genannt haben ist nicht lesbar"


@pytest.mark.parametrize(
    ("message", "translation", "read"),
    [
        (LONG, LANG, (LONG, LANG)),
        (f"menu\x04{LONG}", LANG, (LONG, LANG)),
        (f"{LONG}: %s\n", f"{LANG}: %s\n", (f"{LONG}:", f"{LANG}:")),
        (f"<b>{LONG}</b> %(name)-8s {{0}}", f"<b>{LANG}</b> {{0}}", (LONG, LANG)),
        (f"100% of it: {LONG}", f"alles: {LANG}", (f"100% of it: {LONG}", f"alles: {LANG}")),
        ("too short to be used", "zu kurz um von Nutzen zu sein oder etwa nicht", None),
        (LONG, "zu kurz", None),
        (LONG, LONG, None),
        (f"{LONG} \x1b[0m", LANG, None),
        (f"{LONG} " * 9, LANG, None),
        (f"{LONG}\0{LONG}s", f"{LANG}\0{LANG}en", None),
    ],
)
def test_long_messages_without_noise(tmp_path, message, translation, read):
    write_catalogue(tmp_path, "de", "program", {message: translation})
    found = read_messages([tmp_path])["de"]
    assert found == ({} if read is None else {Message("program", read[0]): read[1]})


def test_catalogues_that_cannot_be_read_are_passed_over(tmp_path):
    write_catalogue(tmp_path, "de", "whole", {LONG: LANG})
    whole = (tmp_path / "de" / "LC_MESSAGES" / "whole.mo").read_bytes()
    damaged = {
        "cut": whole[:60],
        "empty": b"",
        "other": b"not a catalogue",
        "charset": whole.replace(b"charset=UTF-8", b"charset=nothn"),
        "bytes": whole.replace(b"die Datei die", b"die \xe4atei die"),
    }
    for name, content in damaged.items():
        (tmp_path / "de" / "LC_MESSAGES" / f"{name}.mo").write_bytes(content)
    assert read_messages([tmp_path, tmp_path / "missing"]) == {"de": {Message("whole", LONG): LANG}}


def test_one_message_for_a_text(tmp_path):
    first, second = "un deux trois quatre cinq six sept huit neuf", "une deux trois quatre cinq six sept huit neuf"
    write_catalogue(tmp_path, "de", "second", {LONG: LANG})
    write_catalogue(tmp_path, "fr", "first", {LONG.upper(): first})
    write_catalogue(tmp_path, "fr", "second", {LONG: second})
    assert read_messages([tmp_path]) == {"de": {Message("second", LONG): LANG}, "fr": {Message("second", LONG): first}}


def test_the_standard_folders_are_there_once():
    folders = standard_folders()
    assert all(folder.is_dir() for folder in folders) and len(set(folders)) == len(folders)
    packages = Path(sysconfig.get_path("purelib"))
    assert {path.parents[2].resolve() for path in packages.rglob("LC_MESSAGES/*.mo")} <= set(folders)


def test_translations_ask_for_the_english_message(locales):
    collection = collect_messages(100, 20, folders=[locales])
    assert len(collection.documents) == 100
    assert collection.languages == ["en_XX", "de_DE", "es_XX"]
    english = sentences("")
    for code, language in (("de_DE", "de"), ("es_XX", "es")):
        translation = dict(zip(english, sentences(language)))
        questions = collection.questions[code]
        assert len(questions) == 20 and questions.keys() == collection.questions["de_DE"].keys()
        for name, question in questions.items():
            assert translation[collection.documents[name]] == question
        rows = [row for row in collection.training_rows if row["language"] == code]
        assert len(rows) == 144 - 20 and {row["document_language"] for row in rows} == {"en_XX"}
        assert all(translation[row["positive"]] == row["query"] for row in rows)
        assert not {row["query"] for row in rows} & set(questions.values())
    further = collection.further
    assert (further.code, further.relative) == ("fr_XX", "es_XX")
    assert further.questions.keys() == collection.questions["de_DE"].keys()
    assert len(further.texts) == 144 - 20 and not set(further.texts) & set(further.questions.values())
    assert collect_messages(100, 20, folders=[locales]) == collection
    assert collect_messages(100, 20, seed=1, folders=[locales]) != collection


def test_languages_that_do_not_count(locales, tmp_path):
    """English, those without an adapter, variants with fewer messages, and those that share too few messages."""
    english = sentences("")
    for language in ("fr", "de", "es"):
        write_catalogue(tmp_path, language, "butler", dict(zip(english, sentences(language))))
    for language in ("en_GB", "tlh", "fr_CA", "de@latin"):
        write_catalogue(tmp_path, language, "butler", dict(zip(english[:90], sentences("fr"))))
    write_catalogue(tmp_path, "it", "other", {f"{text} again": f"{text} ancora" for text in english})
    assert collect_messages(100, 20, folders=[tmp_path]) == collect_messages(100, 20, folders=[locales])
    (tmp_path / "es" / "LC_MESSAGES" / "butler.mo").unlink()
    two = collect_messages(100, 20, folders=[tmp_path])
    assert two.languages == ["en_XX", "de_DE", "fr_XX"] and two.further is None
    assert collect_messages(100, 100, folders=[tmp_path]) is None
    assert collect_messages(100, 20, folders=[]) is None


def test_documentation_asks_in_english_alone():
    collection = collect_documentation(100, 30)
    assert collection.languages == ["en_XX"] and collection.further is None
    assert len(collection.documents) == 100 and len(collection.questions["en_XX"]) == 30
    assert collection.questions["en_XX"].keys() <= collection.documents.keys()
    learned = {row["query"] for row in collection.training_rows}
    assert len(learned) == 270 and not learned & set(collection.questions["en_XX"].values())


@pytest.mark.parametrize(
    "tour",
    [quickstart_mistral_splade, quickstart_colbert_xm, quickstart_lexinvariant, quickstart_tokenizer_transplant],
)
def test_other_peoples_folders_are_left_alone(tmp_path, tour):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").touch()
    with pytest.raises(FileExistsError, match="holds other files; choose a new folder for the quickstart"):
        tour.run(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "precious"]


def test_a_small_tour_of_mistral_splade(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "left.over").touch()
    (tmp_path / "quickstart.json").touch()  # as an earlier tour leaves it
    figures = quickstart_mistral_splade.run(tmp_path, documents=300, further_pairs=50, steps=3)
    assert json.loads((tmp_path / "quickstart.json").read_text()) == json.loads(json.dumps(figures))
    assert (figures["documents"], figures["held-out queries"], figures["training pairs"]) == (300, 60, 290)
    assert set(figures["nDCG@10"]) == {"before", "after", "BM25"}
    assert all(0.3 < value < 1 for value in figures["nDCG@10"].values()), "all three find documents by their words"
    assert figures["same vector without rarezoo"] is True
    assert set(figures["quantized"]) == {"nf4", "int8"}
    for report in figures["quantized"].values():
        assert all(report["retrieval"]["nDCG@10"][name] > 0.3 for name in ("full_precision", "quantized"))
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")

    assert not (tmp_path / "model" / "left.over").exists()
    model, processor = (auto.from_pretrained(tmp_path / "model") for auto in (AutoModel, AutoProcessor))
    index = SparseIndex.open(tmp_path / "index")
    assert len(index) == 300
    printed = capsys.readouterr().out
    for question in quickstart_mistral_splade.QUESTIONS:
        (best, score), _ = index.search(model.encode_queries([question], processor), top_k=2)[0]
        assert f"{question}?" in printed
        assert f"{score:6.2f}  {best}" in printed
    assert "matched: " in printed and "the same vector, bit for bit" in printed
    assert SparseTrainingRecipe.load(tmp_path / "model").max_steps == 3


def check_multi_vector_tour(folder, figures, languages, printed):
    assert json.loads((folder / "quickstart.json").read_text(encoding="utf-8")) == json.loads(json.dumps(figures))
    assert figures["languages"] == languages
    for values in figures["nDCG@10"].values():
        assert set(values) == {*languages, "mean"} and all(0 <= value <= 1 for value in values.values())
        assert values["mean"] == pytest.approx(sum(values[language] for language in languages) / len(languages))
    assert figures["same vectors without rarezoo"] and figures["same vectors with some languages"]
    assert figures["weights"]["bytes with some languages"] < figures["weights"]["bytes"]
    exact, compressed = figures["index"]["float32"], figures["index"]["2-bit"]
    assert exact["recall@10 of exact search"] == 1 and compressed["recall@10 of exact search"] > 0.3
    assert compressed["bytes per vector"] < exact["bytes per vector"] / 2
    assert set(figures["quantized"]) == {"nf4", "int8"}
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    index = MultiVectorIndex.open(folder / "index")
    assert len(index) == figures["documents"] and index.precision == "float32"
    assert "OTHER VECTORS" not in printed and "words found in the right one: " in printed
    assert f"--language {languages[0]}" in printed


def test_a_small_tour_of_colbert_xm(tmp_path, capsys, locales):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "left.over").touch()
    (tmp_path / "quickstart.json").touch()  # as an earlier tour leaves it
    figures = quickstart_colbert_xm.run(
        tmp_path, documents=120, questions=20, steps=3, language_steps=2, locale_folders=[locales]
    )
    printed = capsys.readouterr().out
    check_multi_vector_tour(tmp_path, figures, ["de_DE", "es_XX"], printed)
    assert not (tmp_path / "model" / "left.over").exists()
    assert (figures["documents"], figures["held-out queries"], figures["training pairs"]) == (120, 40, 2 * 124)
    added = figures["added language"]
    assert (added["language"], added["copied from"]) == ("fr_XX", "es_XX")
    assert added["other languages bit-identical"] is True
    assert 0 <= figures["detected"]["right"] <= 1
    recipe = LateInteractionRecipe.load(tmp_path / "model")
    assert recipe.max_steps == 3
    model, processor = (auto.from_pretrained(tmp_path / "model") for auto in (AutoModel, AutoProcessor))
    assert model.config.languages == ["en_XX", "de_DE", "es_XX"], "the further language is not in the saved model"
    collection = collect_messages(120, 20, folders=[locales])
    question = next(iter(collection.questions["de_DE"].values()))
    query = model.encode_queries([question], processor, language="de")
    (best, score), *_ = MultiVectorIndex.open(tmp_path / "index").search(query, top_k=2)[0]
    assert f"{score:6.2f}  {best}" in printed


def test_without_catalogues_the_tour_is_of_documentation(tmp_path, capsys):
    figures = quickstart_colbert_xm.run(tmp_path, documents=80, questions=16, steps=2, locale_folders=[])
    printed = capsys.readouterr().out
    assert "Too few translated messages are installed here: documentation strings instead, in English alone." in printed
    check_multi_vector_tour(tmp_path, figures, ["en_XX"], printed)
    assert "added language" not in figures and "detected" not in figures


def test_the_library_as_letters():
    training, held_out = quickstart_lexinvariant.read_library_texts(25)
    assert (len(training), len(held_out)) == (23, 2)
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    assert held_out[1] == paths[19].read_text(encoding="utf-8")
    tokenizer = quickstart_lexinvariant.letter_tokenizer()
    ids = tokenizer("Ab-9 z!\n", return_tensors="pt").input_ids
    assert ids.tolist() == [[1, 2, 0, 26, 0]] and len(tokenizer) == 27
    assert tokenizer.decode(ids[0]) == "ab z "


def test_a_small_tour_of_lexinvariant(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "left.over").touch()
    (tmp_path / "quickstart.json").touch()  # as an earlier tour leaves it
    figures = quickstart_lexinvariant.run(tmp_path, steps=3, lookup_steps=2, windows=6, prompts=16, files=20)
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "quickstart.json").read_text()) == json.loads(json.dumps(figures))
    assert figures["windows"] == 6 and figures["training"]["model"]["steps"] == 3
    assert all(10 < value < 40 for values in figures["perplexity"].values() for value in values.values())
    enciphered = figures["enciphered"]
    assert enciphered["largest difference with renamed rows"] < 1e-4
    assert enciphered["canonical table"]["same losses"] is True
    assert enciphered["alpha-covariance"]["canonical table"] == 1.0
    assert enciphered["alpha-covariance"]["standard twin"] < 0.1
    assert figures["largest difference without rarezoo"] < 1e-5
    assert set(figures["quantized"]) == {"nf4", "int8"}
    assert all(10 < report["perplexity"] < 40 for report in figures["quantized"].values())
    assert all(len(text) == 48 for text in figures["written"].values())
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert "MatMul8bitLt" not in printed and "OTHER" not in printed

    assert not (tmp_path / "model" / "left.over").exists()
    model, tokenizer = (auto.from_pretrained(tmp_path / "model") for auto in (AutoModelForCausalLM, AutoTokenizer))
    standard = AutoModelForCausalLM.from_pretrained(tmp_path / "standard")
    assert (model.config.table, standard.config.table) == ("orthonormal", "learned")
    assert len(tokenizer) == model.config.vocab_size == 27
    # What the tour calls the perplexity of the standard twin, by transformers' own loss.
    _, held_out = quickstart_lexinvariant.read_library_texts(20)
    ids = torch.tensor([symbol for text in held_out for symbol in tokenizer(text).input_ids])
    starts = torch.randint(len(ids) - 128, (6, 1), generator=torch.Generator().manual_seed(1))
    windows = ids[starts + torch.arange(129)]
    with torch.no_grad():
        loss = standard(windows, labels=windows).loss
    assert figures["perplexity"]["standard twin"]["all"] == pytest.approx(loss.exp().item(), rel=1e-4)
    # Its last line is a command that trains for longer on the same text.
    assert f"train {tmp_path / 'model'} {tmp_path / 'longer'} --set max_steps=15" in printed
    recipe = LanguageModelRecipe.load(tmp_path / "model")
    assert Path(recipe.training_data).is_file() and Path(recipe.tokenizer).is_dir()


def test_a_small_tour_of_tokenizer_transplant(tmp_path, capsys):
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "left.over").touch()
    (tmp_path / "quickstart.json").touch()  # as an earlier tour leaves it
    figures = quickstart_tokenizer_transplant.run(
        tmp_path, steps=5, donor_steps=3, aftercare_steps=2, held_out=4, files=30
    )
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "quickstart.json").read_text()) == json.loads(json.dumps(figures))
    assert not (tmp_path / "stored" / "left.over").exists()
    assert figures["tokenizers"]["the model's"]["tokens"] < figures["tokenizers"]["supertokens"]["tokens"]
    words, supertokens = figures["bits per byte"].values()
    assert words.keys() - supertokens.keys() == {"omp"} and "mean" in supertokens
    assert all(0 < values["2 steps"] != values["0 steps"] < 8 for values in [*words.values(), *supertokens.values()])
    assert figures["stored"]["same logits"] is True
    assert figures["stored"]["matrix bytes"] < figures["stored"]["table bytes"]
    assert figures["largest difference without rarezoo"] == {"plain": 0, "stored": 0}
    assert "transformers…LlamaForCausalLM" in printed and "…TransplantedForCausalLM" in printed
    assert "OTHER" not in printed and (tmp_path / "bits_per_byte.png").read_bytes().startswith(b"\x89PNG")

    # What the tour calls bits per byte, by transformers' own loss, which is a mean over the tokens but the first.
    folder = tmp_path / "transplanted" / "supertokens" / "mean"
    model, tokenizer = (auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
    _, held_out = read_docstrings(30)
    step = max(len(held_out) // 4, 1)
    nats, size = 0.0, 0
    for text in [text[:300] for text in held_out[::step][:4]]:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
        with torch.no_grad():
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        size += len(text.encode())
    assert supertokens["mean"]["0 steps"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    # Its last line is a command that trains the best one for longer.
    trained = next(
        path.parent for path in tmp_path.glob("trained/*/*/training_recipe.json") if str(path.parent) in printed
    )
    assert f"train {trained} {tmp_path / 'longer'} --set max_steps=20" in printed
    assert TransplantTrainingRecipe.load(trained).max_steps == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_tour_of_mistral_splade_learns(tmp_path):
    figures = quickstart_mistral_splade.run(tmp_path)
    quality = figures["nDCG@10"]
    assert quality["after"] > quality["before"], quality
    assert quality["after"] > quality["BM25"] - 0.01, quality
    assert figures["active dimensions"]["document"] < 100
    for report in figures["quantized"].values():
        assert report["outputs"]["cosine_mean"] > 0.99
        # A quarter of the queries over two fifths of the documents: other figures, but easier rather than harder.
        assert quality["after"] - 0.05 < report["retrieval"]["nDCG@10"]["full_precision"] < quality["after"] + 0.2
        assert report["file_bytes"]["ratio"] < 0.5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_tour_of_colbert_xm_learns(tmp_path):
    if collect_messages(quickstart_colbert_xm.DOCUMENTS, quickstart_colbert_xm.QUESTIONS) is None:
        pytest.skip("this machine has too few translated messages")
    figures = quickstart_colbert_xm.run(tmp_path)
    before, after, bm25 = (figures["nDCG@10"][name]["mean"] for name in ("before", "after", "BM25"))
    assert after > before + 0.1 and after > bm25, figures["nDCG@10"]
    assert figures["index"]["2-bit"]["recall@10 of exact search"] > 0.7
    for report in figures["quantized"].values():
        assert report["outputs"]["cosine_mean"] > 0.99 and abs(report["nDCG@10 change"]) < 0.05


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_tour_of_lexinvariant_learns(tmp_path):
    figures = quickstart_lexinvariant.run(tmp_path)
    one, mean, standard = figures["perplexity"].values()
    assert one["64-128"] < one["32-64"] < one["16-32"] < one["8-16"] < one["0-8"], one
    assert one["64-128"] < 15 and mean["all"] < one["all"], (one, mean)
    assert standard["all"] < 7, standard
    enciphered = figures["enciphered"]
    assert abs(enciphered["lexinvariant"]["loss difference"]) < 4 * enciphered["lexinvariant"]["standard error"]
    assert enciphered["standard twin"]["enciphered"] > 27, "worse than guessing"
    answers = figures["lookup"]["right answers"]
    assert answers["ids of the training"] >= 0.99, answers
    assert answers["ids never seen"] >= answers["ids of the training"] - 0.01, answers
    for report in figures["quantized"].values():
        assert abs(report["perplexity"] / one["all"] - 1) < 0.05


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_tour_of_tokenizer_transplant_learns(tmp_path):
    figures = quickstart_tokenizer_transplant.run(tmp_path)
    assert figures["model"]["bits per byte"] < 2.3
    for name, found in figures["bits per byte"].items():
        before, after = (
            {method: values[moment] for method, values in found.items()} for moment in ("0 steps", "100 steps")
        )
        baseline = min(before["normal"], before["mean"])
        assert before["tokenadapt"] < baseline and before["focus"] < baseline, (name, before)
        assert all(after[method] < before[method] for method in before), (name, found)
        assert max(after[method] for method in after if method not in ("normal", "mean")) < before["normal"], (
            name,
            after,
        )
    assert figures["stored"]["same logits"] and figures["largest difference without rarezoo"] == {
        "plain": 0,
        "stored": 0,
    }
