"""The exact index against brute force in float64: search, segments, blocks, tombstones, compaction, damage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from safetensors.numpy import load_file

from rarezoo.retrieval import (
    MultiVectorEmbeddings,
    SparseEmbeddings,
    SparseIndex,
    segmented_index,
    sparse_index,
    storage,
)
from rarezoo.retrieval.identifiers import PackedIds

from .folders import contents

pytest.importorskip("numba")


def random_rows(rows: int, vocab_size: int, per_row: float, generator: np.random.Generator) -> scipy.sparse.csr_matrix:
    """Weights are multiples of 1/8 up to 2: sums are exact in float32 and ties are common."""
    dense = generator.integers(1, 17, size=(rows, vocab_size)) / 8
    dense[generator.random((rows, vocab_size)) > per_row / vocab_size] = 0
    return scipy.sparse.csr_matrix(dense.astype(np.float32))


def embeddings(prefix: str, matrix: scipy.sparse.csr_matrix, fingerprint: str | None = "a model") -> SparseEmbeddings:
    return SparseEmbeddings([f"{prefix}{row}" for row in range(matrix.shape[0])], matrix, fingerprint)


def brute_force(documents: dict[str, np.ndarray], queries: scipy.sparse.csr_matrix, k: int) -> list:
    """Float64 dot products with every document, sorted by score and then by order of insertion."""
    expected = []
    for query in queries.toarray().astype(np.float64):
        scores = [(name, float(query @ vector.astype(np.float64))) for name, vector in documents.items()]
        ranked = sorted((pair for pair in scores if pair[1] > 0), key=lambda pair: -pair[1])
        expected.append(ranked[:k])
    return expected


def by_name(container: SparseEmbeddings) -> dict[str, np.ndarray]:
    return dict(zip(container.ids, container.matrix.toarray()))


@pytest.fixture
def small(tmp_path: Path) -> tuple[SparseIndex, SparseEmbeddings]:
    documents = embeddings("d", random_rows(30, 20, 4, np.random.default_rng(0)))
    return SparseIndex.build(documents, tmp_path / "index"), documents


def test_search_equals_brute_force(tmp_path: Path) -> None:
    for seed in range(40):
        generator = np.random.default_rng(seed)
        vocab_size = int(generator.integers(5, 60))
        documents = embeddings("d", random_rows(int(generator.integers(1, 90)), vocab_size, 4, generator))
        queries = random_rows(int(generator.integers(1, 12)), vocab_size, generator.random() * 6, generator)
        index = SparseIndex.build(documents, tmp_path / str(seed))
        for k in (1, int(generator.integers(2, 20)), 1000):
            assert index.search(queries, top_k=k) == brute_force(by_name(documents), queries, k)
        assert SparseIndex.open(tmp_path / str(seed)).search(queries) == index.search(queries)


def test_a_life_of_additions_deletions_and_compactions(tmp_path: Path) -> None:
    """After every operation the index answers as brute force over the documents that are left, in their order."""
    for seed in range(12):
        generator = np.random.default_rng(100 + seed)
        first = embeddings("0-", random_rows(25, 30, 5, generator))
        index = SparseIndex.build(first, tmp_path / str(seed))
        alive = by_name(first)
        deleted: dict[str, np.ndarray] = {}
        for step in range(1, 12):
            action = generator.choice(["add", "delete", "compact", "add again"])
            if action == "add":
                new = embeddings(f"{step}-", random_rows(int(generator.integers(1, 20)), 30, 5, generator))
                index.add(new)
                alive |= by_name(new)
            elif action == "delete" and alive:
                names = list(generator.choice(list(alive), size=generator.integers(1, len(alive) + 1), replace=False))
                index.delete(names)
                deleted |= {name: alive.pop(name) for name in names}
            elif action == "add again" and deleted:
                name, vector = deleted.popitem()
                changed = scipy.sparse.csr_matrix(vector[::-1])
                index.add(SparseEmbeddings([str(name)], changed, "a model"))
                alive[name] = vector[::-1]
            elif action == "compact":
                index.compact()
                assert index.num_postings == sum(np.count_nonzero(vector) for vector in alive.values())
            queries = random_rows(4, 30, 6, generator)
            expected = brute_force(alive, queries, 8)
            assert len(index) == len(alive)
            assert index.search(queries, top_k=8) == expected
            reopened = SparseIndex.open(tmp_path / str(seed))
            assert reopened.search(queries, top_k=8) == expected and len(reopened) == len(alive)
            assert all(name in reopened for name in alive) and not any(name in reopened for name in deleted)
            reopened.verify()


def test_blocks_and_segments_give_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """150,000 documents make three blocks of 65,536; with smaller segments also several segments."""
    generator = np.random.default_rng(0)
    rows, vocab_size, per_row = 150_000, 500, 6
    indices = np.sort(generator.integers(0, vocab_size, size=(rows, per_row)), axis=1)
    weights = generator.integers(1, 65, size=(rows, per_row)) / 32
    indptr = np.arange(rows + 1) * per_row
    matrix = scipy.sparse.csr_matrix((weights.ravel(), indices.ravel(), indptr), shape=(rows, vocab_size))
    documents = embeddings("d", matrix)
    documents.save(tmp_path / "embeddings", shard_size=40_000)
    queries = random_rows(9, vocab_size, 12, generator)
    deleted = [f"d{row}" for row in generator.choice(rows, size=5000, replace=False)]
    scores = (documents.matrix.astype(np.float64) @ queries.astype(np.float64).T).toarray().T
    scores[:, [int(name[1:]) for name in deleted]] = 0
    order = np.argsort(-scores, axis=1, kind="stable")[:, :50]
    expected = [[(f"d{row}", scores[query, row]) for row in rows_found] for query, rows_found in enumerate(order)]
    for size, segments in ((sparse_index.SEGMENT_SIZE, 1), (70_000, 3)):
        monkeypatch.setattr(sparse_index, "SEGMENT_SIZE", size)
        index = SparseIndex.build(SparseEmbeddings.open(tmp_path / "embeddings"), tmp_path / f"index {size}")
        assert len(list(index.folder.glob("segment-*"))) == segments
        index.delete(deleted)
        assert index.search(queries, top_k=50) == expected
        index.compact()
        assert index.search(queries, top_k=50) == expected
        assert len(index) == rows - 5000
        index.verify()


def test_real_valued_weights_against_float64(tmp_path: Path) -> None:
    """Only where two exact scores agree to 1e-6 may the order differ from float64's."""
    generator = np.random.default_rng(3)
    matrix = random_rows(3000, 400, 40, generator)
    matrix.data = generator.gamma(2, 0.4, size=matrix.nnz).astype(np.float32)
    queries = random_rows(20, 400, 30, generator)
    queries.data = generator.gamma(2, 0.4, size=queries.nnz).astype(np.float32)
    scores = (queries.astype(np.float64) @ matrix.astype(np.float64).T).toarray()
    found = SparseIndex.build(embeddings("d", matrix), tmp_path / "index").search(queries, top_k=100)
    for row, results in zip(scores, found):
        exact = np.sort(row)[::-1][:100]
        np.testing.assert_allclose([score for _, score in results], exact, rtol=1e-6)
        np.testing.assert_allclose([row[int(name[1:])] for name, _ in results], exact, rtol=1e-6)


def test_a_document_scores_the_same_in_every_segmentation(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    matrix = random_rows(60, 50, 20, generator)
    matrix.data = generator.random(matrix.nnz, dtype=np.float32) + 0.01
    queries = random_rows(5, 50, 20, generator)
    whole = embeddings("d", matrix)
    at_once = SparseIndex.build(whole, tmp_path / "at once")
    piecewise = SparseIndex.build(whole[:7], tmp_path / "piecewise")
    for start, end in ((7, 8), (8, 40), (40, 60)):
        piecewise.add(whole[start:end])
    assert piecewise.search(queries, top_k=60) == at_once.search(queries, top_k=60)
    piecewise.compact()
    assert contents(tmp_path / "piecewise").keys() == {"index.json", "segment-00004.safetensors"}
    expected = (tmp_path / "at once" / "segment-00000.safetensors").read_bytes()
    assert (tmp_path / "piecewise" / "segment-00004.safetensors").read_bytes() == expected


def test_threads_change_nothing(small: tuple[SparseIndex, SparseEmbeddings]) -> None:
    index, _ = small
    queries = random_rows(700, 20, 5, np.random.default_rng(1))
    expected = index.search(queries, top_k=7)
    assert index.search(queries, top_k=7, num_threads=3) == expected
    assert [index.search(queries[row], top_k=7)[0] for row in range(700)] == expected


def test_queries_and_documents_without_terms(tmp_path: Path) -> None:
    matrix = scipy.sparse.csr_matrix(np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=np.float32))
    index = SparseIndex.build(embeddings("d", matrix), tmp_path / "index")
    queries = scipy.sparse.csr_matrix(np.array([[0, 0, 0], [1, 0, 1], [0, 2, 0]], dtype=np.float32))
    assert index.search(queries) == [[], [], [("d1", 2.0)]]
    assert index.search(queries[:0]) == []
    assert len(index) == 3 and "d0" in index
    index.delete(["d0"])
    index.compact()
    assert len(index) == 2 and "d2" in index and "d0" not in index


def test_an_index_without_documents(tmp_path: Path) -> None:
    none = embeddings("d", scipy.sparse.csr_matrix((0, 4), dtype=np.float32))
    index = SparseIndex.build(none, tmp_path / "index")
    query = scipy.sparse.csr_matrix(np.ones((1, 4), dtype=np.float32))
    assert len(index) == 0 and index.search(query) == [[]]
    index.add(embeddings("d", query))
    assert index.search(query) == [[("d0", 4.0)]]
    index.delete(["d0"])
    assert index.search(query) == [[]]
    index.compact()
    assert index.search(query) == [[]] and contents(tmp_path / "index").keys() == {"index.json"}


def test_the_folder_holds_what_is_documented(small: tuple[SparseIndex, SparseEmbeddings]) -> None:
    index, documents = small
    manifest = json.loads((index.folder / "index.json").read_text())
    assert manifest["kind"] == "sparse" and manifest["fingerprint"] == "a model" and manifest["vocab_size"] == 20
    assert manifest["num_documents"] == 30 and manifest["num_postings"] == documents.num_postings
    tensors = load_file(index.folder / "segment-00000.safetensors")
    columns = documents.matrix.tocsc()
    np.testing.assert_array_equal(tensors["term_offsets"], columns.indptr)
    np.testing.assert_array_equal(tensors["documents"], columns.indices)
    np.testing.assert_array_equal(tensors["weights"], columns.data)
    assert tensors["documents"].dtype == np.uint16 and tensors["weights"].dtype == np.float32
    index.delete(["d4", "d9"])
    tombstones = load_file(index.folder / "segment-00000.deleted-00001.safetensors")["deleted"]
    assert np.flatnonzero(tombstones).tolist() == [4, 9]
    index.delete(["d5"])
    assert contents(index.folder).keys() == {
        "index.json",
        "segment-00000.safetensors",
        "segment-00000.deleted-00002.safetensors",
    }


def test_matched_terms_explain_the_score(small: tuple[SparseIndex, SparseEmbeddings]) -> None:
    index, documents = small
    index.add(embeddings("new", random_rows(10, 20, 6, np.random.default_rng(5))))
    index.delete(["d3"])
    query = random_rows(1, 20, 15, np.random.default_rng(2))
    results = index.search(query, top_k=40)[0]
    assert any(name.startswith("new") for name, _ in results)
    for name, score in results:
        terms = index.matched_terms(query, name)
        assert sum(term.query_weight * term.document_weight for term in terms) == score
        products = [term.query_weight * term.document_weight for term in terms]
        assert products == sorted(products, reverse=True) and all(products)
        if name.startswith("d"):
            row = documents.matrix[int(name[1:])].toarray()[0]
            assert all(row[term.vocabulary_index] == term.document_weight for term in terms)
    with pytest.raises(ValueError, match="no document 'd3'"):
        index.matched_terms(query, "d3")
    with pytest.raises(ValueError, match="expected one query, found 2"):
        index.matched_terms(scipy.sparse.vstack([query, query], format="csr"), "d4")


def test_vectors_of_another_model_are_refused(small: tuple[SparseIndex, SparseEmbeddings]) -> None:
    index, documents = small
    query = documents.matrix[:1]
    others = random_rows(2, 20, 4, np.random.default_rng(7))
    for fingerprint, name in (("another", "model another"), (None, "an unknown model")):
        with pytest.raises(ValueError, match=f"new documents were encoded by {name}, .*by model a model: "):
            index.add(embeddings("x", others, fingerprint))
    with pytest.raises(ValueError, match=r"queries were encoded by model another, .*by model a model: "):
        index.search(SparseEmbeddings(["q"], query, "another"))
    expected = index.search(query)
    assert index.search(SparseEmbeddings(["q"], query, "a model")) == expected != [[]]
    assert index.search(SparseEmbeddings(["q"], query)) == expected
    with pytest.raises(ValueError, match="25 vocabulary entries, the index 20"):
        index.add(embeddings("x", random_rows(2, 25, 4, np.random.default_rng(7))))
    with pytest.raises(ValueError, match="25 vocabulary entries, the index 20"):
        index.search(random_rows(2, 25, 4, np.random.default_rng(7)))


def test_vectors_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    """It goes through every form of the embeddings into the index, and whoever does not know it may still search."""
    matrix = random_rows(6, 20, 5, np.random.default_rng(0))
    ids = [f"d{row}" for row in range(6)]
    SparseEmbeddings(ids, matrix, "a model", "words").save(tmp_path / "embeddings", shard_size=2)
    documents = SparseEmbeddings.open(tmp_path / "embeddings")
    parts = [documents[:2], documents.top_k(3)[2:4], SparseEmbeddings(ids[4:], matrix[4:], "a model")]
    index = SparseIndex.build(SparseEmbeddings.concatenate(parts), tmp_path / "index")
    assert index.vocabulary == "words"
    with pytest.raises(ValueError, match="different vocabulary"):
        SparseEmbeddings.concatenate([documents[:2], SparseEmbeddings(["x"], matrix[:1], "a model", "others")])
    with pytest.raises(ValueError, match=r"new documents have the vocabulary others, the index in .* has words"):
        index.add(SparseEmbeddings(["x"], matrix[:1], "a model", "others"))
    with pytest.raises(ValueError, match=r"queries have the vocabulary others, the index in .* has words"):
        index.search(SparseEmbeddings(["q"], matrix[:1], None, "others"))
    index.add(SparseEmbeddings(["x"], matrix[:1], "a model"))
    index.delete(["d0"])
    index.compact()
    reopened = SparseIndex.open(index.folder)
    assert reopened.vocabulary == "words"
    expected = reopened.search(matrix[:1])
    for vocabulary in (None, "words"):
        assert reopened.search(SparseEmbeddings(["q"], matrix[:1], None, vocabulary)) == expected != [[]]


def test_identifiers_that_exist_or_do_not(small: tuple[SparseIndex, SparseEmbeddings]) -> None:
    index, _ = small
    before = contents(index.folder)
    new = random_rows(2, 20, 4, np.random.default_rng(7))
    with pytest.raises(ValueError, match="holds a document 'd7' already"):
        index.add(SparseEmbeddings(["new", "d7"], new, "a model"))
    with pytest.raises(ValueError, match=r"no document 'z', 'y' \(2 of 3 unknown\); nothing was deleted"):
        index.delete(["z", "d1", "y"])
    assert contents(index.folder) == before and len(index) == 30
    index.delete(["d1", "d1"])
    with pytest.raises(ValueError, match="no document 'd1'"):
        index.delete(["d1"])
    assert len(index) == 29


def test_one_string_is_not_several_identifiers(tmp_path: Path) -> None:
    matrix = random_rows(3, 20, 4, np.random.default_rng(0))
    index = SparseIndex.build(SparseEmbeddings(["1", "2", "12"], matrix), tmp_path / "index")
    for one in ("12", b"12"):
        with pytest.raises(TypeError, match=r"expected several identifiers, found the one b?'12'"):
            index.delete(one)
    with pytest.raises(TypeError, match="identifiers must be str, found int: 12"):
        index.delete([12])
    assert len(index) == 3
    with pytest.raises(TypeError, match="expected several identifiers, found the one 'abc'"):
        SparseEmbeddings("abc", matrix)


def test_an_identifier_in_two_shards_is_refused(tmp_path: Path) -> None:
    matrix = random_rows(4, 20, 4, np.random.default_rng(0))
    SparseEmbeddings(["a", "b", "c", "d"], matrix).save(tmp_path / "e", shard_size=2)
    manifest = json.loads((tmp_path / "e" / "embeddings.json").read_text())
    manifest["shards"][1] = {**manifest["shards"][0]}
    (tmp_path / "e" / "embeddings.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="duplicate identifier 'a'"):
        SparseIndex.build(SparseEmbeddings.open(tmp_path / "e"), tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_queries_with_impossible_weights_are_refused(small, weight: float) -> None:
    query = scipy.sparse.csr_matrix(([1.0, weight], ([0, 1], [3, 4])), shape=(2, 20), dtype=np.float32)
    with pytest.raises(ValueError, match=r"query 1.*positive and finite"):
        small[0].search(query)


def test_bad_arguments(small: tuple[SparseIndex, SparseEmbeddings]) -> None:
    index, documents = small
    for name in ("top_k", "num_threads"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; found 0"):
            index.search(documents.matrix, **{name: 0})
        for value in (1.5, "3", True):
            with pytest.raises(TypeError, match=f"{name} must be a whole number; found {value!r}"):
                index.search(documents.matrix, **{name: value})
    assert index.search(documents.matrix, top_k=np.int32(2)) == index.search(documents.matrix, top_k=2)
    with pytest.raises(TypeError, match="ndarray"):
        index.search(documents.matrix.toarray())


def test_damaged_folders_are_named(small: tuple[SparseIndex, SparseEmbeddings], tmp_path: Path) -> None:
    index, documents = small
    folder = index.folder
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
        SparseIndex.open(tmp_path / "nothing")
    path = folder / "segment-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"segment-00000\.safetensors is damaged or truncated"):
        SparseIndex.open(folder)
    path.write_bytes(whole)
    offsets_at = whole.index(documents.matrix.tocsc().indptr.astype(np.int64).tobytes())
    path.write_bytes(whole[: offsets_at + 8] + b"\xff" * 8 + whole[offsets_at + 16 :])
    with pytest.raises(ValueError, match=r"segment-00000\.safetensors is damaged: 'term_offsets'"):
        SparseIndex.open(folder).search(documents.matrix)
    weights_at = whole.index(documents.matrix.tocsc().data.tobytes())
    path.write_bytes(whole[:weights_at] + b"\x01" + whole[weights_at + 1 :])
    with pytest.raises(ValueError, match=r"segment-00000\.safetensors is damaged: its contents"):
        SparseIndex.open(folder).verify()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"segment-00000\.safetensors is missing"):
        SparseIndex.open(folder)
    manifest = json.loads((folder / "index.json").read_text())
    for change, message in [({"kind": "multi-vector"}, "found 'multi-vector'"), ({"format_version": 7}, "version 7")]:
        (folder / "index.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=message):
            SparseIndex.open(folder)


@pytest.mark.parametrize(("tensor", "damage"), [("documents", b"\xf0\xff"), ("weights", b"\x00\x00\x80\x3e")])
def test_a_damaged_segment_is_not_compacted(small, tensor: str, damage: bytes) -> None:
    """Rewriting it would give the damage a valid checksum; document numbers out of range would end the process."""
    index, _ = small
    path = index.folder / "segment-00000.safetensors"
    whole = path.read_bytes()
    at = whole.index(load_file(path)[tensor].tobytes())
    path.write_bytes(whole[:at] + damage + whole[at + len(damage) :])
    before = contents(index.folder)
    for act in ("verify", "compact"):
        program = f"import sys; from rarezoo.retrieval import SparseIndex; SparseIndex.open(sys.argv[1]).{act}()"
        finished = subprocess.run([sys.executable, "-c", program, str(index.folder)], capture_output=True, text=True)
        assert finished.returncode == 1
        assert "segment-00000.safetensors is damaged: its contents do not match" in finished.stderr.splitlines()[-1]
    assert contents(index.folder) == before


def test_damaged_tombstones_are_not_rewritten(small: tuple[SparseIndex, SparseEmbeddings]) -> None:
    index, _ = small
    index.delete(["d3"])
    path = index.folder / "segment-00000.deleted-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    for change in (lambda: index.delete(["d5"]), index.compact):
        with pytest.raises(ValueError, match=r"deleted-00001\.safetensors is damaged: its contents"):
            change()


def test_searching_a_damaged_index_does_not_reach_into_another(tmp_path: Path) -> None:
    """Document numbers beyond the end of the damaged index exist in the healthy one."""
    columns = np.ones((10, 1), dtype=np.float32)
    damaged = SparseIndex.build(embeddings("d", scipy.sparse.csr_matrix(columns)), tmp_path / "damaged")
    generator = np.random.default_rng(0)
    documents = embeddings("h", random_rows(1000, 20, 4, generator))
    healthy = SparseIndex.build(documents, tmp_path / "healthy")
    path = damaged.folder / "segment-00000.safetensors"
    whole = path.read_bytes()
    at = whole.index(np.arange(10, dtype=np.uint16).tobytes())
    path.write_bytes(whole[:at] + np.array([500, 30], dtype=np.uint16).tobytes() + whole[at + 4 :])
    query = scipy.sparse.csr_matrix(np.full((1, 1), 50, dtype=np.float32))
    found = SparseIndex.open(damaged.folder).search(query, top_k=20)[0]
    assert found == [(f"d{row}", 50.0) for row in range(2, 10)]
    queries = random_rows(1, 20, 10, generator)
    assert healthy.search(queries) == brute_force(by_name(documents), queries, 10)


def test_leftovers_of_a_process_with_the_same_number_are_no_obstacle(small, tmp_path: Path) -> None:
    """In containers every process may have the number 1."""
    _, documents = small
    (tmp_path / f".new.{os.getpid()}.partial").mkdir()
    (tmp_path / f".new.{os.getpid()}.partial" / "segment-00000.safetensors").write_bytes(b"begun")
    index = SparseIndex.build(documents, tmp_path / "new")
    assert len(index) == 30
    for name in (".index.json.1.partial", ".segment-00001.safetensors.0123456789abcdef.partial"):
        (index.folder / name).write_bytes(b"begun")
    index.delete(["d0"])
    assert not list(index.folder.glob(".*"))


def test_an_error_of_reading_is_not_called_one_of_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, storage.folder_written_beside(tmp_path / "new"):
        (tmp_path / "missing").read_bytes()
    assert caught.value.filename == str(tmp_path / "missing") and list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), storage.folder_written_beside(tmp_path / "new"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["fingerprint", "vocab_size", "segments", "file", "num_deleted", "tombstones"])
def test_a_missing_entry_of_the_manifest_is_named(small, name: str) -> None:
    path = small[0].folder / "index.json"
    manifest = json.loads(path.read_text())
    del (manifest if name in manifest and name != "num_deleted" else manifest["segments"][0])[name]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"index\.json is damaged: the entry '{name}' is missing$"):
        SparseIndex.open(path.parent)


def test_embeddings_of_the_other_kind_are_refused(small, tmp_path: Path) -> None:
    other = MultiVectorEmbeddings(["a"], np.ones((1, 20), dtype=np.float32), [1])
    before = contents(small[0].folder)
    for call in (lambda: SparseIndex.build(other, tmp_path / "new"), lambda: small[0].add(other)):
        with pytest.raises(TypeError, match=r"SparseIndex holds sparse embeddings: .* found MultiVectorEmbeddings$"):
            call()
    assert contents(small[0].folder) == before and not (tmp_path / "new").exists()


def test_identifiers_with_half_a_surrogate_pair(small, tmp_path: Path) -> None:
    """They are named where documents get them, and unknown where documents are looked for."""
    index, _ = small
    matrix = scipy.sparse.csr_matrix(np.ones((2, 20), dtype=np.float32))
    rows, ids = np.ones((2, 20), dtype=np.float32), ["a", "b\ud800"]
    for call in (
        lambda: SparseEmbeddings(ids, matrix),
        lambda: MultiVectorEmbeddings(ids, rows, [1, 1]),
        lambda: PackedIds.pack(ids),
    ):
        with pytest.raises(ValueError, match=r"the identifier 'b\\ud800' holds half of a surrogate pair") as caught:
            call()
        assert type(caught.value) is ValueError
    assert "b\ud800" not in index
    assert index.search(matrix, subset=ids) == [[], []]
    with pytest.raises(ValueError, match=r"no document 'b\\ud800' \(1 of 1 unknown\)"):
        index.delete(ids[1:])


def test_building_never_overwrites(small: tuple[SparseIndex, SparseEmbeddings]) -> None:
    index, documents = small
    before = contents(index.folder)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        SparseIndex.build(documents, index.folder)
    assert contents(index.folder) == before


def test_a_damaged_shard_builds_no_index(tmp_path: Path) -> None:
    documents = embeddings("d", random_rows(30, 20, 6, np.random.default_rng(0)))
    documents.save(tmp_path / "e", shard_size=10)
    path = tmp_path / "e" / "shard-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-300] + bytes([content[-300] ^ 1]) + content[-299:])
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors is damaged"):
        SparseIndex.build(SparseEmbeddings.open(tmp_path / "e"), tmp_path / "index")
    assert [entry.name for entry in tmp_path.iterdir()] == ["e"]


def test_an_open_index_survives_changes_made_by_others(small: tuple[SparseIndex, SparseEmbeddings]) -> None:
    index, _ = small
    reader = SparseIndex.open(index.folder)
    queries = random_rows(5, 20, 6, np.random.default_rng(9))
    expected = reader.search(queries)
    index.delete(["d0", "d1", "d2"])
    index.compact()
    assert reader.search(queries) == expected != index.search(queries)
    # A writer that opened the index before must not undo what happened since.
    reader.add(embeddings("new", random_rows(3, 20, 6, np.random.default_rng(8))))
    assert len(SparseIndex.open(index.folder)) == 30
    index.delete(["new1"])
    assert len(index) == 29 and "new0" in index and "d0" not in index


@pytest.mark.parametrize("changes", [1, 5])
def test_an_index_is_opened_while_another_process_changes_it(small, monkeypatch, changes: int) -> None:
    """Between reading the manifest and opening what it lists, all of that is compacted away, several times over."""
    writer, documents = small
    queries = documents.matrix[:3]
    read = segmented_index._read_manifest
    left = list(range(changes))

    def read_and_be_overtaken(folder: Path, kind: str) -> dict:
        manifest = read(folder, kind)
        if left:
            number = left.pop()
            with monkeypatch.context() as undisturbed:
                undisturbed.setattr(segmented_index, "_read_manifest", read)
                writer.add(embeddings(f"{number}-", random_rows(2, 20, 4, np.random.default_rng(number))))
                writer.compact()
        return manifest

    monkeypatch.setattr(segmented_index, "_read_manifest", read_and_be_overtaken)
    reader = SparseIndex.open(writer.folder)
    assert not left and len(reader) == 30 + 2 * changes
    assert reader.search(queries) == writer.search(queries)


def test_a_file_that_vanishes_while_it_is_opened_is_missing(small, monkeypatch) -> None:
    """safetensors reads the header, and torch opens the file once more."""
    path = small[0].folder / "segment-00000.safetensors"
    mapped = torch.UntypedStorage.from_file

    def vanish(*arguments, **named):
        path.unlink(missing_ok=True)
        return mapped(*arguments, **named)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", vanish)
    with pytest.raises(FileNotFoundError, match=r"segment-00000\.safetensors is missing$"):
        SparseIndex.open(path.parent)
    assert not path.exists()


CHANGE = """
import resource, sys
import numpy as np, scipy.sparse
from rarezoo.retrieval import SparseEmbeddings, SparseIndex, storage
index = SparseIndex.open(sys.argv[1])
matrix = scipy.sparse.csr_matrix(np.ones((3000, 20), dtype=np.float32))
new = SparseEmbeddings([f"new{row}" for row in range(3000)], matrix, "a model")
"""
FULL_DISK = """
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    index.add(new)
except OSError as error:
    print(error)
"""
FULL_DISK_AT_THE_MANIFEST = """
import errno
def write_json(path, content):
    raise storage.CannotWriteError(path, OSError(errno.ENOSPC, "No space left on device"))
storage.write_json = write_json
try:
    index.add(new)
except OSError as error:
    print(error)
"""
SLOW_MANIFEST = """
import time
def write_json(path, content):
    time.sleep(1000)
storage.write_json = write_json
index.add(new)
"""


@pytest.mark.parametrize("trouble", [FULL_DISK, FULL_DISK_AT_THE_MANIFEST])
def test_a_full_disk_leaves_the_index_as_it_was(small, trouble: str) -> None:
    index, _ = small
    before = contents(index.folder)
    arguments = [sys.executable, "-c", CHANGE + trouble, str(index.folder)]
    printed = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    assert "cannot write" in printed
    assert contents(index.folder) == before
    SparseIndex.open(index.folder).verify()


def test_a_kill_before_the_commit_leaves_the_index_as_it_was(small) -> None:
    index, documents = small
    expected = index.search(documents.matrix)
    process = subprocess.Popen([sys.executable, "-c", CHANGE + SLOW_MANIFEST, str(index.folder)])
    deadline = time.monotonic() + 100
    while not (index.folder / "segment-00001.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reopened = SparseIndex.open(index.folder)
    assert reopened.search(documents.matrix) == expected and len(reopened) == 30
    reopened.delete(["d0"])
    assert contents(index.folder).keys() == {
        "index.json",
        "segment-00000.safetensors",
        "segment-00000.deleted-00001.safetensors",
    }


def test_a_read_only_index_is_searched_but_not_changed() -> None:
    documents = embeddings("d", random_rows(10, 20, 4, np.random.default_rng(0)))
    user = os.geteuid()
    # Not pytest's own folder, which nobody but its owner may enter.
    with tempfile.TemporaryDirectory() as parent:
        index = SparseIndex.build(documents, Path(parent) / "index")
        before = contents(index.folder)
        index.folder.chmod(0o555)
        Path(parent).chmod(0o755)
        try:
            if user == 0:
                os.seteuid(65534)
            index = SparseIndex.open(index.folder)
            assert index.search(documents.matrix[:1])[0]
            for change in (lambda: index.delete(["d1"]), lambda: index.compact()):
                with pytest.raises(OSError, match=r"cannot write .*Permission denied"):
                    change()
        finally:
            if user == 0:
                os.seteuid(user)
            index.folder.chmod(0o755)
        assert contents(index.folder) == before


def test_search_runs_where_compiled_code_cannot_be_stored(small: tuple[SparseIndex, SparseEmbeddings]) -> None:
    """As in a container whose file system is read-only; here numba is left with no place that it would try."""
    index, _ = small
    program = """
import sys
from rarezoo.retrieval import SparseIndex
import scipy.sparse
query = scipy.sparse.csr_matrix(([1.0], ([0], [7])), shape=(1, 20), dtype="float32")
print(SparseIndex.open(sys.argv[1]).search(query))
"""
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "NUMBA_CACHE_DIR": ""}
    arguments = [sys.executable, "-c", program, str(index.folder)]
    finished = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    query = scipy.sparse.csr_matrix(([1.0], ([0], [7])), shape=(1, 20), dtype=np.float32)
    assert finished.stdout.strip() == str(index.search(query))


def test_one_query_reads_little_of_a_large_index(tmp_path: Path) -> None:
    """A process that opens 60 MB of index and asks for one rare term grows by far less."""
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from /proc")
    rows, per_row = 20_000, 500
    generator = np.random.default_rng(0)
    indices = np.tile(np.arange(per_row, dtype=np.int32), rows)
    weights = generator.random(rows * per_row, dtype=np.float32) + 0.1
    matrix = scipy.sparse.csr_matrix((weights, indices, np.arange(rows + 1) * per_row), shape=(rows, 600))
    SparseIndex.build(embeddings("d", matrix, None), tmp_path / "large")
    SparseIndex.build(embeddings("d", matrix[:3], None), tmp_path / "small")
    program = """
import sys
import numpy as np, scipy.sparse, torch
from rarezoo.retrieval import SparseIndex
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
query = scipy.sparse.csr_matrix(([1.0], ([0], [7])), shape=(1, 600), dtype=np.float32)
SparseIndex.open(sys.argv[2]).search(query)  # whatever is imported and compiled on first use
before = resident()
index = SparseIndex.open(sys.argv[1])
assert len(index.search(query)[0]) == 10
print(resident() - before)
"""
    arguments = [sys.executable, "-c", program, str(tmp_path / "large"), str(tmp_path / "small")]
    grown = int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
    assert (tmp_path / "large" / "segment-00000.safetensors").stat().st_size > 60_000_000
    # In KiB. Some kernels map 4 MiB around every byte that is touched.
    assert grown < 25_000
