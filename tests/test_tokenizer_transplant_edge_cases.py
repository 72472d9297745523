"""Cases at the edges: heads by their class, padding biases, faulty settings, roundings, damaged files."""

import copy
import json
import math
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from rarezoo import TransplantedForCausalLM
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


NOWHERE = "./nowhere"
DONOR_TABLE = torch.zeros(536, 4)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ValueError, {"seed": "a"}, "seed must be an integer, found 'a'"),
        (ValueError, {"seed": True}, "seed must be an integer, found True"),
        (ValueError, {"seed": -1}, "seed must lie between 0 and"),
        (ValueError, {"seed": 2**70}, "seed must lie between 0 and"),
        (ValueError, {"magikarp": "x"}, "magikarp must be True or False, found 'x'"),
        (ValueError, {"match": 5}, "match must be a string or None, found 5"),
        (ValueError, {"rescale": None}, "rescale must be a string, found None"),
        (ValueError, {"prefix_match": True}, "prefix_match must be a string, found True"),
        (ValueError, {"new_vocab_noise": "x"}, "new_vocab_noise must be a number, found 'x'"),
        (ValueError, {"new_vocab_scale": None}, "new_vocab_scale must be a number, found None"),
        (ValueError, {"pad_to_multiple_of": True}, "pad_to_multiple_of must be an integer, found True"),
        (ValueError, {"trust_remote_code": "no"}, "trust_remote_code must be True or False, found 'no'"),
        (TypeError, {"special_map": ["a"]}, r"special_map must be \{new token: base token\}, found \['a'\]"),
        (ValueError, {"special_map": {"a": 5}}, "special_map names 5, which is no token of the base"),
        (TypeError, {"method": ["retok"]}, r"method must be a name or a mix, found \['retok'\]"),
        (TypeError, {"method": None}, "method must be a name or a mix, found None"),
        (TypeError, {"fallback": 5}, "fallback must be a list of methods, found 5"),
        (TypeError, {"fallback": [("mean", 5)]}, "a method is a name or a pair"),
        (ValueError, {"fallback": ["mean", ("retok", {"k": 1})]}, "method 'retok' has no option k"),
        (ValueError, {"fallback": ["mean", ("normal", {"per_dimension": 1})]}, "per_dimension must be True or False"),
        (
            ValueError,
            {"method": "mp_rope", "donor": (DONOR_TABLE, None)},
            "needs the option donor_heads and base_heads",
        ),
        (ValueError, {"method": "omp", "donor": (DONOR_TABLE, None), "k": True}, "k must be an integer, found True"),
        (TypeError, {"method": "omp", "donor": 5}, "donor must be a model, where to load it, or .*; found int"),
        (TypeError, {"method": "omp", "donor": DONOR_TABLE}, "donor must be a model, .*; found Tensor"),
        (TypeError, {"method": "omp", "donor": (DONOR_TABLE,)}, r"must be \(input table, head or None\)"),
        (TypeError, {"method": "omp", "donor": (DONOR_TABLE[0], None)}, r"found \(\(4,\), \('NoneType',\)\)"),
        (TypeError, {"method": "omp", "donor": (1, 2)}, r"found \(\('int',\), \('int',\)\)"),
        (ValueError, {"method": "omp", "donor": (DONOR_TABLE * math.nan, None)}, "must be finite"),
        (FileNotFoundError, {"method": "omp", "donor": NOWHERE}, "there is no folder ./nowhere"),
        (TypeError, {"method": "mapping", "mapping": 5}, r"mapping must be \{new: base token or pairs\} or a file"),
        (ValueError, {"method": "tokenadapt", "weight": "x"}, "weight must be a number, found 'x'"),
        (ValueError, {"method": "tokenadapt", "weight": -0.1}, "weight must lie between 0 and 1, found -0.1"),
        (ValueError, {"method": "tokenadapt", "temperature": None}, "temperature must be a number, found None"),
        (ValueError, {"method": "tokenadapt", "temperature": math.inf}, "temperatures must be positive numbers"),
        (ValueError, {"method": "wechsel", "temperature": "x"}, "temperature must be a number, found 'x'"),
        (ValueError, {"method": "wechsel", "dictionary": [("a", "b")]}, "dictionary aligns .* base_auxiliary"),
        (ValueError, {"method": "wechsel", "base_auxiliary": {"a": [1.0]}, "dictionary": "ab"}, "must give pairs"),
        (ValueError, {"method": "wechsel", "base_auxiliary": {"a": [1.0]}, "dictionary": [("a",)]}, "must give pairs"),
        (ValueError, {"method": "ofa", "factor_dimensions": 1.5}, "factor_dimensions must be an integer or None"),
        (ValueError, {"method": "focus", "memory_budget": 1.5}, "memory_budget must be an integer, found 1.5"),
        (ValueError, {"dtype": "floaty"}, "dtype must be 'auto' or one of torch's"),
        (TypeError, {"model_or_path": 5}, "the model must be a PreTrainedModel, a folder or a Hub name; found int"),
        (FileNotFoundError, {"model_or_path": NOWHERE}, "there is no folder ./nowhere"),
        (FileNotFoundError, {"new_tokenizer": NOWHERE}, "there is no folder ./nowhere"),
        (TypeError, {"new_tokenizer": None}, "expected a fast tokenizer .*, found NoneType"),
        (TypeError, {"new_tokenizer": []}, "must be a list of strings, and not empty"),
        (TypeError, {"new_tokenizer": ["a", 5]}, r"must be a list of strings, and not empty; found \['a', 5\]"),
        (TypeError, {"base_tokenizer": 5}, "expected a fast tokenizer .*, found int"),
    ],
)
def test_every_argument_is_checked(kind, arguments, message):
    given = {"model_or_path": BASE, "new_tokenizer": DONOR, "method": "retok", "auxiliary": EveryText()} | arguments
    with pytest.raises(kind, match=message):
        transplant_tokenizer(**given)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ({}, ValueError, "auxiliary vectors must be those of at least one string; found none"),
        ({5: [1.0]}, TypeError, "auxiliary vectors must belong to strings; found 5"),
        ({"a": [1.0, 2.0], "b": [1.0]}, ValueError, "must be numbers, and all of one length"),
        ({"a": [math.nan]}, ValueError, "auxiliary vector 0 holds NaN"),
        (5, TypeError, "expected auxiliary vectors as .*; found int"),
        ("./nowhere", FileNotFoundError, "there is no folder ./nowhere of an encoder"),
        ("nowhere.safetensors", FileNotFoundError, "there is no file nowhere.safetensors"),
        ("{folder}/empty", ValueError, "no encoder for auxiliary vectors can be read from '.*empty'"),
        ("{folder}/torn.safetensors", ValueError, r"torn\.safetensors is damaged or truncated"),
        ("{folder}/text.safetensors", ValueError, r"expected a JSON list of strings in .*text\.json"),
    ],
)
@pytest.mark.parametrize("method", ["tokenadapt", "retok"])
def test_auxiliary_vectors_that_are_none(method, source, kind, message, tokenizers, table, tmp_path):
    (tmp_path / "empty").mkdir()
    save_file({"table": torch.ones(1, 2)}, tmp_path / "text.safetensors")
    (tmp_path / "text.json").write_text('["a"')
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "text.safetensors").read_bytes()[:40])
    (tmp_path / "torn.json").write_text('["a"]')
    if isinstance(source, str):
        source = source.format(folder=tmp_path)
    with pytest.raises(kind, match=message):
        plan_transplant(*tokenizers, table, None, method, auxiliary=source)


@pytest.mark.parametrize("parts", [5, [("retok",)], [("retok", "x")], [(3, 0.5)]])
def test_a_mix_is_of_pairs(parts):
    with pytest.raises(TypeError, match=r"a mix needs pairs \(method, weight\), found"):
        mix(parts)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("place", ["new_tokenizer", "base_tokenizer", "donor"])
def test_a_truncated_tokenizer_is_named(name, place, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(DONOR, folder)
    (folder / name).write_text((DONOR / name).read_text()[:-40])
    given = {"new_tokenizer": DONOR, "method": "omp", "donor": DONOR} | {place: folder}
    with pytest.raises(ValueError, match=f"damaged/{name} is damaged or truncated"):
        transplant_tokenizer(BASE, **given)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer can be read from .*damaged"):
        transplant_tokenizer(BASE, **given)


def test_an_adapter_is_no_base_and_no_result(tokenizers, tmp_path):
    """A folder of an adapter is refused; a result that would be stored as an adapter alone, too."""
    adapted = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(BASE), peft.LoraConfig())
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizers[0].save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter holds an adapter: merge it into its base first"):
        transplant_tokenizer(tmp_path / "adapter", DONOR, "retok")
    result = transplant_tokenizer(adapted, DONOR, "retok", base_tokenizer=tokenizers[0])
    with pytest.raises(ValueError, match="a PEFT model stores its adapter alone, without the new tables"):
        result.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="adapter holds an adapter: merge it into its base first"):
        TransplantedForCausalLM.from_base(tmp_path / "adapter", result.matrix, result.tokenizer, tokenizers[0])


def test_a_lost_end_of_text_is_told(tokenizers):
    base, new = tokenizers[0], copy.deepcopy(tokenizers[1])
    end = new.eos_token_id
    new.eos_token = None  # the row of the base's end of text still tells which token it was
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = transplant_tokenizer(BASE, new, "retok", base_tokenizer=base)
    assert result.model.generation_config.eos_token_id == end
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({token: token_id for token_id, token in enumerate(alphabet)}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    bytes_alone = transformers.PreTrainedTokenizerFast(tokenizer_object=plain)
    with pytest.warns(UserWarning, match="no end-of-text token: generation will end by its length alone"):
        result = transplant_tokenizer(BASE, bytes_alone, "mean", base_tokenizer=base)
    assert result.model.generation_config.eos_token_id is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_longer_than_all_anchors_are_shortened_and_counted(dtype, tokenizers, table):
    """Anchors that are nearly equal for the donor, but not for the base: their large coefficients do not cancel."""
    generator = torch.Generator().manual_seed(0)
    tables = table.to(dtype), torch.randn(576, 8, generator=generator).to(dtype)
    matrix, _ = plan_transplant(*tokenizers, *tables, "mean")
    targets, anchors = (matrix.kinds == 6).nonzero()[:, 0], (matrix.kinds <= 1).nonzero()[:, 0]
    donor = torch.cat([torch.ones(536, 1), 0.01 * torch.randn(536, 2, generator=generator)], 1)
    donor[targets] = torch.randn(len(targets), 3, generator=generator)
    relative = (donor[targets].norm(dim=1) / donor[anchors].norm(dim=1).max()).clamp(min=1)
    plain = {"method": "omp", "k": 2, "donor_tables": (donor, None), "match": "bytes"}
    long, _ = plan_transplant(*tokenizers, *tables, **plain, compatibility="mergekit")
    short, report = plan_transplant(*tokenizers, *tables, **plain)
    shortened = 0
    for head, base in enumerate(tables):
        limit = base[matrix.input.base_ids[matrix.input.offsets[anchors]]].float().norm(dim=1).max() * relative
        before, after = (rows.apply(base.float(), head=bool(head))[targets] for rows in (long, short))
        is_long = before.norm(dim=1) > limit * 1.001
        expected = torch.where(is_long, limit / before.norm(dim=1), 1.0)[:, None] * before
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(after[~is_long], before[~is_long]) and is_long.sum() > 50
        shortened |= is_long
    assert report.notes["omp: rows shortened to the base's longest"] == int(shortened.sum())
    usual = {**plain, "k": 8, "donor_tables": (table[:536], None)}
    report = plan_transplant(*tokenizers, *tables, **usual)[1]
    assert report.notes["omp: rows shortened to the base's longest"] < len(targets)


@pytest.mark.parametrize("content", ["{bad", "[1, 2]", "3", '{"a": null}', '{"a": [["b"]]}', '{"a": [["b", "x"]]}'])
def test_a_malformed_mapping_is_told(content, tokenizers, table, tmp_path):
    path = tmp_path / "mapping.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"mapping\.json must hold JSON|'a' must be mapped to"):
        plan_transplant(*tokenizers, table, None, "mapping", mapping=path)


def test_base_rows_that_are_not_finite_make_no_others(table):
    """A copied row stays what it was; sums of it are refused, as are sums that the dtype cannot hold."""
    matrix = TransplantMatrix.from_combinations(
        torch.tensor([[3, -1], [4, 5]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]]), len(table)
    )
    broken = table.clone()
    broken[3, 1] = torch.nan
    assert torch.equal(matrix.apply(broken).isnan().nonzero(), torch.tensor([[0, 1]]))
    broken[5, 2] = torch.inf
    with pytest.raises(ValueError, match=r"1 combined rows .* of id 1: base rows \[5\] hold NaN or infinity"):
        matrix.apply(broken)
    large = torch.full_like(table, 6e4).half()
    twice = TransplantMatrix.from_combinations(torch.tensor([[4, 5]]), torch.tensor([[1.0, 1.0]]), len(table))
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        twice.apply(large)


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
