"""Generation: one table per text, a history that follows the cache, and no preference among symbols never met."""

import copy
from collections import Counter

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from rarezoo import LexinvariantConfig, LexinvariantForCausalLM
from rarezoo.lexinvariant.equal_scores import CUTTING_WARPERS, BreakTies, InSeededOrder
from rarezoo.lexinvariant.modeling_lexinvariant import Symbols, resolve_table
from rarezoo.lexinvariant.symbol_rows import random_rows, uniform_numbers
from rarezoo.lexinvariant.symbol_tables import StoredTable

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8, intermediate_size=32)
KINDS = {
    "sampled": dict(),
    "collapsed": dict(unseen_logits="collapsed"),
    "orthonormal": dict(table="orthonormal", unseen_logits="collapsed"),
    "canonical": dict(table="canonical", canonical_size=40),
    "canonical_learned": dict(table="canonical", canonical_size=40, learned_table=True),
    "exempt": dict(unseen_logits="collapsed", exempt_token_ids=[0, 7]),
    "exempt_orthonormal": dict(table="orthonormal", unseen_logits="collapsed", exempt_token_ids=[0, 7]),
    "permuted": dict(table="permuted"),
    "mixed": dict(table="mixed"),
    "smeared": dict(unseen_logits="collapsed", key_smear=True, initialization="mimetic"),
    "strict": dict(unseen_logits="collapsed", attend_self=False),
    "learned": dict(table="learned"),
}
SEEDS = torch.tensor([5, 2**40 + 1, -3])


def build(kind: str, vocab_size: int = 50, **overrides) -> LexinvariantForCausalLM:
    torch.manual_seed(0)
    model = LexinvariantForCausalLM(LexinvariantConfig(vocab_size=vocab_size, **{**SIZES, **KINDS[kind], **overrides}))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.relative_attention_bias.weight.normal_()
            layer.mlp.down_proj.weight.mul_(3)
    return model.eval()


def prompts(length: int = 8, symbols: int = 12) -> torch.Tensor:
    return torch.randint(1, symbols, (3, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_through_the_cache_give_what_the_whole_gives(kind):
    model, ids = build(kind), prompts(30, 50)
    whole = model(ids, lex_seeds=SEEDS).logits
    cache = DynamicCache(config=model.config)
    pieces = [
        model(ids[:, start:end], lex_seeds=SEEDS, past_key_values=cache, use_cache=True).logits
        for start, end in ((0, 11), (11, 12), (12, 20), (20, 30))
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cropped_reordered_and_repeated_cache_keeps_its_history(kind):
    model, ids = build(kind), prompts(20, 50)
    cache = DynamicCache(config=model.config)
    model(ids[:, :12], lex_seeds=SEEDS, past_key_values=cache, use_cache=True)
    model(ids[:, 12:16].flip(1), lex_seeds=SEEDS, past_key_values=cache, use_cache=True)
    cache.crop(-4)
    order = torch.tensor([2, 0])
    cache.reorder_cache(order)
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    rows = order.repeat_interleave(2)
    found = model(ids[rows, 12:], lex_seeds=SEEDS[rows], past_key_values=cache, use_cache=True).logits
    expected = model(ids[rows], lex_seeds=SEEDS[rows]).logits[:, 12:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_batch_padding_or_the_future(kind):
    model, ids = build(kind), prompts(20, 50)
    together = model(ids, lex_seeds=SEEDS).logits
    alone = torch.cat([model(ids[i : i + 1], lex_seeds=SEEDS[i : i + 1]).logits for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[:, :4] = 0
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], dim=1)
    left = model(padded, attention_mask=mask, lex_seeds=SEEDS).logits[:, 4:]
    torch.testing.assert_close(left, together, rtol=0, atol=1e-5)
    changed = ids.clone()
    changed[:, 12:] = prompts(20, 50).flip(1)[:, 12:]
    torch.testing.assert_close(model(changed, lex_seeds=SEEDS).logits[:, :12], together[:, :12], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(num_beams=4),
        dict(num_beams=4, num_return_sequences=3),
        dict(do_sample=True, num_return_sequences=3),
        dict(do_sample=True, top_k=4, temperature=0.7),
        dict(do_sample=True, top_p=0.5),
        dict(do_sample=True, typical_p=0.5),
        dict(do_sample=True, num_beams=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["sampled", "collapsed", "orthonormal", "canonical", "smeared"])
def test_generation_is_the_same_with_and_without_cache(kind, options):
    model, texts = build(kind), []
    for use_cache in (True, False, True):
        torch.manual_seed(2)
        texts.append(model.generate(prompts(), lex_seeds=SEEDS, max_new_tokens=10, use_cache=use_cache, **options))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("kind", ["sampled", "collapsed", "canonical"])
def test_generation_does_not_depend_on_the_batch_or_on_left_padding(kind):
    model, ids = build(kind), prompts()
    expected = model.generate(ids, lex_seeds=SEEDS, max_new_tokens=10, num_beams=3)
    mask = torch.ones(3, 8 + 3, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([torch.full((3, 3), 9), ids], dim=1)
    found = model.generate(padded, attention_mask=mask, lex_seeds=SEEDS, max_new_tokens=10, num_beams=3)
    assert torch.equal(found[:, 3:], expected)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(
            model.generate(ids[one], lex_seeds=SEEDS[one], max_new_tokens=10, num_beams=3), expected[one]
        )


@pytest.mark.parametrize("kind", ["sampled", "collapsed", "canonical", "smeared"])
def test_assisted_decoding_gives_the_greedy_text(kind):
    model, ids = build(kind), prompts()[:1]
    expected = model.generate(ids, lex_seeds=SEEDS[:1], max_new_tokens=20)
    found = model.generate(ids, lex_seeds=SEEDS[:1], max_new_tokens=20, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


def test_one_table_in_every_mode_and_without_seeds():
    model, ids = build("sampled"), prompts()
    assert torch.equal(model.generate(ids, max_new_tokens=8), model.generate(ids, max_new_tokens=8, use_cache=False))
    model.train()
    torch.manual_seed(3)
    cached = model.generate(ids, max_new_tokens=8)
    torch.manual_seed(3)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=8, use_cache=False))


@pytest.mark.parametrize("shape", [(50, 16), (3, 50, 16)], ids=["shared", "own"])
def test_beams_leave_a_given_table_alone(shape):
    model, ids = build("collapsed"), prompts()
    table = torch.randn(*shape, generator=torch.Generator().manual_seed(4))
    before = table.clone()
    cached = model.generate(ids, embedding_table=table, num_beams=4, max_new_tokens=8)
    assert torch.equal(
        cached, model.generate(ids, embedding_table=table, num_beams=4, max_new_tokens=8, use_cache=False)
    )
    assert torch.equal(table, before)


@pytest.mark.parametrize("kind", ["sampled", "collapsed", "orthonormal"])
def test_several_tables_share_a_cache(kind):
    model, ids = build(kind), prompts()
    whole = model(ids, lex_seeds=SEEDS, num_tables=3).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], lex_seeds=SEEDS, num_tables=3, past_key_values=cache, use_cache=True)
    rest = model(ids[:, 5:], lex_seeds=SEEDS, num_tables=3, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=0, atol=1e-5)
    options = dict(lex_seeds=SEEDS, num_tables=3, num_beams=3, max_new_tokens=8)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_every_unseen_symbol_is_equally_likely_to_be_chosen():
    """1,500 seeds, 48 unseen symbols: a chi-squared statistic of 47 degrees of freedom, within 4 deviations."""
    scores = torch.full((1500, 50), 0.5)
    scores[:, :2] = -1.0
    chosen = Counter(BreakTies(torch.arange(1500), 1)(torch.zeros(1500, 1), scores).argmax(1).tolist())
    assert not {0, 1} & set(chosen)
    statistic = sum((chosen[symbol] - 1500 / 48) ** 2 / (1500 / 48) for symbol in range(2, 50))
    assert statistic < 47 + 4 * (2 * 47) ** 0.5


@pytest.mark.parametrize("beams", [1, 4])
def test_greedy_texts_and_beams_take_unseen_symbols_by_seed(beams):
    model = build("collapsed", vocab_size=500)
    with torch.no_grad():
        model.model.norm.weight.mul_(3)  # the longer the hidden state, the likelier is what has not been met
    first = Counter(
        int(
            model.generate(torch.tensor([[0, 1]]), lex_seeds=torch.tensor([seed]), max_new_tokens=1, num_beams=beams)[
                0, 2
            ]
        )
        for seed in range(80)
    )
    unseen = [symbol for symbol in first if symbol > 1]
    assert len(unseen) > 20, "the model is meant to prefer symbols that it has not met"
    assert sum(unseen) / len(unseen) > 100, "low numbers are preferred"


@torch.no_grad()
def test_without_seeds_the_order_of_unseen_symbols_is_that_of_eval_seed():
    model, ids = build("collapsed", vocab_size=500), torch.tensor([[0, 1]])
    model.model.norm.weight.mul_(3)
    for seed in (0, 9):
        model.config.eval_seed = seed
        found = model.generate(ids, max_new_tokens=1)
        assert torch.equal(found, model.generate(ids, lex_seeds=torch.tensor([seed]), max_new_tokens=1))
        assert found[0, 2] > 2, "the lowest number of those that score the same"


@pytest.mark.parametrize("options", [dict(top_p=0.3), dict(typical_p=0.3)], ids=str)
@torch.no_grad()
def test_sampling_from_a_part_of_the_symbols_has_no_favourites(options):
    """80 texts of one batch; of 498 unseen symbols, the lowest third would be all that is kept without seeds."""
    model = build("collapsed", vocab_size=500)
    model.model.norm.weight.mul_(3)
    torch.manual_seed(0)
    ids, seeds = torch.tensor([[0, 1]]).expand(80, -1), torch.arange(80)
    chosen = model.generate(ids, lex_seeds=seeds, max_new_tokens=1, do_sample=True, top_k=0, **options)[:, 2]
    unseen = chosen[chosen > 1].double()
    assert len(unseen) > 40
    assert abs(float(unseen.mean()) - 251) < 4 * 144 / len(unseen) ** 0.5


def test_ties_are_broken_downwards_by_small_steps():
    scores = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.5, -torch.inf, -torch.inf], [2.0, 1.0, 0.0, -1.0, 5.0, 6.0, 7.0]])
    broken = BreakTies(torch.tensor([1, 2]), 3)(torch.zeros(2, 1), scores)
    assert torch.equal(broken[1], scores[1])
    assert len(set(broken[0, [0, 2, 3]].tolist())) == 3
    torch.testing.assert_close(broken, scores, rtol=0, atol=4 * BreakTies.STEP)
    assert (broken <= scores).all()
    assert broken[0].topk(4).indices[0] == 1


def test_cutting_a_sorted_list_has_no_favourites():
    """Nucleus sampling over 40 equal scores keeps half of them: which, the seed says."""
    warper = next(kind for kind in CUTTING_WARPERS if kind.__name__ == "TopPLogitsWarper")(top_p=0.5)
    scores = torch.zeros(400, 40)
    plain = warper(None, scores).isfinite().float().mean(0)
    assert set(plain.tolist()) == {0.0, 1.0}
    seeded = InSeededOrder(warper, torch.arange(400))(None, scores).isfinite().float().mean(0)
    assert ((seeded - 0.5).abs() < 0.12).all()


@pytest.mark.parametrize("vocab_size", [50, 1500], ids=["few symbols", "many symbols"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_fixed_size_gives_the_same_text(kind, vocab_size):
    model, ids = build(kind, vocab_size), prompts()
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :1] = 0
    for attention_mask in (None, mask):
        for options in (dict(), dict(num_beams=3)):
            options |= dict(attention_mask=attention_mask, lex_seeds=SEEDS, max_new_tokens=8)
            expected = model.generate(ids, **options)
            assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_of_fixed_size_gives_the_same_logits_again_after_a_reset(kind):
    model, ids = build(kind), prompts(20, 50)
    expected = model(ids, lex_seeds=SEEDS).logits
    cache = StaticCache(config=model.config, max_cache_len=26)
    for _ in range(2):
        pieces = [
            model(ids[:, start:end], lex_seeds=SEEDS, past_key_values=cache, use_cache=True).logits
            for start, end in ((0, 11), (11, 12), (12, 20))
        ]
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-5)
        cache.reset()
    with pytest.raises(ValueError, match="must cover 26 places of the cache; found 20"):
        model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)


@pytest.mark.parametrize("kind", ["collapsed", "canonical"])
def test_compiled_decoding_gives_the_greedy_text(kind):
    model, ids = build(kind), prompts()
    expected = model.generate(ids, max_new_tokens=6)
    compilation = CompileConfig(fullgraph=True, mode="default")
    compilation._compile_all_devices = True
    options = dict(cache_implementation="static", compile_config=compilation, max_new_tokens=6)
    assert torch.equal(model.generate(ids, **options), expected)


def test_compiled_rows_are_the_rows():
    """Seeds that the compiler knows: its own arithmetic is wrong there."""

    def rows(data):
        symbols = torch.arange(41)
        return random_rows(torch.tensor(7), symbols, 16) + data, uniform_numbers(torch.tensor(7), symbols)

    found, expected = torch.compile(rows, fullgraph=True)(torch.zeros(1)), rows(torch.zeros(1))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].get("unseen_logits") == "collapsed"])
@torch.no_grad()
def test_the_dense_read_out_of_few_symbols(kind):
    """With the stored table of `generate`, against the read-out by what occurred."""
    model, ids = build(kind, **({"vocab_size": 14} if "orthonormal" in kind else {})), prompts(20, 14)
    ids[:, -1] = 0  # the last one is met for the first time
    for num_tables in (1, 3):
        options = dict(lex_seeds=SEEDS, num_tables=num_tables)
        table = resolve_table(model.model.embed_tokens, ids.shape[0], ids.device, **options)
        stored = table if isinstance(table, StoredTable) else table.stored()
        expected = model(ids, labels=ids, **options)
        found = model(ids, labels=ids, symbol_table=stored, **options)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-5)
        for keep in (1, 4):
            kept = model(ids, logits_to_keep=keep, symbol_table=stored, **options).logits
            torch.testing.assert_close(kept, expected.logits[:, -keep:], rtol=0, atol=1e-5)
    assert model._seen_of_all(Symbols(stored, None, met=ids), None).sum() < ids.numel(), "some symbols repeat"


@pytest.mark.parametrize("kind", ["collapsed", "exempt"])
@torch.no_grad()
def test_a_cache_that_generate_filled_serves_a_plain_call(kind):
    model, ids = build(kind), prompts()
    outputs = model.generate(ids, lex_seeds=SEEDS, max_new_tokens=5, return_dict_in_generate=True)
    text = torch.cat([outputs.sequences, prompts(3)], dim=1)
    expected = model(text, lex_seeds=SEEDS).logits[:, -4:]
    found = model(text[:, -4:], lex_seeds=SEEDS, past_key_values=outputs.past_key_values, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_caches_that_cannot_hold_the_history_are_refused():
    model, ids = build("collapsed"), prompts()
    sliding = DynamicCache(config=model.config)
    sliding.layers[0] = DynamicSlidingWindowLayer(sliding_window=4)
    with pytest.raises(ValueError, match="found one with DynamicSlidingWindowLayer: leave cache_implementation unset"):
        model(ids, past_key_values=sliding, use_cache=True)
    other = build("sampled")
    filled = other(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds no history"):
        model(ids[:, :1], past_key_values=filled, use_cache=True)
