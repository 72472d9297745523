"""Losses against sentence-transformers' and naver's numbers, and against a float64 reference written out in loops."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rarezoo.training.losses import (
    active_dimensions,
    flops_regularizer,
    info_nce_loss,
    kl_distillation_loss,
    l1_regularizer,
    margin_mse_loss,
    quadratic_weight,
)

FIXTURES = Path(__file__).parent / "fixtures" / "mistral_splade"
EXPECTED = json.loads((FIXTURES / "losses.json").read_text())


@pytest.fixture(scope="module")
def representations():
    tensors = load_file(FIXTURES / "loss_grads.safetensors")
    return tuple(tensors[f"{name}.rep_max"] for name in ("query", "document", "negative"))


def random_representations(batch, n_negatives, vocab_size=23, seed=0):
    """Sparse, non-negative, float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2 + n_negatives, vocab_size)
    values = torch.relu(torch.randn(shape, generator=generator, dtype=torch.float64))
    return values[:, 0].clone(), values[:, 1].clone(), values[:, 2:].clone()


def dot(left, right):
    return math.fsum(a * b for a, b in zip(left.tolist(), right.tolist()))


def log_sum_exp(scores):
    largest = max(scores)
    return largest + math.log(math.fsum(math.exp(score - largest) for score in scores))


def test_fixture_values(representations):
    queries, documents, negatives = representations
    all_documents = torch.cat([documents, negatives])
    computed = {
        "info_nce_scale_1.0": info_nce_loss(queries, documents, [negatives]),
        "info_nce_scale_0.05": info_nce_loss(queries, documents, negatives.unsqueeze(1), scale=0.05),
        "info_nce_scale_1.0_no_hard_negatives": info_nce_loss(queries, documents),
        "flops_query": flops_regularizer(queries),
        "flops_query_naver": flops_regularizer(queries),
        "flops_document_and_negative": flops_regularizer(all_documents),
        "flops_query_with_threshold": flops_regularizer(queries, threshold=EXPECTED["flops_query_threshold"]),
        "l1_query_naver": l1_regularizer(queries),
        "l1_document_and_negative_naver": l1_regularizer(all_documents),
        "l0_query_naver": active_dimensions(queries),
        "margin_mse": margin_mse_loss(queries, documents, [negatives], torch.tensor(EXPECTED["teacher_margin"])),
        "distill_kl": kl_distillation_loss(
            queries, documents, [negatives], torch.tensor(EXPECTED["teacher_scores_pos_neg"]), temperature=2.0
        ),
    }
    for name, value in computed.items():
        assert value.dtype == torch.float32, name
        assert value.item() == pytest.approx(EXPECTED[name], abs=1e-5), name


def test_fixture_total(representations):
    queries, documents, negatives = representations
    document_part = EXPECTED["lambda_d"] * flops_regularizer(torch.cat([documents, negatives]))
    query_part = EXPECTED["lambda_q"] * flops_regularizer(queries)
    total = info_nce_loss(queries, documents, [negatives]) + document_part + query_part
    parts = EXPECTED["splade_loss"]
    assert document_part.item() == pytest.approx(parts["document_regularizer_loss"], abs=1e-5)
    assert query_part.item() == pytest.approx(parts["query_regularizer_loss"], abs=1e-5)
    assert total.item() == pytest.approx(EXPECTED["splade_loss_total"], abs=1e-5)


@pytest.mark.parametrize("n_negatives", [0, 1, 3])
def test_info_nce_in_loops(n_negatives):
    queries, positives, negatives = random_representations(4, n_negatives)
    documents = [*positives, *negatives.flatten(0, 1)]
    scale = 0.7
    total = 0.0
    for i in range(4):
        scores = [scale * dot(queries[i], document) for document in documents]
        total += log_sum_exp(scores) - scores[i]
    loss = info_nce_loss(queries, positives, negatives if n_negatives else None, scale=scale)
    assert loss.item() == pytest.approx(total / 4, abs=1e-12)


def test_margin_mse_in_loops():
    queries, positives, negatives = random_representations(5, 3, seed=1)
    teacher = torch.linspace(-2, 4, 15, dtype=torch.float64).reshape(5, 3)
    squares = [
        (dot(queries[i], positives[i]) - dot(queries[i], negatives[i, j]) - teacher[i, j].item()) ** 2
        for i in range(5)
        for j in range(3)
    ]
    loss = margin_mse_loss(queries, positives, negatives, teacher)
    assert loss.item() == pytest.approx(math.fsum(squares) / 15, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_kl_in_loops(temperature):
    queries, positives, negatives = random_representations(3, 2, seed=2)
    teacher_scores = torch.tensor([[3.0, 1.0, -2.0], [0.0, 0.5, 0.25], [9.0, 2.0, 8.5]], dtype=torch.float64)
    total = 0.0
    for i in range(3):
        student = [dot(queries[i], document) / temperature for document in (positives[i], *negatives[i])]
        teacher = [score / temperature for score in teacher_scores[i].tolist()]
        for student_score, teacher_score in zip(student, teacher):
            log_teacher = teacher_score - log_sum_exp(teacher)
            total += math.exp(log_teacher) * (log_teacher - (student_score - log_sum_exp(student)))
    loss = kl_distillation_loss(queries, positives, negatives, teacher_scores, temperature=temperature)
    assert loss.item() == pytest.approx(temperature**2 * total / 3, abs=1e-12)


def test_regularizers_in_loops():
    rows = random_representations(6, 0, seed=3)[0]
    rows[2, 3:] = 0
    table = rows.tolist()
    columns = list(zip(*table))
    assert flops_regularizer(rows).item() == pytest.approx(
        math.fsum((math.fsum(column) / 6) ** 2 for column in columns), abs=1e-12
    )
    assert l1_regularizer(rows).item() == pytest.approx(math.fsum(map(math.fsum, table)) / 6, abs=1e-12)
    active = [sum(value != 0 for value in row) for row in table]
    assert active_dimensions(rows).item() == pytest.approx(sum(active) / 6, rel=1e-6)
    threshold = sorted(active)[2]
    kept = [row if count > threshold else [0.0] * len(row) for row, count in zip(table, active)]
    assert flops_regularizer(rows, threshold=threshold).item() == pytest.approx(
        math.fsum((math.fsum(column) / 6) ** 2 for column in zip(*kept)), abs=1e-12
    )


def test_gradients_by_finite_differences():
    queries, positives, negatives = (tensor.requires_grad_() for tensor in random_representations(3, 2, vocab_size=5))
    teacher = torch.randn(3, 3, dtype=torch.float64)
    # Shifted away from 0, where the absolute value of the regularisers has no derivative.
    rows = (queries.detach() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(info_nce_loss, (queries, positives, negatives))
    assert torch.autograd.gradcheck(lambda *r: margin_mse_loss(*r, teacher[:, 1:]), (queries, positives, negatives))
    assert torch.autograd.gradcheck(lambda *r: kl_distillation_loss(*r, teacher), (queries, positives, negatives))
    assert torch.autograd.gradcheck(flops_regularizer, (rows,))
    assert torch.autograd.gradcheck(l1_regularizer, (rows,))


def test_float32_under_autocast(representations):
    queries, documents, negatives = representations
    outside = info_nce_loss(queries, documents, [negatives])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce_loss(queries, documents, [negatives])
        half = info_nce_loss(queries.bfloat16(), documents.bfloat16())
    assert inside.dtype == half.dtype == torch.float32
    assert torch.equal(outside, inside)


def test_regularizers_of_zero_rows_are_zero_with_finite_gradient():
    zeros = torch.zeros(3, 7, requires_grad=True)
    loss = info_nce_loss(zeros, zeros) + flops_regularizer(zeros, threshold=2) + l1_regularizer(zeros)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3), abs=1e-6)
    assert torch.isfinite(zeros.grad).all()


def test_schedule_naver_fixture():
    expected = EXPECTED["quadratic_schedule_naver_T8_steps_1_to_10"]
    computed = [quadratic_weight(0.01, step, warmup_steps=8) for step in range(10)]
    assert computed == pytest.approx(expected, abs=1e-12)


def test_schedule_sentence_transformers_starts_at_zero():
    computed = [quadratic_weight(0.5, step, 4, convention="sentence-transformers") for step in range(6)]
    assert computed == pytest.approx([0.0, 0.5 / 16, 0.5 / 4, 0.5 * 9 / 16, 0.5, 0.5], abs=1e-12)
    assert quadratic_weight(0.5, 0, 0) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, p, n: info_nce_loss(q[0], p[0]), "queries must have shape"),
        (lambda q, p, n: info_nce_loss(q, p[:2]), "same shape"),
        (lambda q, p, n: info_nce_loss(q, p, n[:, :, :4]), "negatives must have shape"),
        (lambda q, p, n: info_nce_loss(q, p, p), "negatives must have shape"),
        (lambda q, p, n: info_nce_loss(q, p, []), "empty list"),
        (lambda q, p, n: info_nce_loss(q[:0], p[:0]), "queries is empty"),
        (lambda q, p, n: margin_mse_loss(q, p, n, torch.zeros(3, 5)), "teacher_margins must have shape"),
        (lambda q, p, n: kl_distillation_loss(q, p, n, torch.zeros(3, 2)), "teacher_scores must have shape"),
        (lambda q, p, n: kl_distillation_loss(q, p, n, torch.zeros(3, 3), temperature=0.0), "temperature"),
        (lambda q, p, n: quadratic_weight(0.1, 3, 8, convention="linear"), "convention"),
        (lambda q, p, n: quadratic_weight(0.1, -1, 8), "negative"),
    ],
)
def test_clear_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_representations(3, 2))
