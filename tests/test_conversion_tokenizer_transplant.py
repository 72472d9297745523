"""Transplanted models between plain folders and checkpoints that store the matrix."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from rarezoo.conversion import convert
from rarezoo.conversion.checkpoint_files import ConversionError
from rarezoo.tokenizer_transplant import SourceKind, TransplantMatrix, transplant_tokenizer

from .cases import FIXTURES

FAMILY = "tokenizer_transplant"
BASE, DONOR = (FIXTURES / "tokenizer_transplant" / name for name in ("base_model", "donor_model"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain folder with padding rows, by a method that solves for input table and head separately."""
    folder = tmp_path_factory.mktemp("plain") / "omp"
    result = transplant_tokenizer(BASE, DONOR, "omp", base_tokenizer=BASE, donor=DONOR, k=4, pad_to_multiple_of=64)
    result.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stored(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "omp"
    return folder, convert(FAMILY, plain, folder, base=BASE)


def assert_same_weights(left, right, rows=None):
    left, right = (load_file(folder / "model.safetensors") for folder in (left, right))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        kept = rows if rows is not None and name in ("model.embed_tokens.weight", "lm_head.weight") else slice(None)
        assert torch.equal(tensor[kept], right[name][kept]), name


def test_there_and_back(plain, stored, tmp_path):
    folder, report = stored
    written = report.folders[0]
    assert (report.source_layout, report.to, written.layout) == ("plain", "rarezoo", "rarezoo")
    assert written.size_bytes == (folder / "transplant_matrix.safetensors").stat().st_size
    assert len(written.dropped) + written.tensors == len(load_file(plain / "model.safetensors"))
    back = convert(FAMILY, folder, tmp_path / "back", to="official")
    tensors = load_file(plain / "model.safetensors")
    assert (back.folders[0].tensors, back.folders[0].parameters) == (
        len(tensors),
        sum(tensor.numel() for tensor in tensors.values()),
    )
    assert_same_weights(plain, tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((where / name).read_text()) for where in (plain, tmp_path / "back"))
        assert before == after, name


def test_the_report_keeps_rows_compact(plain, stored):
    matrix = TransplantMatrix.load(stored[0] / "transplant_matrix.safetensors")
    assert matrix.input.dense is None and matrix.head.dense is None
    assert "dense" not in matrix.counts() and matrix.counts()["padding"] == 576 - 536
    assert matrix.counts() == json.loads((plain / "config.json").read_text())["tokenizer_transplant"]["counts"]


@torch.no_grad()
def test_logits_are_the_plain_models(plain, stored):
    ids = torch.arange(20, 40)[None]
    opened = AutoModelForCausalLM.from_pretrained(stored[0])
    assert torch.equal(opened(ids).logits, AutoModelForCausalLM.from_pretrained(plain)(ids).logits)
    assert opened.config.tokenizer_transplant["method"] == "omp"


def test_a_folder_of_another_tool(plain, tmp_path):
    """Without a report, and with ids in its configuration that its tokenizer does not have."""
    other = tmp_path / "other"
    shutil.copytree(plain, other)
    (other / "transplant_report.json").unlink()
    config = json.loads((other / "config.json").read_text())
    del config["tokenizer_transplant"]
    (other / "config.json").write_text(json.dumps({**config, "pad_token_id": 1}))
    report = convert(FAMILY, other, tmp_path / "stored", base=BASE)
    matrix = TransplantMatrix.load(tmp_path / "stored" / "transplant_matrix.safetensors")
    assert set(matrix.counts()) == {"copied", "dense", "padding"}
    told = json.loads((plain / "config.json").read_text())["tokenizer_transplant"]["counts"]
    assert matrix.counts()["dense"] == told["combined"]
    assert (matrix.kinds[:536] != int(SourceKind.PADDING)).all()
    assert any("pad_token_id was 1" in note for note in report.folders[0].notes)
    convert(FAMILY, tmp_path / "stored", tmp_path / "back", to="official")
    assert_same_weights(other, tmp_path / "back", rows=slice(536))


@torch.no_grad()
def test_heads_with_a_bias_and_tied_tables(tmp_path):
    config = transformers.BertConfig(
        vocab_size=576, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=2
    )
    torch.manual_seed(0)
    base = transformers.BertForMaskedLM(config)
    torch.nn.init.normal_(base.cls.predictions.bias)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "base")
    result = transplant_tokenizer(tmp_path / "base", DONOR, "retok")
    result.save_pretrained(tmp_path / "plain")
    convert(FAMILY, tmp_path / "plain", tmp_path / "stored", base=tmp_path / "base")
    opened, ids = AutoModelForMaskedLM.from_pretrained(tmp_path / "stored"), torch.arange(20, 40)[None]
    assert type(opened).__name__ == "TransplantedForMaskedLM"
    assert torch.equal(opened(ids).logits, result.model.eval()(ids).logits)
    convert(FAMILY, tmp_path / "stored", tmp_path / "back", to="official")
    assert_same_weights(tmp_path / "plain", tmp_path / "back")


def changed(plain, folder, name):
    shutil.copytree(plain, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ConversionError, "which model was .* made from", lambda plain, stored, out: convert(FAMILY, plain, out)),
        (
            ConversionError,
            "1 tensors of .* are not those of",
            lambda plain, stored, out: convert(
                FAMILY, changed(plain, out.parent / "trained", "model.norm.weight"), out, base=BASE
            ),
        ),
        (
            ConversionError,
            "do not store the same tensors|are not those of",
            lambda plain, stored, out: convert(FAMILY, plain, out, base=DONOR),
        ),
        (
            ConversionError,
            "found dtype=bfloat16",
            lambda plain, stored, out: convert(FAMILY, plain, out, base=BASE, dtype="bfloat16"),
        ),
        (
            ConversionError,
            "does not hold transplant_matrix",
            lambda plain, stored, out: convert(FAMILY, plain, out, to="official"),
        ),
        (
            ConversionError,
            "has the layout 'rarezoo' already",
            lambda plain, stored, out: convert(FAMILY, stored, out, base=BASE),
        ),
        (
            ConversionError,
            "is not the base that",
            lambda plain, stored, out: convert(FAMILY, stored, out, to="official", base=DONOR),
        ),
    ],
)
def test_errors_say_what_is_wrong_and_leave_nothing(plain, stored, tmp_path, error, message, call):
    with pytest.raises(error, match=message):
        call(plain, stored[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_report_of_another_model_is_refused(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "plain")
    path = tmp_path / "plain" / "transplant_report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "tokens": report["tokens"][:-1]}))
    with pytest.raises(ConversionError, match="tells of 575 rows, the tables have 576"):
        convert(FAMILY, tmp_path / "plain", tmp_path / "out", base=BASE)
    path.write_text("{}")
    with pytest.raises(ConversionError, match="is no report of a transplantation"):
        convert(FAMILY, tmp_path / "plain", tmp_path / "out", base=BASE)
