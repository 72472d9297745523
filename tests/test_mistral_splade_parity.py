"""Mistral-SPLADE against numbers of independent implementations, at the tolerances of the fixtures' README."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, MistralConfig, MistralForCausalLM

from rarezoo import MistralSpladeConfig, MistralSpladeForRetrieval, MistralSpladeModel, MistralSpladeProcessor

from .cases import DEVICE

KINDS = ("query", "document", "negative")


@pytest.fixture(scope="module")
def load(splade_checkpoint):
    """`load(attention="sdpa", **fields)`: the fixture's model, some configuration fields replaced; loaded once."""

    @functools.cache
    def load(attention="sdpa", **fields):
        model = AutoModel.from_pretrained(splade_checkpoint, attn_implementation=attention, **fields)
        return model.to(DEVICE).eval()

    return load


@pytest.fixture(scope="module")
def model(load):
    return load()


@pytest.fixture(scope="module")
def plain(fixture_folder):
    return load_file(fixture_folder / "plain.safetensors", device=DEVICE)


@pytest.fixture(scope="module")
def echo(fixture_folder):
    return load_file(fixture_folder / "echo.safetensors", device=DEVICE)


@pytest.fixture(scope="module")
def processor(splade_checkpoint):
    return MistralSpladeProcessor.from_pretrained(splade_checkpoint)


def assert_close(found, expected, tolerance=1e-5):
    assert expected.abs().max() > 0.05  # a comparison of zeros would prove nothing
    torch.testing.assert_close(found, expected.to(found.device), atol=tolerance, rtol=0)


@torch.no_grad()
def represent(model, numbers, padding_side="right", kind=None):
    if kind is None:
        names = {"input_ids": f"input_ids_{padding_side}", "attention_mask": f"attention_mask_{padding_side}"}
    else:
        ending = "_left" if padding_side == "left" else ""
        names = {name: f"{kind}.{name}{ending}" for name in ("input_ids", "attention_mask")}
        names["pool_mask"] = f"{kind}.embed_mask{ending}"
    return model(**{name: numbers[stored] for name, stored in names.items()}).sparse_embedding


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits(splade_checkpoint, plain, attention):
    model = AutoModelForMaskedLM.from_pretrained(splade_checkpoint, attn_implementation=attention).to(DEVICE)
    logits = model(plain["input_ids_right"], plain["attention_mask_right"]).logits
    real = plain["attention_mask_right"].bool()
    assert_close(logits[real], plain["logits_right"][real])


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("expected", "fields"),
    [
        ("rep_max", {}),
        ("rep_sum", {"pooling": "sum"}),
        ("rep_max_log1p_relu", {"activation": "log1p_log1p_relu"}),
        ("rep_max_logit_scale", {"logit_scale": 32**-0.25}),
        ("rep_max_bidirectional", {"attention_mode": "bidirectional"}),
    ],
)
def test_plain_representations(load, plain, padding_side, attention, expected, fields):
    """Every position of the text pooled; padding on either side, which never wins a maximum or enters a sum."""
    model = load(attention, **{"attention_mode": "plain", **fields})
    assert_close(represent(model, plain, padding_side), plain[expected])


@pytest.mark.parametrize("stored", ["as the embeddings", "as the head"])
def test_tied_head(stored, splade_checkpoint, plain, tmp_path):
    """The embeddings as head, with the logit scale that brings them to a logit's size: a checkpoint without a head."""
    shutil.copytree(splade_checkpoint, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    if stored == "as the head":
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    else:
        del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = dict(attention_mode="plain", tie_word_embeddings=True, logit_scale=0.25)
    model, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True, **fields)
    assert not any(report.values()), report
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert_close(represent(model.to(DEVICE), plain), plain["rep_max_head_from_embeddings_x0.25"])


def test_tied_head_in_place_of_a_stored_one(load, plain, tmp_path):
    """`tie_word_embeddings` is a switch: the head that the checkpoint holds gives way."""
    model = load("sdpa", attention_mode="plain", tie_word_embeddings=True, logit_scale=0.25)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_close(represent(model, plain), plain["rep_max_head_from_embeddings_x0.25"])
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_close(represent(AutoModel.from_pretrained(tmp_path).to(DEVICE), plain), represent(model, plain))


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM])
def test_a_missing_head_is_named(auto_class, splade_checkpoint, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(transformers.logging.get_logger("rarezoo"), "propagate", True)
    tied = AutoModel.from_pretrained(splade_checkpoint, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    AutoModel.from_pretrained(splade_checkpoint).model.save_pretrained(tmp_path / "backbone")
    assert "lm_head" not in caplog.text
    for folder, fields in (("tied", {"tie_word_embeddings": False}), ("backbone", {})):
        caplog.clear()
        auto_class.from_pretrained(tmp_path / folder, **fields)
        assert "no lm_head.weight: until it is trained, the head is random" in caplog.text
    assert MistralSpladeModel.from_pretrained(tmp_path / "backbone").config.hidden_size == tied.config.hidden_size


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_echo_representations(load, echo, kind, attention, padding_side):
    assert_close(represent(load(attention), echo, padding_side, kind), echo[f"{kind}.rep_max"])


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_shifted_by_one(load, echo, kind, padding_side):
    """`logit_shift=1` pools the positions whose next token is marked."""
    model = load(logit_shift=1)
    assert_close(represent(model, echo, padding_side, kind), echo[f"{kind}.rep_max_shift1"])


@torch.no_grad()
def test_hidden_states(model, echo):
    found = model.model(echo["document.input_ids"][:2], echo["document.attention_mask"][:2]).last_hidden_state
    real = echo["document.attention_mask"][:2].bool()
    assert_close(found[real], echo["document.last_hidden_state_first2"][real])


def test_scores(model, echo):
    queries, documents = (represent(model, echo, kind=kind) for kind in ("query", "document"))
    assert_close(model.score(queries, documents), echo["scores_qd"])


@pytest.mark.parametrize("head_chunk_size", [1, 7, 159, 160, 1000])
def test_tiles_of_any_size(load, plain, echo, head_chunk_size):
    """Tiles that do not divide the vocabulary: no winner is stored without its tile's offset."""
    model = load(head_chunk_size=head_chunk_size)
    assert_close(represent(model, echo, kind="document"), echo["document.rep_max"])
    model = load(head_chunk_size=head_chunk_size, attention_mode="plain", pooling="sum")
    assert_close(represent(model, plain), plain["rep_sum"])


def test_single_rows(model, echo):
    for kind in KINDS:
        for row in range(3):
            length = int(echo[f"{kind}.attention_mask"][row].sum())
            names = ("input_ids", "attention_mask", "embed_mask")
            alone = {f"{kind}.{name}": echo[f"{kind}.{name}"][row : row + 1, :length] for name in names}
            assert_close(represent(model, alone, kind=kind)[0], echo[f"{kind}.rep_max"][row])


@pytest.mark.parametrize("kind", KINDS)
def test_pooling_the_wrong_tokens_would_be_seen(model, echo, kind):
    """The numbers tell the second copy from the first copy, the prompt or the literals, and see a forgotten </s>."""
    right = echo[f"{kind}.rep_max"]
    pooled, real = echo[f"{kind}.embed_mask"], echo[f"{kind}.attention_mask"]
    last = torch.nn.functional.one_hot(real.sum(dim=1) - 1, real.shape[1])
    for wrong in (real, real - pooled, pooled - last):
        found = represent(model, {**echo, f"{kind}.embed_mask": wrong}, kind=kind)
        assert (found - right).abs().max() > 1e-2


@torch.no_grad()
def test_repeat_mode(load, tokenizer, inputs, echo):
    """Packed copies give each text's own result in any batch; the padded form reproduces what such checkpoints saw."""
    model = load(attention_mode="repeat")
    packed = MistralSpladeProcessor(tokenizer, attention_mode="repeat")
    padded = MistralSpladeProcessor(tokenizer, attention_mode="repeat", pad_between_copies=True)
    documents = inputs["documents"]
    assert_close(model(**padded(documents).to(DEVICE)).sparse_embedding, echo["repeat.rep_max"])
    for padding_side in ("right", "left"):
        batch = packed.process_documents(documents, padding_side=padding_side).to(DEVICE)
        assert_close(model(**batch).sparse_embedding, echo["repeat.rep_max_unbatched"])
    for text, expected in zip(documents, echo["repeat.rep_max_unbatched"]):
        assert_close(model(**packed([text]).to(DEVICE)).sparse_embedding[0], expected)
    assert (echo["repeat.rep_max"] - echo["repeat.rep_max_unbatched"]).abs().max() > 0.2


@pytest.mark.parametrize("kind", ["query", "document"])
@pytest.mark.parametrize("top_k", [None, "fixture"])
def test_sparse_rows(model, processor, inputs, fixture_folder, kind, top_k):
    """Ids and weights of every row, and of its k largest; rows with fewer active entries stay shorter."""
    numbers = load_file(fixture_folder / "sparse.safetensors")
    name, k = ("all", None) if top_k is None else ("topk", int(numbers[f"{kind}.topk_k"]))
    encode = model.encode_queries if kind == "query" else model.encode_documents
    matrix = encode(inputs["queries" if kind == "query" else "documents"], processor, top_k=k)
    rows, entries = matrix.nonzero()
    assert np.array_equal(np.stack([rows, entries], axis=1), numbers[f"{kind}.{name}_indices"].numpy())
    np.testing.assert_allclose(matrix.data, numbers[f"{kind}.{name}_values"].numpy(), atol=1e-5, rtol=0)
    if k is not None:
        assert matrix.nnz / 3 == pytest.approx(float(numbers[f"{kind}.active_dims_mean"]))


def test_stored_top_k_is_the_default(load, processor, inputs, fixture_folder):
    numbers = load_file(fixture_folder / "sparse.safetensors")
    model = load(top_k_query=inputs["top_k_query"], top_k_document=inputs["top_k_document"])
    assert model.encode_queries(inputs["queries"], processor).nnz == len(numbers["query.topk_values"])
    assert model.encode_documents(inputs["documents"], processor).nnz == len(numbers["document.topk_values"])
    assert model.encode_queries(inputs["queries"], processor, top_k=160).nnz == len(numbers["query.all_values"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_of_the_whole_objective(load, echo, fixture_folder, attention):
    """Ranking loss with in-batch and hard negatives plus FLOPS per side, written out: loss, parts and gradients."""
    expected = json.loads((fixture_folder / "losses.json").read_text())
    numbers = load_file(fixture_folder / "loss_grads.safetensors", device=DEVICE)
    model = load(attention)
    sparse = {}
    for kind in KINDS:
        sparse[kind] = model(
            input_ids=echo[f"{kind}.input_ids"],
            attention_mask=echo[f"{kind}.attention_mask"],
            pool_mask=echo[f"{kind}.embed_mask"],
        ).sparse_embedding
        assert_close(sparse[kind].detach(), numbers[f"{kind}.rep_max"])

    candidates = torch.cat([sparse["document"], sparse["negative"]])
    log_probabilities = (sparse["query"] @ candidates.T).log_softmax(dim=1)
    ranking = -log_probabilities.diagonal().mean()
    flops_query = (sparse["query"].abs().mean(dim=0) ** 2).sum()
    flops_document = (candidates.abs().mean(dim=0) ** 2).sum()
    assert ranking.item() == pytest.approx(expected["info_nce_scale_1.0"], abs=1e-5)
    assert flops_query.item() == pytest.approx(expected["flops_query"], abs=1e-5)
    assert flops_document.item() == pytest.approx(expected["flops_document_and_negative"], abs=1e-5)
    loss = ranking + expected["lambda_d"] * flops_document + expected["lambda_q"] * flops_query
    assert loss.item() == pytest.approx(expected["splade_loss_total"], abs=1e-5)

    loss.backward()
    compared = {name.removeprefix("grad."): value for name, value in numbers.items() if name.startswith("grad.")}
    assert len(compared) == 6
    for name, gradient in compared.items():
        found = model.get_parameter(name).grad
        assert (found - gradient).norm() <= 1e-4 * gradient.norm(), name
        torch.testing.assert_close(found, gradient, atol=1e-4 * gradient.abs().max().item(), rtol=0, msg=name)


@torch.no_grad()
def stock_logits(model, input_ids, attention_mask, bidirectional=False):
    """All logits of transformers' own Mistral with the same weights, eager."""
    fields = {name: value for name, value in model.config.to_dict().items() if name in MistralConfig().to_dict()}
    stock = MistralForCausalLM._from_config(MistralConfig(**fields), attn_implementation="eager").to(DEVICE)
    stock.load_state_dict(model.state_dict())
    if bidirectional:
        allowed = (attention_mask[:, None, None, :] != 0).expand(-1, 1, attention_mask.shape[1], -1)
        attention_mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    return stock.eval()(input_ids=input_ids, attention_mask=attention_mask).logits


def reduce_by_hand(logits, pooled, pooling, activation, logit_scale):
    """One entry at a time, from the definitions."""
    weights = np.zeros(logits.shape[1])
    positions = np.flatnonzero(pooled)
    if len(positions) == 0:
        return weights
    values = np.log(1 + np.maximum(logits[positions] * logit_scale, 0))
    if activation == "log1p_log1p_relu":
        values = np.log(1 + values)
    return {"max": values.max(0), "sum": values.sum(0), "mean": values.mean(0), "last": values[-1]}[pooling]


@pytest.mark.parametrize("attention_mode", ["echo", "plain", "bidirectional", "repeat"])
@pytest.mark.parametrize("logit_shift", [0, 1])
@torch.no_grad()
def test_every_combination_equals_the_formula(load, tokenizer, inputs, attention_mode, logit_shift):
    """All modes, poolings, activations and shifts, with padding on both sides, from stock Mistral's logits."""
    model = load(attention_mode=attention_mode, logit_shift=logit_shift, logit_scale=0.6)
    processor = MistralSpladeProcessor(tokenizer, attention_mode=attention_mode)
    right = processor.process_documents(inputs["documents"]).to(DEVICE)
    left = processor.process_documents(inputs["documents"], padding_side="left").to(DEVICE)
    logits = stock_logits(
        model, right["input_ids"], right["attention_mask"], bidirectional=attention_mode == "bidirectional"
    )
    pooled = right["pool_mask"].cpu().numpy()
    if logit_shift:
        pooled = np.concatenate([pooled[:, 1:], np.zeros_like(pooled[:, :1])], axis=1)
    rows = list(zip(logits.cpu().numpy(), pooled))
    for pooling in ("max", "sum", "mean", "last"):
        for activation in ("log1p_relu", "log1p_log1p_relu"):
            model.config.pooling, model.config.activation = pooling, activation
            expected = [reduce_by_hand(row, mask, pooling, activation, logit_scale=0.6) for row, mask in rows]
            for batch in (right, left):
                assert_close(model(**batch).sparse_embedding, torch.tensor(np.stack(expected), dtype=torch.float32))


@torch.no_grad()
def test_head_dim_is_its_own_field():
    """A head width that is not hidden_size / heads, against transformers' own Mistral."""
    torch.manual_seed(0)
    config = MistralSpladeConfig(
        vocab_size=99, hidden_size=30, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=14, initializer_range=0.3, attention_mode="plain",
    )  # fmt: skip
    model = MistralSpladeForRetrieval(config).to(DEVICE).eval()
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (42, 30)
    ids = torch.randint(0, 99, (2, 11), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = stock_logits(model, ids, torch.ones_like(ids)).relu().log1p().amax(dim=1)
    assert_close(model(input_ids=ids).sparse_embedding, expected.float())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_sliding_window(load, echo, attention):
    """The window is applied, by either kernel, to unpadded and padded rows."""
    model = load(attention, sliding_window=6)
    logits = stock_logits(model, echo["document.input_ids"], echo["document.attention_mask"])
    pooled = echo["document.embed_mask"].bool().unsqueeze(-1)
    expected = torch.where(pooled, logits, -1.0).amax(dim=1).relu().log1p()
    assert (expected - echo["document.rep_max"]).abs().max() > 0.05
    assert_close(represent(model, echo, "right", "document"), expected)
    assert_close(represent(model, echo, "left", "document"), expected)
