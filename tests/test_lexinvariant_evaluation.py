"""Perplexity by position against loops over single sequences; alpha-covariance: exactly 1 for canonical tables."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rarezoo.lexinvariant import LexinvariantConfig, LexinvariantForCausalLM, alpha_covariance, position_curve
from rarezoo.lexinvariant.collapsed_readout import CollapsedDistribution
from rarezoo.lexinvariant.evaluation import greedy_continuation, random_relabelling

FIXTURES = Path(__file__).parent / "fixtures" / "lexinvariant"
VOCAB = 23


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_model(**fields):
    torch.manual_seed(0)
    fields = {"vocab_size": VOCAB, "canonical_size": 64, **fields}
    return LexinvariantForCausalLM(
        LexinvariantConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=16,
            intermediate_size=64,
            **fields,
        )
    )


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=1, n_head=2))


def symbols(*shape, vocab_size=VOCAB):
    return torch.randint(vocab_size, shape, generator=seeded())


# --- losses and curves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["default", "t5style", "strict"])
@torch.no_grad()
def test_token_losses_are_the_fixtures(tag):
    fields = json.loads((FIXTURES / f"config_{tag}.json").read_text(encoding="utf-8"))
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
    model = LexinvariantForCausalLM(LexinvariantConfig(**fields)).eval()
    model.load_state_dict(load_file(FIXTURES / f"model_{tag}.safetensors"))
    plain, padding = (load_file(FIXTURES / f"{tag}_{kind}.safetensors") for kind in ("plain", "padding"))
    losses, counted = model.token_losses(plain["input_ids"], embedding_table=plain["embedding_tables"])
    torch.testing.assert_close(losses, plain["token_nll"], atol=1e-5, rtol=0)
    assert counted.all()
    for side in ("left", "right"):
        ids, mask = padding[f"{side}.input_ids"], padding[f"{side}.attention_mask"]
        losses, counted = model.token_losses(ids, mask, embedding_table=plain["embedding_tables"])
        torch.testing.assert_close(losses, padding[f"{side}.token_nll"], atol=1e-5, rtol=0)
        torch.testing.assert_close(losses.sum() / counted.sum(), padding[f"{side}.loss"][0], atol=1e-5, rtol=0)


@torch.no_grad()
def losses_one_by_one(model, text, **inputs):
    """Of one unpadded text, from full logits: the loss of every symbol but the first."""
    model.eval()
    probabilities = model(input_ids=text[None], use_cache=False, **inputs).logits[0].double().log_softmax(-1)
    return [-float(probabilities[t, text[t + 1]]) for t in range(len(text) - 1)]


MODELS = {
    "sampled": lambda: small_model(table="gaussian"),
    "collapsed": lambda: small_model(table="gaussian", unseen_logits="collapsed"),
    "canonical": lambda: small_model(table="canonical"),
    "learned": lambda: small_model(table="learned"),
    "gpt2": gpt2,
}


@pytest.mark.parametrize("average", ["loss", "perplexity"])
@pytest.mark.parametrize(
    ("kind", "side"),
    # GPT-2 has absolute positions: padded on the left, it reads another text.
    [(kind, side) for kind in MODELS for side in (None, "left", "right") if (kind, side) != ("gpt2", "left")],
)
def test_curve_is_that_of_a_loop(kind, side, average):
    model, window = MODELS[kind](), 6
    texts = [row[:length] for row, length in zip(symbols(5, 20), (20, 17, 20, 9, 20) if side else [20] * 5)]
    ids, mask = torch.full((5, 20), 3), torch.zeros(5, 20, dtype=torch.int64)
    for row, real, text in zip(ids, mask, texts):
        place = slice(20 - len(text), 20) if side == "left" else slice(0, len(text))
        row[place], real[place] = text, 1
    seeds = [{"lex_seeds": torch.tensor([10 + i])} if kind != "gpt2" else {} for i in range(5)]
    losses = [losses_one_by_one(model, text, **seed) for text, seed in zip(texts, seeds)]
    expected = []
    for start in range(20 - window):
        parts = [row[start : start + window] for row in losses]
        if average == "loss":
            expected.append(math.exp(sum(map(sum, parts)) / sum(map(len, parts))))
        else:
            full = [math.exp(sum(part) / window) for part in parts if len(part) == window]
            expected.append(sum(full) / len(full))
    lex_seeds = None if kind == "gpt2" else torch.arange(10, 15)
    for batch_size in (2, 16):
        curve = position_curve(
            model,
            ids,
            window,
            attention_mask=None if side is None else mask,
            lex_seeds=lex_seeds,
            average=average,
            batch_size=batch_size,
        )
        assert curve.context.tolist() == list(range(1, 21 - window)) and curve.window == window
        torch.testing.assert_close(curve.perplexity, torch.tensor(expected, dtype=torch.float64), atol=0, rtol=1e-4)
        assert curve.counts.tolist() == [sum(len(row) > i for row in losses) for i in range(19)]
        middle = [loss for row in losses for loss in row[4:12]]
        assert curve.between(4, 12) == pytest.approx(math.exp(sum(middle) / len(middle)), rel=1e-4)


def test_a_window_lies_in_one_sequence():
    """The first points know nothing of what stands later, nor of other sequences."""
    model, ids = small_model(table="canonical"), symbols(4, 24)
    changed = ids.clone()
    changed[:, 16:] = changed[:, 16:].flip(0, 1)
    before, after = (position_curve(model, part, window=5).perplexity for part in (ids, changed))
    assert torch.equal(before[:11], after[:11]) and not torch.equal(before[11:], after[11:])
    alone = torch.stack([position_curve(model, row[None], window=24 - 1).perplexity for row in ids])
    together = position_curve(model, ids, window=24 - 1).perplexity
    torch.testing.assert_close(alone.log().mean(0).exp(), together, atol=0, rtol=1e-6)


def test_nothing_of_the_size_of_the_vocabulary(monkeypatch):
    monkeypatch.setattr(CollapsedDistribution, "full_logits", None)
    model = small_model(table="gaussian", unseen_logits="collapsed", vocab_size=10**6, final_norm_init=0.01)
    curve = position_curve(model, symbols(3, 12, vocab_size=10**6), window=4)
    torch.testing.assert_close(curve.perplexity, torch.full((8,), 1e6, dtype=torch.float64), rtol=0.02, atol=0)


def test_tables_and_averages_of_them():
    model, ids = small_model(table="gaussian"), symbols(4, 24)
    first, second = (position_curve(model, ids, 8, lex_seeds=torch.arange(i, i + 4)).perplexity for i in (0, 4))
    assert torch.equal(position_curve(model, ids, 8).perplexity, first) and not torch.equal(first, second)
    # Of averaged probabilities the loss lies below the average loss.
    several = position_curve(model, ids, 8, num_tables=16)
    assert several.between(0, 23) < position_curve(model, ids, 8).between(0, 23)


def test_the_model_trains_on():
    model = small_model(table="gaussian", dropout=0.5).train()
    state = torch.get_rng_state()
    curves = [position_curve(model, symbols(2, 12), 4).perplexity for _ in range(2)]
    assert torch.equal(*curves) and model.training and torch.equal(state, torch.get_rng_state())


def test_bad_curves():
    model, ids = small_model(), symbols(2, 10)
    with pytest.raises(ValueError, match="a window of 10 predictions needs 11 symbols; found at most 10"):
        position_curve(model, ids, 10)
    with pytest.raises(ValueError, match="window must be at least 1"):
        position_curve(model, ids, 0)
    with pytest.raises(ValueError, match=r"shape \(sequences, length\)"):
        position_curve(model, ids[0], 3)
    with pytest.raises(ValueError, match="'loss' or 'perplexity'; found 'mean'"):
        position_curve(model, ids, 3, average="mean")
    with pytest.raises(ValueError, match=r"shape \(2, 10\); found \(2, 9\)"):
        position_curve(model, ids, 3, attention_mask=torch.ones(2, 9))
    with pytest.raises(ValueError, match="for lexinvariant models; found GPT2LMHeadModel"):
        position_curve(gpt2(), ids, 3, num_tables=2)
    with pytest.raises(ValueError, match="lex_seeds must be int64"):
        position_curve(model, ids, 3, lex_seeds=torch.zeros(2))
    with pytest.raises(ValueError, match="no predictions between the positions 9 and 12"):
        position_curve(model, ids, 3).between(9, 12)


# --- alpha-covariance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"learned_table": True, "key_smear": True}, {"exempt_token_ids": [2, 5]}])
@pytest.mark.parametrize("max_new_tokens", [0, 1, 6])
def test_canonical_tables_are_invariant_bit_for_bit(fields, max_new_tokens):
    model = small_model(table="canonical", **fields)
    with torch.no_grad():  # continuations that change, with symbols that are new
        model.model.norm.weight.neg_()
        if model.config.learned_table:
            model.model.embed_tokens.weight[-1] *= 6
    prompts = symbols(1, 6) if max_new_tokens else symbols(2, 14)
    # Tokens, unlike bits, may come from a batch.
    batch = 1 if max_new_tokens < 2 or model.config.learned_table else 20
    found = alpha_covariance(model, prompts, 100, max_new_tokens=max_new_tokens, batch_size=batch, generator=seeded())
    assert found == 1.0
    if max_new_tokens > 1:
        continuation = set(greedy_continuation(model.eval(), prompts, max_new_tokens)[0].tolist())
        assert len(continuation) > 1
        assert not model.config.learned_table or continuation - set(prompts[0].tolist())


def test_ordinary_and_random_tables_are_not():
    prompt = symbols(14)
    for table in ("learned", "gaussian"):
        assert alpha_covariance(small_model(table=table), prompt, 20, generator=seeded()) == 0.0
        assert alpha_covariance(small_model(table=table), prompt, 20, max_new_tokens=8, generator=seeded()) < 0.9
    assert alpha_covariance(gpt2(), prompt, 20, generator=seeded(), batch_size=20) == 0.0
    assert alpha_covariance(gpt2(), prompt, 20, max_new_tokens=4, generator=seeded()) < 0.9


class ByParity(nn.Module):
    """Copies the last symbol, with a score that tells whether its number is odd: two outputs under all relabelings."""

    config, device = SimpleNamespace(vocab_size=10), "cpu"

    def forward(self, input_ids, **kwargs):
        last = nn.functional.one_hot(input_ids, 10) * (1 + input_ids % 2)[..., None]
        return SimpleNamespace(logits=last.float())


@pytest.mark.parametrize(("n", "batch_size"), [(2, 1), (50, 1), (50, 7)])
def test_formula(n, batch_size):
    parities = [random_relabelling(10, generator=generator)[4] % 2 for generator in [seeded()] for _ in range(n)]
    expected = 1 - (len(set(map(int, parities))) - 1) / (n - 1)
    found = alpha_covariance(ByParity(), torch.tensor([4]), n, generator=seeded(), batch_size=batch_size)
    assert found == expected
    assert alpha_covariance(ByParity(), torch.tensor([4]), n, fixed_ids=[4]) == 1.0
    assert alpha_covariance(ByParity(), torch.tensor([4]), n, max_new_tokens=1) == 1.0, "it copies in all cases"


def test_padding_is_no_part_of_a_prompt():
    model = small_model(table="gaussian")
    prompt, mask = symbols(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    found = alpha_covariance(model, prompt, 20, attention_mask=mask, max_new_tokens=2, generator=seeded())
    generator = seeded()
    parts = [
        alpha_covariance(model, part, 20, max_new_tokens=2, generator=generator) for part in (prompt[0, 5:], prompt[1])
    ]
    assert found == sum(parts) / 2


def test_relabelings():
    names = random_relabelling(50, [3, 40], seeded())
    assert sorted(names.tolist()) == list(range(50)) and names[3] == 3 and names[40] == 40
    assert (names != torch.arange(50)).sum() > 40


def test_bad_relabelings():
    model, prompt = small_model(), symbols(5)
    with pytest.raises(ValueError, match="n must be at least 2"):
        alpha_covariance(model, prompt, 1)
    with pytest.raises(ValueError, match=r"shape \(length,\) or \(prompts, length\)"):
        alpha_covariance(model, prompt[None, None])
    with pytest.raises(ValueError, match=r"fixed_ids must lie in 0\.\.22; found \[-1, 4\]"):
        alpha_covariance(model, prompt, fixed_ids=[4, -1])
    with pytest.raises(ValueError, match=r"shape \(5,\); found \(4,\)"):
        alpha_covariance(model, prompt, attention_mask=torch.ones(4))
