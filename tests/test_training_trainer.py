"""The trainer: exact steps, schedule, resuming, collapse, saving, learning."""

import math
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoProcessor, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from rarezoo.mistral_splade import MistralSpladeConfig, MistralSpladeForRetrieval, MistralSpladeProcessor
from rarezoo.training import (
    RetrievalCollator,
    SparseObjective,
    SparseRetrievalTrainer,
    flops_regularizer,
    info_nce_loss,
    l1_regularizer,
    quadratic_weight,
)

from .reference import INPUTS, reference_model, reference_processor

ROWS = [
    {"query": query, "positive": positive, "negative": negative}
    for query, positive, negative in zip(INPUTS["queries"], INPUTS["documents"], INPUTS["negatives"])
]
ROWS += [{"query": text, "positive": text[::-1], "negative": text[:9]} for text in INPUTS["plain_texts"]]


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


def trainer_for(model, args, rows=ROWS, processor=None, **options):
    processor = processor or reference_processor()
    return SparseRetrievalTrainer(
        model,
        args,
        train_dataset=rows,
        data_collator=RetrievalCollator(processor),
        processing_class=processor,
        **options,
    )


def changes(model, before):
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def plain_gradients(model, rows, objective_of):
    """Autograd of the whole batch, without trainer, collator or chunks."""
    processor = reference_processor()
    queries = model(**processor.process_queries([row["query"] for row in rows])).sparse_embedding
    positives = model(**processor.process_documents([row["positive"] for row in rows])).sparse_embedding
    negatives = model(**processor.process_documents([row["negative"] for row in rows])).sparse_embedding
    model.zero_grad()
    objective_of(queries, positives, negatives).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("batch", "accumulation", "mini_batch_size"), [(6, 1, None), (6, 1, 2), (2, 3, None), (3, 2, 1), (2, 3, 4)]
)
def test_one_step_is_the_gradient_of_the_whole_batch(tmp_path, batch, accumulation, mini_batch_size):
    """Also under gradient accumulation, where FLOPS and in-batch negatives of the parts would be something else."""
    model = reference_model()

    def whole(queries, positives, negatives):
        documents = torch.cat([positives, negatives])
        return (
            info_nce_loss(queries, positives, [negatives])
            + 0.3 * l1_regularizer(queries)
            + 0.5 * flops_regularizer(documents)
        )

    expected = plain_gradients(model, ROWS, whole)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    objective = SparseObjective(
        query_regularizer="l1",
        query_regularizer_weight=0.3,
        document_regularizer_weight=0.5,
        regularizer_warmup_steps=1,
    )
    trainer_for(model, args, objective=objective, mini_batch_size=mini_batch_size).train()
    assert args.gradient_accumulation_steps == accumulation, "the caller's arguments were changed"
    for name, change in changes(model, before).items():
        difference = (change + 0.1 * expected[name]).abs().max().item()
        assert difference <= 0.1 * 1e-4 * expected[name].abs().max().item() + 1e-8, name


def test_log_follows_the_schedule(tmp_path):
    objective = SparseObjective(query_regularizer_weight=0.01, document_regularizer_weight=0.02)
    trainer = trainer_for(reference_model(), arguments(tmp_path, max_steps=9, learning_rate=0.01), objective=objective)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "ranking_loss" in entry]
    assert [entry["query_lambda"] for entry in logs] == pytest.approx(
        [0.01 * min(step / 3, 1) ** 2 for step in range(1, 10)]
    )
    for entry in logs:
        assert entry["loss"] == pytest.approx(
            entry["ranking_loss"]
            + entry["query_lambda"] * entry["query_regularizer"]
            + entry["document_lambda"] * entry["document_regularizer"],
            abs=2e-4,  # HF rounds the loss to four places
        )
        assert 0 < entry["query_active_dimensions"] <= 160
        assert entry["document_flops"] == pytest.approx(entry["document_regularizer"])


def test_distillation_by_scores(tmp_path):
    rows = [{**row, "scores": [4.0 - i, 1.0]} for i, row in enumerate(ROWS)]
    objective = SparseObjective(info_nce_weight=0.0, margin_mse_weight=1.0, kl_weight=1.0)
    args = arguments(tmp_path, max_steps=60, learning_rate=1e-3, optim="adamw_torch")
    trainer = trainer_for(reference_model(), args, rows, objective=objective)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kl_loss" in entry]
    assert logs[-1]["kl_loss"] < 0.5 * logs[0]["kl_loss"]
    assert logs[-1]["margin_mse_loss"] < 0.5 * logs[0]["margin_mse_loss"]
    with pytest.raises(ValueError, match="neither 'margin' nor 'scores'"):
        trainer_for(reference_model(), args, objective=SparseObjective(margin_mse_weight=1.0)).train()
    with pytest.raises(ValueError, match="distillation needs rows with negatives"):
        pairs = [{"query": row["query"], "positive": row["positive"]} for row in ROWS]
        trainer_for(reference_model(), args, pairs, objective=SparseObjective(kl_weight=1.0)).train()


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    def run(folder, callbacks=(), resume=False):
        model = reference_model(attention_dropout=0.2, attn_implementation="eager")
        args = arguments(
            folder,
            max_steps=9,
            per_device_train_batch_size=3,
            optim="adamw_torch",
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            save_strategy="steps",
            save_steps=2,
        )
        trainer = trainer_for(model, args, callbacks=callbacks, mini_batch_size=2)
        trainer.train(resume_from_checkpoint=resume)
        history = [
            {name: entry[name] for name in ("step", "ranking_loss", "query_lambda")}
            for entry in trainer.state.log_history
            if "ranking_loss" in entry
        ]
        return model.state_dict(), history

    weights, history = run(tmp_path / "whole")
    run(tmp_path / "parts", callbacks=[StopAt()])
    assert not (tmp_path / "parts" / "checkpoint-9").exists()
    resumed_weights, resumed_history = run(tmp_path / "parts", resume=True)
    assert resumed_history == history
    assert len(history) == 9
    assert history[4]["query_lambda"] == pytest.approx(quadratic_weight(1e-3, 4, 3))
    for name, tensor in weights.items():
        assert torch.equal(tensor, resumed_weights[name]), name


@pytest.mark.parametrize("stop", [False, True])
def test_collapse_is_noticed(tmp_path, caplog, stop):
    objective = SparseObjective(
        query_regularizer_weight=50.0, document_regularizer_weight=50.0, regularizer_warmup_steps=3
    )
    args = arguments(tmp_path, max_steps=40, optim="adamw_torch", learning_rate=1e-2)
    trainer = trainer_for(reference_model(), args, objective=objective, stop_on_collapse=stop)
    trainer.train()
    warnings = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    assert len(warnings) == 1
    assert "smaller" in warnings[0] and "stabilize" in warnings[0]
    assert (trainer.state.global_step < 40) is stop
    last = [entry for entry in trainer.state.log_history if "ranking_loss" in entry][-1]
    assert min(last["query_active_dimensions"], last["document_active_dimensions"]) < 1
    if not stop:  # everything is zero by now, and nothing is NaN
        assert last["ranking_loss"] == pytest.approx(math.log(12), abs=1e-3)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_healthy_run_does_not_warn(tmp_path, caplog):
    trainer_for(reference_model(), arguments(tmp_path, max_steps=5)).train()
    assert not [record for record in caplog.records if "collapsed" in record.getMessage()]


def test_nan_is_an_error(tmp_path):
    args = arguments(tmp_path, max_steps=5, learning_rate=1e38)
    with pytest.raises(FloatingPointError, match="Continue from the last checkpoint"):
        trainer_for(reference_model(), args).train()


def test_saved_model_opens_with_the_auto_classes(tmp_path):
    model = reference_model()
    trainer = trainer_for(model, arguments(tmp_path / "run", max_steps=2))
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    reloaded = AutoModel.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert isinstance(reloaded, MistralSpladeForRetrieval)
    texts = INPUTS["documents"]
    expected = model.encode_documents(texts, reference_processor(), output="dense")
    assert torch.equal(reloaded.encode_documents(texts, processor, output="dense"), expected)


def test_bfloat16_autocast_and_activation_checkpointing(tmp_path):
    def losses(**options):
        model = reference_model()
        args = arguments(tmp_path, max_steps=15, optim="adamw_torch", learning_rate=3e-3, **options)
        trainer = trainer_for(model, args, mini_batch_size=4)
        trainer.train()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        return [entry["ranking_loss"] for entry in trainer.state.log_history if "ranking_loss" in entry]

    # transformers renamed the option within version 5
    known = TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    full = losses()
    half = losses(bf16=True)
    assert losses(**{checkpointing: True}) == pytest.approx(full, abs=1e-5)
    assert half == pytest.approx(full, rel=0.1)
    assert half != full
    assert half[-1] < 0.7 * half[0]


def test_evaluation_logs_every_metric(tmp_path):
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=6)
    trainer = trainer_for(reference_model(), args, eval_dataset=ROWS)
    trainer.train()
    entry = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    processor = reference_processor()
    batch = RetrievalCollator(processor)(ROWS)
    model = trainer.model.eval()
    with torch.no_grad():
        queries, documents = (model(**batch[side]).sparse_embedding for side in ("queries", "documents"))
    assert entry["eval_ranking_loss"] == pytest.approx(
        info_nce_loss(queries, documents[:6], [documents[6:]]).item(), abs=1e-5
    )
    assert entry["eval_query_flops"] == pytest.approx(flops_regularizer(queries).item(), abs=1e-5)
    assert entry["eval_query_lambda"] == pytest.approx(1e-3)


def lora_model(**settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(reference_model(), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, **settings))


@pytest.mark.parametrize(
    "settings", [{}, {"task_type": "FEATURE_EXTRACTION"}, {"target_modules": ["q_proj", "lm_head"]}]
)
def test_lora_changes_only_adapters_and_merges(tmp_path, settings):
    model = lora_model(**settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = arguments(tmp_path, max_steps=8, optim="adamw_torch", learning_rate=1e-2)
    trainer = trainer_for(model, args, mini_batch_size=2)
    trainer.train()
    for name, change in changes(model, before).items():
        assert (change.abs().max() > 0) == ("lora_" in name), name
    logs = [entry["ranking_loss"] for entry in trainer.state.log_history if "ranking_loss" in entry]
    assert logs[-1] < logs[0]

    texts, processor = INPUTS["documents"], reference_processor()
    unmerged = model.get_base_model().encode_documents(texts, processor, output="dense")
    merged = model.merge_and_unload()
    assert isinstance(merged, MistralSpladeForRetrieval)
    assert torch.allclose(merged.encode_documents(texts, processor, output="dense"), unmerged, atol=2e-5)
    assert not torch.allclose(unmerged, reference_model().encode_documents(texts, processor, output="dense"), atol=1e-3)


class SynonymRetrieval:
    """Queries and documents that share no word: query word i means document word i.

    A lexical matcher finds nothing, so every gain is learned. Documents mix the words of five topics with filler.
    """

    def __init__(self, topics, training_rows, held_out=80, seed=0):
        self.topics = topics
        words = [f"{kind}{i}" for kind in ("ask", "say", "fill") for i in range(topics)]
        vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
        )
        template = "<s>{!%%text%%}{%%text%%}"
        self.processor = MistralSpladeProcessor(fast, query_template=template, document_template=template)
        self.vocab_size = len(vocabulary)
        generator = random.Random(seed)
        rows = [self.row(generator) for _ in range(training_rows + held_out)]
        self.training, self.held_out = rows[:training_rows], rows[training_rows:]

    def row(self, generator):
        topics = generator.sample(range(self.topics), 5)
        document = [f"say{i}" for i in topics] + [f"fill{generator.randrange(self.topics)}" for _ in range(5)]
        generator.shuffle(document)
        query = [f"ask{i}" for i in generator.sample(topics, 3)]
        return {"query": " ".join(query), "positive": " ".join(document)}

    def model(self, hidden_size):
        torch.manual_seed(0)
        return MistralSpladeForRetrieval(
            MistralSpladeConfig(
                vocab_size=self.vocab_size,
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=hidden_size // 4,
                max_position_embeddings=128,
                initializer_range=0.1,
                sliding_window=None,
            )
        )

    def ndcg_at_10(self, model):
        queries = model.encode_queries([row["query"] for row in self.held_out], self.processor)
        documents = model.encode_documents([row["positive"] for row in self.held_out], self.processor)
        scores = (queries @ documents.T).toarray()
        gains = []
        for i, row in enumerate(scores):
            rank = 1 + np.sum(row >= row[i]) - 1  # ties count against us
            gains.append(1 / math.log2(1 + rank) if rank <= 10 and row[i] > 0 else 0.0)
        return float(np.mean(gains))


def learn_synonyms(folder, task, model, max_steps, batch_size=64, learning_rate=6e-3):
    args = arguments(
        folder,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        optim="adamw_torch",
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_grad_norm=1.0,
        logging_steps=10,
        seed=1,
    )
    trainer = trainer_for(model, args, task.training, task.processor)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "ranking_loss" in entry]


def test_learns_retrieval(tmp_path):
    task = SynonymRetrieval(topics=24, training_rows=1000)
    model = task.model(hidden_size=48)
    before = task.ndcg_at_10(model)
    logs = learn_synonyms(tmp_path, task, model, max_steps=200)
    after = task.ndcg_at_10(model)
    assert before < 0.15
    assert after > 0.85, (before, after)
    assert logs[-1]["ranking_loss"] < 0.2 * logs[0]["ranking_loss"]
    assert 1 < logs[-1]["document_active_dimensions"] < task.vocab_size


@pytest.mark.slow
def test_learns_retrieval_of_many_topics(tmp_path):
    task = SynonymRetrieval(topics=150, training_rows=6000)
    model = task.model(hidden_size=96)
    before = task.ndcg_at_10(model)
    learn_synonyms(tmp_path, task, model, max_steps=800, batch_size=128, learning_rate=4e-3)
    after = task.ndcg_at_10(model)
    assert before < 0.15
    assert after > 0.85, (before, after)
