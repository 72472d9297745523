"""ColBERT-XM's converter: every tensor of the official layout, both ways, whatever file it lies in."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from rarezoo import ColBERTXMConfig, ColBERTXMForRetrieval, ColBERTXMProcessor
from rarezoo.conversion import ConversionError, convert

TEXTS = ["the moon pulls the sea, twice a day!", "rain"]


@pytest.fixture(scope="module")
def official(colbert_fixtures):
    return colbert_fixtures / "checkpoint"


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    folder = tmp_path_factory.mktemp("colbert") / "converted"
    convert("colbert_xm", official, folder)
    return folder


@pytest.fixture
def copy(official, tmp_path):
    return shutil.copytree(official, tmp_path / "copy")


def test_converted_equals_the_official_folder(official, converted):
    model, report = AutoModel.from_pretrained(converted, output_loading_info=True)
    assert type(model) is ColBERTXMForRetrieval and not any(report.values()), report
    processor = AutoProcessor.from_pretrained(converted)
    direct, read = ColBERTXMForRetrieval.from_pretrained(official), ColBERTXMProcessor.from_pretrained(official)
    for language in ("en", "ja"):
        found = model.encode_documents(TEXTS, language=language)
        expected = direct.encode_documents(TEXTS, read, language=language)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert {**processor.to_dict(), "auto_map": None} == {**read.to_dict(), "auto_map": None}


def test_without_the_plugin(converted, run_without_rarezoo):
    """In a process that cannot import rarezoo, offline: configuration, model, tokenizer and processor."""
    said = run_without_rarezoo(
        f"""
        from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
        folder = {str(converted)!r}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, languages=["ja"])
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        assert len(AutoTokenizer.from_pretrained(folder, trust_remote_code=True)) == 165
        (vectors,) = model.encode_documents(["rain"], processor, language="ja_XX")
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        print(config.languages, model.config.languages, tuple(vectors.shape), model.score([vectors], [vectors]).shape)
        """
    )
    assert said.splitlines()[-1].startswith("['en_XX', 'fr_XX', 'sw_KE', 'ja_XX'] ['ja_XX'] (")


def test_there_and_back_again(official, converted, tmp_path):
    """Bit-identical tensors, the pooler too, which ColBERT never reads."""
    report = convert("colbert_xm", converted, tmp_path / "back", to="official")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", official))
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    assert report.folders[0].layout == "stanford" and not report.folders[0].dropped
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", official))
    for name in set(original) - {"_name_or_path", "transformers_version"}:
        assert config[name] == original[name], name
    metadata, original = (
        json.loads((folder / "artifact.metadata").read_text()) for folder in (tmp_path / "back", official)
    )
    assert metadata.pop("marker_mode") == "insert"
    assert all(original[name] == value for name, value in metadata.items())
    assert not list((tmp_path / "back").glob("*.py"))


def test_export_of_a_saved_model_has_no_pooler(converted, tmp_path):
    model = AutoModel.from_pretrained(converted)
    model.save_pretrained(tmp_path / "tuned")
    AutoProcessor.from_pretrained(converted).save_pretrained(tmp_path / "tuned")
    report = convert("colbert_xm", tmp_path / "tuned", tmp_path / "back", to="official")
    assert any("no pooler" in note for note in report.folders[0].notes)
    assert torch.equal(
        load_file(tmp_path / "back" / "model.safetensors")["linear.weight"], model.linear.weight.detach()
    )


@pytest.mark.parametrize("layout", ["stanford", "pylate"])
def test_pre_norm(official, tmp_path, layout):
    """X-MOD's variant with one more layer norm, behind the last layer."""
    config = ColBERTXMConfig.from_pretrained(official, pre_norm=True, adapter_layer_norm=True)
    model = ColBERTXMForRetrieval(config)
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name or "layer_norm" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "model")
    ColBERTXMProcessor.from_pretrained(official).save_pretrained(tmp_path / "model")
    convert("colbert_xm", tmp_path / "model", tmp_path / "official", to="official", layout=layout)
    convert("colbert_xm", tmp_path / "official", tmp_path / "back")
    found, expected = AutoModel.from_pretrained(tmp_path / "back").state_dict(), model.state_dict()
    assert "roberta.encoder.LayerNorm.weight" in expected and found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_bin_files_shards_and_old_names(official, copy, tmp_path):
    weights = load_file(copy / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in weights.items()}  # fmt: skip
    old["roberta.embeddings.position_ids"] = torch.arange(130)[None]
    (copy / "model.safetensors").unlink()
    torch.save(old, copy / "pytorch_model.bin")
    report = convert("colbert_xm", copy, tmp_path / "converted", max_shard_size="20KB")
    assert report.folders[0].files > 1
    assert report.folders[0].dropped == {"roberta.embeddings.position_ids": "computed from the configuration"}
    model = AutoModel.from_pretrained(tmp_path / "converted")
    direct = ColBERTXMForRetrieval.from_pretrained(official)
    for name, tensor in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    processor = ColBERTXMProcessor.from_pretrained(official)
    opened = ColBERTXMForRetrieval.from_pretrained(copy)
    assert torch.equal(opened.encode_documents("rain", processor)[0], direct.encode_documents("rain", processor)[0])


def test_languages_and_dtype(converted, official, tmp_path):
    report = convert("colbert_xm", official, tmp_path / "small", languages=["ja", "fr-CA"], dtype="bf16")
    assert report.folders[0].dtype == "bfloat16"
    assert len(report.folders[0].dropped) == 2 * 2 * 4
    model = AutoModel.from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert model.config.languages == ["fr_XX", "ja_XX"] and model.config.default_language == "ja_XX"
    whole = AutoModel.from_pretrained(converted)
    processor = AutoProcessor.from_pretrained(converted)
    found, expected = (network.encode_documents("rain", processor, language="ja") for network in (model, whole))
    assert 0 < (found[0] - expected[0]).abs().max() < 0.02


def test_the_marker_mode_survives_the_official_layout(official, tmp_path):
    convert("colbert_xm", official, tmp_path / "ours", marker_mode="replace")
    convert("colbert_xm", tmp_path / "ours", tmp_path / "official", to="official")
    convert("colbert_xm", tmp_path / "official", tmp_path / "again")
    assert AutoProcessor.from_pretrained(tmp_path / "again").marker_mode == "replace"
    assert ColBERTXMProcessor.from_pretrained(tmp_path / "official").marker_mode == "replace"


def test_marker_modes(official, tmp_path):
    convert("colbert_xm", official, tmp_path / "old", marker_mode="replace", processor_options={"max_query_length": 20})
    processor = AutoProcessor.from_pretrained(tmp_path / "old")
    assert (processor.marker_mode, processor.max_query_length) == ("replace", 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("linear.weight"), "Missing tensors: linear.weight"),
        (lambda weights: weights.update({"linear.bias": torch.zeros(16)}), "Unknown tensors: linear.bias"),
        (lambda weights: weights.update({"linear.weight": torch.zeros(8, 32)}), r"linear.weight \[8, 32\] instead of"),
        (lambda weights: weights["linear.weight"].fill_(float("nan")), "not finite"),
    ],
)
def test_damaged_weights(copy, tmp_path, change, message):
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=message):
        convert("colbert_xm", copy, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_mistakes(official, converted, copy, tmp_path):
    for arguments, message in (
        (dict(languages=["de"]), "no adapter for the language 'de'; expected one of en_XX, fr_XX, sw_KE, ja_XX"),
        (dict(marker_mode="append"), "marker_mode must be one of insert, replace"),
        (dict(processor_options={"lengths": 3}), "unknown processor_options lengths"),
        (dict(to="official"), "has the layout 'stanford' already"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert("colbert_xm", official, tmp_path / "out", **arguments)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ConversionError, match="describes a 'bert' model"):
        convert("colbert_xm", copy, tmp_path / "out")
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(ConversionError, match="165 tokens, but the weights have vocab_size 100"):
        convert("colbert_xm", copy, tmp_path / "out")
    with pytest.raises(FileExistsError):
        convert("colbert_xm", official, converted)
    assert not (tmp_path / "out").exists()
