"""`rarezoo transplant` and `rarezoo supertokens`: peers' numbers by peers' flags, files, errors, and the other verbs on
what they write."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from rarezoo.cli import auxiliary as cli_auxiliary
from rarezoo.cli.transplant import _AUXILIARY_METHODS, _DONOR_METHODS
from rarezoo.tokenizer_transplant import transplant_tokenizer
from rarezoo.tokenizer_transplant.transplanting import METHODS

from .cases import FIXTURES
from .commands import call, refused
from .loopback_hub import USER, LoopbackHub

FOLDER = FIXTURES / "tokenizer_transplant"
BASE, DONOR, AUXILIARY = FOLDER / "base_model", FOLDER / "donor_model", FOLDER / "auxiliary.safetensors"
TABLES = {"input": "model.embed_tokens.weight", "output": "lm_head.weight"}
IDS = torch.arange(20, 32)[None]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.fixture(scope="module")
def meta() -> dict:
    return json.loads((FOLDER / "meta.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("transplanted") / "plain"
    call("transplant", BASE, DONOR, folder, "--method", "retok")
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("transplanted") / "stored"
    call("transplant", BASE, DONOR, folder, "--method", "retok", "--stored")
    return folder


# --- the peers' flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags", "tolerance"),
    [
        ("omp_k8", "-a omp -k 8", 1e-5),
        ("omp_k8", "--approximation-method omp --k 8", 1e-5),
        ("common_interpolation_k5_euclidean_distance", "-a common_interpolation -k 5", 1e-5),
        ("common_interpolation_k5_euclidean_distance", "-a common_interpolation -k 5 -nc", 1e-5),
        ("common_interpolation_k5_cosine_distance", "-a common_interpolation -k 5 -c -w distance_proportional", 1e-5),
        ("common_interpolation_k5_euclidean_barycentric", "-a common_interpolation -k 5 -w barycentric", 1e-4),
        ("common_interpolation_k5_euclidean_least_squares", "-a common_interpolation -k 5 -w least_squares", 1e-4),
        ("subword_mean", "-a subword", 1e-5),
        ("subword_first_last", "-a subword -s first_last", 1e-5),
        ("subword_weighted_mean", "-a subword --subword-method weighted_mean", 1e-5),
        ("stb_k8", "-a stb -k 8", 1e-4),
        ("mp_rope_k4", "-a mp_rope -k 4", 1e-4),
        ("omp_k4_bytematch_prefixmatch", "-a omp -k 4 -bm yes -pm yes", 1e-5),
        ("omp_k4_bytematch_prefixmatch", "-a omp -k 4 --byte-match yes --prefix-match yes", 1e-5),
        ("omp_k4_magikarp", "-a omp -k 4 --magikarp", 1e-5),
    ],
)
def test_mergekits_flags_give_mergekits_rows(name, flags, tolerance, meta, tmp_path):
    call("transplant", BASE, DONOR, tmp_path / "out", *flags.split(), "--compatibility", "mergekit")
    expected, found = load_file(FOLDER / "expected_mergekit.safetensors"), weights(tmp_path / "out")
    rows = range(meta["new_len"]) if "magikarp" in name else meta["mergekit_row_ids"]
    for table, tensor in TABLES.items():
        torch.testing.assert_close(found[tensor][rows], expected[f"{name}.{table}"], atol=tolerance, rtol=0)


def test_noise_and_scale_change_new_rows_alone(plain, tmp_path):
    """As mergekit does: noise first, then the factor; drawn for each table by the seed."""
    given = ("transplant", BASE, DONOR)
    runs = {"scaled": "-nvs 2", "noisy": "-nvn 0.5", "again": "--new-vocab-noise 0.5", "other": "-nvn 0.5 --seed 1"}
    runs["both"] = "-nvn 0.5 --new-vocab-scale 3"
    found = {}
    for name, flags in runs.items():
        call(*given, tmp_path / name, "-a", "retok", *flags.split())
        found[name] = weights(tmp_path / name)
    rows = json.loads((plain / "transplant_report.json").read_text())["tokens"]
    made = torch.tensor([row["source"] == "combined" for row in rows])
    for tensor in TABLES.values():
        before = weights(plain)[tensor]
        assert all(torch.equal(run[tensor][~made], before[~made]) for run in found.values())
        torch.testing.assert_close(found["scaled"][tensor][made], 2 * before[made])
        noise = (found["noisy"][tensor] - before)[made]
        assert 0.45 < noise.std() < 0.55 and noise.mean().abs() < 0.05
        assert torch.equal(found["noisy"][tensor], found["again"][tensor])
        assert not torch.equal(found["noisy"][tensor], found["other"][tensor])
        torch.testing.assert_close(found["both"][tensor][made], 3 * found["noisy"][tensor][made])
    one, other = ((found["noisy"][tensor] - weights(plain)[tensor])[made] for tensor in TABLES.values())
    assert (one - other).abs().max() > 0.1
    noisy = json.loads((tmp_path / "noisy" / "config.json").read_text())["tokenizer_transplant"]
    assert (noisy["new_vocab_noise"], noisy["new_vocab_scale"], sum(noisy["counts"].values())) == (0.5, 1, 536)


def test_partial_matches_and_the_filter_are_options_of_every_method(plain, tmp_path):
    given = ("transplant", BASE, DONOR)
    told = json.loads(call(*given, tmp_path / "prefix", "-a", "retok", "-pm", "embed", "--json").stdout)
    assert told["prefix_match"] == "embed"
    changed = (weights(tmp_path / "prefix")[TABLES["input"]] != weights(plain)[TABLES["input"]]).any(1)
    assert 0 < int(changed.sum()) <= 94
    assert torch.equal(weights(tmp_path / "prefix")[TABLES["output"]], weights(plain)[TABLES["output"]])
    told = json.loads(call(*given, tmp_path / "filtered", "-a", "retok", "--magikarp", "--json").stdout)
    assert told["counts"]["zero"] > 0 and told["counts"]["copied"] < 440 and sum(told["counts"].values()) == 536
    rows = json.loads((tmp_path / "filtered" / "transplant_report.json").read_text())["tokens"]
    zeroed = [row["id"] for row in rows if row["source"] == "zero"]
    assert (weights(tmp_path / "filtered")[TABLES["input"]][zeroed] == 0).all()


@pytest.mark.parametrize("name", ["hybrid", "local", "global", "thr"])
def test_tokenadapts_flags_give_tokenadapts_rows(name, meta, tmp_path):
    variant = meta["variants"][f"tokenadapt_{name}"]
    flags = ["-temp", variant["temperature"], "-k", variant["top_k"], "-w", variant["weight"]]
    flags += ["-pad", variant["multiple_of"], "--threshold", variant["threshold"]]
    call("transplant", BASE, DONOR, tmp_path / "out", "--auxiliary", AUXILIARY, "--compatibility", "tokenadapt", *flags)
    expected, found = load_file(FOLDER / "expected_tokenadapt.safetensors"), weights(tmp_path / "out")
    kept = [place for place, row in enumerate(meta["unique_ids"]) if row not in variant["tie_sensitive_ids"]]
    rows = [meta["unique_ids"][place] for place in kept]
    for table, tensor in TABLES.items():
        assert len(found[tensor]) == variant["saved_rows"]
        wanted = expected[f"tokenadapt_{name}.{table}"][kept]
        torch.testing.assert_close(found[tensor][rows], wanted, atol=1e-6, rtol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in variant["config_after"]} == variant["config_after"]


@pytest.mark.parametrize(
    ("method", "flags", "options"),
    [
        (
            "tokenadapt",
            "-k 2 -w 0.7 -temp 0.5 --threshold 0.1",
            dict(top_k=2, weight=0.7, temperature=0.5, threshold=0.1),
        ),
        ("tokenadapt", "--option length_weight=0.25 --top-k 4", dict(length_weight=0.25, top_k=4)),
        ("wechsel", "-k 4 -temp 0.2", dict(neighbors=4, temperature=0.2)),
        ("ofa", "-k 4 --option factor_dimensions=8", dict(neighbors=4, factor_dimensions=8)),
        ("clp", "-k 4", dict(top_k=4)),
        ("focus", "--option key=token --fallback mean", dict(key="token", fallback=["mean"])),
        ("focus", "--compatibility focus", dict(compatibility="focus")),
        ("wechsel", "--compatibility wechsel", dict(compatibility="wechsel")),
        ("randn", "--seed 3 --rescale mean_norm -pad 64", dict(seed=3, rescale="mean_norm", pad_to_multiple_of=64)),
        ("normal", "--option per_dimension=false --match raw", dict(per_dimension=False, match="raw")),
    ],
)
def test_a_flag_is_the_option_that_the_help_names(method, flags, options, tmp_path):
    auxiliary = {} if method in ("randn", "normal") else {"auxiliary": str(AUXILIARY)}
    given = [item for name, value in auxiliary.items() for item in (f"--{name}", value)]
    call("transplant", BASE, DONOR, tmp_path / "out", "--method", method, *given, *flags.split())
    result = transplant_tokenizer(BASE, DONOR, method, **auxiliary, **options)
    expected, found = result.model.state_dict(), weights(tmp_path / "out")
    for tensor in TABLES.values():
        assert torch.equal(found[tensor], expected[tensor])
    provenance = json.loads((tmp_path / "out" / "config.json").read_text())["tokenizer_transplant"]
    assert provenance["auxiliary"] == (AUXILIARY.name if auxiliary else None)
    assert {**provenance, "auxiliary": 0} == json.loads(json.dumps({**result.report.provenance, "auxiliary": 0}))


def test_methods_are_known_by_what_they_need():
    """The command's tables against the registry's modules."""
    assert sorted(_DONOR_METHODS) == sorted(name for name, home in METHODS.items() if home == "methods_donor")
    helped = {name for name, home in METHODS.items() if home == "methods_auxiliary"} | {"tokenadapt"}
    assert set(_AUXILIARY_METHODS) == helped - {"clp"}, "a donor serves CLP-Transfer too"
    shown = call("transplant", "--help").stdout
    assert all(name in shown for name in METHODS)


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_answer_for_people_and_for_scripts(tmp_path):
    shown = call("transplant", BASE, DONOR, tmp_path / "one", "--method", "retok").stdout
    assert shown == f"{tmp_path / 'one'}: 536 tokens in 536 rows: 440 copied, 2 special, 94 combined (retok 94)\n"
    told = json.loads(call("transplant", BASE, DONOR, tmp_path / "two", "--method", "retok", "--json").stdout)
    report = json.loads((tmp_path / "two" / "transplant_report.json").read_text())
    assert told == {"folder": str(tmp_path / "two"), **report["provenance"], "notes": report["notes"]}
    assert told["counts"] == {"copied": 440, "special": 2, "combined": 94} and len(report["tokens"]) == 536


@pytest.mark.parametrize("form", ["shards", "pytorch"])
def test_other_weight_files_give_the_same_tables(form, plain, tmp_path):
    """Shards are rewritten one by one; weights that are no safetensors are loaded into a model."""
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(BASE)
    if form == "shards":
        model.save_pretrained(base, max_shard_size="20KB")
        assert len(list(base.glob("*.safetensors"))) > 2
    else:
        model.save_pretrained(base)
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    AutoTokenizer.from_pretrained(BASE).save_pretrained(base)
    call("transplant", base, DONOR, tmp_path / "out", "--method", "retok")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = weights(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert len(list((tmp_path / "out").glob("model*.safetensors"))) == len(list(base.glob("*.safetensors")) or [1])


@torch.no_grad()
def test_stored_folders_hold_no_weights_and_move_with_their_base(stored, plain, tmp_path):
    assert not list(stored.glob("model*.safetensors"))
    logits = AutoModelForCausalLM.from_pretrained(plain)(IDS).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(stored)(IDS).logits, logits)
    shutil.copytree(BASE, tmp_path / "here" / "base")
    call("transplant", tmp_path / "here" / "base", DONOR, tmp_path / "here" / "new", "--method", "retok", "--stored")
    assert json.loads((tmp_path / "here" / "new" / "config.json").read_text())["base_model_name_or_path"] == "../base"
    (tmp_path / "here").rename(tmp_path / "there")
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "there" / "new")
    assert torch.equal(moved(IDS).logits, logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "there" / "new")) == 536


def small_bert(folder: Path, model_class=transformers.BertForMaskedLM) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=576, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model_class(config).eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel"])
def test_stored_folders_of_other_kinds(kind, tmp_path):
    base = small_bert(tmp_path / "base", getattr(transformers, kind))
    call("transplant", base, DONOR, tmp_path / "new", "--method", "retok", "--stored")
    opened = (AutoModelForMaskedLM if "Masked" in kind else AutoModel).from_pretrained(tmp_path / "new")
    assert type(opened).__name__ == ("TransplantedForMaskedLM" if "Masked" in kind else "TransplantedModel")
    assert type(opened.merge_and_unload()).__name__ == kind and opened.config.vocab_size == 536


def test_roles_and_mappings_by_hand(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([["Ġthe", [["Ġa", 3], ["Ġin", 1]]]]))
    given = ("--mapping", rows, "--special", "<|reserved_special_token_0|>=<|im_start|>")
    told = json.loads(call("transplant", BASE, DONOR, tmp_path / "out", *given, "--json").stdout)
    assert told["method"] == "mapping" and told["counts"]["mapped"] == 1
    old, new = AutoTokenizer.from_pretrained(BASE).get_vocab(), AutoTokenizer.from_pretrained(DONOR).get_vocab()
    base, found = weights(BASE)[TABLES["input"]], weights(tmp_path / "out")[TABLES["input"]]
    assert torch.equal(found[new["<|im_start|>"]], base[old["<|reserved_special_token_0|>"]])
    torch.testing.assert_close(found[new["Ġthe"]], 0.75 * base[old["Ġa"]] + 0.25 * base[old["Ġin"]])


def test_a_file_of_tokens_extends_the_bases_own_tokenizer(tmp_path):
    (tmp_path / "tokens.txt").write_text("Wolkenkratzer\nfar away\nWolkenkratzer\n\n")
    told = json.loads(
        call("transplant", BASE, tmp_path / "tokens.txt", tmp_path / "out", "-a", "retok", "--json").stdout
    )
    old, new = AutoTokenizer.from_pretrained(BASE), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(new) == len(old) + 2 == told["rows"]
    assert new.convert_ids_to_tokens([560, 561]) == ["Wolkenkratzer", "far away"]
    base, found = weights(BASE)[TABLES["input"]], weights(tmp_path / "out")[TABLES["input"]]
    assert torch.equal(found[:560], base[:560])
    pieces = old("far away", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(found[561], base[pieces].mean(0))


# --- auxiliary vectors ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return small_bert(tmp_path_factory.mktemp("encoders") / "encoder", transformers.BertModel)


def test_an_encoders_vectors_are_kept(encoder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    flags = ("--auxiliary", encoder, "--auxiliary-cache", cache)
    call("transplant", BASE, DONOR, tmp_path / "first", *flags)
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    call("transplant", BASE, DONOR, tmp_path / "second", *flags)
    assert file.stat().st_mtime_ns == written and list(cache.iterdir()) == [file]
    model = AutoModel.from_pretrained(encoder).eval()
    pair = (model, AutoTokenizer.from_pretrained(encoder))
    expected = transplant_tokenizer(BASE, DONOR, "tokenadapt", auxiliary=pair).model.state_dict()
    for folder in ("first", "second"):
        assert torch.equal(weights(tmp_path / folder)[TABLES["input"]], expected[TABLES["input"]])
    provenance = json.loads((tmp_path / "first" / "config.json").read_text())["tokenizer_transplant"]
    assert provenance["auxiliary"] == encoder.name


def test_sentence_transformers_pool_as_they_do_but_for_tokenadapt(encoder, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    body = Transformer(str(encoder))
    SentenceTransformer(modules=[body, Pooling(16, pooling_mode="cls")]).save(str(tmp_path / "pooled"))
    texts = ["the", " sun", "far away"]
    own, _ = cli_auxiliary.open_auxiliary(str(tmp_path / "pooled"), None, None, False).vectors(texts)
    mean, _ = cli_auxiliary.open_auxiliary(str(tmp_path / "pooled"), None, "tokenadapt", False).vectors(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    torch.testing.assert_close(own, torch.stack([state[0] for state in states]), atol=1e-5, rtol=0)
    torch.testing.assert_close(mean, torch.stack([state.mean(0) for state in states]), atol=1e-5, rtol=0)


def test_word_vectors_by_their_libraries(tmp_path, monkeypatch):
    """Stand-ins for fastText and gensim: the file goes to the right reader, its words to the method."""

    opened = []

    def reader(vector):
        words = types.SimpleNamespace(get_word_vector={"sun": vector}.get)
        return lambda path: opened.append(path) or words

    fasttext = types.SimpleNamespace(load_model=reader([3.0, 1.0]))
    vectors = types.SimpleNamespace(load=reader([1.0, 2.0]), load_word2vec_format=reader([3.0, 4.0]))
    monkeypatch.setitem(sys.modules, "fasttext", fasttext)
    monkeypatch.setitem(sys.modules, "gensim", types.ModuleType("gensim"))
    monkeypatch.setitem(sys.modules, "gensim.models", types.SimpleNamespace(KeyedVectors=vectors))
    expected = {"words.bin": [3.0, 1.0], "words.ftz": [3.0, 1.0], "words.kv": [1.0, 2.0], "words.vec": [3.0, 4.0]}
    for name, vector in expected.items():
        (tmp_path / name).touch()
        found, has = cli_auxiliary.open_auxiliary(str(tmp_path / name), None, None, False).vectors([" sun"])
        assert has.tolist() == [True] and found.tolist() == [vector], name
    assert [Path(path).name for path in opened] == list(expected)
    monkeypatch.setitem(sys.modules, "fasttext", None)
    (tmp_path / "words.bin").touch()
    line = refused("transplant", BASE, DONOR, tmp_path / "out", "--auxiliary", tmp_path / "words.bin")
    assert line.endswith("needs fastText: pip install fasttext")


# --- when something is wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["{base}", "{donor}", "out"], "--method tokenadapt compares token texts: give --auxiliary"),
        (["{base}", "{donor}", "out", "-a", "nonsense"], "unknown method 'nonsense'; known: tokenadapt, retok"),
        (["{base}", "{tokenizer}", "out", "-a", "omp"], "{tokenizer} holds none: give --donor"),
        (["{base}", "{donor}", "out", "-a", "omp", "--donor", "nowhere"], "no folder nowhere"),
        (["{base}", "{donor}", "out", "-a", "omp", "-k", "5000"], "5000"),
        (["{base}", "{donor}", "out", "-a", "retok", "-k", "3"], "method 'retok' has no option k; it has: none"),
        (["{base}", "{donor}", "out", "-a", "omp", "-w", "barycentric"], "method 'omp' has no option weight"),
        (["{base}", "{donor}", "out", "-a", "omp", "-k", "2", "--option", "k=3"], "--option k: it is given by its own"),
        (["{base}", "{donor}", "out", "-a", "omp", "--option", "seed=3"], "--option seed: it is no option of a method"),
        (["{base}", "{donor}", "out", "-a", "omp", "--option", "k"], "--option must be NAME=VALUE; found 'k'"),
        (["{base}", "{donor}", "out", "-a", "mean", "--special", "<|end|>"], "--special must be OLD=NEW"),
        (["{base}", "{donor}", "out", "-a", "mean", "--special", "no such token=<|end|>"], "no such token"),
        (["{base}", "{donor}", "out", "-a", "mean", "--match", "soundex"], "soundex"),
        (["{base}", "{donor}", "out", "-a", "mean", "--compatibility", "zett"], "compatibility must be None or one of"),
        (["{base}", "{donor}", "out", "-a", "mean", "--rescale", "twice"], "rescale must be 'none' or 'mean_norm'"),
        (["{base}", "{donor}", "out", "-a", "mean", "-pm", "maybe"], "prefix_match is one of no, yes, embed, lm_head"),
        (["{base}", "{tokenizer}", "out", "-a", "mean", "--magikarp"], "{tokenizer} holds none: give --donor"),
        (["{base}", "{donor}", "out", "-a", "mean", "--seed", "a"], "See `rarezoo transplant --help`."),
        (["{base}", "{donor}", "out", "-a", "omp", "-k", "2.5"], "See `rarezoo transplant --help`."),
        (["{base}", "{donor}", "out", "-a", "omp", "--option", "memory_budget=x"], "memory_budget must be an integer"),
        (["{base}", "{donor}", "out", "-a", "omp", "--option", "algorithm=x"], "algorithm is one of"),
        (["{base}", "{donor}", "out", "-w", "x", "--auxiliary", "{auxiliary}"], "weight must be a number, found 'x'"),
        (["{base}", "{donor}", "out", "-w", "2", "--auxiliary", "{auxiliary}"], "weight must lie between 0 and 1"),
        (["{base}", "{donor}", "out", "-temp", "nan", "--auxiliary", "{auxiliary}"], "temperatures must be positive"),
        (["{base}", "{donor}", "out", "-a", "subword", "-s", "median"], "combination must be mean, sum"),
        (["{base}", "{torn}", "out", "-a", "mean"], "{torn}/tokenizer.json is damaged or truncated"),
        (["{base}", "{donor}", "out", "-a", "mean", "-nvn", "-1"], "See `rarezoo transplant --help`."),
        (["{base}", "{donor}", "out", "-a", "mean", "-pad", "0"], "See `rarezoo transplant --help`."),
        (["{base}", "{donor}", "out", "--mapping", "none.json"], "no mapping at none.json"),
        (["{base}", "{donor}", "out", "-a", "omp", "--fallback", "guess"], "unknown method 'guess'"),
        (["{base}", "{donor}", "out", "--auxiliary", "none.safetensors"], "no folder none.safetensors"),
        (["{base}", "{donor}", "out", "--auxiliary", "{lonely}"], "the strings of {lonely} are in neither of"),
        (["{base}", "{donor}", "out", "--auxiliary", "{lonely}", "--auxiliary-cache", "c"], "leave it out"),
        (["{base}", "{donor}", "{full}", "-a", "mean"], "already exists and is not an empty folder"),
        (["{base}", "{donor}", "{full}/file/out", "-a", "mean"], "file"),
        (["nowhere", "{donor}", "out", "-a", "mean"], "no folder nowhere"),
        (["{base}", "nowhere", "out", "-a", "mean"], "no folder nowhere"),
        (["{base}", "tokens.txt", "out", "-a", "mean"], "no file of tokens at tokens.txt"),
        (["{base}", "{empty}", "out", "-a", "mean"], "holds no tokens"),
        (["{adapter}", "{donor}", "out", "-a", "mean"], "holds an adapter: merge it into its base first"),
        (["{tokenizer}", "{donor}", "out", "-a", "mean"], "is a folder without config.json"),
        (["{damaged}", "{donor}", "out", "-a", "mean"], "is damaged or truncated"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line_and_leave_nothing(arguments, part, tmp_path, monkeypatch):
    places = {name: tmp_path / name for name in ("tokenizer", "full", "adapter", "damaged", "torn")}
    for folder in places.values():
        folder.mkdir()
    AutoTokenizer.from_pretrained(DONOR).save_pretrained(places["tokenizer"])
    (places["full"] / "file").touch()
    (places["adapter"] / "adapter_config.json").write_text("{}")
    shutil.copytree(BASE, places["damaged"], dirs_exist_ok=True)
    shutil.copytree(DONOR, places["torn"], dirs_exist_ok=True)
    (places["torn"] / "tokenizer.json").write_text((DONOR / "tokenizer.json").read_text()[:3000])
    (places["damaged"] / "model.safetensors").write_bytes((BASE / "model.safetensors").read_bytes()[:500])
    places |= {
        "base": BASE,
        "donor": DONOR,
        "auxiliary": AUXILIARY,
        "empty": tmp_path / "empty.txt",
        "lonely": tmp_path / "lonely.safetensors",
    }
    (tmp_path / "empty.txt").write_text("\n")
    shutil.copy(AUXILIARY, places["lonely"])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    line = refused("transplant", *(argument.format(**places) for argument in arguments))
    assert part.format(**places) in line
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_stored_by_its_matrix(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=576, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "base")
    given = ("transplant", tmp_path / "base", DONOR, tmp_path / "out", "-a", "retok")
    assert "the base is a T5ForConditionalGeneration: leave out --stored" in refused(*given, "--stored")
    assert not (tmp_path / "out").exists()
    assert "536 tokens" in call(*given).stdout


@pytest.fixture(scope="module")
def with_code(tmp_path_factory) -> Path:
    """A Llama whose class and configuration only its own file knows."""
    folder = tmp_path_factory.mktemp("with-code") / "base"
    shutil.copytree(BASE, folder)
    (folder / "own_llama.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    references = {"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": references}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_trust_reaches_all_that_is_loaded(with_code, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked whether code may be run"))
    trusted = ("--trust-remote-code", "-a", "retok")
    call("transplant", with_code, DONOR, tmp_path / "base", *trusted)
    torch.testing.assert_close(weights(tmp_path / "base"), weights(plain), rtol=0, atol=0)
    call("transplant", DONOR, with_code, tmp_path / "donor", "-a", "omp", "-k", "8", "--trust-remote-code")
    call("transplant", DONOR, BASE, tmp_path / "same", "-a", "omp", "-k", "8")
    torch.testing.assert_close(weights(tmp_path / "donor"), weights(tmp_path / "same"), rtol=0, atol=0)
    result = transplant_tokenizer(with_code, str(DONOR), "retok", trust_remote_code=True)
    assert type(result.model).__name__ == "OwnForCausalLM"
    refusal = refused("transplant", with_code, DONOR, tmp_path / "stored", *trusted, "--stored")
    assert "brings its own code" in refusal and "leave out --stored" in refusal
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transplant_tokenizer(with_code, str(DONOR), "retok")


# --- a Hub ------------------------------------------------------------------------------------------------------------


def test_hub_names_do_for_folders_and_nothing_is_pushed(tmp_path, plain):
    """A process of its own: huggingface_hub reads its endpoint once."""
    code = f"""
from huggingface_hub import HfApi
from tests.commands import call
api = HfApi()
for name, folder in (("base", {str(BASE)!r}), ("donor", {str(DONOR)!r})):
    api.create_repo("{USER}/" + name)
    api.upload_folder(repo_id="{USER}/" + name, folder_path=folder)
before = [(model.id, model.sha) for model in api.list_models(author="{USER}")]
for out, flags in (("plain", "-a retok"), ("omp", "-a omp -k 4"), ("stored", "-a retok --stored")):
    call("transplant", "{USER}/base", "{USER}/donor", {str(tmp_path)!r} + "/" + out, *flags.split())
assert len(before) == 2 and before == [(model.id, model.sha) for model in api.list_models(author="{USER}")]
"""
    with LoopbackHub() as hub:
        finished = subprocess.run(
            [sys.executable, "-c", code],
            env=hub.environment(tmp_path / "home"),
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert finished.returncode == 0, finished.stderr
    assert all(torch.equal(tensor, weights(tmp_path / "plain")[name]) for name, tensor in weights(plain).items())
    call("transplant", BASE, DONOR, tmp_path / "local", "-a", "omp", "-k", "4")
    assert torch.equal(*(weights(tmp_path / name)[TABLES["output"]] for name in ("omp", "local")))
    config = json.loads((tmp_path / "stored" / "config.json").read_text())
    assert config["base_model_name_or_path"] == f"{USER}/base" and len(config["base_revision"]) == 40


# --- the other verbs --------------------------------------------------------------------------------------------------


def test_info_of_both_forms(plain, stored):
    found = {name: json.loads(call("info", folder, "--json").stdout) for name, folder in (("p", plain), ("s", stored))}
    assert found["p"]["architecture"] == "LlamaForCausalLM" and "architecture" not in found["s"]
    assert found["p"]["parameters"] == found["s"]["parameters"]
    for told in found.values():
        assert told["family"] == "tokenizer_transplant" and told["transplant"]["method"] == "retok"
        assert told["transplant"]["counts"] == {"copied": 440, "special": 2, "combined": 94}
        assert "tokenizer_transplant" not in told["config"]
    shown = call("info", stored).stdout
    assert "base_fingerprint" in shown and "id2label" not in shown and 'method = "retok"' in shown
    assert "LlamaForCausalLM, a plain model" in call("info", plain).stdout
    assert "tokenizer_transplant/tiny" in call("info", "tokenizer-transplant/tiny").stdout


def test_verbs_that_need_other_models_say_so(plain, stored, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the sun\n")
    verbs = {
        "quantize": (tmp_path / "out", "--scheme", "bf16"),
        "encode": (corpus, tmp_path / "out"),
        "explain": ("the sun",),
        "export": (tmp_path / "out", "--to", "onnx"),
    }
    before = sorted(tmp_path.iterdir())
    for verb, arguments in verbs.items():
        assert "is a plain LlamaForCausalLM with a transplanted tokenizer" in refused(verb, plain, *arguments)
        line = refused(verb, stored, *arguments)
        if verb == "quantize":
            assert f"`rarezoo convert tokenizer_transplant {stored} PLAIN --to official`" in line
        else:
            assert "is of the family tokenizer_transplant, whose models give text; this takes one of vectors" in line
    again = refused("transplant", stored, DONOR, tmp_path / "out", "-a", "retok")
    assert "stores the matrix of a transplantation: write the plain model first" in again
    assert sorted(tmp_path.iterdir()) == before


def test_convert_writes_either_form(plain, stored, tmp_path):
    call("convert", "tokenizer_transplant", stored, tmp_path / "plain", "--to", "official")
    assert all(torch.equal(tensor, weights(tmp_path / "plain")[name]) for name, tensor in weights(plain).items())
    call("convert", "tokenizer-transplant", plain, tmp_path / "stored", "--base", BASE)
    name = "transplant_matrix.safetensors"
    matrices = [load_file(folder / name) for folder in (stored, tmp_path / "stored")]
    assert all(torch.equal(tensor, matrices[1][key]) for key, tensor in matrices[0].items())


@pytest.mark.parametrize("form", ["plain", "stored"])
def test_after_care_from_the_command_line(form, plain, stored, tmp_path):
    (tmp_path / "texts.txt").write_text("The quick brown fox jumps over the lazy dog. A star is a sun far away.\n" * 8)
    recipe = {
        "family": "tokenizer_transplant", "model": str({"plain": plain, "stored": stored}[form]),
        "training_data": str(tmp_path / "texts.txt"), "trained_rows": "new", "sequence_length": 32, "batch_size": 2,
        "max_steps": 50, "warmup_steps": 1, "learning_rate": 0.01,
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    told = json.loads(
        call("train", tmp_path / "recipe.json", tmp_path / "out", "--set", "max_steps=3", "--json").stdout
    )
    assert told["steps"] == 3
    rows = json.loads((plain / "transplant_report.json").read_text())["tokens"]
    copied = [row["id"] for row in rows if row["source"] in ("copied", "special")]
    before, after = weights(plain), weights(tmp_path / "out")
    for name, tensor in before.items():
        kept = copied if name in TABLES.values() else slice(None)
        assert torch.equal(after[name][kept], tensor[kept]), name
        assert torch.equal(after[name], tensor) == (name not in TABLES.values()), name


# --- supertokens ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    words = "the sun and the moon of the sea in the end of the day a star is a sun far away".split()
    lines = [" ".join(words[(start * step) % len(words)] for step in range(1, 40)) for start in range(1, 120)]
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(lines))
    return file


def test_supertokens_reach_over_words(texts, tmp_path):
    arguments = ("supertokens", texts, tmp_path / "out", "--vocab-size", 400, "--picture", tmp_path / "picture.png")
    told = json.loads(call(*arguments, "--json").stdout)
    ours, words = told["comparison"]["supertokens"], told["comparison"]["BPE cut at words"]
    assert told["tokens"] == ours["vocabulary_size"] == 400 and told["texts"] == 108 and ours["texts"] == 11
    assert ours["lossless"] == words["lossless"] == 1 and ours["multi_word_share"] > 0 == words["multi_word_share"]
    assert ours["tokens"] < words["tokens"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "picture.png"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    unseen = texts.read_text().split("\n")[9::10]
    assert sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in unseen) == ours["tokens"]
    assert ours["bytes"] == sum(len(text.encode()) for text in unseen)


def test_supertokens_for_people_are_seeded_and_fit_a_model(texts, tmp_path):
    shown = call("supertokens", texts, tmp_path / "one", "--vocab-size", 300, "--held-out", texts, "--seed", 1).stdout
    first, second, header, ours, words = shown.splitlines()
    assert first == f"{tmp_path / 'one'}: 300 tokens, learned from 119 texts"
    assert second.startswith("compared on 119 other texts") and "bytes per token" in header
    assert ours.startswith("supertokens ") and words.startswith("BPE cut at words ")
    for name, seed in (("two", 1), ("three", 2)):
        call("supertokens", texts, tmp_path / name, "--vocab-size", 300, "--seed", seed, "--held-out", texts)
    files = {name: (tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two", "three")}
    assert files["one"] == files["two"] != files["three"]
    assert "300 tokens in 300 rows" in call("transplant", BASE, tmp_path / "one", tmp_path / "new", "-a", "fvt").stdout


def test_supertokens_by_a_published_settings_file(texts, tmp_path):
    settings = tmp_path / "train.yaml"
    settings.write_text(
        "vocab_size: 330\nspecial_tokens: ['<|endoftext|>']\ntest_distribution: {'2-5': 0.9, '6-9': 0.2}\n"
    )
    arguments = ("supertokens", texts, tmp_path / "out", "--settings", settings)
    result = call(*arguments, "--no-compare")
    assert result.stdout == f"{tmp_path / 'out'}: 330 tokens, learned from 119 texts\n"
    assert (
        result.stderr
        == "note: the probabilities of the chunk lengths sum up to 1.1 instead of 1; they are scaled to it\n"
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").all_special_tokens == ["<|endoftext|>"]
    shown = call("supertokens", texts, tmp_path / "less", "--settings", settings, "--vocab-size", 280, "--no-compare")
    assert "280 tokens" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["none.txt", "out"], "no file of texts at none.txt"),
        (["{texts}", "out", "--settings", "none.yaml"], "no file of settings at none.yaml"),
        (["{texts}", "out", "--vocab-size", "20"], "vocab_size must be at least 260"),
        (["{texts}", "out", "--picture", "picture.doc"], "expected a name that ends in one of"),
        (["{texts}", "out", "--picture", "none/picture.png"], "there is no folder"),
        (["{texts}", "out", "--picture", "picture.png", "--no-compare"], "there is nothing to draw"),
        (["few.txt", "out"], "2 texts are too few to set some apart"),
        (["{texts}", "."], "already exists and is not an empty folder"),
        (["few.txt", "out", "--settings", "few.txt"], "must hold the settings of a supertokenizer"),
    ],
)
def test_supertokens_mistakes(arguments, part, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    assert part in refused("supertokens", *(argument.format(texts=texts) for argument in arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["few.txt"]
