"""Checkpoints rewritten on disk: the tensors of the way through memory, nothing else touched, nothing half done."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

from rarezoo import MistralSpladeConfig, MistralSpladeForMaskedLM
from rarezoo.tokenizer_transplant.checkpoint_streaming import (
    PLAIN_DECODERS,
    StoredCheckpoint,
    rewrite_checkpoint,
    transplant_checkpoint,
)
from rarezoo.tokenizer_transplant.table_surgery import (
    TokenIds,
    base_tables,
    skeleton,
    transplant_tables,
    updated_config,
    vocabulary_tensors,
)
from rarezoo.tokenizer_transplant.transplant_matrix import TransplantMatrix
from rarezoo.tokenizer_transplant.transplanting import transplant_tokenizer

from .cases import FIXTURES
from .test_tokenizer_transplant_models import BASE_ROWS, MODELS, ROLES, build, random_matrix

BASE, DONOR = (FIXTURES / "tokenizer_transplant" / name for name in ("base_model", "donor_model"))
NO_TOKENIZER = SimpleNamespace(save_pretrained=lambda folder: None)


def ids_of(matrix, **roles):
    return TokenIds.of(matrix, SimpleNamespace(**{f"{role}_token_id": id_ for role, id_ in (ROLES | roles).items()}))


def tensors_in(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(left, right):
    left, right = tensors_in(left), tensors_in(right)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def settings_in(folder, name):
    """A JSON file without what only says who wrote it."""
    content = json.loads((folder / name).read_text())
    return {key: value for key, value in content.items() if key not in ("transformers_version", "_from_model_config")}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sharded", [False, True])
def test_equals_the_way_through_memory(name, sharded, tmp_path):
    """Of every kind of model, in one file and in many: tensors, configuration and generation settings."""
    model = build(name)
    model.save_pretrained(tmp_path / "base", max_shard_size="2KB" if sharded else "1GB")
    matrix, *_ = random_matrix(head=True)
    ids = ids_of(matrix)
    rewrite_checkpoint(StoredCheckpoint.open(tmp_path / "base"), tmp_path / "out", matrix, ids, NO_TOKENIZER)
    transplant_tables(model, matrix, ids).save_pretrained(tmp_path / "expected")
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")
    assert settings_in(tmp_path / "out", "config.json") == settings_in(tmp_path / "expected", "config.json")
    assert (tmp_path / "out/generation_config.json").exists() == (tmp_path / "expected/generation_config.json").exists()
    if (tmp_path / "out/generation_config.json").exists():
        found, expected = (settings_in(tmp_path / folder, "generation_config.json") for folder in ("out", "expected"))
        assert found == expected
    if sharded:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        tensors = tensors_in(tmp_path / "out")
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        untouched = 0
        for file in (tmp_path / "base").glob("*.safetensors"):
            untouched += file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
        assert untouched >= 2
    _, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize("method", ["retok", "mean"])
def test_a_folder_with_its_tokenizer(method, tmp_path):
    """`transplant_checkpoint` and `transplant_tokenizer` give one folder; provenance and report survive."""
    report = transplant_checkpoint(BASE, DONOR, tmp_path / "out", method, pad_to_multiple_of=64)
    result = transplant_tokenizer(BASE, DONOR, method, pad_to_multiple_of=64)
    result.save_pretrained(tmp_path / "expected")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "expected").iterdir()
    }
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert settings_in(tmp_path / "out", name) == settings_in(tmp_path / "expected", name)
    assert report.provenance == result.report.provenance
    found, expected = (tmp_path / folder / "transplant_report.json" for folder in ("out", "expected"))
    assert found.read_text() == expected.read_text()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(DONOR)
    assert model.config.vocab_size == 576 and model.generation_config.suppress_tokens == [*range(536, 576)]
    assert model.config.bos_token_id == tokenizer.bos_token_id and model.config.eos_token_id == tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "again")
    kept = AutoConfig.from_pretrained(tmp_path / "again").tokenizer_transplant
    assert kept == report.provenance and kept["method"] == method and sum(kept["counts"].values()) == 576
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_tables_are_those_of_the_model(tmp_path):
    for name in ("llama", "llama_tied", "bert", "bert_untied", "t5"):
        model = build(name)
        model.save_pretrained(tmp_path / name)
        for found, expected in zip(StoredCheckpoint.open(tmp_path / name).tables(), base_tables(model)):
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)


def smallest(name, **fields):
    """A configuration of the class, of one layer where it allows that."""
    config_class = getattr(transformers, name).config_class
    config = config_class(vocab_size=BASE_ROWS, num_hidden_layers=1, pad_token_id=None, **fields)
    config.architectures = [name]
    return config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", sorted(PLAIN_DECODERS))
def test_plain_decoders_are_what_their_code_says(name, tied, tmp_path):
    """Tensors, ties and positions of the skeleton, which decides about all other classes."""
    model_class, config = getattr(transformers, name), smallest(name, tie_word_embeddings=tied)
    found = vocabulary_tensors(model_class, config)
    tables = {tensor: torch.zeros(BASE_ROWS, 2) for tensor in found if found[tensor].tied_to is None}
    config.save_pretrained(tmp_path)
    save_file(tables, tmp_path / "model.safetensors")
    checkpoint = StoredCheckpoint.open(tmp_path)
    assert checkpoint.plain_decoder and checkpoint.model_class is model_class
    assert checkpoint.vocabulary == {tensor: found[tensor] for tensor in tables}
    assert checkpoint.names == {tensor: tensor for tensor in tables}
    assert model_class.can_generate() and config.get_text_config() is config
    matrix, *_ = random_matrix()
    assert updated_config(model_class, config, matrix, ids_of(matrix, pad=4))[1] == {}


def test_what_a_plain_decoder_does_not_explain(tmp_path):
    """Where another tensor could belong to the vocabulary, the skeleton decides, and other classes are read by it."""
    config = smallest("LlamaForCausalLM", hidden_size=8, intermediate_size=BASE_ROWS, num_attention_heads=2)
    state = {
        name: torch.zeros(t.shape) for name, t in skeleton(transformers.LlamaForCausalLM, config).state_dict().items()
    }
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = StoredCheckpoint.open(tmp_path)
    assert not checkpoint.plain_decoder and set(checkpoint.vocabulary) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    save_file({**state, "more.weight": torch.zeros(BASE_ROWS, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"more.weight in .* is no part of LlamaForCausalLM"):
        StoredCheckpoint.open(tmp_path)


def test_no_model_code_is_imported(tmp_path):
    """Of a plain decoder the code of transformers' models is not needed; its import takes longer than all else."""
    script = (
        "import sys; from rarezoo.tokenizer_transplant import transplant_checkpoint; base, donor, out = sys.argv[1:]; "
        "transplant_checkpoint(base, donor, out, 'omp', donor=donor, k=3); "
        "assert 'transformers.modeling_utils' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, BASE, DONOR, tmp_path / "out"], check=True)


def test_names_without_the_prefix(tmp_path):
    """As in files of the first GPT-2 models; they keep their names."""
    model = build("gpt2")
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file)
    matrix, *_ = random_matrix()
    rewrite_checkpoint(StoredCheckpoint.open(tmp_path / "base"), tmp_path / "out", matrix, ids_of(matrix), NO_TOKENIZER)
    transplant_tables(model, matrix, ids_of(matrix))
    found = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(found["wte.weight"], model.transformer.wte.weight) and "transformer.wte.weight" not in found
    assert torch.equal(type(model).from_pretrained(tmp_path / "out").lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("equal", [True, False])
def test_tied_by_configuration_but_stored_twice(equal, tmp_path):
    """Equal tensors are tied, different ones are not, as when the model is loaded."""
    build("llama_tied").save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": table.clone() if equal else table + 1}, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    matrix, *_ = random_matrix(head=True)
    rewrite_checkpoint(StoredCheckpoint.open(tmp_path / "base"), tmp_path / "out", matrix, ids_of(matrix), NO_TOKENIZER)
    transplant_tables(model, matrix, ids_of(matrix))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == equal


def test_positions_move_with_the_padding_id(tmp_path):
    base = build("xlm_roberta")
    base.save_pretrained(tmp_path / "base")
    order = torch.arange(BASE_ROWS).roll(3)
    matrix = TransplantMatrix.copies(order, BASE_ROWS)
    ids = ids_of(matrix, pad=4)
    rewrite_checkpoint(StoredCheckpoint.open(tmp_path / "base"), tmp_path / "out", matrix, ids, NO_TOKENIZER)
    model = type(base).from_pretrained(tmp_path / "out").eval()
    text = torch.randint(5, BASE_ROWS, (1, 38))
    with torch.no_grad():
        assert torch.equal(model(order.argsort()[text]).logits, base(text).logits[..., order])


def test_bfloat16_and_other_files(tmp_path):
    """The dtype stays, files that describe neither weights nor the old vocabulary go along, the others do not."""
    shutil.copytree(BASE, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base/1_Pooling").mkdir()
    kept = ("LICENSE", "preprocessor_config.json", "1_Pooling/config.json")
    left = ("README.md", "merges.txt", "tokenizer.model", "pytorch_model.bin", ".gitattributes", "chat_template.json")
    for name in (*kept, *left):
        (tmp_path / "base" / name).write_text("{}")
    transplant_checkpoint(tmp_path / "base", DONOR, tmp_path / "deep/er/out", "retok")
    result = transplant_tokenizer(model, DONOR, "retok", base_tokenizer=BASE)
    tensors = tensors_in(tmp_path / "deep/er/out")
    for name, tensor in result.model.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensors[name], tensor)
    assert all((tmp_path / "deep/er/out" / name).exists() for name in kept)
    assert not any((tmp_path / "deep/er/out" / name).exists() for name in left)


def test_nothing_unfinished_is_left(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    tokenizer = AutoTokenizer.from_pretrained(DONOR)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        transplant_checkpoint(BASE, tokenizer, tmp_path / "full", "mean")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    for name in ("new", "empty"):
        with pytest.raises(OSError, match="no space left"):
            transplant_checkpoint(BASE, tokenizer, tmp_path / name, "mean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert not any((tmp_path / "empty").iterdir())
    monkeypatch.undo()
    transplant_checkpoint(BASE, tokenizer, tmp_path / "empty", "mean")
    assert AutoConfig.from_pretrained(tmp_path / "empty").vocab_size == 536


def test_faulty_folders_are_refused(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "whole", max_shard_size="2KB")

    def copy(name):
        return shutil.copytree(tmp_path / "whole", tmp_path / name)

    folder = copy("missing")
    next(folder.glob("model-00001-*")).unlink()
    with pytest.raises(FileNotFoundError, match="is missing, but the index in its folder names it"):
        StoredCheckpoint.open(folder)
    folder = copy("cut")
    shard = next(folder.glob("model-00001-*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged or truncated"):
        StoredCheckpoint.open(folder)
    folder = copy("renamed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    with pytest.raises(ValueError, match=r"lm_head.weight in .* is no part of LlamaModel"):
        StoredCheckpoint.open(folder)
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match=r"the class NoSuchModel of .* is not known"):
        StoredCheckpoint.open(folder)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    with pytest.raises(ValueError, match="has 41 rows; its vocab_size is 50"):
        StoredCheckpoint.open(folder)
    model.model.save_pretrained(tmp_path / "headless")
    config = json.loads((tmp_path / "headless/config.json").read_text())
    (tmp_path / "headless/config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"holds no lm_head.weight, which LlamaForCausalLM needs"):
        StoredCheckpoint.open(tmp_path / "headless")
    peft.get_peft_model(model, peft.LoraConfig(modules_to_save=["lm_head"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="it holds an adapter: merge it"):
        StoredCheckpoint.open(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
def test_quantized_checkpoints(tmp_path):
    """Full-precision tables of a quantized checkpoint are replaced; a quantized head is refused."""
    pytest.importorskip("bitsandbytes")
    base = build("llama", hidden_size=64, intermediate_size=64, head_dim=32)
    base.save_pretrained(tmp_path / "base")
    matrix, *_ = random_matrix()
    for name, settings in (("usual", {}), ("head", {"llm_int8_skip_modules": ["nothing"]})):
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, **settings)
        quantized = type(base).from_pretrained(tmp_path / "base", quantization_config=settings)
        quantized.save_pretrained(tmp_path / name)
    rewrite_checkpoint(
        StoredCheckpoint.open(tmp_path / "usual"), tmp_path / "out", matrix, ids_of(matrix), NO_TOKENIZER
    )
    quantized = type(base).from_pretrained(tmp_path / "out")
    transplant_tables(base, matrix, ids_of(matrix))
    assert quantized.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert torch.equal(quantized.lm_head.weight.float(), base.lm_head.weight.to(quantized.lm_head.weight.dtype).float())
    with pytest.raises(ValueError, match=r"lm_head.weight in .* is quantized \(torch.uint8\)"):
        StoredCheckpoint.open(tmp_path / "head")


def test_a_class_of_an_installed_plugin(tmp_path):
    torch.manual_seed(0)
    config = MistralSpladeConfig(
        vocab_size=576, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = MistralSpladeForMaskedLM(config)
    model.save_pretrained(tmp_path / "base")
    transplant_checkpoint(tmp_path / "base", DONOR, tmp_path / "out", "mean", base_tokenizer=BASE)
    result = transplant_tokenizer(model, DONOR, "mean", base_tokenizer=BASE)
    found = tensors_in(tmp_path / "out")
    assert found["lm_head.weight"].shape == (536, 16)
    assert all(torch.equal(tensor, found[name]) for name, tensor in result.model.state_dict().items())
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "out")) is MistralSpladeForMaskedLM


def test_generation_settings_of_the_folder(tmp_path):
    """A list of ends, and settings that know nothing of tokens, are kept."""
    shutil.copytree(BASE, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    settings = GenerationConfig(eos_token_id=[tokenizer.eos_token_id], temperature=0.7, do_sample=True)
    settings.save_pretrained(tmp_path / "base")
    transplant_checkpoint(tmp_path / "base", DONOR, tmp_path / "out", "mean")
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert found.temperature == 0.7 and found.do_sample and found.suppress_tokens is None
    assert found.eos_token_id == AutoTokenizer.from_pretrained(DONOR).eos_token_id
