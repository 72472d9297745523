"""After-care of transplanted models: only chosen rows move, ALM against double precision, recipes and their runs."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import normalizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from rarezoo.tokenizer_transplant import supertokens
from rarezoo.tokenizer_transplant.modeling_tokenizer_transplant import TransplantedForCausalLM
from rarezoo.tokenizer_transplant.transplanting import transplant_tokenizer
from rarezoo.training import TransplantTrainingRecipe, align_chunks, alm_loss, load_recipe, only_embeddings_train, train
from rarezoo.training.tokenizer_transplant import (
    alignment_rows,
    collate_aligned,
    new_row_ids,
    token_log_probabilities,
)

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizer_transplant"
BASE, DONOR = FIXTURES / "base_model", FIXTURES / "donor_model"
TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 8,
    "Über den Wolkenkratzer fährt kein Zug, don't know why. " * 8,
    "A star is a sun that is far away; भारत में. " * 8,
]
VOCABULARY = 48


def small_model(kind, tied):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied, "pad_token_id": 0}
    if kind == "llama":
        config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, **sizes)
        return LlamaForCausalLM(config)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **sizes))
    if kind == "bert":  # its head has a bias
        config = BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=32, **sizes,
        )  # fmt: skip
        return BertForMaskedLM(config)
    config = T5Config(d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config)


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


# --- which rows learn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
@pytest.mark.parametrize(
    ("kind", "tied"),
    [("llama", True), ("llama", False), ("gpt2", True), ("bert", True), ("bert", False), ("t5", True)],
)
def test_only_chosen_rows_move(kind, tied, optimizer):
    """All else is bit-identical in spite of weight decay and momentum, and what is tied stays one tensor."""
    model = small_model(kind, tied).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = [3, 7, 40]
    ids = torch.tensor([[3, 7, 9, 40, 3, 11]])
    start = loss_of(model, ids).item()
    with only_embeddings_train(model, chosen) as trained:
        assert loss_of(model, ids).item() == start
        assert [parameter.shape for parameter in trained] == [(3, 16)] * (1 if tied else 2)
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
        steps = (
            torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
            if optimizer == "adamw"
            else torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.5)
        )
        for _ in range(4):
            loss_of(model, ids).backward()
            assert all(parameter.grad is None or parameter.requires_grad for parameter in model.parameters())
            steps.step()
            steps.zero_grad()
        inside = loss_of(model, ids).item()
    assert loss_of(model, ids).item() == pytest.approx(inside, abs=1e-6) and inside < start
    tables = {name for name, tensor in before.items() if tensor.shape[:1] == (VOCABULARY,) and tensor.dim() == 2}
    others = torch.ones(VOCABULARY, dtype=torch.bool)
    others[chosen] = False
    for name, tensor in model.state_dict().items():
        if name in tables:
            assert torch.equal(tensor[others], before[name][others]), name
            assert (tensor[chosen] != before[name][chosen]).any(dim=1).all(), name
        else:
            assert torch.equal(tensor, before[name]), name
    assert set(model.state_dict()) == set(before)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert type(model.get_input_embeddings()) is torch.nn.Embedding


def test_gradients_are_those_of_the_whole_table():
    """The rows' gradients, in double precision, against those that the tables get when all trains."""
    model = small_model("llama", tied=False).double()
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    loss_of(model, ids).backward()
    expected = [model.get_input_embeddings().weight.grad, model.get_output_embeddings().weight.grad]
    mask = torch.zeros(VOCABULARY, dtype=torch.bool)
    mask[[1, 5, int(ids[0, 0])]] = True
    model.zero_grad()
    with only_embeddings_train(model, mask) as trained:
        loss_of(model, ids).backward()
        for parameter, gradient in zip(trained, expected):
            assert parameter.dtype == torch.float64
            torch.testing.assert_close(parameter.grad, gradient[mask], rtol=1e-10, atol=1e-12)


def test_all_rows_and_low_precision():
    """Small steps add up in float32 and are rounded once."""
    model = small_model("llama", tied=True).to(torch.bfloat16)
    before = model.get_input_embeddings().weight.detach().clone()
    with only_embeddings_train(model) as trained:
        assert [(rows.dtype, rows.shape) for rows in trained] == [(torch.float32, (VOCABULARY, 16))]
        assert loss_of(model, torch.tensor([[1, 2, 3]])).dtype in (torch.float32, torch.bfloat16)
        with torch.no_grad():
            for _ in range(1000):
                trained[0] += 1e-5
    expected = (before.float() + 1e-2).to(torch.bfloat16)
    torch.testing.assert_close(model.get_input_embeddings().weight, expected, rtol=1e-2, atol=1e-4)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_rows_are_written_back_after_a_mistake():
    model = small_model("llama", tied=False)
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(KeyError), only_embeddings_train(model, [2]) as trained:
        with torch.no_grad():
            trained[0].fill_(5)
        raise KeyError
    assert (model.get_input_embeddings().weight[2] == 5).all()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.norm.weight"]


@pytest.mark.parametrize(
    ("row_ids", "message"),
    [
        ([], "expected the ids of the rows"),
        ([1, 1], "different ones from 0 to 47"),
        ([-1], "different ones from 0 to 47"),
        ([48], "different ones from 0 to 47"),
        ([0.5], "expected the ids of the rows"),
        (torch.ones(47, dtype=torch.bool), r"shape \(48,\), found \(47,\)"),
        (torch.zeros(48, dtype=torch.bool), "expected the ids of the rows"),
    ],
)
def test_rows_that_are_none(row_ids, message):
    model = small_model("llama", tied=True)
    with pytest.raises(ValueError, match=message), only_embeddings_train(model, row_ids):
        pass
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_new_rows_by_the_report(tmp_path):
    sources = ["special", "copied", "combined", "random", "copied", "mapped", "padding", "dense"]
    tokens = [{"id": number, "source": source} for number, source in enumerate(sources)]
    (tmp_path / "transplant_report.json").write_text(json.dumps({"tokens": tokens}))
    assert new_row_ids(tmp_path) == [2, 3, 5, 7]
    (tmp_path / "transplant_report.json").write_text(json.dumps({"tokens": tokens[:2]}))
    with pytest.raises(ValueError, match="no row is new"):
        new_row_ids(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither transplant_report\.json nor"):
        new_row_ids(tmp_path / "other")


# --- approximate likelihood matching ----------------------------------------------------------------------------------


def test_chunks_by_hand():
    student, teacher = align_chunks([b"ab", b"c", b"def", b"g"], [b"a", b"bc", b"d", b"ef", b"", b"g"])
    assert student.tolist() == [0, 0, 1, 2]
    assert teacher.tolist() == [0, 0, 1, 1, 1, 2]
    with pytest.raises(ValueError, match="differ at byte 2: b'c' and b'd'"):
        align_chunks([b"abc"], [b"ab", b"d"])
    with pytest.raises(ValueError, match="differ at byte 2: b'' and b'c'"):
        align_chunks([b"ab"], [b"ab", b"c"])


def test_chunks_are_the_finest_that_both_have():
    generator = random.Random(0)
    for _ in range(100):
        text = bytes(generator.randrange(256) for _ in range(generator.randrange(1, 40)))
        sides, borders = [], []
        for _ in range(2):
            cuts = sorted({0, len(text), *(generator.randrange(len(text) + 1) for _ in range(8))})
            sides.append([text[start:end] for start, end in itertools.pairwise(cuts)])
            borders.append(set(cuts))
        found = align_chunks(*sides)
        expected = sorted(borders[0] & borders[1])
        for tokens, numbers in zip(sides, found):
            chunks = [b"".join(t for t, n in zip(tokens, numbers) if n == number) for number in range(max(numbers) + 1)]
            assert chunks == [text[start:end] for start, end in itertools.pairwise(expected)]


def reference_loss(student_logits, teacher_logits, student_ids, teacher_ids, student_chunks, teacher_chunks):
    """One chunk at a time, in Python's double precision."""
    losses = []
    for row in range(len(student_ids)):
        sums = []
        for logits, ids, chunks in (
            (student_logits[row], student_ids[row], student_chunks[row]),
            (teacher_logits[row], teacher_ids[row], teacher_chunks[row]),
        ):
            found = {}
            for place, number in enumerate(chunks.tolist()):
                if number >= 0:
                    values = logits[place - 1].double()
                    probability = math.exp(values[ids[place]]) / sum(math.exp(value) for value in values)
                    found[number] = found.get(number, 0.0) + math.log(probability)
            sums.append(found)
        for number, of_student in sums[0].items():
            b, a = of_student / 100 - 1e-6, sums[1][number] / 100 - 1e-6
            losses.append(-(math.exp(a) * b + (1 - math.exp(a)) * math.log(1 - math.exp(b))))
    return sum(losses) / len(losses)


def test_loss_against_double_precision():
    generator = torch.Generator().manual_seed(0)
    student_ids = torch.randint(11, (3, 6), generator=generator)
    teacher_ids = torch.randint(7, (3, 5), generator=generator)
    student_logits = 3 * torch.randn(3, 6, 11, generator=generator)
    teacher_logits = 3 * torch.randn(3, 5, 7, generator=generator)
    student_chunks = torch.tensor([[-1, 0, 0, 1, 2, 2], [-1, 0, 1, 2, 3, 3], [-1, 0, 0, 0, -1, -1]])
    teacher_chunks = torch.tensor([[-1, 0, 1, 1, 2], [-1, 0, 1, 2, 3], [-1, 0, 0, -1, -1]])
    found = alm_loss(
        token_log_probabilities(student_logits, student_ids),
        token_log_probabilities(teacher_logits, teacher_ids),
        student_chunks,
        teacher_chunks,
    )
    expected = reference_loss(student_logits, teacher_logits, student_ids, teacher_ids, student_chunks, teacher_chunks)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-5)
    # With other numbers in it, the reference sees the difference.
    assert alm_loss(
        token_log_probabilities(student_logits, student_ids), token_log_probabilities(teacher_logits, teacher_ids),
        student_chunks, teacher_chunks, temperature=10.0,
    ).item() != pytest.approx(expected, rel=1e-2)  # fmt: skip


def test_the_loss_is_smallest_at_the_teacher_s_probabilities():
    """And its gradient, which reaches the student alone, is finite for certain and for impossible chunks."""
    teacher = torch.tensor([[-3.0, -0.5, 0.0, -400.0]], dtype=torch.float64, requires_grad=True)
    chunks = torch.arange(4)[None]
    student = teacher.detach().clone().requires_grad_()
    least = alm_loss(student, teacher, chunks, chunks)
    least.backward()
    assert student.grad.abs().max() < 1e-9 and teacher.grad is None
    for change in (0.5, -0.5):
        moved = (teacher.detach() + change).clamp(max=0)
        assert alm_loss(moved, teacher, chunks, chunks) > least
    student = torch.tensor([[0.0, -1000.0, -1e-7, -1.0]], requires_grad=True)
    alm_loss(student, teacher.float(), chunks, chunks).backward()
    assert torch.isfinite(student.grad).all()


def test_chunks_that_do_not_belong_together():
    values = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="the same chunks"):
        alm_loss(values, values, torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match="no chunks"):
        alm_loss(values, values, torch.tensor([[-1, -1]]), torch.tensor([[-1, -1]]))


@pytest.fixture(scope="module")
def tokenizers():
    return AutoTokenizer.from_pretrained(DONOR), AutoTokenizer.from_pretrained(BASE)


@pytest.mark.parametrize("sequence_length", [6, 16, 4096])
def test_rows_hold_the_texts(tokenizers, sequence_length):
    """Chunk by chunk the same bytes on both sides, in order, and nothing of the texts but chunks longer than a row."""
    student, teacher = tokenizers
    rows = alignment_rows(TEXTS, student, teacher, sequence_length)
    assert all(len(row[name]) <= sequence_length for row in rows for name in ("student_ids", "teacher_ids"))
    joined = ""
    for row in rows:
        parts = []
        for name, tokenizer in (("student", student), ("teacher", teacher)):
            ids, chunks = row[f"{name}_ids"], row[f"{name}_chunks"]
            assert len(ids) == len(chunks)
            parts.append([tokenizer.decode(ids[chunks == number]) for number in range(max(chunks) + 1)])
        ended = parts[0][-1] == student.eos_token
        assert ended == (parts[1][-1] == teacher.eos_token)
        texts = [part[: -1 if ended else None] for part in parts]
        assert texts[0] == texts[1]
        joined += "".join(texts[0])
    if sequence_length > 6:
        assert joined.replace("�", "") == "".join(TEXTS) or "�" in joined
        assert sum(row["student_ids"][-1] == student.eos_token_id for row in rows) == len(TEXTS)
    batch = collate_aligned(rows[:2])
    assert batch["student_mask"].sum() == sum(len(row["student_ids"]) for row in rows[:2])
    assert (batch["teacher_chunks"][batch["teacher_mask"] == 0] == -1).all()


def test_without_a_beginning_of_text_the_first_chunk_does_not_count(tokenizers):
    plain = supertokens.train_supertokens(TEXTS, 300, special_tokens=())
    row = alignment_rows(["ab cd"], plain, plain, 16)[0]
    assert row["student_chunks"].tolist() == [-1, *range(1, len(row["student_ids"]))]
    with pytest.raises(ValueError, match="none of 1 texts gives a row"):
        alignment_rows(["a"], plain, plain, 16)


def test_texts_that_a_tokenizer_changes_are_left_out(tokenizers):
    lower = supertokens.train_supertokens(TEXTS, 300)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert len(alignment_rows(["all small", "Not all"], lower, tokenizers[1], 64)) == 1
    with pytest.raises(ValueError, match="1 are left out because a tokenizer changes them"):
        alignment_rows(["Not all"], lower, tokenizers[1], 64)


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "set model"),
        ({"model": "m", "objective": "alms"}, "objective must be 'language_modeling' or 'alm', found 'alms'"),
        ({"model": "m", "objective": "alm"}, "needs a teacher"),
        ({"model": "m", "teacher": "t"}, "only it needs a teacher"),
        ({"model": "m", "trained_rows": "old"}, "trained_rows must be 'all', 'new' or a list of ids, found 'old'"),
        ({"model": "m", "trained_rows": []}, "trained_rows must be"),
        ({"model": "m", "trained_rows": [1.5]}, "trained_rows must be"),
        ({"model": "m", "dtype": "int8"}, "dtype must be"),
        ({"model": "m", "temperature": 0}, "temperature must be above 0"),
        ({"model": "m", "sequence_length": 1}, "sequence_length must be at least 2"),
        ({"model": "m", "row": "all"}, "unknown TransplantTrainingRecipe fields row"),
    ],
)
def test_recipe_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        TransplantTrainingRecipe.from_dict(settings)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_recipe_files(suffix, tmp_path):
    recipe = TransplantTrainingRecipe.as_published(model="m", teacher="t", trained_rows=[3, 4])
    assert (recipe.max_steps, recipe.warmup_steps, recipe.learning_rate) == (5000, 2000, 1e-5)
    assert (recipe.lora_rank, recipe.lora_alpha, recipe.temperature) == (64, 64, 100)
    assert (recipe.beta1, recipe.beta2, recipe.weight_decay) == (0.9, 0.95, 0.01)
    recipe.save(tmp_path / f"recipe{suffix}")
    assert load_recipe(tmp_path / f"recipe{suffix}") == recipe


# --- runs -------------------------------------------------------------------------------------------------------------


def small_recipe(**overrides):
    settings = {"model": str(DONOR), "sequence_length": 32, "batch_size": 4, "max_steps": 8, "warmup_steps": 2,
                "logging_steps": 1, "save_steps": 0, "learning_rate": 0.02}  # fmt: skip
    return TransplantTrainingRecipe(**{**settings, **overrides})


def losses(folder):
    return [entry["loss"] for entry in json.loads((folder / "training_log.json").read_text()) if "loss" in entry]


def changed_rows(folder, reference=DONOR):
    """Name -> ids of the rows that differ, of tensors that do."""
    trained, before = (load_file(Path(path) / "model.safetensors") for path in (folder, reference))
    assert trained.keys() == before.keys()
    different = {name for name in before if not torch.equal(trained[name], before[name])}
    return {name: (trained[name] != before[name]).any(1).nonzero()[:, 0].tolist() for name in sorted(different)}


TABLES = ["lm_head.weight", "model.embed_tokens.weight"]


@pytest.mark.parametrize("objective", ["language_modeling", "alm"])
def test_train_and_open(objective, tmp_path):
    chosen = [20, 21, 300, 400]
    teacher = str(BASE) if objective == "alm" else None
    recipe = small_recipe(objective=objective, teacher=teacher, trained_rows=chosen, weight_decay=0.5)
    metrics = train(recipe, tmp_path / "out", rows=TEXTS, evaluation_rows=TEXTS[:1])
    assert metrics["steps"] == 8 and ("perplexity" in metrics) == (objective == "language_modeling")
    assert math.isfinite(metrics["eval_loss"]) and metrics["loss"] != losses(tmp_path / "out")[0]
    found = changed_rows(tmp_path / "out")
    assert sorted(found) == TABLES
    assert found["lm_head.weight"] == chosen  # the head's rows have gradients, or decay, at every step
    assert set(found["model.embed_tokens.weight"]) <= set(chosen)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(model) is LlamaForCausalLM
    assert torch.isfinite(model(**tokenizer(TEXTS[0], return_tensors="pt")).logits).all()
    assert load_recipe(tmp_path / "out") == recipe


def test_embeddings_learn(tmp_path):
    for objective, teacher in (("language_modeling", None), ("alm", str(BASE))):
        recipe = small_recipe(objective=objective, teacher=teacher, max_steps=40, weight_decay=0.0)
        train(recipe, tmp_path / objective, rows=TEXTS)
        found = losses(tmp_path / objective)
        assert np.mean(found[-5:]) < np.mean(found[:5]), objective


def test_lora(tmp_path):
    recipe = small_recipe(lora=True, lora_rank=2, lora_alpha=2, trained_rows=[20, 21], learning_rate=0.05)
    train(recipe, tmp_path / "out", rows=TEXTS)
    found = changed_rows(tmp_path / "out")
    assert set(found["lm_head.weight"]) == {20, 21}
    projections = [name for name in found if name.endswith("_proj.weight")]
    assert len(projections) == 2 * 7 and sorted([*projections, *TABLES]) == sorted(found)
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


@pytest.mark.parametrize("settings", [{}, {"lora": True, "lora_rank": 2}, {"activation_checkpointing": True}])
def test_what_is_tied_stays_tied(settings, tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DONOR)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    train(small_recipe(model=str(tmp_path / "tied"), trained_rows=[20, 21], **settings), tmp_path / "out", rows=TEXTS)
    found = changed_rows(tmp_path / "out", tmp_path / "tied")
    assert found["model.embed_tokens.weight"] == [20, 21] and "lm_head.weight" not in found
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_bfloat16(tmp_path):
    train(small_recipe(dtype="bfloat16", trained_rows=[20], max_steps=2), tmp_path / "out", rows=TEXTS)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize("stored", ["plain", "as the matrix alone"])
def test_after_a_transplantation(stored, tokenizers, tmp_path):
    """The new rows learn, those that the base had stay its own, whichever way the model was stored."""
    result = transplant_tokenizer(str(BASE), tokenizers[0], method="retok")
    folder = tmp_path / "transplanted"
    if stored == "plain":
        result.save_pretrained(folder)
    else:
        model = TransplantedForCausalLM.from_base(str(BASE), result.matrix, tokenizers[0], tokenizers[1])
        model.save_pretrained(folder)
        tokenizers[0].save_pretrained(folder)
    result.model.save_pretrained(tmp_path / "reference")
    new = {row["id"] for row in result.report.rows() if row["source"] not in ("copied", "special", "padding")}
    assert set(new_row_ids(folder)) == new and len(new) > 50
    recipe = small_recipe(model=str(folder), teacher=str(BASE), objective="alm", trained_rows="new")
    train(recipe, tmp_path / "out", rows=TEXTS)
    found = changed_rows(tmp_path / "out", tmp_path / "reference")
    assert sorted(found) == TABLES and set(found["lm_head.weight"]) == new
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    if (folder / "transplant_report.json").exists():  # what was trained can be trained again by the same recipe
        assert set(new_row_ids(tmp_path / "out")) == new


class _Killed(BaseException):
    pass


class _Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise _Killed


@pytest.mark.parametrize("settings", [{"trained_rows": [20, 21]}, {"lora": True, "lora_rank": 2}])
def test_resume_after_a_kill(settings, tmp_path):
    recipe = small_recipe(save_steps=2, **settings)
    train(recipe, tmp_path / "whole", rows=TEXTS)
    with pytest.raises(_Killed):
        train(recipe, tmp_path / "cut", rows=TEXTS, callbacks=[_Kill()])
    stored = tmp_path / "cut" / "checkpoints" / "checkpoint-4"
    assert not (stored / "model.safetensors").exists()
    if "trained_rows" in settings:
        assert (stored / "trained.safetensors").stat().st_size < 2 * (2 * 16 * 4) + 500
    train(recipe, tmp_path / "cut", rows=TEXTS, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert changed_rows(tmp_path / "cut", tmp_path / "whole") == {}


@pytest.mark.parametrize(
    ("overrides", "rows", "error", "message"),
    [
        ({}, None, ValueError, "no texts to train on"),
        ({}, [], ValueError, "no texts to train on"),
        ({"objective": "alm", "teacher": str(BASE)}, [{"input_ids": [1, 2]}], ValueError, "needs texts"),
        ({"trained_rows": [9999]}, TEXTS, ValueError, "from 0 to 539"),
        ({"trained_rows": "new"}, TEXTS, FileNotFoundError, "which would tell which rows are new"),
        ({"tokenizer": str(BASE)}, TEXTS, ValueError, "560 tokens, but the model only 540 rows: transplant first"),
    ],
)
def test_errors(overrides, rows, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train(small_recipe(**overrides), tmp_path / "out", rows=rows)
    assert not (tmp_path / "out").exists()
