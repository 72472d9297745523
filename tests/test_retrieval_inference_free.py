"""Queries without a model, against the fixture and against sentence-transformers' SparseStaticEmbedding."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rarezoo.retrieval import Document, InferenceFreeQueryEncoder, inverse_document_frequencies

FIXTURES = Path(__file__).parent / "fixtures" / "mistral_splade"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FIXTURES)


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURES / "idf_query.safetensors")


@pytest.fixture(scope="module")
def texts():
    return json.loads((FIXTURES / "inputs.json").read_text(encoding="utf-8"))


@pytest.fixture
def encoder(tokenizer, expected):
    return InferenceFreeQueryEncoder(tokenizer, expected["idf"])


def test_fixture_representations_and_scores(encoder, expected, texts):
    queries = encoder.encode_queries(texts["queries"])
    assert isinstance(queries, scipy.sparse.csr_matrix)
    assert queries.dtype == np.float32 and queries.shape == (3, 160)
    assert queries.has_sorted_indices and (queries.data > 0).all()
    np.testing.assert_allclose(queries.toarray(), expected["rep"].numpy(), atol=1e-5)
    documents = load_file(FIXTURES / "echo.safetensors")["document.rep_max"].numpy()
    np.testing.assert_allclose(queries @ documents.T, expected["scores_with_document_reps"].numpy(), atol=1e-5)


def test_fixture_token_ids(tokenizer, expected, texts):
    for text, ids, mask in zip(texts["queries"], expected["input_ids"], expected["attention_mask"]):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[mask.bool()].tolist()


def test_outputs_are_the_same_numbers(encoder, texts):
    dense = encoder.encode_queries(texts["queries"], output="dense")
    sparse = encoder.encode_queries(texts["queries"], output="torch", batch_size=2)
    assert dense.dtype == sparse.dtype == torch.float32 and sparse.layout == torch.sparse_csr
    assert torch.equal(sparse.to_dense(), dense)
    np.testing.assert_array_equal(encoder.encode_queries(texts["queries"]).toarray(), dense.numpy())
    assert torch.equal(encoder.encode_queries(texts["queries"][1], output="dense"), dense[1:2])
    assert encoder.encode_queries([]).shape == (0, 160)
    assert encoder.encode_queries([], output="torch").shape == (0, 160)


def test_equals_sentence_transformers(tokenizer, texts):
    modules = pytest.importorskip("sentence_transformers.sparse_encoder.modules")
    encoder = InferenceFreeQueryEncoder.from_corpus(tokenizer, texts["documents"] + texts["negatives"])
    peer = modules.SparseStaticEmbedding(tokenizer, weight=torch.from_numpy(encoder.idf))
    queries = [*texts["queries"], *texts["plain_texts"], "", "the the the the"]
    embedding = peer(peer.preprocess(queries))["sentence_embedding"].detach()
    assert torch.equal(encoder.encode_queries(queries, output="dense"), embedding)


def test_inverse_document_frequencies_equal_the_formula(tokenizer, texts):
    documents = texts["documents"] + texts["negatives"] + ["", "<s></s>", "the the the"]
    idf = inverse_document_frequencies(tokenizer, (Document(str(i), text) for i, text in enumerate(documents)), 192)
    token_sets = [set(tokenizer(text, add_special_tokens=False)["input_ids"]) - {0, 1, 2} for text in documents]
    counted = sum(bool(tokens) for tokens in token_sets)
    assert 0 < counted < len(documents)
    for token in range(192):
        holding = sum(token in tokens for tokens in token_sets)
        weight = 0.0 if token in (0, 1, 2) else math.log(1 + (counted - holding + 0.5) / (holding + 0.5))
        assert idf[token] == pytest.approx(weight, rel=1e-6)
    assert idf.dtype == np.float32
    assert np.unique(idf[3:]).size > 3 and (idf[3:] > 0).all()


def test_corpus_is_streamed_in_batches(tokenizer, monkeypatch):
    monkeypatch.setattr("rarezoo.retrieval.inference_free._TEXTS_PER_CALL", 4)
    taken = []

    def documents():
        for number in range(10):
            taken.append(number)
            yield f"document {number}"

    sizes = []

    class Watched:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __len__(self):
            return len(tokenizer)

        def __call__(self, batch, **arguments):
            sizes.append((len(batch), len(taken)))
            return tokenizer(batch, **arguments)

    watched = inverse_document_frequencies(Watched(), documents())
    assert [size for size, _ in sizes] == [4, 4, 2] and [seen for _, seen in sizes] == [4, 8, 10]
    np.testing.assert_array_equal(watched, inverse_document_frequencies(tokenizer, documents()))


def test_special_and_unknown_tokens_are_left_out(tokenizer, expected):
    encoder = InferenceFreeQueryEncoder(tokenizer, torch.ones(160))
    row = encoder.encode_queries("<s>the 漢 mat</s>")
    assert tokenizer.unk_token_id in tokenizer("漢", add_special_tokens=False)["input_ids"]
    assert row.nnz > 0
    assert not {0, 1, 2} & set(row.indices.tolist())
    assert tokenizer.convert_ids_to_tokens(encoder.encode_queries("漢").indices.tolist()) == ["▁"]
    assert encoder.encode_queries("").nnz == 0


def test_long_query(encoder):
    row = encoder.encode_queries("the capital of france " * 10_000)
    np.testing.assert_array_equal(row.toarray(), encoder.encode_queries("the capital of france " * 3).toarray())


def test_top_k_keeps_the_heaviest(encoder, tokenizer, texts):
    full = encoder.encode_queries(texts["queries"], output="dense")
    for k in (1, 3, 500):
        kept = encoder.encode_queries(texts["queries"], top_k=k, output="dense")
        for row, kept_row in zip(full, kept):
            heaviest = torch.topk(row, min(k, int((row > 0).sum()))).indices
            assert torch.equal(kept_row, torch.zeros(160).index_put((heaviest,), row[heaviest]))
    ties = InferenceFreeQueryEncoder(tokenizer, torch.ones(160)).encode_queries(texts["queries"], top_k=2)
    for row, kept in zip(full, ties):
        assert kept.indices.tolist() == (row > 0).nonzero()[:2, 0].tolist()


def test_save_and_load(encoder, tmp_path, texts):
    encoder.save_pretrained(tmp_path / "encoder")
    again = InferenceFreeQueryEncoder.from_pretrained(tmp_path / "encoder")
    np.testing.assert_array_equal(again.idf, encoder.idf)
    expected = encoder.encode_queries(texts["queries"], output="dense")
    assert torch.equal(again.encode_queries(texts["queries"], output="dense"), expected)
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder"]
    again = InferenceFreeQueryEncoder.from_pretrained(str(tmp_path), subfolder="encoder")
    np.testing.assert_array_equal(again.idf, encoder.idf)


def test_save_does_not_overwrite(encoder, tmp_path):
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        encoder.save_pretrained(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.txt"]


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from rarezoo.retrieval import InferenceFreeQueryEncoder
from rarezoo.retrieval.storage import folder_written_beside
encoder = InferenceFreeQueryEncoder(AutoTokenizer.from_pretrained(sys.argv[1]), torch.ones(160))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    if sys.argv[4] == "safetensors":
        with folder_written_beside(Path(sys.argv[2])) as partial:
            save_file({"tensor": torch.ones(5000)}, partial / "model.safetensors")
    else:
        encoder.save_pretrained(sys.argv[2])
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("limit", "writer"),
    [(100, "the table"), (1500, "tokenizers"), (1500, "safetensors")],
)
def test_a_full_disk_leaves_nothing_and_is_named(tmp_path, limit, writer):
    """The writers of tokenizers and safetensors raise errors that are no OSError."""
    target = tmp_path / "encoder"
    arguments = [sys.executable, "-c", FULL_DISK, str(FIXTURES), str(target), str(limit), writer]
    finished = subprocess.run(arguments, capture_output=True, text=True)
    expected = f"CannotWriteError cannot write {target}: File too large; nothing half-written remains\n"
    assert finished.stdout == expected, finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_loading_a_damaged_or_missing_file(encoder, tmp_path):
    with pytest.raises(OSError, match=r"inference_free_query\.safetensors"):
        InferenceFreeQueryEncoder.from_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path / "encoder")
    file = tmp_path / "encoder" / "inference_free_query.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="damaged or truncated"):
        InferenceFreeQueryEncoder.from_pretrained(tmp_path / "encoder")
    save_file({"weight": torch.ones(160)}, file)
    with pytest.raises(ValueError, match=r"holds the tensors \['weight'\]; expected \['idf'\]"):
        InferenceFreeQueryEncoder.from_pretrained(tmp_path / "encoder")


@pytest.mark.parametrize(
    ("idf", "message"),
    [
        (torch.ones(2, 160), r"expected idf of shape \(vocab_size,\), found \(2, 160\)"),
        (torch.ones(159), "the tokenizer has 160 tokens, but there are only 159 weights"),
        (torch.full((160,), -1.0), "finite and not negative; token 0 has -1"),
        (torch.tensor([1.0] * 159 + [math.nan]), "finite and not negative; token 159 has nan"),
        (torch.full((160,), math.inf), "finite and not negative; token 0 has inf"),
    ],
)
def test_bad_weights(tokenizer, idf, message):
    with pytest.raises(ValueError, match=message):
        InferenceFreeQueryEncoder(tokenizer, idf)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "numpy"}, "output must be 'scipy', 'torch' or 'dense'; found 'numpy'"),
        ({"top_k": 0}, "top_k must be at least 1; found 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; found 0"),
        ({"prompt": "Find"}, "take no prompt; found 'Find'"),
    ],
)
def test_bad_arguments(encoder, arguments, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode_queries(["a"], **arguments)


def test_processor_must_have_the_same_vocabulary(encoder, tokenizer):
    class Other:
        def get_vocab(self):
            return {"a": 0}

    assert encoder.encode_queries("the", SimpleNamespace(tokenizer=tokenizer)).nnz > 0
    with pytest.raises(ValueError, match="different vocabularies"):
        encoder.encode_queries("the", SimpleNamespace(tokenizer=Other()))


def test_corpus_without_text(tokenizer):
    with pytest.raises(ValueError, match="no document holds any token"):
        inverse_document_frequencies(tokenizer, ["", "<s>"])
    with pytest.raises(ValueError, match="160 tokens, but there are only 100 weights"):
        inverse_document_frequencies(tokenizer, ["text"], vocab_size=100)
