"""ColBERT-XM in the layouts of other libraries: PyLate's, sentence-transformers' own, colbert-ai's `.dnn` files and
folders that lack a file; read and written, with the numbers of the reference implementations."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from rarezoo import ColBERTXMForRetrieval, ColBERTXMProcessor
from rarezoo.conversion import ConversionError, convert

from .commands import call, refused

OWN_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


@pytest.fixture(scope="module")
def texts(colbert_fixtures):
    return json.loads((colbert_fixtures / "expected.json").read_text())["data"]


@pytest.fixture(scope="module")
def expected(colbert_fixtures):
    return load_file(colbert_fixtures / "expected.safetensors")


@pytest.fixture(scope="module")
def converted(colbert_fixtures, tmp_path_factory):
    """From PyLate's folder."""
    folder = tmp_path_factory.mktemp("pylate") / "converted"
    report = convert("colbert_xm", colbert_fixtures / "pylate_checkpoint", folder)
    assert (report.source_layout, report.folders[0].tensors, report.folders[0].dropped) == ("pylate", 72, {})
    return folder


@pytest.fixture(scope="module")
def exported(converted, tmp_path_factory):
    """To PyLate's layout again."""
    folder = tmp_path_factory.mktemp("pylate") / "exported"
    report = convert("colbert_xm", converted, folder, to="official", layout="pylate")
    assert (report.to, report.folders[0].layout, report.folders[0].files) == ("official", "pylate", 2)
    return folder


@pytest.fixture
def official(colbert_fixtures, tmp_path):
    return shutil.copytree(colbert_fixtures / "checkpoint", tmp_path / "official")


@pytest.fixture
def pylate(colbert_fixtures, tmp_path):
    return shutil.copytree(colbert_fixtures / "pylate_checkpoint", tmp_path / "pylate")


def change(file, **fields):
    """Replace fields of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def check_vectors(folder, texts, expected, prefix=""):
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    for language, data in texts.items():
        queries = model.encode_queries(data["queries"], processor, language=data["adapter"])
        documents = model.encode_documents(data["documents"], processor, language=data["adapter"])
        name = f"{language}.{prefix}"
        kept = expected[f"{name}D"][expected[f"{name}D_mask"].bool()]
        torch.testing.assert_close(torch.stack(queries), expected[f"{name}Q"], atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.cat(documents), kept, atol=1e-5, rtol=0)


def same_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# --- PyLate -----------------------------------------------------------------------------------------------------------


def test_pylate_folder_gives_the_reference_s_vectors(converted, texts, expected):
    check_vectors(converted, texts, expected)
    processor = AutoProcessor.from_pretrained(converted)
    assert processor.tokenizer.pad_token == "<pad>"
    assert (processor.query_marker, processor.marker_mode, processor.skiplist_tokens) == ("<unk>", "insert", None)


def test_pylate_and_back_again(colbert_fixtures, exported):
    """Bit-identical tensors; PyLate's own names of the layer norms become those that every version reads."""
    source = colbert_fixtures / "pylate_checkpoint"
    wanted = load_file(source / "model.safetensors")
    for old, new in OWN_NAMES:
        wanted = {name.replace(old, new): tensor for name, tensor in wanted.items()}
    same_tensors(load_file(exported / "model.safetensors"), wanted)
    same_tensors(*(load_file(folder / "1_Dense" / "model.safetensors") for folder in (exported, source)))
    for name in ("modules.json", "1_Dense/config.json"):
        assert json.loads((exported / name).read_text()) == json.loads((source / name).read_text())
    found, wanted = (
        json.loads((folder / "config_sentence_transformers.json").read_text()) for folder in (exported, source)
    )
    assert all(found[name] == value for name, value in wanted.items() if name != "__version__")
    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["architectures"], "auto_map" in config) == ("xmod", ["XmodModel"], False)
    assert not list(exported.rglob("*.py"))


def test_official_folder_to_pylate_equals_pylate_s_own(official, exported, tmp_path):
    convert("colbert_xm", official, tmp_path / "ours")
    convert("colbert_xm", tmp_path / "ours", tmp_path / "out", to="official", layout="pylate")
    for name in ("model.safetensors", "1_Dense/model.safetensors"):
        same_tensors(load_file(tmp_path / "out" / name), load_file(exported / name))
    for name in ("config_sentence_transformers.json", "config.json", "sentence_bert_config.json"):
        assert (tmp_path / "out" / name).read_text() == (exported / name).read_text()


def test_pylate_itself_opens_the_export(exported, texts, expected):
    models = pytest.importorskip("pylate.models", exc_type=ImportError)
    model = models.ColBERT(str(exported), device="cpu")
    for language, data in texts.items():
        model[0].auto_model.set_default_language(data["adapter"])
        queries = model.encode(data["queries"], is_query=True, convert_to_tensor=True)
        documents = model.encode(data["documents"], is_query=False, convert_to_tensor=True)
        torch.testing.assert_close(torch.stack(list(queries)), expected[f"{language}.Q"], atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.cat(list(documents)), expected[f"{language}.doc_flat"], atol=1e-5, rtol=0)


def test_a_skip_list_of_its_own(pylate, exported, tmp_path, texts):
    """Kept as tokens, and given back to PyLate; colbert-ai cannot have it."""
    change(pylate / "config_sentence_transformers.json", skiplist_words=["▁", "."])
    convert("colbert_xm", pylate, tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    ids = processor.tokenizer.convert_tokens_to_ids(["▁", "."])
    assert processor.skiplist_ids == sorted(ids)
    inputs = processor.process_documents(texts["en"]["documents"])
    kept = (inputs["input_ids"] != 1) & ~torch.isin(inputs["input_ids"], torch.tensor(ids))
    assert torch.equal(inputs["keep_mask"].bool(), kept)
    convert("colbert_xm", tmp_path / "ours", tmp_path / "again", to="official", layout="pylate")
    written = json.loads((tmp_path / "again" / "config_sentence_transformers.json").read_text())
    assert sorted(written["skiplist_words"]) == sorted(["▁", "."])
    with pytest.raises(ConversionError, match="colbert-ai has no skip list of its own"):
        convert("colbert_xm", tmp_path / "ours", tmp_path / "stanford", to="official")
    assert not (tmp_path / "stanford").exists()


def test_no_skip_list_and_options_that_replace_it(pylate, tmp_path):
    change(pylate / "config_sentence_transformers.json", skiplist_words=[])
    convert("colbert_xm", pylate, tmp_path / "none")
    assert ColBERTXMProcessor.from_pretrained(tmp_path / "none").mask_punctuation is False
    convert(
        "colbert_xm", pylate, tmp_path / "all", processor_options={"mask_punctuation": True, "max_query_length": 20}
    )
    processor = ColBERTXMProcessor.from_pretrained(tmp_path / "all")
    assert (len(processor.skiplist_ids), processor.max_query_length) == (6, 20)


def test_notes_on_what_pylate_does_otherwise(official, tmp_path):
    convert("colbert_xm", official, tmp_path / "ours", marker_mode="replace")
    report = convert(
        "colbert_xm", tmp_path / "ours", tmp_path / "out", to="official", layout="pylate", default_language="fr"
    )
    assert any("PyLate inserts markers" in note for note in report.folders[0].notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["default_language"] == "fr_XX"


def test_languages_dtype_and_shards(pylate, tmp_path):
    report = convert("colbert_xm", pylate, tmp_path / "ours", languages=["ja"], dtype="bfloat16")
    assert len(report.folders[0].dropped) == 3 * 2 * 4
    convert("colbert_xm", tmp_path / "ours", tmp_path / "out", to="official", layout="pylate", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    convert("colbert_xm", tmp_path / "out", tmp_path / "again")
    first, second = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("ours", "again"))
    same_tensors(second, first)
    assert second["linear.weight"].dtype == torch.bfloat16


def test_a_saved_model_without_pooler(converted, tmp_path):
    AutoModel.from_pretrained(converted).save_pretrained(tmp_path / "tuned")
    AutoProcessor.from_pretrained(converted).save_pretrained(tmp_path / "tuned")
    report = convert("colbert_xm", tmp_path / "tuned", tmp_path / "out", to="official", layout="pylate")
    assert any("no pooler" in note for note in report.folders[0].notes) and report.folders[0].tensors == 70


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"model_type": "bert"}, "describes a 'bert' model"),
        ("config.json", {"vocab_size": 100}, "165 tokens, but the weights have vocab_size 100"),
        ("config_sentence_transformers.json", {"model_type": "SentenceTransformer"}, "expected rarezoo's layout"),
        ("config_sentence_transformers.json", {"query_prefix": "[Q] "}, r"query marker '\[Q\] ' is no token"),
        ("config_sentence_transformers.json", {"query_prefix": ""}, "query marker '' is no token"),
        ("config_sentence_transformers.json", {"do_query_expansion": False}, "do_query_expansion False"),
        ("config_sentence_transformers.json", {"prompts": {"query": "find: "}}, r"found prompts \['find: '\]"),
        ("config_sentence_transformers.json", {"query_length": 2}, "max_query_length must be at least 4"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case; expected false"),
        ("1_Dense/config.json", {"bias": True}, "found bias True"),
        ("1_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Tanh"}, "activation Tanh"),
        ("1_Dense/config.json", {"out_features": 8}, r"linear.weight \[16, 32\] instead of \[8, 32\]"),
    ],
)
def test_what_cannot_be_read(pylate, tmp_path, file, fields, message):
    change(pylate / file, **fields)
    with pytest.raises(ConversionError, match=message):
        convert("colbert_xm", pylate, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_projection_and_other_modules(pylate, tmp_path):
    modules = json.loads((pylate / "modules.json").read_text())
    (pylate / "modules.json").write_text(json.dumps(modules[:1]))
    with pytest.raises(ConversionError, match="lists Transformer; expected Transformer, Dense"):
        convert("colbert_xm", pylate, tmp_path / "out")
    (pylate / "modules.json").write_text(json.dumps(modules))
    (pylate / "1_Dense" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*1_Dense"):
        convert("colbert_xm", pylate, tmp_path / "out")
    shutil.rmtree(pylate / "1_Dense")
    with pytest.raises(ConversionError, match=r"has no 1_Dense/config.json"):
        convert("colbert_xm", pylate, tmp_path / "out")
    with pytest.raises(ConversionError, match="layout must be one of stanford, pylate; found 'ragatouille'"):
        convert("colbert_xm", pylate, tmp_path / "out", to="official", layout="ragatouille")
    assert not (tmp_path / "out").exists()


# --- colbert-ai's folders that lack something ------------------------------------------------------------------------


def test_without_metadata(official, tmp_path):
    """colbert-ai's defaults, but the components of a vector as the projection has them."""
    (official / "artifact.metadata").unlink()
    report = convert("colbert_xm", official, tmp_path / "ours")
    assert report.source_layout == "stanford" and "no artifact.metadata" in report.folders[0].notes[0]
    model = AutoModel.from_pretrained(tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert model.config.dim == 16
    assert (processor.max_query_length, processor.max_document_length) == (32, 220)
    assert not processor.attend_to_mask_tokens and processor.mask_punctuation


def test_without_architectures(official, tmp_path, texts, expected):
    change(official / "config.json", architectures=None)
    assert convert("colbert_xm", official, tmp_path / "ours").source_layout == "stanford"
    check_vectors(tmp_path / "ours", texts, expected)
    model, report = ColBERTXMForRetrieval.from_pretrained(official, output_loading_info=True)
    assert model.config.dim == 16 and not report["missing_keys"]
    assert ColBERTXMProcessor.from_pretrained(official).max_query_length == 16
    (official / "artifact.metadata").unlink()
    with pytest.raises(ConversionError, match="describes a 'xmod' model with architectures None; expected"):
        convert("colbert_xm", official, tmp_path / "out")
    change(official / "config.json", architectures=["XmodModel"])
    with pytest.raises(ConversionError, match="describes a 'xmod' model"):
        convert("colbert_xm", official, tmp_path / "out")


# --- .dnn files -------------------------------------------------------------------------------------------------------

ARGUMENTS = {"query_maxlen": 16, "doc_maxlen": 40, "dim": 16, "similarity": "cosine", "attend_to_mask_tokens": True,
             "mask_punctuation": True, "checkpoint": None, "lr": 3e-6}  # fmt: skip


def write_dnn(folder, renamed, name="colbert-100.dnn", **content):
    """Replace a folder's weights by a file as colbert-ai's `save_checkpoint` wrote it."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "artifact.metadata").unlink()
    change(folder / "config.json", architectures=["XmodForMaskedLM"])
    state = {renamed(key): tensor for key, tensor in weights.items()}
    state[renamed("roberta.embeddings.position_ids")] = torch.arange(130)[None]
    torch.save({"epoch": 0, "batch": 100, "model_state_dict": state, "optimizer_state_dict": {"state": {}}, **content},
               folder / name)  # fmt: skip
    return folder / name


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: name,
        lambda name: f"model.{name}",
        lambda name: f"module.model.{name}",
        lambda name: f"model.{name.replace('roberta.', 'bert.', 1)}",
        lambda name: name.replace("roberta.", "bert.", 1),
    ],
)
def test_dnn_file_as_the_folder_s_weights(official, tmp_path, texts, expected, renamed):
    write_dnn(official, renamed, arguments=ARGUMENTS)
    report = convert("colbert_xm", official, tmp_path / "ours", marker_mode="insert")
    assert report.source_layout == "dnn" and list(report.folders[0].dropped) == ["roberta.embeddings.position_ids"]
    assert report.folders[0].tensors == 72 and not report.folders[0].notes
    check_vectors(tmp_path / "ours", texts, expected)


def test_dnn_file_with_a_base(official, colbert_fixtures, tmp_path, texts, expected):
    """Files of that time were trained with overwritten markers."""
    file = write_dnn(official, lambda name: f"model.{name}", arguments=ARGUMENTS)
    alone = shutil.move(file, tmp_path / "alone.dnn")
    with pytest.raises(ConversionError, match=r"holds weights only; expected config.json and tokenizer"):
        convert("colbert_xm", alone, tmp_path / "ours")
    call("convert", "colbert_xm", alone, tmp_path / "ours", "--base", official)
    assert AutoProcessor.from_pretrained(tmp_path / "ours").marker_mode == "replace"
    check_vectors(tmp_path / "ours", texts, expected, prefix="legacy.")
    with pytest.raises(ConversionError, match=r"base= names configuration and tokenizer of a .dnn file"):
        convert("colbert_xm", colbert_fixtures / "checkpoint", tmp_path / "out", base=official)


def test_dnn_file_without_arguments(official, tmp_path):
    write_dnn(official, lambda name: f"model.{name}")
    report = convert("colbert_xm", official, tmp_path / "ours")
    assert "no arguments" in report.folders[0].notes[0]
    assert AutoModel.from_pretrained(tmp_path / "ours").config.dim == 16
    assert AutoProcessor.from_pretrained(tmp_path / "ours").max_query_length == 32


def test_dnn_files_that_cannot_be_read(official, tmp_path):
    file = write_dnn(official, lambda name: f"model.{name}", arguments=ARGUMENTS)
    shutil.copy(file, official / "colbert-200.dnn")
    with pytest.raises(ConversionError, match=r"several .dnn files \(colbert-100.dnn, colbert-200.dnn\)"):
        convert("colbert_xm", official, tmp_path / "out")
    whole = file.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "is damaged, truncated or not a weight file"),
        (b"no pickle at all", "is damaged, truncated or not a weight file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConversionError, match=message):
            convert("colbert_xm", file, tmp_path / "out")
    for content, message in (
        ([1], "holds a list; expected a dict"),
        ({"model_state_dict": [1]}, "model_state_dict is a list"),
        ({"model_state_dict": {"linear.weight": 1}}, "'linear.weight' is a int; expected only tensors"),
        ({"model_state_dict": {}}, "Missing tensors"),
    ):
        torch.save(content, file)
        with pytest.raises(ConversionError, match=message):
            convert("colbert_xm", file, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_pickle_never_runs_code(official, tmp_path):
    file = write_dnn(official, lambda name: f"model.{name}", arguments=_Code(tmp_path / "ran"))
    with pytest.raises(ConversionError, match="damaged, truncated or not a weight file"):
        convert("colbert_xm", file, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(colbert_fixtures, converted, tmp_path):
    shown = call("convert", "colbert_xm", colbert_fixtures / "pylate_checkpoint", tmp_path / "ours").stdout
    assert "rarezoo layout, 72 tensors, 36,768 parameters in float32" in shown
    shown = call(
        "convert", "colbert_xm", tmp_path / "ours", tmp_path / "out", "--to", "official", "--option", "layout=pylate",
        "--option", "default_language=sw",
    ).stdout  # fmt: skip
    assert "pylate layout, 72 tensors" in shown
    problem = refused("convert", "colbert_xm", tmp_path / "out", tmp_path / "new", "--to", "official")
    assert "has the layout 'pylate' already" in problem
    problem = refused("convert", "colbert_xm", converted, tmp_path / "new", "--to", "official", "--option", "layout=hf")
    assert "layout must be one of stanford, pylate; found 'hf'" in problem
    assert not (tmp_path / "new").exists()


def test_command_says_in_one_line_what_is_wrong(pylate, official, tmp_path):
    new = tmp_path / "new"
    write_dnn(official, lambda name: f"model.{name}", arguments=ARGUMENTS).write_bytes(b"no pickle at all")
    assert "colbert-100.dnn is damaged, truncated or" in refused("convert", "colbert_xm", official, new)
    change(pylate / "config.json", vocab_size=100)
    assert "they do not belong together" in refused("convert", "colbert_xm", pylate, new)
    shutil.rmtree(pylate / "1_Dense")
    assert "has no 1_Dense/config.json" in refused("convert", "colbert_xm", pylate, new)
    change(pylate / "config.json", model_type="bert")
    assert "describes a 'bert' model" in refused("convert", "colbert_xm", pylate, new)
    assert "is a file; expected the folder" in refused("convert", "colbert_xm", pylate / "model.safetensors", new)
    assert not list(tmp_path.glob("*new*"))


def test_damaged_weights_of_one_part(pylate, tmp_path):
    weights = load_file(pylate / "1_Dense" / "model.safetensors")
    save_file(
        {"linear.weight": weights["linear.weight"], "linear.bias": torch.zeros(16)},
        pylate / "1_Dense" / "model.safetensors",
    )
    with pytest.raises(ConversionError, match=r"Unknown tensors: linear.bias"):
        convert("colbert_xm", pylate, tmp_path / "out")
    assert not (tmp_path / "out").exists()
