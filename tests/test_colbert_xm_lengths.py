"""Lengths of ColBERT-XM's texts: none at all, those of the published settings, the last position, and beyond."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from rarezoo import ColBERTXMConfig, ColBERTXMForRetrieval, ColBERTXMProcessor

LONG = "the cat sat on the mat and looked at the rain " * 200
POINT = 105  # "." of the fixture's vocabulary


@pytest.fixture(scope="module")
def folder(colbert_fixtures):
    return colbert_fixtures / "checkpoint"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ColBERTXMProcessor.from_pretrained(folder).tokenizer


@pytest.fixture(scope="module")
def model():
    """A random network with X-MOD's 514 positions."""
    torch.manual_seed(0)
    config = ColBERTXMConfig(
        vocab_size=165, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, dim=16,
        languages=["en_XX"], initializer_range=0.2,
    )  # fmt: skip
    assert config.max_position_embeddings == 514
    return ColBERTXMForRetrieval(config).eval()


@pytest.mark.parametrize("blank", ["", " ", "\n\t  ", "\u3000"])
def test_blank_texts(folder, blank):
    """A document keeps its special tokens (and the "." of the old form), whatever stands beside it in the batch; a
    query is all masks."""
    model = ColBERTXMForRetrieval.from_pretrained(folder).eval()
    for mode, ids in (("insert", [0, 3, 2]), ("replace", [0, 3, POINT, 2])):
        processor = ColBERTXMProcessor.from_pretrained(folder, marker_mode=mode)
        assert processor.process_documents([blank])["input_ids"].tolist() == [ids]
        alone, beside = (model.encode_documents(texts, processor) for texts in ([blank], [LONG, blank]))
        assert alone[0].shape == beside[1].shape == (len(ids), 16)
        torch.testing.assert_close(alone[0], beside[1], atol=1e-5, rtol=0)
        assert (alone[0].norm(dim=1) - 1).abs().max() < 1e-6
        query = processor.process_queries([blank])
        assert query["input_ids"].tolist() == [ids + [164] * (16 - len(ids))] and query["keep_mask"].all()
        (vectors,) = model.encode_queries(blank, processor)
        assert vectors.shape == (16, 16) and model.score([vectors], alone).isfinite().all()


def test_the_published_lengths(tokenizer):
    """32 and 256 tokens, of which three are special ones: neither 33 nor 257, and the last one is `</s>`."""
    text = tokenizer(LONG, add_special_tokens=False, verbose=False)["input_ids"]
    processor = ColBERTXMProcessor(tokenizer)
    for inputs, length in ((processor.process_queries(LONG), 32), (processor.process_documents(LONG), 256)):
        assert inputs["input_ids"].tolist() == [[0, 3, *text[: length - 3], 2]]
        assert inputs["attention_mask"].all()
    old = ColBERTXMProcessor(tokenizer, marker_mode="replace")
    for inputs, length in ((old.process_queries(LONG), 32), (old.process_documents(LONG), 256)):
        assert inputs["input_ids"].tolist() == [[0, 3, POINT, *text[: length - 4], 2]]
    exact = tokenizer.decode(text[:29])
    assert tokenizer(exact, add_special_tokens=False)["input_ids"] == text[:29]
    fits, cut = processor.process_queries(exact)["input_ids"], processor.process_queries(f"{exact} rain")["input_ids"]
    assert torch.equal(fits, cut) and 164 not in fits


def test_documents_up_to_the_last_position(model, tokenizer):
    processor = ColBERTXMProcessor(tokenizer, max_query_length=500, max_document_length=512, mask_punctuation=False)
    vectors, short = model.encode_documents([LONG, "rain"], processor)
    assert vectors.shape == (512, 16) and len(short) < 10
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-6
    assert model.encode_queries("rain", processor)[0].shape == (500, 16)
    torch.testing.assert_close(model.encode_documents("rain", processor)[0], short, atol=1e-5, rtol=0)


def test_documents_beyond_the_last_position(model, tokenizer):
    """Only where a text is that long: then nothing is cut in silence."""
    processor = ColBERTXMProcessor(tokenizer, max_query_length=513, max_document_length=513)
    with pytest.raises(ValueError, match=r"the input has 513 tokens, but the model takes 512; lower .*document_length"):
        model.encode_documents(["rain", LONG], processor)
    with pytest.raises(ValueError, match="the input has 513 tokens, but the model takes 512"):
        model.encode_queries("rain", processor)


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_a_query_and_its_context_fit_the_model_together(model, tokenizer, mode):
    """However long the query becomes; what colbert-ai's cut leaves is what is left beside a query of usual length."""
    processor = ColBERTXMProcessor(tokenizer, marker_mode=mode)
    text = tokenizer(LONG, add_special_tokens=False, verbose=False)["input_ids"]
    for query, options in (("rain", {}), (LONG[:200], {"full_length": True}), (LONG, {"full_length": True})):
        alone = processor.process_queries(query, **options)["input_ids"]
        inputs = processor.process_queries(query, context=LONG, **options)
        room = 512 - alone.shape[1]
        assert inputs["input_ids"].tolist() == [[*alone[0].tolist(), *text[: room - 1], 2]]
        assert model(**inputs).embeddings.shape == (1, 512, 16)


@pytest.mark.parametrize("length", [511, 512, 513, 600])
def test_queries_that_leave_no_room_for_contexts(tokenizer, length):
    processor = ColBERTXMProcessor(tokenizer, max_query_length=length)
    with pytest.raises(ValueError, match=rf"queries of {length} tokens leave no room .* lower max_query_length"):
        processor.process_queries("rain", context=LONG)


@pytest.mark.parametrize("special", ["none", "first"])
def test_tokenizers_that_end_texts_with_no_special_token(folder, special):
    """Cut as the tokenizer itself cuts; the marker stands behind the first id."""
    processor = ColBERTXMProcessor.from_pretrained(folder)
    tokenizer = processor.tokenizer
    template = TemplateProcessing(single="<s> $A" if special == "first" else "$A", special_tokens=[("<s>", 0)])
    tokenizer.backend_tokenizer.post_processor = template
    assert (tokenizer("")["input_ids"] == []) == (special == "none")
    for limit in (8, 40):
        processor = ColBERTXMProcessor(tokenizer, max_query_length=limit, max_document_length=limit)
        cut = tokenizer(LONG, truncation=True, max_length=limit - 1)["input_ids"]
        tokenizer.backend_tokenizer.no_truncation()
        for inputs in (processor.process_queries(LONG), processor.process_documents(LONG)):
            assert inputs["input_ids"].tolist() == [[cut[0], 3, *cut[1:]]]
    expected = [3] if special == "none" else [0, 3]
    assert processor.process_documents("")["input_ids"].tolist() == [expected]
    assert processor.process_queries("")["input_ids"].tolist() == [expected + [164] * (40 - len(expected))]


def test_full_length_queries(model, tokenizer):
    """As long as they are, never above 500, never below the usual length; each as if it were alone."""
    processor = ColBERTXMProcessor(tokenizer)
    counted = len(tokenizer(LONG[:200], add_special_tokens=False)["input_ids"])
    assert 32 < counted < 500
    texts = ["rain", LONG[:200], LONG]
    found = model.encode_queries(texts, processor, full_length=True)
    assert [len(vectors) for vectors in found] == [32, counted, 500]
    for vectors, text in zip(found, texts):
        assert torch.equal(vectors, model.encode_queries(text, processor, full_length=True)[0])
    torch.testing.assert_close(found[0], model.encode_queries("rain", processor)[0], atol=1e-5, rtol=0)
