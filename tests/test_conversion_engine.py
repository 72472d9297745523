"""The conversion engine without any family: rules, reading, writing, staging, memory."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rarezoo.conversion import ConversionError, convert
from rarezoo.conversion.checkpoint_files import CheckpointReader, locate_checkpoint
from rarezoo.conversion.engine import (
    Rule,
    drop,
    keep,
    parse_dtype,
    plan_conversion,
    rename,
    reverse,
    staged_folder,
    verify_weights,
    write_weights,
)


def fused_attention_rules():
    """A table with every kind of rule: the same name, a new name, a transposed tensor, one tensor for three."""
    return (
        *keep("norm.weight"),
        rename("wte", "embed.weight"),
        rename("h.{i}.up", "layers.{i}.up.weight", *[lambda tensors: [tensors[0].T.contiguous()]] * 2),
        Rule(
            ("h.{i}.qkv",),
            ("layers.{i}.q.weight", "layers.{i}.k.weight", "layers.{i}.v.weight"),
            forward=lambda tensors: list(tensors[0].chunk(3)),
            backward=lambda tensors: [torch.cat(tensors)],
        ),
        drop("h.{i}.mask", "a constant"),
    )


@pytest.fixture
def source_tensors():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {"norm.weight": random(4), "wte": random(9, 4)}
    for i in range(12):
        tensors |= {f"h.{i}.up": random(4, 6), f"h.{i}.qkv": random(12, 4), f"h.{i}.mask": torch.ones(3)}
    return tensors


@pytest.fixture
def expected_shapes():
    shapes = {"embed.weight": (9, 4)}
    for i in range(12):
        shapes |= {f"layers.{i}.{name}.weight": (4, 4) for name in "qkv"} | {f"layers.{i}.up.weight": (6, 4)}
    return shapes | {"norm.weight": (4,)}


def save(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return folder


def run(folder, target, shapes, rules, **options):
    reader = CheckpointReader(folder)
    target.mkdir()
    written = write_weights(plan_conversion(rules, reader.entries, shapes, folder), reader, shapes, target, **options)
    verify_weights(target, written)
    return written


def read_all(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


class TestRules:
    def test_every_kind_of_rule_and_the_way_back(self, source_tensors, expected_shapes, tmp_path):
        save(tmp_path / "source", source_tensors)
        run(tmp_path / "source", tmp_path / "target", expected_shapes, fused_attention_rules())
        target = read_all(tmp_path / "target")
        assert set(target) == set(expected_shapes)
        for i in range(12):
            fused = source_tensors[f"h.{i}.qkv"]
            assert torch.equal(target[f"layers.{i}.k.weight"], fused[4:8])
            assert torch.equal(target[f"layers.{i}.up.weight"], source_tensors[f"h.{i}.up"].T)

        kept = {name: tensor for name, tensor in source_tensors.items() if "mask" not in name}
        shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
        run(tmp_path / "target", tmp_path / "back", shapes, reverse(fused_attention_rules()))
        back = read_all(tmp_path / "back")
        assert set(back) == set(kept)
        assert all(torch.equal(back[name], kept[name]) for name in kept)

    def test_dropped_tensors_are_listed_with_the_reason(self, source_tensors, expected_shapes, tmp_path):
        reader = CheckpointReader(save(tmp_path / "source", source_tensors))
        plan = plan_conversion(fused_attention_rules(), reader.entries, expected_shapes, "x")
        assert plan.dropped == {f"h.{i}.mask": "a constant" for i in range(12)}

    def test_all_problems_are_in_one_message(self, source_tensors, expected_shapes, tmp_path):
        del source_tensors["wte"], source_tensors["h.3.qkv"]
        source_tensors["h.0.bias"] = torch.zeros(4)
        source_tensors["norm.weight"] = torch.zeros(5)
        reader = CheckpointReader(save(tmp_path / "source", source_tensors))
        with pytest.raises(ConversionError) as error:
            plan_conversion(fused_attention_rules(), reader.entries, expected_shapes, "the source")
        message = str(error.value)
        assert "Unknown tensors: h.0.bias." in message
        assert "Missing tensors: embed.weight, layers.3.k.weight, layers.3.q.weight, layers.3.v.weight." in message
        assert "Wrong shapes: norm.weight [5] instead of [4]." in message

    def test_a_tensor_of_a_layer_that_the_configuration_lacks_is_unknown(
        self, source_tensors, expected_shapes, tmp_path
    ):
        source_tensors["h.12.up"] = torch.zeros(4, 6)
        reader = CheckpointReader(save(tmp_path / "source", source_tensors))
        with pytest.raises(ConversionError, match=r"Unknown tensors: layers\.12\.up\.weight\."):
            plan_conversion(fused_attention_rules(), reader.entries, expected_shapes, "the source")

    def test_half_of_a_group_is_missing(self, expected_shapes, source_tensors, tmp_path):
        save(tmp_path / "source", source_tensors)
        run(tmp_path / "source", tmp_path / "target", expected_shapes, fused_attention_rules())
        target = read_all(tmp_path / "target")
        del target["layers.5.v.weight"]
        reader = CheckpointReader(save(tmp_path / "half", target))
        with pytest.raises(ConversionError, match=r"Missing tensors: h\.5\.qkv, layers\.5\.v\.weight"):
            shapes = {name: tuple(tensor.shape) for name, tensor in source_tensors.items() if "mask" not in name}
            plan_conversion(reverse(fused_attention_rules()), reader.entries, shapes, "the source")

    def test_tables_that_contradict_themselves_are_refused(self, tmp_path):
        reader = CheckpointReader(save(tmp_path / "source", {"a": torch.zeros(1), "b": torch.zeros(1)}))
        with pytest.raises(ValueError, match="more than one rule"):
            plan_conversion((*keep("a", "b"), rename("{x}", "z.{x}")), reader.entries, {}, "x")
        with pytest.raises(ValueError, match="writes a tensor twice: c"):
            plan_conversion((rename("a", "c"), rename("b", "c")), reader.entries, {"c": (1,)}, "x")
        with pytest.raises(ValueError, match="same placeholders"):
            rename("layers.{i}.a", "layers.a")
        with pytest.raises(ValueError, match="without an inverse"):
            reverse([rename("a", "b", forward=lambda tensors: tensors)])


class TestReading:
    def test_safetensors_and_bin_single_and_sharded_give_the_same(self, source_tensors, tmp_path):
        names = list(source_tensors)
        halves = [{n: source_tensors[n] for n in names[:20]}, {n: source_tensors[n] for n in names[20:]}]
        save(tmp_path / "single", source_tensors)
        (tmp_path / "bin").mkdir()
        torch.save(source_tensors, tmp_path / "bin" / "pytorch_model.bin")
        (tmp_path / "old_bin").mkdir()
        torch.save(source_tensors, tmp_path / "old_bin" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        for kind, extension, stem in (("sharded", "safetensors", "model"), ("sharded_bin", "bin", "pytorch_model")):
            folder = tmp_path / kind
            folder.mkdir()
            files = [f"{stem}-0000{i + 1}-of-00002.{extension}" for i in range(2)]
            for file, half in zip(files, halves):
                write = save_file if extension == "safetensors" else torch.save
                write(half, folder / file)
            weight_map = {name: file for file, half in zip(files, halves) for name in half}
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / f"{stem}.{extension}.index.json").write_text(json.dumps(index))
        for kind in ("single", "bin", "old_bin", "sharded", "sharded_bin"):
            reader = CheckpointReader(tmp_path / kind)
            assert set(reader.entries) == set(source_tensors), kind
            assert all(torch.equal(reader.read(name), source_tensors[name]) for name in names), kind
            assert {e.shape for e in reader.entries.values()} == {tuple(t.shape) for t in source_tensors.values()}

    def test_a_truncated_file_is_named(self, source_tensors, tmp_path):
        file = save(tmp_path / "source", source_tensors) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(ConversionError, match=r"model\.safetensors is damaged, truncated"):
            CheckpointReader(tmp_path / "source")

    def test_a_truncated_bin_is_named(self, source_tensors, tmp_path):
        file = tmp_path / "pytorch_model.bin"
        torch.save(source_tensors, file)
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ConversionError, match=r"pytorch_model\.bin is damaged, truncated"):
            CheckpointReader(tmp_path)

    def test_a_pickle_that_would_run_code_is_refused(self, tmp_path):
        class Harmful:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "harm"),)

        with open(tmp_path / "pytorch_model.bin", "wb") as stream:
            pickle.dump({"x": Harmful()}, stream)
        with pytest.raises(ConversionError, match=r"pytorch_model\.bin is damaged"):
            CheckpointReader(tmp_path)
        assert not (tmp_path / "harm").exists()

    def test_a_git_lfs_pointer_is_recognised(self, tmp_path):
        (tmp_path / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        )
        with pytest.raises(ConversionError, match="git lfs pull"):
            CheckpointReader(tmp_path)

    def test_a_missing_shard_is_named(self, source_tensors, tmp_path):
        save(tmp_path, source_tensors, "model-00001-of-00002.safetensors")
        weight_map = dict.fromkeys(source_tensors, "model-00001-of-00002.safetensors")
        weight_map["lost"] = "model-00002-of-00002.safetensors"
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors is missing"):
            CheckpointReader(tmp_path)

    def test_an_index_that_lies_is_an_error(self, source_tensors, tmp_path):
        save(tmp_path, source_tensors, "model-00001-of-00001.safetensors")
        weight_map = dict.fromkeys(source_tensors, "model-00001-of-00001.safetensors")
        weight_map["ghost"] = weight_map.pop("wte")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ConversionError, match="disagree about ghost, wte"):
            CheckpointReader(tmp_path)

    def test_a_folder_without_weights(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no weights in .*model\.safetensors"):
            CheckpointReader(tmp_path)


class TestWriting:
    def test_shards_hold_at_most_the_given_size_and_load_with_their_index(
        self, source_tensors, expected_shapes, tmp_path
    ):
        save(tmp_path / "source", source_tensors)
        written = run(
            tmp_path / "source", tmp_path / "target", expected_shapes, fused_attention_rules(), max_shard_size=500
        )
        assert len(written.files) > 4
        index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(expected_shapes)
        assert index["metadata"]["total_size"] == written.size_bytes == written.parameters * 4
        for file in written.files:
            with safe_open(tmp_path / "target" / file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
                assert sum(opened.get_tensor(name).nbytes for name in opened.keys()) <= 500
                assert all(index["weight_map"][name] == file for name in opened.keys())
        # q, k and v of one fused tensor lie in different shards and are still right.
        assert torch.equal(read_all(tmp_path / "target")["layers.7.v.weight"], source_tensors["h.7.qkv"][8:])

    def test_dtype_changes_floats_and_leaves_integers(self, tmp_path):
        tensors = {"w": torch.tensor([1.0, 1.00390625, -3.14159]), "ids": torch.arange(3)}
        save(tmp_path / "source", tensors)
        shapes = {"w": (3,), "ids": (3,)}
        written = run(tmp_path / "source", tmp_path / "t", shapes, keep("w", "ids"), dtype=torch.bfloat16)
        found = read_all(tmp_path / "t")
        assert found["ids"].dtype == torch.int64
        assert torch.equal(found["w"], tensors["w"].bfloat16())
        assert written.tensors["w"] == ((3,), torch.bfloat16)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite_are_refused(self, value, tmp_path):
        save(tmp_path / "source", {"w": torch.tensor([1.0, value])})
        with pytest.raises(ConversionError, match="w has values that are not finite in the source"):
            run(tmp_path / "source", tmp_path / "t", {"w": (2,)}, keep("w"))

    def test_an_overflow_of_float16_is_refused(self, tmp_path):
        save(tmp_path / "source", {"w": torch.tensor([1.0, 70000.0])})
        with pytest.raises(ConversionError, match=r"not finite as torch\.float16; choose another dtype"):
            run(tmp_path / "source", tmp_path / "t", {"w": (2,)}, keep("w"), dtype=torch.float16)

    def test_a_disk_that_is_too_small_is_noticed_before_writing(self, tmp_path, monkeypatch):
        save(tmp_path / "source", {"w": torch.zeros(1000)})
        usage = type("Usage", (), {"free": 3999})
        monkeypatch.setattr("rarezoo.conversion.engine.shutil.disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"need 0\.00 GB, but the destination's disk has 0\.00 GB free"):
            run(tmp_path / "source", tmp_path / "t", {"w": (1000,)}, keep("w"))
        assert list((tmp_path / "t").iterdir()) == []

    def test_verification_notices_a_changed_file(self, tmp_path):
        save(tmp_path / "source", {"w": torch.zeros(4)})
        written = run(tmp_path / "source", tmp_path / "t", {"w": (4,)}, keep("w"))
        save_file({"w": torch.zeros(4).half()}, tmp_path / "t" / "model.safetensors")
        with pytest.raises(ConversionError, match="differ from what was meant to be written: w"):
            verify_weights(tmp_path / "t", written)

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [("bf16", torch.bfloat16), ("float32", torch.float32), ("torch.float16", torch.float16), (None, None)],
    )
    def test_names_of_dtypes(self, name, dtype):
        assert parse_dtype(name) is dtype
        assert parse_dtype(dtype) is dtype

    @pytest.mark.parametrize("name", ["int8", "double", torch.int64])
    def test_other_dtypes_are_refused(self, name):
        with pytest.raises(ConversionError, match="dtype must be one of float32"):
            parse_dtype(name)


class TestStaging:
    def test_the_folder_gets_its_name_at_the_end(self, tmp_path):
        target = tmp_path / "new" / "deep" / "target"
        with staged_folder(target) as staging:
            (staging / "file").write_text("x")
            assert not target.exists()
            assert staging.parent == target.parent
        assert [path.name for path in target.iterdir()] == ["file"]
        assert [path.name for path in target.parent.iterdir()] == ["target"]

    def test_an_empty_folder_is_taken(self, tmp_path):
        with staged_folder(tmp_path / "target") as staging:
            (staging / "file").write_text("x")
            (tmp_path / "target").mkdir()
        assert (tmp_path / "target" / "file").exists()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_failure_leaves_nothing(self, error, tmp_path):
        with pytest.raises(error), staged_folder(tmp_path / "new" / "deep" / "target") as staging:
            (staging / "file").write_text("x")
            raise error
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_with_files_is_refused_and_left_alone(self, tmp_path):
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "mine").write_text("x")
        with pytest.raises(FileExistsError, match="is not an empty folder"), staged_folder(tmp_path / "target"):
            pass
        assert (tmp_path / "target" / "mine").read_text() == "x"
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_file_in_the_place_of_the_target_is_refused(self, tmp_path):
        (tmp_path / "target").write_text("x")
        with pytest.raises(FileExistsError), staged_folder(tmp_path / "target"):
            pass

    def test_a_parent_that_is_a_file_is_one_clear_error(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(OSError, match=r"cannot write to .*choose another destination"):
            with staged_folder(tmp_path / "file" / "target"):
                pass

    @pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that nobody can write")
    def test_a_file_system_that_cannot_be_written(self):
        with pytest.raises(OSError, match="cannot write to /proc"), staged_folder(Path("/proc/target")):
            pass

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_read_only_parent(self, tmp_path):
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(PermissionError, match="cannot write to"), staged_folder(tmp_path / "target"):
                pass
        finally:
            tmp_path.chmod(0o700)


class TestLocating:
    def test_folders_come_first(self, tmp_path):
        assert locate_checkpoint(tmp_path) == tmp_path

    def test_a_file_is_not_a_checkpoint(self, tmp_path):
        (tmp_path / "model.safetensors").write_text("x")
        with pytest.raises(ConversionError, match="is a file; expected the folder"):
            locate_checkpoint(tmp_path / "model.safetensors")

    @pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "nowhere", "a/b/c"])
    def test_what_is_neither_folder_nor_repository(self, name):
        with pytest.raises(FileNotFoundError, match="expected a checkpoint folder or a Hub repository 'owner/name'"):
            locate_checkpoint(name)

    def test_a_repository_that_is_not_available(self):
        with pytest.raises(FileNotFoundError, match="the Hub repository of that name is not available"):
            locate_checkpoint("nobody/nothing")

    def test_a_repository_in_the_cache(self, tmp_path, monkeypatch):
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "models--owner--name"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        save(snapshot, {"w": torch.zeros(2)})
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        folder = locate_checkpoint("owner/name")
        assert folder == snapshot
        assert set(CheckpointReader(folder).entries) == {"w"}


class TestConvert:
    def test_names_are_checked(self, tmp_path):
        with pytest.raises(ConversionError, match=r"no converter for family 'bert'; known families: .*mistral_splade"):
            convert("bert", tmp_path, tmp_path / "out")
        with pytest.raises(ConversionError, match="to must be one of rarezoo, official; found 'hf'"):
            convert("mistral_splade", tmp_path, tmp_path / "out", to="hf")
        with pytest.raises(ConversionError, match="unknown option shards for to='rarezoo'; mistral_splade takes base"):
            convert("mistral_splade", tmp_path, tmp_path / "out", shards=3)

    @pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory through /proc")
    def test_memory_in_use_is_about_one_shard(self, fixture_folder, tmp_path):
        """About 320 MB in six shards; limits in MB: one shard of the target, what it is made from, and some room."""
        config = json.loads((fixture_folder / "config.json").read_text())
        config |= {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "vocab_size": 6000}
        config |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
        source = tmp_path / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(config))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (source / name).write_bytes((fixture_folder / name).read_bytes())
        code = f"""
            import json, sys, torch
            torch.set_num_threads(1)
            from pathlib import Path
            from safetensors.torch import save_file
            from rarezoo.conversion import convert
            from rarezoo.conversion.convert_mistral_splade import MistralSpladeForRetrieval, _shapes
            from rarezoo.mistral_splade import MistralSpladeConfig

            def megabytes(key):
                lines = Path("/proc/self/status").read_text().splitlines()
                return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1000

            source, small, target = map(Path, {[str(source), str(fixture_folder), str(tmp_path / "target")]!r})
            convert("mistral_splade", small, target.parent / "warm_up")  # imports and caches
            fields = json.loads((source / "config.json").read_text())
            del fields["model_type"], fields["architectures"]
            shapes = _shapes(MistralSpladeForRetrieval, MistralSpladeConfig(**fields))
            groups, sizes = [{{}}], [0]
            for name, shape in shapes.items():
                tensor = torch.full(shape, 0.5)
                if sizes[-1] + tensor.nbytes > 60e6:
                    groups.append({{}}), sizes.append(0)
                groups[-1][name] = tensor
                sizes[-1] += tensor.nbytes
            names = [f"model-{{i:05d}}.safetensors" for i in range(len(groups))]
            for name, group in zip(names, groups):
                save_file(group, source / name)
            weight_map = {{key: name for name, group in zip(names, groups) for key in group}}
            (source / "model.safetensors.index.json").write_text(json.dumps({{"weight_map": weight_map}}))
            groups.clear()
            del tensor, group

            used = []
            for dtype, shard in ((None, "60MB"), ("bf16", "30MB")):
                Path("/proc/self/clear_refs").write_text("5")
                before = megabytes("VmRSS")
                report = convert("mistral_splade", source, target / str(dtype), dtype=dtype, max_shard_size=shard)
                used.append((report.folders[0].files, megabytes("VmHWM") - before))
            print(json.dumps([sum(sizes) / 1e6, len(names), used]))
        """
        finished = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=240
        )
        assert finished.returncode == 0, finished.stderr
        total, source_shards, used = json.loads(finished.stdout.splitlines()[-1])
        print(f"{total:.0f} MB in {source_shards} shards; (shards written, MB more): {used}")
        assert total > 300 and source_shards >= 3
        for (shards, extra), limit in zip(used, (90, 80), strict=True):
            assert shards >= 3 and extra < limit
