"""ColBERT-XM compiled, in bfloat16 and with quantized layers: vectors stay float32 of length 1, the head is spared."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BitsAndBytesConfig

from rarezoo import ColBERTXMConfig, ColBERTXMForRetrieval, ColBERTXMProcessor

QUANTIZED = {
    "int8": dict(load_in_8bit=True),
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
}


@pytest.fixture(scope="module")
def folder(colbert_fixtures):
    return colbert_fixtures / "checkpoint"


@pytest.fixture(scope="module")
def processor(folder):
    return ColBERTXMProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def given(colbert_fixtures):
    return json.loads((colbert_fixtures / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def expected(colbert_fixtures):
    return load_file(colbert_fixtures / "expected.safetensors")


@pytest.fixture(scope="module")
def texts(given):
    """(queries, documents) of all languages."""
    data = given["data"].values()
    return [query for part in data for query in part["queries"]], [text for part in data for text in part["documents"]]


def length_errors(vectors) -> float:
    return max(float((rows.double().norm(dim=1) - 1).abs().max()) for rows in vectors)


@torch.no_grad()
def test_compiled(folder, processor, given, expected):
    """Several languages, one, and the default, one after the other: the reference's vectors."""
    model = ColBERTXMForRetrieval.from_pretrained(folder).eval()
    compiled = torch.compile(model, backend="aot_eager")
    mixed = given["mixed"]
    cases = [(processor.process_documents(mixed["documents"]), mixed["langs"], "mixed.D")]
    for name in ("ja", "en"):
        queries = processor.process_queries(given["data"][name]["queries"])
        cases.append((queries, None if name == "en" else name, f"{name}.Q"))
    try:
        for inputs, languages, wanted in cases:
            chosen = {} if languages is None else {"lang_ids": model.language_ids(languages, inputs["input_ids"])}
            found = compiled(**inputs, **chosen).embeddings
            torch.testing.assert_close(found, expected[wanted], atol=1e-5, rtol=0, msg=wanted)
    finally:
        torch.compiler.reset()


def test_bfloat16_weights(folder, processor, given, expected):
    model = ColBERTXMForRetrieval.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert model.linear.weight.dtype == torch.bfloat16
    for name, data in given["data"].items():
        documents = model.encode_documents(data["documents"], processor, language=name)
        queries = model.encode_queries(data["queries"], processor, language=name)
        assert {vectors.dtype for vectors in documents + queries} == {torch.float32}
        assert length_errors(documents + queries) < 1e-6  # vectors divided in bfloat16 miss by up to 4e-3
        scores = model.score(queries, documents)
        assert scores.dtype == torch.float32
        exact = np.array([[float((d.double() @ q.double().T).amax(0).sum()) for d in documents] for q in queries])
        np.testing.assert_allclose(scores.numpy(), exact, atol=1e-5)  # sums in bfloat16 miss by up to 0.06
        cosines = (torch.cat(documents) * expected[f"{name}.doc_flat"]).sum(1)
        assert cosines.min() > 0.999


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A random checkpoint of widths that 4-bit layers take."""
    torch.manual_seed(0)
    config = ColBERTXMConfig(
        vocab_size=165, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=130, languages=["en_XX", "fr_XX"], dim=32, initializer_range=0.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("wide") / "model"
    ColBERTXMForRetrieval(config).save_pretrained(path)
    return path


def rank_correlation(first, second) -> float:
    """Spearman's, mean over the rows; no two scores of a row are equal."""
    ranks = [np.asarray(scores).argsort(axis=1).argsort(axis=1) for scores in (first, second)]
    return float(np.mean([np.corrcoef(*rows)[0, 1] for rows in zip(*ranks)]))


@pytest.mark.filterwarnings("ignore:.*bitsandbytes::", "ignore:.*MatMul8bitLt")
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_quantized_layers_leave_the_head_alone(wide, processor, texts, scheme):
    """Without being told to; documents stand in nearly the order of full precision."""
    pytest.importorskip("bitsandbytes")
    full = AutoModel.from_pretrained(wide)
    options = {"quantization_config": BitsAndBytesConfig(**QUANTIZED[scheme]), "dtype": torch.float32}
    quantized = AutoModel.from_pretrained(wide, device_map={"": "cpu"}, languages=["fr"], **options)
    assert type(quantized.linear) is torch.nn.Linear and torch.equal(quantized.linear.weight, full.linear.weight)
    kept = {name for name, module in quantized.named_modules() if type(module) is torch.nn.Linear}
    assert kept == {"linear"}
    embeddings = quantized.get_input_embeddings().weight
    assert embeddings.dtype == torch.float32 and torch.equal(embeddings, full.get_input_embeddings().weight)
    queries, documents = texts
    scores = []
    for model in (full, quantized):
        sides = (
            model.encode_queries(queries, processor, language="fr"),
            model.encode_documents(documents, processor, language="fr"),
        )
        assert max(map(length_errors, sides)) < 1e-6
        scores.append(model.score(*sides))
    assert 0.001 < (scores[0] - scores[1]).abs().max()
    assert rank_correlation(*scores) > (0.98 if scheme == "int8" else 0.8)


@pytest.mark.filterwarnings("ignore:.*bitsandbytes::", "ignore:.*MatMul8bitLt")
@pytest.mark.parametrize("init_from", [None, "fr"])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_languages_added_to_a_quantized_model(wide, processor, tmp_path, scheme, init_from):
    """Random adapters stay in full precision, and are read so again; copies are as their source."""
    pytest.importorskip("bitsandbytes")
    options = {"quantization_config": BitsAndBytesConfig(**QUANTIZED[scheme]), "dtype": torch.float32}
    quantized = AutoModel.from_pretrained(wide, device_map={"": "cpu"}, **options)
    quantized.add_language("rw_RW", init_from=init_from)
    quantized.add_language("eu_ES", init_from=init_from)
    quantized.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    plain = {name for name, module in reloaded.named_modules() if type(module) is torch.nn.Linear}
    new = {name for name, _ in reloaded.named_modules() if "_RW.dense" in name or "_ES.dense" in name}
    assert len(new) == 8 and plain == {"linear"} | (new if init_from is None else set())
    vectors = {}
    for language in ("fr", "rw", "eu"):
        vectors[language] = reloaded.encode_documents("rain", processor, language=language)[0]
        assert torch.equal(vectors[language], quantized.encode_documents("rain", processor, language=language)[0])
    assert vectors["rw"].equal(vectors["fr"]) == vectors["eu"].equal(vectors["fr"]) == (init_from == "fr")


def test_the_reported_rank_correlation(wide, processor, texts):
    """That of `rarezoo quantize`'s report, for two models that differ much."""
    from rarezoo.quantization.fidelity import compare_multi_vectors

    torch.manual_seed(1)
    models = {name: AutoModel.from_pretrained(wide) for name in ("full_precision", "quantized")}
    with torch.no_grad():
        for parameter in models["quantized"].roberta.encoder.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape))
    _, documents = texts
    encoded = {name: model.encode_documents(documents, processor) for name, model in models.items()}
    found = compare_multi_vectors(models, processor, documents, encoded)["score_rank_correlation"]
    scores = [
        model.score(model.encode_queries(documents[:8], processor), encoded[name]).numpy()
        for name, model in models.items()
    ]
    assert found == pytest.approx(rank_correlation(*scores), abs=1e-6) and 0 < found < 0.99
