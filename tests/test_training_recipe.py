"""Recipes: files, runs from a preset, LoRA and 4-bit runs, resuming, and starting from scratch."""

import dataclasses
import json
import math
import random
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, TrainerCallback, XmodConfig, XmodModel

from rarezoo import ColBERTXMConfig
from rarezoo.configs import load_preset
from rarezoo.conversion import convert
from rarezoo.mistral_splade import MistralSpladeConfig, MistralSpladeForRetrieval
from rarezoo.model_cards import checkpoint_files, write_card
from rarezoo.training import (
    LateInteractionRecipe,
    SparseObjective,
    SparseTrainingRecipe,
    build_from_preset,
    initialize_as_lexical_matcher,
    load_for_training,
    load_recipe,
    train,
    train_tokenizer,
)

WORDS = "paris berlin rome madrid lisbon cat dog horse planet moon star river lake sea bread milk salt".split()


def rows(number=48, seed=0):
    """Each query names two of its document's words."""
    generator = random.Random(seed)
    result = []
    for _ in range(number):
        words = generator.sample(WORDS, 5)
        result.append({"query": f"find {words[3]} {words[0]}", "positive": "the " + " and the ".join(words)})
    return result


def small_recipe(**overrides):
    settings = {
        "preset": "tiny",
        "vocabulary_size": 120,
        "config": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1,
                   "head_dim": 16, "initializer_range": 0.1},
        "processor": {"max_query_length": 16, "max_document_length": 32},
        "batch_size": 16,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 0,
    }  # fmt: skip
    return SparseTrainingRecipe(**{**settings, **overrides})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretrained retriever on disk."""
    folder = tmp_path_factory.mktemp("base") / "model"
    train(small_recipe(max_steps=2), folder, rows=rows())
    return folder


def encode(model, processor):
    return model.encode_documents([row["positive"] for row in rows()], processor, output="dense")


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_recipe_files(tmp_path, suffix):
    recipe = small_recipe(
        objective=SparseObjective(query_regularizer="l1", query_regularizer_weight=0.25, regularizer_warmup_steps=7),
        lora_target_modules=None,
    )
    recipe.save(tmp_path / f"recipe{suffix}")
    assert SparseTrainingRecipe.load(tmp_path / f"recipe{suffix}") == recipe
    assert [path.name for path in tmp_path.iterdir()] == [f"recipe{suffix}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either a model to fine-tune or a preset"),
        ({"model": "m", "preset": "tiny"}, "either a model to fine-tune or a preset"),
        (
            {"preset": "tiny", "learning_rat": 1},
            r"unknown SparseTrainingRecipe fields learning_rat \(did you mean learning_rate\?\); known",
        ),
        (
            {"preset": "tiny", "objective": {"scale": 1}},
            "unknown SparseObjective fields scale.*known fields: .*score_scale",
        ),
        ({"preset": "tiny", "objective": {"query_regularizer": "l2"}}, "query_regularizer must be one of flops, l1"),
        ({"preset": "tiny", "objective": {"info_nce_weight": 0}}, "nothing to learn from"),
        ({"preset": "tiny", "objective": {"document_regularizer_weight": -1}}, "must not be negative"),
        ({"preset": "tiny", "lora": True}, "a preset has none"),
        ({"preset": "tiny", "initialization": "zero"}, "initialization must be"),
        ({"model": "m", "quantization": "int8"}, "quantization must be"),
        ({"model": "m", "dtype": "float7"}, "dtype must be null, 'float32', 'bfloat16' or 'float16', found 'float7'"),
        ({"model": "m", "lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, found 1.0"),
        ({"model": "m", "quantization": "nf4", "lora": False}, "quantized weights cannot be trained"),
    ],
)
def test_recipe_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseTrainingRecipe.from_dict(settings)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch_size: 0", "batch_size must be above 0, found 0"),
        ("max_steps: three", r"max_steps must be of type int \| None, found 'three'"),
        ("bf16: maybe", "bf16 must be of type bool, found 'maybe'"),
        ("learning_rate: fast", "learning_rate must be of type float, found 'fast'"),
        ("objective: {score_scale: x}", "score_scale must be of type float, found 'x'"),
        ("model: [a", "is not valid: while parsing a flow sequence"),
        ("seed: true", "seed must be of type int, found True"),
    ],
)
def test_wrong_values_in_a_recipe_file(line, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"preset: tiny\n{line}\n")
    with pytest.raises(ValueError, match=rf"recipe\.yaml.*{message}"):
        SparseTrainingRecipe.load(tmp_path / "recipe.yaml")


def test_numbers_as_yaml_reads_them(tmp_path):
    """YAML 1.1 takes 1e-4, without a decimal point, for text."""
    (tmp_path / "recipe.yaml").write_text(
        "preset: tiny\nlearning_rate: 1e-4\nepochs: 2\nobjective: {kl_weight: 1e-1}\n"
    )
    recipe = SparseTrainingRecipe.load(tmp_path / "recipe.yaml")
    assert (recipe.learning_rate, recipe.epochs, recipe.objective.kl_weight) == (1e-4, 2.0, 0.1)


def test_broken_recipe_file(tmp_path):
    (tmp_path / "recipe.json").write_text('{"preset": ')
    with pytest.raises(ValueError, match="not valid"):
        SparseTrainingRecipe.load(tmp_path / "recipe.json")
    with pytest.raises(FileNotFoundError, match="no training recipe"):
        SparseTrainingRecipe.load(tmp_path)


def test_train_from_preset(tmp_path):
    recipe = small_recipe(max_steps=30, evaluation_data=str(tmp_path / "evaluation.jsonl"))
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(16, seed=5)))
    metrics = train(recipe, tmp_path / "run", rows=rows())
    assert metrics["steps"] == 30
    model = AutoModel.from_pretrained(tmp_path / "run")
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert isinstance(model, MistralSpladeForRetrieval)
    assert processor.max_document_length == 32
    assert model.config.vocab_size == len(processor.tokenizer) <= 120
    assert SparseTrainingRecipe.load(tmp_path / "run") == dataclasses.replace(recipe, lora=False)
    assert not (tmp_path / "run" / "checkpoints").exists(), "an empty folder is not left behind"
    log = json.loads((tmp_path / "run" / "training_log.json").read_text())
    training = [entry for entry in log if "ranking_loss" in entry]
    assert len(training) == 30
    assert training[-1]["ranking_loss"] == metrics["ranking_loss"] < 0.7 * training[0]["ranking_loss"]
    assert len([entry for entry in log if "eval_ranking_loss" in entry]) == 10
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    # Everything that the run depends on is in the recipe and the rows: the same again gives the same weights.
    train(recipe, tmp_path / "again", rows=rows())
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in ("run", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_resume_after_a_kill(tmp_path):
    recipe = small_recipe(max_steps=9, save_steps=2)
    train(recipe, tmp_path / "whole", rows=rows())
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "parts", rows=rows(), callbacks=[Interrupt()])
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert (tmp_path / "whole" / "checkpoints" / "checkpoint-8").is_dir()
    with pytest.raises(FileExistsError, match="resume the run"):
        train(recipe, tmp_path / "parts", rows=rows())
    with pytest.raises(ValueError, match="these fields differ: learning_rate"):
        train(small_recipe(max_steps=9, save_steps=2, learning_rate=1.0), tmp_path / "parts", rows=rows(), resume=True)
    train(recipe, tmp_path / "parts", rows=rows(), resume=True)
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(FileExistsError, match="is finished"):
        train(recipe, tmp_path / "parts", rows=rows(), resume=True)


@pytest.mark.parametrize("kind", ["sparse", "sparse with LoRA", "multi-vector", "bare language model"])
def test_what_may_be_published_tells_no_folders(kind, base, colbert_fixtures, tmp_path):
    """The recipe of a checkpoint names its files; where they are is known only here, where a run goes on."""
    private = tmp_path / "home" / "aliciaspecimen"
    source = shutil.copytree(base if kind.startswith("sparse") else colbert_fixtures / "checkpoint", private / "model")
    (private / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    paths = {"model": source, "training_data": private / "rows.jsonl", "evaluation_data": private / "rows.jsonl"}
    if kind == "bare language model":
        convert("colbert_xm", source, private / "ours")
        config = ColBERTXMConfig.from_pretrained(private / "ours")
        fields = {name: getattr(config, name) for name in XmodConfig.__annotations__}
        XmodModel(XmodConfig(**fields)).save_pretrained(private / "xmod")
        paths |= {"model": private / "xmod", "tokenizer": source}
    settings = {name: str(path) for name, path in paths.items()}
    settings |= {"max_steps": 9, "save_steps": 2, "batch_size": 4, "lora": kind == "sparse with LoRA"}
    if kind == "bare language model":
        settings["processor"] = {"max_document_length": 64}
    make = SparseTrainingRecipe if kind.startswith("sparse") else LateInteractionRecipe
    recipe, out = make(**settings), private / "out"
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out, callbacks=[Interrupt()])
    train(load_recipe(out), out, resume=True)
    write_card(out)
    published = checkpoint_files(out)
    assert {"training_recipe.json", "config.json", "README.md", "processor_config.json"} <= set(published)
    told = [
        name
        for name in published
        for word in (str(tmp_path), "aliciaspecimen")
        if word.encode() in (out / name).read_bytes()
    ]
    assert told == []
    assert load_recipe(out) == load_recipe(out / "training_recipe.json") == recipe
    copy = shutil.copytree(out, tmp_path / "downloaded", ignore=lambda folder, names: {*names} - {*published})
    stored = load_recipe(copy)
    assert {name: getattr(stored, name) for name in paths} == {name: path.name for name, path in paths.items()}
    assert dataclasses.replace(stored, **{name: settings[name] for name in paths}) == recipe
    with pytest.raises(FileExistsError, match="is finished"):
        train(recipe, out, resume=True)


@pytest.mark.parametrize("damage", ["no state", "cut weights"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(damage, tmp_path, caplog):
    recipe = small_recipe(max_steps=9, save_steps=2)
    train(recipe, tmp_path / "whole", rows=rows())
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "parts", rows=rows(), callbacks=[Interrupt()])
    newest = tmp_path / "parts" / "checkpoints" / "checkpoint-4"
    if damage == "no state":
        (newest / "trainer_state.json").unlink()
    else:
        (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:5000])
    train(recipe, tmp_path / "parts", rows=rows(), resume=True)
    assert "checkpoint-4 was not written to its end" in caplog.text
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_resume_after_a_kill_during_the_export(base, tmp_path, monkeypatch):
    recipe = SparseTrainingRecipe(model=str(base), lora=True, batch_size=16, max_steps=4, save_steps=2)
    train(recipe, tmp_path / "whole", rows=rows())
    with monkeypatch.context() as killed:
        killed.setattr("rarezoo.training.run_folder.write_whole", lambda path, text: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(recipe, tmp_path / "run", rows=rows())
    assert (tmp_path / "run" / "adapter").is_dir()
    (tmp_path / "run" / ".export-1").mkdir()
    train(recipe, tmp_path / "run", rows=rows(), resume=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="positive"):
        train(small_recipe(), tmp_path / "run", rows=[{"query": "no positive"}] * 20)
    with pytest.raises(OSError):
        train(SparseTrainingRecipe(model=str(tmp_path / "nowhere")), tmp_path / "run", rows=rows())
    assert not (tmp_path / "run").exists()
    train(small_recipe(max_steps=2), tmp_path / "run", rows=rows())


def test_lora_on_a_tied_head(tmp_path):
    """Merged into the matrix that both share, the head's update would change the embeddings."""
    from peft import PeftModel

    tied = {**small_recipe().config, "tie_word_embeddings": True}
    train(small_recipe(config=tied, max_steps=2), tmp_path / "base", rows=rows())
    recipe = SparseTrainingRecipe(
        model=str(tmp_path / "base"), lora=True, lora_on_head=True, dtype="float32", batch_size=16, max_steps=6,
        learning_rate=1e-2, save_steps=0,
    )  # fmt: skip
    train(recipe, tmp_path / "run", rows=rows())
    base, merged = (load_file(tmp_path / run / "model.safetensors") for run in ("base", "run"))
    assert torch.equal(base["model.embed_tokens.weight"], merged["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "run" / "adapter")
    expected = encode(adapted.get_base_model(), processor)
    assert torch.allclose(encode(AutoModel.from_pretrained(tmp_path / "run"), processor), expected, atol=2e-5)


def test_rows_by_id(tmp_path):
    texts = rows(16)
    (tmp_path / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": i, "text": row["query"]}) + "\n" for i, row in enumerate(texts))
    )
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": row["positive"]}) + "\n" for i, row in enumerate(texts))
    )
    (tmp_path / "rows.tsv").write_text("query_id\tpositive_id\n" + "".join(f"{i}\td{i}\n" for i in range(16)))
    recipe = small_recipe(
        training_data=str(tmp_path / "rows.tsv"),
        queries=str(tmp_path / "queries.jsonl"),
        corpus=str(tmp_path / "corpus.jsonl"),
        max_steps=3,
    )
    by_id = train(recipe, tmp_path / "by_id")
    by_text = train(small_recipe(max_steps=3), tmp_path / "by_text", rows=texts)
    assert by_id["ranking_loss"] == by_text["ranking_loss"]


@pytest.mark.parametrize(
    ("overrides", "given", "error", "message"),
    [
        ({}, None, ValueError, "set training_data in the recipe"),
        ({}, [], ValueError, "no training rows"),
        ({"training_data": "nowhere.jsonl"}, None, FileNotFoundError, "no training data at nowhere.jsonl"),
        ({"preset": "huge"}, rows(), KeyError, "unknown preset 'huge'"),
        ({"family": "bert"}, rows(), ValueError, "unknown family 'bert'; known families: mistral_splade"),
        ({"family": "colbert-xm"}, rows(), ValueError, "'colbert_xm' is no sparse retriever"),
        ({"processor": {"attention_mode": "plain"}}, rows(), ValueError, "set the same in the recipe"),
    ],
)
def test_train_errors(tmp_path, overrides, given, error, message):
    with pytest.raises(error, match=message):
        train(small_recipe(**overrides), tmp_path / "run", rows=given)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": {"hidden_size": 64}}, r"config: with \{'hidden_size': 64\}, weights would have other shapes than"),
        ({"lora": True, "lora_target_modules": ["q_proj", "query"]}, "lora_target_modules: .* has no layer query; the"),
        ({"lora": True, "lora_target_modules": ["norm"]}, "lora_target_modules: Target module .* is not supported"),
    ],
)
def test_what_does_not_fit_the_stored_model(tmp_path, base, settings, message):
    """One line that names the field, and nothing on disk."""
    with pytest.raises(ValueError, match=f"^{message}.*$"):
        train(SparseTrainingRecipe(model=str(base), **settings), tmp_path / "run", rows=rows())
    assert not (tmp_path / "run").exists()


class Fails(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise ValueError("something else")


def test_a_run_that_fails_leaves_its_folder_free(tmp_path, base):
    """Until there is a checkpoint from which it can go on."""
    bad = [*rows(20), {"query": "no positive"}]
    recipe = SparseTrainingRecipe(model=str(base), max_steps=6, batch_size=21, save_steps=4)
    with pytest.raises(ValueError, match="positive"):
        train(recipe, tmp_path / "run", rows=bad)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="something else"):
        train(recipe, tmp_path / "run", rows=rows(), callbacks=[Fails(3)])
    assert not list((tmp_path / "run").iterdir())
    with pytest.raises(ValueError, match="something else"):
        train(recipe, tmp_path / "run", rows=rows(), callbacks=[Fails(5)])
    with pytest.raises(FileExistsError):
        train(recipe, tmp_path / "run", rows=rows())
    assert train(recipe, tmp_path / "run", rows=rows(), resume=True)["steps"] == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mistral_splade", "colbert_xm"])
def test_what_lora_does_not_train_is_not_rounded(tmp_path, base, colbert_fixtures, family, dtype):
    """Training computes with frozen weights in bfloat16; the merged model has those of the source, bit for bit."""
    source, recipe = tmp_path / "source", SparseTrainingRecipe
    if family == "colbert_xm":
        convert("colbert_xm", colbert_fixtures / "checkpoint", source, dtype=dtype)
        recipe = LateInteractionRecipe
    else:
        AutoModel.from_pretrained(base, dtype=dtype).save_pretrained(source)
        AutoProcessor.from_pretrained(base).save_pretrained(source)
    settings = dict(lora=True, batch_size=8, max_steps=4, learning_rate=1e-1, save_steps=0)
    train(recipe(model=str(source), **settings), tmp_path / "run", rows=rows())
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "run"))
    before = {name: tensor for name, tensor in before.items() if ".pooler." not in name}
    assert before.keys() == after.keys()
    trained = {name.split("base_model.model.")[1].split(".lora_")[0] + ".weight"
               for name in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")}  # fmt: skip
    assert 0 < len(trained) < len(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == getattr(torch, dtype)
        assert torch.equal(after[name], tensor) != (name in trained), name
    assert AutoModel.from_pretrained(tmp_path / "run").dtype == getattr(torch, dtype)


def test_lora_keeps_the_new_projection_of_a_language_model(tmp_path, colbert_fixtures):
    """Weights that the source lacks are those that the adapter was trained with."""
    source = colbert_fixtures / "checkpoint"
    config = ColBERTXMConfig.from_pretrained(source)
    XmodModel(XmodConfig(**{name: getattr(config, name) for name in XmodConfig.__annotations__})).save_pretrained(
        tmp_path / "xmod"
    )
    recipe = LateInteractionRecipe(
        model=str(tmp_path / "xmod"), tokenizer=str(source), processor={"max_document_length": 64}, lora=True,
        lora_on_head=True, batch_size=8, max_steps=3, save_steps=0, learning_rate=1e-2,
    )  # fmt: skip
    seen = {}

    class Look(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            seen["projection"] = model.get_base_model().linear.get_delta_weight("default") + (
                model.get_base_model().linear.base_layer.weight
            )

    train(recipe, tmp_path / "run", rows=rows(), callbacks=[Look()])
    found = load_file(tmp_path / "run" / "model.safetensors")["linear.weight"]
    assert type(AutoModel.from_pretrained(tmp_path / "run")).__name__ == "ColBERTXMForRetrieval"
    torch.testing.assert_close(found, seen["projection"].detach().float(), atol=1e-3, rtol=1e-2)


def test_small_models_are_trained_whole_and_large_ones_by_lora(tmp_path, base):
    from rarezoo.training.run import _uses_lora

    fine_tuning = SparseTrainingRecipe(model=str(base))
    model, _ = load_for_training(fine_tuning)
    assert isinstance(model, MistralSpladeForRetrieval)
    assert model.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not _uses_lora(fine_tuning, load_preset("mistral_splade", "tiny"))
    assert _uses_lora(fine_tuning, load_preset("mistral_splade", "mistral-7b-v0.1"))
    adapted, _ = load_for_training(SparseTrainingRecipe(model=str(base), lora=True, lora_on_head=True))
    settings = adapted.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (16, 8, 0.1)
    assert {*settings.target_modules} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    }  # fmt: skip
    assert adapted.get_base_model().dtype == torch.bfloat16


@pytest.mark.parametrize("on_head", [False, True])
def test_lora_run_exports_merged_model_and_adapter(tmp_path, base, on_head):
    from peft import PeftModel

    recipe = SparseTrainingRecipe(
        model=str(base), lora=True, lora_on_head=on_head, dtype="float32", batch_size=16, max_steps=8,
        learning_rate=1e-2, mini_batch_size=5, save_steps=4,
    )  # fmt: skip
    train(recipe, tmp_path / "run", rows=rows())
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    merged = AutoModel.from_pretrained(tmp_path / "run")
    assert type(merged) is MistralSpladeForRetrieval
    original = AutoModel.from_pretrained(base)
    before = encode(original, processor)
    adapted = PeftModel.from_pretrained(original, tmp_path / "run" / "adapter")
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in stored)
    assert any("lm_head" in name for name in stored) is on_head
    unmerged = encode(adapted.get_base_model(), processor)
    assert torch.allclose(encode(merged, processor), unmerged, atol=2e-5)
    assert not torch.allclose(before, unmerged, atol=1e-2)


# 64 is the block size of 4-bit quantization.
FOUR_BIT_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
                  "head_dim": 16, "initializer_range": 0.1}  # fmt: skip


def test_four_bit_run(tmp_path):
    """QLoRA: 4-bit frozen weights, and an export merged into the weights as they were before quantization."""
    from peft import PeftModel

    train(small_recipe(config=FOUR_BIT_SIZES, max_steps=2), tmp_path / "base", rows=rows())
    recipe = SparseTrainingRecipe(
        model=str(tmp_path / "base"), quantization="nf4", dtype="float32", batch_size=16, max_steps=12,
        learning_rate=1e-2, logging_steps=1, save_steps=0,
    )  # fmt: skip
    model, _ = load_for_training(recipe)
    assert type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert type(model.get_base_model().lm_head) is torch.nn.Linear
    train(recipe, tmp_path / "run", rows=rows())
    assert (recipe.lora, SparseTrainingRecipe.load(tmp_path / "run").lora) == (None, True)
    log = json.loads((tmp_path / "run" / "training_log.json").read_text())
    losses = [entry["ranking_loss"] for entry in log if "ranking_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    merged = AutoModel.from_pretrained(tmp_path / "run")
    assert getattr(merged.config, "quantization_config", None) is None
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "run" / "adapter")
    assert torch.allclose(encode(merged, processor), encode(adapted.get_base_model(), processor), atol=2e-5)


def test_evaluation_does_not_disturb_four_bit_training(tmp_path):
    """bitsandbytes packs weights for inference in place, and packed weights pass no gradients on."""
    train(small_recipe(config=FOUR_BIT_SIZES, max_steps=2), tmp_path / "base", rows=rows())
    recipe = SparseTrainingRecipe(
        model=str(tmp_path / "base"), quantization="nf4", dtype="float32", lora_dropout=0.0, batch_size=16,
        max_steps=10, learning_rate=1e-2, save_steps=0,
    )  # fmt: skip
    train(recipe, tmp_path / "plain", rows=rows())
    train(recipe, tmp_path / "evaluated", rows=rows(), evaluation_rows=rows(16, seed=5))
    adapters = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("plain", "evaluated")]
    assert any(".layers.0." in name and "lora_B" in name for name in adapters[0])
    for name, weight in adapters[0].items():
        assert torch.allclose(adapters[1][name], weight, atol=1e-6), name


def test_tokenizer(tmp_path):
    tokenizer = train_tokenizer(["Return the Path of os.path, in 12 steps"] * 3 + ["a path"], vocabulary_size=80)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        0,
        1,
        2,
        0,
    )
    path_token = tokenizer("path", add_special_tokens=False)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("os.path 12", add_special_tokens=False)["input_ids"])
    assert tokenizer("PATH", add_special_tokens=False)["input_ids"] == path_token
    assert "." in pieces and "2" in pieces
    assert tokenizer("<s>a</s>")["input_ids"][0] == 1 and tokenizer("<s>a</s>")["input_ids"][-1] == 2
    assert tokenizer("日本", add_special_tokens=False)["input_ids"].count(0) > 0
    with pytest.raises(ValueError, match="vocabulary_size must be above 3"):
        train_tokenizer(["a"], vocabulary_size=3)


@pytest.mark.parametrize("mode", ["echo", "plain", "bidirectional"])
def test_lexical_initialization_is_a_weighted_bag_of_words(mode):
    """Without any training: each pooled token has the weight that the formula gives, and nearly nothing else has."""
    generator = random.Random(3)
    weights = range(1, len(WORDS) + 1)
    texts = [
        {"query": "q", "positive": " ".join(generator.choices(WORDS, weights=weights, k=generator.randint(2, 30)))}
        for _ in range(300)
    ]
    template = "<s>{!%%text%%}{%%text%%}" if mode == "echo" else "{<s>}{%%text%%}"
    recipe = small_recipe(
        initialization="lexical", config={"attention_mode": mode},
        processor={"document_template": template, "query_template": template, "attention_mode": mode,
                   "max_document_length": 256},
    )  # fmt: skip
    torch.manual_seed(0)
    model, processor = build_from_preset(recipe, texts)
    documents = list(dict.fromkeys(row["positive"] for row in texts))
    found = model.encode_documents(documents, processor, output="dense")

    ids = processor.tokenizer(documents, add_special_tokens=False)["input_ids"]
    counts = {token: sum(token in row for row in ids) for token in {token for row in ids for token in row}}
    rarest = math.log(1 + (len(documents) + 0.5) / 0.5)
    # Tokens that each pooled token sees, itself included: in an echo, the first copy too.
    seen = [[len(row) * (mode == "echo") + i + 1 for i in range(len(row))] for row in ids]
    if mode == "bidirectional":
        seen = [[len(row)] * len(row) for row in ids]
    everywhere = [n for row in seen for n in row] + ([0] * len(seen) if mode == "plain" else [])
    if mode == "bidirectional":
        everywhere += [row[0] for row in seen]  # <s> is pooled too
    mean = sum(everywhere) / len(everywhere)

    def norm(n):
        return (1.25 + (6.9 * n / (n + 3.1 * mean)) ** 2) ** 0.5

    for row, tokens, numbers in list(zip(found, ids, seen))[:40]:
        assert set(tokens) <= set(row.nonzero().flatten().tolist())
        for token in set(tokens):
            rarity = math.log(1 + (len(documents) - counts[token] + 0.5) / (counts[token] + 0.5)) / rarest
            logit = 8 * rarity * 0.65 * norm(mean) / norm(numbers[tokens.index(token)])
            assert row[token].item() == pytest.approx(math.log1p(logit), abs=3e-3)
        others = row[[token for token in range(len(row)) if token not in tokens]]
        assert others.max() < 0.5 * row[list(set(tokens))].min()
    # The norm stands for BM25's k1 (1 - b + b length / typical) + 1 with its usual k1 = 1.5 and b = 0.75.
    for share in (1 / 3, 0.5, 2, 3):
        assert norm(share * mean) / norm(mean) == pytest.approx((1.375 + 1.125 * share) / 2.5, rel=0.1)


def test_lexical_initialization_needs_documents():
    model, processor = build_from_preset(small_recipe(), rows())
    with pytest.raises(ValueError, match="expected documents and a start token, found 0"):
        initialize_as_lexical_matcher(model, processor, [])


def test_lexical_initialization_needs_an_untied_head():
    recipe = small_recipe(initialization="lexical", config={**small_recipe().config, "tie_word_embeddings": True})
    with pytest.raises(ValueError, match="not tied"):
        build_from_preset(recipe, rows())


def test_stored_config_is_the_trained_one(base):
    assert isinstance(AutoModel.from_pretrained(base).config, MistralSpladeConfig)
    assert AutoModel.from_pretrained(base).config.hidden_size == 32


def test_example_script(tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[1] / "examples" / "train_mistral_splade.py"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    monkeypatch.setattr(
        "sys.argv",
        [str(script), str(tmp_path / "pairs.jsonl"), str(tmp_path / "out"), "--steps", "3", "--held-out", "10"],
    )
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "3 steps in" in printed
    ndcg = re.search(r"nDCG@10 of 8 held-out queries over 40 documents: ([\d.]+)", printed)
    assert ndcg and float(ndcg[1]) > 0.5, "the lexical start alone finds documents by their words"
    assert rows(40)[0]["query"] in printed
    assert (tmp_path / "out" / "training_recipe.json").exists()
