"""The lexinvariant family's converter: Flax trees both ways, and the decoders of T5."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Stack

from rarezoo import LexinvariantConfig, LexinvariantForCausalLM
from rarezoo.conversion import ConversionError, convert
from rarezoo.lexinvariant.character_tokenizer import character_tokenizer

from .cases import CASES
from .commands import call

CASE = CASES["lexinvariant"]
FIXTURES = Path(__file__).parent / "fixtures" / "lexinvariant"
IDS = torch.tensor([[3, 9, 9, 4, 3, 11, 2, 9], [5, 6, 7, 5, 6, 7, 5, 6]])


def strict_model(**fields) -> LexinvariantForCausalLM:
    """The fixture that masks as the Flax code does."""
    content = json.loads((FIXTURES / "config_strict.json").read_text())
    del content["model_type"]
    model = LexinvariantForCausalLM(LexinvariantConfig(**{**content, **fields}))
    model.load_state_dict(load_file(FIXTURES / "model_strict.safetensors"), strict=not fields)
    return model.eval()


def flax_tree(model) -> dict[str, numpy.ndarray]:
    """The parameters as google-research/meliad names and lays them out, written by hand."""
    tree = {}
    for name, tensor in model.state_dict().items():
        array, parts = tensor.numpy(), name.split(".")
        if parts[1] != "layers":
            if parts[1] == "norm":
                tree["decoder/final_layernorm/scale"] = array
            else:
                tree[f"decoder/embed/{'embedding' if parts[2] == 'weight' else parts[2]}"] = array
            continue
        base = f"decoder/layer_stack/transformer{parts[2]}/"
        kvq = f"{base}tbase/_kvq/"
        path = {
            "self_attn.q_proj.weight": f"{kvq}queries_layer/kernel",
            "self_attn.k_proj.weight": f"{kvq}keys_layer/kernel",
            "self_attn.v_proj.weight": f"{kvq}values_layer/kernel",
            "self_attn.attn_scale": f"{kvq}attention_scale",
            "input_layernorm.weight": f"{kvq}pre_attn_layernorm/scale",
            "self_attn.o_proj.weight": f"{base}tbase/post_attn_mlp/output_layer/kernel",
            "mlp.up_proj.weight": f"{base}tbase/ffn/hidden0/kernel",
            "mlp.down_proj.weight": f"{base}tbase/ffn/output_layer/kernel",
            "post_attention_layernorm.weight": f"{base}tbase/pre_ffn_layernorm/scale",
            "self_attn.relative_attention_bias.weight": f"{base}relative_positions/rel_embedding",
        }[".".join(parts[3:])]
        tree[path] = array.T if array.ndim == 2 else array
    return tree


@pytest.fixture
def tree():
    return flax_tree(strict_model())


def write_npz(file, tree):
    numpy.savez(file, **tree)
    return file


OPTIONS = dict(vocab_size=23, relative_attention_max_distance=10)


@pytest.mark.parametrize("form", ["npz", "safetensors", "folder", "short names"])
@torch.no_grad()
def test_a_flax_tree(tree, form, tmp_path):
    source = tmp_path / "tree.npz"
    if form == "safetensors":
        source = tmp_path / "tree.safetensors"
        save_file({name: torch.tensor(numpy.ascontiguousarray(array)) for name, array in tree.items()}, source)
    elif form == "short names":  # as another version of the code, and flax's own top level, have them
        short = {f"params/{name.replace('layer_stack/', '')}": array for name, array in tree.items()}
        write_npz(source, short)
    else:
        write_npz(source, tree)
    report = convert(
        "lexinvariant", tmp_path if form == "folder" else source, tmp_path / "ours", config_options=OPTIONS
    )
    assert report.source_layout == "flax" and not report.folders[0].dropped
    assert any("attend_self is false" in note for note in report.folders[0].notes)
    model, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval(), strict_model()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_a_tree_with_embeddings(tree, tmp_path):
    rows = numpy.random.default_rng(0).normal(size=(23, 16)).astype(numpy.float32)
    source = write_npz(tmp_path / "tree.npz", {**tree, "decoder/embed/embedding": rows})
    report = convert("lexinvariant", source, tmp_path / "learned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "learned")
    assert model.config.table == "learned" and model.config.vocab_size == 23
    assert torch.equal(model.model.embed_tokens.weight, torch.tensor(rows))
    assert any("sqrt(vocab_size)" in note for note in report.folders[0].notes)

    report = convert("lexinvariant", source, tmp_path / "random", config_options={"table": "gaussian"})
    assert report.folders[0].dropped == {"embed.embedding": "the rows of a 'gaussian' table are not learned"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "random")
    assert model.config.table == "gaussian" and model.model.embed_tokens.weight is None


def test_bfloat16_arrays(tree, tmp_path):
    """numpy reads JAX's bfloat16 as two bytes without a meaning."""
    raw = {
        name: torch.tensor(numpy.ascontiguousarray(array)).bfloat16().view(torch.int16).numpy().view("V2")
        for name, array in tree.items()
    }
    convert("lexinvariant", write_npz(tmp_path / "tree.npz", raw), tmp_path / "ours", config_options=OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.dtype == torch.bfloat16
    for name, tensor in strict_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.bfloat16())


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(table="learned"),
        dict(relative_attention_bias_shared=True, qk_norm=False, embedding_affine="scalar"),
        dict(embedding_affine="none", attend_self=False, unseen_logits="collapsed"),
        dict(key_smear=True, exempt_token_ids=[0, 5]),
        dict(table="canonical", learned_table=True, canonical_size=20),
    ],
    ids=str,
)
@torch.no_grad()
def test_there_and_back_again(fields, tmp_path):
    model = CASE.build("AutoModelForCausalLM", **fields)
    model.save_pretrained(tmp_path / "ours")
    character_tokenizer().save_pretrained(tmp_path / "ours")
    report = convert("lexinvariant", tmp_path / "ours", tmp_path / "flax", to="official")
    assert report.to == "official" and report.folders[0].layout == "flax"
    stored = load_file(tmp_path / "flax" / "model.safetensors")
    kernel = stored["decoder/layer_stack/transformer1/tbase/_kvq/queries_layer/kernel"]
    assert torch.equal(kernel.T, model.model.layers[1].self_attn.q_proj.weight)
    convert("lexinvariant", tmp_path / "flax", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.to_diff_dict() | {"dtype": None} == model.config.to_diff_dict() | {"dtype": None}
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    inputs = CASE.batch("AutoModelForCausalLM")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("a b").input_ids == [97, 32, 98]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("decoder/final_layernorm/scale"), "Missing tensors: model.norm.weight"),
        (lambda tree: tree.update({"decoder/final_mlp/kernel": numpy.zeros(3)}), "Unknown tensors: final_mlp.kernel"),
        (
            lambda tree: tree.update({"state/decoder/layer_stack/transformer0/previous_keys_train": numpy.zeros(3)}),
            "Unknown tensors: state.transformer0.previous_keys_train",
        ),
        (lambda tree: tree.update({"decoder/final_layernorm/scale": numpy.ones(3)}), r"\[3\] instead of \[16\]"),
        (
            lambda tree: tree.pop("decoder/layer_stack/transformer0/tbase/_kvq/keys_layer/kernel"),
            "is not a decoder of google-research/meliad: it lacks the matrices transformer0.keys_layer.kernel",
        ),
        (lambda tree: tree["decoder/final_layernorm/scale"].fill(numpy.nan), "not finite"),
        (
            lambda tree: tree.update({"params/decoder/final_layernorm/scale": numpy.ones(16)}),
            "holds final_layernorm.scale twice",
        ),
    ],
)
def test_damaged_trees(tree, change, message, tmp_path):
    tree = {name: array.copy() for name, array in tree.items()}
    change(tree)
    source = write_npz(tmp_path / "tree.npz", tree)
    with pytest.raises(ConversionError, match=message):
        convert("lexinvariant", source, tmp_path / "ours", config_options=OPTIONS)
    assert not (tmp_path / "ours").exists()


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"expected one \.npz or \.safetensors file of a Flax tree, found none"):
        convert("lexinvariant", tmp_path / "empty", tmp_path / "ours")
    (tmp_path / "tree.npz").write_bytes(b"no archive")
    with pytest.raises(ConversionError, match=r"is damaged or not a \.npz file"):
        convert("lexinvariant", tmp_path / "tree.npz", tmp_path / "ours")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConversionError, match="describes a 'bert' model; expected rarezoo's layout"):
        convert("lexinvariant", tmp_path / "bert", tmp_path / "ours")


# --- T5 ---------------------------------------------------------------------------------------------------------------

SIZES = dict(
    vocab_size=50, d_model=32, d_kv=12, d_ff=37, num_layers=1, num_decoder_layers=3, num_heads=4,
    relative_attention_num_buckets=8, relative_attention_max_distance=20, dropout_rate=0.0,
)  # fmt: skip


def t5(**fields) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**{**SIZES, "feed_forward_proj": "relu", **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("part", ["whole", "stack"])
@torch.no_grad()
def test_the_decoder_of_a_t5(part, tmp_path):
    """Hidden states and logits are those of transformers' stack without an encoder."""
    model = t5()
    stack: T5Stack = model.decoder
    (model if part == "whole" else stack).save_pretrained(tmp_path / "t5")
    report = convert("lexinvariant", tmp_path / "t5", tmp_path / "ours")
    dropped = report.folders[0].dropped
    assert report.source_layout == "t5"
    assert all(name.startswith("encoder.") or ".layer.1." in name for name in dropped)
    assert any(name.startswith("encoder.") for name in dropped) == (part == "whole")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert (ours.config.table, ours.config.num_hidden_layers) == ("learned", 3)

    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = stack(input_ids=ids).last_hidden_state
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours.model(ids).last_hidden_state, expected, atol=1e-6, rtol=1e-6)
    logits = expected * 32**-0.5 @ model.shared.weight.T
    torch.testing.assert_close(ours(ids).logits, logits, atol=1e-5, rtol=1e-5)


def test_a_lexinvariant_model_from_a_t5(tmp_path):
    t5().save_pretrained(tmp_path / "t5")
    report = convert("lexinvariant", tmp_path / "t5", tmp_path / "ours", config_options={"table": "permuted"})
    assert "shared.weight" in report.folders[0].dropped
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config.table == "permuted"


def test_a_t5_of_another_kind(tmp_path):
    t5(feed_forward_proj="gated-gelu").save_pretrained(tmp_path / "gated")
    with pytest.raises(ConversionError, match="ReLU without a gate; found 'gated-gelu'"):
        convert("lexinvariant", tmp_path / "gated", tmp_path / "ours")
    t5().save_pretrained(tmp_path / "t5")
    weights = load_file(tmp_path / "t5" / "model.safetensors")
    weights["lm_head.weight"] = weights["shared.weight"] + 1
    save_file(weights, tmp_path / "t5" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"lm_head\.weight differs from shared.weight"):
        convert("lexinvariant", tmp_path / "t5", tmp_path / "ours")


# --- rarezoo's own folders, and the command line ----------------------------------------------------------------------


def test_a_folder_of_ours_is_written_again(tmp_path):
    CASE.build("AutoModelForCausalLM", table="learned").save_pretrained(tmp_path / "ours")
    report = convert(
        "lexinvariant", tmp_path / "ours", tmp_path / "half", dtype="bf16", config_options={"table": "gaussian"}
    )
    assert report.folders[0].dtype == "bfloat16"
    assert list(report.folders[0].dropped) == ["model.embed_tokens.weight"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.bfloat16 and loaded.config.table == "gaussian"
    with pytest.raises(ConversionError, match=r"Missing tensors: model\.embed_tokens\.weight"):
        convert("lexinvariant", tmp_path / "half", tmp_path / "learned", config_options={"table": "learned"})
    with pytest.raises(ConversionError, match=r"unknown fields in the configuration .*: tables"):
        convert("lexinvariant", tmp_path / "half", tmp_path / "other", config_options={"tables": "learned"})
    with pytest.raises(ConversionError, match="layout must be flax; found 't5'"):
        convert("lexinvariant", tmp_path / "half", tmp_path / "other", to="official", layout="t5")


def test_the_command(tree, tmp_path):
    source = write_npz(tmp_path / "tree.npz", tree)
    options = ("--option", f"config_options={json.dumps(OPTIONS)}")
    said = call("convert", "lexinvariant", source, tmp_path / "ours", *options).stdout
    assert "rarezoo layout, 23 tensors" in said
    said = call("convert", "lexinvariant", tmp_path / "ours", tmp_path / "flax", "--to", "official").stdout
    assert "flax layout" in said
