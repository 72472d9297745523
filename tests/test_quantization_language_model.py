"""`quantize` of causal language models: next-token distributions, the tokenizer, and the command with its defaults."""

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import rarezoo
from rarezoo.lexinvariant.character_tokenizer import character_tokenizer
from rarezoo.model_cards import build_card
from rarezoo.quantization import EvaluationSet, quantize
from rarezoo.quantization.next_token_fidelity import compare_next_tokens, random_tokens, tokenized

from .commands import call

pytest.importorskip("bitsandbytes")

TEXTS = ["A->2\nB->3\nA->2", "x y x y x y", "z"]
TABLES = {"gaussian": "collapsed", "learned": "sampled"}


def write_checkpoint(folder, table="gaussian", tokenizer=True, **fields):
    torch.manual_seed(0)
    settings = {"vocab_size": 130, "table": table, "pad_token_id": 128, "unseen_logits": TABLES[table], **fields}
    model = AutoModelForCausalLM.from_config(rarezoo.load_preset("lexinvariant", "tiny", **settings))
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
    model.save_pretrained(folder)
    if tokenizer:
        character_tokenizer().save_pretrained(folder)
    return folder


def expected_figures(folders, rows):
    """By the definitions, in float64."""
    losses, divergences, same = {"full": [], "small": []}, [], []
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    for row in rows:
        with torch.no_grad():
            first, second = (model(row[None]).logits[0, :-1].double() for model in models)
        for name, logits in (("full", first), ("small", second)):
            losses[name].append(cross_entropy(logits, row[1:], reduction="none"))
        p, q = first.softmax(1), second.softmax(1)
        divergences.append((p * (p / q).log()).sum(1))
        same.append(first.argmax(1) == second.argmax(1))
    perplexities = [math.exp(torch.cat(values).mean()) for values in losses.values()]
    return perplexities, torch.cat(divergences), torch.cat(same).double().mean().item()


@pytest.mark.parametrize("table", TABLES)
def test_report(tmp_path, table):
    source = write_checkpoint(tmp_path / "full", table)
    report = quantize(source, tmp_path / "nf4", "nf4", sample_texts=TEXTS)
    assert report == json.loads((tmp_path / "nf4" / "quantization_report.json").read_text())
    rows = [torch.tensor([ord(character) for character in text]) for text in TEXTS[:2]]
    perplexities, divergence, same = expected_figures((source, tmp_path / "nf4"), rows)
    outputs = report["outputs"]
    assert (outputs["on"], outputs["texts"], outputs["tokens"]) == ("given texts", 2, sum(map(len, rows)) - 2)
    found = outputs["perplexity"]
    assert [found["full_precision"], found["quantized"]] == pytest.approx(perplexities, rel=1e-6)
    assert found["change"] == pytest.approx(perplexities[1] / perplexities[0] - 1, abs=1e-6)
    assert outputs["divergence_nats"]["mean"] == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert outputs["divergence_nats"]["maximum"] == pytest.approx(divergence.max().item(), rel=1e-4)
    assert outputs["divergence_nats"]["mean"] > 1e-6, "quantization changes something"
    assert outputs["top_1_agreement"] == pytest.approx(same)
    assert report["retrieval"] is None
    assert report["forward_milliseconds"]["tokens"] == max(map(len, rows))
    assert min(report["forward_milliseconds"]["quantized"], report["resident_bytes"]["quantized"]) > 0
    page = (tmp_path / "nf4" / "quantization_report.md").read_text()
    assert f"| perplexity | {perplexities[0]:.3f} | {perplexities[1]:.3f} |" in page
    assert f"the same at {same:.1%} of the positions" in page
    card = str(build_card(tmp_path / "nf4", repo_id="someone/nf4"))
    assert f"| perplexity (given texts) | {perplexities[0]:.3f} | {perplexities[1]:.3f} |" in card


def test_the_tokenizer_is_copied_byte_by_byte(tmp_path):
    source = write_checkpoint(tmp_path / "full")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    quantize(source, tmp_path / "bf16", "bf16", fidelity=False)
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    for name in names:
        assert (tmp_path / "bf16" / name).read_bytes() == (source / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bf16")
    assert tokenizer(TEXTS[0]).input_ids == [ord(character) for character in TEXTS[0]]


@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_command_with_its_defaults(tmp_path, tokenizer):
    source = write_checkpoint(tmp_path / "full", tokenizer=tokenizer)
    shown = call("quantize", source, tmp_path / "small").stdout
    origin = "documentation of Python's built-ins" if tokenizer else "random symbols"
    assert f"({origin}): perplexity" in shown
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert model.generate(torch.tensor([[5, 6, 5]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 6)


def test_the_command_with_texts(tmp_path):
    source = write_checkpoint(tmp_path / "full")
    (tmp_path / "texts.txt").write_text("\n".join(["x y x y x y", "aabbaabb"]))
    command = ("quantize", source, tmp_path / "small", "--scheme", "bf16", "--texts", tmp_path / "texts.txt", "--json")
    outputs = json.loads(call(*command).stdout)["outputs"]
    assert (outputs["on"], outputs["texts"], outputs["tokens"]) == ("given texts", 2, 10 + 7)


def test_refused_with_nothing_left_behind(tmp_path):
    source = write_checkpoint(tmp_path / "full", tokenizer=False)
    evaluation = EvaluationSet({"q": "?"}, {"d": "x"}, {"q": {"d": 1}})
    with pytest.raises(ValueError, match="a language model ranks no documents"):
        quantize(source, tmp_path / "out", "bf16", evaluation=evaluation)
    with pytest.raises(ValueError, match="has no tokenizer for the texts"):
        quantize(source, tmp_path / "out", "bf16", sample_texts=TEXTS)
    write_checkpoint(source, vocab_size=100)
    with pytest.raises(ValueError, match="gives the id 121, but the model has 100 tokens"):
        quantize(source, tmp_path / "out", "bf16", sample_texts=TEXTS)
    with pytest.raises(ValueError, match="none of the texts has two tokens"):
        quantize(source, tmp_path / "out", "bf16", sample_texts=["z", ""])
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="make no tokenizer"):
        quantize(source, tmp_path / "out", "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_model_equals_itself_and_differs_from_what_is_not_finite(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path / "full")).eval()
    outputs = compare_next_tokens(model, model, random_tokens(130))
    assert outputs["divergence_nats"] == {"mean": 0.0, "maximum": 0.0}
    assert outputs["perplexity"]["change"] == 0.0 and outputs["top_1_agreement"] == 1.0
    broken = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        compare_next_tokens(model, broken, random_tokens(130))


def test_large_vocabularies_are_read_in_part():
    """2^25 logits at once are 33 positions of a million symbols."""
    model = rarezoo.LexinvariantForCausalLM(
        rarezoo.load_preset("lexinvariant", "tiny", table="gaussian", unseen_logits="collapsed", vocab_size=1_000_000)
    ).eval()
    assert compare_next_tokens(model, model, random_tokens(1_000_000)[:1])["tokens"] == 2**25 // 1_000_000 - 1


def test_rows_have_a_largest_length():
    assert [len(row) for row in tokenized(character_tokenizer(), ["a" * 1000, "bc", "d"], 130)] == [256, 2]
