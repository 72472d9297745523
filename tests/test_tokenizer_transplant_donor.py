"""Tokenizer transplantation in a donor's space: pursuit, interpolation, rotations, against independent sums."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rarezoo.tokenizer_transplant import sparse_coding
from rarezoo.tokenizer_transplant.methods_donor import partial_matches, well_trained_matches, with_partial_matches
from rarezoo.tokenizer_transplant.sparse_coding import (
    RotarySpace,
    interpolation,
    nearest_anchors,
    orthogonal_matching_pursuit,
    procrustes_map,
    rotary_matching_pursuit,
    sparse_basis,
    under_trained_rows,
)
from rarezoo.tokenizer_transplant.token_bytes import Vocabulary, match_vocabularies
from rarezoo.tokenizer_transplant.transplant_matrix import SourceKind, TransplantMatrix
from rarezoo.tokenizer_transplant.transplanting import TransplantContext, plan_transplant, run_method

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizer_transplant"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference_pursuit(target, anchors, sparsity):
    """Textbook orthogonal matching pursuit of one target in float64: a least squares over the support in each step."""
    target, anchors, support = target.double(), anchors.double(), []
    residual, weights = target, torch.empty(0)
    for _ in range(sparsity):
        magnitudes = (anchors @ residual).abs()
        magnitudes[support] = -1
        support.append(int(magnitudes.argmax()))
        weights = torch.linalg.lstsq(anchors[support].T, target[:, None], driver="gelsd").solution[:, 0]
        residual = target - weights @ anchors[support]
    return support, weights


# --- orthogonal matching pursuit --------------------------------------------------------------------------------------


@pytest.fixture(params=["gram", "compiled", "direct"])
def algorithm(request, monkeypatch):
    """The Gram form with steps by torch and by numba, and the direct form."""
    if request.param == "compiled":
        pytest.importorskip("numba")
        monkeypatch.setattr(sparse_coding, "_COMPILED_UPDATES", 0)
        assert sparse_coding._pursuit_kernel() is not None
    return "direct" if request.param == "direct" else "gram"


@pytest.mark.parametrize("anchor_count, width, sparsity", [(40, 16, 8), (300, 64, 12), (150, 200, 1)])
def test_pursuit_agrees_with_the_textbook(algorithm, anchor_count, width, sparsity):
    anchors = (
        random(anchor_count, width) * (0.2 + random(anchor_count, 1, seed=1).abs()) + 0.1
    )  # neither unit nor centred
    targets = random(33, width, seed=2)
    indices, weights = orthogonal_matching_pursuit(targets, anchors, sparsity, algorithm=algorithm)
    assert indices.dtype == torch.int64 and weights.dtype == torch.float32
    for row, target in enumerate(targets):
        support, expected = reference_pursuit(target, anchors, sparsity)
        assert indices[row].tolist() == support
        torch.testing.assert_close(weights[row].double(), expected, atol=1e-6, rtol=1e-6)


def test_both_forms_take_the_same_anchors_whatever_the_tiles(monkeypatch):
    anchors, targets = random(500, 96) + 0.5, random(70, 96, seed=1)
    direct = orthogonal_matching_pursuit(targets, anchors, 20, algorithm="direct")
    for tile in (1, 2**20, 2**30):
        monkeypatch.setitem(sparse_coding._TILE_BYTES, "cpu", tile)
        gram = orthogonal_matching_pursuit(targets, anchors, 20, algorithm="gram")
        assert torch.equal(gram.indices, direct.indices)
        torch.testing.assert_close(gram.weights, direct.weights, atol=2e-6, rtol=1e-5)


def test_near_ties_are_decided_as_in_float64(algorithm):
    anchors = random(200, 64)
    twins = anchors * (1 + 1e-7 * random(200, 64, seed=1))  # float32 sums cannot tell them apart
    anchors, targets = torch.stack([anchors, twins], 1).flatten(0, 1), random(60, 64, seed=2)
    found = orthogonal_matching_pursuit(targets, anchors, 4, algorithm=algorithm).indices
    expected = [reference_pursuit(target, anchors, 4)[0] for target in targets]
    assert found.tolist() == expected


def test_targets_that_the_gram_form_cannot_trust_are_repeated(algorithm):
    anchors, targets = random(80, 48), random(40, 48, seed=1)
    targets[::3] = random(14, 3, seed=2) @ anchors[:3]  # three steps reach them: no signal is left for the others
    gram = orthogonal_matching_pursuit(targets, anchors, 10, algorithm=algorithm)
    direct = orthogonal_matching_pursuit(targets, anchors, 10, algorithm="direct")
    assert torch.equal(gram.indices, direct.indices)
    torch.testing.assert_close(gram.weights, direct.weights, atol=1e-6, rtol=1e-5)
    for row in range(0, 40, 3):
        support, _ = reference_pursuit(targets[row], anchors, int((gram.indices[row] >= 0).sum()))
        assert gram.indices[row][gram.indices[row] >= 0].tolist() == support


def test_duplicated_and_zero_anchors_get_no_weight(algorithm):
    distinct = random(6, 32)
    anchors = torch.cat([torch.zeros(2, 32), distinct, distinct, 3 * distinct])
    indices, weights = orthogonal_matching_pursuit(random(9, 32, seed=1), anchors, 12, algorithm=algorithm)
    for taken, weight in zip(indices, weights):
        count = int((taken >= 0).sum())
        assert count == 6 and torch.equal(taken >= 0, torch.arange(12) < 6)
        assert sorted((taken[:count] - 2) % 6) == list(range(6)) and (taken[:count] >= 2).all()
        assert not weight[count:].any() and weight.abs().max() < 20


def test_the_pursuit_ends_with_the_residual(algorithm):
    anchors = torch.linalg.qr(random(64, 64)).Q[:40] * torch.linspace(1, 3, 40)[:, None]
    truth = torch.zeros(3, 40)
    truth[0, [3, 17]] = torch.tensor([2.0, -1.0])
    truth[1, 8] = 0.5
    indices, weights = orthogonal_matching_pursuit(truth @ anchors, anchors, 10, algorithm=algorithm)
    assert [int((row >= 0).sum()) for row in indices] == [2, 1, 0]
    found = torch.zeros(3, 40).scatter_add_(1, indices.clamp(min=0), weights)
    torch.testing.assert_close(found, truth, atol=1e-6, rtol=1e-6)


def test_nearly_dependent_anchors_have_accurate_weights(algorithm):
    common = random(1, 128)
    anchors = common + 1e-3 * random(60, 128, seed=1)
    targets = common + 1e-3 * random(5, 128, seed=2)
    indices, weights = orthogonal_matching_pursuit(targets, anchors, 6, algorithm=algorithm)
    for row, target in enumerate(targets):
        points = anchors[indices[row]].double()
        expected = torch.linalg.lstsq(points.T, target.double()[:, None], driver="gelsd").solution[:, 0]
        torch.testing.assert_close(weights[row].double(), expected, atol=1e-5, rtol=1e-5)


def test_equal_anchors_are_taken_by_the_lowest_index(algorithm):
    anchors = random(5, 16).repeat(200, 1)
    taken = orthogonal_matching_pursuit(random(20, 16, seed=1), anchors, 3, algorithm=algorithm).indices
    assert int(taken.max()) < 5


def unequal_anchors():
    """Anchors as tables of embeddings have them: a common direction, clusters, lengths of all sizes, twins."""
    anchors = 2 * random(1, 96) + random(30, 96, seed=1).repeat(40, 1) + random(1_200, 96, seed=2)
    anchors *= (1.5 * random(1_200, 1, seed=3)).exp()
    anchors[700:710] = anchors[100:110] * (1 + 1e-7 * random(10, 96, seed=4))
    return anchors


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("anchors", [random(1_201, 96), unequal_anchors()], ids=["random", "unequal"])
def test_compiled_steps_are_those_of_a_search_among_all_anchors(anchors, threads, monkeypatch):
    pytest.importorskip("numba")
    targets = torch.cat([random(30, 96, seed=5), 0.1 * random(30, 96, seed=6) + anchors[::40][:30]])
    by_torch = orthogonal_matching_pursuit(targets, anchors, 25, algorithm="gram")
    monkeypatch.setattr(sparse_coding, "_COMPILED_UPDATES", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        compiled = orthogonal_matching_pursuit(targets, anchors, 25, algorithm="gram")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(compiled.indices, by_torch.indices)
    torch.testing.assert_close(compiled.weights, by_torch.weights, atol=1e-6, rtol=1e-5)


def test_without_numba_or_where_it_fails(monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise AttributeError(name) if name.startswith("__") else RuntimeError("no such type")

    name = f"{sparse_coding.__package__}.pursuit_kernel"
    anchors, targets = random(40, 16), random(5, 16, seed=1)
    expected = orthogonal_matching_pursuit(targets, anchors, 4, algorithm="gram")
    monkeypatch.setattr(sparse_coding, "_COMPILED_UPDATES", 0)
    try:
        monkeypatch.setitem(sys.modules, name, None)
        sparse_coding._pursuit_kernel.cache_clear()
        assert sparse_coding._pursuit_kernel() is None
        found = orthogonal_matching_pursuit(targets, anchors, 4, algorithm="gram")
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.weights, expected.weights)
        monkeypatch.setitem(sys.modules, name, Broken(name))
        sparse_coding._pursuit_kernel.cache_clear()
        with pytest.warns(UserWarning, match="goes on without its compiled steps, which numba refuses: no such type"):
            assert sparse_coding._pursuit_kernel() is None
    finally:
        sparse_coding._pursuit_kernel.cache_clear()


@pytest.mark.parametrize(
    ("of_targets", "of_anchors"), [(1e20, 1), (1, 1e20), (1e-20, 1e-20), (1e20, 1e20), (1e-42, 1e-38), (1e36, 1e36)]
)
def test_supports_do_not_depend_on_the_scale(algorithm, of_targets, of_anchors):
    anchors, targets = of_anchors * random(150, 64), of_targets * random(12, 64, seed=1)
    indices, weights = orthogonal_matching_pursuit(targets, anchors, 8, algorithm=algorithm)
    for row, target in enumerate(targets):
        support, expected = reference_pursuit(target, anchors, 8)
        assert indices[row].tolist() == support
        torch.testing.assert_close(weights[row].double(), expected, atol=0, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_dtype_and_device_change_nothing(algorithm, dtype, device):
    anchors, targets = random(150, 64), random(12, 64, seed=1)
    expected = orthogonal_matching_pursuit(targets, anchors, 8, algorithm=algorithm)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            found = orthogonal_matching_pursuit(targets, anchors, 8, algorithm=algorithm)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found.indices, expected.indices)
    assert found.weights.dtype == torch.float32 and torch.equal(found.weights, expected.weights)


@pytest.mark.parametrize("started", [0, 1])
def test_where_not_all_threads_can_be_started(started, monkeypatch):
    """As in a thread that outlives the main thread, or at the system's limit: every target is taken once."""
    pytest.importorskip("numba")
    anchors, targets = random(300, 64), random(40, 64, seed=1)
    monkeypatch.setattr(sparse_coding, "_COMPILED_UPDATES", 0)
    expected = orthogonal_matching_pursuit(targets, anchors, 8, algorithm="gram")
    start, starts = threading.Thread.start, itertools.count()

    def start_few(thread):
        if next(starts) % 3 >= started:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_few)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    found = orthogonal_matching_pursuit(targets, anchors, 8, algorithm="gram")
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.weights, expected.weights)
    assert next(starts) > 1


@pytest.mark.parametrize(
    ("name", "value"), [("DISABLE_JIT", 1), ("CPU_NAME", "generic"), ("CPU_FEATURES", "+avx2"), ("ENABLE_AVX", 0)]
)
def test_where_numba_may_not_compile_for_this_processor(monkeypatch, name, value):
    pytest.importorskip("numba")
    monkeypatch.setattr(f"numba.config.{name}", value)
    monkeypatch.delitem(sys.modules, f"{sparse_coding.__package__}.pursuit_kernel", raising=False)
    sparse_coding._pursuit_kernel.cache_clear()
    try:
        assert sparse_coding._pursuit_kernel() is None
    finally:
        monkeypatch.undo()
        sparse_coding._pursuit_kernel.cache_clear()


@pytest.mark.parametrize("error", [RuntimeError("cannot cache function"), EOFError("Ran out of input")])
def test_where_the_cache_of_machine_code_cannot_be_written_or_is_damaged(error, monkeypatch):
    pytest.importorskip("numba")
    assert sparse_coding._pursuit_kernel() is not None
    module = sys.modules[f"{sparse_coding.__package__}.pursuit_kernel"]

    def njit(signature, cache=False):
        if cache:
            raise error
        return lambda function: (signature, function)

    monkeypatch.setattr(module, "njit", njit)
    assert module._compiled("signature", {})(len) == ("signature", len)


def test_the_cost_model_keeps_to_its_budget_and_knows_when_gram_pays():
    choose = sparse_coding._cheaper_algorithm
    for compiled in (False, True):
        assert choose(4_096, 6_875, 1_024, 64, 2**32, compiled) == "gram"
        assert choose(4_096, 6_875, 1_024, 64, 2**27, compiled) == "direct"  # 189 MB of Gram matrix
        assert choose(94, 6_875, 1_024, 4, 2**32, compiled) == "direct"  # few targets
        assert choose(4_096, 6_875, 128, 64, 2**32, compiled) == "direct"  # hardly more dimensions than steps
    assert choose(4_096, 6_875, 160, 64, 2**32, False) == "direct"
    assert choose(4_096, 6_875, 160, 64, 2**32, True) == "gram"


def test_pursuit_refuses_what_it_cannot_do():
    anchors = random(5, 8)
    with pytest.raises(ValueError, match="between 1 and the number of anchors, 5; found 6"):
        orthogonal_matching_pursuit(random(2, 8), anchors, 6)
    with pytest.raises(ValueError, match="found 0"):
        orthogonal_matching_pursuit(random(2, 8), anchors, 0)
    with pytest.raises(ValueError, match=r"found \(2, 7\) and \(5, 8\)"):
        orthogonal_matching_pursuit(random(2, 7), anchors, 2)
    with pytest.raises(ValueError, match="anchors must be finite in float32, but row 3 is not"):
        orthogonal_matching_pursuit(random(2, 8), anchors.index_fill(0, torch.tensor([3]), float("nan")), 2)
    with pytest.raises(ValueError, match="targets must be finite in float32, but row 0 is not"):
        orthogonal_matching_pursuit(1e300 * random(2, 8).double(), anchors, 2)
    with pytest.raises(ValueError, match="target 0 is so much longer than its anchors"):
        orthogonal_matching_pursuit(1e20 * random(2, 8), 1e-20 * anchors, 2)
    with pytest.raises(ValueError, match=r"found \(2, 0\) and \(5, 0\)"):
        orthogonal_matching_pursuit(random(2, 0), random(5, 0), 2)
    with pytest.raises(ValueError, match="k must be an integer, found True"):
        orthogonal_matching_pursuit(random(2, 8), anchors, True)
    with pytest.raises(ValueError, match="gram, direct"):
        orthogonal_matching_pursuit(random(2, 8), anchors, 2, algorithm="fast")
    assert orthogonal_matching_pursuit(anchors[:0], anchors, 2).indices.shape == (0, 2)


# --- interpolation ----------------------------------------------------------------------------------------------------


def test_nearest_anchors_by_exact_distance_then_index():
    anchors = torch.cat([random(200, 24), random(200, 24)]) + 100.0  # far from zero, all twice
    targets = anchors[5:9] + 1e-3 * random(4, 24, seed=3)
    indices, distances = nearest_anchors(targets, anchors, 6)
    exact = (targets.double()[:, None] - anchors.double()).norm(dim=2)
    order = exact.sort(dim=1, stable=True)
    assert torch.equal(indices, order.indices[:, :6])
    torch.testing.assert_close(distances, order.values[:, :6], atol=0, rtol=1e-12)


def test_interpolation_weights_solve_their_problems():
    anchors, targets = random(60, 20) + 0.3, random(7, 20, seed=1)
    for cosine in (False, True):
        for scheme in ("barycentric", "least_squares"):
            indices, weights = interpolation(targets, anchors, 5, weight_scheme=scheme, cosine=cosine)
            for row, weight, target in zip(indices, weights.double(), targets.double()):
                points = anchors[row].double()
                gradient = points @ (weight @ points - target)
                if scheme == "barycentric":  # the gradient is the multiplier of the condition: equal in all places
                    assert abs(float(weight.sum()) - 1) < 1e-6
                    gradient = gradient - gradient.mean()
                assert float(gradient.abs().max()) < 1e-4
    indices, weights = interpolation(targets, anchors, 4)
    inverse = 1 / (targets[:, None] - anchors[indices]).norm(dim=2)
    torch.testing.assert_close(weights, inverse / inverse.sum(1, keepdim=True))
    indices, weights = interpolation(targets, anchors, 4, cosine=True)
    cosines = torch.nn.functional.cosine_similarity(targets[:, None], anchors[indices], dim=2)
    torch.testing.assert_close(weights, cosines / cosines.sum(1, keepdim=True))


def test_interpolation_of_an_anchor_is_that_anchor():
    anchors = random(30, 16)
    for scheme in sparse_coding.WEIGHT_SCHEMES:
        indices, weights = interpolation(anchors[:4], anchors, 5, weight_scheme=scheme)
        rows = (weights[:, :, None] * anchors[indices]).sum(1)
        torch.testing.assert_close(rows, anchors[:4], atol=1e-4, rtol=1e-4)


def test_interpolation_with_more_neighbors_than_dimensions_is_finite():
    anchors, targets = random(40, 6), random(5, 6, seed=1)
    for scheme in sparse_coding.WEIGHT_SCHEMES:
        indices, weights = interpolation(targets, anchors, 20, weight_scheme=scheme)
        assert weights.isfinite().all()
        if scheme != "distance_proportional":  # they reach the target exactly
            torch.testing.assert_close((weights[:, :, None] * anchors[indices]).sum(1), targets, atol=1e-4, rtol=1e-4)


def test_opposite_anchors_give_no_combination_by_cosine():
    anchors = random(10, 8).abs()
    indices, weights = interpolation(torch.stack([-anchors[0], anchors[0]]), anchors, 3, cosine=True)
    assert (indices[0] == -1).all() and not weights[0].any()
    assert (indices[1] >= 0).all() and weights.isfinite().all()


# --- rotations, bases, positions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source_width, target_width", [(12, 12), (12, 20), (20, 12)])
def test_procrustes_recovers_a_rotation(source_width, target_width):
    narrow = min(source_width, target_width)
    hidden = random(200, narrow) * torch.linspace(1, 3, narrow) + 2.0
    embed = [
        torch.linalg.qr(random(width, width, seed=width + 1)).Q[:, :narrow].T for width in (source_width, target_width)
    ]
    source, target = hidden @ embed[0], hidden @ embed[1] - 5.0
    image = procrustes_map(source[:150], target[:150])(source[150:])
    torch.testing.assert_close(image, target[150:], atol=1e-4, rtol=1e-4)


def test_procrustes_tolerates_noise_where_a_transposed_rotation_fails():
    source = random(400, 16) * torch.linspace(1, 4, 16)
    target = source @ torch.linalg.qr(random(16, 16, seed=5)).Q + 0.02 * random(400, 16, seed=6)
    image = procrustes_map(source[:300], target[:300])(source[300:])
    assert float((image - target[300:]).norm() / target[300:].norm()) < 0.05


def test_sparse_basis_spans_the_principal_directions():
    points = random(300, 10) * torch.linspace(1, 5, 10) + 1.0
    indices, weights = sparse_basis(points, 9, 4)
    centred = points - points.mean(0)
    basis = (weights[:, :, None] * centred[indices]).sum(1)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:4]
    cosines = torch.nn.functional.cosine_similarity(basis, directions, dim=1).abs()
    assert float(cosines.min()) > 0.98


def test_rotary_pursuit_finds_turned_anchors():
    """A target that is one anchor turned by a position is carried over as that anchor's image, turned alike."""
    source, target = random(12, 64), random(12, 24, seed=1)
    position = torch.tensor([0.7])
    source_frequencies = 10_000.0 ** -(torch.arange(16) / 16)
    target_frequencies = 500.0 ** -(torch.arange(4) / 4)

    def turn(vector, frequencies, heads):
        as_complex = torch.complex(*vector.view(heads, 2, -1).unbind(1)) * torch.exp(1j * position * frequencies)
        return torch.stack([as_complex.real, as_complex.imag], 1).flatten()

    turned = turn(source[4], source_frequencies, 2)
    image = rotary_matching_pursuit(turned[None], source, target, 1, RotarySpace(2), RotarySpace(3, 500.0))
    torch.testing.assert_close(image[0], turn(target[4], target_frequencies, 3), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="5 heads do not divide a width of 64"):
        rotary_matching_pursuit(turned[None], source, target, 1, RotarySpace(5), RotarySpace(3))


def test_under_trained_rows_are_short_or_like_unused_ones():
    table = random(400, 32) + 1.0
    unused_direction = random(32, seed=9)
    table[[7, 390, 399]] = unused_direction + 0.01 * random(3, 32, seed=3)
    table[50] *= 1e-3
    head = random(400, 32, seed=4)
    bad = under_trained_rows(table, head, torch.tensor([390, 399]))
    assert bad[[7, 50, 390, 399]].all() and int(bad.sum()) <= 8  # with 1 % of the norms
    assert not under_trained_rows(table, None, torch.tensor([390, 399]))[50]  # no head, no rule of norms
    assert not under_trained_rows(table, None, torch.tensor([], dtype=torch.int64)).any()


# --- the methods, against mergekit's results --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parity() -> dict:
    tables = {name: load_file(FIXTURES / f"{name}_model/model.safetensors") for name in ("base", "donor")}
    return {
        "meta": json.loads((FIXTURES / "meta.json").read_text()),
        "expected": {
            **load_file(FIXTURES / "expected_mergekit.safetensors"),
            **load_file(FIXTURES / "expected_independent.safetensors"),
        },
        "tokenizers": [AutoTokenizer.from_pretrained(FIXTURES / f"{name}_model") for name in ("base", "donor")],
        "base": [tables["base"][name] for name in ("model.embed_tokens.weight", "lm_head.weight")],
        "donor": [tables["donor"][name] for name in ("model.embed_tokens.weight", "lm_head.weight")],
    }


def mergekit_context(parity, **changes) -> TransplantContext:
    base, new = (Vocabulary(tokenizer) for tokenizer in parity["tokenizers"])
    matches = match_vocabularies(base, new, len(parity["base"][0]), rule="normalized", compatibility="mergekit")
    context = TransplantContext(
        base=base,
        new=new,
        input_table=parity["base"][0],
        head_table=parity["base"][1],
        matched=matches.base_ids,
        targets=(matches.base_ids < 0).nonzero()[:, 0],
        donor_input=parity["donor"][0],
        donor_head=parity["donor"][1],
        compatibility="mergekit",
    )
    return dataclasses.replace(context, **changes)


def assert_rows(matrix, parity, name, tolerance, rows=slice(None)):
    for position, table in enumerate(("input", "output")):
        found = matrix.apply(parity["base"][position], head=bool(position))
        torch.testing.assert_close(found[rows], parity["expected"][f"{name}.{table}"], atol=tolerance, rtol=0)


PARTIAL = ("prefix_match", "byte_match")
INTERPOLATION = "common_interpolation_k5"
METHOD_CASES = {
    "omp_k8": ("omp", {"k": 8}, 1e-5),
    f"{INTERPOLATION}_euclidean_distance": ("common_interpolation", {"k": 5}, 1e-5),
    f"{INTERPOLATION}_cosine_distance": ("common_interpolation", {"k": 5, "cosine_similarity": True}, 1e-5),
    f"{INTERPOLATION}_euclidean_barycentric": ("common_interpolation", {"k": 5, "weight_scheme": "barycentric"}, 1e-4),
    f"{INTERPOLATION}_euclidean_least_squares": (
        "common_interpolation",
        {"k": 5, "weight_scheme": "least_squares"},
        1e-4,
    ),
    "stb_k8": ("stb", {"k": 8}, 1e-4),
    "mp_rope_k4": ("mp_rope", {"k": 4, "donor_heads": 2, "base_heads": 2}, 1e-4),
    "landmark_pca_correct": ("landmark_pca", {}, 1e-4),
}


@pytest.mark.parametrize("name", METHOD_CASES)
def test_methods_reproduce_mergekit(name, parity):
    method, options, tolerance = METHOD_CASES[name]
    context = mergekit_context(parity)
    assert context.targets.tolist() == parity["meta"]["mergekit_row_ids"]
    assert [list(pair) for pair in zip(*map(torch.Tensor.tolist, context.anchors))] == (
        parity["meta"]["mergekit_exact_match_new_old"]
    )
    assert_rows(run_method(context, method, options), parity, name, tolerance)


@pytest.mark.parametrize("algorithm", ["gram", "direct"])
def test_both_algorithms_reproduce_mergekit(algorithm, parity):
    matrix = run_method(mergekit_context(parity), "omp", {"k": 8, "algorithm": algorithm})
    assert_rows(matrix, parity, "omp_k8", 1e-5)


def test_partial_matches_reproduce_mergekit(parity):
    context = mergekit_context(parity)
    matches = partial_matches(context, prefix_match="yes", byte_match="yes")
    matrix = with_partial_matches(run_method(context, "omp", {"k": 4}), matches)
    assert_rows(matrix, parity, "omp_k4_bytematch_prefixmatch", 1e-5)
    copied = matrix.kinds == SourceKind.COPIED
    assert 0 < int(copied.sum()) < len(matrix)
    assert torch.equal(matrix.apply(parity["base"][0])[copied], parity["base"][0][matches.input[copied]])


def test_magikarp_reproduces_mergekit(parity):
    context = mergekit_context(parity)
    matched, zeroed = well_trained_matches(context)
    assert 0 < len(zeroed) and int((matched >= 0).sum()) < int((context.matched >= 0).sum())
    context = dataclasses.replace(context, matched=matched, targets=(matched < 0).nonzero()[:, 0])
    made = run_method(context, "omp", {"k": 4})
    for position, table in enumerate(("input", "output")):
        found = parity["base"][position][matched.clamp(min=0)]
        found[context.targets] = made.apply(parity["base"][position], head=bool(position))
        found[zeroed] = 0
        torch.testing.assert_close(found, parity["expected"][f"omp_k4_magikarp.{table}"], atol=1e-5, rtol=0)


def test_a_plan_with_mergekits_compatibility(parity):
    matrix, report = plan_transplant(
        *parity["tokenizers"],
        *parity["base"],
        "omp",
        donor_tables=tuple(parity["donor"]),
        compatibility="mergekit",
        k=8,
    )
    assert_rows(matrix, parity, "omp_k8", 1e-5, rows=parity["meta"]["mergekit_row_ids"])
    assert report.provenance["counts"]["combined"] == 94


@pytest.mark.parametrize(
    ("name", "options"),
    [("omp_k4_magikarp", {"magikarp": True}), ("omp_k4_bytematch_prefixmatch", dict.fromkeys(PARTIAL, "yes"))],
)
def test_plans_with_mergekits_filters(name, options, parity):
    matrix, report = plan_transplant(
        *parity["tokenizers"],
        *parity["base"],
        "omp",
        donor_tables=tuple(parity["donor"]),
        compatibility="mergekit",
        k=4,
        **options,
    )
    rows = None if name == "omp_k4_magikarp" else parity["meta"]["mergekit_row_ids"]
    for table, position in (("input", 0), ("output", 1)):
        made = matrix.apply(parity["base"][position], head=bool(position))
        made = made if rows is None else made[rows]
        torch.testing.assert_close(made, parity["expected"][f"{name}.{table}"], atol=1e-5, rtol=0)
    assert all(report.provenance[option] == value for option, value in options.items())


def test_noise_and_scale_of_new_rows(parity):
    def tables(**options):
        matrix, _ = plan_transplant(
            *parity["tokenizers"], *parity["base"], "omp", donor_tables=tuple(parity["donor"]), k=4, **options
        )
        made = torch.isin(matrix.kinds, torch.tensor([int(SourceKind.COMBINED)], dtype=torch.uint8))
        return made, matrix.apply(parity["base"][0]), matrix.apply(parity["base"][1], head=True)

    made, *plain = tables()
    _, *doubled = tables(new_vocab_scale=2.0)
    _, *noisy = tables(new_vocab_noise=0.5, seed=3)
    for before, scaled, shaken in zip(plain, doubled, noisy):
        torch.testing.assert_close(scaled[made], 2 * before[made])
        assert torch.equal(scaled[~made], before[~made]) and torch.equal(shaken[~made], before[~made])
        assert (shaken - before)[made].std().item() == pytest.approx(0.5, rel=0.1)
    assert not torch.equal(noisy[0] - plain[0], noisy[1] - plain[1])
    assert torch.equal(tables(new_vocab_noise=0.5, seed=3)[1], noisy[0])


# --- our own rules ----------------------------------------------------------------------------------------------------


def own_context(parity, **changes) -> TransplantContext:
    """As by default: matched by bytes, special tokens by role."""
    context = mergekit_context(parity, compatibility=None)
    matches = match_vocabularies(context.base, context.new, context.base_rows)
    targets = (matches.base_ids < 0).nonzero()[:, 0]
    return dataclasses.replace(context, matched=matches.base_ids, targets=targets, **changes)


OWN_METHODS = {
    "omp": {"k": 6},
    "common_interpolation": {"k": 5},
    "landmark_pca": {},
    "stb": {"k": 8},
    "mp_rope": {"k": 3, "donor_heads": 2, "base_heads": 2},
}


@pytest.mark.parametrize("method", OWN_METHODS)
def test_input_table_and_head_have_coefficients_of_their_own(method, parity):
    """The head's rows are those that a tied model with these heads as tables would get."""
    context = own_context(parity)
    both = run_method(context, method, OWN_METHODS[method])
    for position in (0, 1):
        base, donor = parity["base"][position], parity["donor"][position]
        alone = own_context(parity, input_table=base, head_table=None, donor_input=donor, donor_head=None)
        rows = run_method(alone, method, OWN_METHODS[method])
        assert rows.head is None
        torch.testing.assert_close(both.apply(base, head=bool(position)), rows.apply(base), atol=0, rtol=0)


@pytest.mark.parametrize("method", OWN_METHODS)
def test_a_donor_without_head_serves_both_tables_with_its_input_table(method, parity):
    tied = run_method(own_context(parity, donor_head=None), method, OWN_METHODS[method])
    twice = run_method(own_context(parity, donor_head=parity["donor"][0].clone()), method, OWN_METHODS[method])
    for position in (0, 1):
        base = parity["base"][position]
        torch.testing.assert_close(
            tied.apply(base, head=bool(position)), twice.apply(base, head=bool(position)), atol=0, rtol=0
        )


@pytest.mark.parametrize("method", ["omp", "landmark_pca", "stb"])
def test_a_rotated_copy_of_the_base_gives_back_the_base(method, parity):
    """Where the donor is the base, turned, the methods that describe it completely find the base's own rows."""
    table = random(536, 24, seed=8)
    turned = table @ torch.linalg.qr(random(24, 24, seed=9)).Q
    matched = torch.arange(536)
    matched[500:] = -1
    context = own_context(parity, input_table=table, head_table=None, donor_input=turned, donor_head=None)
    context = dataclasses.replace(context, matched=matched, targets=torch.arange(500, 536))
    options = {"omp": {"k": 24}, "stb": {"k": 24}}.get(method, {})
    rows = run_method(context, method, options).apply(table)
    torch.testing.assert_close(rows, table[500:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", OWN_METHODS)
def test_permuted_targets_and_bfloat16_tables(method, parity):
    context = own_context(parity)
    rows = run_method(context, method, OWN_METHODS[method])
    order = torch.randperm(len(context.targets), generator=torch.Generator().manual_seed(1))
    permuted = run_method(dataclasses.replace(context, targets=context.targets[order]), method, OWN_METHODS[method])
    for position in (0, 1):
        base = parity["base"][position]
        expected = rows.apply(base, head=bool(position))[order]
        torch.testing.assert_close(permuted.apply(base, head=bool(position)), expected, atol=1e-6, rtol=1e-5)
    halves = {
        name: getattr(context, name).bfloat16() for name in ("input_table", "head_table", "donor_input", "donor_head")
    }
    full = {name: table.float() for name, table in halves.items()}
    rough = run_method(dataclasses.replace(context, **halves), method, OWN_METHODS[method])
    exact = run_method(dataclasses.replace(context, **full), method, OWN_METHODS[method])
    rounded = exact.apply(full["head_table"], head=True).bfloat16()
    assert torch.equal(rough.apply(halves["head_table"], head=True), rounded)


def test_rows_that_the_donor_cannot_describe_stay_undefined(parity):
    donor = [table.clone() for table in parity["donor"]]
    context = own_context(parity, donor_input=donor[0], donor_head=donor[1])
    donor[0][context.targets[3]] = 0  # never trained, in one table only
    rows = run_method(context, "omp", {"k": 4})
    assert rows.undefined().tolist() == [3]
    assert context.notes["omp: tokens with fewer than k anchors"] == 1
    matrix, _ = plan_transplant(*parity["tokenizers"], *parity["base"], "omp", donor_tables=tuple(donor), k=4)
    assert not len(matrix.undefined())


def test_what_donor_methods_need(parity):
    with pytest.raises(ValueError, match="needs donor="):
        run_method(own_context(parity, donor_input=None), "omp", {})
    with pytest.raises(ValueError, match="k must be between 1 and the number of anchors"):
        run_method(own_context(parity), "omp", {"k": 600})
    with pytest.raises(ValueError, match="distance_proportional, barycentric, least_squares"):
        run_method(own_context(parity), "common_interpolation", {"weight_scheme": "nearest"})
    with pytest.raises(ValueError, match="7 heads do not divide a width of 16"):
        run_method(own_context(parity), "mp_rope", {"donor_heads": 7, "base_heads": 2})


def test_partial_matches_by_bytes(parity):
    context = own_context(parity)
    matches = partial_matches(context, prefix_match="yes")
    bytes_of = context.base.token_bytes
    longest = 0
    for new_id, base_id in zip(context.targets.tolist(), matches.input.tolist()):
        raw = context.new.token_bytes[new_id]
        if new_id in context.new.special_ids:
            assert base_id == -1
        elif base_id >= 0:
            assert raw.startswith(bytes_of[base_id]) and bytes_of[base_id].strip() and bytes_of[base_id] != raw
            longer = [raw[:stop] for stop in range(len(bytes_of[base_id]) + 1, len(raw))]
            assert not set(longer) & {bytes_of[i] for i in context.base.used_ids if i not in context.base.special_ids}
            longest = max(longest, len(bytes_of[base_id]))
    assert longest > 2
    assert (partial_matches(context, byte_match="yes").input == -1).all()  # the matching by bytes left none
    few = partial_matches(context, prefix_match="yes", base_ids=matches.input[matches.input >= 0][:1])
    assert set(few.input.tolist()) == {-1, int(matches.input[matches.input >= 0][0])}


def test_partial_matches_of_one_table_and_mergekits_exchange_of_the_two(parity):
    context = own_context(parity)
    rows = run_method(context, "omp", {"k": 4})
    for compatibility, first in ((None, 0), ("mergekit", 1)):
        context = dataclasses.replace(context, compatibility=compatibility)
        for choice, copied_table in (("embed", first), ("lm_head", 1 - first)):
            matches = partial_matches(context, prefix_match=choice)
            assert (matches[1 - copied_table] == -1).all()
            mixed = with_partial_matches(rows, matches)
            for position, base in enumerate(parity["base"]):
                expected, copied = rows.apply(base, head=bool(position)), matches[position] >= 0
                expected[copied] = base[matches[position][copied]]
                assert torch.equal(mixed.apply(base, head=bool(position)), expected)
    with pytest.raises(ValueError, match="prefix_match is one of no, yes, embed, lm_head, not 'both'"):
        partial_matches(context, prefix_match="both")
    assert with_partial_matches(rows, partial_matches(context)) is rows


def test_another_process_with_other_hashes_and_threads_takes_the_same_rows(parity, tmp_path):
    script = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoTokenizer
from rarezoo.tokenizer_transplant.transplanting import plan_transplant
torch.set_num_threads(2)
folder, out = map(Path, sys.argv[1:])
names = ("model.embed_tokens.weight", "lm_head.weight")
stored = [load_file(folder / f"{model}_model/model.safetensors") for model in ("base", "donor")]
base, donor = (tuple(tensors[name] for name in names) for tensors in stored)
tokenizers = [AutoTokenizer.from_pretrained(folder / f"{model}_model") for model in ("base", "donor")]
for method in ("omp", "common_interpolation"):
    plan_transplant(*tokenizers, *base, method, donor_tables=donor, k=8)[0].save(out / method)
"""
    subprocess.run(
        [sys.executable, "-c", script, str(FIXTURES), str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        check=True,
    )
    for method in ("omp", "common_interpolation"):
        theirs = TransplantMatrix.load(tmp_path / method)
        ours, _ = plan_transplant(
            *parity["tokenizers"], *parity["base"], method, donor_tables=tuple(parity["donor"]), k=8
        )
        for head in (False, True):
            assert torch.equal(theirs.rows_for(head).base_ids, ours.rows_for(head).base_ids)
            torch.testing.assert_close(theirs.rows_for(head).weights, ours.rows_for(head).weights, atol=1e-6, rtol=1e-6)
