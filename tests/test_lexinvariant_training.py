"""Training of the lexinvariant language model: recipes, resuming, the standard twin, and what it learns in seconds."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.optimization import Adafactor

from rarezoo.lexinvariant import LexinvariantConfig, LexinvariantForCausalLM
from rarezoo.training import (
    LanguageModelRecipe,
    SparseTrainingRecipe,
    build_language_model,
    load_recipe,
    lookup_ids,
    pack_texts,
    train,
)
from rarezoo.training.language_model import collate_tokens, make_optimizer

TEXTS = ["the cat sat on the mat and the dog sat on the log. " * 20, "a star is a sun that is far away. " * 20]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8, "intermediate_size": 48}


def small_recipe(**overrides):
    settings = {"config": SMALL, "sequence_length": 32, "batch_size": 8, "max_steps": 6, "warmup_steps": 2,
                "logging_steps": 1}  # fmt: skip
    return LanguageModelRecipe.small_from_scratch(**{**settings, **overrides})


def losses(folder):
    return [entry["loss"] for entry in json.loads((folder / "training_log.json").read_text()) if "loss" in entry]


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_recipe_files(suffix, tmp_path):
    recipe = LanguageModelRecipe.as_published(pairs=[2, 5], table="mixed", config={"randomize_prob": 0.5})
    recipe.save(tmp_path / f"recipe{suffix}")
    assert load_recipe(tmp_path / f"recipe{suffix}") == recipe


def test_the_family_tells_the_kind_of_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("family: lexinvariant\npreset: tiny\n")
    assert type(load_recipe(tmp_path / "recipe.yaml")) is LanguageModelRecipe
    (tmp_path / "recipe.yaml").write_text("preset: tiny\n")
    assert type(load_recipe(tmp_path / "recipe.yaml")) is SparseTrainingRecipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either a model to fine-tune or a preset"),
        ({"preset": "tiny", "task": "cipher"}, "task must be one of text, lookup, found 'cipher'"),
        ({"preset": "tiny", "optimizer": "sgd"}, "optimizer must be 'adamw' or 'adafactor', found 'sgd'"),
        ({"preset": "tiny", "sequence_length": 1}, "sequence_length must be at least 2"),
        ({"preset": "tiny", "pairs": [5, 3]}, "pairs must be the fewest and the most"),
        ({"preset": "tiny", "task": "lookup", "training_data": "a.txt"}, "'lookup' makes its own data"),
        ({"preset": "tiny", "max_steps": 0}, "max_steps must be above 0"),
        ({"preset": "tiny", "learning_rat": 1}, "did you mean learning_rate"),
    ],
)
def test_recipe_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelRecipe.from_dict(settings)


def test_the_published_recipe(tmp_path):
    """Adafactor with updates relative to the weights; the schedule has its peak and ends at a tenth."""
    settings = {"preset": "tiny", "config": SMALL, "sequence_length": 32, "batch_size": 4, "bf16": False}
    settings["table"] = "learned"  # which learns at once
    recipe = LanguageModelRecipe.as_published(**settings, max_steps=16, warmup_steps=4, logging_steps=1, save_steps=0)
    published = LanguageModelRecipe.as_published()
    assert (published.batch_size * published.sequence_length, published.max_steps) == (32_768, 250_000)
    assert (published.learning_rate, published.final_learning_rate_ratio, published.warmup_steps) == (0.01, 0.1, 1000)
    optimizer = make_optimizer(recipe, build_language_model(recipe)[0])
    assert type(optimizer) is Adafactor
    assert all(group["beta1"] == 0.9 and group["scale_parameter"] for group in optimizer.param_groups)
    metrics = train(recipe, tmp_path / "out", rows=TEXTS)
    log = json.loads((tmp_path / "out" / "training_log.json").read_text())
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert max(rates) == pytest.approx(0.01)
    assert 0.001 <= rates[-1] < 0.0015
    assert metrics["steps"] == 16 and metrics["loss"] < losses(tmp_path / "out")[0]


def test_scales_have_a_learning_rate_of_their_own():
    recipe = LanguageModelRecipe.small_from_scratch()
    model, _ = build_language_model(recipe)
    groups = make_optimizer(recipe, model).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    fast = {names[parameter] for group in groups if group["lr"] == pytest.approx(3e-2) for parameter in group["params"]}
    assert fast == {"model.norm.weight", *(f"model.layers.{i}.self_attn.attn_scale" for i in range(2))}
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert all(group["lr"] == pytest.approx(3e-3) or group["lr"] == pytest.approx(3e-2) for group in groups)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_train_and_open(tmp_path):
    recipe = small_recipe(max_steps=40, table="learned")
    metrics = train(recipe, tmp_path / "out", rows=TEXTS, evaluation_rows=TEXTS[:1])
    first = losses(tmp_path / "out")[0]
    assert metrics["loss"] < first - 0.5
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["eval_loss"] < first
    assert load_recipe(tmp_path / "out") == recipe
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(model) is LexinvariantForCausalLM and len(tokenizer) == model.config.vocab_size
    inputs = tokenizer(TEXTS[0][:40], return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()
    # Trained further, from the folder.
    further = small_recipe(
        preset=None, warmup_steps=0, learning_rate=1e-3, model=str(tmp_path / "out"), config={}, max_steps=2
    )
    assert train(further, tmp_path / "further", rows=TEXTS)["loss"] < first
    with pytest.raises(FileExistsError, match="not empty"):
        train(recipe, tmp_path / "out", rows=TEXTS)


@pytest.mark.parametrize("table", ["learned", "mixed", "subset_permuted", "permuted", "canonical", "gaussian"])
def test_one_switch_for_the_table(table, tmp_path):
    """The standard twin and the semi-lexinvariant models are trained by the same recipe."""
    recipe = small_recipe(table=table, max_steps=2)
    assert train(recipe, tmp_path / "out", rows=TEXTS)["steps"] == 2
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert ("model.embed_tokens.weight" in weights) == (table in ("learned", "mixed", "subset_permuted"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.table == table


class _Killed(BaseException):
    pass


class _Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise _Killed


@pytest.mark.parametrize("task", ["text", "lookup"])
def test_resume_after_a_kill(task, tmp_path):
    """Exactly as if it had not been interrupted: the same rows, under the same tables."""
    recipe = small_recipe(max_steps=8, save_steps=2, task=task, pairs=[2, 4])
    rows = TEXTS if task == "text" else None
    train(recipe, tmp_path / "whole", rows=rows)
    with pytest.raises(_Killed):
        train(recipe, tmp_path / "cut", rows=rows, callbacks=[_Kill()])
    assert not (tmp_path / "cut" / "training_log.json").exists()
    train(recipe, tmp_path / "cut", rows=rows, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    with pytest.raises(ValueError, match=r"these fields differ: batch_size"):
        train(small_recipe(max_steps=8, save_steps=2, task=task, pairs=[2, 4], batch_size=4), tmp_path / "cut",
              rows=rows, resume=True)  # fmt: skip


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """With a table that is not random, the order of the rows is all that the split could change."""
    settings = {"table": "learned", "max_steps": 3}
    train(small_recipe(**settings, batch_size=8), tmp_path / "whole", rows=TEXTS)
    train(small_recipe(**settings, batch_size=2, accumulation_steps=4), tmp_path / "parts", rows=TEXTS)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


@pytest.mark.parametrize(
    ("overrides", "rows", "message"),
    [
        ({}, None, "no texts to train on"),
        ({}, [], "there are no texts"),
        ({}, ["a"], "hold 2 tokens|hold 1 tokens|at least"),
        ({}, [{"texts": "a"}], "expected texts, or rows with the column 'text' or 'input_ids'"),
        ({"task": "lookup"}, TEXTS, "'lookup' makes its own data; found rows"),
        ({"task": "lookup", "config": {**SMALL, "vocab_size": 8}}, None,
         "10 pairs need 21 different symbols; vocab_size is 8"),
        ({"family": "colbert_xm"}, TEXTS, r"is no language model of rarezoo \(known: .*lexinvariant"),
    ],
)  # fmt: skip
def test_errors(overrides, rows, message, tmp_path):
    if rows == ["a"]:  # with an end of text it would be two tokens
        with pytest.raises(ValueError, match="hold 0 tokens"):
            pack_texts([""], _NoEnd(), 8)
        return
    with pytest.raises(ValueError, match=message):
        train(small_recipe(**overrides), tmp_path / "out", rows=rows)
    assert not (tmp_path / "out").exists()


class _NoEnd:
    eos_token_id = None

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


# --- data -------------------------------------------------------------------------------------------------------------


def test_texts_are_joined_and_cut():
    rows = pack_texts(["abc", "de", "fgh"], _NoEnd(), 4)
    assert ["".join(map(chr, row["input_ids"])) for row in rows] == ["abcd", "efgh"]
    assert [len(row["input_ids"]) for row in pack_texts(["abc"], _NoEnd(), 4)] == [3]
    tokenizer = _NoEnd()
    tokenizer.eos_token_id = 7
    assert pack_texts([{"text": "ab"}, {"text": "c"}], tokenizer, 5)[0]["input_ids"].tolist() == [97, 98, 7, 99, 7]
    given = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    assert pack_texts(given, None, 4) is given
    batch = collate_tokens(given)
    assert batch["labels"].tolist() == [[1, 2, 3], [-100, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_files_of_texts_and_of_rows(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXTS[1]}) + "\n")
    recipe = small_recipe(training_data=[str(tmp_path / "a.txt"), str(tmp_path / "rows.jsonl")], max_steps=2)
    train(recipe, tmp_path / "files")
    assert type(recipe).load(tmp_path / "files") == recipe
    assert str(tmp_path) not in (tmp_path / "files" / "training_recipe.json").read_text(encoding="utf-8")
    train(small_recipe(max_steps=2), tmp_path / "given", rows=TEXTS)
    assert losses(tmp_path / "files") == losses(tmp_path / "given")
    with pytest.raises(FileNotFoundError, match="no training data at"):
        train(small_recipe(training_data=str(tmp_path / "none.txt")), tmp_path / "out")


def test_lookup_prompts():
    generator = torch.Generator().manual_seed(0)
    ids = lookup_ids(500, 4, 10, generator)
    assert ids.shape == (500, 14)
    keys, values, separators = ids[:, 0:12:3], ids[:, 1:12:3], ids[:, 2:12:3]
    assert (separators == separators[:, :1]).all()
    matches = keys == ids[:, -2:-1]
    assert (matches.sum(1) == 1).all()
    assert torch.equal(values[matches], ids[:, -1])
    assert {len(set(row)) for row in torch.cat([keys, values, separators[:, :1]], 1).tolist()} == {9}
    assert matches.float().mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.08)
    assert torch.equal(lookup_ids(3, 2, 10, torch.Generator().manual_seed(1)),
                       lookup_ids(3, 2, 10, torch.Generator().manual_seed(1)))  # fmt: skip


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["orthonormal", "gaussian", "learned"])
@pytest.mark.parametrize("vocab_size", [27, 60])
def test_the_first_loss_is_that_of_guessing(table, vocab_size):
    """A final norm of 0.2: hidden states hold the current symbol's own row, so that with 1.0 repetition is expected."""
    torch.manual_seed(0)
    options = {"vocab_size": vocab_size, "table": table, "unseen_logits": "sampled"}
    model, _ = build_language_model(LanguageModelRecipe.small_from_scratch(config=options), tokenize=False)
    ids = torch.randint(0, vocab_size, (16, 128))
    loss = model.train()(ids, labels=ids).loss
    assert loss.item() == pytest.approx(math.log(vocab_size), rel=0.05)


@pytest.mark.parametrize("table", ["orthonormal", "learned"])
def test_activation_checkpointing_changes_no_gradient(table):
    torch.manual_seed(0)
    config = LexinvariantConfig(vocab_size=20, num_attention_heads=2, table=table, key_smear=True,
                                **{**SMALL, "num_hidden_layers": 2})  # fmt: skip
    model = LexinvariantForCausalLM(config).train()
    ids = torch.randint(0, 20, (3, 24))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)  # of the tables
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=0)


def test_lookup_is_learned_in_seconds(tmp_path):
    """Gaussian tables, from nothing; symbols that were never seen are as good as those of training."""
    options = {"vocab_size": 64, "table": "gaussian", "unseen_logits": "sampled"}
    recipe = LanguageModelRecipe.small_from_scratch(
        task="lookup", config=options, batch_size=64, max_steps=300, pairs=[3, 8], learning_rate=5e-3
    )
    metrics = train(recipe, tmp_path / "out")
    assert metrics["steps"] == 300
    for offset, vocab_size in ((0, 64), (999_000, 1_000_000)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", vocab_size=vocab_size, unseen_logits="collapsed")
        ids = lookup_ids(100, 8, 64, torch.Generator().manual_seed(1)) + offset
        with torch.no_grad():
            logits = model(ids[:, :-1], lex_seeds=torch.arange(100), logits_to_keep=1, use_cache=False).logits[:, -1]
        accuracy = (logits.argmax(-1) == ids[:, -1]).float().mean()
        assert accuracy >= 0.95, (vocab_size, accuracy)
