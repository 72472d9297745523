"""The decipher probe on a toy language of three symbols that differ only in how often they repeat: precision rises with
the context, and names of cipher symbols do not matter."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rarezoo.lexinvariant import (
    Cipher,
    Decipherment,
    DecipherProbe,
    LexinvariantConfig,
    LexinvariantForCausalLM,
    make_cipher,
)
from rarezoo.lexinvariant.decipher_probe import DecipherHead

LENGTH, VOCAB = 96, 3
STAYS = torch.tensor([0.0, 0.6, 0.9])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def toy_texts(count, generator):
    """Symbol i is followed by itself with the probability STAYS[i]; all three are about equally frequent."""
    symbol = torch.randint(VOCAB, (count,), generator=generator)
    texts = [symbol]
    for _ in range(LENGTH - 1):
        other = torch.multinomial(1 - STAYS, count, replacement=True, generator=generator)
        symbol = torch.where(torch.rand(count, generator=generator) < STAYS[symbol], symbol, other)
        texts.append(symbol)
    return torch.stack(texts, dim=1)


def toy_model(**fields):
    torch.manual_seed(0)
    return LexinvariantForCausalLM(
        LexinvariantConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=16,
            intermediate_size=64,
            initialization="mimetic",
            key_smear=True,
            attn_scale_init=8.0,
            **fields,
        )
    )


@pytest.fixture(scope="module")
def probe():
    """A model and a probe after seconds of training."""
    model, generator = toy_model(table="canonical", canonical_size=8), seeded()
    corpus = toy_texts(300, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        batch = corpus[torch.randint(300, (16,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.manual_seed(0)
    return DecipherProbe.fit(
        model,
        corpus,
        steps=200,
        sequence_length=LENGTH,
        batch_size=16,
        learning_rate=3e-3,
        generator=generator,
        progress=False,
    )


def test_precision_rises_with_the_context(probe):
    generator = seeded(1)
    texts = toy_texts(40, generator)
    found = []
    for text in texts:
        cipher = make_cipher(VOCAB, generator=generator)
        found.append(probe.decipher(cipher.encipher(text), window=16).window_precision(cipher))
    first, *_, last = torch.tensor(found).mean(0).tolist()
    assert len(found[0]) == 6 and last > first + 0.15 and last > 0.6


def test_many_texts_under_one_key_decide_it(probe):
    cipher = make_cipher(VOCAB, generator=seeded(4))
    assert cipher.permutation.tolist() != list(range(VOCAB))
    enciphered = cipher.encipher(toy_texts(40, seeded(5)))
    found = probe.decipher(enciphered, window=16)
    assert found.precision(cipher) == found.window_precision(cipher)[-1] == 1.0
    assert found.key == dict(enumerate(cipher.inverse.tolist()))
    assert found.precision({0: 0, 1: 1, 2: 2}) < 1.0


def test_names_of_cipher_symbols_do_not_matter(probe):
    """To a canonical table: relabelled ciphertexts give the same numbers for the relabelled symbols."""
    texts, cipher = toy_texts(6, seeded(6)), Cipher(torch.tensor([2, 0, 1]))
    before, after = probe.decipher(texts, 20), probe.decipher(cipher.encipher(texts), 20)
    for name in ("counts", "votes", "posterior"):
        assert torch.equal(getattr(after, name)[:, cipher.permutation], getattr(before, name))
    assert after.key == {int(cipher.permutation[symbol]): plain for symbol, plain in before.key.items()}


def test_the_head_sees_hidden_states_and_nothing_else(probe, monkeypatch):
    """And the model is not told the key: what it reads are cipher symbols, under another key and table in every row."""
    assert list(inspect.signature(probe.head.forward).parameters) == ["hidden"]
    seen, read = [], []
    forward, hidden_states = DecipherHead.forward, DecipherProbe.hidden_states
    monkeypatch.setattr(DecipherHead, "forward", lambda self, *given: (seen.append(given), forward(self, *given))[1])
    monkeypatch.setattr(
        DecipherProbe,
        "hidden_states",
        lambda self, *ids, **given: (read.append((ids, given)), hidden_states(self, *ids, **given))[1],
    )
    model = toy_model(table="gaussian")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    corpus = torch.arange(VOCAB).repeat(20)
    DecipherProbe.fit(model, corpus, steps=3, sequence_length=12, batch_size=30, generator=seeded(), progress=False)
    assert all(len(given) == 1 and given[0].shape == (30, 12, 32) and not given[0].requires_grad for given in seen)
    for (enciphered,), given in read:
        assert list(given) == ["lex_seeds"] and len(set(given["lex_seeds"].tolist())) == 30
        # The corpus counts 0, 1, 2, 0, …; under six keys both directions occur.
        assert {int(step) for step in (enciphered[:, 1] - enciphered[:, 0]) % 3} == {1, 2}
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- arithmetic of the read-out, on a model whose hidden states are known ---------------------------------------------


class Onehot(nn.Module):
    """Hidden states that are one-hot vectors of the symbols."""

    config = SimpleNamespace(hidden_size=5, vocab_size=5, exempt_token_ids=[])
    device = "cpu"

    @property
    def base_model(self):
        return lambda input_ids, **given: SimpleNamespace(last_hidden_state=nn.functional.one_hot(input_ids, 5).float())


class Rigged(DecipherHead):
    """Gives each row of `answers`, one after the other, whatever the hidden states."""

    def __init__(self, answers):
        super().__init__(5, 5, 2)
        self.answers = answers

    def forward(self, hidden):
        return self.answers[: len(hidden)]


def test_windows_and_votes_are_those_of_a_loop():
    ids = torch.randint(1, 4, (3, 23), generator=seeded())
    mask = torch.ones_like(ids)
    mask[1, :6], mask[2, 15:] = 0, 0
    answers = torch.randn(3, 23, 5, generator=seeded())
    found = DecipherProbe(Onehot(), Rigged(answers)).decipher(ids, window=7, attention_mask=mask)
    assert found.symbols.tolist() == [1, 2, 3] and found.counts.shape == (3, 3)
    for window, (start, stop) in enumerate([(0, 7), (7, 14), (14, 23)]):
        for row, symbol in enumerate([1, 2, 3]):
            chosen = [
                answers[b, t].softmax(-1)
                for b in range(3)
                for t in range(23)
                if mask[b, t] and ids[b, t] == symbol and start <= int(mask[b, :t].sum()) < stop
            ]
            assert found.counts[window, row] == len(chosen) > 0
            chosen = torch.stack(chosen)
            torch.testing.assert_close(found.posterior[window, row], chosen.mean(0))
            assert found.votes[window, row].tolist() == chosen.argmax(-1).bincount(minlength=5).tolist()


def test_majorities_and_what_decides_between_equal_votes():
    votes = torch.tensor([[[2, 1, 0], [1, 1, 0]], [[0, 2, 0], [0, 0, 0]]])
    posterior = torch.tensor([[[0.1, 0.9, 0.0], [0.4, 0.5, 0.1]], [[0.2, 0.8, 0.0], [0.0, 0.0, 0.0]]])
    found = Decipherment(torch.tensor([4, 7]), votes.sum(-1), votes, posterior)
    assert found.window_keys == [{4: 0, 7: 1}, {4: 1}]
    assert found.key == {4: 1, 7: 1}
    assert found.precision({4: 1, 7: 2}) == 0.5 and found.window_precision({4: 0, 7: 1}) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"no plain symbol for the cipher symbols \[7\]"):
        found.precision({4: 1})


# --- files and bad input ----------------------------------------------------------------------------------------------


def test_saved_and_loaded(probe, tmp_path):
    path = tmp_path / "probe.safetensors"
    probe.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["probe.safetensors"]
    assert set(load_file(path)) == set(probe.head.state_dict()), "nothing of the model"
    texts = toy_texts(3, seeded())
    assert torch.equal(DecipherProbe.load(path, probe.model).decipher(texts).posterior, probe.decipher(texts).posterior)
    with pytest.raises(ValueError, match="the head reads 32 numbers, but the model's hidden_size is 5"):
        DecipherProbe.load(path, Onehot())
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="holds no decipher probe"):
        DecipherProbe.load(other, probe.model)
    other.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        DecipherProbe.load(other, probe.model)


def test_bad_input(probe):
    fit = {"steps": 1, "sequence_length": 8, "batch_size": 2, "progress": False}
    with pytest.raises(ValueError, match=r"sequence of 8; found 1, 2 and a corpus of \(7,\)"):
        DecipherProbe.fit(probe.model, torch.zeros(7, dtype=torch.int64), **fit)
    with pytest.raises(ValueError, match=r"0\.\.2; found 3"):
        DecipherProbe.fit(probe.model, torch.full((9,), 3), **fit)
    with pytest.raises(ValueError, match=r"0\.\.2; found -1"):
        probe.decipher(torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="window must be at least 1"):
        probe.decipher(torch.tensor([0, 1]), window=0)
    with pytest.raises(ValueError, match="with real symbols"):
        probe.decipher(torch.tensor([0, 1]), attention_mask=torch.tensor([0, 0]))
