"""What holds of lexinvariant models in law, at the ends of semi-lexinvariance, and whatever the vocabulary's size."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rarezoo.lexinvariant.modeling_lexinvariant import resolve_symbols
from rarezoo.lexinvariant.symbol_rows import random_permutations, random_rows

from .cases import CASES

CASE = CASES["lexinvariant"]


def build(**fields):
    return CASE.build("AutoModelForCausalLM", **fields)


def text(length: int = 24, symbols: int = 12) -> torch.Tensor:
    return torch.randint(symbols, (1, length), generator=torch.Generator().manual_seed(3))


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])


@pytest.mark.parametrize("seed", [0, -5, 2**62])
def test_rows_are_independent_normal_numbers(seed):
    """Bounds of four standard errors, of 640,000 numbers."""
    rows = random_rows(torch.tensor(seed), torch.arange(10_000), 64).double()
    count = rows.numel()
    assert abs(rows.mean()) < 4 / count**0.5
    assert abs(rows.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((rows**4).mean() / rows.var() ** 2 - 3) < 4 * (24 / count) ** 0.5
    assert abs(correlation(rows[1:], rows[:-1])) < 4 / count**0.5, "of neighbouring symbols"
    assert abs(correlation(rows[:, 1:], rows[:, :-1])) < 4 / count**0.5, "of neighbouring numbers of a row"
    for other in (
        random_rows(torch.tensor(seed + 1), torch.arange(10_000), 64),
        random_rows(torch.tensor(seed), torch.arange(10_000), 64, tables=1),
    ):
        assert abs(correlation(rows, other.double())) < 4 / count**0.5


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(unseen_logits="collapsed"),
        dict(table="permuted"),
        dict(table="orthonormal", unseen_logits="collapsed"),
    ],
    ids=["gaussian", "collapsed", "permuted", "orthonormal"],
)
@torch.no_grad()
def test_names_of_symbols_mean_nothing_on_average(fields):
    """200 seeds for a text and 200 others for the same with other names: mean losses within three standard errors."""
    model, ids = build(**fields), text()
    renamed = torch.randperm(160, generator=torch.Generator().manual_seed(4))[ids]
    losses = [
        model.token_losses(found.expand(200, -1), lex_seeds=torch.arange(first, first + 200))[0].mean(1)
        for found, first in ((ids, 0), (renamed, 1000))
    ]
    error = math.sqrt(sum(float(values.var()) / 200 for values in losses))
    assert abs(float(losses[0].mean() - losses[1].mean())) < 3 * error
    assert losses[0].std() > 1e-4, "seeds matter"


@torch.no_grad()
def test_a_standard_model_knows_names():
    """The same comparison can fail: of learned rows, the two losses differ by far more than seeds explain."""
    model, ids = build(table="learned"), text()
    renamed = torch.randperm(160, generator=torch.Generator().manual_seed(4))[ids]
    assert abs(float(model.token_losses(ids)[0].mean() - model.token_losses(renamed)[0].mean())) > 0.05


def test_chosen_symbols_change_places_among_themselves():
    """Bijections that leave the others alone, and send a chosen symbol to every chosen one equally often."""
    seeds, size = torch.arange(2000), 12
    selected = torch.zeros(2000, size, dtype=torch.bool)
    selected[:, [1, 4, 5, 9]] = True
    found = random_permutations(seeds, size, selected)
    identity = torch.arange(size).expand(2000, -1)
    assert torch.equal(found.sort(dim=1).values, identity)
    assert torch.equal(found[~selected], identity[~selected])
    for symbol in (1, 4, 5, 9):
        counts = torch.bincount(found[:, symbol], minlength=size)
        expected = torch.zeros(size).index_fill(0, torch.tensor([1, 4, 5, 9]), 500.0)
        assert ((counts - expected).abs() < 4 * (2000 * 0.25 * 0.75) ** 0.5 * (expected > 0) + 0.5).all()


@torch.no_grad()
def test_the_ends_of_semi_lexinvariance():
    inputs = CASE.batch("AutoModelForCausalLM")
    standard = build(table="learned")
    for table in ("mixed", "subset_permuted"):
        model = build(table=table, randomize_prob=0.0)
        model.load_state_dict(standard.state_dict())
        assert torch.equal(model(**inputs).logits, standard(**inputs).logits)
    ends = build(table="subset_permuted", randomize_prob=1.0), build(table="permuted", learned_table=True)
    for model in ends:
        model.load_state_dict(standard.state_dict())
    assert torch.equal(*(model(**inputs).logits for model in ends))
    assert not torch.equal(ends[0](**inputs).logits, standard(**inputs).logits)
    random = build(table="mixed", randomize_prob=1.0)
    random.load_state_dict(standard.state_dict())
    gaussian = build()
    gaussian.load_state_dict(
        {name: tensor for name, tensor in standard.state_dict().items() if "tokens.weight" not in name}
    )
    assert torch.equal(random(**inputs).logits, gaussian(**inputs).logits)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    found = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.found = max(self.found, tensor.numel())
        return result


@pytest.mark.parametrize("train", [True, False])
def test_nothing_grows_with_the_vocabulary(train):
    largest = []
    for vocab_size in (128, 1_000_000):
        model = build(unseen_logits="collapsed", vocab_size=vocab_size).train(train)
        with _Largest() as mode, torch.set_grad_enabled(train):
            loss = model(text(), labels=text(), skip_logits=True).loss
            if train:
                loss.backward()
        largest.append(mode.found)
    assert largest[0] == largest[1] < 10_000


@pytest.mark.parametrize("vocab_size", [24, 160], ids=["drawn as a whole", "as they occur"])
@pytest.mark.parametrize("std", [1.0, 0.7])
@torch.no_grad()
def test_unseen_logits_of_orthogonal_rows(vocab_size, std):
    """Half the variance of a product with a random row at right angles to all that were seen, which is
    std^2 |P h|^2 / (dim - n) with the projection P off their span, here by least squares."""
    model = build(table="orthonormal", unseen_logits="collapsed", vocab_size=vocab_size, embedding_std=std)
    ids, dim = text(), model.config.hidden_size
    symbols = resolve_symbols(model.model.embed_tokens, ids)
    hidden = model.model(ids, symbols=symbols).last_hidden_state[0, -1].double()
    rows = symbols.rows[0].double()
    order = ids[0].unique()
    seen = torch.stack([rows[ids[0] == symbol][0] for symbol in order])
    products = seen @ seen.T
    torch.testing.assert_close(products, dim * std**2 * torch.eye(len(seen)).double(), atol=1e-4, rtol=0)
    inside = seen.T @ torch.linalg.lstsq(seen.T, hidden[:, None]).solution
    outside = (hidden[:, None] - inside).square().sum()
    expected = std**2 * outside / (dim - len(seen)) / 2
    logits = model(ids).logits[0, -1].double()
    unseen = torch.ones(vocab_size, dtype=torch.bool).index_fill(0, order, False)
    torch.testing.assert_close(logits[unseen], expected.expand(int(unseen.sum())), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[order], seen @ hidden / dim**0.5, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_unseen_logits_of_normal_rows():
    model, ids = build(unseen_logits="collapsed", embedding_std=0.7), text()
    hidden = model.model(ids).last_hidden_state[0, -1].double()
    unseen = torch.ones(160, dtype=torch.bool).index_fill(0, ids[0].unique(), False)
    expected = 0.7**2 * hidden.square().sum() / 32 / 2
    logits = model(ids).logits[0, -1].double()
    torch.testing.assert_close(logits[unseen], expected.expand(int(unseen.sum())), atol=1e-5, rtol=1e-5)
