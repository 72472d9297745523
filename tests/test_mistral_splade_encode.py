"""From texts to sparse rows: `encode_queries`, `encode_documents`, `score` and `explain`."""

import copy
import shutil
import threading

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from transformers import AutoModel, AutoTokenizer

from rarezoo import MistralSpladeConfig, MistralSpladeForRetrieval, MistralSpladeProcessor

from .cases import DEVICE


@pytest.fixture(scope="module")
def processor(splade_checkpoint):
    return MistralSpladeProcessor.from_pretrained(splade_checkpoint)


@pytest.fixture(scope="module")
def model(splade_checkpoint):
    return AutoModel.from_pretrained(splade_checkpoint).to(DEVICE).eval()


@pytest.fixture
def load(splade_checkpoint):
    return lambda **fields: AutoModel.from_pretrained(splade_checkpoint, **fields).to(DEVICE).eval()


@pytest.fixture(scope="module")
def texts(inputs):
    return [*inputs["documents"], *inputs["negatives"], *inputs["queries"], *inputs["plain_texts"], "", "x"]


@torch.no_grad()
def one_by_one(model, process, texts):
    return torch.cat([model(**process([text]).to(DEVICE)).sparse_embedding for text in texts]).cpu().numpy()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_rows_are_the_forward_pass_in_the_order_of_the_texts(model, processor, texts, batch_size):
    """Texts are sorted by length inside; the rows come back in the caller's order, whatever the batches."""
    assert sorted(texts, key=len) != texts
    documents = model.encode_documents(texts, processor, batch_size=batch_size)
    queries = model.encode_queries(texts, processor, batch_size=batch_size, prompt="find")
    expected = one_by_one(model, processor.process_documents, texts)
    np.testing.assert_allclose(documents.toarray(), expected, atol=1e-5, rtol=0)
    expected = one_by_one(model, lambda texts: processor.process_queries(texts, prompt="find"), texts)
    np.testing.assert_allclose(queries.toarray(), expected, atol=1e-5, rtol=0)
    stored_prompt = model.encode_queries(texts, processor, batch_size=batch_size)
    assert abs(queries - stored_prompt).max() > 0.01 and abs(queries - documents).max() > 0.1


def test_scipy_rows_are_clean(model, processor, texts):
    """float32 CSR with sorted ids, no stored zeros, nothing negative: what indexes and exports rely on."""
    matrix = model.encode_documents(texts, processor)
    assert type(matrix) is csr_matrix and matrix.shape == (len(texts), 160) and matrix.dtype == np.float32
    assert (matrix.data > 0).all() and np.isfinite(matrix.data).all()
    for row in range(len(texts)):
        ids = matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]
        assert (np.diff(ids) > 0).all()


@pytest.mark.parametrize("top_k", [None, 5])
def test_output_forms_hold_the_same_rows(model, processor, texts, top_k):
    scipy, sparse, dense = (
        model.encode_documents(texts, processor, top_k=top_k, output=output) for output in ("scipy", "torch", "dense")
    )
    assert sparse.layout == torch.sparse_csr and dense.layout == torch.strided
    for tensor in (sparse, dense):
        assert tensor.shape == (len(texts), 160) and tensor.dtype == torch.float32
        assert tensor.device.type == "cpu" and not tensor.requires_grad
    assert np.array_equal(scipy.toarray(), dense.numpy())
    assert torch.equal(sparse.to_dense(), dense)
    assert np.array_equal(sparse.col_indices().numpy(), scipy.indices)


@pytest.mark.parametrize("top_k", [1, 7, 12, 160, 1000])
def test_top_k_is_the_sorted_head(model, processor, texts, top_k):
    """The k largest weights; rows with fewer active entries keep all of them and store no zero."""
    everything = model.encode_documents(texts, processor).toarray()
    found = model.encode_documents(texts, processor, top_k=top_k)
    active = (everything > 0).sum(axis=1)
    assert active.min() < 12 < active.max()
    for row, weights in enumerate(everything):
        kept = np.argsort(-weights, kind="stable")[: min(top_k, active[row])]
        expected = np.zeros_like(weights)
        expected[kept] = weights[kept]
        assert np.array_equal(found[row].toarray()[0], expected)
        assert found[row].nnz == len(kept)


def test_ties_go_to_the_lower_id(load, processor, texts):
    """Two vocabulary entries with the same head row always weigh the same; top-k keeps the first of them."""
    model = load()
    everything = model.encode_documents(texts, processor).toarray()
    largest = int(everything[0].argmax())
    twin = 150 if largest != 150 else 149
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[largest]
    low, high = sorted((twin, largest))
    both = model.encode_documents(texts[:1], processor)
    assert both[0, low] == both[0, high] == both.max()
    assert model.encode_documents(texts[:1], processor, top_k=1).indices.tolist() == [low]


def test_rows_without_an_active_entry(load, processor, texts):
    """All logits negative: empty rows, also under top-k."""
    model = load()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for top_k in (None, 3):
        matrix = model.encode_documents(texts, processor, top_k=top_k)
        assert matrix.shape == (len(texts), 160) and matrix.nnz == 0
        assert model.encode_documents(texts, processor, top_k=top_k, output="torch")._nnz() == 0
    assert model.explain("a cat", processor) == []


@pytest.mark.parametrize("mode", ["echo", "plain", "bidirectional", "repeat"])
def test_empty_text(load, tokenizer, mode):
    """The template's own tokens are encoded: finite, alone as in a batch."""
    model, processor = load(attention_mode=mode), MistralSpladeProcessor(tokenizer, attention_mode=mode)
    alone = model.encode_documents("", processor)
    expected = one_by_one(model, processor.process_documents, [""])
    np.testing.assert_allclose(alone.toarray(), expected, atol=1e-6, rtol=0)
    batch = model.encode_documents(["a cat on the mat", "", "x"], processor)
    assert np.isfinite(batch.data).all()
    np.testing.assert_allclose(batch[1].toarray(), alone.toarray(), atol=1e-5, rtol=0)


def test_text_without_any_token_is_an_empty_row(load, tokenizer):
    model = load(attention_mode="plain")
    processor = MistralSpladeProcessor(tokenizer, attention_mode="plain", document_template="{%%text%%}")
    matrix = model.encode_documents(["", "a cat", ""], processor)
    assert [matrix[row].nnz for row in (0, 2)] == [0, 0] and matrix[1].nnz > 0
    assert model.encode_documents([""], processor).nnz == 0


@pytest.mark.parametrize("output", ["scipy", "torch", "dense"])
def test_no_texts(model, processor, output):
    assert model.encode_documents([], processor, output=output).shape == (0, 160)


def test_one_text_is_one_row(model, processor, inputs):
    text = inputs["documents"][0]
    one = model.encode_documents(text, processor)
    assert one.shape == (1, 160)
    assert np.array_equal(one.toarray(), model.encode_documents([text], processor).toarray())


@pytest.mark.parametrize(
    "text", ["naïve café", "東京は日本の首都です", "🙂🙃", "\u0000\u200b", "\n\t ", "</s><s>", "%%text%%"]
)
def test_any_characters(model, processor, text):
    for matrix in (model.encode_documents(text, processor), model.encode_queries(text, processor)):
        assert np.isfinite(matrix.data).all() and matrix.nnz > 0


def test_long_text_is_cut_as_the_processor_says(model, tokenizer):
    """Ten thousand tokens: the same row as the part that is kept."""
    text = "jupiter is the largest planet " * 3000
    kept = MistralSpladeProcessor(tokenizer, max_document_length=40)
    longer = MistralSpladeProcessor(tokenizer, max_document_length=200)
    matrix = model.encode_documents([text, "a cat"], kept)
    pieces = len(tokenizer.tokenize("jupiter is the largest planet "))
    part = "jupiter is the largest planet " * (40 // pieces + 1)
    np.testing.assert_allclose(matrix[0].toarray(), model.encode_documents(part, kept).toarray(), atol=1e-5, rtol=0)
    assert abs(model.encode_documents(text, longer) - matrix[0]).max() > 1e-3


def test_longer_than_the_model_is_refused(model, tokenizer):
    processor = MistralSpladeProcessor(tokenizer, max_document_length=300)
    with pytest.raises(ValueError, match=r"has 6\d\d tokens, but the model takes max_position_embeddings=512; lower"):
        model.encode_documents("jupiter is the largest planet " * 300, processor)


def test_echo_longer_than_the_sliding_window_is_said(load, processor, inputs, monkeypatch):
    from rarezoo.mistral_splade import modeling_mistral_splade

    said = []
    monkeypatch.setattr(modeling_mistral_splade.logger, "warning_once", said.append)
    load(sliding_window=512).encode_documents(inputs["documents"], processor)
    assert said == []
    load(sliding_window=20).encode_documents(inputs["documents"], processor)
    assert len(said) == 1 and "more than the sliding window of 20: the second copy" in said[0]
    said.clear()
    plain = MistralSpladeProcessor(processor.tokenizer, attention_mode="plain")
    load(sliding_window=4, attention_mode="plain").encode_documents(inputs["documents"], plain)
    assert said == []


def test_excluded_ids_are_never_active(load, model, processor, texts):
    everything = model.encode_documents(texts, processor).toarray()
    excluded = [int(i) for i in (everything > 0).sum(axis=0).argsort()[-3:]]
    found = load(excluded_token_ids=excluded).encode_documents(texts, processor).toarray()
    assert (everything[:, excluded] > 0).any() and (found[:, excluded] == 0).all()
    kept = np.setdiff1d(np.arange(160), excluded)
    assert np.array_equal(found[:, kept], everything[:, kept])
    # They free their places under top-k.
    shorter = load(excluded_token_ids=excluded).encode_documents(texts, processor, top_k=5)
    assert shorter.nnz == np.minimum((found > 0).sum(axis=1), 5).sum()


def test_head_larger_than_the_tokenizer(tokenizer):
    """A padded head: its extra entries are dimensions without a name."""
    torch.manual_seed(0)
    config = MistralSpladeConfig(
        vocab_size=192, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.3,
    )  # fmt: skip
    model, processor = MistralSpladeForRetrieval(config).to(DEVICE).eval(), MistralSpladeProcessor(tokenizer)
    matrix = model.encode_documents("a cat on the mat", processor)
    assert matrix.shape == (1, 192) and matrix.indices.max() >= 160
    names = dict(model.explain("a cat on the mat", processor, top_k=None))
    assert len(names) == matrix.nnz
    for entry, weight in zip(matrix.indices, matrix.data):
        name = f"<id {entry}>" if entry >= 160 else tokenizer.convert_ids_to_tokens(int(entry))
        assert names[name] == pytest.approx(float(weight))


def test_tokenizer_larger_than_the_head_is_refused(model, fixture_folder):
    tokenizer = AutoTokenizer.from_pretrained(fixture_folder)
    tokenizer.add_tokens(["capital"])
    with pytest.raises(ValueError, match="tokenizer has 161 tokens, but the model's vocab_size is 160; they do not"):
        model.encode_documents("the capital", MistralSpladeProcessor(tokenizer))


@pytest.mark.parametrize("mode", ["plain", "bidirectional", "repeat"])
def test_processor_of_another_mode_is_refused(model, tokenizer, mode):
    processor = MistralSpladeProcessor(tokenizer, attention_mode=mode)
    for call in (model.encode_documents, model.encode_queries, model.explain):
        with pytest.raises(ValueError, match=f"built for attention_mode='echo', but the processor prepares '{mode}'"):
            call("a cat", processor)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(texts="a", output="numpy"), ValueError, "output must be 'scipy', 'torch' or 'dense'; found 'numpy'"),
        (dict(texts="a", top_k=0), ValueError, "top_k must be a whole number of at least 1; found 0"),
        (dict(texts="a", batch_size=0), ValueError, "batch_size must be a whole number of at least 1; found 0"),
        (dict(texts=["a", 3]), TypeError, "the text of a query must be a string; found int"),
        (dict(texts=["a"], prompt=3), TypeError, "the prompt of a query must be a string; found int"),
    ],
)
def test_wrong_arguments_are_refused(model, processor, arguments, error, message):
    with pytest.raises(error, match=message):
        model.encode_queries(processor=processor, **arguments)


def test_processor_of_the_checkpoint_is_the_default(model, processor, texts, splade_checkpoint, tmp_path):
    """Templates and prompt are stored beside the weights, and found without being named."""
    expected = model.encode_queries(texts, processor)
    loaded = AutoModel.from_pretrained(splade_checkpoint).to(DEVICE)
    assert np.array_equal(loaded.encode_queries(texts).toarray(), expected.toarray())
    folder = shutil.copytree(splade_checkpoint, tmp_path / "copy")
    MistralSpladeProcessor(processor.tokenizer, prompt="find").save_pretrained(folder)
    other = AutoModel.from_pretrained(folder).to(DEVICE).encode_queries(texts)
    assert np.array_equal(other.toarray(), model.encode_queries(texts, processor, prompt="find").toarray())


def test_trust_given_once_is_enough(splade_checkpoint, run_without_rarezoo):
    """transformers asks on the terminal before it runs a checkpoint's code; this model's user has answered already."""
    printed = run_without_rarezoo(f"""
        import builtins
        from transformers import AutoModel

        def refuse(question=""):
            raise AssertionError(question)

        builtins.input = refuse
        model = AutoModel.from_pretrained({str(splade_checkpoint)!r}, trust_remote_code=True)
        print(model.encode_documents(["a cat"]).nnz > 0)
    """)
    assert printed.split()[-1] == "True"


def test_model_without_a_checkpoint_asks_for_a_processor(model):
    fresh = MistralSpladeForRetrieval(MistralSpladeConfig(**{**model.config.to_dict(), "_name_or_path": ""}))
    with pytest.raises(ValueError, match="not loaded from a checkpoint: pass processor=MistralSpladeProcessor"):
        fresh.encode_documents("a cat")


def test_checkpoint_without_a_processor_is_named(splade_checkpoint, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(splade_checkpoint / name, tmp_path / name)
    with pytest.raises(ValueError, match=rf"no processor could be loaded from {tmp_path}.*processor_config.json"):
        AutoModel.from_pretrained(tmp_path).encode_queries("a cat")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error(value, load, processor):
    """Not an empty vector: a document would vanish from the index without a word."""
    broken = load()
    good, bad = "a tree", "the cat"
    only_there = set(processor.process_documents(bad)["input_ids"][0].tolist()).difference(
        processor.process_documents(good)["input_ids"][0].tolist()
    )
    with torch.no_grad():
        broken.model.embed_tokens.weight[sorted(only_there)] = value
    with pytest.raises(ValueError, match=r"not finite, for example for 'the cat': .* too large for torch\.float32"):
        broken.encode_documents([good, bad], processor, batch_size=2)
    assert broken.encode_documents([good], processor).nnz > 0


def test_training_mode_is_left_as_it_was(load, processor, inputs):
    """Encoding evaluates, without dropout and without a graph, and then puts the model back; after an error too."""
    model = load(attention_dropout=0.5)
    expected = model.encode_documents(inputs["documents"], processor).toarray()
    model.train()
    assert np.array_equal(model.encode_documents(inputs["documents"], processor).toarray(), expected)
    assert model.training and model.model.layers[0].training
    with pytest.raises(TypeError):
        model.encode_documents(["a", None], processor)
    assert model.training


def test_threads_encode_a_model_that_is_in_training(load, processor, inputs, monkeypatch):
    """A thread that ends does not bring dropout back to one that still encodes; the last one does."""
    model = load(attention_dropout=0.5)
    texts = inputs["documents"]
    expected = model.encode_documents(texts, processor).toarray()
    model.train()
    model.model.embed_tokens.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    waits, may_go_on = threading.Event(), threading.Event()
    slow = copy.copy(processor)

    def process_late(*arguments):
        waits.set()
        assert may_go_on.wait(60)
        return processor.process(*arguments)

    slow.process = process_late
    found = []

    def encode_slowly():
        found.append(model.encode_documents(texts, slow).toarray())

    thread = threading.Thread(target=encode_slowly)

    def process(*arguments):  # of the first to begin, and the first to end
        thread.start()
        assert waits.wait(60)
        return processor.process(*arguments)

    first = copy.copy(processor)
    first.process = process
    assert np.array_equal(model.encode_documents(texts, first, batch_size=100).toarray(), expected)
    may_go_on.set()
    thread.join()
    assert np.array_equal(found[0], expected)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_progress_bar(model, processor, inputs, capsys):
    model.encode_documents(inputs["documents"], processor, batch_size=1)
    assert capsys.readouterr().err == ""
    model.encode_documents(inputs["documents"], processor, batch_size=1, show_progress_bar=True)
    assert "Encoding document texts: 100%" in capsys.readouterr().err
    model.encode_queries(inputs["queries"], processor, show_progress_bar=True)
    shown = capsys.readouterr().err
    assert "Encoding query texts: 100%" in shown and "3/3" in shown


def test_scores_of_every_form(model, processor, inputs):
    """Dot products, the same for scipy, torch and dense rows, against loops."""
    forms = ("scipy", "torch", "dense")
    queries = {form: model.encode_queries(inputs["queries"], processor, output=form) for form in forms}
    documents = {form: model.encode_documents(inputs["documents"][:2], processor, output=form) for form in forms}
    rows, columns = queries["dense"].tolist(), documents["dense"].tolist()
    expected = np.array([[sum(a * b for a, b in zip(row, column)) for column in columns] for row in rows])
    assert expected.max() > 0.1
    scores = model.score(queries["scipy"], documents["scipy"])
    assert isinstance(scores, np.ndarray) and scores.dtype == np.float32 and scores.shape == (3, 2)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    for left in ("torch", "dense"):
        for right in ("torch", "dense"):
            scores = model.score(queries[left], documents[right])
            assert scores.layout == torch.strided and scores.shape == (3, 2)
            np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)


def test_scores_of_numpy_arrays(model):
    queries, documents = np.eye(2, 5, dtype="float32"), np.ones((3, 5), dtype="float32")
    assert np.array_equal(model.score(queries, documents), np.ones((2, 3)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(texts=None), TypeError, "expected a text or several; found NoneType"),
        (dict(texts=[None]), TypeError, "the text of a document must be a string; found NoneType"),
        (dict(texts="a", top_k=2.5), ValueError, r"top_k must be a whole number of at least 1; found 2\.5"),
        (dict(texts="a", batch_size="4"), ValueError, "batch_size must be a whole number of at least 1; found '4'"),
    ],
)
def test_arguments_of_other_types_are_refused(model, processor, arguments, error, message):
    with pytest.raises(error, match=message):
        model.encode_documents(processor=processor, **arguments)


def test_a_tokenizer_is_no_processor(model, tokenizer):
    with pytest.raises(TypeError, match="expected a MistralSpladeProcessor; found"):
        model.encode_documents("a", tokenizer)


@pytest.mark.parametrize("top_k", [0, -1, True, 2.0])
def test_explain_refuses_what_is_no_number_of_terms(model, processor, top_k):
    with pytest.raises(ValueError, match="top_k must be a whole number of at least 1"):
        model.explain("a cat", processor, top_k=top_k)


def test_a_row_that_is_not_finite_is_not_explained(model, processor):
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        model.explain(torch.full((model.config.vocab_size,), torch.nan), processor)


def test_scores_pass_gradients(model):
    queries, documents = (torch.rand(2, 160, requires_grad=True) for _ in range(2))
    model.score(queries, documents).sum().backward()
    torch.testing.assert_close(queries.grad, documents.detach().sum(dim=0).expand(2, -1))


def test_scores_of_different_vocabularies_are_refused(model):
    with pytest.raises(ValueError, match="queries have 160 dimensions and documents 99; expected the same vocabulary"):
        model.score(torch.rand(1, 160), torch.rand(1, 99))
    with pytest.raises(TypeError, match="must be of the same kind; found csr_matrix and Tensor"):
        model.score(csr_matrix((1, 160)), torch.rand(1, 160))


@pytest.mark.parametrize("kind", ["query", "document"])
@pytest.mark.parametrize("top_k", [3, 20, None])
def test_explain(model, processor, inputs, kind, top_k):
    """Tokens and weights by a sort of the row itself, from a text as from any form of its row."""
    text = inputs["documents"][0]
    encode = model.encode_queries if kind == "query" else model.encode_documents
    weights = encode(text, processor, output="dense")[0].tolist()
    ranked = sorted((i for i in range(160) if weights[i] > 0), key=lambda i: (-weights[i], i))[:top_k]
    expected = [(processor.tokenizer.convert_ids_to_tokens(i), weights[i]) for i in ranked]
    assert model.explain(text, processor, top_k=top_k, kind=kind) == expected
    forms = [encode(text, processor, output=output) for output in ("scipy", "torch", "dense")]
    for row in (*forms, forms[2][0]):
        assert model.explain(row, processor, top_k=top_k) == expected


def test_explain_refuses_what_is_no_row(model, processor):
    with pytest.raises(ValueError, match=r"expected one row of 160 weights; found shape \(2, 160\)"):
        model.explain(torch.rand(2, 160), processor)
    with pytest.raises(ValueError, match="kind must be 'query' or 'document'; found 'passage'"):
        model.explain("a cat", processor, kind="passage")
    with pytest.raises(TypeError, match="expected a text, a scipy sparse row or a tensor; found list"):
        model.explain([0.1] * 160, processor)
