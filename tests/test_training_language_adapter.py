"""A language added after the fact: its adapter learns from raw text, all else stays bit-identical."""

import functools
import random
from contextlib import nullcontext

import pytest
import torch
from transformers import TrainerCallback, XmodConfig, XmodForMaskedLM, trainer_callback

from rarezoo import ColBERTXMForRetrieval, ColBERTXMProcessor
from rarezoo.training import train_language
from rarezoo.training.language_adapter import masked_language_loss


@pytest.fixture(scope="module")
def folder(colbert_fixtures):
    return colbert_fixtures / "checkpoint"


@pytest.fixture
def model(folder):
    model = ColBERTXMForRetrieval.from_pretrained(folder).eval()
    model.add_language("eu_ES", init_from="en")
    return model


@pytest.fixture(scope="module")
def processor(folder):
    return ColBERTXMProcessor.from_pretrained(folder)


def texts(number=60):
    """Words in a fixed order, from a random beginning: easy to predict."""
    words = "the moon pulls the sea and the cat sat on the mat".split()
    starts = random.Random(0).choices(range(len(words)), k=number)
    return [" ".join((words * 2)[start : start + 8]) for start in starts]


SETTINGS = {"batch_size": 8, "learning_rate": 1e-2, "disable_tqdm": True, "max_length": 20, "logging_steps": 1}


def test_only_the_new_adapter_changes(model, processor):
    model.linear.weight.requires_grad = False
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained_before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    documents = ["the moon pulls the sea", "le chat", "paka"]
    vectors = {code: model.encode_documents(documents, processor, language=code) for code in model.config.languages}
    report = train_language(model, "eu", texts(), processor, steps=40, **SETTINGS)
    assert report["steps"] == 40
    assert report["last_loss"] < report["first_loss"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (".adapter_modules.eu_ES." in name), name
        assert parameter.requires_grad == trained_before[name] and parameter.grad is None
    assert not model.training
    for code, expected in vectors.items():
        found = model.encode_documents(documents, processor, language=code)
        same = all(torch.equal(one, other) for one, other in zip(found, expected))
        assert same == (code != "eu_ES"), code


def test_the_head_of_a_language_model(model, processor, folder, tmp_path):
    base = language_model_like(model)
    base.save_pretrained(tmp_path / "base")
    weights = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    by_model = train_language(model, "eu", texts(), processor, language_model=base, steps=3, **SETTINGS)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in base.named_parameters())
    again = ColBERTXMForRetrieval.from_pretrained(folder)
    again.add_language("eu_ES", init_from="en")
    assert (
        train_language(again, "eu", texts(), processor, language_model=tmp_path / "base", steps=3, **SETTINGS)
        == by_model
    )
    without = ColBERTXMForRetrieval.from_pretrained(folder)
    without.add_language("eu_ES", init_from="en")
    assert train_language(without, "eu", texts(), processor, steps=3, **SETTINGS) != by_model
    wider = language_model_like(model, hidden_size=64)
    with pytest.raises(ValueError, match=r"= \(165, 32\), found \(165, 64\)"):
        train_language(model, "eu", texts(), processor, language_model=wider)
    base.roberta.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"the language model has no head: lm_head\."):
        train_language(model, "eu", texts(), processor, language_model=tmp_path / "headless")


@pytest.mark.parametrize("fails", [False, True])
def test_the_language_model_of_the_caller_is_left_as_it_was(model, processor, folder, fails):
    """Its head shares the embeddings' weights: freezing it freezes those, too, for as long as the training lasts."""
    base = language_model_like(model)
    assert base.lm_head.decoder.weight is base.roberta.embeddings.word_embeddings.weight
    base.train()
    base.lm_head.dense.eval()
    base.lm_head.layer_norm.weight.requires_grad = False
    trained = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    modes = {name: module.training for name, module in base.named_modules()}
    options = {**SETTINGS, "learning_rate": "fast"} if fails else SETTINGS
    with pytest.raises(TypeError) if fails else nullcontext():
        train_language(model, "eu", texts(), processor, language_model=base, steps=2, **options)
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == trained
    assert {name: module.training for name, module in base.named_modules()} == modes


def test_modes_of_the_retriever_s_modules_are_left_as_they_were(model, processor):
    model.train()
    model.roberta.embeddings.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    train_language(model, "eu", texts(), processor, steps=2, **SETTINGS)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_bfloat16_counts_during_training_only(model, processor, folder):
    """Its losses are others; afterwards the vectors of other languages are bit-identical, in float32."""
    before = model.encode_documents(texts(4), processor, language="fr")
    in_bfloat16 = train_language(model, "eu", texts(), processor, steps=3, bf16=True, **SETTINGS)
    found = model.encode_documents(texts(4), processor, language="fr")
    assert all(torch.equal(one, other) for one, other in zip(found, before))
    again = ColBERTXMForRetrieval.from_pretrained(folder)
    again.add_language("eu_ES", init_from="en")
    in_float32 = train_language(again, "eu", texts(), processor, steps=3, **SETTINGS)
    assert in_bfloat16 != in_float32
    assert in_bfloat16["first_loss"] == pytest.approx(in_float32["first_loss"], rel=0.02)


def test_a_loss_that_is_not_finite_ends_the_training(model, processor):
    with pytest.raises(FloatingPointError, match=r"the loss became (nan|inf) at step \d+\. Continue"):
        train_language(model, "eu", texts(), processor, steps=20, **{**SETTINGS, "learning_rate": 1e30})


def test_accumulated_batches_are_averaged(model, processor, folder):
    """Not added up: the loss, and with it the clipping of gradients, is that of one batch."""
    plain = train_language(model, "eu", texts(), processor, steps=1, **SETTINGS)
    again = ColBERTXMForRetrieval.from_pretrained(folder)
    again.add_language("eu_ES", init_from="en")
    accumulated = train_language(again, "eu", texts(), processor, steps=1, gradient_accumulation_steps=4, **SETTINGS)
    assert accumulated["first_loss"] == pytest.approx(plain["first_loss"], rel=0.3)


def test_pieces_are_as_long_as_the_model_takes(model, processor):
    """128 positions here; by default, pieces of 256 tokens."""
    settings = {name: value for name, value in SETTINGS.items() if name != "max_length"}
    report = train_language(model, "eu", [" ".join(texts(60))], processor, steps=2, **settings)
    assert report["steps"] == 2


def test_of_short_texts_too_something_is_masked(model, processor):
    """Of a batch of one token, 15 % is mostly nothing: the adapter would be as before, and the loss 0."""
    for seed in range(4):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        report = train_language(model, "eu", ["sea", "", " "], processor, steps=2, seed=seed, **SETTINGS)
        assert report["first_loss"] > 0 and report["last_loss"] > 0
        assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_nothing_is_printed_but_a_progress_bar(model, processor, monkeypatch, capfd):
    shown_bar = functools.partial(trainer_callback.tqdm, disable=False)
    monkeypatch.setattr(trainer_callback, "tqdm", shown_bar)
    train_language(model, "eu", texts(), processor, steps=3, **{**SETTINGS, "disable_tqdm": False})
    shown = capfd.readouterr()
    assert shown.out == "" and "loss" in shown.err and "3/3" in shown.err


def language_model_like(model, **fields):
    """An X-MOD language model of the retriever's sizes."""
    shape = {name: getattr(model.config, name) for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings", "languages", "default_language", "type_vocab_size",
    )}  # fmt: skip
    torch.manual_seed(0)
    return XmodForMaskedLM(XmodConfig(**{**shape, **fields}))


def test_loss_against_all_logits_at_once():
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True)
    embeddings = torch.nn.Embedding(11, 8, dtype=torch.float64)
    labels = torch.where(torch.rand(3, 7) < 0.5, torch.randint(0, 11, (3, 7)), -100)
    logits = hidden @ embeddings.weight.T
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    (gradient,) = torch.autograd.grad(expected, hidden)
    loss = masked_language_loss(hidden, labels, None, embeddings, chunk_size=2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], gradient, rtol=1e-5, atol=1e-7)
    nothing = masked_language_loss(hidden, torch.full((3, 7), -100), None, embeddings)
    assert nothing.item() == 0 and nothing.requires_grad


def test_an_interrupted_run_goes_on(model, processor, folder, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

    def run(output_dir, *callbacks):
        retriever = ColBERTXMForRetrieval.from_pretrained(folder)
        retriever.add_language("eu_ES", init_from="en")
        with pytest.MonkeyPatch.context() as patch:
            if callbacks:
                from rarezoo.training import language_adapter

                build = language_adapter._AdapterTrainer
                patch.setattr(
                    language_adapter, "_AdapterTrainer", lambda **options: build(callbacks=list(callbacks), **options)
                )
            train_language(retriever, "eu", texts(), processor, steps=20, output_dir=output_dir, **SETTINGS)
        return retriever.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", Stop())
    parts = run(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("code", "given", "options", "message"),
    [
        ("xx", ["a"], {}, "no adapter for the language 'xx'"),
        ("eu", [], {}, "needs texts"),
        ("eu", ["a", 3], {}, "needs texts"),
        ("eu", ["", " \n"], {}, "all 2 are blank: there is no token to mask"),
        ("eu", ["a"], {"masked_share": 0.0}, "masked_share must be above 0 and at most 1, found 0.0"),
        ("eu", ["a"], {"steps": 0}, "steps must be at least 1"),
        ("eu", ["a"], {"max_length": 2}, "max_length must be at least 3"),
    ],
)
def test_errors(model, processor, code, given, options, message):
    with pytest.raises(ValueError, match=message):
        train_language(model, code, given, processor, **options)
