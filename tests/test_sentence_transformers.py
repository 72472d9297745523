"""Checkpoints through sentence-transformers' SparseEncoder: the same vectors, with and without the plugin installed."""

import json

import pytest
import torch

pytest.importorskip("sentence_transformers")

from safetensors.torch import load_file
from sentence_transformers import SparseEncoder

from rarezoo.mistral_splade import MistralSpladeForMaskedLM, MistralSpladeForRetrieval, MistralSpladeProcessor


def save(folder, fixture_folder, tokenizer, inputs, mode, model_class=MistralSpladeForRetrieval):
    model = model_class.from_pretrained(fixture_folder, attention_mode=mode)
    model.save_pretrained(folder)
    processor = MistralSpladeProcessor(
        tokenizer, attention_mode=mode, prompt=inputs["prompt"], max_query_length=300, max_document_length=300
    )
    processor.save_pretrained(folder)
    return model


@pytest.fixture(params=["echo", "plain", "bidirectional", "repeat"])
def mode(request):
    return request.param


def test_same_vectors_as_the_model(tmp_path, fixture_folder, tokenizer, inputs, mode):
    model = save(tmp_path, fixture_folder, tokenizer, inputs, mode)
    encoder = SparseEncoder(str(tmp_path), trust_remote_code=True)
    processor = MistralSpladeProcessor.from_pretrained(tmp_path)
    for encode, verb, texts in (
        (encoder.encode_query, model.encode_queries, inputs["queries"]),
        (encoder.encode_document, model.encode_documents, inputs["documents"]),
    ):
        theirs = encode(texts, batch_size=2).to_dense()
        torch.testing.assert_close(theirs, verb(texts, processor, output="dense"), atol=1e-5, rtol=0)


def test_echo_equals_the_reference(tmp_path, fixture_folder, tokenizer, inputs):
    save(tmp_path, fixture_folder, tokenizer, inputs, "echo")
    expected = load_file(fixture_folder / "echo.safetensors")
    encoder = SparseEncoder(str(tmp_path), trust_remote_code=True)
    queries, documents = encoder.encode_query(inputs["queries"]), encoder.encode_document(inputs["documents"])
    torch.testing.assert_close(queries.to_dense(), expected["query.rep_max"], atol=1e-5, rtol=0)
    torch.testing.assert_close(documents.to_dense(), expected["document.rep_max"], atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.similarity(queries, documents), expected["scores_qd"], atol=1e-4, rtol=0)
    assert encoder.decode(queries[0], top_k=3)[0][0] == model_top_token(expected["query.rep_max"][0], tokenizer)


def model_top_token(row, tokenizer):
    return tokenizer.convert_ids_to_tokens(int(row.argmax()))


def test_prompt_of_the_query_template(tmp_path, fixture_folder, tokenizer, inputs):
    model = save(tmp_path, fixture_folder, tokenizer, inputs, "echo")
    encoder = SparseEncoder(str(tmp_path), trust_remote_code=True)
    theirs = encoder.encode_query(inputs["queries"], prompt="find the cat").to_dense()
    processor = MistralSpladeProcessor.from_pretrained(tmp_path)
    ours = model.encode_queries(inputs["queries"], processor, prompt="find the cat", output="dense")
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_saved_again_and_opened_again(tmp_path, fixture_folder, tokenizer, inputs):
    save(tmp_path / "first", fixture_folder, tokenizer, inputs, "echo")
    first = SparseEncoder(str(tmp_path / "first"), trust_remote_code=True)
    first.save_pretrained(str(tmp_path / "second"))
    second = SparseEncoder(str(tmp_path / "second"), trust_remote_code=True)
    a, b = (encoder.encode_document(inputs["documents"]).to_dense() for encoder in (first, second))
    assert torch.equal(a, b)


def test_without_the_plugin(splade_checkpoint, inputs, run_without_rarezoo, tmp_path, fixture_folder):
    code = f"""
import json, torch
from sentence_transformers import SparseEncoder
encoder = SparseEncoder({str(splade_checkpoint)!r}, trust_remote_code=True)
torch.save(encoder.encode_query({inputs["queries"]!r}).to_dense(), {str(tmp_path / "queries.pt")!r})
"""
    run_without_rarezoo(code)
    expected = load_file(fixture_folder / "echo.safetensors")["query.rep_max"]
    torch.testing.assert_close(torch.load(tmp_path / "queries.pt"), expected, atol=1e-5, rtol=0)


def test_masked_lm_checkpoint_opens_with_no_further_argument(tmp_path, fixture_folder, tokenizer, inputs):
    """`…ForMaskedLM` in `architectures` makes SparseEncoder build its own fill-mask and SPLADE pooling modules."""
    save(tmp_path, fixture_folder, tokenizer, inputs, "plain", MistralSpladeForMaskedLM)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MistralSpladeForMaskedLM"]
    encoder = SparseEncoder(str(tmp_path))
    assert [type(module).__name__ for module in encoder] == ["Transformer", "SpladePooling"]
    expected = load_file(fixture_folder / "plain.safetensors")["rep_max"]
    theirs = encoder.encode(inputs["plain_texts"]).to_dense()
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=0)


def test_masked_lm_checkpoint_that_splade_pooling_cannot_serve(tmp_path, fixture_folder, tokenizer, inputs):
    """Pooling both copies of an echoed text would be wrong without any error: the family's own module takes over."""
    save(tmp_path, fixture_folder, tokenizer, inputs, "echo", MistralSpladeForMaskedLM)
    encoder = SparseEncoder(str(tmp_path), trust_remote_code=True)
    expected = load_file(fixture_folder / "echo.safetensors")["document.rep_max"]
    torch.testing.assert_close(encoder.encode_document(inputs["documents"]).to_dense(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("processor_first", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"query_template": "{<s>}{find: %%text%%}"},
        {"max_query_length": 4},
        {"query_template": "<s>{%%text%%}", "document_template": "<s>{%%text%%}"},
        {"query_template": "{<s>}{!%%text%%}{%%text%%}", "document_template": "{<s>}{!%%text%%}{%%text%%}"},
    ],
)
def test_masked_lm_checkpoint_with_inputs_that_splade_pooling_cannot_serve(
    settings, processor_first, tmp_path, fixture_folder, tokenizer, inputs
):
    """sentence-transformers' own modules read queries as documents, and pool every position."""
    model = MistralSpladeForMaskedLM.from_pretrained(fixture_folder, attention_mode="plain")
    processor = MistralSpladeProcessor(tokenizer, attention_mode="plain", **settings)
    for part in (processor, model) if processor_first else (model, processor):
        part.save_pretrained(tmp_path)
    encoder = SparseEncoder(str(tmp_path), trust_remote_code=True)
    retriever = MistralSpladeForRetrieval.from_pretrained(tmp_path)
    for theirs, ours in (
        (encoder.encode_query, retriever.encode_queries),
        (encoder.encode, retriever.encode_documents),
    ):
        found = theirs(inputs["plain_texts"]).to_dense()
        torch.testing.assert_close(found, ours(inputs["plain_texts"], output="dense"), atol=1e-5, rtol=0)


def test_top_k_of_the_configuration(tmp_path, fixture_folder, tokenizer, inputs):
    model = MistralSpladeForRetrieval.from_pretrained(fixture_folder, top_k_query=3, top_k_document=5)
    model.save_pretrained(tmp_path)
    MistralSpladeProcessor(tokenizer).save_pretrained(tmp_path)
    encoder = SparseEncoder(str(tmp_path), trust_remote_code=True)
    for theirs, ours in (
        (encoder.encode_query, model.encode_queries),
        (encoder.encode_document, model.encode_documents),
    ):
        expected = ours(inputs["documents"], MistralSpladeProcessor(tokenizer), output="dense")
        assert expected.count_nonzero(dim=1).tolist() == [3 if ours == model.encode_queries else 5] * len(expected)
        torch.testing.assert_close(theirs(inputs["documents"]).to_dense(), expected, atol=1e-5, rtol=0)


def test_a_processor_of_another_mode_is_refused(tmp_path, fixture_folder, tokenizer):
    MistralSpladeForRetrieval.from_pretrained(fixture_folder).save_pretrained(tmp_path)
    MistralSpladeProcessor(tokenizer, attention_mode="plain").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"built for attention_mode='echo'.*prepares 'plain' inputs"):
        SparseEncoder(str(tmp_path), trust_remote_code=True)


def test_max_active_dims_equals_top_k(splade_checkpoint, inputs):
    encoder = SparseEncoder(str(splade_checkpoint), trust_remote_code=True)
    theirs = encoder.encode_document(inputs["documents"], max_active_dims=5).to_dense()
    model = MistralSpladeForRetrieval.from_pretrained(splade_checkpoint)
    ours = model.encode_documents(inputs["documents"], top_k=5, output="dense")
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)
