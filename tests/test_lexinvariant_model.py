"""The lexinvariant model beside its numbers: what is stored, what may be changed, compilation, training losses."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from rarezoo import LexinvariantForCausalLM
from rarezoo.lexinvariant.configuration_lexinvariant import TABLES

from .cases import CASES

CASE = CASES["lexinvariant"]
AUTO_CLASS = "AutoModelForCausalLM"
VOCAB_SIZE = CASE.config["vocab_size"]


def build(**fields):
    return CASE.build(AUTO_CLASS, **fields)


def batch():
    return CASE.batch(AUTO_CLASS)


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CASE.variants)
def test_only_trained_rows_are_stored(variant, tmp_path):
    model = build(**CASE.variants[variant])
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name for name, _ in model.named_parameters()} == stored.keys()
    assert not list(model.buffers())
    large = {name: tuple(tensor.shape) for name, tensor in stored.items() if VOCAB_SIZE in tensor.shape}
    trained = model.config.has_learned_rows and model.config.table != "canonical"
    assert large == ({"model.embed_tokens.weight": (VOCAB_SIZE, model.config.hidden_size)} if trained else {})


def test_names_of_the_specification():
    names = set(build(key_smear=True, table="learned").state_dict())
    layer = "model.layers.1."
    assert {
        "model.embed_tokens.scale", "model.embed_tokens.bias", "model.embed_tokens.weight", "model.norm.weight",
        f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight", f"{layer}self_attn.attn_scale",
        f"{layer}self_attn.key_smear", f"{layer}self_attn.relative_attention_bias.weight",
        *(f"{layer}self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"{layer}mlp.{part}_proj.weight" for part in ("up", "down")),
    } <= names  # fmt: skip
    shared = build(relative_attention_bias_shared=True, qk_norm=False)
    assert [name for name in shared.state_dict() if "bias.weight" in name] == [
        "model.layers.0.self_attn.relative_attention_bias.weight"
    ]
    assert not any("attn_scale" in name for name in shared.state_dict())


@pytest.mark.parametrize("options", [dict(device_map="meta"), dict(low_cpu_mem_usage=True)], ids=str)
def test_loading_without_memory(options, tmp_path):
    build().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    expected = "meta" if "device_map" in options else "cpu"
    assert {parameter.device.type for parameter in loaded.parameters()} == {expected}


def test_nothing_is_tied():
    model = build(table="learned")
    before = copy.deepcopy(model.state_dict())
    model.tie_weights()
    assert model.get_output_embeddings() is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("fields", [dict(), dict(qk_norm=False, relative_attention_bias_shared=True)], ids=str)
def test_first_weights(fields):
    """Also of modules that have no weights of their own, and not those of a loaded model."""
    model = build(initialization="mimetic", final_norm_init=0.2, attn_scale_init=8.0, **fields)
    assert (model.model.norm.weight == 0.2).all()
    for layer in model.model.layers:
        attention = layer.self_attn
        assert (layer.input_layernorm.weight == 1).all()
        assert torch.equal(attention.q_proj.weight, attention.k_proj.weight)
        torch.testing.assert_close(attention.o_proj.weight, 0.7 * attention.v_proj.weight.T)
        torch.testing.assert_close(attention.v_proj.weight.T @ attention.v_proj.weight, torch.eye(32))
        assert attention.attn_scale is None or (attention.attn_scale == 8).all()


def test_first_scales_of_the_heads_may_differ():
    for layer in build(attn_scale_init=8.0, attn_scale_spread=1.5).model.layers:
        scales = layer.self_attn.attn_scale.flatten()
        assert len(scales) == build().config.num_attention_heads
        torch.testing.assert_close(scales[[0, -1]], 8 * torch.tensor([-1.5, 1.5]).exp())
        torch.testing.assert_close(scales[1:] / scales[:-1], (scales[1] / scales[0]).expand(len(scales) - 1))


# --- what may be changed ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_fields_are_overridden_while_loading(tmp_path):
    model, inputs = build(), batch()
    model.save_pretrained(tmp_path)
    for fields in (
        dict(unseen_logits="collapsed"),
        dict(table="orthonormal", unseen_logits="collapsed"),
        dict(table="canonical", canonical_size=40),
        dict(table="permuted"),
        dict(vocab_size=1_000_000, unseen_logits="collapsed"),
    ):
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **fields)
        assert not any(report.values()), report
        built = build(**fields)
        built.load_state_dict(model.state_dict())
        found = loaded(**inputs, logits_to_keep=1).logits
        assert found.shape[-1] == loaded.config.vocab_size == built.config.vocab_size
        assert torch.equal(found, built(**inputs, logits_to_keep=1).logits)
    with pytest.raises(StrictDataclassError, match=r"needs a table of gaussian, .*; found 'permuted'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, table="permuted", unseen_logits="collapsed")
    with pytest.raises(StrictDataclassError, match="table must be one of"):
        AutoModelForCausalLM.from_pretrained(tmp_path, table="normal")


def test_only_the_missing_weights_are_made_up(tmp_path):
    """A parameter that an override adds gets its first value; the loaded ones beside it stay."""
    model = build(initialization="mimetic")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, key_smear=True, output_loading_info=True)
    names = {f"model.layers.{layer}.self_attn.key_smear" for layer in range(2)}
    assert set(report["missing_keys"]) == names
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, torch.zeros(4) if name in names else model.state_dict()[name]), name


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("auto_class", CASE.heads)
@torch.no_grad()
def test_another_number_of_symbols(table, auto_class, tmp_path):
    fields = dict(unseen_logits="collapsed") if table == "orthonormal" else {}
    model, inputs = CASE.build(auto_class, table=table, **fields), CASE.batch(auto_class)
    embedding = model.get_input_embeddings()
    before = None if embedding.weight is None else embedding.weight.clone()
    for size in (VOCAB_SIZE + 7, VOCAB_SIZE - 3):
        assert model.resize_token_embeddings(size) is embedding
        assert model.config.vocab_size == model.base_model.config.vocab_size == size
        model.save_pretrained(tmp_path / str(size))
        loaded, report = type(model).from_pretrained(tmp_path / str(size), output_loading_info=True)
        assert not any(report.values()), report
        assert loaded.config.vocab_size == size
        if table in ("learned", "mixed", "subset_permuted"):
            assert embedding.weight.shape[0] == size and embedding.weight.requires_grad
            kept = min(size, VOCAB_SIZE)
            assert torch.equal(embedding.weight[:kept], before[:kept])
        else:
            assert embedding.weight is before is None
        found = loaded(**{**inputs, "input_ids": inputs["input_ids"].clamp(max=size - 1)})[0]
        assert found.shape[-1] == (size if auto_class == AUTO_CLASS else model.config.hidden_size)
    assert model.resize_token_embeddings(pad_to_multiple_of=64) is embedding
    assert model.config.vocab_size == 192


def test_exempt_symbols_cannot_be_cut_off():
    model = build(exempt_token_ids=[150])
    with pytest.raises(ValueError, match=r"exempt_token_ids \[150\] do not lie in 0\.\.149"):
        model.resize_token_embeddings(150)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gaussian", "exempt", "orthonormal", "canonical", "mixed", "key_smear"])
@torch.no_grad()
def test_one_compiled_graph(variant):
    model, inputs = build(**CASE.variants[variant]), batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for use_cache in (False, True):
        expected = model(**inputs, use_cache=use_cache).logits
        torch.testing.assert_close(compiled(**inputs, use_cache=use_cache).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_exported_graph():
    model, inputs = build(), {**batch(), "use_cache": False}
    exported = torch.export.export(model, (), inputs).module()
    torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", CASE.variants)
def test_the_loss_while_training_is_that_of_the_logits(variant):
    """Value and gradients, where the products with the table are not kept."""
    inputs = batch()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] % 5 == 0, -100)
    losses, gradients = [], []
    for train in (True, False):
        model = build(**CASE.variants[variant]).train(train)
        outputs = model(**inputs)
        outputs.loss.backward()
        losses.append(outputs.loss.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert (outputs.logits is None) == train
        if not train:
            real = inputs["attention_mask"].bool()
            counted = (inputs["labels"][:, 1:] != -100) & real[:, 1:] & real[:, :-1]
            expected = torch.nn.functional.cross_entropy(
                outputs.logits[:, :-1][counted], inputs["labels"][:, 1:][counted]
            )
            torch.testing.assert_close(losses[1], expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_labels_that_are_shifted_already():
    assert find_labels(LexinvariantForCausalLM) == ["labels"], "the Trainer waits for all others too"
    model, inputs = build(), batch()
    ids = inputs["input_ids"]
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    shifted = shifted.masked_fill(torch.nn.functional.pad(inputs["attention_mask"][:, 1:], (0, 1)) == 0, -100)
    expected = model(**inputs, labels=ids).loss
    found = model(**inputs, labels=ids.flip(0), shift_labels=shifted).loss
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    counted = int((shifted != -100).sum())
    scaled = model(**inputs, labels=ids, num_items_in_batch=2 * counted).loss
    torch.testing.assert_close(scaled, expected / 2, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_adapters_cannot_take_rows_that_do_not_exist():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig())
    assert not any("embed_tokens" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert model.peft_config["default"].modules_to_save is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(input_ids=torch.tensor([[1, 160]])), r"input_ids must lie in 0\.\.159; found 160"),
        (dict(input_ids=torch.tensor([[-1, 3]])), r"input_ids must lie in 0\.\.159; found -1"),
        (dict(input_ids=torch.tensor([1, 3])), r"must have the shape \(batch, length\); found \(2,\)"),
        (dict(lex_seeds=torch.tensor([1, 2])), r"lex_seeds must be int64 of shape \(1,\); found torch.int64 of \(2,\)"),
        (dict(lex_seeds=torch.tensor([1.0])), r"lex_seeds must be int64 of shape \(1,\); found torch.float32"),
        (dict(embedding_table=torch.zeros(160, 31)), r"embedding_table must have the shape \(160, 32\) or"),
        (
            dict(permutations=torch.zeros(2, 160).long()),
            r"permutations must have the shape \(1, 160\); found \(2, 160\)",
        ),
        (dict(num_tables=0), "num_tables must be at least 1; found 0"),
        (dict(labels=torch.tensor([[1, 160]])), r"labels must lie in 0\.\.159 or be -100; found 160"),
        (dict(attention_mask=torch.ones(1, 3)), "attention_mask must cover 2 tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_faulty_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build()(**{"input_ids": torch.tensor([[1, 3]]), **arguments})


def test_more_symbols_than_a_canonical_table_has():
    model: LexinvariantForCausalLM = build(table="canonical", canonical_size=4)
    model(torch.tensor([[9, 8, 7, 6, 9]]))
    with pytest.raises(ValueError, match="holds 5 different symbols, but canonical_size is 4"):
        model(torch.tensor([[9, 8, 7, 6, 5]]))


@torch.no_grad()
def test_embeddings_need_ids_where_occurrence_decides():
    model = build(unseen_logits="collapsed")
    with pytest.raises(ValueError, match="input_ids are needed"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend_self", [True, False])
@torch.no_grad()
def test_weights_of_eager_attention(attend_self):
    """They sum to 1 over real tokens that came before; positions that see none have no output."""
    model = build(attention="eager", attend_self=attend_self)
    inputs = CASE.batch(AUTO_CLASS, padding_side="left")
    outputs = model(**inputs, output_attentions=True)
    batch_size, length = inputs["input_ids"].shape
    real = inputs["attention_mask"].bool()
    diagonal = 0 if attend_self else -1
    allowed = torch.ones(length, length).tril(diagonal).bool() & real[:, None]
    seeing = allowed.any(-1)
    assert len(outputs.attentions) == model.config.num_hidden_layers
    for weights in outputs.attentions:
        assert weights.shape == (batch_size, model.config.num_attention_heads, length, length)
        kept = weights.masked_fill(~allowed[:, None], 0).sum(-1).transpose(1, 2)[seeing]
        torch.testing.assert_close(kept, torch.ones_like(kept), atol=1e-6, rtol=0)
    other = build(attend_self=attend_self)(**inputs)
    assert other.attentions is None
    torch.testing.assert_close(other.logits[real], outputs.logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("attend_self", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@torch.no_grad()
def test_half_precision_does_not_overflow(attention, attend_self, qk_norm):
    """Masked scores lie near the end of float16's range, and positions that see nothing must not become NaN."""
    inputs = CASE.batch(AUTO_CLASS, padding_side="left")
    real = inputs["attention_mask"].bool()
    fields = dict(attention=attention, attend_self=attend_self, qk_norm=qk_norm, unseen_logits="collapsed")
    model = build(**fields)
    for layer in model.model.layers:
        layer.self_attn.relative_attention_bias.weight.fill_(-60.0)
        if qk_norm:
            layer.self_attn.attn_scale.fill_(4.0)
    expected = model(**inputs).logits[real]
    found = model.half()(**inputs).logits
    assert found.isfinite().all()
    torch.testing.assert_close(found[real], expected, atol=0.02, rtol=0.02)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_of_the_user_s_own(accumulation, tmp_path):
    """transformers' `Trainer` and its collator, nothing of ours: batches of two, or one after the other, whose rows
    count by their tokens, make the same step."""
    rows = [{"input_ids": row.tolist(), "lex_seeds": int(row.sum())} for row in CASE.rows((9, 4))]

    def collate(features):
        ids = [torch.tensor(row["input_ids"]) for row in features]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        mask = (padded != -100).long()
        seeds = torch.tensor([row["lex_seeds"] for row in features])
        return dict(input_ids=padded.clamp(min=0), labels=padded, attention_mask=mask, lex_seeds=seeds)

    model = build()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2 // accumulation, max_steps=1, report_to=[],
        gradient_accumulation_steps=accumulation, learning_rate=0.1, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=0.0, logging_steps=1, save_strategy="no", remove_unused_columns=False, use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    expected = build().train()
    loss = expected(**collate(rows)).loss
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)
    for (name, found), parameter in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(found, parameter - 0.1 * parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_the_sampled_loss_without_logits():
    """One sequence after the other, against cross-entropy of all logits; also where a table is too large for that."""
    model, inputs = build(), batch()
    labels = inputs["input_ids"]
    losses = {}
    for kept in (True, False):
        model.zero_grad()
        losses[kept] = model(**inputs, labels=labels, skip_logits=not kept).loss
        losses[kept].backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        if kept:
            expected = gradients
    torch.testing.assert_close(losses[False], losses[True], atol=1e-5, rtol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
