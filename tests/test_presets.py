"""Presets: parameter counts, by hand from the shapes and from the model on the meta device; the published values."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import rarezoo
from rarezoo.configs import list_presets, load_preset, read_preset

FIXTURES = Path(__file__).parent / "fixtures" / "mistral_splade"
PUBLISHED_PARAMETERS = {
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
}


def parameters_from_shapes(config) -> int:
    """Every weight of a Mistral with an untied head, counted from its shapes."""
    query_width = config["num_attention_heads"] * config["head_dim"]
    key_width = config["num_key_value_heads"] * config["head_dim"]
    attention = (query_width + 2 * key_width) * config["hidden_size"] + config["hidden_size"] * query_width
    feed_forward = 3 * config["hidden_size"] * config["intermediate_size"]
    norms = 2 * config["hidden_size"]
    embedding_and_head = 2 * config["vocab_size"] * config["hidden_size"]
    layers = config["num_hidden_layers"] * (attention + feed_forward + norms)
    return embedding_and_head + layers + config["hidden_size"]


def test_the_presets_of_the_family():
    assert list_presets("mistral_splade") == [
        "mistral-1b", "mistral-7b-v0.1", "mistral-7b-v0.2", "mistral-7b-v0.3", "tiny",
    ]  # fmt: skip


@pytest.mark.parametrize("name", list_presets("mistral_splade"))
def test_parameters_are_counted_exactly(name):
    preset = read_preset("mistral_splade", name)
    assert preset["parameters"] == parameters_from_shapes(preset["config"])
    assert preset["parameters"] == PUBLISHED_PARAMETERS.get(name, preset["parameters"])
    with torch.device("meta"):
        for auto_class in (AutoModel, AutoModelForMaskedLM):
            model = auto_class.from_config(load_preset("mistral_splade", name))
            assert sum(parameter.numel() for parameter in model.parameters()) == preset["parameters"]


def test_the_one_billion_class_is_one():
    assert 1.0e9 < read_preset("mistral_splade", "mistral-1b")["parameters"] < 1.2e9


@pytest.mark.parametrize(
    ("name", "rope_theta", "sliding_window", "vocab_size"),
    [
        ("mistral-7b-v0.1", 1e4, 4096, 32000),
        ("mistral-7b-v0.2", 1e6, None, 32000),
        ("mistral-7b-v0.3", 1e6, None, 32768),
    ],
)
def test_published_values(name, rope_theta, sliding_window, vocab_size):
    config = load_preset("mistral_splade", name)
    assert config.model_type == "mistral_splade"
    assert config.rope_parameters["rope_theta"] == rope_theta
    assert config.sliding_window == sliding_window
    assert config.vocab_size == vocab_size
    assert config.max_position_embeddings == 32768
    assert config.rms_norm_eps == 1e-5
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    assert config.tie_word_embeddings is False
    assert config.attention_mode == "echo"
    assert config.dtype == torch.bfloat16


@pytest.mark.parametrize("name", list_presets("mistral_splade"))
def test_a_preset_survives_saving(name, tmp_path):
    config = load_preset("mistral_splade", name)
    config.save_pretrained(tmp_path)
    saved = type(config).from_pretrained(tmp_path)
    for field, value in read_preset("mistral_splade", name)["config"].items():
        expected = getattr(torch, value) if field == "dtype" else value
        assert getattr(config, field) == expected
        assert getattr(saved, field) == expected


@pytest.mark.parametrize("name", list_presets("mistral_splade"))
def test_the_processor_options_are_accepted(name):
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES)
    preset = read_preset("mistral_splade", name)
    processor = rarezoo.MistralSpladeProcessor(tokenizer, **preset["processor"])
    assert processor.attention_mode == preset["config"]["attention_mode"]
    inputs = processor.process_queries(["what is the capital of france?"])
    assert 0 < int(inputs["pool_mask"].sum()) < int(inputs["attention_mask"].sum())


def lexinvariant_parameters(config) -> int:
    """Every weight of a lexinvariant decoder, counted from its shapes (arXiv 2305.16349: 150 million)."""
    width, inner = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    heads = config["num_attention_heads"]
    scales = heads * (1 + config["relative_attention_num_buckets"] + config.get("key_smear", False))
    layer = 4 * width * inner + 2 * width * config["intermediate_size"] + 2 * width + scales
    rows = config["vocab_size"] * width if config["table"] == "learned" else 0
    return config["num_hidden_layers"] * layer + 3 * width + rows


@pytest.mark.parametrize("name", list_presets("lexinvariant"))
def test_lexinvariant_presets(name):
    preset = read_preset("lexinvariant", name)
    assert preset["parameters"] == lexinvariant_parameters(preset["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_preset("lexinvariant", name))
    assert sum(parameter.numel() for parameter in model.parameters()) == preset["parameters"]
    if name.startswith("150m"):
        assert round(lexinvariant_parameters({**preset["config"], "table": "gaussian"}) / 1e6) == 151
        assert preset["config"]["vocab_size"] == (130 if "character" in name else 32128)


@pytest.mark.parametrize("vocabulary", ["character", "sentencepiece"])
def test_a_standard_twin_differs_by_one_switch(vocabulary):
    ours, standard = (read_preset("lexinvariant", f"150m-{vocabulary}{kind}")["config"] for kind in ("", "-standard"))
    assert {name for name in ours if ours[name] != standard[name]} == {"table"}


def test_overrides_replace_fields():
    assert load_preset("mistral_splade", "tiny", attention_mode="plain", vocab_size=512).vocab_size == 512


def test_unknown_names_list_the_known_ones():
    with pytest.raises(KeyError, match=r"mistral-7b-v0\.1"):
        read_preset("mistral_splade", "mistral-8b")
    with pytest.raises(KeyError, match="mistral_splade"):
        list_presets("no_family")
