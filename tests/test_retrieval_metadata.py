"""Metadata of documents in both kinds of index: what is stored, and filtered search against brute force."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from safetensors.numpy import load_file

from rarezoo.retrieval import (
    MultiVectorEmbeddings,
    MultiVectorIndex,
    SparseEmbeddings,
    SparseIndex,
    build_index,
    multi_vector_segments,
    open_index,
    read_corpus,
    sparse_index,
)
from rarezoo.retrieval.multi_vector_index import PRECISIONS

from .folders import contents, file_limit

pytest.importorskip("numba")

KINDS = ["sparse", *PRECISIONS]
DIM = 16
Fields = dict[str, dict[str, Any]]

# What every document of a small index has, and filters with the documents that they let through.
SMALL: Fields = {
    "a": {"lang": "en", "year": 2020, "tags": ["x", "y"], "score": 1.0, "draft": True, "note": None},
    "b": {"lang": "fr", "year": 2021, "tags": ["y"], "draft": False},
    "c": {"lang": "日本語", "year": "2020", "tags": [], "score": 0.5, "a.b=c": "line\nbreak \u2028"},
    "d": {"lang": ["en", "fr"], "year": 1, "note": ""},
    "e": {},
}
FILTERS: list[tuple[Any, str]] = [
    ({"lang": "en"}, "ad"),
    ({"lang": ["en", "日本語"]}, "acd"),
    ({"lang": ("fr",), "year": 2021}, "b"),
    ({"lang": {"en"}, "year": [1, 2020]}, "ad"),
    ({"year": 2020}, "a"),
    ({"year": "2020"}, "c"),
    ({"year": 2020.0}, "a"),
    ({"year": True}, ""),
    ({"score": 1}, "a"),
    ({"draft": True}, "a"),
    ({"draft": 1}, ""),
    ({"draft": [True, False]}, "ab"),
    ({"tags": "y"}, "ab"),
    ({"tags": ["x", "z"]}, "a"),
    ({"tags": []}, ""),
    ({"note": None}, "a"),
    ({"a.b=c": "line\nbreak \u2028"}, "c"),
    ({"unknown": "en"}, ""),
    ({"unknown": None}, ""),
    ({"lang": "en", "unknown": 1}, ""),
    ({}, "abcde"),
    (lambda fields: fields.get("year") in (1, "2020"), "cd"),
    (lambda fields: fields, "abcd"),
    (lambda fields: not fields, "e"),
]


def rows_of(kind: str, ids: list[str], generator: np.random.Generator) -> Any:
    """Embeddings that every query of `queries_of` finds, with scores that differ."""
    if kind == "sparse":
        matrix = scipy.sparse.csr_matrix(generator.gamma(2, 0.4, (len(ids), DIM)).astype(np.float32))
        return SparseEmbeddings(ids, matrix, "a model")
    lengths = generator.integers(1, 5, len(ids))
    vectors = generator.standard_normal((int(lengths.sum()), DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return MultiVectorEmbeddings(ids, vectors, lengths, "a model")


def queries_of(kind: str, generator: np.random.Generator, count: int = 3) -> Any:
    return rows_of(kind, [f"q{number}" for number in range(count)], generator)


def build(kind: str, embeddings: Any, folder: Path, metadata: Any = None, **options: Any) -> Any:
    if kind == "sparse":
        return SparseIndex.build(embeddings, folder, metadata)
    return MultiVectorIndex.build(embeddings, folder, kind, metadata=metadata, **options)


def all_scores(index: Any, kind: str, added: list[Any], queries: Any) -> list[dict[str, float]]:
    """Per query the float64 score of every document, by what the index stores: decompressed vectors, where they are."""
    if kind == "sparse":
        weights = queries.matrix.toarray().astype(np.float64)
        documents = {name: row for part in added for name, row in zip(part.ids, part.matrix.toarray()) if name in index}
        return [{name: float(query @ row) for name, row in documents.items()} for query in weights]
    stored = list(index.reconstruct(list({name: None for part in added for name in part.ids if name in index})))
    return [
        {name: float((vectors.astype(np.float64) @ query.T).max(axis=0).sum()) for name, vectors in stored}
        for _, query in queries
    ]


def assert_ranked(found: list, scores: list[dict[str, float]], allowed: set[str], top_k: int) -> None:
    """The answers are the best of the allowed documents, by brute force."""
    for results, known in zip(found, scores, strict=True):
        expected = sorted((name for name in known if name in allowed), key=lambda name: -known[name])[:top_k]
        assert [name for name, _ in results] == expected
        np.testing.assert_allclose([score for _, score in results], [known[name] for name in expected], atol=1e-4)


@pytest.fixture(params=["sparse", "float32", "2-bit"])
def small(request, tmp_path: Path) -> tuple[str, Any]:
    embeddings = rows_of(request.param, list(SMALL), np.random.default_rng(0))
    return request.param, build(request.param, embeddings, tmp_path / "index", SMALL)


def test_metadata_is_given_back(small) -> None:
    _, index = small
    reopened = open_index(index.folder)
    for name, fields in SMALL.items():
        found = reopened.metadata(name)
        assert found == fields == index.metadata(name)
        assert [type(value) for value in found.values()] == [type(value) for value in fields.values()]
        found["lang"] = "changed"
        assert reopened.metadata(name) == fields
    with pytest.raises(ValueError, match="has no document 'z'"):
        reopened.metadata("z")
    reopened.verify()


@pytest.mark.parametrize(("where", "expected"), FILTERS)
def test_what_filters_let_through(small, where, expected: str) -> None:
    kind, index = small
    queries = queries_of(kind, np.random.default_rng(1))
    for results in index.search(queries, where=where):
        assert sorted(name for name, _ in results) == sorted(expected)
    for results in index.search(queries, where=where, subset=["b", "a", "unknown"]):
        assert sorted(name for name, _ in results) == sorted(set(expected) & {"a", "b"})
    unfiltered = [[name for name, _ in results if name in expected] for results in index.search(queries)]
    best = [[name for name, _ in results] for results in index.search(queries, top_k=1, where=where)]
    assert best == [names[:1] for names in unfiltered]


@pytest.mark.parametrize("kind", KINDS)
def test_filtered_search_equals_brute_force(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments; the filtered documents are few among many that are as near to the queries."""
    monkeypatch.setattr(multi_vector_segments, "SEGMENT_DOCUMENTS", 500)
    monkeypatch.setattr(sparse_index, "SEGMENT_SIZE", 500)
    generator = np.random.default_rng(2)
    ids = [f"d{number}" for number in range(1200)]
    metadata = {name: {"group": int(generator.integers(8)), "even": number % 2 == 0} for number, name in enumerate(ids)}
    embeddings = rows_of(kind, ids, generator)
    index = build(kind, embeddings, tmp_path / "index", metadata)
    assert len(list(index.folder.glob("segment-*"))) == 3
    queries = queries_of(kind, generator)
    scores = all_scores(index, kind, [embeddings], queries)
    for where, allows in (
        ({"group": 3}, lambda fields: fields["group"] == 3),
        ({"group": [1, 5, 77], "even": True}, lambda fields: fields["group"] in (1, 5) and fields["even"]),
        (lambda fields: fields["group"] > 5 and not fields["even"],) * 2,
    ):
        allowed = {name for name, fields in metadata.items() if allows(fields)}
        assert 100 < len(allowed) <= 256
        assert_ranked(index.search(queries, where=where), scores, allowed, 10)
        assert_ranked(index.search(queries, top_k=1000, where=where), scores, allowed, 1000)
        listed = [name for name in ids if name.endswith(("1", "4"))]
        assert_ranked(index.search(queries, where=where, subset=listed), scores, allowed & set(listed), 10)


@pytest.mark.parametrize("precision", [precision for precision in PRECISIONS if precision != "float32"])
def test_no_cell_hides_a_document_that_matches(precision: str, tmp_path: Path) -> None:
    """The best documents lie between the two vectors of the query, in none of the cells that a search visits."""
    generator = np.random.default_rng(3)
    first, second = np.eye(DIM, dtype=np.float32)[:2]
    groups = [(second, 1000), (first, 300), (first, 20), (first + second, 400)]  # the last two match the filter
    vectors = np.concatenate([np.tile(center, (count, 1)) for center, count in groups])
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) + 0.02 * generator.standard_normal((1720, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    ids = [f"d{number}" for number in range(1720)]
    metadata = {name: {"matches": True} for name in ids[1300:]}
    embeddings = MultiVectorEmbeddings(ids, vectors, np.ones(1720, dtype=int))
    index = MultiVectorIndex.build(embeddings, tmp_path / "index", precision, num_centroids=16, metadata=metadata)
    query = [np.stack([first, second])]
    found = index.search(query, where={"matches": True}, num_cells=1)[0]
    assert len(found) == 10 and {name for name, _ in found} <= set(ids[1320:])
    assert found == index.search(query, subset=ids[1300:], num_cells=1)[0]


@pytest.mark.parametrize("kind", ["sparse", "float32", "int8", "1-bit"])
def test_a_life_of_additions_deletions_and_compactions(kind: str, tmp_path: Path) -> None:
    """Metadata go with their documents, also where a deleted identifier comes back with others, or with none."""
    generator = np.random.default_rng(4)

    def new(names: list[str]) -> tuple[Any, Fields]:
        fields = {name: {"group": str(generator.integers(3))} for name in names if generator.random() < 0.7}
        return rows_of(kind, names, generator), fields

    embeddings, alive = new([f"0-{number}" for number in range(40)])
    index = build(kind, embeddings, tmp_path / "index", alive)
    names = set(embeddings.ids)
    added, deleted = [embeddings], []
    queries = queries_of(kind, generator)
    for step in range(1, 16):
        action = ("add", "delete", "add again", "add without", "compact")[step % 5]
        if action == "delete":
            gone = sorted(names)[:: int(generator.integers(2, 5))]
            index.delete(gone)
            deleted, names = gone, names - set(gone)
            alive = {name: fields for name, fields in alive.items() if name in names}
        elif action == "compact":
            index.compact()
            assert len(list(index.folder.glob("segment-*"))) == 1
        else:
            again = [name for name in deleted if name not in names]
            fresh = again if action == "add again" else [f"{step}-{number}" for number in range(9)]
            embeddings, fields = new(fresh)
            index.add(embeddings, None if action == "add without" else fields)
            added.append(embeddings)
            names |= set(fresh)
            alive |= {} if action == "add without" else fields
        for opened in (index, open_index(tmp_path / "index")):
            assert all(opened.metadata(name) == alive.get(name, {}) for name in names)
            scores = all_scores(opened, kind, added, queries)
            assert all(row.keys() == names for row in scores)
            for groups in (["1"], ["0", "2"]):
                allowed = {name for name, fields in alive.items() if fields["group"] in groups}
                assert_ranked(opened.search(queries, where={"group": groups}), scores, allowed, 10)
            opened.verify()


def test_threads_filter_alike(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    ids = [f"d{number}" for number in range(300)]
    index = build("sparse", rows_of("sparse", ids, generator), tmp_path / "i", {name: {"x": name[-1]} for name in ids})
    queries = queries_of("sparse", generator, 50)
    assert index.search(queries, num_threads=4, where={"x": "3"}) == index.search(queries, where={"x": "3"})


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        (
            "lang=en",
            TypeError,
            "where: expected a mapping of fields to values, or a function of the metadata; found st",
        ),
        (["lang"], TypeError, "or a function of the metadata; found list"),
        ({1: "en"}, TypeError, "where: the names of fields must be str, found 1"),
        ({"lang": {"en": 1}}, ValueError, "where: the field 'lang' is compared with dict; expected str, int, float"),
        ({"lang": b"en"}, ValueError, "the field 'lang' is compared with bytes"),
        ({"lang": ["en", ["fr"]]}, ValueError, "the field 'lang' is compared with list"),
        ({"year": np.int64(1)}, ValueError, "the field 'year' is compared with int64"),
    ],
)
def test_filters_of_wrong_types(small, where, error, message: str) -> None:
    kind, index = small
    with pytest.raises(error, match=message):
        index.search(queries_of(kind, np.random.default_rng(1)), where=where)


def test_errors_of_a_filter_function_are_its_own(small) -> None:
    kind, index = small
    with pytest.raises(KeyError, match="lang"):
        index.search(queries_of(kind, np.random.default_rng(1)), where=lambda fields: fields["lang"] == "en")


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ([{"lang": "en"}], TypeError, "metadata: expected a mapping of identifiers to metadata, found list"),
        ({"new": ["en"]}, ValueError, "metadata of document 'new': expected an object of fields and values, found lis"),
        ({"new": {1: "en"}}, ValueError, "metadata of document 'new': the names of fields must be str, found 1"),
        ({"new": {"x": {"y": 1}}}, ValueError, "the field 'x' holds dict; expected str, int, float, bool, None or a l"),
        ({"new": {"x": [[1]]}}, ValueError, "the field 'x' holds list"),
        ({"new": {"x": float("nan")}}, ValueError, "the field 'x' holds nan, which JSON has no number for"),
        ({"new": {"x": [1.5, float("inf")]}}, ValueError, "the field 'x' holds inf"),
        ({"new": {"x": "\ud800"}}, ValueError, "metadata of document 'new': holds unpaired surrogates"),
        ({"new": {}, "other": {}, "a": {}}, ValueError, r"'a' is none of the new documents \(2 of 3 are unknown\)"),
    ],
)
def test_metadata_that_cannot_be_stored(small, tmp_path: Path, metadata, error, message: str) -> None:
    kind, index = small
    new = rows_of(kind, ["new"], np.random.default_rng(6))
    before = contents(index.folder)
    for change in (lambda: index.add(new, metadata), lambda: build(kind, new, tmp_path / "new", metadata)):
        with pytest.raises(error, match=message):
            change()
    assert contents(index.folder) == before and [path.name for path in tmp_path.iterdir()] == ["index"]


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_is_documented(small) -> None:
    _, index = small
    assert contents(index.folder).keys() >= {"index.json", "segment-00000.safetensors"}
    assert json.loads((index.folder / "index.json").read_text())["segments"][0]["metadata"] is True
    tensors = load_file(index.folder / "segment-00000.safetensors")
    lines = tensors["metadata_bytes"].tobytes()
    assert [json.loads(line) for line in lines.decode().split("\n")[:-1]] == list(SMALL.values())
    assert tensors["metadata_offsets"].tolist() == [0, *(i + 1 for i, byte in enumerate(lines) if byte == ord("\n"))]


@pytest.mark.parametrize("metadata", [None, {}, {"a": {}}, {"a": None}])
def test_an_index_without_metadata_is_as_before(metadata, tmp_path: Path) -> None:
    """Nothing is stored, and an index of before, whose manifest has no entry for it, opens and takes metadata."""
    generator = np.random.default_rng(7)
    index = build("sparse", rows_of("sparse", ["a", "b"], generator), tmp_path / "index", metadata)
    assert not {"metadata_bytes", "metadata_offsets"} & load_file(index.folder / "segment-00000.safetensors").keys()
    manifest = json.loads((index.folder / "index.json").read_text())
    assert manifest["segments"][0].pop("metadata") is False
    (index.folder / "index.json").write_text(json.dumps(manifest))
    old = open_index(index.folder)
    queries = queries_of("sparse", generator, 1)
    assert old.metadata("a") == {} and old.search(queries, where={"lang": "en"}) == [[]]
    assert len(old.search(queries, where=lambda fields: fields == {})[0]) == 2
    old.add(rows_of("sparse", ["c"], generator), {"c": {"lang": "en"}})
    old.delete(["b"])
    for change in (lambda: None, old.compact):
        change()
        assert [name for name, _ in old.search(queries, where={"lang": "en"})[0]] == ["c"]
        assert (old.metadata("a"), old.metadata("c"), len(old)) == ({}, {"lang": "en"}, 2)


def damage(index: Any, old: bytes, new: bytes) -> None:
    path = index.folder / "segment-00000.safetensors"
    whole = path.read_bytes()
    assert whole.count(old) == 1 and len(old) == len(new)
    path.write_bytes(whole.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'{"lang": "fr"', b'{"lang": "fr\x00'),
        (b'{"lang": "fr"', b'\xff"lang": "fr"'),
        (b'{"lang": "fr"', b"{}\n{}\n{}\n{}\n "),
        (b'["en", "fr"]', b'{"en":  "fr"}'[:12]),
        (b'["en", "fr"]', b'[["en",  1]]'),
    ],
)
def test_damaged_metadata_are_named(small, old: bytes, new: bytes) -> None:
    kind, index = small
    damage(index, old, new)
    damaged = open_index(index.folder)
    queries = queries_of(kind, np.random.default_rng(1))
    with pytest.raises(ValueError, match=r"segment-00000\.safetensors is damaged: 'metadata_bytes' does not hold meta"):
        damaged.search(queries, where={"lang": "en"})
    before = contents(index.folder)
    for act in (damaged.verify, damaged.compact):
        with pytest.raises(ValueError, match=r"segment-00000\.safetensors is damaged: its contents do not match"):
            act()
    assert contents(index.folder) == before
    assert len(damaged.search(queries)) == 3  # without a filter nothing of it is read


def test_damaged_offsets_are_named(small) -> None:
    _, index = small
    offsets = load_file(index.folder / "segment-00000.safetensors")["metadata_offsets"]
    damage(index, offsets.tobytes(), offsets[[0, 2, 1, 3, 4, 5]].tobytes())
    with pytest.raises(
        ValueError, match=r"segment-00000\.safetensors is damaged: 'metadata_offsets' does not increase"
    ):
        open_index(index.folder).metadata("a")


def test_a_full_disk_leaves_the_index_as_it_was(small, tmp_path: Path) -> None:
    """The vectors would fit, the metadata does not."""
    kind, index = small
    new = rows_of(kind, ["new"], np.random.default_rng(8))
    metadata = {"new": {"text": "x" * 2**20}}
    changes: list[Callable[[], Any]] = [
        lambda: index.add(new, metadata),
        lambda: build(kind, new, tmp_path / "new", metadata),
    ]
    before = contents(index.folder)
    with file_limit(2**19):
        for change in changes:
            with pytest.raises(OSError, match=r"cannot write .*nothing half-written remains"):
                change()
    assert contents(index.folder) == before and [path.name for path in tmp_path.iterdir()] == ["index"]
    index.add(new, metadata)
    assert index.metadata("new") == metadata["new"] and index.metadata("a") == SMALL["a"]


# --- from a corpus, and fast ------------------------------------------------------------------------------------------


def test_the_metadata_of_a_corpus(tmp_path: Path) -> None:
    rows = [{"_id": "a", "text": "t", "metadata": SMALL["a"]}, {"_id": "b", "text": "t"}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = list(read_corpus(tmp_path))
    assert [document.metadata for document in documents] == [SMALL["a"], None]
    embeddings = rows_of("sparse", ["a", "b"], np.random.default_rng(9))
    metadata = {document.id: document.metadata for document in documents}
    index = build_index(embeddings, tmp_path / "index", metadata=metadata)
    assert index.metadata("a") == SMALL["a"] and index.metadata("b") == {}


def test_filtering_many_documents_is_fast(tmp_path: Path) -> None:
    """Of 100,000 documents; far below the 100 ms, which leave room for a busy machine."""
    generator = np.random.default_rng(10)
    ids = [f"d{number}" for number in range(100_000)]
    metadata = {name: {"lang": ("en", "fr", "de")[number % 3], "number": number} for number, name in enumerate(ids)}
    index = build("sparse", rows_of("sparse", ids, generator), tmp_path / "index", metadata)
    query = queries_of("sparse", generator, 1)
    seconds = []
    for number in range(8):
        start = time.perf_counter()
        found = index.search(query, where={"lang": ["en", "de"], "number": list(range(number, 100_000, 100))})
        seconds.append(time.perf_counter() - start)
        assert len(found[0]) == 10
        assert all(int(name[1:]) % 3 != 1 and int(name[1:]) % 100 == number for name, _ in found[0])
    assert statistics.median(seconds[1:]) < 0.1, seconds
