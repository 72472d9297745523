"""What a tiny language model is worth with another tokenizer, and the measurements that say so."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers.utils import logging

from rarezoo.cli.docstring_corpus import read_docstrings
from rarezoo.cli.tiny_language_model import (
    SPECIAL_TOKENS,
    bits_per_byte,
    context_vectors,
    learn_texts,
    new_language_model,
)
from rarezoo.tokenizer_transplant import transplant_tokenizer
from rarezoo.tokenizer_transplant.supertokens import train_supertokens, train_word_tokens
from rarezoo.training.tokenizer_transplant import only_embeddings_train

BASELINES = ("normal", "randn", "zero", "mean")
INFORMED = {
    "tokenadapt": {},
    "focus": {},
    "ofa": {},
    "omp": {"k": 16},
    "common_interpolation": {"k": 16},
    "landmark_pca": {},
}


@pytest.fixture(autouse=True)
def quiet():
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def texts():
    learned, held_out = read_docstrings(200)
    return learned, [text[:300] for text in held_out[:60]]


def learned_model(tokenizer, texts, hidden_size, steps, seed=0):
    model = new_language_model(tokenizer, hidden_size, seed=seed)
    learn_texts(model, tokenizer, texts, steps, batch_size=8, learning_rate=3e-3, seed=seed)
    return model


@pytest.fixture(scope="module")
def base(texts):
    logging.disable_progress_bar()
    tokenizer = train_word_tokens(texts[0][::2], 500, special_tokens=SPECIAL_TOKENS)
    return learned_model(tokenizer, texts[0], 64, 300), tokenizer


def test_documentation_strings_are_read_once():
    learned, held_out = read_docstrings(40)
    assert (learned, held_out) == read_docstrings(40) and len(set(learned + held_out)) == len(learned) + len(held_out)
    assert min(map(len, learned + held_out)) >= 100 and len(held_out) < len(learned) / 3


def test_bits_per_byte_are_those_of_single_texts(base):
    """One text at a time, in float64, without a batch: log-probabilities of its tokens, added up."""
    model, tokenizer = base
    texts = ["Return the file.", "größer als\n\nnichts", "x"]
    bits = 0.0
    with torch.no_grad():
        for text in texts:
            ids = [tokenizer.eos_token_id, *tokenizer(text).input_ids]
            shares = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            bits -= sum(shares[place, token].item() for place, token in enumerate(ids[1:])) / math.log(2)
    expected = bits / sum(len(text.encode()) for text in texts)
    assert bits_per_byte(model, tokenizer, texts) == pytest.approx(expected, rel=1e-5)
    assert bits_per_byte(model, tokenizer, texts, batch_size=1) == pytest.approx(expected, rel=1e-5)


def test_context_vectors_are_of_the_context():
    """Strings that stand in the same places have the same vectors, whichever tokenizer writes them."""
    texts = [f"the {name} eats {food}. " for name in ("cat", "dog") for food in ("fish", "bread", "meat")] * 30
    texts += ["a b c d e f g h i j k l m n o p. "] * 50
    words, wider = (train_word_tokens(texts, size, special_tokens=SPECIAL_TOKENS) for size in (285, 289))
    vectors = context_vectors(texts, [words, wider], dimensions=4)
    assert {len(vector) for vector in vectors.values()} == {4}
    assert all(np.isfinite(vector).all() for vector in vectors.values())
    assert not {"<|endoftext|>", "Z"} & vectors.keys(), "what does not occur has no vector"

    def cosine(one, other):
        product = vectors[one] @ vectors[other]
        return product / np.linalg.norm(vectors[one]) / np.linalg.norm(vectors[other])

    assert cosine(" cat", " dog") > 0.99 > cosine(" cat", " eats") and abs(cosine(" cat", " k")) < 0.1
    again = context_vectors(texts, [words, wider], dimensions=4)
    assert all(np.array_equal(again[string], vector) for string, vector in vectors.items())


def test_informed_methods_beat_those_that_know_nothing(base, texts):
    """Specification, acceptance 22, of methods that the benchmark found better than all baselines with every seed."""
    model, tokenizer = base
    new = train_word_tokens(texts[0][1::2], 1500, special_tokens=SPECIAL_TOKENS)
    donor = learned_model(new, texts[0], 48, 200, seed=1)
    auxiliary = context_vectors(texts[0], [tokenizer, new])

    def transplanted(method, options=()):
        return transplant_tokenizer(
            copy.deepcopy(model),
            new,
            method,
            base_tokenizer=tokenizer,
            donor=donor,
            auxiliary=auxiliary,
            **dict(options),
        ).model

    bits = {name: bits_per_byte(transplanted(name), new, texts[1]) for name in BASELINES}
    best_baseline = min(bits.values())
    bits |= {name: bits_per_byte(transplanted(name, options), new, texts[1]) for name, options in INFORMED.items()}
    bits["retok"] = bits_per_byte(transplanted("retok"), new, texts[1])
    assert all(bits[name] < min(best_baseline, bits["retok"]) for name in INFORMED), bits
    learning = transplanted("tokenadapt")
    inner = copy.deepcopy(learning.model.layers.state_dict())
    with only_embeddings_train(learning):
        learn_texts(learning, new, texts[0], 100, batch_size=4, learning_rate=1e-3)
    after = bits_per_byte(learning, new, texts[1])
    assert after < bits["tokenadapt"] and after < bits["normal"], (after, bits)
    assert all(torch.equal(weight, inner[name]) for name, weight in learning.model.layers.state_dict().items())


def test_supertokens_from_the_tokens_contexts(base, texts):
    model, tokenizer = base
    new = train_supertokens(texts[0][1::2], 1500, special_tokens=SPECIAL_TOKENS)
    auxiliary = context_vectors(texts[0], [tokenizer, new])
    bits = {}
    for method in (*BASELINES, "tokenadapt", "focus"):
        result = transplant_tokenizer(copy.deepcopy(model), new, method, base_tokenizer=tokenizer, auxiliary=auxiliary)
        bits[method] = bits_per_byte(result.model, new, texts[1])
    assert max(bits["tokenadapt"], bits["focus"]) < min(bits[name] for name in BASELINES), bits
