"""Tokenizer transplantation against the official tools' numbers (see the fixtures' README), against float64 references
written here, and against what must not change: identity, permutation, processes, threads, precision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rarezoo.tokenizer_transplant import (
    TransplantMatrix,
    method_names,
    mix,
    plan_transplant,
    register_method,
    transplant_tokenizer,
)
from rarezoo.tokenizer_transplant.transplant_matrix import CombinationRows, SourceKind, blend

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizer_transplant"
BASE, DONOR = FIXTURES / "base_model", FIXTURES / "donor_model"
META = json.loads((FIXTURES / "meta.json").read_text())
VARIANTS = META["variants"]


def read(name):
    return load_file(FIXTURES / f"{name}.safetensors")


def close(found, expected, atol):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def permuted_tokenizer(tokenizer, order):
    """The byte-level BPE tokenizer with id `i` renamed to `order[i]`; built on its JSON, independently of our code."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["model"]["vocab"] = {token: order[i] for token, i in settings["model"]["vocab"].items()}
    settings["added_tokens"] = sorted(
        ({**token, "id": order[token["id"]]} for token in settings["added_tokens"]), key=lambda token: token["id"]
    )
    names = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "pad")}
    names = {name: token for name, token in names.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(settings)), **names)


@pytest.fixture(scope="module")
def auxiliary():
    strings = json.loads((FIXTURES / "auxiliary_strings.json").read_text())
    return dict(zip(strings, read("auxiliary")["aux"]))


@pytest.fixture(scope="module")
def tables():
    weights = load_file(BASE / "model.safetensors")
    return weights["model.embed_tokens.weight"], weights["lm_head.weight"]


@pytest.fixture(scope="module")
def tokenizers():
    return AutoTokenizer.from_pretrained(BASE), AutoTokenizer.from_pretrained(DONOR)


def plan(tokenizers, tables, *arguments, **options):
    return plan_transplant(*tokenizers, *tables, *arguments, **options)


# --- official numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokenadapt(variant, auxiliary):
    settings = VARIANTS[variant]
    result = transplant_tokenizer(
        BASE,
        DONOR,
        "tokenadapt",
        auxiliary=auxiliary,
        compatibility="tokenadapt",
        pad_to_multiple_of=settings["multiple_of"],
        **{name: settings[name] for name in ("weight", "temperature", "top_k", "threshold")},
    )
    ids = META["unique_ids"]
    kept = [row for row, new_id in enumerate(ids) if new_id not in settings["tie_sensitive_ids"]]
    new_ids = torch.tensor(ids)[kept]
    expected, model = read("expected_tokenadapt"), result.model
    close(model.model.embed_tokens.weight.detach()[new_ids], expected[f"{variant}.input"][kept], 1e-6)
    close(model.lm_head.weight.detach()[new_ids], expected[f"{variant}.output"][kept], 1e-6)
    base = load_file(BASE / "model.safetensors")
    shared = torch.tensor(META["shared_new_old_ids"]).T
    assert torch.equal(model.model.embed_tokens.weight[shared[0]], base["model.embed_tokens.weight"][shared[1]])
    assert torch.equal(model.lm_head.weight[shared[0]], base["lm_head.weight"][shared[1]])
    assert len(model.lm_head.weight) == settings["saved_rows"] == len(result.matrix)
    for name, value in settings["config_after"].items():
        assert getattr(model.config, name) == value, name


@pytest.mark.parametrize("combination", ["mean", "sum", "weighted_mean", "first_last"])
def test_subword_of_mergekit(combination, tokenizers, tables):
    matrix, _ = plan(tokenizers, tables, "subword", compatibility="mergekit", combination=combination)
    ids, expected = META["mergekit_row_ids"], read("expected_mergekit")
    close(matrix.apply(tables[0])[ids], expected[f"subword_{combination}.input"], 1e-5)
    close(matrix.apply(tables[1], head=True)[ids], expected[f"subword_{combination}.output"], 1e-5)
    copied = matrix.select((matrix.kinds == SourceKind.COPIED).nonzero()[:, 0]).input.base_ids.tolist()
    assert copied == [base_id for _, base_id in sorted(META["mergekit_exact_match_new_old"])]


def test_model_forward(auxiliary):
    settings, expected = VARIANTS["tokenadapt_hybrid"], read("expected_model_forward")
    result = transplant_tokenizer(BASE, DONOR, auxiliary=auxiliary, compatibility="tokenadapt", pad_to_multiple_of=128)
    outputs = result.model(expected["input_ids"], attention_mask=expected["attention_mask"], output_hidden_states=True)
    real = expected["attention_mask"].bool()
    close(outputs.hidden_states[-1][real], expected["last_hidden"][real], 1e-5)
    close(outputs.logits[..., expected["valid_columns"].long()][real], expected["logits"][real], 1e-5)
    assert settings["weight"] == 0.3, "the forward's model is the default's"


# --- float64 references -----------------------------------------------------------------------------------------------


def local_reference(s, pieces, texts, vectors, table, temperature):
    """Specification 4.1, LOCAL, for one token, in float64."""
    cosines = torch.stack([torch.cosine_similarity(vectors[s].double(), vectors[t].double(), dim=0) for t in texts])
    lengths = torch.tensor([len(text.encode()) / len(s.encode()) for text in texts], dtype=torch.float64)
    weights = (((cosines.softmax(0) + lengths) / 2) / (temperature + 1e-5)).softmax(0)
    return (weights[:, None] * table[pieces].double()).sum(0)


def test_local_rows_of_the_defaults(tokenizers, tables, auxiliary):
    matrix, _ = plan(tokenizers, tables, auxiliary=auxiliary, weight=0.0, temperature=0.6)
    rows, (base, new) = matrix.apply(tables[0]), tokenizers
    checked = 0
    for new_id in (matrix.kinds == SourceKind.COMBINED).nonzero()[:, 0].tolist():
        text = new.decode([new_id])
        pieces = base.encode(text, add_special_tokens=False)
        texts = [base.decode([piece]) for piece in pieces]
        if "\ufffd" not in text + "".join(texts) and {text, *texts} <= set(auxiliary):
            expected = local_reference(text, pieces, texts, auxiliary, tables[0], 0.6)
            close(rows[new_id].double(), expected, 1e-6)
            checked += 1
    assert checked > 40


def test_global_rows_use_only_whole_texts(tokenizers, tables, auxiliary):
    _, report = plan(tokenizers, tables, auxiliary=auxiliary, weight=1.0, top_k=5)
    base = tokenizers[0]
    for row in report.rows():
        if row["source"] == "combined" and "\ufffd" not in tokenizers[1].decode([row["id"]]) and row["id"] < 532:
            texts = [base.decode([base_id]) for base_id in row["base_ids"]]
            assert "\ufffd" not in "".join(texts) and len(texts) == 5
            assert not set(texts) & set(base.all_special_tokens)
            cosines = {
                i: torch.cosine_similarity(
                    auxiliary[tokenizers[1].decode([row["id"]])].double(), auxiliary[base.decode([i])].double(), dim=0
                )
                for i in range(4, len(base))
                if "\ufffd" not in base.decode([i])
            }
            assert sorted(cosines, key=cosines.get)[-5:][::-1] == sorted(row["base_ids"], key=lambda i: -cosines[i])
            expected = (torch.stack([cosines[i] for i in row["base_ids"]]) / (0.3 + 1e-5)).softmax(0)
            close(torch.tensor(row["weights"]).double(), expected, 1e-6)


@pytest.mark.parametrize("order", ["intended", "mergekit"])
def test_weighted_mean(order, tokenizers, tables):
    matrix, _ = plan(tokenizers, tables, "subword", combination="weighted_mean", order=order)
    base, new = tokenizers
    new_id = new.convert_tokens_to_ids("Wolkenkratzer")
    pieces = base.encode("Wolkenkratzer", add_special_tokens=False)
    rising = torch.arange(1, len(pieces) + 1, dtype=torch.float64) / sum(range(len(pieces) + 1))
    for_input, for_head = (rising, rising.flip(0)) if order == "intended" else (rising.flip(0), rising)
    close(matrix.apply(tables[0])[new_id].double(), for_input @ tables[0][pieces].double(), 1e-7)
    close(matrix.apply(tables[1], head=True)[new_id].double(), for_head @ tables[1][pieces].double(), 1e-7)


def test_first_and_last(tokenizers, tables):
    matrix, _ = plan(tokenizers, tables, "subword", combination="first_last")
    new_id = tokenizers[1].convert_tokens_to_ids("Wolkenkratzer")
    pieces = tokenizers[0].encode("Wolkenkratzer", add_special_tokens=False)
    assert torch.equal(matrix.apply(tables[0])[new_id], tables[0][pieces[-1]])
    assert torch.equal(matrix.apply(tables[1], head=True)[new_id], tables[1][pieces[0]])


def test_statistical_rows(tokenizers, tables):
    token_rows = [table[: len(tokenizers[0])].double() for table in tables]
    made = {}
    for method in ("mean", "zero", "randn", "normal", "john_hewitt", "mean_resizing"):
        matrix, _ = plan(tokenizers, tables, method)
        ids = torch.isin(matrix.kinds, torch.tensor([SourceKind.RANDOM, SourceKind.MEAN, SourceKind.ZERO]))
        assert int(ids.sum()) == 94
        made[method] = [matrix.apply(tables[0])[ids].double(), matrix.apply(tables[1], head=True)[ids].double()]
    for side in (0, 1):
        mean, std = token_rows[side].mean(0), token_rows[side].std(0)
        close(made["mean"][side], mean.expand(94, -1), 1e-7)
        assert not made["zero"][side].any()
        assert made["randn"][side].std().item() == pytest.approx(1, rel=0.1)
        close(made["normal"][side], mean + std * made["randn"][side], 1e-6)
        # Whitened by the covariance, draws are standard normal: mean squared length is the dimension.
        centred = token_rows[side] - mean
        inverse = torch.linalg.inv(centred.T @ centred / len(centred))
        for method, variance in (("john_hewitt", 1.0), ("mean_resizing", 1e-9)):
            difference = made[method][side] - mean
            lengths = ((difference @ inverse) * difference).sum(1) / variance
            assert lengths.mean().item() == pytest.approx(24, rel=0.15), method
    assert not torch.equal(*made["randn"]), "input table and head must not get the same noise"


def test_singular_covariances_are_drawn_from(tokenizers):
    table = torch.randn(576, 3).repeat(1, 400)  # rank 3 in 1200 dimensions
    matrix, _ = plan_transplant(*tokenizers, table, None, "john_hewitt")
    row = matrix.apply(table)[matrix.kinds == SourceKind.RANDOM][0]
    assert row.isfinite().all()
    close(row, row[:3].repeat(400), 0.01)


# --- what must not change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in method_names() if name != "wechsel"])
@pytest.mark.parametrize("kind", ["identity", "permutation"])
def test_identity_and_permutation(method, kind, tokenizers, tables):
    base = tokenizers[0]
    size = len(base)
    order = (
        torch.arange(size) if kind == "identity" else torch.randperm(size, generator=torch.Generator().manual_seed(3))
    )
    options = {"mapping": {"mapping": {}}, "mp_rope": {"base_heads": 2, "donor_heads": 2}}.get(method, {})
    matrix, _ = plan_transplant(base, permuted_tokenizer(base, order.tolist()), *tables, method, **options)
    assert set(matrix.counts()) <= {"copied", "special"} and len(matrix) == size
    for table, head in zip(tables, (False, True)):
        table = table.clone()
        table[5, 3], table[6, 2] = -0.0, 1e-42  # neither signs of zero nor subnormal numbers get lost
        new = matrix.apply(table, head=head)
        assert torch.equal(new[order].view(torch.int32), table[:size].view(torch.int32))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("tokenadapt", {}),
        ("tokenadapt", {"weight": 1.0, "top_k": 7}),
        ("retok", {}),
        ("fvt", {}),
        ("subword", {"combination": "weighted_mean"}),
        ("mean", {}),
    ],
)
def test_rows_do_not_depend_on_the_new_ids(method, options, tokenizers, tables, auxiliary):
    base, new = tokenizers
    order = torch.randperm(532, generator=torch.Generator().manual_seed(5))
    order = torch.cat([order, torch.arange(532, 536)])  # ids of added tokens follow the model's: they cannot move
    plain, _ = plan_transplant(base, new, *tables, method, auxiliary=auxiliary, **options)
    renamed = permuted_tokenizer(new, order.tolist())
    permuted, _ = plan_transplant(base, renamed, *tables, method, auxiliary=auxiliary, **options)
    for table, head in zip(tables, (False, True)):
        assert torch.equal(permuted.apply(table, head=head)[order], plain.apply(table, head=head))


def test_permuted_logits(tokenizers):
    base = tokenizers[0]
    order = torch.randperm(len(base), generator=torch.Generator().manual_seed(4))
    result = transplant_tokenizer(BASE, permuted_tokenizer(base, order.tolist()), "retok")
    text = "The class of statements, don't they?"
    old_ids, new_ids = base(text, return_tensors="pt"), result.tokenizer(text, return_tensors="pt")
    assert torch.equal(order[old_ids["input_ids"]], new_ids["input_ids"])
    expected = AutoModelForCausalLM.from_pretrained(BASE)(old_ids["input_ids"]).logits
    assert torch.equal(result.model(new_ids["input_ids"]).logits[..., order], expected[..., : len(base)])


_PROCESS = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoTokenizer
from rarezoo.tokenizer_transplant import plan_transplant
torch.set_num_threads(int(sys.argv[3]))
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
weights = load_file(folder / "base_model" / "model.safetensors")
tables = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in ("base_model", "donor_model")]
strings = json.loads((folder / "auxiliary_strings.json").read_text())
auxiliary = dict(zip(strings, load_file(folder / "auxiliary.safetensors")["aux"]))
for name, method, options in (
    ("peer", "tokenadapt", {"auxiliary": auxiliary, "compatibility": "tokenadapt"}),
    ("default", "tokenadapt", {"auxiliary": auxiliary}),
    ("drawn", "normal", {}),
):
    matrix, report = plan_transplant(*tokenizers, *tables, method, **options)
    matrix.save(out / f"{name}.safetensors")
    report.save(out / f"{name}.json")
    torch.save([matrix.apply(tables[0]), matrix.apply(tables[1], head=True)], out / f"{name}.pt")
"""


def test_processes_and_threads_agree(tmp_path):
    runs = []
    for seed, threads in (("1", "1"), ("2", "2")):
        out = tmp_path / seed
        out.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", _PROCESS, str(FIXTURES), str(out), threads]
        runs.append((out, subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)))
    for _, process in runs:
        assert process.wait(240) == 0, process.stderr.read()
    first, second = (out for out, _ in runs)
    for name in ("peer", "default", "drawn"):
        for ending in (".safetensors", ".json"):
            assert (first / f"{name}{ending}").read_bytes() == (second / f"{name}{ending}").read_bytes()
        for one, other in zip(torch.load(first / f"{name}.pt"), torch.load(second / f"{name}.pt")):
            assert torch.equal(one, other)


def test_bfloat16_is_float32_rounded_once(tokenizers, tables, auxiliary):
    tables = [table.bfloat16() for table in tables]
    matrix, _ = plan(tokenizers, tables, auxiliary=auxiliary)
    in_float32, _ = plan(tokenizers, [table.float() for table in tables], auxiliary=auxiliary)
    for table, head in zip(tables, (False, True)):
        assert torch.equal(matrix.apply(table, head=head), in_float32.apply(table.float(), head=head).bfloat16())


def test_seeds(tokenizers, tables):
    rows = [plan(tokenizers, tables, "randn", seed=seed)[0].apply(tables[0]) for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


# --- mixing, falling back, rescaling, mapping -------------------------------------------------------------------------


def test_mix(tokenizers, tables):
    made = {name: plan(tokenizers, tables, name)[0].apply(tables[0]) for name in ("retok", "mean", "randn")}
    matrix, report = plan(tokenizers, tables, mix([("retok", 3), ("mean", 1), (("randn", {}), 4)]))
    expected = (3 * made["retok"].double() + made["mean"].double() + 4 * made["randn"].double()) / 8
    copied = matrix.kinds <= SourceKind.SPECIAL
    assert torch.equal(matrix.apply(tables[0])[copied], made["retok"][copied])
    close(matrix.apply(tables[0]).double(), expected, 1e-6)
    assert report.provenance["method"] == "3 retok + 1 mean + 4 randn"


def test_parts_of_a_mix_that_are_undefined(tables):
    one = TransplantMatrix.copies(torch.tensor([4, -1, 7]), 576)
    other = TransplantMatrix.copies(torch.tensor([5, 6, 7]), 576)
    mixed = blend([(one, 0.1), (other, 0.3)])
    expected = torch.stack([0.25 * tables[0][4] + 0.75 * tables[0][5], tables[0][6], tables[0][7]])
    close(mixed.apply(tables[0]), expected, 1e-7)
    assert torch.equal(mixed.apply(tables[0])[1:], expected[1:]), "copies stay copies"


def test_fallbacks(tokenizers, tables):
    retok = plan(tokenizers, tables, "retok")[0].apply(tables[0])
    matrix, report = plan(tokenizers, tables, "mapping", mapping={"de": "d"}, fallback=["retok", ("normal", {})])
    assert report.notes["rows by method"] == {"mapping": 1, "retok": 93}
    new_id = tokenizers[1].convert_tokens_to_ids("Wolkenkratzer")
    assert torch.equal(matrix.apply(tables[0])[new_id], retok[new_id])
    with pytest.raises(ValueError, match=r"93 tokens, such as .* have no row by mapping: add 'mean' to fallback"):
        plan(tokenizers, tables, "mapping", mapping={"de": "d"}, fallback=[])


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_one_half_of_tokenadapt_counts_in_full_where_the_other_is_missing(weight, tokenizers, tables, auxiliary):
    local = plan(tokenizers, tables, auxiliary=auxiliary, weight=0.0)[0].apply(tables[0])
    both, report = plan(tokenizers, tables, auxiliary=auxiliary, weight=weight, threshold=1.1)  # above every cosine
    assert report.counts == {"copied": 440, "special": 2, "combined": 94}
    torch.testing.assert_close(both.apply(tables[0]), local, atol=1e-7, rtol=0)


def test_equal_auxiliary_vectors_are_told_apart_by_id(tokenizers, tables, auxiliary):
    """An uncased encoder gives "The", "the" and " the" one vector: the lowest id wins, and the report counts it."""
    same = {string: torch.ones(12) for string in auxiliary}
    matrix, report = plan(tokenizers, tables, auxiliary=same, weight=1.0, top_k=3)
    rows = [
        row for row in report.rows() if row["source"] == "combined" and "\ufffd" not in tokenizers[1].decode(row["id"])
    ]
    texts = [tokenizers[0].decode([token_id]) for token_id in range(len(tokenizers[0]))]
    lowest = [i for i, text in enumerate(texts) if i > 3 and text in same and "\ufffd" not in text][:3]
    found = [row for row in rows if row["base_ids"] == lowest]
    assert len(found) == report.notes["targets with equal auxiliary similarities"] > 50
    close(torch.tensor([row["weights"] for row in found]), torch.full((len(found), 3), 1 / 3), 1e-7)
    assert matrix.counts()["combined"] == 94


def test_a_method_of_ones_own(tokenizers, tables, monkeypatch):
    def copy_of(context, *, base_id=7):
        return TransplantMatrix.copies(torch.full((len(context.targets),), base_id), context.base_rows)

    monkeypatch.setattr("rarezoo.tokenizer_transplant.transplanting._OWN_METHODS", {})
    register_method("copy_of", copy_of)
    assert "copy_of" in method_names()
    matrix, _ = plan(tokenizers, tables, "copy_of", base_id=9)
    new_id = tokenizers[1].convert_tokens_to_ids("Wolkenkratzer")
    assert torch.equal(matrix.apply(tables[0])[new_id], tables[0][9])
    with pytest.raises(ValueError, match="there is already a method 'copy_of'"):
        register_method("copy_of", copy_of)
    with pytest.raises(ValueError, match="returned 1 rows over 576 base rows; expected 94 over 576"):
        register_method("short", lambda context: TransplantMatrix.copies(torch.tensor([1]), 576))
        plan(tokenizers, tables, "short")


def test_rescaling(tokenizers, tables):
    plain, _ = plan(tokenizers, tables, "retok")
    rescaled, _ = plan(tokenizers, tables, "retok", rescale="mean_norm")
    made = plain.kinds == SourceKind.COMBINED
    for table, head in zip(tables, (False, True)):
        before, after = plain.apply(table, head=head), rescaled.apply(table, head=head)
        assert torch.equal(before[~made], after[~made])
        assert before[made].norm(dim=1).mean() < 0.9 * table[:560].norm(dim=1).mean(), "averaging shortens rows"
        close(after[made].norm(dim=1), table[:560].norm(dim=1).mean().expand(94), 1e-5)
        close(torch.cosine_similarity(before[made], after[made]), torch.ones(94), 1e-6)


def test_mapping(tokenizers, tables, tmp_path):
    pairs = [["Wolkenkratzer", [["th", 3], ["in", 1]]], ["de", [["d", 1]]], ["able", [["in", 2]]]]
    (tmp_path / "mapping.json").write_text(json.dumps(pairs))
    lines = ["Wolkenkratzer\tth\t30", "Wolkenkratzer\tin\t10", "Wolkenkratzer\tx\t9", "de\td\t10", "able\tin\t11"]
    (tmp_path / "alignment.tsv").write_text("\n".join(lines) + "\n")
    ids = tokenizers[0].convert_tokens_to_ids
    expected = {
        "Wolkenkratzer": 0.75 * tables[0][ids("th")] + 0.25 * tables[0][ids("in")],
        "de": tables[0][ids("d")],
        "able": tables[0][ids("in")],
    }
    for given in ({new: old for new, old in pairs}, tmp_path / "mapping.json", tmp_path / "alignment.tsv"):
        matrix, report = plan(tokenizers, tables, "mapping", mapping=given, fallback=["zero"])
        assert report.counts == {"copied": 439, "special": 2, "mapped": 3, "zero": 92}
        for token, row in expected.items():
            close(matrix.apply(tables[0])[tokenizers[1].convert_tokens_to_ids(token)], row, 1e-7)
    with pytest.raises(ValueError, match="names 'nowhere', which has no row in the base vocabulary"):
        plan(tokenizers, tables, "mapping", mapping={"de": "nowhere"})


# --- report and provenance --------------------------------------------------------------------------------------------


def test_report(auxiliary, tmp_path):
    result = transplant_tokenizer(BASE, DONOR, auxiliary=auxiliary, pad_to_multiple_of=64)
    result.save_pretrained(tmp_path / "new")
    report = json.loads((tmp_path / "new" / "transplant_report.json").read_text())
    assert [row["id"] for row in report["tokens"]] == list(range(576))
    kinds = [row["source"] for row in report["tokens"]]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == report["provenance"]["counts"] == result.report.counts
    assert result.report.to_dict()["tokens"] == report["tokens"]
    weights = load_file(tmp_path / "new" / "model.safetensors")["model.embed_tokens.weight"]
    base = load_file(BASE / "model.safetensors")["model.embed_tokens.weight"].double()
    for row in report["tokens"][:536]:
        expected = torch.tensor(row["weights"], dtype=torch.float64) @ base[row["base_ids"]]
        close(weights[row["id"]].double(), expected, 1e-6)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert again.config.tokenizer_transplant == report["provenance"] == result.report.provenance
    assert report["provenance"]["method"] == "tokenadapt" and report["provenance"]["seed"] == 0
    with pytest.raises(FileExistsError, match="is not empty"):
        result.save_pretrained(tmp_path / "new")


def test_matrix_in_a_file(tokenizers, tables, tmp_path):
    for method, options in (("subword", {"combination": "weighted_mean"}), ("john_hewitt", {})):
        matrix, _ = plan(tokenizers, tables, method, pad_to_multiple_of=64, **options)
        matrix.save(tmp_path / "matrix.safetensors")
        again = TransplantMatrix.load(tmp_path / "matrix.safetensors")
        for table, head in zip(tables, (False, True)):
            assert torch.equal(matrix.apply(table, head=head), again.apply(table, head=head))
        assert again.counts() == matrix.counts()
    with pytest.raises(ValueError, match="holds no transplant matrix"):
        TransplantMatrix.load(BASE / "model.safetensors")


def test_dependence_on_other_rows_is_none(tokenizers, tables, auxiliary):
    matrix, _ = plan(tokenizers, tables, auxiliary=auxiliary)
    chosen = torch.tensor([535, 3, 291, 258, 0])
    assert torch.equal(matrix.select(chosen).apply(tables[0]), matrix.apply(tables[0])[chosen])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_sums_in_the_order_of_their_entries(dtype):
    """Of any width, copies and dense parts among them, against a loop over the entries; columns are independent."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(-1, 50, (90, 5), generator=generator)
    weights = torch.where(indices >= 0, torch.randn(90, 5, generator=generator), 0.0)
    indices[::3, 1:], weights[::3] = -1, 1.0
    dense = torch.randn(90, 301, generator=generator)
    table = torch.randn(60, 301, generator=generator).to(dtype)
    for part in (None, dense):
        rows = CombinationRows.from_padded(indices, weights, part)
        working = torch.promote_types(dtype, torch.float32)
        expected = torch.zeros(90, 301, dtype=torch.float64)
        for row, (ids, shares) in enumerate(zip(indices.tolist(), weights.tolist())):
            for id_, share in zip(ids, shares):
                expected[row] += table[id_].double() * share if id_ >= 0 else 0
        expected += 0 if part is None else part
        found = rows.apply(table)
        assert found.dtype == dtype
        allowed = 8 * max(torch.finfo(dtype).eps / 8, torch.finfo(working).eps)
        torch.testing.assert_close(found.double(), expected, atol=allowed * 4, rtol=allowed)
        if part is None:
            copies = (indices[::3, 0] >= 0).nonzero()[:, 0]
            assert torch.equal(found[::3][copies], table[indices[::3, 0][copies]])
            for columns in (slice(0, 1), slice(100, 140), slice(128, 256), slice(250, 301)):
                assert torch.equal(rows.apply(table[:, columns]), found[:, columns])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["tokenadapted"], {}, "unknown method 'tokenadapted'; known: tokenadapt"),
        (["retok"], {"temperature": 1}, "method 'retok' has no option temperature; it has: none"),
        (["tokenadapt"], {}, "method 'tokenadapt' needs auxiliary="),
        (["tokenadapt"], {"auxiliary": {"a": [1.0]}, "weight": 2}, "weight must lie between 0 and 1, found 2"),
        (["retok"], {"fallback": ["means"]}, "unknown method 'means'"),
        ([mix([("retok", 1), ("means", 1)])], {}, "unknown method 'means'"),
        ([mix([("retok", 1)])], {"k": 3}, "give options to the methods of the mix; found k"),
        (["retok"], {"match": "fuzzy"}, "unknown matching rule 'fuzzy'; known: bytes"),
        (["retok"], {"compatibility": "mergekid"}, "compatibility must be None or one of tokenadapt"),
        (["retok"], {"rescale": "norm"}, "rescale must be 'none' or 'mean_norm'"),
        (["retok"], {"pad_to_multiple_of": 0}, "pad_to_multiple_of must be at least 1"),
        (["retok"], {"special_map": {"<|im_start|>": "<s>"}}, "'<s>', which is no token of the base tokenizer"),
        (["retok"], {"donor_tables": (torch.zeros(5, 4), None)}, "the donor's tables have 5 rows"),
        (["mapping"], {}, "method 'mapping' needs the option mapping"),
        (["subword"], {"combination": "median"}, "combination must be mean, sum"),
    ],
)
def test_errors(arguments, options, message, tokenizers, tables):
    with pytest.raises(ValueError, match=message):
        plan(tokenizers, tables, *arguments, **options)


def test_errors_about_tables(tokenizers, tables):
    matrix, _ = plan(tokenizers, tables, "retok")
    with pytest.raises(ValueError, match="made for a table of 576 rows, this one has 575"):
        matrix.apply(tables[0][:-1])
    with pytest.raises(ValueError, match="the head has shape"):
        plan_transplant(*tokenizers, tables[0], tables[1][:, :-1], "retok")
    with pytest.raises(TypeError, match="expected a fast tokenizer"):
        plan_transplant(object(), tokenizers[1], tables[0])


def test_no_path_is_published(tokenizers, tables, tmp_path):
    new_token = next(iter(set(tokenizers[1].get_vocab()) - set(tokenizers[0].get_vocab())))
    base_token = tokenizers[0].convert_ids_to_tokens(300)
    (tmp_path / "mapping.json").write_text(json.dumps([[new_token, [[base_token, 1.0]]]]))
    for path in (tmp_path / "mapping.json", str(tmp_path / "mapping.json")):
        _, report = plan(tokenizers, tables, "mapping", mapping=path)
        assert report.provenance["options"] == {"mapping": "mapping.json"}
        assert str(tmp_path) not in json.dumps(report.provenance)
