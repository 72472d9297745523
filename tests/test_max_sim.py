"""MaxSim and exact reranking against float64 brute force in numpy and against the official scores."""

import copy
import pickle
import sys
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rarezoo.colbert_xm import max_sim as module
from rarezoo.colbert_xm.max_sim import PackedDocuments, max_sim, max_sim_pairs, rerank

from .cases import FIXTURES

DIM = 16


def brute_force(queries, documents, similarity="cosine") -> np.ndarray:
    """Scores in float64, one query and one document at a time; -inf for documents without vectors."""
    scores = np.full((len(queries), len(documents)), -np.inf)
    for row, query in enumerate(queries):
        for column, document in enumerate(documents):
            if len(document):
                query64, document64 = np.asarray(query, np.float64), np.asarray(document, np.float64)
                similarities = query64 @ document64.T
                if similarity == "l2":
                    similarities = -np.square(query64[:, None] - document64[None]).sum(-1)
                scores[row, column] = similarities.max(1).sum()
    return scores


def best_of(query, documents, top_k) -> tuple[np.ndarray, np.ndarray]:
    """Positions and scores of the best documents by float64 scores rounded to float32, then by position."""
    scores = brute_force([query], documents)[0].astype(np.float32)
    positions = np.argsort(-scores, kind="stable")[:top_k]
    return positions, scores[positions]


def unit_vectors(generator, count: int, dim: int = DIM) -> torch.Tensor:
    vectors = generator.standard_normal((count, dim)).astype(np.float32)
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def ragged(generator, lengths, dim: int = DIM) -> list[torch.Tensor]:
    return [unit_vectors(generator, int(length), dim) for length in lengths]


def padded(items) -> tuple[torch.Tensor, torch.Tensor]:
    """The items padded with vectors that would win every maximum, and their mask."""
    longest = max(len(item) for item in items)
    vectors = torch.full((len(items), longest, items[0].shape[1]), 7.0)
    mask = torch.zeros(len(items), longest, dtype=torch.bool)
    for row, item in enumerate(items):
        vectors[row, : len(item)] = item
        mask[row, : len(item)] = True
    return vectors, mask


@pytest.fixture
def generator():
    return np.random.default_rng(0)


@pytest.fixture(params=["bfloat16, float32", "float32"])
def passes(request, monkeypatch):
    """Whether there is a pass in bfloat16, also over few vectors; always one in float32."""
    monkeypatch.setattr(module, "_FEW_CANDIDATES", 1)
    if request.param.startswith("bfloat16"):
        request.getfixturevalue("kernel")
    else:
        monkeypatch.setattr(module, "_bfloat16_kernel", lambda: None)


@pytest.fixture
def kernel(monkeypatch):
    """The compiled pass in bfloat16, also over few vectors."""
    compiled = module._bfloat16_kernel()
    if compiled is None:
        pytest.skip("the pass in bfloat16 needs a processor with AVX-512 BF16")
    monkeypatch.setattr(module, "_KERNEL_VECTORS", 1)
    return compiled


@pytest.fixture(scope="module")
def official():
    return load_file(FIXTURES / "colbert_xm" / "expected.safetensors")


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["en", "fr", "sw", "ja", "en.legacy", "fr.legacy", "sw.legacy", "ja.legacy"])
def test_official_scores(official, case):
    scores = max_sim(official[f"{case}.Q"], official[f"{case}.D"], document_mask=official[f"{case}.D_mask"])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, official[f"{case}.scores"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("language", ["en", "fr", "sw", "ja"])
def test_official_l2_scores_which_know_no_mask(official, language):
    scores = max_sim(official[f"{language}.Q"], official[f"{language}.D"], similarity="l2")
    torch.testing.assert_close(scores, official[f"{language}.scores_l2"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_list_padded_and_packed_give_the_same_scores(generator, similarity):
    queries, documents = ragged(generator, [5, 1, 9]), ragged(generator, [4, 40, 1, 3, 17, 40, 2])
    expected = brute_force(queries, documents, similarity)
    query_lengths, document_lengths = [len(item) for item in queries], [len(item) for item in documents]
    (query_rows, query_mask), (document_rows, document_mask) = padded(queries), padded(documents)
    forms = {
        "lists": max_sim(queries, documents, similarity=similarity),
        "masks": max_sim(
            query_rows, document_rows, query_mask=query_mask, document_mask=document_mask, similarity=similarity
        ),
        "lengths of padded": max_sim(
            query_rows,
            document_rows,
            query_lengths=torch.tensor(query_lengths),
            document_lengths=np.array(document_lengths),
            similarity=similarity,
        ),
        "packed": max_sim(
            torch.cat(queries),
            torch.cat(documents),
            query_lengths=query_lengths,
            document_lengths=document_lengths,
            similarity=similarity,
        ),
        "PackedDocuments": max_sim(queries, PackedDocuments(documents), similarity=similarity),
        "PackedDocuments with mask": max_sim(
            queries, PackedDocuments(document_rows, mask=document_mask), similarity=similarity
        ),
        "one by one": torch.cat([max_sim(query, documents, similarity=similarity) for query in queries]),
    }
    for form, scores in forms.items():
        np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5, err_msg=form)


def test_negative_maxima_are_not_clamped(generator):
    queries = [unit_vectors(generator, 4).abs()]
    documents = [-unit_vectors(generator, length).abs() for length in (3, 20, 1)]
    expected = brute_force(queries, documents)
    assert (expected < -0.1).all()
    np.testing.assert_allclose(max_sim(queries, documents).numpy(), expected, atol=1e-5)
    assert rerank(queries[0], documents, 1).positions.tolist() == [expected[0].argmax()]


def test_scores_do_not_depend_on_the_batch(generator):
    query = unit_vectors(generator, 32, 128)
    documents = ragged(generator, generator.integers(1, 300, 120), 128)
    together = max_sim([query, query[:7]], documents)[0]
    alone = torch.cat([max_sim(query, [document])[0] for document in documents])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_many_queries_in_blocks_of_bounded_size(generator, monkeypatch):
    queries, documents = ragged(generator, [32] * 300), ragged(generator, generator.integers(1, 60, 150))
    expected = brute_force(queries[::50], documents)
    sizes = []
    original = module._similarities

    def recorded(query_rows, block, *settings):
        sizes.append(len(query_rows) * block.shape[0] * block.shape[1])
        return original(query_rows, block, *settings)

    monkeypatch.setattr(module, "_similarities", recorded)
    np.testing.assert_allclose(max_sim(queries, documents)[::50].numpy(), expected, atol=1e-5)
    assert max(sizes) <= 2**18 < sum(sizes) / 50


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_vectors_are_scored_in_float32(generator, dtype):
    queries, documents = unit_vectors(generator, 32)[None].to(dtype), unit_vectors(generator, 300)[None].to(dtype)
    scores = max_sim(queries, documents)
    assert scores.dtype == torch.float32
    expected = brute_force(queries.double().numpy(), documents.double().numpy())
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-6)


def test_autocast_does_not_lower_the_precision(generator):
    queries, documents = ragged(generator, [6]), ragged(generator, [5, 30])
    expected = max_sim(queries, documents), rerank(queries[0], documents).scores
    pairs = max_sim_pairs(torch.stack(queries), documents[0][None, None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(max_sim(queries, documents), expected[0])
        assert torch.equal(rerank(queries[0], documents).scores, expected[1])
        assert torch.equal(max_sim_pairs(torch.stack(queries), documents[0][None, None]), pairs)


def test_numpy_in_numpy_out(generator):
    queries, documents = [item.numpy() for item in ragged(generator, [3, 4])], unit_vectors(generator, 12).numpy()
    documents.flags.writeable = False  # as of a memory-mapped file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = max_sim(queries, documents, document_lengths=[5, 7])
        ranking = rerank(queries[0], documents[::2], document_lengths=[2, 4])
        assert len(rerank(queries[0], documents, np.int8(100), document_lengths=[5, 7]).positions) == 2
    assert isinstance(scores, np.ndarray) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, brute_force(queries, [documents[:5], documents[5:]]), atol=1e-5)
    assert isinstance(ranking.positions, np.ndarray) and isinstance(ranking.scores, np.ndarray)
    assert isinstance(max_sim(queries, PackedDocuments(documents)), np.ndarray)
    assert isinstance(max_sim(queries, torch.from_numpy(documents.copy())), torch.Tensor)
    double = max_sim([query.astype(np.float64) for query in queries], documents)
    assert double.dtype == np.float64


def test_documents_without_vectors_score_minus_infinity(generator):
    queries, documents = ragged(generator, [3]), ragged(generator, [0, 4, 0])
    scores = max_sim(queries, documents)[0]
    assert scores.isneginf().tolist() == [True, False, True]
    rows, mask = padded(documents)
    assert torch.equal(max_sim(queries, rows, document_mask=mask)[0], scores)
    assert max_sim(queries, []).shape == (1, 0)
    assert max_sim([], documents).shape == (0, 3)
    assert max_sim(queries, documents[:1]).tolist() == [[-np.inf]]
    pairs = max_sim_pairs(torch.stack(queries), rows[None], document_mask=mask[None])
    torch.testing.assert_close(pairs[0], scores)


# --- pairs and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_pairs_are_the_diagonal_of_all_scores(generator, similarity):
    queries, documents = ragged(generator, [5, 3, 5]), ragged(generator, [2, 9, 4, 9, 1, 6])
    (query_rows, query_mask), (document_rows, document_mask) = padded(queries), padded(documents)
    pairs = max_sim_pairs(
        query_rows,
        document_rows.view(3, 2, 9, DIM),
        query_mask=query_mask,
        document_mask=document_mask.view(3, 2, 9),
        similarity=similarity,
    )
    expected = brute_force(queries, documents, similarity).reshape(3, 3, 2)[range(3), range(3)]
    np.testing.assert_allclose(pairs.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_gradients_in_float64(generator, similarity):
    queries = [item.double().requires_grad_() for item in ragged(generator, [2, 3], 4)]
    documents = [item.double().requires_grad_() for item in ragged(generator, [1, 5, 3], 4)]

    def scores(*items):
        return max_sim(list(items[:2]), list(items[2:]), similarity=similarity)

    assert torch.autograd.gradcheck(scores, (*queries, *documents))
    rows = torch.from_numpy(generator.standard_normal((2, 3, 4))).requires_grad_()
    candidates = torch.from_numpy(generator.standard_normal((2, 2, 3, 4))).requires_grad_()
    mask = torch.tensor([[[True, True, False], [True] * 3]] * 2)
    assert torch.autograd.gradcheck(
        lambda *sides: max_sim_pairs(*sides, document_mask=mask, similarity=similarity), (rows, candidates)
    )


def test_gradients_are_those_of_the_dense_formula(generator):
    queries = unit_vectors(generator, 12).view(3, 4, DIM).requires_grad_()
    documents = unit_vectors(generator, 40).view(5, 8, DIM).requires_grad_()
    mask = torch.rand(5, 8, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[:, 3] = True
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    dense = torch.einsum("aqd,bld->abql", queries, documents).masked_fill(~mask[None, :, None], -torch.inf)
    expected = torch.autograd.grad((dense.amax(-1).sum(-1) * weights).sum(), (queries, documents))
    found = torch.autograd.grad((max_sim(queries, documents, document_mask=mask) * weights).sum(), (queries, documents))
    torch.testing.assert_close(found, expected)
    only_documents = max_sim(queries.detach(), documents, document_mask=mask)
    torch.testing.assert_close(torch.autograd.grad((only_documents * weights).sum(), documents)[0], expected[1])


# --- exact order ------------------------------------------------------------------------------------------------------


def assert_exact(query, documents, top_k=10):
    positions, scores = best_of(query, documents, top_k)
    for given in (documents, PackedDocuments(documents)):
        ranking = rerank(query, given, top_k)
        assert ranking.positions.tolist() == positions.tolist()
        assert ranking.scores.tolist() == scores.tolist()


def test_rerank_of_100_random_sets(passes):
    for seed in range(100):
        generator = np.random.default_rng(seed)
        query = unit_vectors(generator, int(generator.integers(1, 33)))
        assert_exact(query, ragged(generator, generator.integers(0, 12, 80)))


def test_rerank_of_100_sets_that_differ_by_roundings(passes):
    for seed in range(100):
        generator = np.random.default_rng(seed)
        assert_exact(unit_vectors(generator, 8), near_ties(generator, near_bfloat16_ties=bool(seed % 2)))


def near_ties(generator, near_bfloat16_ties: bool) -> list[torch.Tensor]:
    """Permutations of one document of which some components moved by a few units in the last place of float32, which
    makes some scores equal and others almost. Optionally near the middle between two numbers of bfloat16, where
    rounding to it reverses their order."""
    base = unit_vectors(generator, 6)
    if near_bfloat16_ties:
        base = base.bfloat16().float() * (1 + 2.0**-9)
    documents = []
    for _ in range(90):
        document = base[torch.from_numpy(generator.permutation(6))].clone()
        for _ in range(int(generator.integers(0, 4))):
            row, column = generator.integers(0, 6), generator.integers(0, DIM)
            document[row, column] *= 1 + float(generator.choice([-1, 1])) * 2.0 ** -int(generator.choice([10, 22, 23]))
        documents.append(torch.cat([document, document[: generator.integers(0, 6)]]))
    return documents


def test_equal_scores_stand_in_the_order_of_positions(generator, passes):
    query, documents = unit_vectors(generator, 32, 128), ragged(generator, [180, 40], 128)
    ranking = rerank(query, [documents[0]] * 30 + [documents[1]] + [documents[0]] * 30, 50)
    assert ranking.positions.tolist() == [*range(30), *range(31, 51)]
    assert len(set(ranking.scores.tolist())) == 1
    zeros = rerank(query, torch.zeros(50, 3, 128), 5)
    assert zeros.positions.tolist() == [0, 1, 2, 3, 4] and zeros.scores.tolist() == [0] * 5


def test_scores_do_not_depend_on_the_layout(generator, passes):
    """Not even where every product cancels, so that the order of its additions decides what is left."""
    half = generator.standard_normal((60, 40, 64)).astype(np.float32)
    documents = torch.from_numpy(np.concatenate([half, -half], axis=2))
    query = torch.from_numpy(generator.standard_normal((1, 64))).float().repeat(9, 2)
    expected = rerank(query, documents)
    by_columns, query_by_columns = documents.mT.contiguous().mT, query.T.contiguous().T
    assert by_columns.stride() != documents.stride()
    for asked, given in [(query, by_columns), (query_by_columns, documents), (query_by_columns, list(by_columns))]:
        found = rerank(asked, given)
        assert torch.equal(found.positions, expected.positions) and torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12, 1e6, 1e15])
def test_rerank_of_vectors_of_any_size(generator, passes, scale):
    documents = [item * scale for item in ragged(generator, generator.integers(1, 9, 60))]
    assert_exact(unit_vectors(generator, 5), documents)
    assert_exact(unit_vectors(generator, 5) * scale, ragged(generator, generator.integers(1, 9, 60)))


@pytest.mark.parametrize(
    ("approximate", "is_prepared", "largest", "left"),
    [
        ("bfloat16", True, 0.15, 40),
        ("bfloat16", False, 0.15, 40),
        ("float32", True, 2e-3, 12),
        ("float32", False, 2e-3, 12),
    ],
)
def test_error_bounds_hold_and_exclude(generator, request, approximate, is_prepared, largest, left):
    query = unit_vectors(generator, 32, 128)
    documents = ragged(generator, generator.integers(1, 90, 300), 128)
    exact = brute_force([query], documents)[0].astype(np.float32)
    if approximate == "bfloat16":
        kernel = request.getfixturevalue("kernel")
    prepared = PackedDocuments(documents) if is_prepared else None
    reranking = module._Reranking(query, documents, prepared)
    if approximate == "bfloat16":
        found = reranking._approximate_bfloat16(kernel, list(range(300)))
    else:
        found = reranking._approximate_float32(list(range(300)))
    assert sorted(found.positions.tolist()) == list(range(300))
    error = np.abs(exact[found.positions] - found.scores.numpy())
    assert (error <= found.bounds.numpy()).all() and error.max() > 0
    assert found.bounds.max() < largest
    assert 10 <= len(reranking._narrowed(found, 10)) <= left


def test_bfloat16_bound_is_reached(kernel):
    """The query and the document are rounded down, and the errors lie along the vectors."""
    vectors = torch.zeros(1, DIM)
    vectors[0, 0], vectors[0, 1] = 16 * (1 + 0.999 * 2.0**-8), 1 + 0.999 * 2.0**-8
    exact = brute_force([vectors], [vectors])[0, 0]
    for prepared in (PackedDocuments([vectors]), None):
        _, scores, bounds = module._Reranking(vectors, [vectors], prepared)._approximate_bfloat16(kernel, [0])
        assert 0.99 * bounds.item() < exact - scores.item() <= bounds.item()


@pytest.mark.parametrize("dim", [16, 48, 128])
@pytest.mark.parametrize("queries", [1, 16, 32, 33, 70])
def test_compiled_maxima(generator, monkeypatch, kernel, dim, queries):
    """Of documents around every edge of a tile, in any number of threads, against products in float64."""
    query, documents = unit_vectors(generator, queries, dim), ragged(generator, [*range(30), 100, 0], dim)
    packed, lengths = PackedDocuments(documents), np.array([len(document) for document in documents])
    expected = torch.full((len(documents), queries), -torch.inf, dtype=torch.float64)
    for row, document in enumerate(documents):
        if len(document):
            expected[row] = (document.bfloat16().double() @ query.bfloat16().double().T).amax(0)
    rounded = torch.cat(documents).bfloat16()
    assert torch.equal(packed._rough, rounded)
    starts = np.cumsum(lengths) - lengths
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        monkeypatch.setattr(sys.modules[kernel.max_sim_maxima.__module__], "_VECTORS_PER_THREAD", 64)
        for vectors in (rounded, packed.vectors):
            addresses = vectors.data_ptr() + starts * dim * vectors.element_size()
            found, squares = kernel.max_sim_maxima(query.bfloat16(), addresses, lengths, vectors.dtype)
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
        errors = [
            float((item - item.bfloat16().float()).double().square().sum(1).max()) for item in documents if len(item)
        ]
        torch.testing.assert_close(squares[lengths > 0, 1].double(), torch.tensor(errors).double(), rtol=1e-5, atol=0)


def test_vectors_that_the_kernel_does_not_take(generator, kernel):
    """Other dtypes, other dimensions and rows that are apart go by the pass in float32 and give the same answers."""
    query, documents = unit_vectors(generator, 8), ragged(generator, generator.integers(1, 9, 60))
    assert module._kernel_for(documents) is kernel
    apart = [torch.cat([document, document], dim=1)[:, :DIM] for document in documents]
    assert not apart[0].is_contiguous() or len(apart[0]) == 1
    expected = rerank(query, documents)
    for given in (apart, [document.double() for document in documents]):
        assert module._kernel_for(given) is None
        assert torch.equal(rerank(query, given).positions, expected.positions)
    assert module._kernel_for(list(torch.zeros(60, 3, 0))) is None
    odd = ragged(generator, generator.integers(1, 9, 60), 10)
    assert module._kernel_for(odd) is None
    assert_exact(unit_vectors(generator, 8, 10), odd)


def test_without_numba_or_where_it_fails(generator, monkeypatch):
    name = f"{module.__name__.rpartition('.')[0]}.max_sim_kernel"
    query, documents = unit_vectors(generator, 8), ragged(generator, generator.integers(1, 9, 60))
    monkeypatch.setattr(module, "_KERNEL_VECTORS", 1)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setitem(sys.modules, name, None)
    module._bfloat16_kernel.cache_clear()
    try:
        assert module._bfloat16_kernel() is None
        assert_exact(query, documents)
        module._bfloat16_kernel.cache_clear()
        monkeypatch.setitem(sys.modules, name, BrokenModule(name))
        with pytest.warns(UserWarning, match="goes on without its compiled loops, which numba refuses: no such type"):
            assert module._bfloat16_kernel() is None
    finally:
        monkeypatch.undo()
        module._bfloat16_kernel.cache_clear()


class BrokenModule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError("no such type")


@pytest.mark.parametrize(
    ("name", "value"), [("DISABLE_JIT", 1), ("CPU_NAME", "generic"), ("CPU_FEATURES", "+avx2"), ("ENABLE_AVX", 0)]
)
def test_where_numba_may_not_compile_for_this_processor(monkeypatch, kernel, name, value):
    """For another one, LLVM would end the process; without its compiler, the loops would fail when they are called."""
    monkeypatch.setattr(f"numba.config.{name}", value)
    monkeypatch.delitem(sys.modules, kernel.max_sim_maxima.__module__)
    module._bfloat16_kernel.cache_clear()
    try:
        assert module._bfloat16_kernel() is None
    finally:
        monkeypatch.undo()
        module._bfloat16_kernel.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_dtype_and_device_change_nothing(generator, passes, dtype, device):
    query, documents = unit_vectors(generator, 8), ragged(generator, generator.integers(0, 9, 60))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            found = [rerank(query, given) for given in (documents, PackedDocuments(documents))]
    finally:
        torch.set_default_dtype(before)
    positions, scores = best_of(query, documents, 10)
    for ranking in found:
        assert ranking.positions.tolist() == positions.tolist()
        assert ranking.scores.dtype == torch.float32 and ranking.scores.tolist() == scores.tolist()


def test_where_no_thread_can_be_started(generator, monkeypatch, kernel):
    """As in a thread that outlives the main thread."""
    query, documents = unit_vectors(generator, 8), ragged(generator, generator.integers(0, 9, 60))

    def refused(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(sys.modules[kernel.max_sim_maxima.__module__], "_VECTORS_PER_THREAD", 16)
    monkeypatch.setattr(threading.Thread, "start", refused)
    assert_exact(query, documents)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda packed: pickle.loads(pickle.dumps(packed))])
def test_copies_of_packed_documents(generator, passes, copied):
    query, documents = unit_vectors(generator, 8), ragged(generator, generator.integers(0, 9, 60))
    packed = PackedDocuments(documents)
    twin = copied(packed)
    expected, found = rerank(query, packed), rerank(query, twin)
    assert torch.equal(found.positions, expected.positions) and torch.equal(found.scores, expected.scores)
    assert torch.equal(max_sim(query, twin), max_sim(query, documents))
    assert (twin._rough is None) == (packed._rough is None)
    assert len(pickle.dumps(packed)) < 2 * packed.vectors.nbytes + 2**12


def test_without_onednn_as_with_it(generator, passes, monkeypatch):
    query, documents = unit_vectors(generator, 32, 128), ragged(generator, generator.integers(1, 90, 60), 128)
    with_it = max_sim(query, documents)
    monkeypatch.setattr(module, "_has_onednn_linear", lambda: False)
    torch.testing.assert_close(max_sim(query, documents), with_it, rtol=1e-6, atol=1e-6)
    assert_exact(query, documents)


def test_little_is_kept(generator, monkeypatch, kernel):
    """A small set takes what its vectors need, and what very long documents need is given back."""
    prepared = PackedDocuments(ragged(generator, [3, 5]))
    for tensor in (prepared.vectors, prepared._rough):
        assert tensor.untyped_storage().nbytes() <= 4 * 10 * DIM + 64
    monkeypatch.setattr(module, "_memory", module._ThreadMemory())
    monkeypatch.setattr(module, "_KEPT_BYTES", 2**16)
    query, documents = unit_vectors(generator, 4), ragged(generator, [2_000, 30])
    np.testing.assert_allclose(max_sim(query, documents).numpy(), brute_force([query], documents), atol=1e-5)
    assert not module._memory.kept


def test_threads_do_not_share_memory(generator, passes):
    """What a thread keeps between calls is its own: answers beside other threads are those of one alone."""
    cases = [(unit_vectors(generator, 8), ragged(generator, generator.integers(1, 40, 200))) for _ in range(4)]
    expected = [(max_sim(query, documents), rerank(query, documents).positions) for query, documents in cases]

    def answers(case):
        query, documents = case
        prepared = PackedDocuments(documents)
        return [(max_sim(query, documents), rerank(query, prepared).positions) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for repeated, (scores, positions) in zip(pool.map(answers, cases), expected):
            assert all(torch.equal(found, scores) and torch.equal(order, positions) for found, order in repeated)


def test_rerank_where_float32_products_may_be_rough(generator, passes):
    query, documents = unit_vectors(generator, 8), ragged(generator, generator.integers(1, 9, 60))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert_exact(query, documents)
    finally:
        torch.set_float32_matmul_precision(before)


def test_rerank_of_few_and_of_empty_documents(generator, passes):
    query, documents = unit_vectors(generator, 4), ragged(generator, [3, 0, 5, 0])
    assert_exact(query, documents[:1])
    assert_exact(query, documents, top_k=100)
    assert rerank(query, documents).positions.tolist()[2:] == [1, 3]
    assert len(rerank(query, []).positions) == 0 and len(rerank(query, PackedDocuments([])).scores) == 0
    assert rerank(query, documents[1:2]).scores.tolist() == [-np.inf]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_masks_of_zeros_and_ones(generator, dtype):
    """As in a model's output."""
    (queries, query_mask), (documents, document_mask) = (
        padded([unit_vectors(generator, length) for length in lengths]) for lengths in ((4, 2), (3, 6, 1))
    )
    masks = {"query_mask": query_mask, "document_mask": document_mask}
    counts = {name: mask.to(dtype) for name, mask in masks.items()}
    assert torch.equal(max_sim(queries, documents, **counts), max_sim(queries, documents, **masks))
    candidates, of_pairs = documents[None].expand(2, -1, -1, -1), document_mask[None].expand(2, -1, -1)
    found = max_sim_pairs(queries, candidates, query_mask=query_mask.to(dtype), document_mask=of_pairs.to(dtype))
    torch.testing.assert_close(found, max_sim(queries, documents, **masks))


def test_rerank_takes_a_masked_query_of_a_batch(generator):
    query, documents = unit_vectors(generator, 4), ragged(generator, [3, 8, 5])
    rows, mask = padded([query, unit_vectors(generator, 6)])
    ranking = rerank(rows[:1], documents, query_mask=mask[:1])
    assert ranking.scores.tolist() == rerank(query, documents).scores.tolist()


# --- errors -----------------------------------------------------------------------------------------------------------

Q, D = torch.ones(1, 2, 4), torch.ones(3, 5, 4)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "query vectors have 4 dimensions, document vectors 3", lambda: max_sim(Q, D[..., :3])),
        (ValueError, "query vectors have 4 dimensions, document vectors 3", lambda: rerank(Q, D[..., :3])),
        (ValueError, "query vectors have 4 dimensions", lambda: max_sim_pairs(Q, D[None, ..., :3])),
        (ValueError, r"no components: their shape is \(2, 0\)", lambda: rerank(Q[..., :0], D[..., :0])),
        (ValueError, r"no components: their shape is \(2, 0\)", lambda: max_sim(Q[..., :0], D[..., :0])),
        (ValueError, r"document 1 has shape \(5, 3\), expected \(n, 4\)", lambda: max_sim(Q, [D[0], D[0, :, :3]])),
        (ValueError, r"document 0 has shape \(4,\)", lambda: max_sim(Q, list(D[0]))),
        (ValueError, r"not \(4,\)", lambda: max_sim(Q, D[0, 0])),
        (ValueError, r"not \(1, 2, 4\) and \(3, 5, 4\)", lambda: max_sim_pairs(Q, D)),
        (TypeError, "must be floating-point numbers, not torch.int64", lambda: max_sim(Q, D.long())),
        (TypeError, "must be floating-point numbers, not int64", lambda: max_sim(Q, D.long().numpy())),
        (TypeError, "torch tensors or numpy arrays, not str", lambda: max_sim(["text"], D)),
        (TypeError, "torch tensors or numpy arrays, not NoneType", lambda: rerank(None, D)),
        (ValueError, "add up to 14, but there are 15", lambda: max_sim(Q, D.view(15, 4), document_lengths=[7, 7])),
        (ValueError, "whole numbers", lambda: max_sim(Q, D.view(15, 4), document_lengths=[16, -1])),
        (ValueError, "whole numbers", lambda: max_sim(Q, D.view(15, 4), document_lengths=[7.5, 7.5])),
        (ValueError, "expected 3 document_lengths, none above 5", lambda: max_sim(Q, D, document_lengths=[5, 6, 5])),
        (ValueError, "not both", lambda: max_sim(Q, D, document_lengths=[5] * 3, document_mask=D[..., 0] > 0)),
        (ValueError, "do not go with a list", lambda: max_sim(Q, list(D), document_lengths=[5] * 3)),
        (ValueError, r"has shape \(3, 4\), expected \(3, 5\)", lambda: max_sim(Q, D, document_mask=D[:, :4, 0] > 0)),
        (TypeError, "must be boolean", lambda: max_sim(Q, D, document_mask=D[..., 0])),
        (ValueError, "must hold 0 and 1 only, .* not 2", lambda: max_sim(Q, D, document_mask=torch.full((3, 5), 2))),
        (ValueError, "must hold 0 and 1 only, .* not -1", lambda: rerank(Q, D, query_mask=np.full((1, 2), -1))),
        (ValueError, "query 0 has no vectors", lambda: max_sim(Q, D, query_mask=Q[..., 0] < 0)),
        (ValueError, "query 0 has no vectors", lambda: max_sim_pairs(Q, D[None], query_mask=Q[..., 0] < 0)),
        (ValueError, "one of cosine, l2, not 'dot'", lambda: max_sim(Q, D, similarity="dot")),
        (ValueError, "document 0 holds NaN", lambda: max_sim(Q, D * torch.nan)),
        (ValueError, "query 0 holds NaN", lambda: max_sim(Q * torch.nan, D)),
        (ValueError, "document 0 holds NaN", lambda: rerank(Q, D * torch.nan)),
        (ValueError, "document 0 holds NaN", lambda: PackedDocuments(D * torch.inf)),
        (ValueError, "query 0 holds NaN", lambda: rerank(Q * torch.nan, D)),
        (ValueError, "rerank takes one query", lambda: rerank(D, D)),
        (ValueError, "top_k must be at least 1, not 0", lambda: rerank(Q, D, 0)),
        (TypeError, "top_k must be a whole number, not float", lambda: rerank(Q, D, 2.0)),
    ],
)
def test_errors_say_what_is_wrong(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_nan_in_one_of_many_documents_is_found(generator, passes):
    documents = ragged(generator, [3] * 60)
    documents[41][1, 2] = torch.nan
    for given in (max_sim, rerank):
        with pytest.raises(ValueError, match="document 41"):
            given(unit_vectors(generator, 4), documents)


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
def test_vectors_that_are_not_finite_are_refused_however_many_there_are(generator, passes, damage, similarity):
    """Also where a maximum would pass them over, and where a query meets the damaged component with 0."""
    query = torch.rand(3, DIM)
    for zeroed, count, top_k in [(False, 2, 10), (False, 60, 1), (True, 2, 10), (True, 60, 1)]:
        if zeroed:
            query[:, 2] = 0
        documents = ragged(generator, generator.integers(2, 9, count))
        damaged = [*documents[:-1], documents[-1].clone()]
        damaged[-1][1, 2] = damage
        for call in (
            lambda given=damaged, k=top_k: rerank(query, given, k),
            lambda given=damaged: PackedDocuments(given),
            lambda given=damaged: max_sim([query, query[:1]], given, similarity=similarity),
            lambda given=damaged: max_sim(query.double(), given, similarity=similarity),
        ):
            with pytest.raises(ValueError, match=f"document {count - 1} holds NaN, infinity"):
                call()
        asked = query.clone()
        asked[1, 0] = damage
        for call in (
            lambda wrong=asked, given=documents, k=top_k: rerank(wrong, given, k),
            lambda wrong=asked, given=documents: max_sim([wrong], given, similarity=similarity),
        ):
            with pytest.raises(ValueError, match="query 0 holds NaN, infinity"):
                call()


def test_large_numbers_are_no_infinity(generator, passes):
    """Squares of these overflow in float32, and sums of these products; scores do not."""
    documents = [item * 1e20 for item in ragged(generator, generator.integers(1, 9, 60))]
    query = unit_vectors(generator, 5)
    assert_exact(query, documents, 10)
    assert_exact(query * 1e18, documents, 60)
    np.testing.assert_allclose(max_sim(query, documents).numpy(), brute_force([query], documents), rtol=1e-4)
    with pytest.raises(ValueError, match="document 0 holds NaN, infinity or numbers too large for torch"):
        rerank(query, [documents[0].double() * 1e30])


def test_scores_beyond_float32_are_equal(generator, passes):
    """All products and their float32 sums are finite; the sums over the query are not."""
    query, documents = torch.zeros(300, DIM), torch.zeros(60, 2, DIM)
    query[:, 0], documents[:, :, 0] = 2.0**60, 2.0**59.9
    documents[30:] *= 1 + torch.rand(30, 1, 1) / 16
    for given in (documents, PackedDocuments(documents)):
        ranking = rerank(query, given, 3)
        assert ranking.positions.tolist() == [0, 1, 2] and ranking.scores.tolist() == [np.inf] * 3


@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e18], ids=str)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_prepared_documents_of_one_sign_only_and_of_large_norms(scale, sign):
    """All similarities negative, all positive, and so large that bfloat16's products come near to overflow."""
    generator = torch.Generator().manual_seed(0)
    query = torch.rand(5, 16, generator=generator)
    documents = [sign * scale * torch.rand(7, 16, generator=generator) for _ in range(300)]
    scores = torch.stack([(query.double() @ document.double().T).amax(1).sum() for document in documents]).float()
    expected = scores.sort(descending=True, stable=True)
    found = rerank(query, PackedDocuments(documents), 10)
    assert torch.equal(found.positions, expected.indices[:10])
    assert torch.equal(found.scores, expected.values[:10])
    found = rerank(query * 3e18, PackedDocuments(documents), 10)
    assert torch.equal(found.positions, expected.indices[:10])
