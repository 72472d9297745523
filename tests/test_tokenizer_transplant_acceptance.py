"""Tokenizer transplantation as a whole: every method between every two kinds of tokenizers, every kind of model through
the one call, and what is done with the result afterwards, in processes that do not have this package.

Expected rows are summed here in float64 from the report's own lines; expected answers are the base's.
"""

import copy
import hashlib
import inspect
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from rarezoo import TransplantedConfig, TransplantedForCausalLM
from rarezoo.tokenizer_transplant import (
    Vocabulary,
    method_names,
    mix,
    plan_transplant,
    transplant_checkpoint,
    transplant_tokenizer,
)

from .cases import FIXTURES
from .test_tokenizer_transplant_matching import SCHEMES, SPECIALS, byte_level, decoded_in_context, renamed
from .test_tokenizer_transplant_models import MODELS
from .test_tokenizer_transplant_parity import permuted_tokenizer

BASE, DONOR = (FIXTURES / "tokenizer_transplant" / name for name in ("base_model", "donor_model"))
SIZES = {"byte_level": 420, "metaspace": 560, "unigram": 300, "wordpiece": 380}
WIDTH, DONOR_WIDTH = 8, 12

METHODS = [
    ("tokenadapt", {}),
    ("tokenadapt", {"weight": 0.0}),
    ("tokenadapt", {"weight": 1.0, "threshold": 0.2}),
    ("retok", {}),
    ("fvt", {}),
    *(("subword", {"combination": name}) for name in ("mean", "sum", "first_last", "weighted_mean")),
    ("mapping", {"mapping": {}}),
    *((name, {}) for name in ("normal", "mean", "zero", "randn", "john_hewitt", "mean_resizing")),
    ("omp", {"k": 4}),
    *(
        ("common_interpolation", {"k": 4, "weight_scheme": scheme, "cosine_similarity": cosine})
        for scheme, cosine in [*itertools.product(("distance_proportional",), (False, True)), ("barycentric", False)]
    ),
    ("common_interpolation", {"k": 4, "weight_scheme": "least_squares"}),
    ("landmark_pca", {}),
    ("stb", {"k": 4}),
    ("mp_rope", {"k": 3, "donor_heads": 2, "base_heads": 2}),
    *((name, {}) for name in ("focus", "wechsel", "ofa", "clp")),
]  # fmt: skip


class Vectors:
    """Auxiliary vectors that depend on nothing but the string."""

    def vectors(self, strings):
        digests = [np.frombuffer(hashlib.sha256(string.encode()).digest(), np.uint8) for string in strings]
        return torch.from_numpy(np.stack(digests)).float() - 100, torch.ones(len(strings), dtype=torch.bool)


def table(rows, width, seed):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def trained():
    return {name: build(SIZES[name]) for name, build in SCHEMES.items()}


def test_the_package_tells_its_names_and_the_methods_their_options():
    from rarezoo import tokenizer_transplant

    assert {*tokenizer_transplant.__all__} <= {*dir(tokenizer_transplant)}
    for name in tokenizer_transplant.method_names():
        method = tokenizer_transplant.find_method(name)
        options = [one.name for one in inspect.signature(method).parameters.values() if one.kind is one.KEYWORD_ONLY]
        assert all(option in method.__doc__ for option in options), name


def test_a_fallback_is_a_list():
    with pytest.raises(TypeError, match=r"write \['mean'\]"):
        transplant_tokenizer(str(BASE), str(DONOR), "retok", fallback="mean")


def test_every_method_is_tried():
    assert {name for name, _ in METHODS} == set(method_names())


# --- every method, every pair of schemes ------------------------------------------------------------------------------


def combinations(lines, base_rows, which):
    """The report's lines as a dense float64 matrix `(rows, base rows)`, and which rows are no combination alone."""
    dense = torch.zeros(len(lines), base_rows, dtype=torch.float64)
    for line in lines:
        source = line.get("head", line) if which == "head" else line
        for base_id, weight in zip(source["base_ids"], source["weights"]):
            dense[line["id"], base_id] += weight
    other = torch.tensor([line["source"] in ("dense", "random", "mean", "padding") for line in lines])
    return dense, other


@pytest.mark.parametrize(("base", "new"), list(itertools.permutations(SCHEMES, 2)))
def test_every_method_between_every_two_schemes(base, new, trained):
    """Copies are those that decoding says they are, bit for bit; other rows are what the report says; all add up."""
    base_tokenizer, tokenizer = trained[base], trained[new]
    size = len(tokenizer)
    tables = table(len(base_tokenizer), WIDTH, 0), table(len(base_tokenizer), WIDTH, 1)
    donor = table(size, DONOR_WIDTH, 2), table(size, DONOR_WIDTH, 3)
    base_texts, new_texts = decoded_in_context(base_tokenizer), decoded_in_context(tokenizer)
    known = set(base_texts.values()) - {""}
    same = [i for i, text in new_texts.items() if text in known]
    assert len(same) > 60
    for method, options in METHODS:
        matrix, report = plan_transplant(
            base_tokenizer, tokenizer, *tables, method, donor_tables=donor, auxiliary=Vectors(), pad_to_multiple_of=64,
            **options,
        )  # fmt: skip
        assert sum(report.counts.values()) == len(matrix) == -(-size // 64) * 64
        assert report.counts["padding"] == len(matrix) - size and report.counts["special"] == len(SPECIALS)
        assert report.provenance["counts"] == report.counts
        new_tables = [matrix.apply(tables[0]), matrix.apply(tables[1], head=True)]
        assert all(rows.isfinite().all() for rows in new_tables)
        lines = list(report.rows())
        assert [line["id"] for line in lines] == list(range(len(matrix)))
        if method != "wechsel":  # makes a row for every ordinary token
            copies = [i for i in same if lines[i]["source"] == "copied"]
            assert len(copies) >= 0.95 * len(same)
            for i in copies:
                assert base_texts[lines[i]["base_ids"][0]] == new_texts[i]
        for rows, old, which in zip(new_tables, tables, ("input", "head")):
            dense, other = combinations(lines, len(old), which)
            torch.testing.assert_close(rows[~other].double(), (dense @ old.double())[~other], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda value: str(value)[:60])
def test_special_rows_are_those_of_the_same_role(method, options, trained):
    """For every method, whatever the roles' tokens are called."""
    base = trained["byte_level"]
    new = renamed(trained["metaspace"], bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]")
    tables = table(len(base), WIDTH, 0), table(len(base), WIDTH, 1)
    donor = table(len(new), DONOR_WIDTH, 2), table(len(new), DONOR_WIDTH, 3)
    matrix, _ = plan_transplant(base, new, *tables, method, donor_tables=donor, auxiliary=Vectors(), **options)
    for old, head in zip(tables, (False, True)):
        rows = matrix.apply(old, head=head)
        for role in ("bos", "eos", "unk", "pad"):
            new_id, base_id = (getattr(tokenizer, f"{role}_token_id") for tokenizer in (new, base))
            assert torch.equal(rows[new_id], old[base_id])


_ALL_METHODS = """
import hashlib, json, sys
import numpy as np
import torch
from pathlib import Path
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from rarezoo.tokenizer_transplant import plan_transplant
torch.set_num_threads(int(sys.argv[3]))
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
stored = [load_file(folder / name / "model.safetensors") for name in ("base_model", "donor_model")]
tables, donor = [(part["model.embed_tokens.weight"], part["lm_head.weight"]) for part in stored]
tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in ("base_model", "donor_model")]
for number, (method, options) in enumerate(json.loads(sys.argv[4])):
    matrix, report = plan_transplant(
        *tokenizers, *tables, method, donor_tables=donor, auxiliary=Vectors(), fallback=["normal"], **options
    )
    matrix.save(out / f"{number}.matrix")
    report.save(out / f"{number}.json")
    save_file({"input": matrix.apply(tables[0]), "head": matrix.apply(tables[1], head=True)}, out / f"{number}.rows")
"""


def test_all_methods_are_the_same_in_other_processes(tmp_path):
    """Other hashes of strings and another number of threads: the same base ids, and rows that agree."""
    imports, run = _ALL_METHODS.split("torch.set_num_threads", 1)
    code = f"{imports}\n{inspect.getsource(Vectors)}\ntorch.set_num_threads{run}"
    runs = []
    for seed, threads in (("1", "1"), ("2", "2")):
        out = tmp_path / seed
        out.mkdir()
        command = [sys.executable, "-c", code, str(BASE.parent), str(out), threads, json.dumps(METHODS)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        runs.append((out, subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)))
    for _, process in runs:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    first, second = (out for out, _ in runs)
    for number, (method, _) in enumerate(METHODS):
        one, other = (load_file(out / f"{number}.matrix") for out in (first, second))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, other[name], rtol=1e-6, atol=1e-6, msg=f"{method} {name}")
            else:
                assert torch.equal(tensor, other[name]), (method, name)
        one, other = (load_file(out / f"{number}.rows") for out in (first, second))
        for name, rows in one.items():
            torch.testing.assert_close(rows, other[name], rtol=0, atol=1e-6, msg=f"{method} {name}")


# --- every kind of model ----------------------------------------------------------------------------------------------

TEXTS = ["def main(self): return self.name", "Über die Brücke fährt ein Zug", "import os"]
NEW_TOKENS = ["fährt ein Zug", " return self.name"]
AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "Model": "AutoModel",
}


@pytest.fixture(scope="module")
def small_tokenizer():
    return byte_level(400)


def build(name, rows):
    """A random model with biases, the roles' ids those of the small tokenizer."""
    torch.manual_seed(0)
    class_name, config_name, fields, _ = MODELS[name]
    ids = dict(bos_token_id=0, eos_token_id=1, pad_token_id=3, decoder_start_token_id=1, forced_eos_token_id=1)
    fields = {**fields, **{key: value for key, value in ids.items() if key in fields}, "vocab_size": rows}
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**fields)).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if n == "final_logits_bias")]:
            tensor.normal_(std=0.3)
    return model


def inputs_for(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt").input_ids
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})}


_OPEN = """
import json, os, sys, torch, transformers
from safetensors.torch import load_file
for folder, auto_class in json.loads(os.environ["CASES"]):
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    assert type(model).__module__.startswith("transformers.models."), type(model)
    assert model.config.tokenizer_transplant["method"] == "retok"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stored = load_file(folder + "/answers.safetensors")
    ids = tokenizer(json.loads(os.environ["TEXTS"])[0], return_tensors="pt").input_ids
    inputs = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, **inputs)[0], stored["answer"]), folder
        if model.can_generate():
            torch.manual_seed(0)
            found = model.generate(
                ids.repeat(16, 1), do_sample=True, temperature=20.0, top_k=0, max_new_tokens=12, min_new_tokens=12
            )
            assert found.max() < len(tokenizer) < model.config.get_text_config().vocab_size, folder
assert not any(name.split(".")[0] == "rarezoo" for name in sys.modules)
"""


def test_every_kind_of_model(small_tokenizer, tmp_path, run_without_rarezoo):
    """Known text gets the base's answers; a new token's rows, in every table, are the mean of its pieces' rows; the
    folder opens, answers and generates in a process without this package."""
    size = len(small_tokenizer)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3))
    order = torch.where(order == 9, order[3], order)
    order[3] = 9  # the padding token, which must be among the first ids for models that count positions from it
    new_tokenizer = permuted_tokenizer(small_tokenizer, order.tolist())
    new_tokenizer.add_tokens(NEW_TOKENS)
    cases = []
    for name in MODELS:
        base = build(name, rows=size + 5)
        before = {key: value.clone() for key, value in base.state_dict().items()}
        inputs = inputs_for(base, small_tokenizer, TEXTS[2])
        with torch.no_grad():
            expected = base(**inputs)[0]
        result = transplant_tokenizer(
            base, new_tokenizer, "retok", base_tokenizer=small_tokenizer, pad_to_multiple_of=64
        )
        model = result.model
        assert type(model).__name__ == MODELS[name][0] and model.config.get_text_config().vocab_size == 448
        known = inputs_for(model, result.tokenizer, TEXTS[2])
        assert torch.equal(order[inputs["input_ids"]], known["input_ids"])
        with torch.no_grad():
            found = model(**known)[0]
        if expected.shape[-1] == size + 5:
            found, expected = found[..., order], expected[..., :size]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=name)
        check_new_rows(model, before, name, result.tokenizer, small_tokenizer)
        folder = tmp_path / name
        result.save_pretrained(folder)
        with torch.no_grad():
            answer = model(**inputs_for(model, result.tokenizer, TEXTS[0]))[0]
        save_file({"answer": answer.contiguous()}, folder / "answers.safetensors")
        ending = next(ending for ending in AUTO_CLASSES if MODELS[name][0].endswith(ending))
        cases.append((str(folder), AUTO_CLASSES[ending]))
    run_without_rarezoo(_OPEN, CASES=json.dumps(cases), TEXTS=json.dumps(TEXTS))


def check_new_rows(model, before, name, tokenizer, base_tokenizer):
    state = model.state_dict()
    for token in NEW_TOKENS:
        pieces = base_tokenizer.encode(token, add_special_tokens=False)
        assert len(pieces) > 1
        new_id = tokenizer.get_vocab()[token]
        for group in MODELS[name][3]:
            for tensor in group:
                found, old = state[tensor], before[tensor]
                if tensor == "final_logits_bias":
                    found, old = found[0], old[0]
                torch.testing.assert_close(found[new_id], old[pieces].mean(0), rtol=1e-5, atol=1e-6, msg=tensor)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "classifier"])
def test_every_kind_of_model_by_method(name, small_tokenizer):
    """Methods of each kind (pieces, statistics, donor, auxiliary, a mix) on tied, untied and biased heads."""
    new_tokenizer = byte_level(360)
    new_tokenizer.add_tokens(NEW_TOKENS)
    donor = table(len(new_tokenizer), 12, 2), None
    base = build(name, rows=len(small_tokenizer))
    for method, options in (
        ("tokenadapt", {}),
        ("subword", {"combination": "first_last"}),
        ("normal", {}),
        ("omp", {"k": 3}),
        ("landmark_pca", {}),
        ("focus", {}),
        (mix([(("omp", {"k": 3}), 1), ("mean", 1)]), {}),
    ):
        result = transplant_tokenizer(
            copy.deepcopy(base), new_tokenizer, method, base_tokenizer=small_tokenizer, donor=donor,
            auxiliary=Vectors(), rescale="mean_norm", **options,
        )  # fmt: skip
        tables = [tensor for group in MODELS[name][3] for tensor in group]
        assert all(result.model.state_dict()[tensor].isfinite().all() for tensor in tables)
        with torch.no_grad():
            answer = result.model(**inputs_for(result.model, result.tokenizer, TEXTS[1]))[0]
        assert answer.isfinite().all()
        other = [key for key in base.state_dict() if key not in tables and "position_embeddings" not in key]
        assert all(torch.equal(result.model.state_dict()[key], base.state_dict()[key]) for key in other)


# --- what is done with the result -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A transplanted Llama that is wide enough to be quantized, with padding rows, in a folder; and the result."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    fields = json.loads((BASE / "config.json").read_text()) | dict(hidden_size=64, intermediate_size=64, head_dim=32)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder / "base")
    result = transplant_tokenizer(folder / "base", DONOR, "retok", pad_to_multiple_of=64)
    result.save_pretrained(folder / "new")
    return folder / "new", result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_the_result_is_loaded_in_low_precision(bits, plain, tmp_path):
    """bitsandbytes quantizes the inner layers, never the new tables; answers stay close; it saves and loads again."""
    pytest.importorskip("bitsandbytes")
    folder, result = plain
    settings = BitsAndBytesConfig(load_in_4bit=True) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    expected = result.model.eval()
    assert model.model.layers[0].mlp.up_proj.weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(model.state_dict()[name], expected.state_dict()[name])
    inputs = result.tokenizer("The class of statements", return_tensors="pt")
    found, full = model(**inputs).logits, expected(**inputs).logits
    assert (found - full).norm() < (0.3 if bits == 4 else 0.05) * full.norm()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert again.config.tokenizer_transplant == result.report.provenance


def new_ids(result):
    """Ids whose rows no training has seen, from the report."""
    seen = ("copied", "special", "padding")
    return [row["id"] for row in result.report.rows() if row["source"] not in seen]


@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=pytest.mark.filterwarnings("ignore"))])
def test_adapters_with_trainable_new_rows(quantized, plain, tmp_path):
    """LoRA inside, the new rows beside it: gradients reach these alone, and the merged model has the others bit for
    bit."""
    folder, result = plain
    if quantized:
        pytest.importorskip("bitsandbytes")
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)} if quantized else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    ids = new_ids(result)
    assert len(ids) > 50
    rows = {"embed_tokens": ids, "lm_head": ids}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows))
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name or "trainable_tokens_delta" in name for name in trainable)
    before = {name: adapted.get_submodule(name).weight.clone() for name in (
        "base_model.model.model.embed_tokens", "base_model.model.lm_head")}  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    inputs = result.tokenizer("class Wolkenkratzer: statements of the type", return_tensors="pt")
    assert set(inputs.input_ids[0].tolist()) & set(ids)
    losses = []
    for _ in range(3):
        loss = adapted(**inputs, labels=inputs.input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1_000_000
    if quantized:
        return
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    merged = again.merge_and_unload()
    untouched = torch.ones(len(merged.lm_head.weight), dtype=torch.bool)
    untouched[ids] = False
    for table, old in zip((merged.model.embed_tokens.weight, merged.lm_head.weight), before.values()):
        assert torch.equal(table[untouched], old[untouched])
        assert not torch.equal(table[ids], old[ids])
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, adapted.eval()(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        dict(do_sample=True, temperature=50.0, top_k=0),
        dict(do_sample=True, temperature=50.0, top_k=0, num_beams=2),
        dict(do_sample=False),
        dict(do_sample=False, num_beams=3),
        dict(do_sample=True, temperature=50.0, top_k=0, use_cache=False),
    ],
)
@torch.no_grad()
def test_only_tokens_are_generated(settings, plain, tmp_path):
    """Also by a model that was rewritten on disk, and with settings of the caller's own."""
    folder, result = plain
    transplant_checkpoint(folder.parent / "base", DONOR, tmp_path / "disk", "retok", pad_to_multiple_of=64)
    size = len(result.tokenizer)
    settings = dict(settings, max_new_tokens=12, min_new_tokens=12)
    for place in (folder, tmp_path / "disk"):
        model = AutoModelForCausalLM.from_pretrained(place)
        assert len(model.lm_head.weight) == 576 > size == 536
        prompt = torch.full((48, 1), 40)
        for options in (settings, dict(generation_config=GenerationConfig(**settings))):
            torch.manual_seed(0)
            found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            assert found.shape == (48, 13) and found.max() < size


def test_provenance_and_report_travel(plain, tmp_path):
    """In the configuration through saving by transformers; line by line in the report beside the weights."""
    folder, result = plain
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    provenance = AutoModelForCausalLM.from_pretrained(tmp_path).config.tokenizer_transplant
    assert provenance == json.loads(json.dumps(result.report.provenance))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert provenance["new_tokenizer_sha256"] == Vocabulary(tokenizer).fingerprint
    base_tokenizer = AutoTokenizer.from_pretrained(folder.parent / "base")
    assert provenance["base_tokenizer_sha256"] == Vocabulary(base_tokenizer).fingerprint
    report = json.loads((folder / "transplant_report.json").read_text())
    assert report["provenance"] == provenance and len(report["tokens"]) == 576 == provenance["rows"]
    base = load_file(folder.parent / "base" / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    kinds = {}
    for line in report["tokens"]:
        kinds[line["source"]] = kinds.get(line["source"], 0) + 1
        if line["source"] == "padding":
            assert line["token"] is None
            continue
        assert tokenizer.convert_ids_to_tokens(line["id"]) == line["token"]
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            expected = torch.tensor(line["weights"], dtype=torch.float64) @ base[name][line["base_ids"]].double()
            torch.testing.assert_close(weights[name][line["id"]].double(), expected, rtol=1e-5, atol=1e-6)
    assert kinds == provenance["counts"]


@torch.no_grad()
def test_a_padding_token_with_a_large_id(small_tokenizer):
    """RoBERTa's kind counts positions from the padding id, which in another vocabulary may be beyond all positions."""
    base = build("xlm_roberta", rows=len(small_tokenizer))
    inputs = inputs_for(base, small_tokenizer, TEXTS[2])
    expected = base(**inputs)[0]
    order = torch.arange(len(small_tokenizer)).flip(0)
    new_tokenizer = permuted_tokenizer(small_tokenizer, order.tolist())
    assert new_tokenizer.pad_token_id > base.config.max_position_embeddings
    result = transplant_tokenizer(base, new_tokenizer, "retok", base_tokenizer=small_tokenizer)
    found = result.model(**inputs_for(result.model, result.tokenizer, TEXTS[2]))[0]
    torch.testing.assert_close(found[..., order], expected, rtol=1e-5, atol=1e-5)


# --- checkpoints that store the matrix --------------------------------------------------------------------------------


@pytest.fixture
def stored(plain, tmp_path):
    """The same transplantation stored by its matrix: the folder."""
    folder, result = plain
    base = folder.parent / "base"
    model = TransplantedForCausalLM.from_base(
        base, result.matrix, result.tokenizer, AutoTokenizer.from_pretrained(base), provenance=result.report.provenance
    )
    model.save_pretrained(tmp_path / "stored")
    result.tokenizer.save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"


def test_generation_settings_are_stored(stored, tmp_path):
    """Those of the checkpoint, not the base's; also in the plain model that it is merged to."""
    model = AutoModelForCausalLM.from_pretrained(stored)
    model.generation_config.update(num_beams=2, max_new_tokens=4)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert (again.generation_config.num_beams, again.generation_config.max_new_tokens) == (2, 4)
    assert again.generation_config.suppress_tokens == list(range(536, 576))
    again.generation_config = GenerationConfig(max_new_tokens=3)
    assert again.merge_and_unload().generation_config.max_new_tokens == 3


def test_the_installed_class_opens_it(stored):
    for trust in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        assert type(AutoModelForCausalLM.from_pretrained(stored, **trust)) is TransplantedForCausalLM


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_quant_type": "nf4"}, None])
@torch.no_grad()
def test_a_quantized_base_is_stored_by_the_matrix(settings, stored, tmp_path):
    """What was opened in 4 or 8 bits is stored as it was: by the matrix; the base comes in full precision or not."""
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(load_in_8bit=True) if settings is None else BitsAndBytesConfig(
        load_in_4bit=True, **settings
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(stored, quantization_config=settings)
    inputs = torch.arange(40, 52)[None]
    expected = model(inputs).logits
    model.save_pretrained(tmp_path / "again")
    assert [path.name for path in (tmp_path / "again").glob("*.safetensors")] == ["transplant_matrix.safetensors"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", quantization_config=settings)
    assert torch.equal(again(inputs).logits, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(base_model_name_or_path=3), "'base_model_name_or_path' expected str, got int"),
        (dict(base_revision=1.5), "base_revision"),
        (dict(token_ids=[1, 2]), "token_ids"),
        (dict(tokenizer_transplant="retok"), "tokenizer_transplant"),
    ],
)
def test_faulty_configurations_are_refused(fields, message, tmp_path):
    with pytest.raises(StrictDataclassError, match=message):
        TransplantedConfig(**fields)
    TransplantedConfig().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=message):
        TransplantedConfig.from_pretrained(tmp_path, **fields)
