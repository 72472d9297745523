"""The lexinvariant model against an independent float64 reference, at the tolerances of the fixtures' README."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rarezoo import LexinvariantConfig, LexinvariantForCausalLM
from rarezoo.lexinvariant.modeling_lexinvariant import resolve_symbols
from rarezoo.lexinvariant.symbol_rows import mix, random_rows, row_states
from rarezoo.lexinvariant.symbol_tables import MixedTable, StoredTable

FIXTURES = Path(__file__).parent / "fixtures" / "lexinvariant"
TAGS = ("default", "t5style", "strict")


def read(name):
    return load_file(FIXTURES / f"{name}.safetensors")


def build(tag, attention="sdpa", **fields):
    content = json.loads((FIXTURES / f"config_{tag}.json").read_text())
    del content["model_type"]
    config = LexinvariantConfig(**{**content, **fields})
    model = LexinvariantForCausalLM._from_config(config, attn_implementation=attention)
    model.load_state_dict(read(f"model_{tag}"), strict=True)
    return model.eval()


def close(found, expected, atol=1e-5, rtol=0.0):
    torch.testing.assert_close(found, expected.reshape(found.shape), atol=atol, rtol=rtol)


def token_losses(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.fixture(params=TAGS)
def tag(request):
    return request.param


@pytest.fixture
def plain(tag):
    return read(f"{tag}_plain")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_plain(tag, plain, attention):
    model, ids = build(tag, attention), plain["input_ids"]
    outputs = model(ids, embedding_table=plain["embedding_tables"], labels=ids, output_hidden_states=True)
    for number, hidden in enumerate(outputs.hidden_states):
        close(hidden, plain[f"hidden_states.{number}"])
    last = model.model(ids, embedding_table=plain["embedding_tables"]).last_hidden_state
    close(last, plain["last_hidden_state"])
    close(outputs.logits, plain["logits"])
    close(token_losses(outputs.logits, ids), plain["token_nll"])
    close(outputs.loss, plain["loss"])
    outputs.loss.backward()
    parameters = dict(model.named_parameters())
    compared = [name for name in plain if name.startswith("grad.")]
    assert len(compared) >= 8
    for name in compared:
        close(parameters[name.removeprefix("grad.")].grad, plain[name], rtol=1e-4)


@torch.no_grad()
def test_collapsed(tag, plain):
    model, ids = build(tag, unseen_logits="collapsed"), plain["input_ids"]
    outputs = model(ids, embedding_table=plain["embedding_tables"], labels=ids)
    close(outputs.logits, plain["collapsed_logits"])
    close(token_losses(outputs.logits, ids), plain["collapsed_token_nll"])
    close(outputs.loss, plain["collapsed_token_nll"].mean())
    # "seen" is the fixture's word for what must not be replaced.
    close(outputs.logits[plain["seen"]], plain["logits"][plain["seen"]])


@torch.no_grad()
def test_relabel(tag, plain):
    relabel = read(f"{tag}_relabel")
    permutation = relabel["permutation"]
    assert torch.equal(permutation[plain["input_ids"]], relabel["input_ids"])
    tables = torch.empty_like(plain["embedding_tables"])
    tables[:, permutation] = plain["embedding_tables"]
    outputs = build(tag)(relabel["input_ids"], embedding_table=tables, labels=relabel["input_ids"])
    close(outputs.logits, relabel["logits"])
    close(outputs.logits[..., permutation], plain["logits"])
    close(outputs.loss, relabel["loss"])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(tag, plain, side):
    padding = {name.removeprefix(f"{side}."): tensor for name, tensor in read(f"{tag}_padding").items()}
    ids, mask = padding["input_ids"], padding["attention_mask"]
    outputs = build(tag)(ids, attention_mask=mask, embedding_table=plain["embedding_tables"], labels=ids)
    close(outputs.logits * mask[..., None], padding["logits"])
    close(token_losses(outputs.logits, ids) * mask[:, 1:] * mask[:, :-1], padding["token_nll"])
    close(outputs.loss, padding["loss"])


def test_shared_permuted(tag, plain):
    shared, ids = read(f"{tag}_shared_permuted"), plain["input_ids"]
    model = build(tag)
    outputs = model(ids, embedding_table=shared["shared_table"], permutations=shared["permutations"], labels=ids)
    close(outputs.logits, shared["logits"])
    close(token_losses(outputs.logits, ids), shared["token_nll"])
    close(outputs.loss, shared["loss"])
    outputs.loss.backward()
    name = "model.layers.0.self_attn.q_proj.weight"
    close(dict(model.named_parameters())[name].grad, shared[f"grad.{name}"], rtol=1e-4)


@torch.no_grad()
def test_semi_lexinvariant(tag, plain):
    semi, ids, model = read(f"{tag}_semi"), plain["input_ids"], build(tag)
    mixed = MixedTable(StoredTable(semi["learned_table"]), StoredTable(plain["embedding_tables"]), semi["randomized"])
    every = torch.arange(model.config.vocab_size).expand(len(ids), -1)
    outputs = model(ids, embedding_table=mixed.rows(every), labels=ids)
    close(outputs.logits, semi["mixed_logits"])
    close(outputs.loss, semi["mixed_loss"])
    hidden = model.model(ids, embedding_table=mixed.rows(every)).last_hidden_state
    close(mixed.products(hidden) * model.config.hidden_size**-0.5, semi["mixed_logits"])

    subset = {"embedding_table": semi["learned_table"], "permutations": semi["subset_permutations"]}
    outputs = model(ids, **subset, labels=ids)
    close(outputs.logits, semi["subset_logits"])
    close(outputs.loss, semi["subset_loss"])
    # As the configuration draws them: selected symbols change places among themselves.
    assert torch.equal(semi["subset_permutations"].sort(1).values, every)


@torch.no_grad()
def test_seeded(tag, plain):
    seeded, model = read(f"{tag}_seeded"), build(tag)
    seeds, prompt = seeded["lex_seeds"], seeded["prompt_ids"]
    tokens = torch.arange(seeded["tables"].shape[1]).expand(len(seeds), -1)
    close(random_rows(seeds[:, None], tokens, model.config.hidden_size), seeded["tables"])
    ids = plain["input_ids"][: len(seeds), : seeded["logits"].shape[1]]
    outputs = model(ids, lex_seeds=seeds, labels=ids)
    close(outputs.logits, seeded["logits"], atol=1e-4)
    close(outputs.loss, seeded["loss"], atol=1e-4)

    padded = torch.nn.functional.pad(prompt, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (3, 0))
    for use_cache in (True, False):
        options = dict(lex_seeds=seeds, max_new_tokens=12, do_sample=False, use_cache=use_cache)
        assert torch.equal(model.generate(prompt, **options), seeded["greedy_ids"])
        found = model.generate(padded, attention_mask=mask, **options)
        assert torch.equal(found[:, 3:], seeded["greedy_ids"])


@torch.no_grad()
def test_canonical_ranks(tag):
    given = json.loads((FIXTURES / f"{tag}_canonical.json").read_text())
    embedding = build(tag, table="canonical", canonical_size=32).model.embed_tokens
    ids, ranks = torch.tensor(given["input_ids"]), torch.tensor(given["first_occurrence_ranks"])
    rows = embedding.canonical_rows(ids.device)
    assert torch.equal(resolve_symbols(embedding, ids).rows, rows[ranks])
    # Padding, wherever it stands, is no symbol.
    padded, mask = (torch.nn.functional.pad(part, (2, 0)) for part in (ids, torch.ones_like(ids)))
    assert torch.equal(resolve_symbols(embedding, padded, mask).rows[:, 2:], rows[ranks])


@pytest.mark.parametrize("number", range(len(json.loads((FIXTURES / "sm64.json").read_text()))))
def test_generator(number):
    case = json.loads((FIXTURES / "sm64.json").read_text())[number]
    signed = int(case["seed"]) % 2**64
    seed = torch.tensor(signed - 2**64 if signed >= 2**63 else signed)
    tokens = torch.tensor(case["tokens"])
    states = row_states(seed, tokens, case["table"])
    assert [f"{state % 2**64:016x}" for state in states.tolist()] == case["row_state_hex"]
    firsts = mix(states + (0x9E3779B97F4A7C15 - 2**64))
    assert [f"{state % 2**64:016x}" for state in firsts.tolist()] == case["x0_hex"]
    close(random_rows(seed, tokens, case["dim"], case["table"]).double(), torch.tensor(case["rows"]).double())
