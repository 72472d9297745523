"""The container for multi-vector representations, against plain lists of arrays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from rarezoo.retrieval import SparseEmbeddings
from rarezoo.retrieval.multi_vector_embeddings import (
    MultiVectorEmbeddings,
    canonical_vectors,
    read_manifest,
    write_manifest,
    write_shard,
)
from rarezoo.retrieval.shards import shard_name

from .folders import file_limit


def ragged(count: int, dim: int = 8, seed: int = 0, dtype=np.float32) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((length, dim)).astype(dtype) for length in generator.integers(0, 6, count)]


def names(count: int) -> list[str]:
    return [f"text {row} é" for row in range(count)]


def container(count: int, dim: int = 8, seed: int = 0, dtype=np.float32) -> MultiVectorEmbeddings:
    return MultiVectorEmbeddings.from_list(names(count), ragged(count, dim, seed, dtype), "a model")


def assert_holds(embeddings: MultiVectorEmbeddings, ids: list[str], rows: list[np.ndarray]) -> None:
    assert list(embeddings.ids) == ids and len(embeddings) == len(rows)
    assert embeddings.num_vectors == sum(map(len, rows))
    found = list(embeddings)
    assert [identifier for identifier, _ in found] == ids
    for (_, vectors), expected in zip(found, rows):
        np.testing.assert_array_equal(vectors, expected)
        assert vectors.dtype == expected.dtype


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, MultiVectorEmbeddings]:
    embeddings = container(25)
    embeddings.save(tmp_path / "embeddings", shard_size=10)
    return tmp_path / "embeddings", embeddings


def test_packed_rows_and_lists_are_the_same() -> None:
    rows = ragged(12)
    packed = MultiVectorEmbeddings(names(12), np.concatenate(rows), [len(row) for row in rows], "a model")
    for embeddings in (packed, container(12)):
        assert_holds(embeddings, names(12), rows)
        assert (embeddings.dim, embeddings.fingerprint) == (8, "a model")
        np.testing.assert_array_equal(embeddings.vectors, np.concatenate(rows))
        np.testing.assert_array_equal(embeddings.lengths, [len(row) for row in rows])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True), np.float32),
        (torch.ones(2, 4, dtype=torch.float16), np.float16),
        (np.ones((2, 4)), np.float32),
        (np.ones((4, 2), dtype=np.float32).T, np.float32),
        ([[1.0] * 4] * 2, np.float32),
    ],
)
def test_types(given, kept: type) -> None:
    embeddings = MultiVectorEmbeddings(["a"], given, torch.tensor([2]))
    assert embeddings.dtype == kept and embeddings.vectors.tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("mmap", [True, False])
def test_saved_and_opened(tmp_path: Path, dtype, mmap: bool) -> None:
    rows = ragged(25, dtype=dtype)
    container(25, dtype=dtype).save(tmp_path / "e", shard_size=10)
    opened = MultiVectorEmbeddings.open(tmp_path / "e", mmap=mmap)
    assert_holds(opened, names(25), rows)
    assert opened.fingerprint == "a model" and opened.dtype == dtype and opened.dim == 8
    assert [len(shard) for shard in opened.iter_shards(verify=True)] == [10, 10, 5]
    opened.verify()
    with pytest.raises(ValueError, match="read-only"):
        next(opened.iter_shards()).vectors[0, 0] = 1


def test_the_folder_holds_what_is_documented(saved) -> None:
    folder, embeddings = saved
    manifest = json.loads((folder / "embeddings.json").read_text())
    assert manifest["kind"] == "multi-vector" and manifest["complete"] and manifest["fingerprint"] == "a model"
    assert manifest["num_vectors"] == embeddings.num_vectors and manifest["dim"] == 8
    tensors = load_file(folder / "shard-00001.safetensors")
    part = embeddings[10:20]
    np.testing.assert_array_equal(tensors["vectors"], part.vectors)
    np.testing.assert_array_equal(tensors["lengths"], part.lengths)
    assert tensors["vectors"].dtype == np.float32 and tensors["lengths"].dtype == np.int32


def test_slices_positions_and_masks(saved) -> None:
    folder, embeddings = saved
    rows = ragged(25)
    mask = np.arange(25) % 4 == 1
    for chosen in (slice(3, 17, 5), slice(None, None, -1), [24, 0, 11, 12, 9], mask, -2, slice(0, 0)):
        positions = np.atleast_1d(np.arange(25)[chosen])
        for source in (embeddings, MultiVectorEmbeddings.open(folder)):
            part = source[chosen]
            assert_holds(part, [names(25)[row] for row in positions], [rows[row] for row in positions])
            assert part.fingerprint == "a model"
    with pytest.raises(IndexError):
        embeddings[25]


def test_concatenation(saved) -> None:
    folder, embeddings = saved
    opened = MultiVectorEmbeddings.open(folder)
    joined = MultiVectorEmbeddings.concatenate([opened[:4], embeddings[4:11], opened[11:]])
    assert_holds(joined, names(25), ragged(25))
    with pytest.raises(ValueError, match="duplicate identifier"):
        MultiVectorEmbeddings.concatenate([embeddings, opened])
    with pytest.raises(ValueError, match="different dim"):
        MultiVectorEmbeddings.concatenate([embeddings, MultiVectorEmbeddings(["x"], np.ones((1, 4)), [1], "a model")])
    with pytest.raises(ValueError, match="different fingerprint"):
        MultiVectorEmbeddings.concatenate([embeddings, MultiVectorEmbeddings(["x"], np.ones((1, 8)), [1], "another")])
    with pytest.raises(ValueError, match="at least one container"):
        MultiVectorEmbeddings.concatenate([])


def test_no_texts_and_texts_without_vectors(tmp_path: Path) -> None:
    for lengths in ([], [0, 0]):
        embeddings = MultiVectorEmbeddings(names(len(lengths)), np.empty((0, 4), dtype=np.float16), lengths)
        embeddings.save(tmp_path / str(len(lengths)))
        opened = MultiVectorEmbeddings.open(tmp_path / str(len(lengths)))
        assert_holds(opened, names(len(lengths)), [np.empty((0, 4), dtype=np.float16)] * len(lengths))
        assert opened.vectors.shape == (0, 4) and opened.lengths.tolist() == lengths
        opened.verify()


def test_mistakes_are_named() -> None:
    rows = np.ones((3, 4), dtype=np.float32)
    for value in (np.nan, np.inf):
        wrong = rows.copy()
        wrong[2, 1] = value
        with pytest.raises(ValueError, match=r"vector 2 \(of text 1, 'b'\) is not finite"):
            MultiVectorEmbeddings(["a", "b"], wrong, [2, 1])
    with pytest.raises(ValueError, match="2 for 3 lengths"):
        MultiVectorEmbeddings(["a", "b"], rows, [1, 1, 1])
    for lengths in ([1, 1], [4, -1]):
        with pytest.raises(ValueError, match="add up to 3 vectors"):
            MultiVectorEmbeddings(["a", "b"], rows, lengths)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 4\)"):
        MultiVectorEmbeddings(["a", "b"], np.ones((2, 2, 4)), [2, 2])
    with pytest.raises(TypeError, match="floating-point type, found int64"):
        MultiVectorEmbeddings(["a"], np.ones((1, 4), dtype=np.int64), [1])
    with pytest.raises(TypeError, match="lengths"):
        MultiVectorEmbeddings(["a"], rows, [3.0])
    with pytest.raises(ValueError, match="duplicate identifier 'a'"):
        MultiVectorEmbeddings(["a", "a"], rows, [1, 2])
    with pytest.raises(TypeError, match="the one 'ab'"):
        MultiVectorEmbeddings("ab", rows, [1, 2])
    with pytest.raises(ValueError, match=r"dimensions \[4, 8\]"):
        MultiVectorEmbeddings.from_list(["a", "b"], [rows, np.ones((1, 8))])
    with pytest.raises(ValueError, match=r"dimensions \[\]"):
        MultiVectorEmbeddings.from_list([], [])


def test_damaged_folders_are_named(saved, tmp_path: Path) -> None:
    folder, _ = saved
    with pytest.raises(FileNotFoundError, match="holds no multi-vector embeddings"):
        MultiVectorEmbeddings.open(tmp_path)
    path = folder / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged or truncated"):
        MultiVectorEmbeddings.open(folder)
    vectors = load_file(folder / "shard-00000.safetensors")["vectors"]
    other = folder / "shard-00000.safetensors"
    content = other.read_bytes()
    path.write_bytes(whole)
    at = content.index(vectors.tobytes())
    other.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is damaged: its contents"):
        MultiVectorEmbeddings.open(folder).verify()
    other.write_bytes(content)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.safetensors is missing"):
        MultiVectorEmbeddings.open(folder)


def test_shards_that_do_not_fit_together_are_named(saved) -> None:
    folder, embeddings = saved
    manifest = json.loads((folder / "embeddings.json").read_text())
    part = embeddings[10:20]
    write_shard(folder / shard_name(1), part.ids, part.vectors, part.lengths[::-1] + (np.arange(10) == 0))
    manifest["shards"][1]["num_bytes"] = (folder / shard_name(1)).stat().st_size
    (folder / "embeddings.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged: 'lengths'"):
        MultiVectorEmbeddings.open(folder).vectors  # noqa: B018
    (folder / "embeddings.json").write_text(json.dumps({**manifest, "dim": 9}))
    with pytest.raises(ValueError, match=r"'vectors' has the shape \(\d+, 8\), not \(\d+, 9\)"):
        MultiVectorEmbeddings.open(folder).vectors  # noqa: B018
    for change, message in [
        ({"format_version": 7}, "version 7"),
        ({"kind": "sparse"}, "expected kind 'multi-vector', found 'sparse'"),
        ({"vectors_dtype": "int8"}, "vectors_dtype 'int8'"),
        ({"complete": False}, "has not finished"),
    ]:
        (folder / "embeddings.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=message):
            MultiVectorEmbeddings.open(folder)


def test_the_kinds_do_not_read_each_other(saved) -> None:
    with pytest.raises(ValueError, match="found 'multi-vector'"):
        SparseEmbeddings.open(saved[0])


def test_foreign_folders_are_left_alone(saved, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="not an empty folder"):
        saved[1].save(saved[0])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        saved[1].save(foreign)
    assert [path.name for path in foreign.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("size", [100, 1500])
def test_a_full_disk_leaves_nothing(tmp_path: Path, size: int) -> None:
    with file_limit(size), pytest.raises(OSError, match=r"cannot write .*new.*nothing half-written remains"):
        container(60).save(tmp_path / "new", shard_size=50)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_half_file(tmp_path: Path) -> None:
    """The process ends between writing and renaming: another finds the finished shards and writes the rest."""
    program = """
import os, sys
from pathlib import Path
import numpy as np
from rarezoo.retrieval.multi_vector_embeddings import write_shard
folder, rows = Path(sys.argv[1]), np.ones((2, 4), dtype=np.float32)
write_shard(folder / "shard-00000.safetensors", ["a", "b"], rows, np.array([1, 1]), "first")
os.replace = lambda *paths: os._exit(9)
write_shard(folder / "shard-00001.safetensors", ["c"], rows, np.array([2]), "second")
"""
    finished = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert finished.returncode == 9, finished.stderr
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["shard-00000.safetensors"]
    rows, lengths = canonical_vectors(np.ones((2, 4), dtype=np.float32), [2], ["c"])
    write_shard(tmp_path / shard_name(1), ["c"], rows, lengths, "second")
    write_manifest(tmp_path, 2, 4, "float32", fingerprint="a model", encoded="document")
    assert read_manifest(tmp_path)["encoded"] == "document"
    assert MultiVectorEmbeddings.open(tmp_path).lengths.tolist() == [1, 1, 2]
