"""Which adapters a forward pass calls, and on what: those of the languages at hand, each once per layer."""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from rarezoo import ColBERTXMForRetrieval, ColBERTXMProcessor

TEXTS = ["the moon pulls the sea", "rain", "la loire", "maji yake", "the cat sat on the mat"]


@pytest.fixture
def model(colbert_fixtures):
    return ColBERTXMForRetrieval.from_pretrained(colbert_fixtures / "checkpoint").eval()


@pytest.fixture(scope="module")
def processor(colbert_fixtures):
    return ColBERTXMProcessor.from_pretrained(colbert_fixtures / "checkpoint")


@pytest.fixture
def calls(model):
    """(language, number of texts) of every call of an adapter."""
    found = []
    for layer in model.roberta.encoder.layer:
        for code, adapter in layer.output.adapter_modules.items():
            adapter.register_forward_pre_hook(
                lambda module, arguments, code=code: found.append((code, len(arguments[0])))
            )
    return found


@torch.no_grad()
def test_a_batch_of_one_language_calls_one_adapter(model, processor, calls):
    """On the whole batch, with no look at the others: what a loop over 81 languages would cost."""
    inputs = processor.process_documents(TEXTS)
    for language, code in (("ja", "ja_XX"), (None, "en_XX")):
        calls.clear()
        model(**inputs, lang_ids=model.language_ids(language, TEXTS))
        assert calls == [(code, 5)] * 2
    calls.clear()
    model(**inputs)
    assert calls == [("en_XX", 5)] * 2


@torch.no_grad()
def test_a_mixed_batch_calls_the_adapters_that_it_speaks(model, processor, calls):
    inputs = processor.process_documents(TEXTS)
    model(**inputs, lang_ids=model.language_ids(["sw", "en", "fr", "sw", "sw"], TEXTS))
    assert Counter(calls) == {("sw_KE", 3): 2, ("en_XX", 1): 2, ("fr_XX", 1): 2}


def test_encoding_makes_batches_of_one_language(model, processor, calls):
    model.encode_documents(TEXTS, processor, language=["sw", "en", "fr", "sw", "sw"], batch_size=2)
    assert Counter(calls) == {("sw_KE", 2): 2, ("sw_KE", 1): 2, ("en_XX", 1): 2, ("fr_XX", 1): 2}


def test_texts_of_all_languages_in_one_call(model, processor, colbert_fixtures):
    """Shuffled, with names of several kinds: the reference's vectors of every language, in the order of the texts."""
    expected = load_file(colbert_fixtures / "expected.safetensors")
    data = json.loads((colbert_fixtures / "expected.json").read_text(encoding="utf-8"))["data"]
    names = {"en": "en-GB", "fr": "fra", "sw": "SW", "ja": "ja_XX"}
    for kind, encode in (("queries", model.encode_queries), ("documents", model.encode_documents)):
        rows = [(name, row, text) for name in names for row, text in enumerate(data[name][kind])]
        rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        found = encode([text for *_, text in rows], processor, language=[names[name] for name, *_ in rows])
        for (name, row, _), vectors in zip(rows, found, strict=True):
            wanted = expected[f"{name}.{'Q' if kind == 'queries' else 'D'}"][row]
            if kind == "documents":
                wanted = wanted[expected[f"{name}.D_mask"][row].bool()]
            torch.testing.assert_close(vectors, wanted, atol=1e-5, rtol=0)
    assert model.config.default_language == "en_XX"
