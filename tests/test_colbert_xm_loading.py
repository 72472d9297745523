"""ColBERT-XM's files: what loading a part of them takes, what is read of them, and what saved ones do not tell."""

import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    XmodConfig,
    XmodModel,
    XmodPreTrainedModel,
)

from rarezoo import ColBERTXMConfig, ColBERTXMForRetrieval, ColBERTXMModel, ColBERTXMProcessor
from rarezoo.conversion import convert
from rarezoo.model_cards import checkpoint_files, write_card
from rarezoo.training import LateInteractionRecipe, train, train_language

LAYOUTS = ("ours", "saved", "pruned", "stanford", "pylate")


@pytest.fixture(scope="module")
def official(colbert_fixtures):
    return colbert_fixtures / "checkpoint"


def write_layouts(official, target):
    """The same checkpoint in every form in which it is written."""
    convert("colbert_xm", official, target / "ours")
    convert("colbert_xm", target / "ours", target / "stanford", to="official")
    convert("colbert_xm", target / "ours", target / "pylate", to="official", layout="pylate")
    for name, source, options in (("saved", official, {}), ("pruned", target / "ours", {"languages": ["fr", "ja"]})):
        ColBERTXMForRetrieval.from_pretrained(source, **options).save_pretrained(target / name)
        ColBERTXMProcessor.from_pretrained(source).save_pretrained(target / name)
    return target


@pytest.fixture(scope="module")
def layouts(official, tmp_path_factory):
    return write_layouts(official, tmp_path_factory.mktemp("layouts"))


# --- reading ----------------------------------------------------------------------------------------------------------

PEAK = """
import gc, sys
import torch
from transformers import AutoModel
from rarezoo import ColBERTXMForRetrieval
torch.set_num_threads(1)

def status(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024

gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak
before = status("VmRSS:")
model = AutoModel.from_pretrained(sys.argv[1], languages=["sw"])
assert abs(sum(float(parameter.detach().sum()) for parameter in model.parameters())) < float("inf")  # read them all
print(status("VmHWM:") - before, sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read as Linux tells them")
def test_one_language_takes_the_memory_of_its_own_weights(tmp_path):
    """At the peak, in a process of its own; the other 39 languages are more than half of the file."""
    languages = [
        "en_XX",
        "sw_KE",
        *(f"q{letter}_{region}" for letter in "abcdefghijklmnopqrs" for region in ("QA", "QB")),
    ]
    config = ColBERTXMConfig(
        languages=languages, vocab_size=40_000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=8,
    )  # fmt: skip
    model = ColBERTXMForRetrieval(config)
    model.save_pretrained(tmp_path)
    stored = sum(parameter.nbytes for parameter in model.parameters())
    del model
    finished = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    peak, kept = map(int, finished.stdout.split()[-2:])
    assert stored > 2 * kept
    assert peak <= 1.15 * kept, f"{peak / kept:.3f} times the {kept:,} bytes that are kept"


def test_the_official_folder_fits_to_the_last_tensor(official):
    """Nothing is made up and nothing left over but the pooler, which ColBERT never reads."""
    model, report = ColBERTXMForRetrieval.from_pretrained(official, output_loading_info=True)
    assert not any(report.values()), report
    stored = load_file(official / "model.safetensors")
    found = model.state_dict()
    assert set(stored) - set(found) == {"roberta.pooler.dense.weight", "roberta.pooler.dense.bias"}
    assert all(torch.equal(found[name], stored[name]) for name in found)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    """transformers would open it with random adapters and a random projection."""
    small = dict(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(BertConfig(**small)).save_pretrained(tmp_path)
    for opener in (ColBERTXMForRetrieval, ColBERTXMModel, ColBERTXMConfig):
        with pytest.raises(ValueError, match="model_type 'bert'; expected 'colbert_xm', or 'xmod': a checkpoint of"):
            opener.from_pretrained(tmp_path)


def test_a_language_model_has_no_projection(official, tmp_path, caplog):
    """It may be opened, for training, with a word on what is random."""
    model = ColBERTXMForRetrieval.from_pretrained(official)
    fields = {name: getattr(model.config, name) for name in XmodConfig.__annotations__}
    bare = XmodModel(XmodConfig(**fields))
    bare.load_state_dict(model.roberta.state_dict(), strict=False)
    bare.save_pretrained(tmp_path / "bare")
    model.save_pretrained(tmp_path / "whole")
    ColBERTXMModel.from_pretrained(tmp_path / "bare")
    ColBERTXMForRetrieval.from_pretrained(tmp_path / "whole")
    assert "projection is random" not in caplog.text
    opened = ColBERTXMForRetrieval.from_pretrained(tmp_path / "bare", dim=8)
    assert "no linear.weight: the projection is random, and until it is trained the vectors mean nothing" in caplog.text
    assert opened.linear.weight.shape == (8, 32)
    assert all(
        parameter.equal(model.roberta.get_parameter(name)) for name, parameter in opened.roberta.named_parameters()
    )


def test_a_projection_in_a_folder_of_its_own_is_not_passed_over(colbert_fixtures, layouts):
    for folder in (colbert_fixtures / "pylate_checkpoint", layouts / "pylate"):
        with pytest.raises(ValueError, match=r"projection in 1_Dense/, .* `convert colbert_xm \S+ DESTINATION`"):
            ColBERTXMForRetrieval.from_pretrained(folder)


class PlainColBERT(XmodPreTrainedModel):
    """What colbert-ai makes of a folder: transformers' own X-MOD under `roberta`, and `linear`."""

    _keys_to_ignore_on_load_unexpected = ()

    def __init__(self, config, dim):
        super().__init__(config)
        self.roberta = XmodModel(config)
        self.linear = nn.Linear(config.hidden_size, dim, bias=False)
        self.post_init()


@torch.no_grad()
def test_the_stanford_export_is_x_mod_and_a_projection(layouts, colbert_fixtures):
    """The reference's vectors, by classes that know nothing of ours, with the numbers that the export's files hold."""
    folder = layouts / "stanford"
    settings = json.loads((folder / "artifact.metadata").read_text())
    model, report = PlainColBERT.from_pretrained(folder, dim=settings["dim"], output_loading_info=True)
    assert not any(report.values()), report
    model.eval()
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(settings["query_token_id"]) == 3
    assert (settings["query_maxlen"], settings["doc_maxlen"]) == (16, 40)
    assert settings["attend_to_mask_tokens"] and settings["mask_punctuation"] and settings["similarity"] == "cosine"
    expected = load_file(colbert_fixtures / "expected.safetensors")
    for name, code in (("en", "en_XX"), ("ja", "ja_XX")):
        model.roberta.set_default_language(code)
        ids, attention = (expected[f"{name}.doc_{part}"].long() for part in ("input_ids", "attention_mask"))
        hidden = model.roberta(ids, attention_mask=attention).last_hidden_state
        found = nn.functional.normalize(model.linear(hidden) * expected[f"{name}.D_mask"][..., None].float(), dim=-1)
        torch.testing.assert_close(found, expected[f"{name}.D"], atol=1e-5, rtol=0)


def full_width(text):
    return "".join(chr(ord(character) + 0xFEE0) for character in text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_width_digits_in_every_layout(layouts, layout):
    """XLM-R's NFKC table stays in all the tokenizers that are written, and in those written from what was read."""
    tokenizer = AutoTokenizer.from_pretrained(layouts / layout)
    for text in ("3776", "3", "cat"):
        assert tokenizer(full_width(text))["input_ids"] == tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in tokenizer(full_width("cat"))["input_ids"], "known letters"
    if layout in ("ours", "saved", "pruned"):
        processor = AutoProcessor.from_pretrained(layouts / layout)
        for process in (processor.process_queries, processor.process_documents):
            assert process(full_width("3776"))["input_ids"].equal(process("3776")["input_ids"])


def test_a_pruned_checkpoint_is_as_small_as_its_languages(layouts, official):
    with safe_open(layouts / "pruned" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        size = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    assert {name.split(".adapter_modules.")[1].split(".")[0] for name in names if ".adapter_modules." in name} == {
        "fr_XX", "ja_XX",
    }  # fmt: skip
    config = json.loads((layouts / "pruned" / "config.json").read_text())
    assert (config["languages"], config["default_language"]) == (["fr_XX", "ja_XX"], "fr_XX")
    model = AutoModel.from_pretrained(layouts / "pruned")
    assert size == sum(parameter.numel() for parameter in model.parameters())
    whole = ColBERTXMForRetrieval.from_pretrained(official)
    processor = AutoProcessor.from_pretrained(layouts / "pruned")
    for language in ("ja", "fr"):
        found, wanted = (network.encode_queries("rain", processor, language=language) for network in (model, whole))
        assert torch.equal(found[0], wanted[0])


# --- writing ----------------------------------------------------------------------------------------------------------


def test_saving_writes_the_metadata_of_colbert_ai(layouts, official, tmp_path):
    """Whichever is saved first, as the export has it; our own files are what is read."""
    expected = json.loads((layouts / "stanford" / "artifact.metadata").read_text())
    assert {"query_token_id", "doc_maxlen", "dim", "similarity", "interaction"} <= expected.keys()
    model, processor = ColBERTXMForRetrieval.from_pretrained(official), ColBERTXMProcessor.from_pretrained(official)
    for name, parts in (("model_first", (model, processor)), ("processor_first", (processor, model))):
        for part in parts:
            part.save_pretrained(tmp_path / name)
    for folder in (layouts / "ours", layouts / "saved", tmp_path / "model_first", tmp_path / "processor_first"):
        assert json.loads((folder / "artifact.metadata").read_text()) == expected
        assert "artifact.metadata" in checkpoint_files(folder)
    folder = tmp_path / "model_first"
    (folder / "artifact.metadata").write_text(json.dumps({**expected, "query_maxlen": 9, "dim": 3, "root": PLACE}))
    opened, options = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert (opened.config.dim, options.max_query_length) == (16, 16)
    convert("colbert_xm", folder, tmp_path / "stanford", to="official")
    opened.save_pretrained(folder)
    assert json.loads((folder / "artifact.metadata").read_text()) == {**expected, "query_maxlen": 9}
    (folder / "artifact.metadata").write_text("{")
    options.save_pretrained(folder)
    opened.save_pretrained(folder)
    for found in (folder, tmp_path / "stanford"):
        assert json.loads((found / "artifact.metadata").read_text()) == expected


OWNER, PLACE = "aliciaspecimen", "/home/aliciaspecimen"


def told(folder, *words):
    """(file, word) where a file holds one of the words."""
    return [
        (path.relative_to(folder).as_posix(), word)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for word in words
        if word.encode() in path.read_bytes()
    ]


def test_saved_files_tell_nothing_of_the_machine(official, tmp_path):
    """Neither the places and names that official files leak nor those of the process that writes."""
    source = shutil.copytree(official, tmp_path / "source")
    for name, fields in (
        ("config.json", {"_name_or_path": f"{PLACE}/xmod"}),
        ("tokenizer_config.json", {"name_or_path": f"{PLACE}/xlm-r", "tokenizer_file": f"{PLACE}/tokenizer.json"}),
        (
            "artifact.metadata",
            {"checkpoint": f"{PLACE}/colbert", "root": PLACE, "triples": f"{PLACE}/triples.jsonl", "index_root": PLACE,
             "meta": {"hostname": f"{OWNER}-desktop", "user": OWNER, "cmd": f"{PLACE}/train.py"}},
        ),
    ):  # fmt: skip
        content = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**content, **fields}))
    written = tmp_path / "written"
    written.mkdir()
    write_layouts(source, written)
    rows = [{"query": "rain", "positive": "rain in the hills"}, {"query": "cat", "positive": "the cat sat"}]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = LateInteractionRecipe(
        model=str(written / "ours"), evaluation_data=str(held_out), batch_size=2, max_steps=2, save_steps=0,
        logging_steps=1,
    )  # fmt: skip
    train(recipe, written / "trained", rows=rows)
    (written / "trained" / "training_paths.json").unlink()  # the one file that is not for others
    model, processor = (auto.from_pretrained(written / "ours") for auto in (AutoModel, AutoProcessor))
    model.add_language("eu_ES")
    train_language(model, "eu", ["rain in the hills"] * 4, processor, steps=2, disable_tqdm=True)
    model.save_pretrained(written / "with_eu")
    processor.save_pretrained(written / "with_eu")
    for name in ("ours", "saved", "pruned", "trained", "with_eu"):
        write_card(written / name)
    names = {path.name for path in written.rglob("*")}
    assert {"config.json", "artifact.metadata", "README.md", "training_log.json", "tokenizer_config.json"} <= names
    words = [OWNER, str(tmp_path), str(Path.home()) + "/", str(Path(__file__).parents[1])]
    words += (
        [socket.gethostname()] if len(socket.gethostname()) > 7 else []
    )  # shorter ones stand in any file of weights
    assert told(source, OWNER) and not told(written, *words)
