"""The container for sparse vectors, against scipy and against plain Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from safetensors.numpy import load_file, save_file

from rarezoo.retrieval import SparseEmbeddings
from rarezoo.retrieval.identifiers import PackedIds, SeenIds


def random_matrix(rows: int, vocab_size: int, density: float, seed: int) -> scipy.sparse.csr_matrix:
    generator = np.random.default_rng(seed)
    dense = generator.random((rows, vocab_size), dtype=np.float32) + 0.01
    dense[generator.random((rows, vocab_size)) > density] = 0
    # Few distinct weights: ties are common.
    return scipy.sparse.csr_matrix(np.round(dense * 8) / 8)


def random_embeddings(rows: int, vocab_size: int = 40, density: float = 0.2, seed: int = 0) -> SparseEmbeddings:
    ids = [f"text {row} é" for row in range(rows)]
    return SparseEmbeddings(ids, random_matrix(rows, vocab_size, density, seed), fingerprint="a model")


def assert_equal(actual: SparseEmbeddings, expected: SparseEmbeddings) -> None:
    assert list(actual.ids) == list(expected.ids)
    assert actual.matrix.shape == expected.matrix.shape
    np.testing.assert_array_equal(actual.matrix.toarray(), expected.matrix.toarray())
    assert actual.fingerprint == expected.fingerprint


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, SparseEmbeddings]:
    embeddings = random_embeddings(25)
    embeddings.save(tmp_path / "embeddings", shard_size=10)
    return tmp_path / "embeddings", embeddings


def test_the_matrix_is_stored_canonically() -> None:
    # Unsorted, with a stored zero and an entry given twice, in float64.
    given = scipy.sparse.csr_matrix(
        (np.array([2.0, 1.0, 0.0, 0.5, 0.25]), np.array([3, 1, 0, 2, 2]), np.array([0, 3, 5])), shape=(2, 4)
    )
    before = given.copy()
    matrix = SparseEmbeddings(["a", "b"], given).matrix
    assert matrix.dtype == np.float32 and matrix.has_sorted_indices
    assert matrix.indices.tolist() == [1, 3, 2] and matrix.data.tolist() == [1.0, 2.0, 0.75]
    assert given.data.tolist() == before.data.tolist() and given.indices.tolist() == before.indices.tolist()


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf, -0.5])
def test_weights_that_no_sparse_vector_has_are_refused(weight: float) -> None:
    matrix = scipy.sparse.csr_matrix(np.array([[0.0, 1.0], [0.0, 2.0]], dtype=np.float32))
    matrix.data[1] = weight
    with pytest.raises(ValueError, match="row 1"):
        SparseEmbeddings(["a", "b"], matrix)


def test_identifiers_are_checked() -> None:
    matrix = random_matrix(3, 10, 0.5, seed=0)
    with pytest.raises(ValueError, match="duplicate identifier 'b'"):
        SparseEmbeddings(["b", "a", "b"], matrix)
    with pytest.raises(ValueError, match="2 for 3 rows"):
        SparseEmbeddings(["a", "b"], matrix)
    with pytest.raises(TypeError, match="int"):
        SparseEmbeddings(["a", "b", 3], matrix)
    with pytest.raises(TypeError, match="ndarray"):
        SparseEmbeddings(["a", "b", "c"], matrix.toarray())


def test_seen_ids_across_calls() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        stream = [str(number) for number in generator.permutation(60)[:50]]
        seen = SeenIds()
        for start in range(0, 50, 7):
            seen.add(stream[start : start + 7])
        for identifier in stream:
            with pytest.raises(ValueError, match=f"'{identifier}'"):
                seen.add(["new", identifier])


def test_packed_ids_are_a_sequence_of_strings() -> None:
    ids = ["", "plain", "é", "日本", "a\nb\tc", "plain "]
    packed = PackedIds.pack(ids)
    assert list(packed) == ids and packed[1:4] == ids[1:4] and packed[-2] == ids[-2] and len(packed) == 6
    assert "日本" in packed and "日" not in packed
    with pytest.raises(IndexError):
        packed[6]


def test_save_and_open_return_the_same_rows(saved: tuple[Path, SparseEmbeddings]) -> None:
    folder, embeddings = saved
    assert sorted(path.name for path in folder.iterdir()) == [
        "embeddings.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
        "shard-00002.safetensors",
    ]
    manifest = json.loads((folder / "embeddings.json").read_text())
    assert (manifest["kind"], manifest["fingerprint"], manifest["vocab_size"]) == ("sparse", "a model", 40)
    assert manifest["num_documents"] == 25 and manifest["num_postings"] == embeddings.matrix.nnz
    for mmap in (True, False):
        opened = SparseEmbeddings.open(folder, mmap=mmap)
        opened.verify()
        assert_equal(opened, embeddings)
        assert opened.ids[-1] == embeddings.ids[-1] and opened.ids[8:12] == embeddings.ids[8:12]
        assert [len(part) for part in opened.iter_shards()] == [10, 10, 5]
        assert_equal(SparseEmbeddings.concatenate(list(opened.iter_shards())), embeddings)


def test_shards_hold_the_documented_tensors(saved: tuple[Path, SparseEmbeddings]) -> None:
    folder, embeddings = saved
    tensors = load_file(folder / "shard-00001.safetensors")
    rows = embeddings.matrix[10:20]
    assert {name: str(tensor.dtype) for name, tensor in tensors.items()} == {
        "indptr": "int64",
        "indices": "int32",
        "data": "float32",
        "id_bytes": "uint8",
        "id_offsets": "int64",
    }
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(tensors[name], getattr(rows, name))
    assert tensors["id_bytes"].tobytes().decode() == "".join(embeddings.ids[10:20])


def test_saving_twice_gives_the_same_bytes(saved: tuple[Path, SparseEmbeddings], tmp_path: Path) -> None:
    folder, _ = saved
    SparseEmbeddings.open(folder).save(tmp_path / "again", shard_size=10)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_rows_by_position_slice_and_mask(saved: tuple[Path, SparseEmbeddings]) -> None:
    folder, embeddings = saved
    opened = SparseEmbeddings.open(folder)
    generator = np.random.default_rng(1)
    selections = [slice(3, 24), slice(None, None, -3), slice(5, 5), 7, -1, [24, 0, 11, 10, 9]]
    selections += [generator.permutation(25)[: generator.integers(1, 25)] for _ in range(20)]
    selections.append(generator.random(25) > 0.5)
    for rows in selections:
        positions = np.atleast_1d(np.arange(25)[rows])
        for container in (embeddings, opened):
            part = container[rows]
            assert part.ids == [embeddings.ids[position] for position in positions]
            np.testing.assert_array_equal(part.matrix.toarray(), embeddings.matrix.toarray()[positions])
    with pytest.raises(IndexError):
        opened[25]


def test_top_k_keeps_the_largest_weights_and_breaks_ties_by_vocabulary_index(tmp_path: Path) -> None:
    for seed in range(30):
        generator = np.random.default_rng(seed)
        matrix = random_matrix(12, 30, generator.random(), seed)
        embeddings = SparseEmbeddings([str(row) for row in range(12)], matrix)
        embeddings.save(tmp_path / str(seed), shard_size=5)
        k = int(generator.integers(1, 33))
        for container in (embeddings, SparseEmbeddings.open(tmp_path / str(seed))):
            kept = container.top_k(k).matrix
            assert kept.has_sorted_indices and (kept.data > 0).all()
            for row, dense in enumerate(matrix.toarray()):
                ranked = sorted((-weight, index) for index, weight in enumerate(dense) if weight > 0)[:k]
                expected = {index: -weight for weight, index in ranked}
                start, end = kept.indptr[row], kept.indptr[row + 1]
                assert dict(zip(kept.indices[start:end].tolist(), kept.data[start:end].tolist())) == expected
    with pytest.raises(ValueError, match="k >= 1"):
        embeddings.top_k(0)


def test_rows_without_terms_and_containers_without_rows_survive(tmp_path: Path) -> None:
    matrix = scipy.sparse.csr_matrix((3, 7), dtype=np.float32)
    SparseEmbeddings(["a", "b", "c"], matrix).save(tmp_path / "empty rows")
    opened = SparseEmbeddings.open(tmp_path / "empty rows")
    opened.verify()
    assert opened.matrix.shape == (3, 7) and opened.matrix.nnz == 0 and list(opened.ids) == ["a", "b", "c"]
    SparseEmbeddings([], matrix[:0]).save(tmp_path / "no rows")
    none = SparseEmbeddings.open(tmp_path / "no rows")
    assert len(none) == 0 and none.matrix.shape == (0, 7) and list(none.ids) == [] and none.top_k(3).matrix.nnz == 0
    assert len(opened[1:1]) == 0 and len(none[:]) == 0


def test_concatenate_refuses_what_does_not_belong_together() -> None:
    first = random_embeddings(4)
    with pytest.raises(ValueError, match="duplicate identifier"):
        SparseEmbeddings.concatenate([first, first])
    with pytest.raises(ValueError, match="vocab_size"):
        SparseEmbeddings.concatenate([first, SparseEmbeddings(["z"], random_matrix(1, 41, 0.5, 0), "a model")])
    with pytest.raises(ValueError, match="fingerprint"):
        SparseEmbeddings.concatenate([first, SparseEmbeddings(["z"], random_matrix(1, 40, 0.5, 0), "another")])
    with pytest.raises(ValueError, match="at least one"):
        SparseEmbeddings.concatenate([])


def test_opening_reads_nothing(tmp_path: Path) -> None:
    """The memory of a process that opens 80 MB of shards and looks at one row grows by far less."""
    rows, per_row = 20_000, 500
    generator = np.random.default_rng(0)
    indices = np.tile(np.arange(per_row, dtype=np.int32) * 3, rows)
    weights = generator.random(rows * per_row, dtype=np.float32) + 0.1
    matrix = scipy.sparse.csr_matrix((weights, indices, np.arange(rows + 1) * per_row), shape=(rows, 1600))
    SparseEmbeddings([str(row) for row in range(rows)], matrix).save(tmp_path / "large", shard_size=5000)
    program = """
import sys, torch
from rarezoo.retrieval import SparseEmbeddings
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
SparseEmbeddings.open(sys.argv[2])[0].matrix  # whatever is imported on first use
before = resident()
embeddings = SparseEmbeddings.open(sys.argv[1])
assert embeddings.ids[12_345] == "12345" and embeddings[12_345].matrix.nnz == 500
print(resident() - before)
"""
    random_embeddings(3).save(tmp_path / "small")
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from /proc")
    arguments = [sys.executable, "-c", program, str(tmp_path / "large"), str(tmp_path / "small")]
    grown = int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
    assert sum(path.stat().st_size for path in (tmp_path / "large").iterdir()) > 80_000_000
    # In KiB. Some kernels map 4 MiB around every byte that is touched.
    assert grown < 25_000


def test_truncated_or_damaged_shards_are_named(saved: tuple[Path, SparseEmbeddings]) -> None:
    folder, _ = saved
    path = folder / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged or truncated"):
        SparseEmbeddings.open(folder)
    path.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged"):
        _ = SparseEmbeddings.open(folder).matrix
    path.write_bytes(whole)
    SparseEmbeddings.open(folder).verify()
    for position in range(len(whole) - 200, len(whole), 13):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged"):
            SparseEmbeddings.open(folder).verify()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.safetensors is missing"):
        SparseEmbeddings.open(folder)


def test_folders_that_are_something_else_are_refused(saved: tuple[Path, SparseEmbeddings], tmp_path: Path) -> None:
    folder, _ = saved
    manifest_path = folder / "embeddings.json"
    manifest = json.loads(manifest_path.read_text())
    with pytest.raises(FileNotFoundError, match=r"embeddings\.json is missing"):
        SparseEmbeddings.open(tmp_path)
    for change, message in [
        ({"kind": "dense"}, "expected kind 'sparse', found 'dense'"),
        ({"format_version": 99}, "format version 99"),
        ({"complete": False}, "has not finished"),
    ]:
        manifest_path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=message):
            SparseEmbeddings.open(folder)
    manifest_path.write_text("{")
    with pytest.raises(ValueError, match=r"embeddings\.json is damaged"):
        SparseEmbeddings.open(folder)


@pytest.mark.parametrize(
    "name", ["complete", "shards", "vocab_size", "fingerprint", "file", "num_bytes", "num_postings"]
)
def test_a_missing_entry_of_the_manifest_is_named(saved: tuple[Path, SparseEmbeddings], name: str) -> None:
    path = saved[0] / "embeddings.json"
    manifest = json.loads(path.read_text())
    del (manifest if name in manifest and name != "num_postings" else manifest["shards"][0])[name]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is damaged: the entry '{name}' is missing$"):
        SparseEmbeddings.open(saved[0])


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"kind": 1' + "0" * 5000 + "}", "\udcff"])
def test_a_manifest_that_is_no_json_is_named(saved: tuple[Path, SparseEmbeddings], content: str) -> None:
    path = saved[0] / "embeddings.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} is damaged: expected a JSON object"):
        SparseEmbeddings.open(saved[0])


@pytest.mark.parametrize(("metadata", "problem"), [("{", "expected a JSON object"), ("{}", "the entry 'crc32' is")])
def test_damaged_metadata_of_a_shard_is_named(
    saved: tuple[Path, SparseEmbeddings], metadata: str, problem: str
) -> None:
    path = saved[0] / "shard-00000.safetensors"
    tensors = load_file(path)
    size = path.stat().st_size
    save_file(tensors, path, {"rarezoo": metadata})
    manifest = json.loads((saved[0] / "embeddings.json").read_text())
    assert path.stat().st_size != size == manifest["shards"][0]["num_bytes"]
    manifest["shards"][0]["num_bytes"] = path.stat().st_size
    (saved[0] / "embeddings.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"shard-00000\.safetensors is damaged: {problem}"):
        SparseEmbeddings.open(saved[0]).verify()


def test_saving_never_overwrites(saved: tuple[Path, SparseEmbeddings]) -> None:
    folder, embeddings = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="not an empty folder"):
        embeddings.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk; the manifest and small shards would still fit."""
    program = """
import resource, sys
from pathlib import Path
import numpy as np, scipy.sparse, torch
from rarezoo.retrieval import SparseEmbeddings
matrix = scipy.sparse.csr_matrix(np.ones((2000, 100), dtype=np.float32))
embeddings = SparseEmbeddings([str(row) for row in range(2000)], matrix)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    embeddings.save(Path(sys.argv[1]) / "embeddings")
except OSError as error:
    print(error)
"""
    arguments = [sys.executable, "-c", program, str(tmp_path)]
    printed = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    target = tmp_path / "embeddings"
    assert printed == f"cannot write {target}: File too large; nothing half-written remains\n"
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_may_not_be_written_is_one_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(OSError, match=r"cannot write .*embeddings: Permission denied"):
            random_embeddings(3).save(tmp_path / "embeddings")
    finally:
        if user == 0:
            os.seteuid(user)
        tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []
