"""Which vectors of multi-vector models can be compared: copies that differ in languages, and settings of both sides."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from rarezoo import ColBERTXMForRetrieval, ColBERTXMProcessor
from rarezoo.conversion import convert
from rarezoo.retrieval import Document, MultiVectorEmbeddings, MultiVectorIndex, encode_corpus, model_fingerprint
from rarezoo.retrieval.fingerprint import adapter_fingerprint, difference

from .folders import contents

DOCUMENTS = [
    Document("loire", "la loire est le plus long fleuve"),
    Document("moon", "the moon pulls the sea, and the sea rises"),
    Document("ziwa", "maji yake yanatoka ziwa"),
]
QUERY = "the longest river"


@pytest.fixture(scope="module")
def folder(colbert_fixtures) -> Path:
    return colbert_fixtures / "checkpoint"


@pytest.fixture
def model(folder) -> ColBERTXMForRetrieval:
    return ColBERTXMForRetrieval.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder) -> ColBERTXMProcessor:
    return ColBERTXMProcessor.from_pretrained(folder)


@pytest.fixture
def index(model, processor, tmp_path) -> MultiVectorIndex:
    return MultiVectorIndex.build(encoded(model, processor, tmp_path / "embeddings"), tmp_path / "index")


def encoded(model, processor, folder: Path, language: str = "fr") -> MultiVectorEmbeddings:
    return encode_corpus(model, processor, DOCUMENTS, folder, shard_size=1, language=language)


def query(model, processor, language: str = "fr") -> MultiVectorEmbeddings:
    vectors = model.encode_queries([QUERY], processor, language=language)
    return MultiVectorEmbeddings.from_list(["q"], vectors, model_fingerprint(model, processor))


def test_a_pruned_model_searches_the_index_of_the_full_one(index, model, processor, folder):
    pruned = ColBERTXMForRetrieval.from_pretrained(folder, languages=["fr"]).eval()
    assert pruned.config.languages == ["fr_XX"] != model.config.languages
    assert index.search(query(pruned, processor)) == index.search(query(model, processor)) != [[]]


def test_copies_of_a_model_have_one_fingerprint(model, folder, tmp_path):
    expected = model_fingerprint(model)
    assert re.fullmatch("[0-9a-f]{32}", expected)
    convert("colbert_xm", folder, tmp_path / "converted")
    copies = [
        ColBERTXMForRetrieval.from_pretrained(tmp_path / "converted"),
        ColBERTXMForRetrieval.from_pretrained(folder, dtype=torch.bfloat16),
        ColBERTXMForRetrieval.from_pretrained(folder, languages=["sw", "fr"], default_language="fr"),
        ColBERTXMForRetrieval.from_pretrained(folder, similarity="l2"),
    ]
    model.add_language("eu_ES", init_from="es" if "es_XX" in model.config.languages else "fr")
    model.set_default_language("fr")
    assert {model_fingerprint(copy) for copy in [*copies, model]} == {expected}


def test_other_weights_and_settings_make_another_model(model, folder):
    before = model_fingerprint(model)
    adapters = adapter_fingerprint(model, ["fr_XX"])
    seen = {before}
    for name, parameter in model.named_parameters():
        kept = parameter.data.clone()
        generator = torch.Generator().manual_seed(0)
        parameter.data.add_(1e-2 * torch.randn(parameter.shape, generator=generator))
        if ".adapter_modules." in name:
            assert model_fingerprint(model) == before, name
            assert (adapter_fingerprint(model, ["fr_XX"]) != adapters) == (".fr_XX." in name), name
        else:
            assert model_fingerprint(model) not in seen, name
            seen.add(model_fingerprint(model))
        parameter.data = kept
    assert model_fingerprint(model) == before
    model.config.ln_before_adapter = not model.config.ln_before_adapter
    assert model_fingerprint(model) not in seen


def test_a_quantized_model_is_another(model, folder):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    scheme = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["linear"])
    quantized = ColBERTXMForRetrieval.from_pretrained(folder, quantization_config=scheme)
    pruned = ColBERTXMForRetrieval.from_pretrained(folder, quantization_config=scheme, languages=["fr"])
    assert model_fingerprint(quantized) == model_fingerprint(pruned) != model_fingerprint(model)


def test_other_markers_are_refused_by_name(index, model, processor, folder, tmp_path):
    mode = {"insert": "replace", "replace": "insert"}[processor.marker_mode]
    marker = processor.tokenizer.convert_ids_to_tokens(10)
    changes = [
        ({"marker_mode": mode}, f"marker_mode={mode}", f"marker_mode={processor.marker_mode}"),
        ({"query_marker": marker}, "query_marker_id=10", "query_marker_id="),
        ({"document_marker": marker}, "document_marker_id=10", "document_marker_id="),
    ]
    for number, (change, there, here) in enumerate(changes):
        other = ColBERTXMProcessor.from_pretrained(folder, **change)
        with pytest.raises(ValueError, match=rf"queries were encoded with {there}, the documents in .* with {here}"):
            index.search(query(model, other))
        before = contents(index.folder)
        with pytest.raises(ValueError, match=rf"the new documents were encoded with {there}, .* with {here}"):
            index.add(encoded(model, other, tmp_path / str(number)))
        assert contents(index.folder) == before


def test_the_choices_of_one_side_are_no_obstacle(index, model, processor, folder):
    """Lengths, the skiplist and the attention to `<mask>`; and another name for a marker of the same id."""
    changes = [
        {"max_query_length": 20},
        {"max_document_length": 40},
        {"mask_punctuation": not processor.mask_punctuation},
        {"skiplist_tokens": ["a"]},
        {"attend_to_mask_tokens": not processor.attend_to_mask_tokens},
        {"query_marker": processor.tokenizer.unk_token},
    ]
    assert processor.tokenizer.convert_tokens_to_ids(processor.query_marker) == processor.tokenizer.unk_token_id
    for change in changes:
        assert index.search(query(model, ColBERTXMProcessor.from_pretrained(folder, **change))) != [[]]


def test_vectors_that_do_not_tell_their_settings_are_compared_by_the_model(index, model, processor):
    vectors = model.encode_queries([QUERY], processor, language="fr")
    for fingerprint in (None, model_fingerprint(model)):
        assert index.search(MultiVectorEmbeddings.from_list(["q"], vectors, fingerprint)) != [[]]
    with pytest.raises(ValueError, match=r"encoded by model 0123, the documents in .* by model [0-9a-f]{32}: "):
        index.search(MultiVectorEmbeddings.from_list(["q"], vectors, "0123"))
    with pytest.raises(ValueError, match="new documents were encoded by an unknown model"):
        index.add(MultiVectorEmbeddings.from_list(["new"], vectors))


def test_differences_of_fingerprints():
    assert difference("a;x=1;y=2", "a;x=1;y=2") is None is difference("a;x=1", "a;y=2") is difference(None, None)
    assert difference("a;x=1", "b;x=1") == ("by model a", "by model b")
    assert difference("a;x=1;y=2;z=3", "a;z=4;y=2;x=2") == ("with x=1, z=3", "with x=2, z=4")
    assert difference(None, "a;x=1") == ("by an unknown model", "by model a")


@pytest.mark.parametrize(("retrained", "resumes"), [("fr_XX", False), ("sw_KE", True)])
def test_a_job_goes_on_with_the_adapters_that_it_began_with(model, processor, tmp_path, retrained, resumes):
    """The index would not notice, but one corpus should not be encoded by two adapters of its language."""
    expected = encoded(model, processor, tmp_path / "embeddings").vectors.copy()
    manifest = json.loads((tmp_path / "embeddings" / "embeddings.json").read_text())
    assert manifest["fingerprint"] == model_fingerprint(model, processor)
    (tmp_path / "embeddings" / "shard-00002.safetensors").unlink()
    for name, parameter in model.named_parameters():
        if f".{retrained}." in name:
            parameter.data.mul_(1.5)
    if resumes:
        assert (encoded(model, processor, tmp_path / "embeddings").vectors == expected).all()
    else:
        with pytest.raises(ValueError, match=r"another job \(adapters: '[0-9a-f]{32}' there, '[0-9a-f]{32}' now\)"):
            encoded(model, processor, tmp_path / "embeddings")
