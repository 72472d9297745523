"""Cards hold the checkpoint's own numbers, are valid metadata, and their code runs; a push uploads what a reader
needs and nothing else."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from rarezoo.auto import FAMILIES
from rarezoo.configs import load_preset
from rarezoo.model_cards import build_card, checkpoint_files, push, write_card
from rarezoo.model_cards.card import is_authored
from rarezoo.model_cards.publish import check_complete

from .commands import call, refused
from .loopback_hub import USER, LoopbackHub, metadata_errors

EVALUATION = {"dataset": "Docstrings (test)", "split": "test", "metrics": {"nDCG@10": 0.61234, "R@100": 0.9}}
RECIPE = {
    "learning_rate": 0.002,
    "loss": {"name": "info_nce", "temperature": 1.0},
    "corpus": "/home/me/private/corpus.jsonl",
    "lora": None,
}


@pytest.fixture
def folder(splade_checkpoint, tmp_path):
    return shutil.copytree(splade_checkpoint, tmp_path / "tiny-splade")


def header(card):
    return yaml.safe_load(str(card).split("---")[1])


def test_numbers_are_the_checkpoint_s(folder):
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "training_recipe.json").write_text(json.dumps(RECIPE))
    card = build_card(folder, license="apache-2.0", language="en")
    text = str(card)

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())
    config = json.loads((folder / "config.json").read_text())
    assert f"| parameters | {parameters:,} |" in text
    assert f"{config['num_hidden_layers']} layers, hidden size {config['hidden_size']}" in text
    assert f"| vector dimensions | {config['vocab_size']} (the vocabulary) |" in text
    assert f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB (F32)" in text
    assert "| Docstrings (test) | test | nDCG@10 | 0.6123 |" in text
    assert "| learning_rate | `0.002` |" in text and "| loss.temperature | `1.0` |" in text
    assert "corpus.jsonl" in text and "/home/me" not in text
    assert "lora" not in text
    assert "arxiv.org/abs/2408.11119" in text
    assert "Quantization" not in text
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["query_template"].replace("\n", "\\n") in text
    for unfilled in ("{{", "{%", "None", "Undefined"):
        assert unfilled not in re.sub(r"```.*?```", "", text, flags=re.DOTALL), unfilled


def test_metadata(folder):
    (folder / "evaluation.json").write_text(json.dumps([EVALUATION]))
    card = build_card(folder, f"{USER}/tiny", license="apache-2.0", base_model="mistralai/Mistral-7B-v0.1")
    data = header(card)
    assert data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "mistralai/Mistral-7B-v0.1"
    assert {"custom_code", "sparse-encoder", "splade", "mistral_splade"} <= set(data["tags"])
    assert metadata_errors(str(card)) == []
    results = ModelCard(str(card)).data.eval_results
    assert [(r.dataset_name, r.dataset_split, r.metric_type, r.metric_value) for r in results] == [
        ("Docstrings (test)", "test", "ndcg@10", 0.61234),
        ("Docstrings (test)", "test", "r@100", 0.9),
    ]
    assert re.fullmatch(r"[a-z0-9._-]+", results[0].dataset_type)


@pytest.mark.parametrize(
    ("languages", "expected"),
    [(["en_XX", "zh_CN", "yue_Hant", "zh_TW"], ["en", "zh", "yue"]), (["pt_XX"], "pt")],
)
def test_languages_are_the_configuration_s(tmp_path, languages, expected):
    config = load_preset("colbert_xm", "tiny", languages=languages, default_language=languages[0])
    config.save_pretrained(tmp_path)
    text = write_card(tmp_path).read_text()
    assert header(text)["language"] == expected and metadata_errors(text) == []
    assert "81" not in text and f"| languages | {', '.join(languages)};" in text
    assert header(build_card(tmp_path, language="fr"))["language"] == "fr"


def test_sections_without_a_source_are_absent(folder):
    text = str(build_card(folder))
    for section in ("## Evaluation", "## Quantization", "## Training", "## License"):
        assert section not in text
    assert "model-index" not in header(text)
    assert "license" not in header(text)


def test_what_the_author_wrote_survives_a_rewrite(folder):
    first = write_card(folder, license="mit", language="de", base_model="a/b").read_text()
    assert write_card(folder).read_text() == first
    assert header(write_card(folder, license="apache-2.0").read_text())["license"] == "apache-2.0"
    assert header((folder / "README.md").read_text())["language"] == "de"
    assert not list(folder.glob("*.partial"))


AUTHORED = "---\nlicense: mit\ntags: [biology]\nthumbnail: a.png\nlibrary_name: other\n---\n"


def test_metadata_of_the_author_survive(folder):
    readme = folder / "README.md"
    for text in (AUTHORED, AUTHORED + "\n \n"):
        readme.write_text(text)
        data = header(write_card(folder, language="en").read_text())
        assert (data["license"], data["language"], data["thumbnail"]) == ("mit", "en", "a.png")
        assert data["tags"][0] == "custom_code" and data["tags"].count("splade") == 1 and "biology" in data["tags"]
        assert data["library_name"] == "transformers"
    readme.write_text(readme.read_text().replace("license: mit", "license: apache-2.0"))
    assert "## License\n\napache-2.0" in write_card(folder).read_text(), "new metadata alone make no text of one's own"


def test_a_card_is_known_by_its_digest(folder):
    text = write_card(folder).read_text()
    last = text.rstrip().splitlines()[-1]
    assert re.fullmatch(r"<!-- rarezoo card [0-9a-f]{12}: .*-->", last) and text.count("<!--") == 1
    assert not is_authored(folder / "README.md")
    assert str(build_card(folder)) == text, "the card that --show prints is known too"
    for changed in (text.replace("\n", "\r\n"), text.rstrip(), text.replace("# tiny-splade\n", "# tiny-splade  \n")):
        (folder / "README.md").write_bytes(changed.encode())
        assert not is_authored(folder / "README.md"), "white space at the ends of lines is not an edit"


@pytest.mark.parametrize(
    "edit", ["hand-written", "one word", "before", "after", "comment removed", "digest of another"]
)
def test_what_the_author_wrote_is_not_overwritten(folder, edit):
    readme = folder / "README.md"
    text = write_card(folder, license="mit").read_text()
    last = text.rstrip().splitlines()[-1]
    mine = {
        "hand-written": "# My model\n",
        "one word": text.replace("A query and a document match", "A question and a document match"),
        "before": text.replace("# tiny-splade", "Note.\n\n# tiny-splade"),
        "after": text + "\nA note.\n",
        "comment removed": text.replace(last, ""),
        "digest of another": AUTHORED + f"# My model\n\n{last}\n",
    }[edit]
    assert mine != text
    readme.write_text(mine)
    line = refused("card", folder)
    assert str(readme) in line and "--replace" in line
    with pytest.raises(FileExistsError, match="written or edited by hand"):
        write_card(folder)
    assert readme.read_text() == mine
    call("card", folder, "--show")
    assert readme.read_text() == mine
    call("card", folder, "--replace")
    assert not is_authored(readme) and "A question" not in readme.read_text()
    assert ("license: mit" in readme.read_text()) == ("license: mit" in mine)


def test_a_readme_that_is_not_utf_8_is_named(folder):
    (folder / "README.md").write_bytes(b"# gr\xfc\xdfe\n")
    assert f"{folder / 'README.md'} is not text in UTF-8" in refused("card", folder)


RUN = {
    "model": None, "preset": "tiny", "family": "mistral_splade", "initialization": "lexical", "lora": False,
    "lora_rank": 16, "lora_alpha": 8, "lora_dropout": 0.1, "lora_on_head": False, "quantization": None,
    "objective": {
        "info_nce_weight": 1.0, "margin_mse_weight": 0.0, "kl_weight": 0.0, "score_scale": 2.0, "temperature": 2.0,
        "query_regularizer": "flops", "document_regularizer": "l1", "query_regularizer_weight": 0.0,
        "document_regularizer_weight": 0.03, "flops_threshold": 200, "regularizer_warmup_steps": 5,
    },
    "max_steps": 90, "epochs": 1.0,
}  # fmt: skip


def settings(folder, **recipe):
    (folder / "training_recipe.json").write_text(json.dumps({**RUN, **recipe}))
    return {
        name.strip().removeprefix("objective."): value.strip()
        for name, value in rows(str(build_card(folder)), "Training")[2:]
    }


def test_settings_without_effect_are_not_shown(folder):
    shown = settings(folder)
    assert shown["lora"] == "`false`" and not [name for name in shown if name.startswith("lora_")]
    assert "epochs" not in shown and shown["max_steps"] == "`90`"
    assert "score_scale" in shown and "temperature" not in shown
    assert "document_regularizer" in shown and "query_regularizer" not in shown and "regularizer_warmup_steps" in shown
    assert shown["initialization"] == "`lexical`"

    distilled = {**RUN["objective"], "info_nce_weight": 0.0, "kl_weight": 1.0, "document_regularizer_weight": 0.0}
    shown = settings(folder, model="m", preset=None, lora=True, max_steps=None, objective=distilled)
    assert shown["lora"] == "`true`" and shown["lora_rank"] == "`16`" and shown["epochs"] == "`1.0`"
    assert "temperature" in shown and "score_scale" not in shown
    assert not {"family", "initialization", "document_regularizer", "regularizer_warmup_steps"} & set(shown)

    shown = settings(folder, model="m", preset=None, lora=None, quantization="nf4", objective={"temperature": 0.02})
    assert "lora_rank" in shown and shown["temperature"] == "`0.02`", "another family's objective is left alone"


def test_the_prompt_is_shown_where_a_template_reads_it(folder):
    processor = json.loads((folder / "processor_config.json").read_text())
    assert f"prompt:   {processor['prompt']}" in str(build_card(folder))
    processor |= {"query_template": "<s>{%%text%%}", "document_template": "<s>{%%text%%}"}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    text = str(build_card(folder))
    assert "prompt:" not in text and "document: <s>{%%text%%}\n```" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_reader_needs(family, tmp_path):
    load_preset(family, "tiny").save_pretrained(tmp_path)
    scipy = FAMILIES[family].representation == "sparse"
    text = " ".join(str(build_card(tmp_path)).split())
    needed = "`torch`, `transformers` and `scipy`" if scipy else "`torch` and `transformers`"
    assert f"nothing but {needed} has to be installed" in text
    assert "pip install rarezoo" not in text and "With rarezoo installed, the flag" in text


def test_quantized_checkpoint(tmp_path, tokenizer):
    pytest.importorskip("bitsandbytes")
    from rarezoo.mistral_splade import MistralSpladeConfig, MistralSpladeForRetrieval, MistralSpladeProcessor
    from rarezoo.quantization import quantize

    torch.manual_seed(0)
    config = MistralSpladeConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=160,
    )  # fmt: skip
    model = MistralSpladeForRetrieval(config)
    model.save_pretrained(tmp_path / "full")
    MistralSpladeProcessor(tokenizer).save_pretrained(tmp_path / "full")
    report = quantize(tmp_path / "full", tmp_path / "nf4", "nf4", "bfloat16", fidelity=False)
    report |= {
        "outputs": {"texts": 32, "cosine_mean": 0.98765, "top_10_term_overlap": 0.75},
        "file_bytes": {"full_precision": 4_000_000, "quantized": 1_000_000},
        "resident_bytes": {"full_precision": 9_000_000, "quantized": 2_500_000},
        "encode_milliseconds": {"full_precision": 20.0, "quantized": 10.0, "batch_size": 8},
        "retrieval": {"nDCG@10": {"full_precision": 0.5, "quantized": 0.49}},
    }
    (tmp_path / "nf4" / "quantization_report.json").write_text(json.dumps(report))
    card = build_card(tmp_path / "nf4", base_model=f"{USER}/full")
    text = str(card)
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in text, "not the packed bytes"
    assert "7 modules are quantized by bitsandbytes" in text
    assert "nothing but `torch`, `transformers`, `scipy`, `bitsandbytes` and `accelerate` has to be installed" in text
    assert "| weight files, MB | 4.0 | 1.0 |" in text
    assert "| nDCG@10 | 0.5000 | 0.4900 |" in text
    assert "Cosine to full precision 0.9877 on average over 32 texts; 75% of" in text
    assert header(text)["base_model_relation"] == "quantized"
    assert metadata_errors(text) == []


def test_the_card_s_code_runs(folder, run_without_rarezoo):
    blocks = re.findall(r"```python\n(.*?)```", str(build_card(folder, str(folder))), flags=re.DOTALL)
    assert len(blocks) == 2, "transformers and sentence-transformers"
    pytest.importorskip("sentence_transformers")
    scores, explained, *rest = run_without_rarezoo("\n".join(blocks)).splitlines()

    model = AutoModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    queries = model.encode_queries(["how do plants make food"], processor=processor)
    assert scores.startswith("[[")
    assert explained == str(model.explain(queries[0], processor=processor, top_k=10))
    assert rest


def test_the_code_on_a_language_model_s_card_runs(tmp_path, run_without_rarezoo):
    from rarezoo.lexinvariant.character_tokenizer import character_tokenizer

    folder = tmp_path / "tiny-lexinvariant"
    AutoModelForCausalLM.from_config(load_preset("lexinvariant", "tiny")).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    card = build_card(folder, str(folder))
    assert header(card)["pipeline_tag"] == "text-generation"
    assert "| parameters | 99,024 |" in str(card) and "tiny, 2 layers" in str(card)
    (block,) = re.findall(r"```python\n(.*?)```", str(card), flags=re.DOTALL)
    assert run_without_rarezoo(block).startswith("['A->2\\nB->3\\nC->5\\nB->")


TRANSPLANT_BASE, TRANSPLANT_DONOR = (
    Path(__file__).parent / "fixtures" / "tokenizer_transplant" / name for name in ("base_model", "donor_model")
)


@pytest.fixture(scope="module")
def transplanted(tmp_path_factory):
    """The same transplantation in two folders: as a plain model, and by its matrix. And its result."""
    from rarezoo import TransplantedForCausalLM
    from rarezoo.tokenizer_transplant import transplant_tokenizer

    folder = tmp_path_factory.mktemp("transplanted")
    result = transplant_tokenizer(TRANSPLANT_BASE, TRANSPLANT_DONOR, "retok", pad_to_multiple_of=64)
    result.save_pretrained(folder / "plain")
    tokenizers = result.tokenizer, AutoTokenizer.from_pretrained(TRANSPLANT_BASE)
    stored = TransplantedForCausalLM.from_base(
        TRANSPLANT_BASE, result.matrix, *tokenizers, provenance=result.report.provenance
    )
    stored.save_pretrained(folder / "stored")
    result.tokenizer.save_pretrained(folder / "stored")
    return folder, result


@pytest.mark.parametrize("kind", ["plain", "stored"])
def test_transplanted_models(kind, transplanted, run_without_rarezoo):
    """The numbers are the report's and the model's; a plain one needs no code, and the card does not speak of any."""
    folder, result = transplanted
    card = build_card(folder / kind, str(folder / kind))
    text, data = str(card), header(card)
    sources = [row["source"] for row in result.report.rows()]
    told = next(line for line in text.splitlines() if line.startswith("| where rows come from |"))
    for source in set(sources):
        assert f"{sources.count(source)} {source}" in told
    assert f"| parameters | {sum(p.numel() for p in result.model.parameters()):,} |" in text
    assert f"| tokens | {len(result.tokenizer)}, in tables of 576 rows; the base's have 576 |" in text
    weights = "model.safetensors" if kind == "plain" else "transplant_matrix.safetensors"
    assert f"| {(folder / kind / weights).stat().st_size / 1e3:.0f} kB (" in text
    assert "| method | `retok` |" in text and "| fallback |" in text and "special_map" not in text
    assert (data["pipeline_tag"], data["library_name"]) == ("text-generation", "transformers")
    assert "tokenizer-transplantation" in data["tags"] and metadata_errors(text) == []
    assert "base_model" not in data, "it is a folder"
    assert ("custom_code" in data["tags"]) == ("trust_remote_code" in text) == (kind == "stored")
    assert ("| base | base_model |" in text) == (kind == "stored")
    for unfilled in ("{{", "{%", "None", "Undefined", str(TRANSPLANT_BASE.parent)):
        assert unfilled not in re.sub(r"```.*?```", "", text, flags=re.DOTALL), unfilled
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    inputs = result.tokenizer("The capital of France is", return_tensors="pt")
    expected = result.tokenizer.decode(result.model.eval().generate(**inputs, max_new_tokens=8)[0])
    assert run_without_rarezoo(block).strip() == expected.strip()


def test_a_transplanted_masked_language_model(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.tokenizer_transplant = {"method": "0.5 omp + 0.5 mean", "options": [["omp", {"k": 2}, 0.5]], "seed": 1}
    BertForMaskedLM(config).save_pretrained(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    card = build_card(tmp_path)
    assert header(card)["pipeline_tag"] == "fill-mask" and "AutoModelForMaskedLM" in str(card)
    assert header(card)["model-index"][0]["results"][0]["task"]["type"] == "fill-mask"
    assert '| options | `[["omp", {"k": 2}, 0.5]]` |' in str(card)


def test_what_readers_of_a_transplanted_model_need(transplanted, tmp_path):
    """A plain folder is whole without code; one that refers to its base has to name it as the Hub does."""
    folder, _ = transplanted
    check_complete(folder / "plain")
    assert {"model.safetensors", "transplant_report.json"} <= set(checkpoint_files(folder / "plain"))
    stored = shutil.copytree(folder / "stored", tmp_path / "stored")
    with pytest.raises(ValueError, match=r"names the folder '.*base_model' as its base, which readers do not have"):
        check_complete(stored)
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": f"{USER}/base"}))
    check_complete(stored)
    assert header(build_card(stored))["base_model"] == f"{USER}/base"
    assert "transplant_matrix.safetensors" in checkpoint_files(stored)
    assert "modeling_tokenizer_transplant.py" in checkpoint_files(stored)
    (stored / "transplant_matrix.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"not a whole checkpoint: transplant_matrix\.safetensors missing"):
        check_complete(stored)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(table="gaussian"), "Every text has a table of random rows of its own"),
        (dict(table="learned", unseen_logits="sampled"), "This one is the standard twin"),
        (dict(table="canonical"), "renaming the symbols of a text renames the answer"),
        (dict(table="mixed", unseen_logits="sampled"), "20% of a text's symbols have random ones"),
    ],
)
def test_tables_of_symbols_are_described(fields, sentence, tmp_path):
    load_preset("lexinvariant", "tiny", **fields).save_pretrained(tmp_path)
    text = str(build_card(tmp_path))
    assert sentence in text and f"| table | {fields['table']}" in text


def rows(text, title):
    """The cells of the table under a heading."""
    lines = text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]


def test_tables_hold_any_text(folder):
    recipe = {
        "prompt": "a|b\nc", "config": {"x|y": [1, 2]}, "bf16": True, "learning_rate": 0.5,
        "query_template": "<s>{!%%text%%}*_*", "quoted": "`a`", "backticks": "a`b``c",
    }  # fmt: skip
    (folder / "training_recipe.json").write_text(json.dumps(recipe))
    evaluation = {"dataset": "one|two\nthree", "split": None, "metrics": {"P|5": 0.25}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    text = str(build_card(folder))
    assert rows(text, "Training")[2:] == [
        [" prompt ", r" `a\|b\nc` "], [r" config.x\|y ", " `[1, 2]` "], [" bf16 ", " `true` "],
        [" learning_rate ", " `0.5` "], [" query_template ", " `<s>{!%%text%%}*_*` "], [" quoted ", " `` `a` `` "],
        [" backticks ", " ```a`b``c``` "],
    ]  # fmt: skip
    assert rows(text, "Evaluation")[2:] == [[r" one\|two\nthree ", "  ", r" P\|5 ", " 0.2500 "]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, None, "0.5"])
def test_metrics_are_finite_numbers(folder, value):
    (folder / "evaluation.json").write_text(json.dumps({**EVALUATION, "metrics": {"nDCG@10": value}}))
    with pytest.raises(ValueError, match=r"evaluation.json: expected \{'dataset': name.*found"):
        build_card(folder)


def test_clear_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        build_card(tmp_path)
    for wrong in ({"metrics": {"nDCG@10": 0.5}}, {"dataset": "x", "metrics": {"nDCG@10": "high"}}, {"dataset": "x"}, 3):
        (folder / "evaluation.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"expected \{'dataset': name.*found"):
            build_card(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"type 'bert'; known families.*converted first"):
        build_card(folder)


def add_private_files(folder):
    (folder / "checkpoint-10").mkdir()
    states = ["checkpoint-10/optimizer.pt", "checkpoint-10/model.safetensors", "scheduler.pt", "training_args.bin"]
    for name in (*states, "trainer_state.json", ".env", "hub_token.txt", "id_rsa", "notes.py"):
        (folder / name).write_text("secret")


def test_only_the_files_of_a_checkpoint_are_uploaded(folder):
    clean = set(checkpoint_files(folder))
    assert clean == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    add_private_files(folder)
    (folder / "curve.png").write_bytes(b"png")
    assert set(checkpoint_files(folder)) == clean
    assert set(checkpoint_files(folder, ["*.png", "checkpoint-10/*.pt"])) - clean == {
        "curve.png",
        "checkpoint-10/optimizer.pt",
    }


def test_an_incomplete_folder_is_refused_before_anything_is_sent(folder):
    (folder / "model.safetensors").unlink()
    (folder / "processor_config.json").unlink()
    (folder / "fused_vocabulary_pooling.py").unlink()
    with pytest.raises(FileNotFoundError) as error:
        push(folder, f"{USER}/never")
    message = str(error.value)
    assert "fused_vocabulary_pooling.py, model.safetensors, processor_config.json missing" in message
    assert not (folder / "README.md").exists()


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors missing"):
        push(folder, f"{USER}/never")


def client(code, environment):
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)


def test_push_leaves_the_author_s_readme_alone(folder, tmp_path):
    mine = "---\nlicense: mit\n---\n# My model\n"
    (folder / "README.md").write_text(mine)
    publish = f"""
from rarezoo.model_cards import push
push({str(folder)!r}, "{USER}/mine", license="apache-2.0")
"""
    with LoopbackHub() as hub:
        published = client(publish, hub.environment(tmp_path / "publisher"))
        assert published.returncode == 0, published.stderr
        assert hub.content(f"{USER}/mine", "README.md").decode() == mine
    assert (folder / "README.md").read_text() == mine
    said = f"{folder / 'README.md'} was written or edited by hand and is uploaded unchanged, without the given license"
    assert said in published.stderr


def test_push_to_a_hub_and_load_back(folder, tmp_path, run_without_rarezoo):
    add_private_files(folder)
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    publish = f"""
from huggingface_hub import ModelCard
from rarezoo.model_cards import build_card, push
build_card({str(folder)!r}, license="apache-2.0").validate()
commit = push({str(folder)!r}, "{USER}/tiny-splade", revision="release", private=True, license="apache-2.0")
print(commit.oid)
try:
    ModelCard("---\\nlicense: [mit]\\n---\\n").validate()
except ValueError as error:
    print("refused")
"""
    with LoopbackHub() as hub:
        published = client(publish, hub.environment(tmp_path / "publisher"))
        assert published.returncode == 0, published.stderr
        commit, refused = published.stdout.split()
        assert refused == "refused", "the server does look at metadata"
        assert hub.repositories[f"{USER}/tiny-splade"].resolve("release").oid == commit
        assert hub.repositories[f"{USER}/tiny-splade"].private
        assert hub.files(f"{USER}/tiny-splade") == {".gitattributes"}, "main is untouched"
        stored = hub.files(f"{USER}/tiny-splade", "release")
        assert stored == {*checkpoint_files(folder), ".gitattributes"}
        assert not any(b"secret" == content for content in hub.objects.values())
        assert "hub_token.txt" in published.stderr, "what stays behind is said"
        readme = hub.content(f"{USER}/tiny-splade", "README.md", "release").decode()
        assert f'from_pretrained("{USER}/tiny-splade", trust_remote_code=True)' in readme

        printed = run_without_rarezoo(
            f"""
            import json
            from transformers import AutoModel, AutoProcessor
            options = dict(revision="release", trust_remote_code=True)
            model = AutoModel.from_pretrained("{USER}/tiny-splade", **options)
            processor = AutoProcessor.from_pretrained("{USER}/tiny-splade", **options)
            print(json.dumps(model.encode_queries(["the cat"], processor=processor, output="dense").tolist()))
            """,
            **hub.environment(tmp_path / "reader"),
        )
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        expected = model.encode_queries(["the cat"], processor=processor, output="dense")
        assert torch.equal(torch.tensor(json.loads(printed.splitlines()[-1])), expected)
