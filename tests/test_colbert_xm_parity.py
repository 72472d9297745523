"""ColBERT-XM against colbert-ai's numbers: ids and masks exact, the rest at the fixture's tolerances."""

import json
import shutil
from threading import Thread

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rarezoo import ColBERTXMConfig, ColBERTXMForRetrieval, ColBERTXMProcessor

LANGUAGES = ("en", "fr", "sw", "ja")
TOLERANCE = {"hidden": 2e-5, "embeddings": 1e-5, "scores": 1e-4}


@pytest.fixture(scope="module")
def folder(colbert_fixtures):
    return colbert_fixtures / "checkpoint"


@pytest.fixture(scope="module")
def expected(colbert_fixtures):
    return load_file(colbert_fixtures / "expected.safetensors")


@pytest.fixture(scope="module")
def given(colbert_fixtures):
    return json.loads((colbert_fixtures / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(folder):
    """The official folder, opened without a conversion."""
    return ColBERTXMForRetrieval.from_pretrained(folder).eval()


@pytest.fixture(params=["insert", "replace"])
def processor(request, folder):
    return ColBERTXMProcessor.from_pretrained(folder, marker_mode=request.param)


def close(found, wanted, kind):
    torch.testing.assert_close(found, wanted, atol=TOLERANCE[kind], rtol=0)


def prefix(language, processor):
    return f"{language}." if processor.marker_mode == "insert" else f"{language}.legacy."


def test_official_settings_are_read(folder, given):
    processor = ColBERTXMProcessor.from_pretrained(folder)
    assert (processor.max_query_length, processor.max_document_length, processor.marker_mode) == (16, 40, "insert")
    assert processor.attend_to_mask_tokens and processor.mask_punctuation
    assert processor.skiplist_ids == given["skiplist_ids"]
    assert len(processor.tokenizer) == given["vocab_size"]


def test_a_skip_list_holds_tokens_of_the_vocabulary(folder, given):
    """Another word would be `<unk>`, and with it all unknown words and the markers would go."""
    tokenizer = ColBERTXMProcessor.from_pretrained(folder).tokenizer
    assert ColBERTXMProcessor(tokenizer, skiplist_tokens=["<unk>"]).skiplist_ids == [given["special_ids"]["unk"]]
    with pytest.raises(ValueError, match="must be tokens of the vocabulary; found 'notatoken', for which <unk> would"):
        ColBERTXMProcessor(tokenizer, skiplist_tokens=[".", "notatoken"])
    with pytest.raises(ValueError, match="must be a list of tokens; found 'abc'"):
        ColBERTXMProcessor(tokenizer, skiplist_tokens="abc")


@pytest.mark.parametrize("language", LANGUAGES)
def test_ids_and_masks(language, processor, expected, given):
    group, texts = prefix(language, processor), given["data"][language]
    queries, documents = processor.process_queries(texts["queries"]), processor.process_documents(texts["documents"])
    for inputs, name in ((queries, "query"), (documents, "doc")):
        assert torch.equal(inputs["input_ids"], expected[f"{group}{name}_input_ids"].long())
        assert torch.equal(inputs["attention_mask"], expected[f"{group}{name}_attention_mask"].long())
        assert (inputs["input_ids"][:, 1] == given["special_ids"]["unk"]).all(), "both markers are <unk>"
    assert queries["keep_mask"].all()
    assert torch.equal(documents["keep_mask"], expected[f"{group}D_mask"].long())


@pytest.mark.parametrize("language", LANGUAGES)
@torch.no_grad()
def test_vectors(language, model, processor, expected, given):
    group, texts = prefix(language, processor), given["data"][language]
    for inputs, name in (
        (processor.process_queries(texts["queries"]), "Q"),
        (processor.process_documents(texts["documents"]), "D"),
    ):
        output = model(**inputs, lang_ids=model.language_ids(texts["adapter"], inputs["input_ids"]))
        close(output.embeddings, expected[group + name], "embeddings")
        assert torch.equal(output.mask, inputs["keep_mask"])
        norms, kept = output.embeddings.norm(dim=-1), output.mask.bool()
        assert torch.equal(norms > 0.5, kept) and (norms[kept] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("language", LANGUAGES)
@torch.no_grad()
def test_hidden_states(language, model, folder, expected, given):
    processor = ColBERTXMProcessor.from_pretrained(folder)
    texts = given["data"][language]
    for inputs, name in (
        (processor.process_queries(texts["queries"]), "query"),
        (processor.process_documents(texts["documents"]), "doc"),
    ):
        del inputs["keep_mask"]
        lang_ids = model.language_ids(language, inputs["input_ids"])
        found = model.roberta(**inputs, lang_ids=lang_ids).last_hidden_state
        wanted, attended = expected[f"{language}.{name}_last_hidden_state"], inputs["attention_mask"].bool()
        close(found[attended], wanted[attended], "hidden")


@pytest.mark.parametrize("language", LANGUAGES)
def test_encoding_and_scores(language, model, processor, expected, given):
    group, texts = prefix(language, processor), given["data"][language]
    queries = model.encode_queries(texts["queries"], processor, language=language)
    documents = model.encode_documents(texts["documents"], processor, language=language, batch_size=2)
    close(torch.stack(queries), expected[f"{group}Q"], "embeddings")
    if processor.marker_mode == "insert":
        assert [len(vectors) for vectors in documents] == expected[f"{language}.doc_lengths"].tolist()
        close(torch.cat(documents), expected[f"{language}.doc_flat"], "embeddings")
    close(model.score(queries, documents), expected[f"{group}scores"], "scores")


@torch.no_grad()
def test_queries_that_do_not_attend_to_their_masks(model, folder, expected, given):
    """All 32 vectors count all the same."""
    processor = ColBERTXMProcessor.from_pretrained(folder, attend_to_mask_tokens=False)
    texts = given["data"]["en"]["queries"]
    inputs = processor.process_queries(texts)
    assert torch.equal(inputs["attention_mask"], expected["other_attend.query_attention_mask"].long())
    close(torch.stack(model.encode_queries(texts, processor)), expected["other_attend.Q"], "embeddings")


def test_full_length_query(model, folder, expected, given):
    processor = ColBERTXMProcessor.from_pretrained(folder)
    query = given["full_length"]["query"]
    inputs = processor.process_queries([query], full_length=True)
    assert torch.equal(inputs["input_ids"], expected["full_length.query_input_ids"].long())
    assert torch.equal(inputs["attention_mask"], expected["full_length.query_attention_mask"].long())
    (found,) = model.encode_queries([query], processor, full_length=True)
    close(found, expected["full_length.Q"][0], "embeddings")


@torch.no_grad()
def test_a_batch_of_three_languages(model, folder, expected, given):
    processor = ColBERTXMProcessor.from_pretrained(folder)
    texts, languages = given["mixed"]["documents"], given["mixed"]["langs"]
    inputs = processor.process_documents(texts)
    assert torch.equal(inputs["input_ids"], expected["mixed.input_ids"].long())
    lang_ids = model.language_ids(languages, texts)
    assert torch.equal(lang_ids, expected["mixed.lang_ids"].long())
    close(model(**inputs, lang_ids=lang_ids).embeddings, expected["mixed.D"], "embeddings")
    del inputs["keep_mask"]
    attended = inputs["attention_mask"].bool()
    found = model.roberta(**inputs, lang_ids=lang_ids).last_hidden_state
    close(found[attended], expected["mixed.last_hidden_state"][attended], "hidden")


def test_full_width_digits_survive_saving(folder, tmp_path):
    """transformers 5 rebuilds the tokenizer; XLM-R's NFKC table has to stay."""
    processor = ColBERTXMProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path)
    for opened in (processor, ColBERTXMProcessor.from_pretrained(tmp_path)):
        found = opened.process_documents(["高さは３７７６メートル", "高さは3776メートル"])["input_ids"]
        assert torch.equal(found[0], found[1])


def test_metadata_with_gaps_and_garbage(folder, tmp_path, caplog):
    """Some public files lack fields or hold a dict for a marker: colbert-ai's defaults, and a warning."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copy / "artifact.metadata").read_text())
    content |= {"query_token_id": {"a": 1}, "doc_maxlen": "long"}
    del content["attend_to_mask_tokens"], content["query_maxlen"]
    (copy / "artifact.metadata").write_text(json.dumps(content))
    processor = ColBERTXMProcessor.from_pretrained(copy)
    assert (processor.query_marker, processor.max_document_length) == ("[unused0]", 220)
    assert (processor.attend_to_mask_tokens, processor.max_query_length) == (False, 32)
    (copy / "artifact.metadata").unlink()
    assert ColBERTXMProcessor.from_pretrained(copy).max_query_length == 32
    (copy / "artifact.metadata").write_text("{")
    with pytest.raises(ValueError, match=r"artifact\.metadata is not JSON"):
        ColBERTXMProcessor.from_pretrained(copy)


@pytest.mark.parametrize(
    ("name", "value", "setting", "expected"),
    [
        ("query_maxlen", 2, "max_query_length", 32),
        ("query_maxlen", True, "max_query_length", 32),
        ("doc_maxlen", 3.5, "max_document_length", 220),
        ("query_token_id", "", "query_marker", "[unused0]"),
        ("query_token_id", None, "query_marker", "[unused0]"),
        ("doc_token_id", {"a": 1}, "document_marker", "[unused1]"),
        ("mask_punctuation", 1, "mask_punctuation", True),
        ("attend_to_mask_tokens", "yes", "attend_to_mask_tokens", False),
        ("marker_mode", "somewhere", "marker_mode", "insert"),
    ],
)
def test_a_setting_that_cannot_be_used(folder, tmp_path, caplog, name, value, setting, expected):
    """The default, with a warning that says which."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    change_metadata(copy, **{name: value})
    assert getattr(ColBERTXMProcessor.from_pretrained(copy), setting) == expected
    assert f"{name} is {value!r}, which cannot be used" in caplog.text


@pytest.mark.parametrize(
    ("stated", "found"), [("L2", "l2"), ("COSINE", "cosine"), ("dot", "cosine"), (None, "cosine"), (["l2"], "cosine")]
)
def test_similarities_of_metadata(folder, tmp_path, stated, found):
    copy = shutil.copytree(folder, tmp_path / "copy")
    change_metadata(copy, similarity=stated)
    assert ColBERTXMConfig.from_pretrained(copy).similarity == found


@pytest.mark.parametrize("form", ["safetensors", "bin", "old bin", "safetensors shards", "bin shards"])
@pytest.mark.parametrize("metadata", ["without dim", "odd dim", None])
def test_dim_of_the_projection(folder, tmp_path, form, metadata):
    """Where the metadata do not say it: colbert-ai's 128 would not fit the weights."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    if metadata is None:
        (copy / "artifact.metadata").unlink()
    else:
        change_metadata(copy, dim=None if metadata == "without dim" else "many")
    store_weights(copy, form)
    model, report = ColBERTXMForRetrieval.from_pretrained(copy, output_loading_info=True)
    assert model.config.dim == 16 and not report["missing_keys"] and not report["mismatched_keys"]
    assert torch.equal(model.linear.weight, load_file(folder / "model.safetensors")["linear.weight"])
    assert ColBERTXMConfig.from_pretrained(copy).dim == 16


def test_dim_of_damaged_or_missing_weights(folder, tmp_path):
    """The configuration opens; loading the weights says what is wrong."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    change_metadata(copy, dim=None)
    (copy / "model.safetensors").write_bytes(b"damaged")
    assert ColBERTXMConfig.from_pretrained(copy).dim == 128
    with pytest.raises(SafetensorError):
        ColBERTXMForRetrieval.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        ColBERTXMForRetrieval.from_pretrained(copy)


def change_metadata(folder, **fields):
    path = folder / "artifact.metadata"
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None or name != "dim"}))


def store_weights(folder, form):
    """The weights of a folder again, in another kind of file."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    kind = "bin" if "bin" in form else "safetensors"
    stem = "pytorch_model" if kind == "bin" else "model"
    parts = {f"{stem}.{kind}": weights}
    if "shards" in form:
        head = {"linear.weight": weights.pop("linear.weight")}
        parts = {f"{stem}-00001-of-00002.{kind}": weights, f"{stem}-00002-of-00002.{kind}": head}
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    for file, part in parts.items():
        if kind == "bin":
            torch.save(part, folder / file, _use_new_zipfile_serialization="old" not in form)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize(("version", "mode"), [("4.38.0", "replace"), ("4.48.3", "insert"), ("5.0.0", "insert")])
def test_marker_mode_by_the_age_of_the_checkpoint(folder, tmp_path, version, mode):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": version}))
    assert ColBERTXMProcessor.from_pretrained(copy).marker_mode == mode


def test_the_tokenizer_is_not_extended(folder):
    processor = ColBERTXMProcessor.from_pretrained(folder)
    assert len(processor.tokenizer) == len(AutoTokenizer.from_pretrained(folder))


def test_threads_share_a_processor(folder):
    """Queries and documents are cut to lengths of their own, whatever other threads do."""
    processor = ColBERTXMProcessor.from_pretrained(folder)
    text = "the cat sat on the mat and looked at the rain " * 30
    wrong = []

    def process(kind, length):
        for _ in range(200):
            if processor(text, kind=kind)["input_ids"].shape[1] != length:
                wrong.append(kind)

    threads = [Thread(target=process, args=case) for case in (("query", 16), ("document", 40)) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_contexts_of_several_lengths(model, folder):
    """Their padding counts neither in attention nor in the score."""
    processor = ColBERTXMProcessor.from_pretrained(folder)
    contexts = ["a cat", "the cat sat on the mat and looked at the rain"]
    both = processor.process_queries(["cat", "rain"], context=contexts)
    alone = processor.process_queries(["cat"], context=contexts[:1])
    kept = both["keep_mask"][0].bool()
    assert torch.equal(both["input_ids"][0][kept], alone["input_ids"][0]) and alone["keep_mask"].all()
    assert torch.equal(both["keep_mask"], both["attention_mask"])
    found, expected = model(**both).embeddings[0][kept], model(**alone).embeddings[0]
    close(found, expected, "embeddings")


def test_full_length_counts_the_placeholder(folder):
    """The old form counts ". " before it decides on the length, as its code did."""
    text = "the cat sat on the mat and looked at the rain"
    processors = [ColBERTXMProcessor.from_pretrained(folder, marker_mode=mode) for mode in ("insert", "replace")]
    lengths = [processor.process_queries([text], full_length=True)["input_ids"] for processor in processors]
    assert lengths[1].shape[1] == lengths[0].shape[1] + 2


def test_inputs_beyond_the_positions(model):
    with pytest.raises(ValueError, match="the input has 129 tokens, but the model takes 128"):
        model(input_ids=torch.full((1, 129), 5))
