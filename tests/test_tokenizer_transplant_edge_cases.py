"""Cases at the edges: heads by their class, padding biases, faulty settings, roundings, damaged files."""

import copy
import json
import math

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from rarezoo.tokenizer_transplant import TransplantMatrix, mix, plan_transplant, transplant_tokenizer
from rarezoo.tokenizer_transplant.modeling_tokenizer_transplant import base_of

from .cases import FIXTURES
from .test_tokenizer_transplant_matching import byte_level

BASE, DONOR = (FIXTURES / "tokenizer_transplant" / name for name in ("base_model", "donor_model"))
SMALL = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)


@pytest.fixture(scope="module")
def tokenizers():
    return AutoTokenizer.from_pretrained(BASE), AutoTokenizer.from_pretrained(DONOR)


@pytest.fixture(scope="module")
def table():
    return torch.randn(576, 8, generator=torch.Generator().manual_seed(0))


class EveryText:
    """An auxiliary space that knows every text."""

    def vectors(self, strings):
        rows = [[len(text), sum(map(ord, text)) % 7, 1.0] for text in strings]
        return torch.tensor(rows).float().reshape(-1, 3), torch.ones(len(strings), dtype=torch.bool)


def test_a_head_of_another_kind_stays(tokenizers, tmp_path):
    old, new = tokenizers
    config = transformers.BertConfig(vocab_size=576, num_labels=3, **SMALL)
    base = transformers.BertForSequenceClassification(config)
    base.save_pretrained(tmp_path)
    result = transplant_tokenizer(str(tmp_path), new, "mean", base_tokenizer=old)
    assert type(result.model) is transformers.BertForSequenceClassification
    assert torch.equal(result.model.classifier.weight, base.classifier.weight)


def test_biases_of_padding_are_no_part_of_the_mean(tokenizers):
    """A second transplantation, of a model that has padding rows from the first."""
    old, new = tokenizers
    config = transformers.BertConfig(vocab_size=576, **SMALL)
    model = transformers.BertForMaskedLM(config)
    once = transplant_tokenizer(model, new, "retok", base_tokenizer=old, pad_to_multiple_of=64)
    assert once.report.counts["padding"]
    extended = copy.deepcopy(new)
    extended.add_tokens(["entirely new"])
    twice = transplant_tokenizer(once.model, extended, "mean", base_tokenizer=new)
    assert twice.model.cls.predictions.bias.abs().max() < 1


def test_bfloat16_rows_are_scaled_before_they_are_rounded(tokenizers, table):
    old, new = tokenizers
    low = table.bfloat16()
    options = dict(method="retok", rescale="mean_norm")
    made = plan_transplant(old, new, low, **options)[0].apply(low)
    expected = plan_transplant(old, new, low.float(), **options)[0].apply(low.float())
    assert torch.equal(made, expected.bfloat16())


def test_a_tied_head_has_no_rows_of_its_own(tokenizers, table):
    old, new = tokenizers
    matrix, report = plan_transplant(old, new, table, None, "subword", combination="first_last")
    assert matrix.head is None
    assert not any("head" in row for row in report.rows())


@pytest.mark.parametrize("name", ["temperature", "local_score_temperature", "threshold"])
def test_options_that_are_no_number_make_no_rows_of_zeros(name, tokenizers, table):
    with pytest.raises(ValueError, match="number"):
        plan_transplant(*tokenizers, table, None, "tokenadapt", auxiliary=EveryText(), **{name: math.nan})


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("omp", {"k": 2.5}),
        ("omp", {"k": "8"}),
        ("tokenadapt", {"top_k": 1.5}),
        ("wechsel", {"neighbors": 1.5}),
        ("clp", {"top_k": 1.5}),
        ("mean", {"pad_to_multiple_of": 1.5}),
    ],
)
def test_counts_are_whole_numbers(method, options, tokenizers, table):
    donor = table[: len(tokenizers[1])], None
    with pytest.raises(ValueError, match="integer"):
        plan_transplant(*tokenizers, table, None, method, auxiliary=EveryText(), donor_tables=donor, **options)


@pytest.mark.parametrize("content", ["{bad", "[1, 2]", "3", '{"a": null}', '{"a": [["b"]]}', '{"a": [["b", "x"]]}'])
def test_a_malformed_mapping_is_told(content, tokenizers, table, tmp_path):
    path = tmp_path / "mapping.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"mapping\.json must hold JSON|'a' must be mapped to"):
        plan_transplant(*tokenizers, table, None, "mapping", mapping=path)


def test_infinite_weights_are_refused(tokenizers, table):
    with pytest.raises(ValueError, match="positive and finite"):
        plan_transplant(*tokenizers, table, None, "mapping", mapping={"a": [("b", math.inf)]})
    with pytest.raises(ValueError, match="finite weights"):
        mix([("mean", math.inf), ("retok", 1)])


@pytest.mark.parametrize("method", ["wechsel", "ofa"])
def test_word_vectors_that_know_no_new_token(method):
    old, new = byte_level(400), byte_level(600)
    old.add_tokens(["known"])
    table = torch.randn(len(old), 4)

    class Words:
        def __contains__(self, word):
            return word == "known"

        def __getitem__(self, word):
            return [1.0, 2.0]

    matrix, report = plan_transplant(old, new, table, None, method, auxiliary=Words())
    assert report.notes["rows by method"][method] == 0
    assert torch.isfinite(matrix.apply(table)).all()


def test_a_truncated_matrix_is_told(tokenizers, table, tmp_path):
    path = tmp_path / "transplant_matrix.safetensors"
    plan_transplant(*tokenizers, table, None, "retok")[0].save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"transplant_matrix\.safetensors is damaged"):
        TransplantMatrix.load(path)


def test_a_base_that_is_gone_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="base_model_name_or_path"):
        base_of(str(tmp_path / "gone"), tmp_path)
    with pytest.raises(FileNotFoundError, match="base_model_name_or_path"):
        base_of("../gone", tmp_path)
    assert base_of("owner/name", tmp_path) == "owner/name"


def test_a_result_does_not_replace_a_file(tokenizers, tmp_path):
    result = transplant_tokenizer(str(BASE), tokenizers[1], "mean")
    (tmp_path / "file").write_text(json.dumps("kept"), encoding="utf-8")
    with pytest.raises(FileExistsError):
        result.save_pretrained(tmp_path / "file")
