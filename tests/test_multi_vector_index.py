"""The index of multi-vectors: every answer is compared with MaxSim by brute force in float64."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from safetensors.numpy import load_file, save_file

from rarezoo.retrieval import multi_vector_segments
from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings
from rarezoo.retrieval.multi_vector_index import PRECISIONS, MultiVectorIndex
from rarezoo.retrieval.residual_codec import ResidualCodec
from rarezoo.retrieval.sparse_embeddings import SparseEmbeddings

from .folders import contents, file_limit

DIM = 16
COMPRESSED = [precision for precision in PRECISIONS if precision != "float32"]
Rows = dict[str, np.ndarray]


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def random_rows(count: int, generator: np.random.Generator, prefix: str = "d", shortest: int = 0) -> Rows:
    lengths = generator.integers(shortest, 7, count)
    return {f"{prefix}{row}": unit(generator.standard_normal((length, DIM))) for row, length in enumerate(lengths)}


def container(rows: Rows, fingerprint: str | None = "a model") -> MultiVectorEmbeddings:
    vectors = np.concatenate([np.empty((0, DIM), dtype=np.float32), *rows.values()])
    return MultiVectorEmbeddings(
        list(rows), vectors, np.array([len(row) for row in rows.values()], dtype=int), fingerprint
    )


def brute_force(rows: Rows, queries, k: int) -> list[list[tuple[str, float]]]:
    """Float64 MaxSim; documents without vectors are not found."""
    found = []
    for query in queries:
        scores = [
            (name, float((row.astype(np.float64) @ query.T.astype(np.float64)).max(axis=0).sum()))
            for name, row in rows.items()
            if len(row)
        ]
        found.append(sorted(scores, key=lambda pair: -pair[1])[:k] if len(query) else [])
    return found


def assert_same(found, expected, tolerance: float = 1e-5) -> None:
    """Equal scores; the order may differ only where scores agree to the tolerance."""
    assert [len(results) for results in found] == [len(results) for results in expected]
    for results, exact in zip(found, expected):
        np.testing.assert_allclose([score for _, score in results], [score for _, score in exact], atol=tolerance)
        assert len({name for name, _ in results}) == len(results)
        for (name, score), (other, _) in zip(results, exact):
            assert name == other or abs(dict(exact).get(name, score) - score) <= 2 * tolerance


def some_queries(generator: np.random.Generator, count: int = 4) -> list[np.ndarray]:
    return [unit(generator.standard_normal((length, DIM))) for length in generator.integers(1, 6, count)]


def stored(index: MultiVectorIndex, rows: Rows) -> Rows:
    """What the index scores with: for brute force over compressed vectors."""
    return {name: vectors for name, vectors in index.reconstruct(list(rows))}


@pytest.fixture(params=["float32", "2-bit"])
def small(request, tmp_path: Path) -> tuple[MultiVectorIndex, Rows]:
    rows = random_rows(40, np.random.default_rng(0))
    return MultiVectorIndex.build(container(rows), tmp_path / "index", request.param), rows


@pytest.mark.parametrize("precision", PRECISIONS)
def test_search_equals_brute_force(tmp_path: Path, precision: str) -> None:
    for seed in range(4):
        generator = np.random.default_rng(seed)
        rows = random_rows(int(generator.integers(2, 90)), generator)
        rows["last"] = unit(generator.standard_normal((3, DIM)))
        index = MultiVectorIndex.build(container(rows), tmp_path / str(seed), precision)
        assert index.precision == precision and len(index) == len(rows)
        queries = some_queries(generator)
        for k in (1, 7, 1000):
            found = index.search(queries, top_k=k)
            assert_same(found, brute_force(stored(index, rows), queries, k))
            assert MultiVectorIndex.open(tmp_path / str(seed)).search(queries, top_k=k) == found
        index.verify()


@pytest.mark.parametrize(
    ("precision", "cosine"), [("float16", 0.999999), ("8-bit", 0.999), ("4-bit", 0.99), ("2-bit", 0.93), ("1-bit", 0.8)]
)
def test_the_stored_vectors_are_near_the_given(tmp_path: Path, precision: str, cosine: float) -> None:
    rows = random_rows(300, np.random.default_rng(1))
    index = MultiVectorIndex.build(container(rows), tmp_path / "index", precision, num_centroids=64)
    cosines = [(vectors * rows[name]).sum(axis=1) for name, vectors in index.reconstruct(list(rows))]
    assert np.concatenate(cosines).mean() > cosine


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_lengths_are_kept(tmp_path: Path, precision: str) -> None:
    rows = {name: 3 * row for name, row in random_rows(50, np.random.default_rng(1)).items()}
    index = MultiVectorIndex.build(container(rows), tmp_path / "index", precision)
    for name, vectors in index.reconstruct(list(rows)):
        # Half a step: 2^-11 of the value, or 1/254 of the vector's largest.
        step = np.abs(rows[name]) / 2**11 if precision == "float16" else np.abs(rows[name]).max(1, keepdims=True) / 254
        assert (np.abs(vectors - rows[name]) <= step * 1.001).all()


def test_negative_maxima_are_not_clamped(tmp_path: Path) -> None:
    """A document that points away from the query scores below zero, alone and beside longer ones."""
    away = unit(-np.ones((1, DIM)))
    rows = {"away": away, "long": np.concatenate([away] * 5), "none": away[:0], "near": -away}
    for precision in PRECISIONS:
        index = MultiVectorIndex.build(container(rows), tmp_path / precision, precision)
        found = index.search([unit(np.ones((2, DIM)))])[0]
        assert [name for name, _ in found] == ["near", "away", "long"]
        np.testing.assert_allclose([score for _, score in found], [2, -2, -2], atol=0.02)


@pytest.mark.parametrize("precision", ["float32", "int8", "2-bit"])
def test_a_life_of_additions_deletions_and_compactions(tmp_path: Path, precision: str) -> None:
    """After every operation the index answers as brute force over the documents that are left."""
    for seed in range(3):
        generator = np.random.default_rng(100 + seed)
        alive = random_rows(25, generator, "0-")
        deleted: Rows = {}
        index = MultiVectorIndex.build(container(alive), tmp_path / str(seed), precision)
        for step in range(1, 11):
            action = generator.choice(["add", "delete", "compact", "add again"])
            if action == "add":
                new = random_rows(int(generator.integers(1, 20)), generator, f"{step}-")
                index.add(container(new))
                alive |= new
            elif action == "delete" and alive:
                names = list(generator.choice(list(alive), size=generator.integers(1, len(alive) + 1), replace=False))
                index.delete(names)
                deleted |= {name: alive.pop(name) for name in names}
            elif action == "add again" and deleted:
                name, row = deleted.popitem()
                index.add(container({str(name): -row}))
                alive[name] = -row
            elif action == "compact":
                before = stored(index, alive)
                index.compact()
                assert index.num_vectors == sum(map(len, alive.values()))
                for name, row in stored(index, alive).items():
                    np.testing.assert_array_equal(row, before[name])
            queries = some_queries(generator)
            expected = brute_force(stored(index, alive), queries, 8)
            reopened = MultiVectorIndex.open(tmp_path / str(seed))
            assert len(index) == len(reopened) == len(alive)
            for searched, exhaustive in itertools.product((index, reopened), (False, True)):
                assert_same(searched.search(queries, top_k=8, exhaustive=exhaustive), expected)
            assert all(name in reopened for name in alive) and not any(name in reopened for name in deleted)
            reopened.verify()


def clustered(count: int, queries: int, generator: np.random.Generator) -> tuple[Rows, np.ndarray]:
    """Words (500) with an own direction, documents of words from one of 40 topics, and queries of their words."""
    words = unit(generator.standard_normal((500, DIM)))
    topics = generator.integers(0, 500, (40, 30))
    chosen = topics[generator.integers(0, 40, count)[:, None], generator.integers(0, 30, (count, 12))]
    asked = chosen[:queries, generator.integers(0, 12, 8)]
    documents, questions = (
        unit(words[part] + 0.12 * generator.standard_normal((*part.shape, DIM))) for part in (chosen, asked)
    )
    return {f"d{row}": vectors for row, vectors in enumerate(documents)}, questions


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> tuple[Path, Rows, np.ndarray]:
    rows, queries = clustered(2000, 40, np.random.default_rng(0))
    folder = tmp_path_factory.mktemp("collection")
    for precision in ("float32", "float16", "int8", "4-bit"):
        MultiVectorIndex.build(container(rows), folder / precision, precision)
    return folder, rows, queries


def recall(found, expected) -> float:
    pairs = zip(found, expected)
    return float(np.mean([len(dict(results).keys() & dict(exact).keys()) / len(exact) for results, exact in pairs]))


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "4-bit"])
def test_candidates_find_what_exact_search_finds(collection, precision: str) -> None:
    """At the defaults: what the stages lose against scoring all stored vectors, and what compression loses."""
    folder, rows, queries = collection
    index = MultiVectorIndex.open(folder / precision)
    found = index.search(queries)
    exact = brute_force(rows, queries, 10)
    assert recall(found, index.search(queries, exhaustive=True)) >= 0.99
    assert recall(found, exact) >= {"float32": 1, "float16": 0.99, "int8": 0.97, "4-bit": 0.93}[precision]
    if precision != "float32":
        few = index.search(queries, num_cells=1, num_candidates=20)
        assert all(len(results) == 10 for results in few) and recall(few, exact) >= 0.7


def test_two_bits_at_128_dimensions(tmp_path: Path) -> None:
    """Recall@10 of at least 0.95 at the defaults, in 34 bytes per vector, and at most 2 more in the lists."""
    generator = np.random.default_rng(0)
    words, context = unit(generator.standard_normal((300, 128))), unit(generator.standard_normal((1000, 1, 128)))
    topics = generator.integers(0, 300, (30, 40))
    chosen = topics[generator.integers(0, 30, 1000)[:, None], generator.integers(0, 40, (1000, 20))]
    asked = chosen[:40, generator.integers(0, 20, 16)]
    documents, queries = (
        unit(words[part] + 0.3 * context[: len(part)] + 0.04 * generator.standard_normal((*part.shape, 128)))
        for part in (chosen, asked)
    )
    rows = {f"d{row}": vectors for row, vectors in enumerate(documents)}
    embeddings = MultiVectorEmbeddings(list(rows), documents.reshape(-1, 128), [20] * 1000)
    index = MultiVectorIndex.build(embeddings, tmp_path / "index", "2-bit", num_centroids=512)
    assert recall(index.search(queries), brute_force(rows, queries, 10)) >= 0.95
    tensors = load_file(index.folder / "segment-00000.safetensors")
    assert (tensors["residuals"].nbytes + tensors["codes"].nbytes) / index.num_vectors == 34
    assert tensors["cell_documents"].nbytes / index.num_vectors <= 2


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_subset_is_searched_alone(collection, precision: str) -> None:
    folder, rows, queries = collection
    index = MultiVectorIndex.open(folder / precision)
    for names in ([], ["d5"], [f"d{row}" for row in range(0, 2000, 3)], [f"d{row}" for row in range(30)]):
        chosen = {name: rows[name] for name in names}
        found = index.search(queries, subset={*names, "unknown"})
        assert all(name in chosen for results in found for name, _ in results)
        if names:
            assert recall(found, brute_force(chosen, queries, 10)) >= (1 if precision == "float32" else 0.97)
        else:
            assert found == [[]] * len(queries)
    with pytest.raises(TypeError, match="expected several identifiers, found the one 'd5'"):
        index.search(queries, subset="d5")


def test_segments_change_nothing(collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows, queries = collection
    for precision in ("float32", "4-bit"):
        whole = MultiVectorIndex.open(folder / precision)
        codec = whole.codec
        for limits in ({"SEGMENT_DOCUMENTS": 700}, {"SEGMENT_VECTORS": 7000}):
            with monkeypatch.context() as patch:
                for name, value in limits.items():
                    patch.setattr(multi_vector_segments, name, value)
                target = tmp_path / f"{precision} {limits}"
                index = MultiVectorIndex.build(container(rows), target, precision, codec=codec)
                assert len(list(index.folder.glob("segment-*"))) > 2
                for options in ({}, {"exhaustive": True}, {"subset": [f"d{row}" for row in range(500, 1500)]}):
                    assert_same(index.search(queries, **options), whole.search(queries, **options))
                index.delete([f"d{row}" for row in range(600, 800)])
                left = index.search(queries, top_k=30)
            index.compact()
            assert len(list(index.folder.glob("segment-*"))) == 1
            assert_same(index.search(queries, top_k=30), left)


def test_forms_of_queries(small) -> None:
    index, _ = small
    generator = np.random.default_rng(3)
    batch = unit(generator.standard_normal((3, 5, DIM)))
    expected = index.search(batch)
    forms = [
        list(batch),
        torch.from_numpy(batch),
        [torch.from_numpy(query) for query in batch],
        batch.astype(np.float64),
        MultiVectorEmbeddings.from_list(["a", "b", "c"], list(batch)),
        MultiVectorEmbeddings.from_list(["a", "b", "c"], list(batch), "a model"),
    ]
    for queries in forms:
        assert index.search(queries) == expected
    assert index.search([]) == [] and index.search(batch[:0]) == []
    assert index.search([batch[0], batch[0][:0], batch[1]]) == [expected[0], [], expected[1]]
    one_by_one = [index.search([query])[0] for query in batch]
    assert_same(one_by_one, expected)


def test_many_queries_at_once(small) -> None:
    index, rows = small
    queries = some_queries(np.random.default_rng(5), 700)
    assert_same(index.search(queries, top_k=3), brute_force(stored(index, rows), queries, 3))


def test_equal_documents_come_in_the_order_they_were_added(tmp_path: Path) -> None:
    row = unit(np.ones((2, DIM)))
    for precision in ("float32", "2-bit"):
        index = MultiVectorIndex.build(container({"b": row, "a": row}), tmp_path / precision, precision)
        index.add(container({"0": row, "c": row}))
        assert [name for name, _ in index.search([row], top_k=3)[0]] == ["b", "a", "0"]


def test_blank_documents(tmp_path: Path) -> None:
    """None of them has vectors, or some have none, or the three of a blank text."""
    generator = np.random.default_rng(0)
    special = unit(generator.standard_normal((3, DIM)))
    rows = {"none": special[:0], "blank": special, "also blank": special, "also none": special[:0]}
    for precision in PRECISIONS:
        index = MultiVectorIndex.build(container(rows), tmp_path / precision, precision)
        assert len(index) == 4 and "none" in index
        assert [name for name, _ in index.search([special])[0]] == ["blank", "also blank"]
        index.delete(["blank", "also none"])
        index.compact()
        assert len(index) == 2 and [name for name, _ in index.search([special])[0]] == ["also blank"]
        index.delete(["also blank"])
        index.add(container({"new": special[:0]}))
        assert index.search([special], exhaustive=True) == [[]] == index.search([special])
        index.compact()
        assert len(index) == 2 and index.search([special]) == [[]]


def test_an_index_without_documents(tmp_path: Path) -> None:
    row = unit(np.ones((2, DIM)))
    index = MultiVectorIndex.build(container({}), tmp_path / "index")
    assert len(index) == 0 and index.search([row]) == [[]]
    index.add(container({"d": row}))
    assert [name for name, _ in index.search([row])[0]] == ["d"]
    index.delete(["d"])
    assert index.search([row]) == [[]]
    index.compact()
    assert contents(tmp_path / "index").keys() == {"index.json"}
    for precision in COMPRESSED:
        with pytest.raises(ValueError, match="no vectors to train the centroids"):
            MultiVectorIndex.build(container({}), tmp_path / precision, precision)
    codec = ResidualCodec.train(unit(np.random.default_rng(0).standard_normal((50, DIM))), 2)
    index = MultiVectorIndex.build(container({}), tmp_path / "given", "2-bit", codec=codec)
    assert index.search([row]) == [[]]
    assert [path.name for path in tmp_path.iterdir() if path.name in COMPRESSED] == []


def test_vectors_of_another_model_are_refused(small) -> None:
    index, _ = small
    row = unit(np.ones((2, DIM)))
    for fingerprint, name in (("another", "model another"), (None, "an unknown model")):
        with pytest.raises(ValueError, match=f"new documents were encoded by {name}, .*by model a model: "):
            index.add(container({"x": row}, fingerprint))
    with pytest.raises(ValueError, match=r"queries were encoded by model another, .*by model a model: "):
        index.search(container({"q": row}, "another"))
    wide = MultiVectorEmbeddings(["x"], np.ones((1, 2 * DIM)), [1], "a model")
    with pytest.raises(ValueError, match="the documents have 32 dimensions, the index 16"):
        index.add(wide)
    for queries in (wide, [np.ones((1, 2 * DIM))]):
        with pytest.raises(ValueError, match="the queries have 32 dimensions, the index 16"):
            index.search(queries)


def test_mistakes_are_named(small, tmp_path: Path) -> None:
    index, rows = small
    row = unit(np.ones((2, DIM)))
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="queries hold values that are not finite"):
            index.search([row * value])
    with pytest.raises(ValueError, match=r"found the shape \(2, 16\): write \[query\] for one"):
        index.search(row)
    with pytest.raises(ValueError, match=r"one dimension, found \[8, 16\]"):
        index.search([row, row[:, :8]])
    for name in ("top_k", "num_cells", "num_candidates"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; found 0"):
            index.search([row], **{name: 0})
        with pytest.raises(TypeError, match=rf"{name} must be a whole number; found 1\.5"):
            index.search([row], **{name: 1.5})
    sparse = SparseEmbeddings(["a"], scipy.sparse.csr_matrix(np.ones((1, DIM))))
    for call in (lambda: MultiVectorIndex.build(sparse, tmp_path / "new"), lambda: index.add(sparse)):
        with pytest.raises(TypeError, match=r"MultiVectorIndex holds multi-vector embeddings: .* SparseEmbeddings$"):
            call()
    with pytest.raises(ValueError, match=r"precision must be one of 'float32'.*found '3-bit'"):
        MultiVectorIndex.build(container(rows), tmp_path / "new", "3-bit")
    with pytest.raises(ValueError, match="'float32' has no centroids"):
        MultiVectorIndex.build(container(rows), tmp_path / "new", num_centroids=4)
    with pytest.raises(ValueError, match=r"vectors of length 1, found the length 2: normalise"):
        MultiVectorIndex.build(container({"long": 2 * row}), tmp_path / "new", "2-bit")
    with pytest.raises(ValueError, match="beyond float16's range"):
        MultiVectorIndex.build(container({"long": 1e6 * row}), tmp_path / "new", "float16")
    codec = ResidualCodec(np.ones((1, DIM)), [0], [-1, 1])
    with pytest.raises(ValueError, match="does not fit the precision '2-bit'"):
        MultiVectorIndex.build(container(rows), tmp_path / "new", "2-bit", codec=codec)
    with pytest.raises(FileExistsError):
        MultiVectorIndex.build(container(rows), index.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_identifiers_that_exist_or_do_not(small) -> None:
    index, _ = small
    before = contents(index.folder)
    row = unit(np.ones((2, DIM)))
    with pytest.raises(ValueError, match="holds a document 'd7' already"):
        index.add(container({"new": row, "d7": row}))
    with pytest.raises(ValueError, match=r"no document 'z', 'y' \(2 of 3 unknown\); nothing was deleted"):
        index.delete(["z", "d1", "y"])
    with pytest.raises(ValueError, match="no document 'z'"):
        index.reconstruct(["d1", "z"])
    assert contents(index.folder) == before and len(index) == 40
    with pytest.raises(TypeError, match="expected several identifiers, found the one 'd1'"):
        index.delete("d1")
    index.delete(["d1", "d1"])
    assert len(index) == 39 and "d1" not in index and 7 not in index


def test_an_identifier_in_two_shards_is_refused(tmp_path: Path) -> None:
    rows = random_rows(4, np.random.default_rng(0), shortest=1)
    container(rows).save(tmp_path / "e", shard_size=2)
    manifest = json.loads((tmp_path / "e" / "embeddings.json").read_text())
    manifest["shards"][1] = manifest["shards"][0]
    (tmp_path / "e" / "embeddings.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="duplicate identifier 'd0'"):
        MultiVectorIndex.build(MultiVectorEmbeddings.open(tmp_path / "e"), tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_shards_on_disk_and_rows_in_memory_give_the_same_files(tmp_path: Path) -> None:
    embeddings = container(random_rows(50, np.random.default_rng(0)))
    embeddings.save(tmp_path / "e", shard_size=7)
    for precision in ("float32", "2-bit"):
        for name, source in (("memory", embeddings), ("disk", MultiVectorEmbeddings.open(tmp_path / "e"))):
            MultiVectorIndex.build(source, tmp_path / f"{precision} {name}", precision)
        assert contents(tmp_path / f"{precision} memory") == contents(tmp_path / f"{precision} disk")


def test_damaged_files_are_named(small, tmp_path: Path) -> None:
    index, _ = small
    folder, query = index.folder, [unit(np.ones((2, DIM)))]
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
        MultiVectorIndex.open(tmp_path / "nothing")
    path = folder / "segment-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"segment-00000\.safetensors is damaged or truncated"):
        MultiVectorIndex.open(folder)
    # A bit of the vectors: found by verify, and never given a new checksum.
    path.write_bytes(whole)
    stored_as = "vectors" if index.precision == "float32" else "residuals"
    at = whole.index(load_file(path)[stored_as].tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for act in (lambda: MultiVectorIndex.open(folder).verify(), lambda: MultiVectorIndex.open(folder).compact()):
        with pytest.raises(ValueError, match=r"segment-00000\.safetensors is damaged: its contents"):
            act()
    damage = {"token_offsets": -1}
    if index.precision != "float32":
        damage |= {"codes": 60_000, "cell_offsets": -5, "cell_documents": 999}
    for name, value in damage.items():
        path.write_bytes(whole)
        tensors = {key: tensor.copy() for key, tensor in load_file(path).items()}
        tensors[name][1] = value
        save_file(tensors, path)
        with pytest.raises(ValueError, match=rf"segment-00000\.safetensors is damaged: '{name}'"):
            MultiVectorIndex.open(folder).search(query, num_candidates=5)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"segment-00000\.safetensors is missing"):
        MultiVectorIndex.open(folder)
    manifest = json.loads((folder / "index.json").read_text())
    changes = [({"kind": "sparse"}, "found 'sparse'"), ({"format_version": 7}, "version 7")]
    for change, message in [*changes, ({"precision": "fp4"}, "precision 'fp4'")]:
        (folder / "index.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=message):
            MultiVectorIndex.open(folder)


def test_a_damaged_codec_is_named(tmp_path: Path) -> None:
    rows = random_rows(40, np.random.default_rng(0))
    folder = MultiVectorIndex.build(container(rows), tmp_path / "index", "2-bit").folder
    path = folder / "codec.safetensors"
    whole = path.read_bytes()
    at = whole.index(load_file(path)["centroids"].tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"codec\.safetensors is damaged: its contents"):
        MultiVectorIndex.open(folder).verify()
    tensors = load_file(path)
    save_file({**tensors, "bucket_weights": tensors["bucket_weights"][:3].copy()}, path)
    with pytest.raises(ValueError, match=r"codec\.safetensors is damaged: expected 2, 4, 16 or 256"):
        MultiVectorIndex.open(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"codec\.safetensors is missing"):
        MultiVectorIndex.open(folder)


@pytest.mark.parametrize("size", [200, 2000])
def test_a_full_disk_changes_nothing(small, tmp_path: Path, size: int) -> None:
    index, rows = small
    before = contents(index.folder)
    new = container(random_rows(200, np.random.default_rng(1), "new"))
    query = [unit(np.ones((2, DIM)))]
    found = index.search(query)
    with file_limit(size):
        with pytest.raises(OSError, match=r"cannot write .*nothing half-written remains"):
            MultiVectorIndex.build(new, tmp_path / "new", index.precision)
        for change in (lambda: index.add(new), index.compact):
            with pytest.raises(OSError, match=r"cannot write .*nothing half-written remains"):
                change()
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert contents(index.folder) == before and index.search(query) == found and len(index) == len(rows)


def test_a_killed_addition_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    """The process ends when the new segment is written and the manifest is not."""
    rows = random_rows(40, np.random.default_rng(0))
    index = MultiVectorIndex.build(container(rows), tmp_path / "index")
    query = [unit(np.ones((2, DIM)))]
    found = index.search(query)
    program = """
import os, sys
import numpy as np
from rarezoo.retrieval import storage
from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings
from rarezoo.retrieval.multi_vector_index import MultiVectorIndex
storage.write_json = lambda *arguments: os._exit(9)
new = np.eye(3, 16, dtype=np.float32)
MultiVectorIndex.open(sys.argv[1]).add(MultiVectorEmbeddings(["new"], new, [3], "a model"))
"""
    finished = subprocess.run([sys.executable, "-c", program, str(index.folder)], capture_output=True, text=True)
    assert finished.returncode == 9, finished.stderr
    assert (index.folder / "segment-00001.safetensors").exists()
    reopened = MultiVectorIndex.open(index.folder)
    assert len(reopened) == len(rows) and reopened.search(query) == found
    reopened.delete(["d0"])
    assert not (index.folder / "segment-00001.safetensors").exists()


def test_the_folder_holds_what_is_documented(small) -> None:
    index, rows = small
    manifest = json.loads((index.folder / "index.json").read_text())
    assert manifest["kind"] == "multi-vector" and manifest["precision"] == index.precision and manifest["dim"] == DIM
    assert manifest["num_documents"] == 40 and manifest["num_vectors"] == sum(map(len, rows.values()))
    tensors = load_file(index.folder / "segment-00000.safetensors")
    np.testing.assert_array_equal(np.diff(tensors["token_offsets"]), [len(row) for row in rows.values()])
    if index.precision == "float32":
        np.testing.assert_array_equal(tensors["vectors"], np.concatenate(list(rows.values())))
        assert contents(index.folder).keys() == {"index.json", "segment-00000.safetensors"}
        return
    owners = np.repeat(np.arange(40), np.diff(tensors["token_offsets"]))
    offsets = tensors["cell_offsets"]
    for cell in range(manifest["num_centroids"]):
        expected = np.unique(owners[tensors["codes"] == cell])
        np.testing.assert_array_equal(tensors["cell_documents"][offsets[cell] : offsets[cell + 1]], expected)
    assert contents(index.folder).keys() == {"index.json", "codec.safetensors", "segment-00000.safetensors"}
