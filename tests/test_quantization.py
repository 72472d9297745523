"""`quantize`: every scheme saved, reloaded and compared; what stays in full precision; errors; the fidelity report."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.sparse import csr_matrix
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoProcessor

from rarezoo import FAMILIES
from rarezoo.mistral_splade import (
    MistralSpladeConfig,
    MistralSpladeForMaskedLM,
    MistralSpladeForRetrieval,
    MistralSpladeProcessor,
)
from rarezoo.quantization import EvaluationSet, quantize, save_quantized
from rarezoo.quantization.fidelity import compare_embeddings, compare_runs, rank, sample_documentation
from rarezoo.retrieval import evaluate_run

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

TEXTS = ["the cat sat on the mat", "a dog barks at night in the town", "rain", "", "sun and moon and stars"]
# Largest relative L2 error of the vectors of a random model; int8 rows lose far less than 4-bit blocks.
LARGEST_ERROR = {"nf4": 0.4, "nf4-double": 0.4, "fp4": 0.5, "fp4-double": 0.5, "bf16": 0.03}
QUANTIZED_LINEARS = 7 * 2


def write_checkpoint(folder, tokenizer, model_class=MistralSpladeForRetrieval, **fields):
    torch.manual_seed(0)
    config = MistralSpladeConfig(**{
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 192, "attention_mode": "echo", "pad_token_id": 0,
        **fields,
    })  # fmt: skip
    model = model_class(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    model.save_pretrained(folder)
    MistralSpladeProcessor(tokenizer, attention_mode="echo").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    return write_checkpoint(tmp_path_factory.mktemp("full") / "checkpoint", tokenizer)


def encode(model, folder, texts=TEXTS):
    return model.eval().encode_documents(texts, processor=AutoProcessor.from_pretrained(folder), output="dense")


@pytest.fixture(scope="module")
def full_precision(checkpoint):
    return encode(AutoModel.from_pretrained(checkpoint), checkpoint)


def stored_dtypes(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).dtype for name in file.keys()}


@pytest.mark.parametrize(
    "scheme, compute_dtype",
    [
        ("nf4", "float32"),
        ("nf4", "bfloat16"),
        ("nf4-double", "bfloat16"),
        ("fp4", "bfloat16"),
        ("fp4-double", "float32"),
        ("int8", "float32"),
        ("int8", "bfloat16"),
        ("int8-torchao", "bfloat16"),
        ("int8-torchao-dynamic", "float32"),
    ],
)
def test_saves_and_reloads_equal(checkpoint, full_precision, tmp_path, scheme, compute_dtype):
    report = quantize(checkpoint, tmp_path / "out", scheme, compute_dtype, fidelity=False)

    assert report["quantized_modules"] == QUANTIZED_LINEARS
    assert report["full_precision_modules"] == ["embeddings", "lm_head"]
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert isinstance(model, MistralSpladeForRetrieval)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == getattr(torch, compute_dtype)
    assert stored_dtypes(tmp_path / "out")["lm_head.weight"] == getattr(torch, compute_dtype)

    found = encode(model, tmp_path / "out")
    error = ((found - full_precision).norm() / full_precision.norm()).item()
    assert 0 < error < LARGEST_ERROR.get(scheme, 0.1)

    save_quantized(model, tmp_path / "again")
    assert torch.equal(encode(model, tmp_path / "out"), found), "saving changed the live model"
    assert torch.equal(encode(AutoModel.from_pretrained(tmp_path / "again"), tmp_path / "out"), found)


def test_bf16(checkpoint, full_precision, tmp_path):
    report = quantize(checkpoint, tmp_path / "out", "bf16", fidelity=False)
    assert set(stored_dtypes(tmp_path / "out").values()) == {torch.bfloat16}
    assert (report["quantized_modules"], report["full_precision_modules"]) == (0, [])
    found = encode(AutoModel.from_pretrained(tmp_path / "out"), tmp_path / "out")
    assert 0 < ((found - full_precision).norm() / full_precision.norm()).item() < LARGEST_ERROR["bf16"]


def test_four_bit_values_are_the_definition(checkpoint, tmp_path):
    """The file's codes and scales against block quantization written out here: the nearest code of weight / absmax."""
    from bitsandbytes.functional import get_4bit_type

    quantize(checkpoint, tmp_path / "out", "nf4", fidelity=False)
    name = "model.layers.0.self_attn.q_proj.weight"
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        blocks = file.get_tensor(name).double().reshape(-1, 64)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        packed, absmax = file.get_tensor(name).reshape(-1), file.get_tensor(f"{name}.absmax")
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scales)[..., None] - get_4bit_type("nf4", device="cpu").double()).abs().argmin(-1)
    assert (codes != nearest).float().mean() < 1e-3, "only ties may fall to the other side"
    assert torch.allclose(absmax.double(), scales.squeeze(1), rtol=1e-6)


def test_keeps_the_saved_head_and_its_companions(tokenizer, tmp_path):
    source = write_checkpoint(tmp_path / "source", tokenizer, MistralSpladeForMaskedLM)
    (source / "1_SpladePooling").mkdir()
    (source / "1_SpladePooling" / "config.json").write_text('{"pooling_strategy": "max"}')
    modules = [{"path": "", "type": "Transformer"}, {"path": "1_SpladePooling", "type": "SpladePooling"}]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "lora").mkdir()
    (source / "lora" / "adapter_config.json").write_text("{}")
    (source / "evaluation.json").write_text("{}")
    (source / "checkpoint-10").mkdir()

    quantize(source, tmp_path / "out", "nf4", fidelity=False)

    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MistralSpladeForMaskedLM"]
    assert isinstance(AutoModelForMaskedLM.from_pretrained(tmp_path / "out"), MistralSpladeForMaskedLM)
    assert (tmp_path / "out" / "1_SpladePooling" / "config.json").read_text() == '{"pooling_strategy": "max"}'
    assert json.loads((tmp_path / "out" / "modules.json").read_text()) == modules
    assert (tmp_path / "out" / "lora" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "evaluation.json").exists(), "figures of the full-precision model"
    assert not (tmp_path / "out" / "checkpoint-10").exists()


def test_tied_head(tokenizer, tmp_path):
    source = write_checkpoint(tmp_path / "source", tokenizer, tie_word_embeddings=True)
    expected = encode(AutoModel.from_pretrained(source), source)
    for scheme in ("nf4", "int8", "int8-torchao"):
        quantize(source, tmp_path / scheme, scheme, fidelity=False)
        model = AutoModel.from_pretrained(tmp_path / scheme)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        found = encode(model, source)
        assert 0 < ((found - expected).norm() / expected.norm()).item() < LARGEST_ERROR.get(scheme, 0.1)
        save_quantized(model, tmp_path / f"{scheme}-again")
        assert torch.equal(encode(AutoModel.from_pretrained(tmp_path / f"{scheme}-again"), source), found)


def test_loads_without_the_package(checkpoint, tmp_path, run_without_rarezoo):
    for scheme in ("nf4-double", "int8-torchao"):
        quantize(checkpoint, tmp_path / scheme, scheme, "bfloat16", fidelity=False)
    printed = run_without_rarezoo(f"""
        import torch
        from transformers import AutoModel, AutoProcessor
        for scheme in ("nf4-double", "int8-torchao"):
            folder = {str(tmp_path)!r} + "/" + scheme
            model = AutoModel.from_pretrained(folder, trust_remote_code=True)
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            torch.save(model.encode_documents({TEXTS!r}, processor=processor, output="dense"), folder + "/vectors.pt")
            print(type(model).__module__.split(".")[0])
    """)
    assert printed.split() == ["transformers_modules"] * 2
    for scheme in ("nf4-double", "int8-torchao"):
        folder = tmp_path / scheme
        expected = encode(AutoModel.from_pretrained(folder), folder)
        assert torch.equal(torch.load(folder / "vectors.pt"), expected)


def test_lora_trains_on_a_quantized_checkpoint(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    for scheme in ("nf4", "int8"):
        quantize(checkpoint, tmp_path / scheme, scheme, fidelity=False)
        torch.manual_seed(0)
        base = AutoModel.from_pretrained(tmp_path / scheme)
        targets = list(FAMILIES["mistral_splade"].lora_target_modules)
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        inputs = AutoProcessor.from_pretrained(tmp_path / scheme).process_documents(TEXTS[:3])
        target = torch.rand(3, base.config.vocab_size)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        model.train()
        for _ in range(6):
            loss = (model(**inputs).sparse_embedding - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0], (scheme, losses)

        model.eval()
        with torch.no_grad():
            expected = model(**inputs).sparse_embedding
        model.save_pretrained(tmp_path / f"{scheme}-adapter")
        fresh = peft.PeftModel.from_pretrained(
            AutoModel.from_pretrained(tmp_path / scheme), tmp_path / f"{scheme}-adapter"
        ).eval()
        with torch.no_grad():
            assert torch.allclose(fresh(**inputs).sparse_embedding, expected, atol=1e-5)


def test_leaves_alone_what_four_bit_kernels_refuse(tokenizer, tmp_path):
    source = write_checkpoint(tmp_path / "source", tokenizer, intermediate_size=160)
    report = quantize(source, tmp_path / "out", "nf4", fidelity=False)
    downs = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert sorted(report["full_precision_modules"]) == sorted(["embeddings", "lm_head", *downs])
    assert report["quantized_modules"] == QUANTIZED_LINEARS - 2
    model = AutoModel.from_pretrained(tmp_path / "out")
    found = encode(model, source)
    save_quantized(model, tmp_path / "again")
    assert torch.equal(encode(AutoModel.from_pretrained(tmp_path / "again"), source), found)
    assert quantize(source, tmp_path / "int8", "int8", fidelity=False)["quantized_modules"] == QUANTIZED_LINEARS


def test_refuses_with_one_clear_error(checkpoint, splade_checkpoint, tmp_path):
    def refused(error, match, *arguments, **options):
        with pytest.raises(error, match=match):
            quantize(*arguments, fidelity=False, **options)

    refused(FileNotFoundError, "no config.json", tmp_path / "nowhere", tmp_path / "out")
    refused(ValueError, "unknown scheme 'q4'; known schemes: nf4, ", checkpoint, tmp_path / "out", "q4")
    refused(ValueError, "must be float32 or bfloat16; found float16", checkpoint, tmp_path / "out", "nf4", "float16")
    refused(ValueError, "must be bfloat16; found float32", checkpoint, tmp_path / "out", "bf16", "float32")
    refused(ValueError, "can quantize none of the", splade_checkpoint, tmp_path / "out", "nf4")
    quantize(checkpoint, tmp_path / "quantized", "int8", fidelity=False)
    refused(ValueError, "quantized already .by bitsandbytes.", tmp_path / "quantized", tmp_path / "out", "nf4")
    refused(FileExistsError, "not an empty folder", checkpoint, tmp_path / "quantized", "nf4")
    AutoModel.from_pretrained(checkpoint).model.save_pretrained(tmp_path / "backbone")
    refused(ValueError, "MistralSpladeModel; expected MistralSplade", tmp_path / "backbone", tmp_path / "out", "nf4")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    refused(ValueError, "type 'bert'; known families: mistral_splade", foreign, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "foreign", "quantized"]


def test_names_the_missing_package_before_anything_long(checkpoint, tmp_path, monkeypatch):
    from importlib import util

    find_spec = util.find_spec
    evaluation = EvaluationSet({"q": "?"}, {"d": "x"}, {"q": {"d": 1}})
    for absent, extra, scheme in (("bitsandbytes", "quant", "int8"), ("torchao", "quant", "int8-torchao"),
                                  ("ir_measures", "eval", "bf16")):  # fmt: skip
        monkeypatch.setattr(util, "find_spec", lambda name, absent=absent: None if name == absent else find_spec(name))
        with pytest.raises(ImportError, match=rf"needs the package {absent}: pip install 'rarezoo\[{extra}\]'"):
            quantize(checkpoint, tmp_path / "out", scheme, evaluation=evaluation)
        assert list(tmp_path.iterdir()) == []


def test_leaves_nothing_behind_when_the_source_is_damaged(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Exception, match=r"(?i)safetensor|header|deserializ"):
        quantize(tmp_path / "damaged", tmp_path / "out", "nf4", fidelity=False)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_fidelity_report(checkpoint, full_precision, tmp_path):
    documents = {f"d{i}": text for i, text in enumerate(sample_documentation(12))}
    evaluation = EvaluationSet(
        {"q1": "absolute value of a number", "q2": "true if all are true"},
        documents,
        {"q1": {"d0": 1}, "q2": {"d2": 2}},
    )
    report = quantize(checkpoint, tmp_path / "out", "nf4", "bfloat16", evaluation, TEXTS)

    assert report == json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    quantized = encode(AutoModel.from_pretrained(tmp_path / "out"), tmp_path / "out").double()
    cosines = torch.cosine_similarity(full_precision.double(), quantized)
    assert report["outputs"]["texts"] == len(TEXTS)
    assert report["outputs"]["cosine_mean"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert report["outputs"]["cosine_minimum"] == pytest.approx(cosines.min().item(), abs=1e-6)
    files = report["file_bytes"]
    assert files["full_precision"] == (checkpoint / "model.safetensors").stat().st_size
    assert files["ratio"] == (tmp_path / "out" / "model.safetensors").stat().st_size / files["full_precision"] < 0.4
    assert report["resident_bytes"]["quantized"] > 0
    assert report["encode_milliseconds"]["quantized"] > 0
    assert report["retrieval"]["queries"] == 2 and report["retrieval"]["documents"] == 12
    page = (tmp_path / "out" / "quantization_report.md").read_text()
    assert f"| nDCG@10 | {report['retrieval']['nDCG@10']['full_precision']:.4f} |" in page
    assert "Not quantized: embeddings, lm_head." in page


def test_compare_embeddings_against_numbers_by_hand():
    first = csr_matrix(np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    second = csr_matrix(np.array([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    found = compare_embeddings(first, second)
    assert found["cosine_mean"] == pytest.approx((9 / 25 + 1 + 0) / 3)
    assert found["cosine_minimum"] == 0
    assert found["relative_error"] == pytest.approx(np.sqrt((16 + 16 + 1 + 4) / 26))
    assert found["top_10_term_overlap"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found["active_dimensions"] == {"full_precision": 1.0, "quantized": 1.0}
    with pytest.raises(ValueError, match="not finite"):
        compare_embeddings(first, csr_matrix(np.full((3, 3), np.nan)))


class Table:
    """A retriever that looks its vectors up by text."""

    def __init__(self, vectors):
        self.vectors = vectors

    def encode_queries(self, texts, **_):
        return csr_matrix(np.array([self.vectors[text] for text in texts]))

    encode_documents = encode_queries


def test_compare_runs_against_numbers_by_hand():
    evaluation = EvaluationSet({"q": "?"}, {"a": "x", "b": "y", "c": "z"}, {"q": {"b": 1}})
    good = Table({"?": [1.0, 0.0], "x": [1.0, 0.0], "y": [2.0, 0.0], "z": [0.0, 3.0]})
    worse = Table({**good.vectors, "x": [2.0, 0.0], "y": [1.0, 0.0]})
    runs = [rank(model, None, evaluation) for model in (good, worse)]
    assert runs[0] == {"q": {"b": 2.0, "a": 1.0}}
    found = compare_runs(*runs, evaluation)
    assert found["nDCG@10"]["full_precision"] == pytest.approx(1.0)
    assert found["nDCG@10"]["quantized"] == pytest.approx(1 / np.log2(3))
    assert found["nDCG@10"]["change"] == pytest.approx(1 / np.log2(3) - 1)
    assert found["top_10_document_overlap"] == 1.0


def test_ranking_leaves_out_what_was_not_found():
    """Documents without a common term, the query's own document, queries without judgements; ties as in trec_eval."""
    nothing = EvaluationSet({"q": ""}, {f"d{i}": "paris" for i in range(5)}, {"q": {"d4": 1}})
    silent = Table({"": [0.0], "paris": [1.0]})
    runs = [rank(silent, None, nothing)] * 2
    assert runs[0] == {"q": {}}
    with pytest.warns(UserWarning, match="1 of 1 judged queries have no results and count as 0: 'q'"):
        assert compare_runs(*runs, nothing)["nDCG@10"]["full_precision"] == 0

    queries = {"d1": "?", "unjudged": "?", "lost": ""}
    evaluation = EvaluationSet(queries, nothing.documents, {"d1": {"d3": 1}, "lost": {"d0": 1}, "absent": {"d0": 1}})
    model = Table({**silent.vectors, "?": [2.0]})
    run = rank(model, None, evaluation)
    assert list(run) == ["d1", "lost"] and list(run["d1"]) == ["d4", "d3", "d2", "d0"]
    with pytest.warns(UserWarning, match="2 of 3 judged queries have no results and count as 0: 'lost', 'absent'"):
        found = compare_runs(run, run, evaluation)
    assert found["queries"] == 2
    assert found["nDCG@10"]["full_precision"] == pytest.approx(1 / np.log2(3) / 3)
    with pytest.warns(UserWarning, match="2 of 3 judged queries have no results"):
        measured = evaluate_run(run, evaluation.qrels, ["nDCG@10"])
    assert found["nDCG@10"]["quantized"] == pytest.approx(measured["nDCG@10"])


def test_evaluation_set_without_judgements():
    with pytest.raises(ValueError, match="no query of the evaluation set has a relevance judgement"):
        EvaluationSet({"q1": "?"}, {"d": "x"}, {"1": {"d": 1}})
    with pytest.raises(ValueError, match="found 0 queries and 1 documents"):
        EvaluationSet({}, {"d": "x"}, {})


def test_fidelity_of_several_vectors_per_text(colbert_fixtures, tmp_path):
    """Token by token, and by the order of MaxSim; the head stays in full precision, retrieval is that of `eval`."""
    from rarezoo import ColBERTXMConfig, ColBERTXMForRetrieval, ColBERTXMProcessor
    from rarezoo.quantization.fidelity import rank as rank_documents

    torch.manual_seed(0)
    config = ColBERTXMConfig(
        vocab_size=165, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=130, languages=["en_XX", "fr_XX"], dim=32, initializer_range=0.2,
    )  # fmt: skip
    model = ColBERTXMForRetrieval(config).eval()
    processor = ColBERTXMProcessor.from_pretrained(colbert_fixtures / "checkpoint")
    model.save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")
    documents = {"paris": "the capital of france is paris", "moon": "the moon pulls the sea", "rain": "rain"}
    evaluation = EvaluationSet({"q": "what is the capital?"}, documents, {"q": {"paris": 1}})
    report = quantize(tmp_path / "full", tmp_path / "nf4", "nf4", evaluation=evaluation)
    quantized = ColBERTXMForRetrieval.from_pretrained(tmp_path / "nf4").eval()
    texts = list(documents.values())
    first, second = (torch.cat(network.encode_documents(texts, processor)) for network in (model, quantized))
    cosines = (first * second).sum(1)
    outputs = report["outputs"]
    assert outputs["vectors"] == len(first)
    assert outputs["cosine_mean"] == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert outputs["cosine_minimum"] == pytest.approx(float(cosines.min()), abs=1e-5)
    assert outputs["relative_error"] == pytest.approx(float((first - second).norm() / first.norm()), abs=1e-5)
    assert -1 <= outputs["score_rank_correlation"] <= 1
    scores = model.score(
        model.encode_queries("what is the capital?", processor), model.encode_documents(texts, processor)
    )
    rank = int((scores[0] > scores[0, 0]).sum())
    assert report["retrieval"]["nDCG@10"]["full_precision"] == pytest.approx(1 / math.log2(2 + rank), abs=1e-6)
    french = dataclasses.replace(evaluation, language="fr")
    found = rank_documents(model, processor, french)["q"]
    expected = model.score(
        model.encode_queries("what is the capital?", processor, language="fr"),
        model.encode_documents(texts, processor, language="fr"),
    )
    assert found == pytest.approx(dict(zip(documents, expected[0].tolist())), abs=1e-5)
    assert found != pytest.approx(dict(zip(documents, scores[0].tolist())), abs=1e-2)
    assert quantized.linear.weight.dtype == torch.float32
    assert "rank correlation of MaxSim scores" in (tmp_path / "nf4" / "quantization_report.md").read_text()
