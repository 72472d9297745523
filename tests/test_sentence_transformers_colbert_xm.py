"""ColBERT-XM checkpoints through sentence-transformers' MultiVectorEncoder: the reference's vectors, with and without
the plugin installed, by the family's own module; and folders of sentence-transformers' own modules."""

import json
import shutil

import pytest
import torch

pytest.importorskip("sentence_transformers")

from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder import losses

from rarezoo import ColBERTXMForRetrieval, ColBERTXMProcessor
from rarezoo.conversion import ConversionError, convert

TEXTS = ["the moon pulls the sea, twice a day!", "rain"]


@pytest.fixture(scope="module")
def texts(colbert_fixtures):
    return json.loads((colbert_fixtures / "expected.json").read_text())["data"]


@pytest.fixture(scope="module")
def expected(colbert_fixtures):
    return load_file(colbert_fixtures / "expected.safetensors")


@pytest.fixture(scope="module")
def checkpoint(colbert_fixtures, tmp_path_factory):
    """As `save_pretrained` of the model and of the processor write it."""
    folder = tmp_path_factory.mktemp("colbert") / "saved"
    ColBERTXMForRetrieval.from_pretrained(colbert_fixtures / "checkpoint").save_pretrained(folder)
    ColBERTXMProcessor.from_pretrained(colbert_fixtures / "checkpoint").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def native(colbert_fixtures, tmp_path_factory):
    """sentence-transformers' own modules, as its `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("native") / "native"
    MultiVectorEncoder(str(colbert_fixtures / "pylate_checkpoint")).save_pretrained(str(folder))
    return folder


def opened(folder, **arguments):
    return MultiVectorEncoder(str(folder), trust_remote_code=True, device="cpu", **arguments)


def check_vectors(encoder, texts, expected, prefix="", choose=None):
    for name, data in texts.items():
        language = {} if choose else {"language": data["adapter"]}
        if choose:
            choose(data["adapter"])
        queries = encoder.encode_query(data["queries"], **language)
        documents = encoder.encode_document(data["documents"], batch_size=2, **language)
        kept = expected[f"{name}.{prefix}D"][expected[f"{name}.{prefix}D_mask"].bool()]
        torch.testing.assert_close(torch.stack(queries), expected[f"{name}.{prefix}Q"], atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.cat(documents), kept, atol=1e-5, rtol=0)
        scores = encoder.similarity(queries, documents)
        torch.testing.assert_close(scores, expected[f"{name}.{prefix}scores"], atol=1e-4, rtol=0)


def test_saved_checkpoint_gives_the_reference_s_vectors(checkpoint, texts, expected):
    encoder = opened(checkpoint)
    assert encoder.get_embedding_dimension() == 16 and encoder.similarity_fn_name == "maxsim"
    check_vectors(encoder, texts, expected)


def test_converted_checkpoint_with_overwritten_markers(colbert_fixtures, tmp_path, texts, expected):
    """What sentence-transformers' own modules cannot do: their marker is text in front."""
    convert("colbert_xm", colbert_fixtures / "checkpoint", tmp_path / "ours", marker_mode="replace")
    check_vectors(opened(tmp_path / "ours"), texts, expected, prefix="legacy.")


def test_without_the_plugin(checkpoint, texts, expected, run_without_rarezoo, tmp_path):
    data = texts["ja"]
    run_without_rarezoo(
        f"""
        import torch
        from sentence_transformers import MultiVectorEncoder
        encoder = MultiVectorEncoder({str(checkpoint)!r}, trust_remote_code=True)
        vectors = encoder.encode_document({data["documents"]!r}, language="ja")
        torch.save(torch.cat(vectors), {str(tmp_path / "documents.pt")!r})
        """
    )
    torch.testing.assert_close(torch.load(tmp_path / "documents.pt"), expected["ja.doc_flat"], atol=1e-5, rtol=0)


def test_language_from_configuration_argument_and_function(checkpoint):
    encoder = opened(checkpoint, config_kwargs={"languages": ["fr", "ja"], "default_language": "ja"})
    assert encoder[0].model.config.languages == ["fr_XX", "ja_XX"]
    japanese, french = (encoder.encode_document(TEXTS, language=language) for language in ("ja_XX", "fr-CA"))
    assert all(torch.equal(a, b) for a, b in zip(encoder.encode_document(TEXTS), japanese))
    assert not torch.allclose(french[1], japanese[1], atol=1e-3)
    mixed = encoder.encode_document(TEXTS, language=lambda text: "fr" if text == "rain" else "ja")
    for found, wanted in zip(mixed, (japanese[0], french[1])):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="language must be one for all texts, or a function"):
        encoder.encode_document(TEXTS, language=["ja", "fr"])
    with pytest.raises(ValueError, match="no adapter for the language 'sw'"):
        encoder.encode_query(TEXTS, language="sw")


def test_prompt_and_length(checkpoint):
    encoder = opened(checkpoint)
    prompted, plain = (encoder.encode_query("rain", prompt="find: "), encoder.encode_query("find: rain"))
    assert torch.equal(prompted, plain) and prompted.shape == (16, 16)
    encoder.max_seq_length = 8
    assert all(len(vectors) <= 8 for vectors in encoder.encode_document(TEXTS))


def test_saved_again_and_opened_again(checkpoint, tmp_path, texts, expected):
    opened(checkpoint).save_pretrained(str(tmp_path / "again"))
    check_vectors(opened(tmp_path / "again"), texts, expected)
    model = ColBERTXMForRetrieval.from_pretrained(tmp_path / "again")
    assert len(model.encode_queries(TEXTS)) == 2


def test_gradients_and_padding(checkpoint):
    """What its losses read: padded vectors and the mask of those that count."""
    encoder = opened(checkpoint)
    features = encoder(encoder.preprocess(TEXTS, task="document"), task="document")
    mask = features["attention_mask"].bool()
    for vectors, kept, whole in zip(features["token_embeddings"], mask, encoder.encode_document(TEXTS)):
        torch.testing.assert_close(vectors[kept], whole, atol=1e-5, rtol=0)
        assert not vectors[~kept].any()
    features["token_embeddings"].sum().backward()
    assert encoder[0].model.linear.weight.grad.abs().sum() > 0


def test_losses_of_the_library(checkpoint):
    """In chunks, which runs the same features twice, and at once: the same gradients."""
    gradients = []
    for loss_class, arguments in (
        (losses.MultiVectorMultipleNegativesRankingLoss, {}),
        (losses.CachedMultiVectorMultipleNegativesRankingLoss, {"mini_batch_size": 1}),
    ):
        encoder = opened(checkpoint).eval()
        features = [encoder.preprocess(TEXTS, task=task) for task in ("query", "document")]
        loss_class(encoder, **arguments)(features, None).backward()
        gradients.append(encoder[0].model.linear.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)
    assert gradients[0].abs().sum() > 0


# --- sentence-transformers' own modules ------------------------------------------------------------------------------


def test_pylate_export_opens_with_its_own_modules(checkpoint, tmp_path, texts, expected):
    convert("colbert_xm", checkpoint, tmp_path / "out", to="official", layout="pylate")
    encoder = MultiVectorEncoder(str(tmp_path / "out"), device="cpu")
    assert [type(module).__name__ for module in encoder] == ["Transformer", "Dense", "MultiVectorMask", "Normalize"]
    check_vectors(encoder, texts, expected, choose=encoder[0].model.set_default_language)


def test_its_own_modules_are_read(native, tmp_path, texts, expected):
    report = convert("colbert_xm", native, tmp_path / "ours")
    assert report.source_layout == "sentence-transformers"
    processor = ColBERTXMProcessor.from_pretrained(tmp_path / "ours")
    assert processor.max_document_length == 40 and processor.skiplist_tokens is None
    check_vectors(opened(tmp_path / "ours"), texts, expected)


def test_its_own_skip_list(native, tmp_path):
    """A word that is no token is left out, as its own modules do."""
    folder = shutil.copytree(native, tmp_path / "native")
    write(folder / "2_MultiVectorMask" / "config.json", skiplist_words=[".", "▁", "no token"])
    convert("colbert_xm", folder, tmp_path / "ours")
    theirs = MultiVectorEncoder(str(folder), device="cpu").encode_document(TEXTS)
    for a, b in zip(opened(tmp_path / "ours").encode_document(TEXTS), theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def write(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config_sentence_transformers.json", {"prompts": {"query": "query: ", "document": "<unk>"}}, "'query:' is no"),
        ("config_sentence_transformers.json", {"prompts": {}}, "query marker '' is no token"),
        (
            "sentence_bert_config.json",
            {"query_expansion": None},
            "strategy 'fixed' and no token of its own; found None",
        ),
        ("2_MultiVectorMask/config.json", {"skiplist_tasks": ["query", "document"]}, "expected skiplist_tasks"),
        ("1_Dense/config.json", {"use_residual": True}, "use_residual True"),
    ],
)
def test_its_own_modules_that_this_family_cannot_be(native, tmp_path, file, fields, message):
    folder = shutil.copytree(native, tmp_path / "native")
    write(folder / file, **fields)
    with pytest.raises(ConversionError, match=message):
        convert("colbert_xm", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
