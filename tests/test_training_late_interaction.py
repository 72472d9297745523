"""Training of multi-vector retrievers: losses, freezing, exact large batches, recipes, LoRA, learning."""

import functools
import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, TrainerCallback, TrainingArguments, XmodConfig, XmodForMaskedLM

from rarezoo import ColBERTXMForRetrieval, ColBERTXMProcessor
from rarezoo.colbert_xm.max_sim import max_sim
from rarezoo.training import (
    LateInteractionCollator,
    LateInteractionObjective,
    LateInteractionRecipe,
    LateInteractionTrainer,
    SparseTrainingRecipe,
    build_from_preset,
    encode_in_chunks,
    in_batch_cross_entropy_loss,
    load_for_training,
    load_recipe,
    nway_cross_entropy_loss,
    score_distillation_loss,
    train,
    train_xlm_r_tokenizer,
)

from .commands import call, refused, write_jsonl

TEXTS = [
    ("what pulls the sea", "the moon pulls the sea, and the sea rises twice a day", "the cat sat on the mat"),
    ("capital of france", "Paris is the capital; it lies on the Seine.", "rain in the hills"),
    ("who sat", "the cat sat on the mat and looked at the rain", "prices rose in 2019"),
    ("how do prices change", "prices rose 3 % in 2019 and 4 % in 2020", "the moon is far away from here"),
    ("where does the seine flow", "the Seine flows through Paris to the sea", "a cat"),
    ("why is it wet", "rain", "the capital is large"),
]
ROWS = [{"query": q, "positive": p, "negatives": [n], "scores": [3.0, 1.0]} for q, p, n in TEXTS]


@pytest.fixture(scope="module")
def folder(colbert_fixtures):
    return colbert_fixtures / "checkpoint"


@pytest.fixture(scope="module")
def processor(folder):
    return ColBERTXMProcessor.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return ColBERTXMForRetrieval.from_pretrained(folder).eval()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def embeddings(model, texts):
    return model(**texts).embeddings


def assert_close(found, expected, relative):
    assert found.keys() == expected.keys()
    for name in expected:
        difference = (found[name] - expected[name]).abs().max().item()
        assert difference <= relative * expected[name].abs().max().item() + 1e-9, name


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mini_batch_size", [None, 1, 3])
def test_the_numbers_of_colbert_ai(model, processor, folder, colbert_fixtures, mini_batch_size):
    """Scores, losses, frozen weights and gradients, also where only some texts' activations are kept at a time."""
    expected = load_file(colbert_fixtures / "expected.safetensors")
    given = json.loads((colbert_fixtures / "expected.json").read_text())["train"]
    model.freeze_embeddings_and_language_adapters()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == set(given["no_grad_parameters"])

    passages, nway = given["passages"], given["nway"]
    rows = [
        {"query": query, "positive": passages[nway * i], "negatives": passages[nway * i + 1 : nway * (i + 1)]}
        for i, query in enumerate(given["queries"])
    ]
    batch = LateInteractionCollator(processor, model.config, language=given["lang"])(rows)
    order = torch.tensor([0, 2, 1, 3])  # all positives, then all negatives
    assert torch.equal(batch["queries"]["input_ids"], expected["train.query_input_ids"].long())
    assert torch.equal(batch["documents"]["input_ids"], expected["train.doc_input_ids"].long()[order])

    encode = functools.partial(embeddings, model)
    queries, documents = (encode_in_chunks(encode, batch[side], mini_batch_size) for side in ("queries", "documents"))
    document_mask = batch["documents"]["keep_mask"].bool().unflatten(0, (nway, -1)).transpose(0, 1)
    documents = documents.unflatten(0, (nway, -1)).transpose(0, 1)
    scores = max_sim(queries, documents.flatten(0, 1), document_mask=document_mask.flatten(0, 1))
    own = torch.stack([scores[0, :2], scores[1, 2:]])
    torch.testing.assert_close(own, expected["train.scores"], atol=1e-5, rtol=0)
    loss, metrics = LateInteractionObjective()(queries, documents, document_mask=document_mask)
    for name, key in (("cross_entropy_loss", "ce_loss"), ("in_batch_loss", "ib_loss"), ("ranking_loss", "loss")):
        assert metrics[name].item() == pytest.approx(expected[f"train.{key}"].item(), abs=1e-5)
    loss.backward()
    wanted = {name[len("train.grad.") :]: value for name, value in expected.items() if name.startswith("train.grad.")}
    found = gradients(model)
    assert wanted.keys() <= found.keys() and len(wanted) == 5
    assert_close({name: found[name] for name in wanted}, wanted, relative=1e-4)
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in found.values()))
    assert norm == pytest.approx(given["grad_norm_total"], rel=1e-4)


def vectors(batch, nway, dtype=torch.float64):
    """Random unit vectors with masks: queries (batch, 5, 8), documents (batch, nway, 7, 8)."""
    generator = torch.Generator().manual_seed(3)
    queries = torch.nn.functional.normalize(torch.randn(batch, 5, 8, generator=generator, dtype=dtype), dim=-1)
    documents = torch.nn.functional.normalize(torch.randn(batch, nway, 7, 8, generator=generator, dtype=dtype), dim=-1)
    query_mask = torch.rand(batch, 5, generator=generator) > 0.2
    document_mask = torch.rand(batch, nway, 7, generator=generator) > 0.3
    query_mask[:, 0] = document_mask[..., 0] = True
    return queries, documents, query_mask, document_mask


def score(query, document, query_mask, document_mask):
    return sum(max(float(q @ d) for d in document[document_mask]) for q in query[query_mask])


def cross_entropy(scores, target):
    return math.log(sum(math.exp(s - scores[target]) for s in scores))


@pytest.mark.parametrize(("batch", "nway"), [(3, 1), (1, 3), (2, 2), (3, 4), (4, 3)])
@pytest.mark.parametrize("form", ["code", "paper"])
def test_losses_against_loops(batch, nway, form):
    queries, documents, query_mask, document_mask = vectors(batch, nway)
    teacher = torch.randn(batch, nway, generator=torch.Generator().manual_seed(4)) * 3
    pairwise = in_batch = distillation = 0.0
    for i in range(batch):
        scores = {
            (j, k): score(queries[i], documents[j, k], query_mask[i], document_mask[j, k])
            for j in range(batch)
            for k in range(nway)
        }
        own = [scores[i, k] for k in range(nway)]
        pairwise += cross_entropy(own, 0) / batch
        kept = [key for key in scores if form == "paper" or key[0] != i or key[1] == 0]
        assert form == "paper" or len(kept) == batch * nway - nway + 1
        in_batch += cross_entropy([scores[key] for key in kept], kept.index((i, 0))) / batch
        for k in range(nway):
            log_teacher = -cross_entropy([0.5 * value for value in teacher[i].tolist()], k)
            distillation += math.exp(log_teacher) * (log_teacher + cross_entropy(own, k)) / batch
    masks = {"query_mask": query_mask, "document_mask": document_mask}
    objective = LateInteractionObjective(
        in_batch_form=form,
        cross_entropy_weight=0.5,
        in_batch_weight=2.0,
        distillation_weight=3.0 if nway > 1 else 0.0,
        distillation_alpha=0.5,
    )
    loss, metrics = objective(queries, documents, teacher_scores=teacher, **masks)
    assert metrics["cross_entropy_loss"].item() == pytest.approx(0.5 * pairwise, abs=1e-5)
    assert metrics["in_batch_loss"].item() == pytest.approx(2 * in_batch, abs=1e-5)
    expected = 0.5 * pairwise + 2 * in_batch + (3 * distillation if nway > 1 else 0)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    if nway > 1:  # without in-batch negatives the scores are computed in another way
        alone = LateInteractionObjective(in_batch_weight=0.0, distillation_weight=1.0, distillation_alpha=0.5)
        loss, _ = alone(queries, documents, teacher_scores=teacher, **masks)
        assert loss.item() == pytest.approx(pairwise + distillation, abs=1e-6)


def test_scores_of_a_teacher_that_the_student_equals():
    scores = torch.tensor([[3.0, 1.0, -2.0], [0.0, 5.0, 5.0]])
    assert score_distillation_loss(scores, scores).item() == pytest.approx(0, abs=1e-7)
    assert score_distillation_loss(2 * scores, scores, alpha=2.0).item() == pytest.approx(0, abs=1e-7)
    assert nway_cross_entropy_loss(scores[:, :1]).item() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: in_batch_cross_entropy_loss(torch.zeros(2, 5)), r"shape \(batch, batch \* nway\), found \(2, 5\)"),
        (lambda: in_batch_cross_entropy_loss(torch.zeros(2, 4), "book"), "form must be one of code, paper"),
        (lambda: score_distillation_loss(torch.zeros(2, 3), torch.zeros(2, 2)), r"\(2, 3\), found \(2, 2\)"),
        (lambda: LateInteractionObjective(in_batch_form="book"), "in_batch_form must be one of code, paper"),
        (lambda: LateInteractionObjective(in_batch_weight=-1), "in_batch_weight must not be negative"),
        (lambda: LateInteractionObjective(cross_entropy_weight=0, in_batch_weight=0), "nothing to learn from"),
        (lambda: LateInteractionObjective(distillation_alpha=0), "distillation_alpha must be above 0"),
        (lambda: LateInteractionObjective()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), "documents must have shape"),
        (
            lambda: LateInteractionObjective(in_batch_weight=0)(torch.zeros(2, 3, 4), torch.zeros(2, 1, 3, 4)),
            "the rows need negatives",
        ),
        (
            lambda: LateInteractionObjective(distillation_weight=1)(torch.zeros(2, 3, 4), torch.zeros(2, 2, 3, 4)),
            "no 'scores'",
        ),
    ],
)
def test_errors_of_losses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- trainer ----------------------------------------------------------------------------------------------------------


def arguments(folder, **overrides):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 6,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **overrides})


def step(folder, base, processor, rows=ROWS, objective=None, mini_batch_size=None, **overrides):
    """What one step of gradient descent changes, over the learning rate."""
    model = ColBERTXMForRetrieval.from_pretrained(base)
    model.freeze_embeddings_and_language_adapters()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = LateInteractionTrainer(
        model,
        arguments(folder, **overrides),
        objective=objective,
        mini_batch_size=mini_batch_size,
        train_dataset=rows,
        data_collator=LateInteractionCollator(processor, model.config, language="fr"),
        processing_class=processor,
    )
    trainer.train()
    return {name: (before[name] - parameter.detach()) / 0.1 for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def plain_base(folder, tmp_path_factory):
    """The fixture's model without dropout, which would differ between ways to cut a batch."""
    path = tmp_path_factory.mktemp("plain") / "model"
    model = ColBERTXMForRetrieval.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.save_pretrained(path)
    return path


def test_chunks_have_the_gradients_of_the_whole_batch(tmp_path, plain_base, processor):
    """Also where queries do not attend to their masks, whose vectors count all the same."""
    for settings in ({}, {"attend_to_mask_tokens": False}):
        own = ColBERTXMProcessor(processor.tokenizer, max_query_length=16, max_document_length=40, **settings)
        model = ColBERTXMForRetrieval.from_pretrained(plain_base)
        model.freeze_embeddings_and_language_adapters()
        batch = LateInteractionCollator(own, model.config)(ROWS)
        encode = functools.partial(embeddings, model)
        found = []
        for mini_batch_size in (None, 1, 4):
            model.zero_grad()
            encoded = {
                side: encode_in_chunks(encode, batch[side], mini_batch_size) for side in ("queries", "documents")
            }
            documents, mask = (
                tensor.unflatten(0, (2, -1)).transpose(0, 1)
                for tensor in (encoded["documents"], batch["documents"]["keep_mask"].bool())
            )
            LateInteractionObjective()(encoded["queries"], documents, document_mask=mask)[0].backward()
            found.append(gradients(model))
        largest = max(gradient.abs().max().item() for gradient in found[0].values())
        for other in found[1:]:
            for name, gradient in found[0].items():
                assert (other[name] - gradient).abs().max().item() <= 1e-6 * max(1, largest), name


def test_chunks_keep_the_activations_of_one_chunk(model, processor):
    batch = LateInteractionCollator(processor, model.config)(ROWS * 4)

    def kept_elements(mini_batch_size):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            encode_in_chunks(lambda texts: model(**texts).embeddings, batch["documents"], mini_batch_size)
        return sum(kept)

    assert kept_elements(4) < 0.1 * kept_elements(None)


def test_accumulation_averages_the_batches(tmp_path, plain_base, processor):
    """With losses over a query's own passages that is the whole batch; in-batch negatives are those of the parts."""
    own_passages = LateInteractionObjective(in_batch_weight=0.0, distillation_weight=1.0)
    whole = step(tmp_path / "a", plain_base, processor, objective=own_passages)
    parts = step(
        tmp_path / "b", plain_base, processor, objective=own_passages, per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    chunked = step(tmp_path / "c", plain_base, processor, objective=own_passages, mini_batch_size=2)
    scale = max(change.abs().max().item() for change in whole.values())
    for other in (parts, chunked):
        for name, change in whole.items():
            assert (other[name] - change).abs().max().item() <= 2e-6 * scale + 2e-6, name
    assert scale > 0.01
    with_negatives = step(tmp_path / "d", plain_base, processor)
    in_parts = step(tmp_path / "e", plain_base, processor, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert any((in_parts[name] - change).abs().max() > 1e-3 * scale for name, change in with_negatives.items())


def test_only_what_is_not_frozen_changes(tmp_path, plain_base, processor):
    changes = step(tmp_path, plain_base, processor)
    for name, change in changes.items():
        frozen = ".embeddings." in name or ".adapter_modules." in name
        # A bias on all keys changes no attention.
        assert (change.abs().max() > 0) != frozen or name.endswith("key.bias"), name


def test_language_of_the_rows(model, processor):
    collator = LateInteractionCollator(processor, model.config, language="fr")
    batch = collator([{**ROWS[0], "language": "sw"}, ROWS[1], {**ROWS[2], "language": None}])
    languages = model.config.languages
    codes = [languages[i] for i in batch["queries"]["lang_ids"]]
    assert codes == ["sw_KE", "fr_XX", "fr_XX"]
    assert [languages[i] for i in batch["documents"]["lang_ids"]] == codes * 2
    batch = collator([{**ROWS[0], "language": "sw", "document_language": "en"}, {**ROWS[1], "document_language": "sw"}])
    assert [languages[i] for i in batch["queries"]["lang_ids"]] == ["sw_KE", "fr_XX"]
    assert [languages[i] for i in batch["documents"]["lang_ids"]] == ["en_XX", "sw_KE"] * 2
    assert set(LateInteractionCollator(processor, model.config)(ROWS)["queries"]["lang_ids"].tolist()) == {
        model.config.language_id(None)
    }


def test_ways_to_cut_rows(model, processor):
    rows = [{"query": "q", "positive": "p", "negatives": ["a", "b"], "scores": [3, 2, 1]}]
    batch = LateInteractionCollator(processor, model.config, nway=2)(rows)
    assert len(batch["documents"]["input_ids"]) == 2
    assert batch["teacher_scores"].tolist() == [[3, 2]]
    assert len(LateInteractionCollator(processor, model.config)(rows)["documents"]["input_ids"]) == 3
    with pytest.raises(ValueError, match=r"nway is 4, but the row has a positive and 2 negative\(s\)"):
        LateInteractionCollator(processor, model.config, nway=4)(rows)
    with pytest.raises(ValueError, match="no adapter for the language 'klingon'; expected one of en_XX"):
        LateInteractionCollator(processor, model.config)([{**rows[0], "language": "klingon"}])
    with pytest.raises(ValueError, match="no adapter for the language 'klingon'"):
        LateInteractionCollator(processor, model.config)([{**rows[0], "document_language": "klingon"}])


def test_evaluation_ranks_all_documents_of_its_rows(tmp_path, model, processor):
    trainer = LateInteractionTrainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=[*ROWS, {**ROWS[0], "query": "the sea"}],
        data_collator=LateInteractionCollator(processor, model.config),
        processing_class=processor,
    )
    metrics = trainer.evaluate()
    documents = list(dict.fromkeys(text for row in ROWS for text in (row["positive"], *row["negatives"])))
    queries = [row["query"] for row in ROWS] + ["the sea"]
    answers = [documents.index(row["positive"]) for row in [*ROWS, ROWS[0]]]
    scores = model.score(model.encode_queries(queries, processor), model.encode_documents(documents, processor))
    ranks = [1 + int((row > row[answer]).sum()) for row, answer in zip(scores, answers)]
    assert metrics["eval_mrr@10"] == pytest.approx(sum(1 / r for r in ranks if r <= 10) / len(ranks))
    assert metrics["eval_recall@100"] == 1
    assert {"eval_ranking_loss", "eval_in_batch_loss", "eval_accuracy"} <= set(trainer.state.log_history[-1])


def test_a_collapsed_model_finds_nothing(tmp_path, model, processor):
    """All vectors are the same, and so are all scores: the positive is not the best one, but one of many."""
    with torch.no_grad():
        last = model.roberta.encoder.layer[-1].output.LayerNorm
        last.weight.zero_()
        last.bias.fill_(1.0)
    documents = 2 * len(ROWS)
    trainer = LateInteractionTrainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=len(ROWS)),
        eval_dataset=ROWS,
        data_collator=LateInteractionCollator(processor, model.config),
        processing_class=processor,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_mrr@10"] == 0
    assert trainer.state.log_history[-1]["eval_accuracy"] == pytest.approx(1 / documents)


def test_accuracy_counts_ties_by_chance():
    """By hand: dim 1, one vector a text, so that a score is a product."""
    queries = torch.tensor([1.0, 1.0, 1.0]).view(3, 1, 1)
    documents = torch.tensor([[3.0, 1.0], [3.0, 2.0], [0.5, 0.25]]).view(3, 2, 1, 1)
    _, metrics = LateInteractionObjective()(queries, documents)
    assert metrics["accuracy"].item() == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    _, metrics = LateInteractionObjective(in_batch_weight=0)(queries, documents)
    assert metrics["accuracy"].item() == 1
    _, metrics = LateInteractionObjective(in_batch_weight=0)(queries, torch.ones(3, 4, 1, 1))
    assert metrics["accuracy"].item() == 0.25


# --- recipes ----------------------------------------------------------------------------------------------------------


def small_recipe(**overrides):
    settings = {
        "preset": "tiny",
        "vocabulary_size": 200,
        "config": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "dim": 16,
                   "initializer_range": 0.2},
        "processor": {"max_query_length": 12, "max_document_length": 24},
        "batch_size": 3,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 0,
    }  # fmt: skip
    return LateInteractionRecipe(**{**settings, **overrides})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "model"
    train(small_recipe(max_steps=2), path, rows=ROWS)
    return path


def test_the_published_settings_are_the_defaults():
    recipe = LateInteractionRecipe(model="m")
    assert (recipe.learning_rate, recipe.warmup_ratio, recipe.scheduler) == (3e-6, 0.1, "linear")
    assert (recipe.adam_epsilon, recipe.weight_decay, recipe.max_grad_norm) == (1e-6, 0.01, 2.0)
    assert (recipe.batch_size, recipe.seed, recipe.freeze) == (128, 42, True)
    objective = recipe.objective
    assert (objective.cross_entropy_weight, objective.in_batch_weight, objective.in_batch_form) == (1, 1, "code")


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_files_tell_the_kind_of_recipe(tmp_path, suffix, trained, splade_checkpoint, folder):
    recipe = small_recipe(objective=LateInteractionObjective(in_batch_form="paper"), language="fr", nway=2)
    recipe.save(tmp_path / f"recipe{suffix}")
    assert LateInteractionRecipe.load(tmp_path / f"recipe{suffix}") == recipe
    assert load_recipe(tmp_path / f"recipe{suffix}") == recipe
    for model, kind in ((trained, LateInteractionRecipe), (folder, LateInteractionRecipe),
                        (splade_checkpoint, SparseTrainingRecipe)):  # fmt: skip
        (tmp_path / "by_model.yaml").write_text(f"model: {model}\nlearning_rate: 1e-5\n")
        assert load_recipe(tmp_path / "by_model.yaml") == kind(model=str(model), learning_rate=1e-5)
    (tmp_path / "preset.yaml").write_text("preset: tiny\n")
    assert type(load_recipe(tmp_path / "preset.yaml")) is SparseTrainingRecipe


def test_families_as_people_type_them(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("family: colbert-xm\npreset: tiny\nnway: 3\n")
    assert load_recipe(file) == LateInteractionRecipe(preset="tiny", nway=3)
    file.write_text("family: colbert_mx\npreset: tiny\nnway: 3\n")
    message = r"recipe\.yaml: unknown family 'colbert_mx' \(did you mean colbert_xm\?\); known families: mistral_splade"
    with pytest.raises(ValueError, match=message):
        load_recipe(file)
    with pytest.raises(ValueError, match="unknown family 'bert'; known families"):
        LateInteractionRecipe(preset="tiny", family="bert")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nway: 0", "nway must be above 0, found 0"),
        ("accumulation_steps: 0", "accumulation_steps must be above 0"),
        ("freeze: maybe", "freeze must be of type bool, found 'maybe'"),
        ("language: 3", r"language must be of type str \| None, found 3"),
        ("objective: {in_batch_form: book}", "in_batch_form must be one of code, paper"),
        ("objective: {temperature: 2}", "unknown LateInteractionObjective fields temperature"),
        ("stop_on_collapse: true", "unknown LateInteractionRecipe fields stop_on_collapse"),
        ("lora: true", "a preset has none"),
    ],
)
def test_wrong_settings(tmp_path, line, message):
    (tmp_path / "recipe.yaml").write_text(f"family: colbert_xm\npreset: tiny\n{line}\n")
    with pytest.raises(ValueError, match=rf"recipe\.yaml: .*{message}"):
        load_recipe(tmp_path / "recipe.yaml")


def test_train_from_preset(tmp_path):
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = small_recipe(
        max_steps=20, evaluation_data=str(tmp_path / "held_out.jsonl"), language="de", mini_batch_size=4,
        accumulation_steps=2,
    )  # fmt: skip
    result = train(recipe, tmp_path / "run", rows=ROWS)
    assert result["steps"] == 20
    model = AutoModel.from_pretrained(tmp_path / "run")
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert isinstance(model, ColBERTXMForRetrieval)
    assert (processor.max_query_length, processor.max_document_length) == (12, 24)
    assert load_recipe(tmp_path / "run") == recipe
    log = json.loads((tmp_path / "run" / "training_log.json").read_text())
    training = [entry for entry in log if "ranking_loss" in entry]
    assert training[-1]["ranking_loss"] == result["ranking_loss"] < 0.8 * training[0]["ranking_loss"]
    assert training[-1]["ranking_loss"] == pytest.approx(
        training[-1]["cross_entropy_loss"] + training[-1]["in_batch_loss"], abs=1e-5
    )
    evaluations = [entry for entry in log if "eval_mrr@10" in entry]
    assert len(evaluations) == 10
    assert evaluations[-1]["eval_mrr@10"] >= evaluations[0]["eval_mrr@10"]
    train(recipe, tmp_path / "again", rows=ROWS)
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in ("run", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("freeze", [True, False])
def test_freezing(tmp_path, trained, freeze):
    train(small_recipe(preset=None, vocabulary_size=None, config={}, model=str(trained), freeze=freeze),
          tmp_path / "run", rows=ROWS)  # fmt: skip
    before, after = (load_file(path / "model.safetensors") for path in (trained, tmp_path / "run"))
    for part, changes in ((".word_embeddings.", not freeze), (".adapter_modules.en_XX.", not freeze), ("linear.", True),
                          (".output.LayerNorm.weight", True)):  # fmt: skip
        names = [name for name in before if part in name or name.startswith(part)]
        assert names and all((not torch.equal(before[name], after[name])) == changes for name in names), part
    if not freeze:  # the languages that the data does not speak stay
        names = [name for name in before if ".adapter_modules.fr_XX." in name]
        assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in names)


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_resume_after_a_kill(tmp_path):
    recipe = small_recipe(max_steps=9, save_steps=2)
    train(recipe, tmp_path / "whole", rows=ROWS)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "parts", rows=ROWS, callbacks=[Interrupt()])
    with pytest.raises(ValueError, match="these fields differ: nway"):
        train(small_recipe(max_steps=9, save_steps=2, nway=1), tmp_path / "parts", rows=ROWS, resume=True)
    train(recipe, tmp_path / "parts", rows=ROWS, resume=True)
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_lora(tmp_path, trained):
    """Adapters of LoRA train, embeddings and language adapters do not; the merged model gives the adapted vectors."""
    from peft import PeftModel

    recipe = LateInteractionRecipe(
        model=str(trained), lora=True, dtype="float32", batch_size=3, max_steps=8, learning_rate=1e-2,
        mini_batch_size=2, save_steps=0, lora_on_head=True,
    )  # fmt: skip
    model, _ = load_for_training(recipe)
    adapted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapted and all(".lora_" in name for name in adapted)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapted} == {
        "query", "key", "value", "dense", "linear",
    }  # fmt: skip
    train(recipe, tmp_path / "run", rows=ROWS)
    before, after = (load_file(path / "model.safetensors") for path in (trained, tmp_path / "run"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        targeted = name.endswith("weight") and name.split(".")[-2] in {"query", "key", "value", "dense", "linear"}
        assert torch.equal(weight, after[name]) != targeted, name
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    wrapped = PeftModel.from_pretrained(AutoModel.from_pretrained(trained), tmp_path / "run" / "adapter")
    merged = AutoModel.from_pretrained(tmp_path / "run")
    texts = [row["positive"] for row in ROWS]
    expected = wrapped.get_base_model().encode_documents(texts, processor)
    for found, wanted in zip(merged.encode_documents(texts, processor), expected):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_bfloat16(tmp_path):
    losses = []
    for name, options in (("full", {}), ("half", {"bf16": True})):
        train(small_recipe(max_steps=12, **options), tmp_path / name, rows=ROWS)
        log = json.loads((tmp_path / name / "training_log.json").read_text())
        losses.append([entry["ranking_loss"] for entry in log if "ranking_loss" in entry])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.2, abs=0.2)
    assert AutoModel.from_pretrained(tmp_path / "half").dtype == torch.float32


@pytest.mark.parametrize(
    ("overrides", "rows", "error", "message"),
    [
        ({}, [], ValueError, "no training rows"),
        ({"preset": "huge"}, ROWS, KeyError, "unknown preset 'huge'"),
        ({"family": "mistral_splade"}, ROWS, ValueError, "no multi-vector retriever of rarezoo .known: colbert_xm"),
        ({"language": "klingon"}, ROWS, ValueError, "no adapter for the language 'klingon'"),
        ({"processor": {"max_document_length": 600}}, ROWS, ValueError, "600, but the model takes 512"),
        ({"nway": 3}, ROWS, ValueError, "nway is 3"),
        ({"objective": {"distillation_weight": 1.0}}, [{"query": "q", "positive": "p"}] * 6, ValueError, "scores"),
        ({"initialization": "lexical", "config": {"dim": 128}}, ROWS, ValueError, "needs dim below hidden_size"),
    ],
)
def test_what_cannot_be_trained(tmp_path, overrides, rows, error, message):
    with pytest.raises(error, match=message):
        train(small_recipe(**overrides), tmp_path / "run", rows=rows)
    assert not (tmp_path / "run" / "config.json").exists()


def test_beginning_with_a_language_model(tmp_path, folder):
    """As the published training did: X-MOD's weights, a new projection, XLM-R's tokenizer."""
    source = ColBERTXMForRetrieval.from_pretrained(folder).config
    fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
              "max_position_embeddings", "languages", "default_language", "type_vocab_size")  # fmt: skip
    torch.manual_seed(0)
    base = XmodForMaskedLM(XmodConfig(**{name: getattr(source, name) for name in fields}))
    base.save_pretrained(tmp_path / "xmod")
    recipe = LateInteractionRecipe(
        model=str(tmp_path / "xmod"), tokenizer=str(folder), config={"dim": 8}, batch_size=3, max_steps=2,
        processor={"max_query_length": 12, "max_document_length": 40}, save_steps=0,
    )  # fmt: skip
    train(recipe, tmp_path / "run", rows=ROWS)
    model, processor = (auto.from_pretrained(tmp_path / "run") for auto in (AutoModel, AutoProcessor))
    assert isinstance(model, ColBERTXMForRetrieval)
    assert model.linear.weight.shape == (8, 32) and processor.max_query_length == 12
    for name, parameter in model.roberta.named_parameters():
        if ".adapter_modules." in name or name.startswith("embeddings."):
            assert torch.equal(parameter, base.roberta.get_parameter(name)), name
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_model_of_another_kind(tmp_path, splade_checkpoint, trained):
    with pytest.raises(ValueError, match="'mistral_splade' is no multi-vector retriever"):
        train(LateInteractionRecipe(model=str(splade_checkpoint)), tmp_path / "run", rows=ROWS)
    with pytest.raises(ValueError, match="'colbert_xm' is no sparse retriever"):
        train(SparseTrainingRecipe(model=str(trained)), tmp_path / "run", rows=ROWS)


# --- starting from nothing --------------------------------------------------------------------------------------------


def test_tokenizer():
    tokenizer = train_xlm_r_tokenizer([text for row in TEXTS for text in row] * 3, vocabulary_size=120)
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer.mask_token_id == len(tokenizer) - 1 <= 119
    ids = tokenizer("The sea")["input_ids"]
    assert ids == [0, *tokenizer("the SEA", add_special_tokens=False)["input_ids"], 2]
    assert tokenizer.convert_ids_to_tokens(ids)[1].startswith("▁")
    inside = tokenizer("the.sea", add_special_tokens=False)["input_ids"]
    assert inside[-1] == ids[-2], "a word after a full stop is the same word"
    processor = ColBERTXMProcessor(tokenizer)
    assert (processor.process_queries(["sea"])["input_ids"][0, :2] == torch.tensor([0, 3])).all()
    kept = processor.process_documents(["the sea."])
    assert kept["keep_mask"].sum() == kept["attention_mask"].sum() - 1, "punctuation is dropped"
    with pytest.raises(ValueError, match="vocabulary_size must be at least 6"):
        train_xlm_r_tokenizer(["a"], 5)


def test_lexical_start_counts_shared_words_by_their_rarity():
    texts = [{"query": q, "positive": p, "negatives": [n]} for q, p, n in TEXTS]
    recipe = small_recipe(initialization="lexical", config={"hidden_size": 256, "dim": 255, "num_attention_heads": 2})
    torch.manual_seed(0)
    model, processor = build_from_preset(recipe, texts)
    model.eval()
    documents = list(dict.fromkeys(text for row in TEXTS for text in row[1:]))
    queries = [row[0] for row in TEXTS]
    found = model.score(
        model.encode_queries(queries, processor, language="fr"), model.encode_documents(documents, processor)
    )
    tokenizer = processor.tokenizer
    ids = [set(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in documents]

    def rarity(token):
        frequency = sum(token in row for row in ids)
        return math.log(1 + (len(ids) - frequency + 0.5) / (frequency + 0.5))

    rarest = math.log(1 + (len(ids) + 0.5) / 0.5)
    for row, query in zip(found, queries):
        tokens = tokenizer(query, add_special_tokens=False)["input_ids"][:9]
        shared = torch.tensor([sum(rarity(t) / rarest for t in tokens if t in document) for document in ids])
        # Random vectors of 254 dimensions are orthogonal up to about 1 / 16.
        difference = row - shared
        assert (difference - difference.mean()).abs().max() < 0.15 * len(tokens)
        assert int(row.argmax()) == int(shared.argmax()) or shared.max() == shared[int(row.argmax())]


# --- learning ---------------------------------------------------------------------------------------------------------


def invented_rows(number=50):
    """Queries and documents without a common word: query word i means document word i."""
    generator = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = sorted({"".join(generator.sample(syllables, 3)) for _ in range(200)})
    generator.shuffle(words)
    asked, said = words[:60], words[60:120]
    rows = []
    for _ in range(number):
        meanings = generator.sample(range(60), 4)
        rows.append(
            {"query": " ".join(asked[i] for i in meanings[:3]), "positive": " ".join(said[i] for i in meanings)}
        )
    return rows


def mean_reciprocal_rank(model, processor, queries, documents):
    """MRR@10, document i being the answer to query i; a document with the same score stands before it."""
    scores = model.score(model.encode_queries(queries, processor), model.encode_documents(documents, processor))
    answers = scores[: len(queries), : len(queries)].diagonal()
    ranks = (scores >= answers[:, None]).sum(dim=1)
    return torch.where(ranks <= 10, 1 / ranks, 0.0).mean().item()


@pytest.mark.parametrize("start", ["lexical", "random"])
def test_fifty_documents_are_learned_by_heart(tmp_path, start):
    """In some ten seconds; neither start knows anything of them."""
    rows = invented_rows()
    queries, documents = ([row[name] for row in rows] for name in ("query", "positive"))
    recipe = LateInteractionRecipe.small_from_scratch(
        initialization=start, vocabulary_size=600, batch_size=50, max_steps=60, learning_rate=2e-3,
        freeze=start == "random", processor={"max_query_length": 16, "max_document_length": 32},
    )  # fmt: skip
    model, processor = build_from_preset(recipe, rows)
    assert mean_reciprocal_rank(model, processor, queries, documents) < 0.2
    result = train(recipe, tmp_path / "run", rows=rows)
    assert result["train_runtime"] < 60
    model, processor = (auto.from_pretrained(tmp_path / "run") for auto in (AutoModel, AutoProcessor))
    assert mean_reciprocal_rank(model, processor, queries, documents) == 1.0


@pytest.mark.slow
def test_learns_on_real_text_from_nothing(tmp_path):
    """Documentation strings: held-out summaries find their bodies better after training than by shared words."""
    from rarezoo.cli.docstring_corpus import read_docstring_pairs

    pairs = read_docstring_pairs(2500)
    held_out, training = pairs[:200], pairs[200:]
    rows = [{"query": pair.query, "positive": pair.document} for pair in training]
    recipe = LateInteractionRecipe.small_from_scratch()
    queries, documents = [pair.query for pair in held_out], [pair.document for pair in pairs[:1000]]
    torch.manual_seed(recipe.seed)
    start = mean_reciprocal_rank(*build_from_preset(recipe, rows), queries, documents)
    train(recipe, tmp_path / "run", rows=rows)
    model, processor = (auto.from_pretrained(tmp_path / "run") for auto in (AutoModel, AutoProcessor))
    learned = mean_reciprocal_rank(model, processor, queries, documents)
    assert start > 0.35, "the lexical start alone"
    assert learned > start + 0.01
    log = json.loads((tmp_path / "run" / "training_log.json").read_text())
    losses = [entry["ranking_loss"] for entry in log if "ranking_loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(tmp_path, trained, monkeypatch):
    """colbert-ai's files, and a recipe that does not say which kind it is: the model does."""
    monkeypatch.chdir(tmp_path)
    passages = [text for row in TEXTS for text in row[1:]]
    (tmp_path / "queries.tsv").write_text("".join(f"q{i}\t{row[0]}\n" for i, row in enumerate(TEXTS)))
    (tmp_path / "collection.tsv").write_text("".join(f"{text}\n" for text in passages))
    triples = [[f"q{i}", [2 * i, 5.0], [2 * i + 1, 1.0], [2 * i - 1 if i else 5, 0.5]] for i in range(len(TEXTS))]
    write_jsonl(tmp_path / "triples.jsonl", triples)
    recipe = {"model": str(trained), "training_data": "triples.jsonl", "queries": "queries.tsv",
              "corpus": "collection.tsv", "batch_size": 3, "max_steps": 4, "nway": 2, "language": "fr",
              "objective": {"distillation_weight": 1.0, "cross_entropy_weight": 0.0}}  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    shown = call(
        "train", "recipe.json", "out", "--set", "learning_rate=0.001", "--set", "objective.in_batch_form=paper"
    )
    assert "4 steps" in shown.stdout and "distillation_loss" in shown.stdout
    stored = load_recipe(tmp_path / "out")
    assert isinstance(stored, LateInteractionRecipe)
    assert (stored.learning_rate, stored.objective.in_batch_form, stored.nway) == (0.001, "paper", 2)
    texts = [{"query": row[0], "positive": row[1], "negatives": [row[2]], "scores": [5.0, 1.0]} for row in TEXTS]
    train(stored, tmp_path / "by_text", rows=texts)
    found, expected = (load_file(tmp_path / run / "model.safetensors") for run in ("out", "by_text"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "4 steps" in call("train", "out", "again").stdout
    assert "unknown LateInteractionRecipe fields colour" in refused("train", "recipe.json", "x", "--set", "colour=1")
    assert "no adapter for the language 'klingon'" in refused("train", "recipe.json", "x", "--set", "language=klingon")
    (tmp_path / "triples.jsonl").write_text('["q0", 0, 1]\n["q1", 99, 2]\n')
    changes = ["--set", "objective.distillation_weight=0", "--set", "objective.cross_entropy_weight=1"]
    line = refused("train", "recipe.json", "x", "--set", "batch_size=2", *changes)
    assert "triples.jsonl, line 2: column 'positive_id' holds id 99, which is not in the corpus table" in line
