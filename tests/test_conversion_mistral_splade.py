"""Every published layout of Mistral-SPLADE to rarezoo's and back, compared with the reference numbers and with the
libraries that own the layouts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from rarezoo.conversion import ConversionError, convert

from .loopback_hub import USER, LoopbackHub

TOLERANCE = 1e-5
MERGED_TOLERANCE = 2e-5


def to_rarezoo(source, destination, **options):
    return convert("mistral_splade", source, destination, **options)


def to_official(source, destination, **options):
    return convert("mistral_splade", source, destination, to="official", **options)


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content |= changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def read_weights(folder):
    tensors = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.fixture(scope="session")
def references(fixture_folder):
    """`references(name)`: the tensors of one of the fixture's files."""
    return lambda name: load_file(fixture_folder / f"{name}.safetensors")


@pytest.fixture
def mistral(fixture_folder, tmp_path):
    """Layout (a): a transformers folder of MistralForCausalLM with its tokenizer."""
    folder = tmp_path / "mistral"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(fixture_folder / name, folder / name)
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


@pytest.fixture
def adapter(fixture_folder, mistral):
    """`adapter(name, base)`: layout (b), a copy of one of the fixture's adapters that names its base."""

    def copy(name="adapter_linear", base=None, folder=None):
        folder = shutil.copytree(fixture_folder / name, folder or mistral.parent / name)
        edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base or mistral))
        return folder

    return copy


@torch.no_grad()
def echo_difference(folder, inputs, reference, kinds=("query", "document"), prefix=""):
    """Largest difference of the checkpoint's echo vectors to the reference; ids and masks must be equal."""
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert processor.attention_mode == model.config.attention_mode == "echo"
    difference = 0.0
    for kind in kinds:
        texts = inputs["queries" if kind == "query" else "documents"]
        batch = processor.process_queries(texts) if kind == "query" else processor.process_documents(texts)
        if f"{kind}.input_ids" in reference:
            assert torch.equal(batch["input_ids"], reference[f"{kind}.input_ids"])
            assert torch.equal(batch["pool_mask"], reference[f"{kind}.embed_mask"])
        found = model(**batch).sparse_embedding
        difference = max(difference, (found - reference[f"{prefix}{kind}.rep_max"]).abs().max().item())
    return difference


@torch.no_grad()
def plain_difference(folder, plain, name="rep_max"):
    model = AutoModel.from_pretrained(folder)
    found = model(plain["input_ids_right"], plain["attention_mask_right"]).sparse_embedding
    return (found - plain[name]).abs().max().item()


class TestHuggingFaceLayout:
    def test_echo_reproduces_the_reference(self, mistral, target, inputs, references):
        report = to_rarezoo(mistral, target)
        assert echo_difference(target, inputs, references("echo")) <= TOLERANCE
        (folder,) = report.folders
        assert (report.source_layout, folder.layout, folder.path) == ("hf", "rarezoo", str(target))
        assert (folder.tensors, folder.parameters, folder.dtype, folder.files) == (21, 27296, "float32", 1)
        assert folder.dropped == {} and folder.notes == ()

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"attention_mode": "plain"}, "rep_max"),
            ({"attention_mode": "plain", "pooling": "sum"}, "rep_sum"),
            ({"attention_mode": "plain", "activation": "log1p_log1p_relu"}, "rep_max_log1p_relu"),
            ({"attention_mode": "bidirectional"}, "rep_max_bidirectional"),
            ({"attention_mode": "plain", "logit_scale": 32**-0.25}, "rep_max_logit_scale"),
            (
                {"attention_mode": "plain", "tie_word_embeddings": True, "logit_scale": 0.25},
                "rep_max_head_from_embeddings_x0.25",
            ),
        ],
    )
    def test_config_options_reproduce_the_reference(self, options, name, mistral, target, references):
        to_rarezoo(mistral, target, config_options=options)
        assert plain_difference(target, references("plain"), name) <= TOLERANCE
        assert AutoProcessor.from_pretrained(target).attention_mode == options["attention_mode"]

    def test_weights_are_bit_equal(self, mistral, target):
        to_rarezoo(mistral, target)
        source, found = read_weights(mistral), read_weights(target)
        assert source.keys() == found.keys()
        assert all(torch.equal(source[name], found[name]) for name in source)

    def test_the_folder_is_what_the_family_itself_saves(self, mistral, target, splade_checkpoint):
        to_rarezoo(mistral, target, processor_options={"max_query_length": 300, "max_document_length": 300})
        saved = {path.name: path.read_bytes() for path in splade_checkpoint.iterdir()}
        found = {path.name: path.read_bytes() for path in target.iterdir()}
        assert found.keys() == saved.keys()
        for name in sorted(saved):
            if name.endswith(".safetensors"):
                mine, theirs = load_file(target / name), load_file(splade_checkpoint / name)
                assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
            else:
                assert found[name] == saved[name], name

    def test_it_loads_without_the_package(self, mistral, target, fixture_folder, run_without_rarezoo):
        to_rarezoo(mistral, target)
        printed = run_without_rarezoo(f"""
            import json, torch
            from safetensors.torch import load_file
            from transformers import AutoModel, AutoProcessor

            texts = json.load(open("{fixture_folder}/inputs.json"))["documents"]
            model = AutoModel.from_pretrained("{target}", trust_remote_code=True)
            processor = AutoProcessor.from_pretrained("{target}", trust_remote_code=True)
            with torch.no_grad():
                found = model(**processor.process_documents(texts)).sparse_embedding
            print((found - load_file("{fixture_folder}/echo.safetensors")["document.rep_max"]).abs().max().item())
        """)
        assert float(printed.splitlines()[-1]) <= TOLERANCE

    @pytest.mark.parametrize("kind", ["bin", "sharded", "sharded_bin"])
    def test_other_weight_files_are_read(self, kind, mistral, target, inputs, references):
        tensors = load_file(mistral / "model.safetensors")
        (mistral / "model.safetensors").unlink()
        model = MistralForCausalLM(AutoConfig.from_pretrained(mistral))
        model.load_state_dict(tensors)
        if kind == "sharded":
            model.save_pretrained(mistral, max_shard_size="30KB")
            assert len(list(mistral.glob("*.safetensors"))) > 2
        elif kind == "bin":
            torch.save(model.state_dict(), mistral / "pytorch_model.bin")
        else:
            names = list(tensors)
            weight_map = {}
            for i in range(3):
                file = f"pytorch_model-0000{i + 1}-of-00003.bin"
                torch.save({name: tensors[name] for name in names[i::3]}, mistral / file)
                weight_map |= dict.fromkeys(names[i::3], file)
            index = {"metadata": {}, "weight_map": weight_map}
            (mistral / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        to_rarezoo(mistral, target)
        assert echo_difference(target, inputs, references("echo")) <= TOLERANCE

    def test_sharded_output(self, mistral, target, inputs, references):
        (folder,) = to_rarezoo(mistral, target, max_shard_size="30KB").folders
        assert folder.files == len(list(target.glob("*.safetensors"))) > 2
        assert echo_difference(target, inputs, references("echo")) <= TOLERANCE

    def test_bfloat16(self, mistral, target, inputs, references):
        (folder,) = to_rarezoo(mistral, target, dtype="bf16").folders
        assert (folder.dtype, folder.size_bytes) == ("bfloat16", 2 * 27296)
        source, found = read_weights(mistral), read_weights(target)
        assert all(torch.equal(found[name], source[name].bfloat16()) for name in source)
        model = AutoModel.from_pretrained(target)
        assert model.dtype == torch.bfloat16
        # The same weights, rounded, in plain transformers are the independent reference.
        plain = references("plain")
        reference = MistralForCausalLM.from_pretrained(mistral, dtype=torch.bfloat16)
        masked = AutoModelForMaskedLM.from_pretrained(target)
        with torch.no_grad():
            arguments = plain["input_ids_right"], plain["attention_mask_right"]
            assert torch.equal(masked(*arguments).logits, reference(*arguments).logits)

    def test_an_old_configuration(self, mistral, target):
        edit_json(mistral / "config.json", rope_parameters=..., dtype=..., rope_theta=1e6, torch_dtype="float32")
        to_rarezoo(mistral, target)
        config = AutoConfig.from_pretrained(target)
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}

    def test_a_sliding_window_and_a_head_width_of_its_own_are_kept(self, mistral, target):
        edit_json(mistral / "config.json", sliding_window=7, num_attention_heads=4, head_dim=8, hidden_size=32)
        to_rarezoo(mistral, target, config_options={"attention_mode": "plain"})
        config = AutoConfig.from_pretrained(target)
        assert (config.sliding_window, config.head_dim) == (7, 8)
        ids = torch.randint(3, 160, (2, 20), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = MistralForCausalLM.from_pretrained(mistral)(ids).logits
            found = AutoModelForMaskedLM.from_pretrained(target)(ids).logits
        assert torch.equal(found, expected)

    def test_constants_of_old_checkpoints_are_dropped_with_a_reason(self, mistral, target):
        tensors = load_file(mistral / "model.safetensors")
        name = "model.layers.1.self_attn.rotary_emb.inv_freq"
        save_file({**tensors, name: torch.ones(4)}, mistral / "model.safetensors", metadata={"format": "pt"})
        (folder,) = to_rarezoo(mistral, target).folders
        assert folder.dropped == {name: "computed from the configuration"}

    def test_llm2vec_s_class_name_means_no_causal_mask(self, mistral, target, references):
        edit_json(mistral / "config.json", architectures=["MistralBiForMNTP"])
        to_rarezoo(mistral, target)
        assert AutoConfig.from_pretrained(target).attention_mode == "bidirectional"
        assert plain_difference(target, references("plain"), "rep_max_bidirectional") <= TOLERANCE

    def test_licences_and_generation_settings_travel(self, mistral, target):
        (mistral / "LICENSE.txt").write_text("terms")
        (mistral / "README.md").write_text("their card")
        (mistral / "generation_config.json").write_text('{"eos_token_id": 2}')
        to_rarezoo(mistral, target)
        assert (target / "LICENSE.txt").read_text() == "terms"
        assert (target / "generation_config.json").exists()
        assert not (target / "README.md").exists()

    def test_another_family_s_processor_is_not_read(self, mistral, target):
        (mistral / "processor_config.json").write_text('{"processor_class": "OtherProcessor", "max_query_length": 3}')
        to_rarezoo(mistral, target)
        assert AutoProcessor.from_pretrained(target).max_query_length == 256

    def test_processor_options(self, mistral, target):
        options = {"query_template": "<s>{!%%prompt%%}{%%text%%}", "prompt": "find", "max_query_length": 9}
        to_rarezoo(mistral, target, processor_options=options)
        processor = AutoProcessor.from_pretrained(target)
        assert {name: getattr(processor, name) for name in options} == options


class TestTiedHeads:
    @pytest.fixture
    def tied(self, mistral):
        tensors = load_file(mistral / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, mistral / "model.safetensors", metadata={"format": "pt"})
        edit_json(mistral / "config.json", tie_word_embeddings=True)
        return mistral

    OPTIONS = {"attention_mode": "plain", "logit_scale": 0.25}

    def test_a_tied_head_need_not_be_stored(self, tied, target, references):
        (folder,) = to_rarezoo(tied, target, config_options=self.OPTIONS).folders
        assert "lm_head.weight" not in read_weights(target) and folder.tensors == 20
        assert plain_difference(target, references("plain"), "rep_max_head_from_embeddings_x0.25") <= TOLERANCE

    def test_a_stored_copy_of_a_tied_head_is_dropped(self, tied, target, references):
        tensors = load_file(tied / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        torch.save(tensors, tied / "pytorch_model.bin")
        (tied / "model.safetensors").unlink()
        (folder,) = to_rarezoo(tied, target, config_options=self.OPTIONS).folders
        assert folder.dropped == {"lm_head.weight": "tied: equal to the embedding"}
        assert plain_difference(target, references("plain"), "rep_max_head_from_embeddings_x0.25") <= TOLERANCE

    def test_a_stored_head_that_differs_is_an_error_until_it_is_untied(self, tied, target, fixture_folder, references):
        shutil.copyfile(fixture_folder / "model.safetensors", tied / "model.safetensors")
        with pytest.raises(
            ConversionError, match="stores a head that differs; give config_options tie_word_embeddings"
        ):
            to_rarezoo(tied, target)
        to_rarezoo(tied, target, config_options={"attention_mode": "plain", "tie_word_embeddings": False})
        assert plain_difference(target, references("plain")) <= TOLERANCE

    def test_untying_stores_the_embedding_twice(self, tied, target):
        to_rarezoo(tied, target, config_options={"tie_word_embeddings": False})
        weights = read_weights(target)
        assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
        assert AutoConfig.from_pretrained(target).tie_word_embeddings is False

    def test_tying_on_request_drops_the_head(self, mistral, target):
        (folder,) = to_rarezoo(mistral, target, config_options={"tie_word_embeddings": True}).folders
        assert "tie_word_embeddings was asked for" in folder.dropped["lm_head.weight"]

    @pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
    def test_an_adapter_on_one_of_them_unties_them(self, module, tied, target):
        from peft import LoraConfig, PeftModel, get_peft_model

        model = get_peft_model(MistralForCausalLM.from_pretrained(tied), LoraConfig(r=3, target_modules=[module]))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.2)
        model.save_pretrained(tied.parent / "adapter")
        # Unmerged, PEFT adds the factors beside the tied weight: the other use of it does not change.
        live = PeftModel.from_pretrained(MistralForCausalLM.from_pretrained(tied), tied.parent / "adapter").eval()
        (folder,) = to_rarezoo(tied.parent / "adapter", target, base=tied).folders
        assert any("untied" in note for note in folder.notes)
        assert AutoConfig.from_pretrained(target).tie_word_embeddings is False
        before, after = read_weights(tied), read_weights(target)
        other = "model.embed_tokens.weight" if module == "lm_head" else "lm_head.weight"
        assert torch.equal(after[other], before["model.embed_tokens.weight"])
        ids = torch.tensor([[1, 7, 30, 90, 12]])
        with torch.no_grad():
            found = AutoModelForMaskedLM.from_pretrained(target, attention_mode="plain")(ids).logits
            assert (found - live(ids).logits).abs().max() <= MERGED_TOLERANCE


class TestAdapterLayout:
    @pytest.mark.parametrize("name", ["adapter_linear", "adapter_with_head"])
    def test_merged_vectors_reproduce_the_reference(self, name, adapter, target, inputs, references):
        report = to_rarezoo(adapter(name), target)
        assert report.source_layout == "peft"
        assert len(report.folders[0].merged) == {"adapter_linear": 14, "adapter_with_head": 5}[name]
        assert echo_difference(target, inputs, references("lora"), prefix=f"{name}.") <= MERGED_TOLERANCE

    def test_the_merged_weight_of_the_fixture(self, adapter, target, references):
        to_rarezoo(adapter(), target)
        found = read_weights(target)["model.layers.0.self_attn.q_proj.weight"]
        expected = references("lora")["adapter_linear.merged.layers.0.self_attn.q_proj.weight"]
        assert (found - expected).abs().max() <= 1e-6

    def test_the_sum_is_rounded_once(self, adapter, target, fixture_folder):
        to_rarezoo(adapter(), target, dtype="bfloat16")
        name = "model.layers.1.mlp.gate_proj"
        stored = load_file(fixture_folder / "adapter_linear" / "adapter_model.safetensors")
        a, b = (stored[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
        exact = load_file(fixture_folder / "model.safetensors")[f"{name}.weight"].double() + 8 / 4 * b @ a
        assert torch.equal(read_weights(target)[f"{name}.weight"], exact.float().bfloat16())

    @pytest.mark.parametrize("name", ["adapter_linear", "adapter_with_head"])
    def test_an_unmerged_adapter_loads_with_peft(self, name, adapter, target, inputs, references, mistral):
        from peft import PeftModel

        (folder,) = to_rarezoo(adapter(name), target, merge_adapter=False).folders
        assert folder.merged == () and any("lora/" in note for note in folder.notes)
        source, found = read_weights(mistral), read_weights(target)
        assert all(torch.equal(source[key], found[key]) for key in source)
        assert not any("base_layer" in key for key in load_file(target / "lora" / "adapter_model.safetensors"))
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(target), target, subfolder="lora").eval()
        processor = AutoProcessor.from_pretrained(target)
        with torch.no_grad():
            found = model(**processor.process_documents(inputs["documents"])).sparse_embedding
        assert (found - references("lora")[f"{name}.document.rep_max"]).abs().max() <= MERGED_TOLERANCE
        # Converting that folder once more merges it: its base is named relative to itself.
        to_rarezoo(target, target.parent / "merged")
        difference = echo_difference(target.parent / "merged", inputs, references("lora"), prefix=f"{name}.")
        assert difference <= MERGED_TOLERANCE

    def test_a_base_on_another_machine_needs_an_override(self, adapter, mistral, target, inputs, references):
        folder = adapter(base="/datasets/of/somebody/llama")
        with pytest.raises(FileNotFoundError, match=r"'/datasets/of/somebody/llama' named in .*give the base.*base="):
            to_rarezoo(folder, target)
        assert not target.exists()
        to_rarezoo(folder, target, base=mistral)
        assert echo_difference(target, inputs, references("lora"), prefix="adapter_linear.") <= MERGED_TOLERANCE

    def test_a_relative_base_is_looked_for_around_the_adapter(self, adapter, mistral, target, inputs, references):
        folder = adapter(base=".", folder=mistral / "adapter")
        to_rarezoo(folder, target)
        assert echo_difference(target, inputs, references("lora"), prefix="adapter_linear.") <= MERGED_TOLERANCE

    def test_an_adapter_that_names_no_base(self, adapter, target):
        folder = adapter()
        edit_json(folder / "adapter_config.json", base_model_name_or_path=None)
        with pytest.raises(ConversionError, match="names no base; give the base checkpoint with base="):
            to_rarezoo(folder, target)

    def test_a_base_that_is_not_needed_is_refused(self, mistral, target):
        with pytest.raises(ConversionError, match="holds no adapter that would need one"):
            to_rarezoo(mistral, target, base=mistral)

    def test_an_adapter_on_another_base(self, adapter, mistral, target):
        folder = adapter("adapter_with_head")
        tensors = load_file(mistral / "model.safetensors")
        tensors["lm_head.weight"] *= 1.5
        save_file(tensors, mistral / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConversionError, match="was trained on another base"):
            to_rarezoo(folder, target)
        assert sorted(path.name for path in target.parent.iterdir()) == ["adapter_with_head", "mistral"]

    def test_an_adapter_on_our_own_checkpoint_keeps_its_settings(
        self, adapter, splade_checkpoint, target, inputs, references
    ):
        folder = adapter(base=splade_checkpoint)
        to_rarezoo(folder, target)
        processor = AutoProcessor.from_pretrained(target)
        assert processor.max_query_length == inputs["max_length"] == 300
        assert echo_difference(target, inputs, references("lora"), prefix="adapter_linear.") <= MERGED_TOLERANCE

    def test_adapter_and_base_from_a_hub(self, adapter, mistral, target, tmp_path, inputs, references):
        folder = adapter(base=f"{USER}/base")
        code = f"""
import json
from dataclasses import asdict
from huggingface_hub import HfApi
from rarezoo.conversion import convert
for name, folder in (("base", {str(mistral)!r}), ("adapter", {str(folder)!r})):
    HfApi().create_repo("{USER}/" + name)
    HfApi().upload_folder(repo_id="{USER}/" + name, folder_path=folder)
print(json.dumps(asdict(convert("mistral_splade", "{USER}/adapter", {str(target)!r}))))
"""
        with LoopbackHub() as hub:
            environment = hub.environment(tmp_path / "hub_home")
            finished = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240
            )
        assert finished.returncode == 0, finished.stderr
        report = json.loads(finished.stdout.splitlines()[-1])
        assert report["source"] == f"{USER}/adapter" and report["source_layout"] == "peft"
        assert echo_difference(target, inputs, references("lora"), prefix="adapter_linear.") <= MERGED_TOLERANCE


class TestTevatronLayout:
    @pytest.fixture
    def pair(self, mistral, adapter, tmp_path):
        """Layout (c): an untouched query encoder, a fine-tuned passage encoder (merged by PEFT, saved as .bin)."""
        from peft import PeftModel

        folder = tmp_path / "pair"
        shutil.copytree(mistral, folder / "query_model", ignore=shutil.ignore_patterns("tokenizer*"))
        merged = PeftModel.from_pretrained(MistralForCausalLM.from_pretrained(mistral), adapter()).merge_and_unload()
        (folder / "passage_model").mkdir()
        shutil.copyfile(mistral / "config.json", folder / "passage_model" / "config.json")
        torch.save(merged.state_dict(), folder / "passage_model" / "pytorch_model.bin")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(mistral / name, folder / name)
        return folder

    def test_a_pair_becomes_two_folders(self, pair, target, inputs, references):
        report = to_rarezoo(pair, target)
        assert report.source_layout == "tevatron"
        assert [folder.path for folder in report.folders] == [str(target / "query"), str(target / "document")]
        assert echo_difference(target / "query", inputs, references("echo"), ("query",)) <= TOLERANCE
        difference = echo_difference(
            target / "document", inputs, references("lora"), ("document",), prefix="adapter_linear."
        )
        assert difference <= MERGED_TOLERANCE

    def test_one_of_them_by_role(self, pair, target, inputs, references):
        report = to_rarezoo(pair, target, role="query")
        assert [folder.path for folder in report.folders] == [str(target)]
        assert echo_difference(target, inputs, references("echo")) <= TOLERANCE
        with pytest.raises(ConversionError, match="role must be query or document; found 'passage'"):
            to_rarezoo(pair, target.parent / "other", role="passage")

    def test_half_a_pair(self, pair, target):
        shutil.rmtree(pair / "passage_model")
        with pytest.raises(ConversionError, match=r"lacks passage_model/, half of the pair"):
            to_rarezoo(pair, target)

    def test_a_pooler_with_weights_is_refused(self, pair, target):
        torch.save({"linear_q.weight": torch.zeros(2, 2)}, pair / "pooler.pt")
        with pytest.raises(ConversionError, match=r"pooler\.pt projects .*linear_q\.weight.*dense retriever"):
            to_rarezoo(pair, target)

    def test_a_pooler_without_weights_is_dropped(self, mistral, target):
        torch.save({}, mistral / "pooler.pt")
        (mistral / "pooler_config.json").write_text("{}")
        (folder,) = to_rarezoo(mistral, target).folders
        assert folder.dropped["pooler.pt"] == "a pooler without tensors"

    def test_the_way_back_is_bit_equal(self, pair, target, tmp_path):
        to_rarezoo(pair, target)
        report = to_official(target, tmp_path / "back", layout="tevatron")
        assert [Path(folder.path).name for folder in report.folders] == ["query_model", "passage_model"]
        for name in ("query_model", "passage_model"):
            source, back = MistralForCausalLM.from_pretrained(pair / name), read_weights(tmp_path / "back" / name)
            assert source.state_dict().keys() == back.keys()
            assert all(torch.equal(tensor, back[key]) for key, tensor in source.state_dict().items())
        for folder in (tmp_path / "back", tmp_path / "back" / "query_model"):
            assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(pair).get_vocab()
        with pytest.raises(ConversionError, match="layout 'tevatron' takes a pair"):
            to_official(target, tmp_path / "other")

    def test_role_needs_a_pair(self, mistral, target):
        with pytest.raises(ConversionError, match="holds one encoder for queries and documents; leave role out"):
            to_rarezoo(mistral, target, role="query")


class TestNaverLayout:
    """Layout (d); the independent reference is sentence-transformers itself on the merged weights."""

    @pytest.fixture
    def naver(self, mistral, adapter, tmp_path):
        """`naver(pooling, prompts)`: adapter in lora/, its base elsewhere, beside sentence-transformers' files."""

        def build(pooling="max", activation="relu", prompts=None, **config):
            folder = tmp_path / "naver"
            (folder / "1_SpladePooling").mkdir(parents=True)
            adapter("adapter_with_head", folder=folder / "lora")
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(mistral / name, folder / name)
            edit_json(folder / "config.json", auto_map={"AutoModelForMaskedLM": "splade.Splade"}, **config)
            (folder / "splade.py").write_text("raise RuntimeError('foreign code was run')")
            pooling_config = {"pooling_strategy": pooling, "activation_function": activation}
            (folder / "1_SpladePooling" / "config.json").write_text(json.dumps(pooling_config))
            encoder = {"model_type": "SparseEncoder", "similarity_fn_name": "dot", "prompts": prompts or {}}
            (folder / "config_sentence_transformers.json").write_text(json.dumps(encoder))
            transformer = {"transformer_task": "fill-mask", "max_seq_length": 40}
            (folder / "sentence_bert_config.json").write_text(json.dumps(transformer))
            (folder / "modules.json").write_text(json.dumps(MODULES))
            return folder

        return build

    @pytest.fixture
    def sparse_encoder(self, mistral, tmp_path):
        """`sparse_encoder(naver_folder)`: sentence-transformers on that folder, the adapter merged by PEFT."""
        from peft import PeftModel
        from sentence_transformers import SparseEncoder

        def build(folder):
            model = PeftModel.from_pretrained(MistralForCausalLM.from_pretrained(mistral), folder / "lora")
            reference = shutil.copytree(folder, tmp_path / "reference", ignore=shutil.ignore_patterns("lora", "*.py"))
            model.merge_and_unload().save_pretrained(reference)
            code = "from transformers import MistralForCausalLM\n\n\nclass Plain(MistralForCausalLM):\n    pass\n"
            (reference / "modeling_plain.py").write_text(code)
            auto_map = {"AutoModelForMaskedLM": "modeling_plain.Plain"}
            edit_json(reference / "config.json", auto_map=auto_map, architectures=["Plain"])
            return SparseEncoder(str(reference), trust_remote_code=True, device="cpu")

        return build

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"pooling": "sum"},
            {"activation": "log1p_relu"},
            {"prompts": {"query": "search: ", "document": "text: "}},
        ],
        ids=["max", "sum", "log1p", "prompts"],
    )
    def test_vectors_equal_sentence_transformers(self, options, naver, sparse_encoder, target, inputs):
        folder = naver(**options)
        report = to_rarezoo(folder, target)
        assert report.source_layout == "naver"
        assert report.folders[0].dropped == {"splade.py": "the source's own code; rarezoo's takes its place"}
        assert any("a causal mask is assumed" in note for note in report.folders[0].notes)
        model = AutoModel.from_pretrained(target)
        peer = sparse_encoder(folder)
        queries, documents = inputs["queries"], [*inputs["documents"], "the cat sat on the mat " * 20]
        for mine, theirs in (
            (model.encode_queries(queries, output="dense"), peer.encode_query(queries)),
            (model.encode_documents(documents, output="dense"), peer.encode_document(documents)),
        ):
            assert (mine - theirs.to_dense()).abs().max() <= MERGED_TOLERANCE
            assert mine.count_nonzero() > 0

    @pytest.mark.parametrize("statement", [{"is_causal": False}, {"architectures": ["MistralBiForMNTP"]}])
    def test_a_root_that_says_bidirectional(self, statement, naver, target):
        (folder,) = to_rarezoo(naver(**statement), target).folders
        assert AutoConfig.from_pretrained(target).attention_mode == "bidirectional"
        assert folder.notes == ()

    def test_echo_can_be_asked_for(self, naver, target, inputs, references):
        to_rarezoo(naver(), target, config_options={"attention_mode": "echo"})
        assert echo_difference(target, inputs, references("lora"), prefix="adapter_with_head.") <= MERGED_TOLERANCE

    def test_poolings_of_others_are_refused(self, naver, target):
        with pytest.raises(ConversionError, match=r"expected pooling_strategy max or sum.*found 'mean'"):
            to_rarezoo(naver(pooling="mean"), target)

    def test_whole_weights_beside_the_files(self, naver, sparse_encoder, target, inputs):
        peer = sparse_encoder(naver())
        report = to_rarezoo(target.parent / "reference", target)
        assert report.source_layout == "naver" and report.folders[0].merged == ()
        found = AutoModel.from_pretrained(target).encode_documents(inputs["documents"], output="dense")
        assert (found - peer.encode_document(inputs["documents"]).to_dense()).abs().max() <= TOLERANCE

    @pytest.mark.parametrize("prompts", [("find: ", ""), ("find: ", "text: "), ("", "text: ")])
    def test_our_checkpoints_in_sentence_transformers_own_modules(
        self, prompts, mistral, tmp_path, inputs, run_without_rarezoo
    ):
        query, document = ("{<s>}{" + prompt + "%%text%%}{</s>}" for prompt in prompts)
        templates = {"query_template": query, "document_template": document}
        expected = {}
        for mode in ("plain", "bidirectional"):
            folder = tmp_path / f"ours-{mode}"
            to_rarezoo(mistral, folder, config_options={"attention_mode": mode}, processor_options=templates)
            (report,) = to_official(folder, tmp_path / mode, layout="naver").folders
            assert report.layout == "naver" and (tmp_path / mode / "1_SpladePooling" / "config.json").exists()
            model = AutoModel.from_pretrained(folder)
            queries = model.encode_queries(inputs["queries"], output="dense")
            expected[mode] = torch.cat([queries, model.encode_documents(inputs["documents"], output="dense")])
        save_file(expected, tmp_path / "expected.safetensors")
        printed = run_without_rarezoo(f"""
            import json, torch
            from safetensors.torch import load_file
            from sentence_transformers import SparseEncoder

            queries, documents = json.loads({json.dumps([inputs["queries"], inputs["documents"]])!r})
            differences = []
            for mode, expected in load_file("{tmp_path}/expected.safetensors").items():
                encoder = SparseEncoder(f"{tmp_path}/{{mode}}", trust_remote_code=True, device="cpu")
                assert [type(module).__name__ for module in encoder] == ["Transformer", "SpladePooling"]
                found = [encoder.encode_query(queries).to_dense(), encoder.encode_document(documents).to_dense()]
                differences.append((torch.cat(found) - expected).abs().max().item())
            print(differences)
        """)
        differences = json.loads(printed.splitlines()[-1])
        assert len(differences) == 2 and max(differences) <= TOLERANCE
        # And back: the prompts stand in sentence-transformers' files, not in the processor that these modules call.
        to_rarezoo(tmp_path / "plain", tmp_path / "back")
        back = AutoProcessor.from_pretrained(tmp_path / "back")
        assert (back.query_template, back.document_template) == (query, document)

    def test_what_sentence_transformers_cannot_express(self, splade_checkpoint, mistral, target, tmp_path):
        with pytest.raises(ConversionError, match=r"attention_mode 'echo'.*the templates.*keep the rarezoo layout"):
            to_official(splade_checkpoint, target, layout="naver")
        assert not target.exists()
        options = {"attention_mode": "plain", "pooling": "mean", "logit_shift": 1}
        to_rarezoo(mistral, tmp_path / "plain", config_options=options)
        with pytest.raises(ConversionError, match=r"pooling 'mean' \(expected max or sum\); logit_shift"):
            to_official(tmp_path / "plain", target, layout="naver")


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
    {
        "idx": 1,
        "name": "1",
        "path": "1_SpladePooling",
        "type": "sentence_transformers.sparse_encoder.modules.SpladePooling",
    },
]


class TestLlamaBackbones:
    """A Llama without biases is a Mistral without a window: LACONIC and CSPLADE checkpoints are such."""

    @pytest.fixture
    def llama(self, tmp_path, tokenizer):
        torch.manual_seed(0)
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        config = LlamaConfig(
            vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, rope_parameters=rope, tie_word_embeddings=True, initializer_range=0.3,
            max_position_embeddings=512,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
        tokenizer.save_pretrained(tmp_path / "llama")
        return tmp_path / "llama"

    def test_logits_equal_llama_s(self, llama, target):
        to_rarezoo(llama, target, config_options={"attention_mode": "plain"})
        ids = torch.randint(3, 160, (2, 200), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = LlamaForCausalLM.from_pretrained(llama)(ids).logits
            found = AutoModelForMaskedLM.from_pretrained(target)(ids).logits
        assert expected.std() > 0.1
        assert (found - expected).abs().max() <= TOLERANCE
        config = AutoConfig.from_pretrained(target)
        assert config.sliding_window is None and config.rope_parameters["rope_type"] == "llama3"

    def test_biases_are_refused(self, llama, target):
        edit_json(llama / "config.json", attention_bias=True)
        with pytest.raises(ConversionError, match="is a Llama with biases"):
            to_rarezoo(llama, target)

    def test_templates_use_the_tokenizer_s_own_special_tokens(self, llama, target):
        from tokenizers import Tokenizer, models, pre_tokenizers

        vocabulary = {"<|begin|>": 0, "<|end|>": 1, "Document": 2, "cat": 3, ":": 4, "again": 5, "?": 6}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")
        for file in llama.glob("tokenizer*"):
            file.unlink()
        tokenizer.save_pretrained(llama)
        (folder,) = to_rarezoo(llama, target).folders
        assert len(folder.notes) == 2
        batch = AutoProcessor.from_pretrained(target).process_documents(["cat", "cat cat"])
        expected = [[0, 2, 4, 3, 2, 5, 4, 3, 1], [0, 2, 4, 3, 3, 2, 5, 4, 3, 3, 1]]
        assert batch["input_ids"][1].tolist() == expected[1]
        assert batch["input_ids"][0].tolist() == expected[0] + [1, 1]  # the end token pads
        assert batch["pool_mask"][0].tolist() == [0] * 7 + [1, 1] + [0, 0]


class TestBackToOfficial:
    def test_round_trip_is_bit_equal_and_loads_in_plain_transformers(
        self, mistral, target, tmp_path, references, run_without_rarezoo
    ):
        to_rarezoo(mistral, target)
        report = to_official(target, tmp_path / "back")
        source, back = read_weights(mistral), read_weights(tmp_path / "back")
        assert source.keys() == back.keys() and all(torch.equal(source[name], back[name]) for name in source)
        config = json.loads((tmp_path / "back" / "config.json").read_text())
        expected = json.loads((mistral / "config.json").read_text())
        del config["transformers_version"]
        assert config == expected
        assert not list((tmp_path / "back").glob("*.py"))
        assert any("attention_mode='echo'" in note for note in report.folders[0].notes)
        plain = references("plain")
        save_file({name: plain[name] for name in plain}, tmp_path / "plain.safetensors")
        printed = run_without_rarezoo(f"""
            import torch
            from safetensors.torch import load_file
            from transformers import AutoModelForCausalLM, AutoTokenizer

            model = AutoModelForCausalLM.from_pretrained("{tmp_path}/back")
            plain = load_file("{tmp_path}/plain.safetensors")
            mask = plain["attention_mask_right"]
            with torch.no_grad():
                logits = model(plain["input_ids_right"], attention_mask=mask).logits
            print(type(model).__name__, len(AutoTokenizer.from_pretrained("{tmp_path}/back")))
            print(((logits - plain["logits_right"]).abs() * mask[:, :, None]).max().item())
        """)
        name, difference = printed.splitlines()[-2:]
        assert name == "MistralForCausalLM 160"
        assert float(difference) <= TOLERANCE

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_a_bidirectional_model_stays_one(self, attention, mistral, target, tmp_path, references):
        to_rarezoo(mistral, target, config_options={"attention_mode": "bidirectional"})
        to_official(target, tmp_path / "back")
        plain = references("plain")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation=attention)
        with torch.no_grad():
            logits = model(plain["input_ids_right"], attention_mask=plain["attention_mask_right"]).logits
        marked = logits.relu().log1p() * plain["attention_mask_right"][:, :, None]
        assert (marked.amax(1) - plain["rep_max_bidirectional"]).abs().max() <= TOLERANCE
        to_rarezoo(tmp_path / "back", tmp_path / "again")
        assert AutoConfig.from_pretrained(tmp_path / "again").attention_mode == "bidirectional"

    def test_the_tokenizer_survives(self, mistral, target, tmp_path, inputs):
        to_rarezoo(mistral, target)
        to_official(target, tmp_path / "back")
        before, after = (AutoTokenizer.from_pretrained(folder) for folder in (mistral, tmp_path / "back"))
        assert before.get_vocab() == after.get_vocab()
        assert before(inputs["documents"])["input_ids"] == after(inputs["documents"])["input_ids"]
        assert (after.pad_token, after.bos_token, after.eos_token) == ("<unk>", "<s>", "</s>")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((mistral / name).read_text())

    def test_an_adapter_is_merged_or_kept(self, adapter, target, tmp_path, mistral):
        from peft import PeftModel

        to_rarezoo(adapter(), target, merge_adapter=False)
        to_official(target, tmp_path / "merged")
        to_official(target, tmp_path / "kept", merge_adapter=False)
        to_official(target, tmp_path / "alone", layout="peft", base="owner/base")
        ids = torch.tensor([[1, 7, 30, 90, 12]])
        with torch.no_grad():
            expected = PeftModel.from_pretrained(
                MistralForCausalLM.from_pretrained(mistral), adapter(folder=tmp_path / "again")
            )(ids).logits
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
            kept = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
            kept = PeftModel.from_pretrained(kept, tmp_path / "kept", subfolder="lora")(ids).logits
            alone = MistralForCausalLM.from_pretrained(mistral)
            alone = PeftModel.from_pretrained(alone, tmp_path / "alone")(ids).logits
        assert (merged - expected).abs().max() <= MERGED_TOLERANCE
        assert torch.equal(kept, expected) and torch.equal(alone, expected)
        config = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "owner/base"

    def test_options_that_do_not_fit(self, mistral, splade_checkpoint, target):
        with pytest.raises(ConversionError, match="layout must be one of hf, peft, tevatron, naver; found 'gguf'"):
            to_official(splade_checkpoint, target, layout="gguf")
        with pytest.raises(ConversionError, match="layout 'peft' needs base="):
            to_official(splade_checkpoint, target, layout="peft")
        with pytest.raises(ConversionError, match="layout 'peft' needs base="):
            to_official(splade_checkpoint, target, base="owner/base")
        with pytest.raises(ConversionError, match="has no adapter in lora/"):
            to_official(splade_checkpoint, target, layout="peft", base="owner/base")
        with pytest.raises(ConversionError, match="layout 'tevatron' takes a pair"):
            to_official(splade_checkpoint, target, layout="tevatron")
        with pytest.raises(ConversionError, match="has the layout 'hf' already; expected a rarezoo folder"):
            to_official(mistral, target)
        assert not target.exists()


class TestOurOwnLayout:
    def test_rewriting_keeps_settings_and_templates(self, splade_checkpoint, target, inputs, references):
        report = to_rarezoo(splade_checkpoint, target, max_shard_size="30KB", config_options={"top_k_query": 8})
        assert report.source_layout == "rarezoo" and report.folders[0].files > 2
        assert AutoConfig.from_pretrained(target).top_k_query == 8
        assert AutoProcessor.from_pretrained(target).max_document_length == inputs["max_length"]
        assert echo_difference(target, inputs, references("echo")) <= TOLERANCE

    def test_another_mode_gets_its_own_templates(self, splade_checkpoint, target, references):
        to_rarezoo(splade_checkpoint, target, config_options={"attention_mode": "plain"})
        assert AutoProcessor.from_pretrained(target).query_template == "{<s>}{%%text%%}"
        assert plain_difference(target, references("plain")) <= TOLERANCE


class TestStrictness:
    """Each failure is one clear error, and leaves nothing behind."""

    @pytest.fixture(autouse=True)
    def nothing_left_behind(self, tmp_path, target):
        yield
        assert not target.exists() or (target / "mine").exists()
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    def edit(self, mistral, change):
        tensors = load_file(mistral / "model.safetensors")
        change(tensors)
        save_file(tensors, mistral / "model.safetensors", metadata={"format": "pt"})

    def test_an_extra_tensor(self, mistral, target):
        self.edit(mistral, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(56)}))
        with pytest.raises(ConversionError, match=r"Unknown tensors: model\.layers\.0\.mlp\.up_proj\.bias\."):
            to_rarezoo(mistral, target)

    def test_a_layer_too_many(self, mistral, target):
        edit_json(mistral / "config.json", num_hidden_layers=1)
        with pytest.raises(ConversionError, match=r"Unknown tensors: model\.layers\.1\.input_layernorm\.weight, "):
            to_rarezoo(mistral, target)

    def test_a_missing_tensor(self, mistral, target):
        self.edit(mistral, lambda tensors: tensors.pop("lm_head.weight"))
        with pytest.raises(ConversionError, match=r"Missing tensors: lm_head\.weight\."):
            to_rarezoo(mistral, target)

    def test_a_wrong_shape(self, mistral, target):
        edit_json(mistral / "config.json", intermediate_size=64)
        with pytest.raises(ConversionError, match=r"mlp\.up_proj\.weight \[56, 32\] instead of \[64, 32\]"):
            to_rarezoo(mistral, target)

    def test_a_target_that_is_not_empty(self, mistral, target):
        target.mkdir()
        (target / "mine").write_text("x")
        with pytest.raises(FileExistsError, match="is not an empty folder"):
            to_rarezoo(mistral, target)
        assert [path.name for path in target.iterdir()] == ["mine"]

    def test_a_truncated_shard(self, mistral, target):
        MistralForCausalLM.from_pretrained(mistral).save_pretrained(mistral, max_shard_size="30KB")
        (mistral / "model.safetensors").unlink(missing_ok=True)
        shard = sorted(mistral.glob("model-*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(ConversionError, match=rf"{shard.name} is damaged, truncated"):
            to_rarezoo(mistral, target)

    def test_values_that_are_not_finite_in_a_late_shard(self, mistral, target):
        self.edit(mistral, lambda tensors: tensors["lm_head.weight"][3].fill_(float("nan")))
        with pytest.raises(ConversionError, match=r"lm_head\.weight has values that are not finite"):
            to_rarezoo(mistral, target, max_shard_size="30KB")

    def test_a_full_disk(self, mistral, target, monkeypatch):
        def fail(*arguments, **options):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("rarezoo.conversion.engine.save_file", fail)
        with pytest.raises(OSError, match=r"cannot write model\.safetensors .*No space left on device"):
            to_rarezoo(mistral, target)

    def test_a_tokenizer_of_another_vocabulary(self, mistral, target):
        tokenizer = AutoTokenizer.from_pretrained(mistral)
        tokenizer.add_tokens(["a-new-token"])
        tokenizer.save_pretrained(mistral)
        with pytest.raises(ConversionError, match="the tokenizer has 161 tokens, but the weights have vocab_size 160"):
            to_rarezoo(mistral, target)

    def test_a_padded_vocabulary_is_accepted(self, mistral, target):
        def pad(tensors):
            for name in ("lm_head.weight", "model.embed_tokens.weight"):
                tensors[name] = torch.cat([tensors[name], torch.zeros(4, 32)])

        self.edit(mistral, pad)
        edit_json(mistral / "config.json", vocab_size=164)
        to_rarezoo(mistral, target)
        assert AutoModel.from_pretrained(target).encode_documents(["the cat"]).shape == (1, 164)
        shutil.rmtree(target)

    def test_no_tokenizer(self, mistral, target, fixture_folder):
        for file in mistral.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(ConversionError, match=r"no tokenizer in .*give its folder with tokenizer="):
            to_rarezoo(mistral, target)
        to_rarezoo(mistral, target, tokenizer=fixture_folder)
        assert len(AutoProcessor.from_pretrained(target).tokenizer) == 160
        shutil.rmtree(target)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "qwen3"}, "model_type 'qwen3'; this family holds Mistral backbones"),
            ({"quantization_config": {"quant_method": "gptq"}}, "is quantized \\(gptq\\)"),
            ({"hidden_size": "large"}, "is not valid"),
            ({"num_key_value_heads": 3}, "num_attention_heads"),
        ],
    )
    def test_configurations_that_do_not_fit(self, changes, message, mistral, target):
        edit_json(mistral / "config.json", **changes)
        with pytest.raises(ConversionError, match=message):
            to_rarezoo(mistral, target)

    def test_a_damaged_configuration(self, mistral, target):
        (mistral / "config.json").write_text("{")
        with pytest.raises(ConversionError, match=r"config\.json is not valid JSON"):
            to_rarezoo(mistral, target)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"config_options": {"poolin": "max"}},
                "unknown config_options poolin; the retrieval fields are attention_mode",
            ),
            ({"config_options": {"pooling": "median"}}, "pooling must be one of max, sum"),
            ({"processor_options": {"template": "x"}}, "unknown processor_options template; expected some of"),
            ({"processor_options": {"attention_mode": "plain"}}, "set it in config_options alone"),
            ({"dtype": "int4"}, "dtype must be one of"),
            ({"max_shard_size": "huge"}, "huge"),
        ],
    )
    def test_options_that_do_not_fit(self, options, message, mistral, target):
        with pytest.raises(ValueError, match=message):
            to_rarezoo(mistral, target, **options)

    def test_a_folder_of_none_of_the_layouts(self, tmp_path, target):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConversionError, match="is none of the known layouts"):
            to_rarezoo(tmp_path / "empty", target)
        with pytest.raises(FileNotFoundError, match="no folder"):
            to_rarezoo(tmp_path / "nowhere", target)
