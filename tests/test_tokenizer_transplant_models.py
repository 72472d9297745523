"""A transplant matrix applied to models of many kinds: tables, heads, biases, ties, configurations, generation.

The expected tables are dense float64 products of this file's own; everything that is not a table must stay bit for bit.
"""

import copy
import json
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from rarezoo.tokenizer_transplant.table_surgery import (
    TokenIds,
    base_tables,
    fitting_chat_template,
    transplant_tables,
    vocabulary_tensors,
)
from rarezoo.tokenizer_transplant.transplant_matrix import SourceKind, TransplantMatrix, concatenate

from .cases import FIXTURES

BASE_ROWS = 41
SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=BASE_ROWS)
DECODER = dict(**SMALL, num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TIED = dict(tie_word_embeddings=True)
ENCODER = dict(**SMALL, max_position_embeddings=40, pad_token_id=1, hidden_dropout_prob=0.0)
PAIR = dict(vocab_size=BASE_ROWS, d_model=16, pad_token_id=0, eos_token_id=2)
BART = dict(
    **PAIR, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, bos_token_id=1, decoder_start_token_id=2,
    forced_eos_token_id=2,
)  # fmt: skip
T5 = dict(**PAIR, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
TOP = "model.embed_tokens.weight"

# name -> (model class, configuration class, fields, groups of names that must be one tensor, "head" of untied models)
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, [[TOP], ["lm_head.weight"]]),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", DECODER | TIED, [[TOP, "lm_head.weight"]]),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER | TIED, [[TOP, "lm_head.weight"]]),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER, [[TOP, "lm_head.weight"]]),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(n_embd=16, n_layer=1, n_head=2, vocab_size=BASE_ROWS, n_positions=64, bos_token_id=1, eos_token_id=1),
        [["transformer.wte.weight", "lm_head.weight"]],
    ),
    "encoder": ("BertModel", "BertConfig", ENCODER, [["embeddings.word_embeddings.weight"]]),
    "classifier": (
        "LlamaForSequenceClassification", "LlamaConfig", DECODER, [["model.embed_tokens.weight"]],
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        ENCODER,
        [
            ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
            ["cls.predictions.bias", "cls.predictions.decoder.bias"],
        ],
    ),
    "xlm_roberta": (
        "XLMRobertaForMaskedLM",
        "XLMRobertaConfig",
        ENCODER,
        [
            ["roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"],
            ["lm_head.bias", "lm_head.decoder.bias"],
        ],
    ),
    "bert_untied": (
        "BertForMaskedLM",
        "BertConfig",
        ENCODER | {"tie_word_embeddings": False},
        [
            ["bert.embeddings.word_embeddings.weight"],
            ["cls.predictions.decoder.weight"],
            ["cls.predictions.decoder.bias"],
            ["cls.predictions.bias"],
        ],
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
        [["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]],
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
        [
            ["model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight",
             "lm_head.weight"],
            ["final_logits_bias"],
        ],
    ),
}  # fmt: skip
UNTIED_HEADS = (["lm_head.weight"], ["cls.predictions.decoder.weight"])
ROLES = dict(bos=5, eos=6, pad=7, unk=None, sep=None, cls=None, mask=None)


def build(name, **changes):
    """A random model whose biases are random, too."""
    torch.manual_seed(0)
    class_name, config_name, fields, _ = MODELS[name]
    config = getattr(transformers, config_name)(**{**fields, **changes})
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if n == "final_logits_bias")]:
            tensor.normal_(std=0.3)
    return model


def random_matrix(rows=30, padding=4, head=False):
    """Mixed rows, then rows without a token; and the same as dense float64 matrices (input, head)."""
    generator = torch.Generator().manual_seed(1)
    indices = torch.stack([torch.randperm(BASE_ROWS, generator=generator)[:3] for _ in range(rows)])
    lengths = torch.randint(1, 4, (rows,), generator=generator)
    indices[torch.arange(3) >= lengths[:, None]] = -1

    def weights():
        drawn = torch.rand(rows, 3, generator=generator) * (indices >= 0)
        return torch.where(lengths[:, None] == 1, (indices >= 0).float(), drawn)

    inputs, heads = weights(), weights()
    matrix = TransplantMatrix.from_combinations(
        indices, inputs, BASE_ROWS, head_indices=indices if head else None, head_weights=heads if head else None
    )
    if padding:
        matrix = concatenate([matrix, TransplantMatrix.constant(padding, BASE_ROWS, SourceKind.PADDING)])
    dense = []
    for values in (inputs, heads if head else inputs):
        full = torch.zeros(rows, BASE_ROWS + 1, dtype=torch.float64)
        full.scatter_(1, indices.where(indices >= 0, BASE_ROWS), values.double())
        dense.append(full[:, :-1])
    return matrix, *dense


def permutation_matrix(order):
    return TransplantMatrix.copies(order, BASE_ROWS)


def token_ids(matrix, **roles):
    return TokenIds.of(matrix, SimpleNamespace(**{f"{role}_token_id": id_ for role, id_ in (ROLES | roles).items()}))


def inputs_for(model, ids):
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


@pytest.mark.parametrize("name", MODELS)
def test_the_vocabularys_tensors_are_found(name):
    model = build(name)
    expected = {tensor for group in MODELS[name][3] for tensor in group}
    assert set(vocabulary_tensors(type(model), model.config)) == expected


@pytest.mark.parametrize("separate_head", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_tables_heads_and_biases(name, separate_head):
    """Every table is the dense product; ids without a token get the mean row, and a bias that never wins."""
    base = build(name)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    matrix, by_input, by_head = random_matrix(head=separate_head)
    model = transplant_tables(base, matrix, token_ids(matrix))
    state, groups = model.state_dict(), MODELS[name][3]
    assert state.keys() == before.keys()
    for group in groups:
        is_bias = "bias" in group[0]
        dense = by_head if group in UNTIED_HEADS or is_bias else by_input
        old = before[group[0]].double()
        new = dense @ (old.reshape(-1, 1) if is_bias else old)
        padding = torch.full((4, 1), -1e4) if is_bias else new.mean(0).expand(4, -1)
        expected = torch.cat([new, padding]).float()
        for tensor in group:
            found = state[tensor].reshape(34, -1)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            assert [*state[tensor].shape] == [34 if size == BASE_ROWS else size for size in before[tensor].shape]
    touched = {tensor for group in groups for tensor in group} | {
        tensor for tensor in before if "position_embeddings" in tensor
    }
    assert all(torch.equal(state[key], before[key]) for key in before if key not in touched)


@pytest.mark.parametrize("name", MODELS)
def test_tied_stays_tied_and_untied_untied(name, tmp_path):
    """In memory, in the file and after loading; and what is loaded answers to the bit."""
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    matrix, *_ = random_matrix()
    transplant_tables(model, matrix, token_ids(matrix))
    model.save_pretrained(tmp_path / "new")
    files = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "new"))
    assert next(files).keys() == next(files).keys()
    loaded, report = type(model).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(report.values()), report
    for checked in (model, loaded):
        tensors = dict(checked.named_parameters(remove_duplicate=False)) | dict(checked.named_buffers())
        pointers = [{tensors[tensor].data_ptr() for tensor in group} for group in MODELS[name][3]]
        assert all(len(group) == 1 for group in pointers)
        assert len(set.union(*pointers)) == len(pointers)
    ids = torch.randint(8, 30, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = (checked.eval()(**inputs_for(checked, ids))[0] for checked in (model, loaded))
    assert torch.equal(expected, found)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_permuted_vocabulary_permutes_the_answers(name):
    """Also proves that every setting that modules remember (such as padding ids and positions) has moved along."""
    base = build(name)
    order = torch.randperm(BASE_ROWS, generator=torch.Generator().manual_seed(3))
    new_of = order.argsort()
    matrix = permutation_matrix(order)
    roles = {role: int(new_of[getattr(base.config, f"{role}_token_id")]) for role in ("bos", "eos", "pad")
             if getattr(base.config, f"{role}_token_id", None) is not None}  # fmt: skip
    ids = torch.randint(3, BASE_ROWS, (2, 9), generator=torch.Generator().manual_seed(2))
    if base.config.pad_token_id is not None and not base.config.is_encoder_decoder:
        ids[1, 6:] = base.config.pad_token_id
    expected = base(**inputs_for(base, ids))[0]
    model = transplant_tables(copy.deepcopy(base), matrix, token_ids(matrix, **roles))
    found = model(**inputs_for(model, new_of[ids]))[0]
    assert torch.equal(found, expected[..., order] if expected.shape[-1] == BASE_ROWS else expected)


def test_positions_move_with_the_padding_id(tmp_path):
    """RoBERTa counts positions from the padding id: with another id the rows must move, and none is lost."""
    base = build("xlm_roberta")
    ids = torch.randint(3, BASE_ROWS, (1, 38))  # as many positions as there are: 40, less two
    expected = base(ids).logits
    for pad in (0, 4):
        order = torch.arange(BASE_ROWS)
        order[[1, pad]] = order[[pad, 1]]
        matrix = permutation_matrix(order)
        model = transplant_tables(copy.deepcopy(base), matrix, token_ids(matrix, pad=pad, bos=None, eos=None))
        model.save_pretrained(tmp_path / str(pad))
        loaded = type(model).from_pretrained(tmp_path / str(pad)).eval()
        assert model.config.max_position_embeddings == 40 + pad - 1
        for checked in (model, loaded):
            assert torch.equal(checked(order.argsort()[ids]).logits, expected[..., order])
    with pytest.raises(
        ValueError, match="counts positions from the padding id 1, but that of the new tokenizer is None"
    ):
        transplant_tables(base, matrix, token_ids(matrix, pad=None))
    assert base.config.pad_token_id == 1 and base.config.vocab_size == BASE_ROWS


def test_bfloat16_is_rounded_once():
    wide = build("llama")
    narrow = copy.deepcopy(wide).bfloat16()
    wide = copy.deepcopy(narrow).float()
    matrix, *_ = random_matrix(padding=0)
    for model in (wide, narrow):
        transplant_tables(model, matrix, token_ids(matrix))
    for tensor in (TOP, "lm_head.weight"):
        assert narrow.state_dict()[tensor].dtype == torch.bfloat16
        assert torch.equal(narrow.state_dict()[tensor], wide.state_dict()[tensor].bfloat16())


def test_frozen_tables_stay_frozen():
    model = build("llama")
    model.get_input_embeddings().weight.requires_grad_(False)
    matrix, *_ = random_matrix()
    transplant_tables(model, matrix, token_ids(matrix))
    assert not model.get_input_embeddings().weight.requires_grad and model.lm_head.weight.requires_grad


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "bart"])
@torch.no_grad()
def test_ids_without_a_token_are_never_generated(name, tmp_path):
    """Under almost uniform sampling, before and after saving; some padding stands in the middle of the table."""
    model = build(name)
    rows, *_ = random_matrix(rows=20, padding=6)
    matrix = rows.select(torch.tensor([*range(10), *range(20, 23), *range(10, 20), *range(23, 26)]))
    padding = {10, 11, 12, 23, 24, 25}
    transplant_tables(model, matrix, token_ids(matrix, eos=None))
    model.save_pretrained(tmp_path)
    for checked in (model, type(model).from_pretrained(tmp_path).eval()):
        torch.manual_seed(0)
        prompt = torch.full((64, 1), 4)
        found = checked.generate(
            prompt, do_sample=True, temperature=50.0, top_k=0, max_new_tokens=20, min_new_tokens=20
        )
        assert set(found.unique().tolist()) >= set(range(26)) - padding - {7}
        assert not padding & set(found.unique().tolist())


@torch.no_grad()
def test_padding_takes_no_probability_that_counts():
    """Where all logits are far below zero, as in GPT-2, rows of zeros would win; the mean row cannot."""
    model = build("gpt2")
    hidden_norm = model.transformer.ln_f
    hidden_norm.weight.zero_()
    hidden_norm.bias.fill_(1.0)
    model.lm_head.weight.normal_(-5.0, 1.0)
    matrix, *_ = random_matrix(rows=30, padding=4)
    transplant_tables(model, matrix, token_ids(matrix))
    logits = model(torch.arange(30)[None]).logits
    assert logits[..., :30].max() < -20
    assert (logits.argmax(-1) < 30).all()
    assert (logits.softmax(-1)[..., 30:] <= 1 / 34).all()


def test_configuration_and_generation_settings(tmp_path):
    """Sizes, role ids, lists of ends, sequences; through save and load."""
    model = build("llama")
    base_ids = dict(bos=1, eos=2, pad=0)
    model.config.eos_token_id = [2, 9, 11]
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 9, 11, 13], pad_token_id=0, suppress_tokens=[10, 12], forced_eos_token_id=2,
        bad_words_ids=[[10], [12, 14]], sequence_bias=[[[10, 11], -2.0], [[12], 1.0]], max_length=17,
    )  # fmt: skip
    # New ids 0..6 are these base ids; base ids 12, 13 and 14 have no counterpart.
    matrix = TransplantMatrix.copies(torch.tensor([1, 2, 0, 9, 10, 11, 2]), BASE_ROWS)
    matrix = concatenate([matrix, TransplantMatrix.constant(1, BASE_ROWS, SourceKind.PADDING)])
    roles = dict(bos=0, eos=6, pad=2)
    tokenizers = (SimpleNamespace(**{f"{role}_token_id": ids.get(role) for role in ROLES}) for ids in (roles, base_ids))
    with pytest.warns(UserWarning, match="1 entries of the generation setting"):
        transplant_tables(model, matrix, TokenIds.of(matrix, *tokenizers))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for checked in (model, loaded):
        config, settings = checked.config, checked.generation_config
        assert (config.vocab_size, config.bos_token_id, config.pad_token_id) == (8, 0, 2)
        assert config.eos_token_id == [6, 3, 5] and settings.eos_token_id == [6, 3, 5]
        assert (settings.bos_token_id, settings.pad_token_id, settings.forced_eos_token_id) == (0, 2, 6)
        assert settings.suppress_tokens == [4, 7] and settings.bad_words_ids == [[4]]
        assert settings.sequence_bias == [[[4, 5], -2.0]] and settings.max_length == 17
        assert (checked.vocab_size, checked.model.vocab_size, checked.lm_head.out_features) == (8, 8, 8)
        assert checked.model.padding_idx == 2 and checked.model.embed_tokens.padding_idx == 2


@torch.no_grad()
def test_generation_stops_at_the_new_end():
    model = build("llama")
    matrix = permutation_matrix(torch.arange(BASE_ROWS).roll(10))
    transplant_tables(model, matrix, token_ids(matrix, eos=12))
    model.lm_head.weight.zero_()
    model.lm_head.weight[12] = 1e3 * model.model(torch.tensor([[4]])).last_hidden_state[0, -1]
    assert model.generate(torch.tensor([[4]]), max_new_tokens=5, do_sample=False).tolist() == [[4, 12]]


def test_one_base_token_of_two_roles():
    """As in GPT-2, whose only special token begins and ends texts; the new tokenizer has one for each."""
    model = build("gpt2")
    model.generation_config.forced_eos_token_id = 1
    matrix = TransplantMatrix.copies(torch.tensor([1, 1, 2, 3]), BASE_ROWS)
    new, base = (
        {f"{role}_token_id": ids.get(role) for role in ROLES} for ids in (dict(bos=0, eos=1), dict(bos=1, eos=1))
    )
    transplant_tables(model, matrix, TokenIds.of(matrix, SimpleNamespace(**new), SimpleNamespace(**base)))
    settings = model.generation_config
    assert (settings.bos_token_id, settings.eos_token_id, settings.forced_eos_token_id) == (0, 1, 1)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)


def test_a_failure_leaves_the_model_as_it_was():
    """Here the matrix has rows of another width for the head, which is met after the input table."""
    model = build("llama")
    before = copy.deepcopy(model)
    indices = torch.full((10, 1), -1)
    matrix = TransplantMatrix.from_combinations(
        indices, indices.float(), BASE_ROWS, dense=torch.zeros(10, 16), head_dense=torch.zeros(10, 12)
    )
    with pytest.raises(ValueError, match="dense rows have width 12"):
        transplant_tables(model, matrix, token_ids(matrix))
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == before.config.to_dict()


def test_decoder_start():
    """An encoder-decoder's first token is translated, by role before by row."""
    model = build("bart")
    matrix = permutation_matrix(torch.arange(BASE_ROWS).roll(3))
    transplant_tables(model, matrix, token_ids(matrix))
    assert model.config.decoder_start_token_id == 2 + 3
    assert model.generation_config.decoder_start_token_id == 2 + 3
    assert model.generation_config.forced_eos_token_id == 2 + 3
    matrix, *_ = random_matrix(rows=5, padding=0)
    nothing = token_ids(matrix, bos=None, eos=None, pad=None)
    with pytest.raises(ValueError, match="a decoder needs a first token"):
        transplant_tables(model, TransplantMatrix(matrix.kinds, matrix.input, BASE_ROWS), nothing)


def image_model(**fields):
    text = transformers.LlamaConfig(**DECODER)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, **fields)
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_a_model_of_images_and_text(tmp_path):
    """The size stands in the text model's part of the configuration; the image marker must live on."""
    model = image_model(image_token_id=20)
    matrix = permutation_matrix(torch.arange(BASE_ROWS).roll(10))
    transplant_tables(model, matrix, token_ids(matrix))
    assert model.config.text_config.vocab_size == BASE_ROWS and model.config.image_token_id == 30
    assert model.config.text_config.eos_token_id == 6
    cut = TransplantMatrix.copies(torch.arange(15), BASE_ROWS)
    model = image_model(image_token_id=20)
    with pytest.raises(ValueError, match=r"image_token_\w+ is 20, but no token of the new tokenizer is a copy"):
        transplant_tables(model, cut, token_ids(cut))
    model = image_model(image_token_id=12)
    transplant_tables(model, cut, token_ids(cut))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["vocab_size"] == 15
    assert type(model).from_pretrained(tmp_path).get_input_embeddings().weight.shape == (15, 16)


def test_adapters():
    """LoRA on inner layers stays as it is; an adapter with rows of the old vocabulary is refused."""
    matrix, *_ = random_matrix()
    plain = transplant_tables(build("llama"), matrix, token_ids(matrix))
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora = {name: value.clone() for name, value in adapted.state_dict().items() if "lora" in name}
    assert transplant_tables(adapted, matrix, token_ids(matrix)) is adapted
    assert lora and all(torch.equal(adapted.state_dict()[name], value) for name, value in lora.items())
    ids = torch.arange(8, 20)[None]
    with torch.no_grad(), adapted.disable_adapter():
        assert torch.equal(adapted.eval()(ids).logits, plain(ids).logits)
    for settings in (
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        dict(target_modules=["q_proj", "embed_tokens"]),
        dict(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    ):
        model = peft.get_peft_model(build("llama"), peft.LoraConfig(**settings))
        with pytest.raises(ValueError, match="is wrapped by an adapter, which keeps rows of the old vocabulary"):
            transplant_tables(model, matrix, token_ids(matrix))
    for settings in (
        dict(modules_to_save=["cls"]),
        dict(modules_to_save=["decoder"]),
        dict(trainable_token_indices={"word_embeddings": [3]}),
        dict(bias="all"),
    ):
        model = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query"], **settings))
        for refuse in (base_tables, lambda model: transplant_tables(model, matrix, token_ids(matrix))):
            with pytest.raises(ValueError, match=r"by an adapter.*, which keeps rows of the old vocabulary"):
                refuse(model)


@pytest.mark.filterwarnings("ignore")
def test_quantized_base(tmp_path):
    """4-bit and 8-bit layers stay; the tables, which are not quantized, are replaced; a quantized head is refused."""
    pytest.importorskip("bitsandbytes")
    wide = dict(hidden_size=64, intermediate_size=64, head_dim=32)
    base = build("llama", **wide)
    base.save_pretrained(tmp_path)
    matrix, *_ = random_matrix()
    plain = transplant_tables(base, matrix, token_ids(matrix))
    for settings in (dict(load_in_4bit=True), dict(load_in_8bit=True)):
        quantized = type(base).from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**settings))
        transplant_tables(quantized, matrix, token_ids(matrix))
        for tensor in (TOP, "lm_head.weight"):
            assert torch.equal(
                quantized.state_dict()[tensor].float(), plain.state_dict()[tensor].to(quantized.dtype).float()
            )
        with torch.no_grad():
            assert quantized(torch.arange(8, 20)[None]).logits.shape == (1, 12, 34)
    skip_nothing = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["nothing"])
    quantized = type(base).from_pretrained(tmp_path, quantization_config=skip_nothing)
    with pytest.raises(ValueError, match=r"lm_head.weight is quantized \(torch.uint8\)"):
        transplant_tables(quantized, matrix, token_ids(matrix))


def test_base_tables():
    llama, tied, bert = build("llama"), build("llama_tied"), build("bert")
    table, head, bias = base_tables(llama)
    assert table is llama.model.embed_tokens.weight and head is llama.lm_head.weight and bias is None
    assert base_tables(tied)[0] is tied.model.embed_tokens.weight and base_tables(tied)[1:] == (None, None)
    table, head, bias = base_tables(bert)
    assert table is bert.bert.embeddings.word_embeddings.weight and head is None
    assert torch.equal(bias, bert.cls.predictions.bias)


def test_wrong_sizes_are_refused():
    matrix = TransplantMatrix.copies(torch.arange(10), BASE_ROWS + 1)
    model = build("llama")
    with pytest.raises(ValueError, match="made for a vocabulary of 42 rows, the model has 41"):
        transplant_tables(model, matrix, token_ids(matrix))
    cut = TransplantMatrix.copies(torch.arange(7), BASE_ROWS)
    with pytest.raises(ValueError, match="the new tokenizer's pad token has the id 7, the tables 7 rows"):
        transplant_tables(model, cut, token_ids(cut))
    model.config.vocab_size = 42
    with pytest.raises(ValueError, match="has 41 rows, but the configuration's vocab_size is 42"):
        transplant_tables(model, matrix, token_ids(matrix))
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(num_hidden_layers=1, hidden_size=12))
    with pytest.raises(ValueError, match="has no vocab_size"):
        base_tables(vision)


def test_chat_template():
    """Kept only where its markers are single tokens of the new tokenizer."""
    base, new = (
        AutoTokenizer.from_pretrained(FIXTURES / "tokenizer_transplant" / name)
        for name in ("base_model", "donor_model")
    )
    assert base.chat_template and fitting_chat_template(new, base) == base.chat_template  # has no markers
    base.chat_template += "<|pad|>"
    with pytest.warns(UserWarning, match=r"chat template is not kept: '<\|pad\|>' must each be a single token"):
        assert fitting_chat_template(new, base) is None
    template = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    base.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    base.chat_template = template
    assert fitting_chat_template(new, base) == template
    base.chat_template = template + "{{ pad_token }}"
    with pytest.warns(UserWarning, match="'pad_token' must each"):
        assert fitting_chat_template(new, base) is None
    new.chat_template = "own"
    assert fitting_chat_template(new, base) == "own"


LOAD_PLAIN = """
import os, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(os.environ["CASE"])
assert type(model).__module__ == "transformers.models.llama.modeling_llama"
expected = load_file(os.environ["CASE"] + "/answers.safetensors")["logits"]
with torch.no_grad():
    assert torch.equal(model.eval()(torch.arange(8, 20)[None]).logits, expected)
assert not any(name.split(".")[0] == "rarezoo" for name in sys.modules)
"""


def test_result_is_a_plain_model(tmp_path, run_without_rarezoo):
    matrix, *_ = random_matrix()
    model = transplant_tables(build("llama"), matrix, token_ids(matrix))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        save_file({"logits": model(torch.arange(8, 20)[None]).logits}, tmp_path / "answers.safetensors")
    run_without_rarezoo(LOAD_PLAIN, CASE=str(tmp_path))
