"""The fused head against the naive formula: values, gradients, memory, precision, tracing."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rarezoo.mistral_splade import MistralSpladeConfig, MistralSpladeForRetrieval, fused_vocabulary_pooling
from rarezoo.mistral_splade.fused_vocabulary_pooling import head_factors, pool_vocabulary_head, pooled_positions

POOLINGS = ("max", "sum", "mean", "last")
ACTIVATIONS = ("log1p_relu", "log1p_log1p_relu")


def naive(logits, pool_mask, pooling="max", activation="log1p_relu", logit_scale=1.0):
    """The formula as written: activate every logit, zero what is not pooled, reduce."""
    values = torch.log1p(torch.relu(logits * logit_scale))
    if activation == "log1p_log1p_relu":
        values = torch.log1p(values)
    mask = (pool_mask != 0).unsqueeze(-1)
    values = torch.where(mask, values, 0.0)
    if pooling == "max":
        return values.max(dim=1).values
    if pooling == "sum":
        return values.sum(dim=1)
    if pooling == "mean":
        return values.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    rows = []
    for row, row_mask in zip(values, pool_mask):
        pooled = row_mask.nonzero().flatten()
        rows.append(row[pooled[-1]] if len(pooled) else torch.zeros_like(row[0]))
    return torch.stack(rows)


def ragged_mask(batch, length, generator):
    mask = (torch.rand(batch, length, generator=generator) < 0.5).long()
    mask[0] = 0  # a row that pools nothing
    mask[1] = 1
    return mask


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tile_size", [1, 7, 97, 98, 4096])
def test_values_and_gradients_equal_the_naive_formula(pooling, activation, tile_size):
    generator = torch.Generator().manual_seed(tile_size)
    hidden = torch.randn(4, 6, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(16, 98, bias=False, dtype=torch.float64)
    mask = ragged_mask(4, 6, generator)
    arguments = dict(pooling=pooling, activation=activation, logit_scale=0.7)
    ours = pool_vocabulary_head(head, hidden, mask, tile_size=tile_size, **arguments)
    theirs = naive(head(hidden), mask, **arguments)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    weights = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad((theirs * weights).sum(), [hidden, head.weight])
    found = torch.autograd.grad((ours * weights).sum(), [hidden, head.weight])
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck_by_finite_differences(pooling):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(4, 11, bias=False, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])

    weight = head.weight.detach().clone().requires_grad_()

    def through_module(hidden, weight):
        return torch.func.functional_call(_Pooler(head, mask, pooling), {"head.weight": weight}, (hidden,))

    assert torch.autograd.gradcheck(through_module, (hidden, weight))


class _Pooler(nn.Module):
    def __init__(self, head, mask, pooling="max", tile_size=4):
        super().__init__()
        self.head, self.mask, self.settings = head, mask, dict(pooling=pooling, tile_size=tile_size)

    def forward(self, hidden):
        return pool_vocabulary_head(self.head, hidden, self.mask, **self.settings)


def test_pooled_positions_pack_the_mask_and_repeat_the_first():
    index, valid = pooled_positions(torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]))
    assert index[0].tolist() == [1, 3] and valid[0].all()
    assert index[1].tolist() == [2, 2] and valid[1].tolist() == [True, False]
    assert not valid[2].any()


def test_rows_that_pool_nothing_are_zero_even_with_nonfinite_hidden_states():
    hidden = torch.stack([torch.full((3, 4), float("nan")), torch.randn(3, 4)])
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    for pooling in POOLINGS:
        head = nn.Linear(4, 9, bias=False)
        pooled = pool_vocabulary_head(head, hidden, mask, pooling=pooling)
        assert (pooled[0] == 0).all()
        pooled.sum().backward()
        assert head.weight.grad.isfinite().all()


def test_padding_logits_never_win():
    head = nn.Linear(2, 5, bias=False)
    nn.init.ones_(head.weight)
    hidden = torch.tensor([[[-1.0, -1.0], [100.0, 100.0]]])
    assert (pool_vocabulary_head(head, hidden, torch.tensor([[1, 0]])) == 0).all()


def test_frozen_head_gets_no_gradient_and_allocates_none():
    hidden = torch.randn(2, 4, 8, requires_grad=True)
    head = nn.Linear(8, 50, bias=False).requires_grad_(False)
    mask = torch.ones(2, 4)
    pool_vocabulary_head(head, hidden, mask).sum().backward()
    expected = torch.autograd.grad(naive(head(hidden), mask).sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)
    assert head.weight.grad is None


def lora_head(dropout=0.0, **options):
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("head", nn.Linear(16, 60, bias=False))
    configuration = peft.LoraConfig(target_modules=["head"], r=4, lora_alpha=8, lora_dropout=dropout, **options)
    wrapped = peft.get_peft_model(model, configuration)
    head = wrapped.base_model.model.head
    with torch.no_grad():
        head.lora_B["default"].weight.normal_()
    return wrapped, head


@pytest.mark.parametrize("pooling", POOLINGS)
def test_lora_head_is_pooled_as_a_sum_of_products(pooling):
    _, head = lora_head()
    hidden = torch.randn(3, 5, 16, requires_grad=True)
    mask = torch.randint(0, 2, (3, 5))
    parameters = [hidden, head.lora_A["default"].weight, head.lora_B["default"].weight]
    assert len(head_factors(head, hidden)) == 2
    weights = torch.randn(3, 60)
    ours = pool_vocabulary_head(head, hidden, mask, pooling=pooling, tile_size=13)
    theirs = naive(head(hidden), mask, pooling)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    found = torch.autograd.grad((ours * weights).sum(), parameters)
    expected = torch.autograd.grad((theirs * weights).sum(), parameters)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_lora_head_merged_disabled_and_with_dropout():
    wrapped, head = lora_head(dropout=0.5)
    hidden, mask = torch.randn(2, 4, 16), torch.ones(2, 4)
    with wrapped.disable_adapter():
        torch.testing.assert_close(pool_vocabulary_head(head, hidden, mask), naive(head(hidden), mask))
    wrapped.train()
    torch.manual_seed(0)
    dropped = pool_vocabulary_head(head, hidden, mask)
    torch.manual_seed(0)
    torch.testing.assert_close(dropped, naive(head(hidden), mask), atol=1e-5, rtol=0)
    wrapped.eval()
    before = pool_vocabulary_head(head, hidden, mask)
    wrapped.merge_adapter()
    torch.testing.assert_close(pool_vocabulary_head(head, hidden, mask), before, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["dora", "bias", "hook", "subclass", "offloaded"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_heads_that_can_only_be_called(kind, pooling):
    if kind == "dora":
        _, head = lora_head(use_dora=True)
    elif kind == "bias":
        head = nn.Linear(16, 60)
    elif kind == "hook":
        head = nn.Linear(16, 60, bias=False)
        head.register_forward_hook(lambda module, inputs, output: output * 2)
    elif kind == "offloaded":
        accelerate = pytest.importorskip("accelerate")
        head = nn.Linear(16, 60, bias=False).requires_grad_(False)
        accelerate.cpu_offload(head, execution_device="cpu")
        assert head.weight.is_meta
    else:

        class Scaled(nn.Linear):
            def forward(self, hidden):
                return super().forward(hidden) * 3

        head = Scaled(16, 60, bias=False)
    hidden = torch.randn(3, 5, 16, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    assert head_factors(head, hidden) is None
    ours, theirs = pool_vocabulary_head(head, hidden, mask, pooling=pooling), naive(head(hidden), mask, pooling)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    found, expected = (torch.autograd.grad(x.square().sum(), hidden)[0] for x in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_peft_copy_of_a_fully_trained_head():
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("body", nn.Linear(16, 16))
    model.add_module("head", nn.Linear(16, 60, bias=False))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["body"], modules_to_save=["head"]))
    head = wrapped.base_model.model.head
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1.0)
    hidden, mask = torch.randn(2, 3, 16), torch.ones(2, 3)
    torch.testing.assert_close(pool_vocabulary_head(head, hidden, mask), naive(head(hidden), mask))
    with wrapped.disable_adapter():
        torch.testing.assert_close(pool_vocabulary_head(head, hidden, mask), naive(head(hidden), mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_reduced_and_activated_in_float32(dtype):
    hidden = torch.randn(2, 5, 32).to(dtype)
    head = nn.Linear(32, 300, bias=False).to(dtype)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1]])
    ours = pool_vocabulary_head(head, hidden, mask)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, naive(head(hidden).float(), mask), atol=0, rtol=0)


def test_autocast_computes_logits_in_its_dtype_and_returns_float32_gradients():
    hidden = torch.randn(2, 5, 32, requires_grad=True)
    head = nn.Linear(32, 300, bias=False)
    mask = torch.ones(2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = pool_vocabulary_head(head, hidden, mask)
        theirs = naive(head(hidden).float(), mask)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
        ours.square().sum().backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.float32
    exact = torch.autograd.grad(naive(head(hidden), mask).square().sum(), hidden)[0]
    assert torch.nn.functional.cosine_similarity(hidden.grad.flatten(), exact.flatten(), dim=0) > 0.999


def screened(monkeypatch, enabled):
    monkeypatch.setattr(fused_vocabulary_pooling, "_multiplies_bfloat16", lambda: enabled)


@pytest.mark.parametrize("offset", [0.0, -3.0, -6.0, 3.0])
@pytest.mark.parametrize("factors", [1, 2])
def test_screening_never_misses_an_active_entry(monkeypatch, offset, factors):
    """Float64 decides what is active; entries crowd around zero, where bfloat16 gets signs wrong."""
    generator = torch.Generator().manual_seed(7)
    batch, length, width, vocab_size = 3, 64, 48, 9001
    hidden = torch.randn(batch, length, width, generator=generator)
    hidden[..., 0] = 4.0
    head = nn.Linear(width, vocab_size, bias=False)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
        head.weight[:, 0] += offset
        # Half of the maxima end within 1e-4 of zero.
        top = (hidden.double() @ head.weight.double().t()).amax(dim=(0, 1)).float()
        head.weight[::2, 0] -= top[::2] / 4.0 + 1e-4 * torch.randn(top[::2].shape, generator=generator)
    if factors == 2:
        peft = pytest.importorskip("peft")
        model = nn.Sequential()
        model.add_module("head", head)
        head = peft.get_peft_model(model, peft.LoraConfig(target_modules=["head"], r=4)).base_model.model.head
        nn.init.normal_(head.lora_B["default"].weight, std=0.05)
    mask = (torch.rand(batch, length, generator=generator) < 0.9).long()
    mask[:, :44] = 1
    exact = naive(copy.deepcopy(head).double()(hidden.double()), mask)
    coarse = (hidden.bfloat16() @ _merged(head).bfloat16().t()).float().amax(dim=1)
    if offset < 0:  # the case is hard: bfloat16 alone would get entries wrong
        assert ((coarse > 0) != (exact > 0)).sum() > 100
    hidden.requires_grad_()
    gradients = {}
    for enabled in (True, False):
        screened(monkeypatch, enabled)
        found = pool_vocabulary_head(head, hidden, mask, tile_size=257)
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)
        gradients[enabled] = torch.autograd.grad((found - 0.1).square().sum(), hidden)[0]
    torch.testing.assert_close(gradients[True], gradients[False], atol=2e-3, rtol=1e-4)


def _merged(head):
    if not hasattr(head, "lora_A"):
        return head.weight
    return head.base_layer.weight + head.get_delta_weight("default")


def test_screening_lets_nan_through(monkeypatch):
    screened(monkeypatch, True)
    hidden = torch.randn(2, 80, 8)
    hidden[0, 3] = float("nan")
    pooled = pool_vocabulary_head(nn.Linear(8, 40, bias=False), hidden, torch.ones(2, 80))
    assert pooled[0].isnan().all() and not pooled[1].isnan().any()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            # Views own no memory: count the storage.
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("trained", ["full", "frozen", "lora"])
def test_nothing_of_size_batch_length_vocabulary_is_ever_allocated(pooling, trained):
    batch, length, width, vocab_size = 2, 64, 8, 128_000
    if trained == "lora":
        peft = pytest.importorskip("peft")
        model = nn.Sequential()
        model.add_module("head", nn.Linear(width, vocab_size, bias=False))
        head = peft.get_peft_model(model, peft.LoraConfig(target_modules=["head"], r=4)).base_model.model.head
    else:
        head = nn.Linear(width, vocab_size, bias=False).requires_grad_(trained == "full")
    hidden = torch.randn(batch, length, width, requires_grad=True)
    mask = torch.ones(batch, length)
    with LargestTensor() as largest:
        pool_vocabulary_head(head, hidden, mask, pooling=pooling, tile_size=4096).sum().backward()
    everything = batch * length * vocab_size
    # What may be there: the weight (or its gradient), the gather buffer, a tile, the (batch, vocab) result.
    assert largest.elements <= max(4 * 1024 * 1024, vocab_size * width)
    assert largest.elements < everything / 3
    with LargestTensor() as largest:
        naive(head(hidden), mask).sum().backward()
    assert largest.elements >= everything  # the measurement sees what it is meant to see


def tiny_model(**overrides):
    settings = dict(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, head_chunk_size=17,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralSpladeForRetrieval(MistralSpladeConfig(**{**settings, **overrides}))
    nn.init.normal_(model.lm_head.weight, std=0.5)
    return model.eval()


def tiny_inputs(batch=2, length=12):
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, -3:] = 0
    pool_mask = mask.clone()
    pool_mask[:, :5] = 0
    ids = torch.randint(3, 99, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pool_mask": pool_mask}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_compiles_into_one_graph_with_the_same_values_and_gradients(pooling):
    model, inputs = tiny_model(pooling=pooling).double(), tiny_inputs()
    expected = model(**inputs).sparse_embedding
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**inputs).sparse_embedding
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    for a, b in zip(torch.autograd.grad(found.square().sum(), list(model.parameters())), gradients):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)
    torch.compiler.reset()


@pytest.mark.parametrize("tied", [False, True])
def test_compiled_gradients_of_a_tied_head(tied):
    """Inductor fuses the embedding's own gradient with what the head adds to it; four rows are enough to see it."""
    model, inputs = tiny_model(tie_word_embeddings=tied), tiny_inputs(batch=4)
    expected = torch.autograd.grad(model(**inputs).sparse_embedding.square().sum(), list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True)
    found = torch.autograd.grad(compiled(**inputs).sparse_embedding.square().sum(), list(model.parameters()))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_without_gradients(frozen, backend):
    model, inputs = tiny_model().requires_grad_(not frozen), tiny_inputs()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(frozen):
        torch.testing.assert_close(
            compiled(**inputs).sparse_embedding, model(**inputs).sparse_embedding, atol=1e-5, rtol=0
        )
    torch.compiler.reset()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_exports_with_dynamic_batch_and_length(pooling):
    model = tiny_model(pooling=pooling).requires_grad_(False)
    batch, length = torch.export.Dim("batch", min=2, max=16), torch.export.Dim("length", min=2, max=64)
    shapes = {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask", "pool_mask")}
    program = torch.export.export(model, (), tiny_inputs(), dynamic_shapes=shapes, strict=False)
    other = tiny_inputs(batch=5, length=20)
    torch.testing.assert_close(
        program.module()(**other)["sparse_embedding"], model(**other).sparse_embedding, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model, inputs = tiny_model().train(), tiny_inputs()
    expected = torch.autograd.grad(model(**inputs).sparse_embedding.sum(), list(model.parameters()))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # reentrant checkpointing needs an input that requires gradients
        model.enable_input_require_grads()
    model(**inputs).sparse_embedding.sum().backward()
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-5)
    gc.collect()
