"""Ciphers, LookUp and Permutation: answers follow from prompts, symbols have the law that was asked for, accuracies are
those of a loop without batches, and a small model learns LookUp for symbols that it never saw."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rarezoo.lexinvariant import (
    Cipher,
    LexinvariantConfig,
    LexinvariantForCausalLM,
    SymbolicTask,
    evaluate_task,
    make_cipher,
    make_lookup,
    make_permutation,
    task_batch,
)

FIXTURES = Path(__file__).parent / "fixtures" / "lexinvariant"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_model(vocab_size=64, **fields):
    torch.manual_seed(0)
    fields = {"table": "orthonormal", "unseen_logits": "collapsed", **fields}
    return LexinvariantForCausalLM(
        LexinvariantConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=16,
            intermediate_size=128,
            **fields,
        )
    )


def answered(lines, question):
    """What both tasks ask for, from the left and right sides that a prompt shows."""
    if len(question) == 1:
        return [dict((left[0], right[0]) for left, right in lines)[question[0]]]
    left, right = lines[0]
    return [question[left.index(symbol)] for symbol in right]


def oracle(prompt, length):
    """Of ids: the last one is the arrow, and lines repeat with the distance of the arrows."""
    arrow = prompt[-1]
    size = prompt.index(arrow)
    period = prompt.index(arrow, size + 1) - size
    *lines, question = [prompt[start : start + period] for start in range(0, len(prompt), period)]
    return answered([(line[:size], line[size + 1 : -1]) for line in lines], question[:-1])


def text_oracle(prompt, length):
    *lines, question = "".join(map(chr, prompt)).split("\n")
    sides = [[side.split(" ") for side in line.split("->")] for line in lines]
    return [ord(symbol) for symbol in " ".join(answered(sides, question.removesuffix("->").split(" ")))]


# --- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lookup", "permutation"])
def test_fixtures_are_answered_by_the_oracles(name):
    given = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    characters = [
        SymbolicTask([ord(c) for c in item["prompt"]], [ord(c) for c in item["answer"]]) for item in given["char"]
    ]
    ids = [SymbolicTask(item["input_ids"], item["answer_ids"]) for item in given["tokens_v32128"]]
    for tasks, solver in ((characters, text_oracle), (ids, oracle)):
        found = evaluate_task(solver, tasks, ignored_ids=[ord(" ")] if solver is text_oracle else [])
        assert (found.symbols, found.answers, found.correct) == (1.0, 1.0, [True] * 200)


@pytest.mark.parametrize("make", [make_lookup, make_permutation])
@pytest.mark.parametrize(
    "symbols",
    [92, 32128, 10**6, [7, 500, *range(1000, 1040)], "abcdefghijklmnopqrstuvwxyz"],
    ids=["92", "32128", "1e6", "ids", "text"],
)
def test_answers_follow_from_prompts(make, symbols):
    tasks = make(100, symbols=symbols, generator=seeded())
    solver = text_oracle if isinstance(symbols, str) else oracle
    assert evaluate_task(solver, tasks).answers == 1.0
    assert make(100, symbols=symbols, generator=seeded()) == tasks
    assert make(100, symbols=symbols, generator=seeded(1)) != tasks
    allowed = (
        set(range(symbols)) if isinstance(symbols, int) else {ord(c) if isinstance(c, str) else c for c in symbols}
    )
    assert {symbol for task in tasks for symbol in task.answer_ids} <= allowed | {ord(" ")}


def test_text_looks_like_the_paper_s():
    (lookup,) = make_lookup(1, pairs=2, symbols="ACG24", generator=seeded(3))
    first, second, question = lookup.prompt.split("\n")
    assert {len(first), len(second), len(question)} == {4, 3}
    assert first[1:3] == question[1:] == "->" and question[0] in (first[0], second[0])
    assert lookup.answer == (first, second)[lookup.rule[0]][3]
    (permutation,) = make_permutation(1, length=3, demonstrations=2, generator=seeded(3))
    *shown, question = permutation.prompt.split("\n")
    assert len(shown) == 2 and question.endswith("->")
    assert permutation.answer == " ".join(question[:5].split(" ")[place] for place in permutation.rule)
    (short,) = make_lookup(1, pairs=2, symbols="ACG24", arrow=False, generator=seeded(3))
    assert short.prompt == lookup.prompt.replace("->", "")


def test_lookup_is_never_ambiguous():
    """As in the fixtures: keys differ from each other and from all values; values may repeat."""
    repeated = 0
    for task in make_lookup(200, symbols=20, arrow_id=100, newline_id=101, pairs=(3, 6), generator=seeded()):
        keys, values = task.input_ids[:-2:4], task.input_ids[2:-2:4]
        assert set(task.input_ids[1::4]) == {100} and set(task.input_ids[3::4]) == {101}
        assert len(set(keys)) == len(keys) == len(values) and not set(keys) & set(values)
        assert 3 <= len(keys) <= 6 and task.answer_ids == [values[task.rule[0]]]
        repeated += len(set(values)) < len(values)
    assert 20 < repeated < 180


def test_all_sizes_and_rules_occur():
    tasks = make_permutation(400, symbols=92, generator=seeded())
    assert {len(task.rule) for task in tasks} == {1, 2, 3, 4}
    assert {task.rule for task in tasks} >= {(0,), (1, 0), (0, 1), (2, 0, 1)}
    assert {len(task.input_ids[:-2:4]) for task in make_lookup(200, symbols=92, generator=seeded())} == {*range(3, 11)}


@pytest.mark.parametrize("make", [make_lookup, make_permutation])
@pytest.mark.parametrize(
    "frequencies", [None, torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9])], ids=["uniform", "given"]
)
def test_symbols_have_the_law_that_was_asked_for(make, frequencies):
    """The first symbol of every prompt, within four standard errors."""
    count = 2000
    tasks = make(
        count, symbols=10, frequencies=frequencies, arrow_id=90, newline_id=91, generator=seeded(), **_SIZE[make]
    )
    expected = torch.ones(10) if frequencies is None else frequencies
    expected = expected / expected.sum()
    first = Counter(task.input_ids[0] for task in tasks)
    found = torch.tensor([first[symbol] / count for symbol in range(10)])
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()


_SIZE = {make_lookup: {"pairs": 3}, make_permutation: {"length": 2, "demonstrations": 2}}


@pytest.mark.parametrize("symbols", [4096, 4097])
def test_both_ways_to_draw_have_the_same_law(symbols):
    """Of many symbols some are drawn until enough differ: means of uniform numbers, within four standard errors."""
    keys = torch.tensor(
        [task.input_ids[::4] for task in make_lookup(1000, symbols=symbols, pairs=9, generator=seeded())]
    )
    error = symbols / 12**0.5 / keys[:, :9].numel() ** 0.5
    assert abs(keys[:, :9].double().mean() - (symbols - 1) / 2) < 4 * error
    assert all(len(set(row[:9].tolist())) == 9 for row in keys)


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (make_lookup, {"symbols": 5, "pairs": 5}, "different symbols; there are 5"),
        (make_permutation, {"symbols": 5, "length": 6}, "different symbols; there are 5"),
        (make_lookup, {"symbols": 5, "frequencies": torch.ones(4)}, "5 non-negative numbers"),
        (make_lookup, {"symbols": 2, "frequencies": torch.tensor([1.0, -1])}, "2 non-negative numbers"),
        (make_lookup, {"symbols": 20, "frequencies": torch.eye(20)[0]}, "different symbols; there are 1"),
        (make_lookup, {"pairs": (4, 3)}, r"pairs must be a positive number or a range"),
        (make_permutation, {"demonstrations": 0}, "demonstrations must be a positive number"),
        (make_lookup, {"symbols": "abcdefgé"}, "ASCII"),
        (make_lookup, {"symbols": "aab"}, "different; found some twice"),
        (make_lookup, {"symbols": 0}, "at least 1"),
        (make_lookup, {"arrow_id": 3}, "are for ids"),
        (make_lookup, {"symbols": 92, "arrow_id": 3, "newline_id": 3}, "found 3 for both"),
    ],
)
def test_bad_tasks(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(1, **fields)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_an_untrained_model_is_at_chance():
    tasks = make_lookup(300, symbols=64, pairs=8, arrow=False, generator=seeded())
    found = evaluate_task(small_model(), tasks)
    assert found.symbols == found.answers <= 1 / 8 + 4 * (7 / 64 / 300) ** 0.5


@pytest.fixture(scope="module")
def trained():
    """Seconds of training on the short form of LookUp."""
    model = small_model(initialization="mimetic", key_smear=True, attn_scale_init=8.0)
    scales = [parameter for name, parameter in model.named_parameters() if "attn_scale" in name]
    others = [parameter for name, parameter in model.named_parameters() if "attn_scale" not in name]
    groups = [{"params": others, "lr": 3e-3}, {"params": scales, "lr": 3e-2}]
    optimizer, generator = torch.optim.AdamW(groups, betas=(0.9, 0.98)), seeded()
    for step in range(160):
        pairs = 3 + step % 6
        tasks = make_lookup(32, symbols=64, pairs=pairs, arrow=False, arrow_id=0, newline_id=1, generator=generator)
        model(**task_batch(tasks)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_trained_model_looks_up_symbols_that_it_never_saw(trained):
    seen = make_lookup(300, symbols=64, pairs=4, arrow=False, generator=seeded(7))
    assert evaluate_task(trained, seen).symbols >= 0.9
    assert trained.training, "training goes on where it was"
    trained.config.vocab_size = 10**6
    try:
        unseen = make_lookup(40, symbols=range(1000, 10**6), pairs=4, arrow=False, generator=seeded(7))
        assert evaluate_task(trained, unseen, batch_size=20).symbols >= 0.9
    finally:
        trained.config.vocab_size = 64


def test_batches_change_nothing(trained):
    tasks = make_lookup(60, symbols=64, arrow=False, generator=seeded(8))
    found = evaluate_task(trained, tasks, batch_size=60)
    assert 0 < sum(found.correct) < 60, "a comparison of all or of none shows nothing"
    assert evaluate_task(trained, tasks, batch_size=1) == evaluate_task(trained, tasks, batch_size=7) == found


def is_right(model, task, **inputs):
    """Of every symbol of the answer whether it was generated, without batch, padding, cache and `generate`."""
    ids = torch.tensor([task.input_ids])
    for _ in task.answer_ids:
        logits = model(input_ids=ids, use_cache=False, **inputs).logits[0, -1]
        ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    return [a == b for a, b in zip(ids[0, len(task.input_ids) :].tolist(), task.answer_ids)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lexinvariant", "gpt2"])
def test_long_answers_are_generated(kind, trained):
    """Also where the number of an answer's symbol is that of the end of a text."""
    if kind == "gpt2":
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    else:
        model = trained.eval()
    ends = [i for i in range(64) if kind == "gpt2"]
    model.generation_config.eos_token_id = ends or None
    tasks = make_permutation(24, symbols=64, generator=seeded(2))
    seeds = [{"lex_seeds": torch.tensor([i])} if kind == "lexinvariant" else {} for i in range(24)]
    hits = [is_right(model, task, **inputs) for task, inputs in zip(tasks, seeds)]
    found = evaluate_task(model, tasks, batch_size=5)
    flat = [hit for answer in hits for hit in answer]
    assert found.symbols == pytest.approx(sum(flat) / len(flat)) and found.correct == [all(answer) for answer in hits]
    model.train()


def test_spaces_need_not_count():
    tasks = [SymbolicTask([65], [66, 32, 67]), SymbolicTask([65], [66])]
    assert evaluate_task(lambda prompt, length: [66, 32, 32][:length], tasks).symbols == 3 / 4
    found = evaluate_task(lambda prompt, length: [66, 32, 32][:length], tasks, ignored_ids={32})
    assert (found.symbols, found.answers, found.correct) == (2 / 3, 1 / 2, [False, True])


def test_batches_for_training():
    batch = task_batch([SymbolicTask([5, 6], [7]), SymbolicTask([8], [9, 10, 11])], pad_token_id=63)
    assert batch["input_ids"].tolist() == [[63, 5, 6, 7], [8, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 7], [-100, 9, 10, 11]]


def test_bad_evaluations():
    task = SymbolicTask([1, 2], [3])
    for tasks, ignored in (([], ()), ([SymbolicTask([1], [])], ()), ([SymbolicTask([], [1])], ()), ([task], {3})):
        with pytest.raises(ValueError, match="at least one, each with a prompt and an answer"):
            evaluate_task(oracle, tasks, ignored_ids=ignored)
    with pytest.raises(ValueError, match="1 symbols were asked for; found 2"):
        evaluate_task(lambda prompt, length: [1, 2], [task])
    with pytest.raises(ValueError, match=r"shape \(1,\); found \(2,\)"):
        evaluate_task(small_model(), [task], lex_seeds=torch.arange(2))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        evaluate_task(small_model(), [task], batch_size=0)
    with pytest.raises(ValueError, match=r"0\.\.63; found 64"):
        evaluate_task(small_model(), [SymbolicTask([64], [1])])


# --- ciphers ----------------------------------------------------------------------------------------------------------


def test_the_fixture_s_ciphers():
    items = json.loads((FIXTURES / "cipher.json").read_text(encoding="utf-8"))
    assert len(items) == 24
    for item in items:
        cipher, lettered = Cipher(torch.tensor(item["permutation"])), Cipher.from_key(item["key"])
        assert cipher.encipher(item["plaintext"]) == item["ciphertext"]
        assert cipher.decipher(item["ciphertext"]) == item["plaintext"]
        for plain, symbol in item["key"].items():
            assert cipher.inverse[ord(symbol)] == ord(plain)
        # The key says nothing of the symbols to which it gives other places.
        letters = "".join(filter(str.isalpha, item["plaintext"]))
        assert lettered.encipher(letters) == cipher.encipher(letters)
        assert lettered.decipher(lettered.encipher(item["plaintext"])) == item["plaintext"]
        assert sorted(lettered.permutation.tolist()) == list(range(128))


@pytest.mark.parametrize("vocab_size", [2, 128, 5000])
def test_random_ciphers(vocab_size):
    cipher = make_cipher(vocab_size, generator=seeded())
    assert sorted(cipher.permutation.tolist()) == list(range(vocab_size))
    ids = torch.randint(vocab_size, (3, 50), generator=seeded())
    assert torch.equal(cipher.encipher(ids), cipher.permutation[ids])
    assert torch.equal(cipher.decipher(cipher.encipher(ids)), ids)
    assert cipher.decipher(cipher.encipher(ids[0].tolist())) == ids[0].tolist()


def test_ciphers_of_some_symbols():
    cipher = make_cipher(symbols="abcdefgh", generator=seeded())
    moved = {i for i, j in enumerate(cipher.permutation.tolist()) if i != j}
    assert 5 <= len(moved) and moved <= set(map(ord, "abcdefgh"))
    assert cipher.encipher("xyz, 123") == "xyz, 123" != cipher.encipher("abc, 123")
    images = Counter(make_cipher(4, generator=seeded(i)).permutation.tolist()[0] for i in range(400))
    assert set(images) == {0, 1, 2, 3} and max(abs(count - 100) for count in images.values()) < 4 * 75**0.5


def test_bad_ciphers():
    with pytest.raises(ValueError, match="one of 0, 1"):
        Cipher(torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="different symbols for different ones"):
        Cipher.from_key({"a": "x", "b": "x"})
    with pytest.raises(ValueError, match=r"0\.\.9"):
        Cipher.from_key({1: 10}, vocab_size=10)
    with pytest.raises(ValueError, match=r"0\.\.9; found 3\.\.12"):
        make_cipher(10, [3, 12])
    with pytest.raises(ValueError, match=r"symbols 0\.\.127; found 233"):
        make_cipher().encipher("é")
