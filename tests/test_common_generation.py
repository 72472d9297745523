"""What transformers' own generation tests expect of a causal language model, for every family that generates.

Their file is not among the sources that transformers publishes, so the expectations are written out here: strategies,
outputs, caches, padding and the arguments that `generate` passes on. `tests/test_lexinvariant_generation.py` has what
is the family's own.
"""

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache, GenerationMixin

from rarezoo.auto import FAMILIES

from .cases import CASES, MODELS, VARIANTS, auto

AUTO_CLASS = "AutoModelForCausalLM"
NEW = 6
STRATEGIES = {
    "greedy": dict(),
    "sampling": dict(do_sample=True),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "beam_sampling": dict(num_beams=2, do_sample=True),
    "top_k": dict(do_sample=True, top_k=7, temperature=0.8),
    "top_p": dict(do_sample=True, top_p=0.7),
    "min_p": dict(do_sample=True, min_p=0.1),
    "no_repeats": dict(no_repeat_ngram_size=2, repetition_penalty=1.3),
}
GENERATING = [variant for variant in VARIANTS if variant[1] == AUTO_CLASS]


@pytest.fixture(params=GENERATING, ids="-".join)
def variant(request):
    """(case, model) of every variant of every family that generates."""
    family, _, name = request.param
    case = MODELS[family]
    return case, case.build(AUTO_CLASS, **case.variants[name])


@pytest.fixture(params=[family for family, case in MODELS.items() if AUTO_CLASS in case.heads])
def plain(request):
    """(case, model) of every family that generates."""
    case = MODELS[request.param]
    return case, case.build(AUTO_CLASS)


def generate(model, inputs, **options):
    torch.manual_seed(0)
    return model.generate(**inputs, **{"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options})


def one_row(case):
    return case.batch(AUTO_CLASS, case.rows((7,)))


def test_the_class_generates(plain):
    case, model = plain
    assert isinstance(model, GenerationMixin) and model.can_generate()
    assert not FAMILIES[case.family].model_class("AutoModel").can_generate()
    parameters = inspect.signature(model.forward).parameters
    assert {"past_key_values", "use_cache", "logits_to_keep", "labels", "inputs_embeds"} <= set(parameters)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_with_and_without_cache(plain, strategy):
    case, model = plain
    inputs = case.batch(AUTO_CLASS, padding_side="left")
    options = STRATEGIES[strategy]
    found = generate(model, inputs, **options)
    count = options.get("num_return_sequences", 1)
    assert found.shape == (len(inputs["input_ids"]) * count, inputs["input_ids"].shape[1] + NEW)
    assert torch.equal(found[::count, :-NEW], inputs["input_ids"])
    assert torch.equal(generate(model, inputs, use_cache=False, **options), found)


def test_greedy_is_the_best_of_the_logits(variant):
    """Step by step by hand, without a cache."""
    case, model = variant
    inputs = one_row(case)
    expected = dict(inputs)
    outputs = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    for step in range(NEW):
        with torch.no_grad():
            logits = model(**expected, use_cache=False).logits[:, -1]
        torch.testing.assert_close(outputs.logits[step], logits, atol=1e-4, rtol=1e-5)
        chosen = outputs.sequences[:, 7 + step]
        assert logits.max() - logits[0, chosen] < 1e-3
        expected["input_ids"] = torch.cat([expected["input_ids"], chosen[:, None]], dim=1)
        expected["attention_mask"] = torch.ones_like(expected["input_ids"])


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("use_cache", [True, False])
def test_outputs_as_a_dict(plain, beams, use_cache):
    case, model = plain
    model.set_attn_implementation("eager")
    inputs = case.batch(AUTO_CLASS, padding_side="left")
    batch, length = inputs["input_ids"].shape
    config = model.config
    outputs = generate(
        model, inputs, num_beams=beams, use_cache=use_cache, return_dict_in_generate=True,
        output_scores=True, output_logits=True, output_hidden_states=True, output_attentions=True,
    )  # fmt: skip
    assert len(outputs.scores) == len(outputs.logits) == len(outputs.attentions) == len(outputs.hidden_states) == NEW
    for step in range(NEW):
        new = length if step == 0 else 1 if use_cache else length + step
        assert outputs.logits[step].shape == (batch * beams, config.vocab_size)
        assert len(outputs.hidden_states[step]) == config.num_hidden_layers + 1
        assert outputs.hidden_states[step][0].shape == (batch * beams, new, config.hidden_size)
        expected = (batch * beams, config.num_attention_heads, new, length + step)
        assert [weights.shape for weights in outputs.attentions[step]] == [expected] * config.num_hidden_layers
    if not use_cache:
        assert outputs.past_key_values is None
        return
    cache = outputs.past_key_values
    assert isinstance(cache, DynamicCache) and len(cache.layers) == config.num_hidden_layers
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape
        assert layer.keys.shape[0] == batch * beams and layer.keys.shape[-2] == length + NEW - 1


def test_continuing_from_a_cache(variant):
    case, model = variant
    inputs = one_row(case)
    whole = generate(model, inputs)
    first = generate(model, inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
    ids = first.sequences
    rest = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for cache in (copy.deepcopy(first.past_key_values), None):
        found = generate(model, rest, past_key_values=cache, max_new_tokens=NEW - 2, min_new_tokens=NEW - 2)
        assert torch.equal(found, whole)


def test_left_padding_changes_nothing(variant):
    case, model = variant
    rows = case.rows((9, 5, 2))
    together = generate(model, case.batch(AUTO_CLASS, rows, "left"))
    for row, found in zip(rows, together):
        alone = generate(model, case.batch(AUTO_CLASS, [row]))
        assert torch.equal(found[-NEW:], alone[0, -NEW:])


@pytest.mark.parametrize("kind", ["prompt_lookup", "assistant", "itself"])
def test_assisted_decoding_gives_the_greedy_text(variant, kind):
    """With guesses from the prompt, from a model with other weights, and from one that is always right."""
    case, model = variant
    inputs = case.batch(AUTO_CLASS, [case.rows((6,))[0].repeat(2)])
    expected = generate(model, inputs, max_new_tokens=2 * NEW, min_new_tokens=2 * NEW)
    if kind == "prompt_lookup":
        options = dict(prompt_lookup_num_tokens=3)
    else:
        assistant = copy.deepcopy(model)
        if kind == "assistant":
            assistant.init_weights()
        assistant.generation_config.num_assistant_tokens = 3
        assistant.generation_config.assistant_confidence_threshold = 0.0
        options = dict(assistant_model=assistant)
    assert torch.equal(generate(model, inputs, max_new_tokens=2 * NEW, min_new_tokens=2 * NEW, **options), expected)


def test_assisted_sampling(plain):
    case, model = plain
    found = generate(model, one_row(case), do_sample=True, assistant_model=copy.deepcopy(model))
    assert found.shape == (1, 7 + NEW)


@pytest.mark.parametrize("beams", [1, 2])
def test_embeddings_instead_of_ids(plain, beams):
    case, model = plain
    inputs = one_row(case)
    expected = generate(model, inputs, num_beams=beams)
    embeds = case.embed(model.get_input_embeddings(), inputs)
    found = generate(model, {**inputs, "inputs_embeds": embeds}, num_beams=beams)
    assert torch.equal(found, expected)
    ids = inputs.pop("input_ids")
    found = generate(model, {**inputs, "inputs_embeds": embeds}, num_beams=beams)
    assert torch.equal(found, expected[:, ids.shape[1] :])


@torch.no_grad()
def test_logits_to_keep(variant):
    case, model = variant
    inputs = case.batch(AUTO_CLASS)
    whole = model(**inputs).logits
    for keep, expected in ((1, whole[:, -1:]), (3, whole[:, -3:]), (torch.tensor([0, 4]), whole[:, [0, 4]])):
        torch.testing.assert_close(model(**inputs, logits_to_keep=keep).logits, expected, atol=1e-5, rtol=1e-5)


def test_settings_are_saved(plain, tmp_path):
    case, model = plain
    model.generation_config.update(num_beams=2, max_new_tokens=4, min_new_tokens=4)
    stored = model if case.family in CASES else model.merge_and_unload()
    stored.save_pretrained(tmp_path)
    loaded = auto(AUTO_CLASS).from_pretrained(tmp_path)
    assert loaded.generation_config.num_beams == 2
    inputs = one_row(case)
    assert torch.equal(loaded.generate(**inputs), model.generate(**inputs))


def test_the_end_of_a_text(plain):
    """A row that has met its end is filled with padding while the others go on."""
    case, model = plain
    inputs = case.batch(AUTO_CLASS, padding_side="left")
    length = inputs["input_ids"].shape[1]
    free = generate(model, inputs)
    end = int(free[0, length + 1])
    found = generate(model, inputs, min_new_tokens=0, eos_token_id=end, pad_token_id=2)
    first = (free[0, length:] == end).int().argmax() + 1
    assert torch.equal(found[0, : length + first], free[0, : length + first])
    assert (found[0, length + first :] == 2).all()
