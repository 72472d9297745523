"""Exchange formats: exact files from the fixture, lossless round trips, engines that really read them, clear errors."""

import errno
import gzip
import json
import tracemalloc
import uuid
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from rarezoo.retrieval import SparseEmbeddings, export_embeddings, import_embeddings, interop
from rarezoo.retrieval.token_keys import token_keys

FIXTURES = Path(__file__).parent / "fixtures" / "mistral_splade"
FORMATS = ["anserini", "anserini-queries", "qdrant", "opensearch", "elasticsearch", "seismic", "scipy"]
TEXT_FORMATS = FORMATS[:-1]

# Everything that breaks naive exporters, and a few rows that no tokenizer names (see `embeddings`).
TOKENS = [
    "plain",
    "▁the",
    "\n",
    "a b",
    "tab\there",
    "line\u2028break",
    "no\u00a0break",
    "",
    "same",
    "same",
    "<id:3>",
    "<id:03>",
    "<id:x>",
    ".",
    "a.b",
    '"quoted"',
    "back\\slash",
    "\0",
    "\ud800",
    "x" * 100,
    "x" * 101,
    "12",
    "NaN",
    "🙂",
    "é",
    "e\u0301",
    "{}",
]
VOCAB_SIZE = len(TOKENS) + 5


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FIXTURES)


def random_embeddings(num_rows, vocab_size, density, seed=0):
    generator = np.random.default_rng(seed)
    dense = generator.gamma(1.0, 0.5, (num_rows, vocab_size)).astype(np.float32)
    dense *= generator.random((num_rows, vocab_size)) < density
    return SparseEmbeddings([f"document {row}" for row in range(num_rows)], scipy.sparse.csr_matrix(dense))


@pytest.fixture
def embeddings():
    """Ten rows that use every vocabulary entry, among them an empty one and weights at the ends of float32."""
    dense = random_embeddings(10, VOCAB_SIZE, 0.6).matrix.toarray()
    dense[0] = np.linspace(0.1, 3, VOCAB_SIZE)
    dense[4] = 0
    dense[5, :4] = [np.float32(0.1) + np.float32(0.2), np.nextafter(np.float32(1), np.float32(2)), 1 / 3, 0.00499]
    ids = ["7", "007", "dø c/1 .txt", '"quoted"', "empty", "a\\b", "<id:1>", "🙂", "x" * 200, "last"]
    return SparseEmbeddings(ids, scipy.sparse.csr_matrix(dense), fingerprint="abc")


def with_extreme_weights(embeddings):
    matrix = embeddings.matrix.copy()
    matrix.data[:3] = [np.finfo(np.float32).tiny, np.finfo(np.float32).max, 1e-30]
    return SparseEmbeddings(list(embeddings.ids), matrix)


def file_name(format):
    return {"scipy": "vectors.npz", "anserini-queries": "vectors.tsv"}.get(format, "vectors.jsonl")


def assert_equal(found, expected):
    assert list(found.ids) == list(expected.ids)
    assert found.vocab_size == expected.vocab_size
    assert found.matrix.dtype == np.float32 and found.matrix.has_sorted_indices
    np.testing.assert_array_equal(found.matrix.indptr, expected.matrix.indptr)
    np.testing.assert_array_equal(found.matrix.indices, expected.matrix.indices)
    np.testing.assert_array_equal(found.matrix.data, expected.matrix.data)


def in_hundredths(embeddings):
    dense = np.rint(100 * embeddings.matrix.toarray().astype(np.float64)) / 100
    assert np.abs(dense - embeddings.matrix.toarray()).max() <= 0.005 + 1e-7
    return SparseEmbeddings(list(embeddings.ids), scipy.sparse.csr_matrix(dense.astype(np.float32)))


# --- the fixture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("document", "anserini_documents"), ("query", "anserini_queries")])
def test_anserini_file_of_the_fixture(tmp_path, tokenizer, kind, name):
    representations = load_file(FIXTURES / "echo.safetensors")[f"{kind}.rep_max"]
    embeddings = SparseEmbeddings(["0", "1", "2"], scipy.sparse.csr_matrix(representations))
    export_embeddings(embeddings, tmp_path / "vectors.jsonl", "anserini", tokenizer)
    assert (tmp_path / "vectors.jsonl").read_bytes() == (FIXTURES / f"{name}.jsonl").read_bytes()
    back = import_embeddings(FIXTURES / f"{name}.jsonl", "anserini", tokenizer)
    np.testing.assert_allclose(back.matrix.toarray(), representations, atol=0.005)
    export_embeddings(embeddings, tmp_path / "topics.tsv", "anserini-queries", tokenizer)
    assert_equal(import_embeddings(tmp_path / "topics.tsv", "anserini-queries", tokenizer), back)


def test_line_break_token_of_the_fixture_vocabulary(tmp_path, tokenizer):
    entry = tokenizer.get_vocab()["\n"]
    row = scipy.sparse.csr_matrix(([1.5], ([0], [entry])), shape=(1, 160))
    for format in TEXT_FORMATS:
        path = tmp_path / f"{format}.txt"
        export_embeddings(SparseEmbeddings(["d"], row), path, format, tokenizer)
        assert path.read_text(encoding="utf-8").count("\n") == (2 if "search" in format else 1)
        assert import_embeddings(path, format, tokenizer).matrix.indices.tolist() == [entry]


def test_raw_white_space_tokens_of_other_programs_are_read(tmp_path, tokenizer):
    path = tmp_path / "foreign.jsonl"
    path.write_text(json.dumps({"id": 5, "contents": "x", "vector": {"\n": 3, "▁": 250}}) + "\n", encoding="utf-8")
    back = import_embeddings(path, "anserini", tokenizer)
    vocabulary = tokenizer.get_vocab()
    assert list(back.ids) == ["5"]
    found = dict(zip(back.matrix.indices.tolist(), back.matrix.data.tolist()))
    assert found == pytest.approx({vocabulary["\n"]: 0.03, vocabulary["▁"]: 2.5})


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "suffix"), [(format, "") for format in FORMATS] + [(f, ".gz") for f in TEXT_FORMATS]
)
def test_round_trip(tmp_path, embeddings, format, suffix):
    path = tmp_path / (file_name(format) + suffix)
    if "anserini" not in format:
        embeddings = with_extreme_weights(embeddings)
    if format != "scipy":
        with pytest.warns(UserWarning, match="1 of 10 rows have no weights .*: 'empty'"):
            export_embeddings(embeddings, path, format, TOKENS)
    else:
        export_embeddings(embeddings, path, format, TOKENS)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    back = import_embeddings(path, format, TOKENS, vocab_size=VOCAB_SIZE, fingerprint="abc")
    assert_equal(back, in_hundredths(embeddings) if "anserini" in format else embeddings)
    assert back.fingerprint == "abc"
    assert list(back.ids)[4] == "empty" and back.matrix[4].nnz == 0


@pytest.mark.filterwarnings("ignore:.*rows have no weights")
@pytest.mark.parametrize("format", [format for format in TEXT_FORMATS if format != "qdrant"])
def test_round_trip_without_a_vocabulary(tmp_path, embeddings, format):
    export_embeddings(embeddings, tmp_path / "vectors", format)
    text = (tmp_path / "vectors").read_text(encoding="utf-8")
    assert f"<id:{VOCAB_SIZE - 1}>" in text and "▁the" not in text
    for vocabulary in (None, TOKENS):  # ids are understood whichever vocabulary the reader has
        back = import_embeddings(tmp_path / "vectors", format, vocabulary, vocab_size=VOCAB_SIZE)
        assert_equal(back, in_hundredths(embeddings) if "anserini" in format else embeddings)


@pytest.mark.filterwarnings("ignore:.*rows have no weights")
@pytest.mark.parametrize("format", TEXT_FORMATS)
def test_sharded_export(tmp_path, embeddings, format):
    export_embeddings(embeddings, tmp_path / "one", format, TOKENS)
    export_embeddings(embeddings, tmp_path / "many", format, TOKENS, shard_size=3)
    parts = sorted((tmp_path / "many").iterdir())
    assert [part.stem for part in parts] == [f"part-{number:05d}" for number in range(4)]
    assert b"".join(part.read_bytes() for part in parts) == (tmp_path / "one").read_bytes()
    lines = [len(part.read_text(encoding="utf-8").split("\n")) - 1 for part in parts]
    assert lines == ([6, 6, 6, 2] if "search" in format else [3, 3, 3, 1])
    whole = import_embeddings(tmp_path / "one", format, TOKENS, vocab_size=VOCAB_SIZE)
    assert_equal(import_embeddings(tmp_path / "many", format, TOKENS, vocab_size=VOCAB_SIZE), whole)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["many", "one"]


@pytest.mark.filterwarnings("ignore:.*rows have no weights")
@pytest.mark.parametrize("format", FORMATS)
def test_memory_mapped_shards_give_the_same_file(tmp_path, embeddings, format):
    embeddings.save(tmp_path / "folder", shard_size=4)
    export_embeddings(SparseEmbeddings.open(tmp_path / "folder"), tmp_path / "mapped", format, TOKENS)
    export_embeddings(embeddings, tmp_path / "memory", format, TOKENS)
    assert (tmp_path / "mapped").read_bytes() == (tmp_path / "memory").read_bytes()


@pytest.mark.parametrize("format", ["seismic", "scipy"])
def test_export_holds_one_shard_at_most(tmp_path, format):
    generator = np.random.default_rng(0)
    matrix = scipy.sparse.random_array((6000, 2000), density=0.02, format="csr", dtype=np.float32, rng=generator)
    SparseEmbeddings([str(row) for row in range(6000)], matrix).save(tmp_path / "folder", shard_size=200)
    mapped = SparseEmbeddings.open(tmp_path / "folder")
    tracemalloc.start()
    export_embeddings(mapped, tmp_path / "exported", format, [f"token{entry}" for entry in range(2000)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "exported").stat().st_size > 1_900_000
    assert peak < 1_000_000


def test_empty_collection(tmp_path):
    empty = SparseEmbeddings([], scipy.sparse.csr_matrix((0, 5), dtype=np.float32))
    export_embeddings(empty, tmp_path / "vectors.npz", "scipy")
    assert_equal(import_embeddings(tmp_path / "vectors.npz", "scipy"), empty)
    export_embeddings(empty, tmp_path / "vectors.jsonl", "seismic", shard_size=5)
    with pytest.raises(ValueError, match="holds no vectors"):
        import_embeddings(tmp_path / "vectors.jsonl", "seismic", vocab_size=5)


def test_empty_vectors_are_reported_once(tmp_path):
    embeddings = SparseEmbeddings([*"abcde"], scipy.sparse.csr_matrix(np.full((5, 3), 0.004, dtype=np.float32)))
    with pytest.warns(UserWarning) as caught:
        export_embeddings(embeddings, tmp_path / "vectors.jsonl", "anserini", [*"xyz"])
    assert len(caught) == 1 and "5 of 5 rows have no weights" in str(caught[0].message)
    assert str(caught[0].message).endswith("'a', 'b', 'c', …")
    assert import_embeddings(tmp_path / "vectors.jsonl", "anserini", [*"xyz"]).matrix.shape == (5, 3)


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forbidden", ["", "."])
def test_token_keys(forbidden):
    keys = token_keys(TOKENS, VOCAB_SIZE, forbidden)
    assert len(keys) == len(set(keys)) == VOCAB_SIZE
    assert not any(character.isspace() or character in forbidden for key in keys for character in key)
    kept = {token for token, key in zip(TOKENS, keys) if token == key}
    dotted = {".", "a.b"} if forbidden == "" else set()
    named = {"plain", "▁the", "<id:03>", "<id:x>", '"quoted"', "back\\slash", "x" * 100, "12", "NaN", "🙂", "{}"}
    assert kept == named | dotted | {"é", "e\u0301"}
    assert all(key == f"<id:{entry}>" for entry, key in enumerate(keys) if key not in kept)


def test_tokenizer_gives_the_same_keys_as_its_list_of_tokens(tokenizer):
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    keys = token_keys(tokenizer, 192)
    assert keys == token_keys(tokens, 192)
    assert (
        keys[3] == "<id:3>" and keys[57] == tokens[57] and keys[160:] == [f"<id:{entry}>" for entry in range(160, 192)]
    )


# --- the engines' side -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*rows have no weights")
def test_anserini_pseudo_document_has_the_impacts_as_term_frequencies(tmp_path, embeddings):
    """Anserini repeats every key as often as its number says, each followed by a space, and splits at white space."""
    export_embeddings(embeddings, tmp_path / "vectors.jsonl", "anserini", TOKENS)
    export_embeddings(embeddings, tmp_path / "topics.tsv", "anserini-queries", TOKENS)
    keys = token_keys(TOKENS, VOCAB_SIZE)
    topics = (tmp_path / "topics.tsv").read_text(encoding="utf-8").split("\n")
    documents = (tmp_path / "vectors.jsonl").read_text(encoding="utf-8").split("\n")
    for row in range(10):
        document = json.loads(documents[row])
        assert document["id"] == embeddings.ids[row] and document["content"] == ""
        frequencies = Counter("".join((key + " ") * number for key, number in document["vector"].items()).split())
        weights = embeddings.matrix[row].toarray()[0].astype(np.float64)
        expected = {keys[entry]: round(100 * weights[entry]) for entry in range(VOCAB_SIZE)}
        assert frequencies == {key: impact for key, impact in expected.items() if impact}
        topic_id, _, topic = topics[row].partition("\t")
        assert topic_id == embeddings.ids[row] and Counter(topic.split()) == frequencies


@pytest.mark.filterwarnings("ignore:.*rows have no weights")
@pytest.mark.parametrize("format", ["opensearch", "elasticsearch"])
def test_bulk_body(tmp_path, embeddings, format):
    export_embeddings(embeddings, tmp_path / "bulk.ndjson", format, TOKENS, field="splade")
    body = (tmp_path / "bulk.ndjson").read_text(encoding="utf-8")
    assert body.endswith("}\n")
    lines = [json.loads(line) for line in body.split("\n")[:-1]]
    assert lines[::2] == [{"index": {"_id": row_id}} for row_id in embeddings.ids]
    for row, source in enumerate(lines[1::2]):
        assert list(source) == ["splade"]
        features = source["splade"]
        assert len(features) == embeddings.matrix[row].nnz
        assert all("." not in name and name and weight > 0 for name, weight in features.items())
        np.testing.assert_array_equal(np.float32(list(features.values())), embeddings.matrix[row].data)


def test_seismic_builds_and_searches_the_exported_collection(tmp_path):
    seismic = pytest.importorskip("seismic")
    documents, queries = random_embeddings(300, VOCAB_SIZE, 0.4), random_embeddings(20, VOCAB_SIZE, 0.3, seed=1)
    export_embeddings(documents, tmp_path / "documents.jsonl", "seismic", TOKENS)
    index = seismic.SeismicIndex.build(str(tmp_path / "documents.jsonl"), summary_energy=1.0, num_threads=1)
    assert (index.len, index.nnz, index.dim) == (300, documents.num_postings, VOCAB_SIZE)
    keys = np.array(token_keys(TOKENS, VOCAB_SIZE), dtype=seismic.get_seismic_string())
    scores = (queries.matrix @ documents.matrix.T).toarray()
    for row in range(len(queries)):
        query = queries.matrix[row]
        found = index.search("q", keys[query.indices], query.data, k=10, query_cut=VOCAB_SIZE, heap_factor=1.0)
        best = np.sort(scores[row])[::-1][:10]
        np.testing.assert_allclose([score for _, score, _ in found], best, rtol=2e-3)  # Seismic holds float16
        by_id = dict(zip(documents.ids, scores[row]))
        np.testing.assert_allclose([score for _, score, _ in found], [by_id[key] for _, _, key in found], rtol=2e-3)


@pytest.mark.filterwarnings("ignore:.*rows have no weights", "ignore::DeprecationWarning")
def test_qdrant_takes_the_exported_points(tmp_path, embeddings):
    qdrant = pytest.importorskip("qdrant_client")
    models = qdrant.models
    export_embeddings(embeddings, tmp_path / "points.jsonl", "qdrant", field="splade")
    points = [json.loads(line) for line in (tmp_path / "points.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    client = qdrant.QdrantClient(":memory:")
    client.create_collection("c", vectors_config={}, sparse_vectors_config={"splade": models.SparseVectorParams()})
    client.upsert("c", [models.PointStruct.model_validate(point) for point in points])
    query = embeddings.matrix[1]
    vector = models.SparseVector(indices=query.indices.tolist(), values=query.data.tolist())
    found = client.query_points("c", query=vector, using="splade", limit=10).points
    scores = dict(zip(embeddings.ids, (embeddings.matrix @ query.T).toarray()[:, 0]))
    best = sorted(scores.items(), key=lambda item: -item[1])[: len(found)]
    assert len(found) >= 9
    assert [point.payload["id"] for point in found] == [row_id for row_id, _ in best]
    np.testing.assert_allclose([point.score for point in found], [score for _, score in best], rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*rows have no weights")
def test_qdrant_point_ids(tmp_path, embeddings):
    for name in ("first", "second"):
        export_embeddings(embeddings, tmp_path / name, "qdrant")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    points = [json.loads(line) for line in (tmp_path / "first").read_text(encoding="utf-8").split("\n")[:-1]]
    assert len({uuid.UUID(point["id"]) for point in points}) == 10
    assert [point["payload"] for point in points] == [{"id": row_id} for row_id in embeddings.ids]
    (tmp_path / "scrolled").write_text(
        json.dumps({"id": 12, "payload": None, "vector": {"sparse_embedding": {"indices": [3, 1], "values": [1, 2.5]}}})
    )
    back = import_embeddings(tmp_path / "scrolled", "qdrant", vocab_size=4)
    assert list(back.ids) == ["12"] and back.matrix.toarray().tolist() == [[0, 2.5, 0, 1]]


def test_scipy_reads_the_file_itself(tmp_path, embeddings):
    export_embeddings(embeddings, tmp_path / "vectors.npz", "scipy")
    matrix = scipy.sparse.load_npz(tmp_path / "vectors.npz")
    assert matrix.format == "csr" and matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix.toarray(), embeddings.matrix.toarray())
    assert np.load(tmp_path / "vectors.npz")["ids"].tolist() == list(embeddings.ids)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", [None, 2])
@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0, 0.0, 1e-40])
@pytest.mark.parametrize("format", FORMATS)
def test_bad_weights_leave_nothing_behind(tmp_path, embeddings, format, weight, shard_size):
    embeddings.matrix.data[embeddings.matrix.indptr[7]] = weight
    shard_size = None if format == "scipy" else shard_size
    with pytest.raises(ValueError, match=r"entry \d+ in '🙂' is .*; weights must be finite and at least 1.18e-38"):
        export_embeddings(
            embeddings, tmp_path / "out", format, TOKENS, shard_size=None if format == "scipy" else shard_size
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_existing_target_is_kept(tmp_path, embeddings, format):
    target = tmp_path / file_name(format)
    target.write_text("precious")
    with pytest.raises(FileExistsError, match="Choose another path or remove it"):
        export_embeddings(embeddings, target, format, TOKENS)
    assert target.read_text() == "precious"


@pytest.mark.parametrize("shard_size", [None, 3])
def test_full_disk(tmp_path, embeddings, monkeypatch, shard_size):
    opened = interop.open_text

    @contextmanager
    def open_on_a_full_disk(path, compressed=False):
        with opened(path, compressed) as file:
            file.write("part of it")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(interop, "open_text", open_on_a_full_disk)
    with pytest.raises(OSError, match=r"cannot write .*out: No space left on device"):
        export_embeddings(embeddings, tmp_path / "out", "seismic", TOKENS, shard_size=shard_size)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*rows have no weights")
@pytest.mark.parametrize(("format", "shard_size"), [("seismic", None), ("seismic", 3), ("scipy", None)])
def test_missing_shard_is_not_blamed_on_the_target(tmp_path, embeddings, format, shard_size):
    embeddings.save(tmp_path / "folder", shard_size=4)
    mapped = SparseEmbeddings.open(tmp_path / "folder")
    (tmp_path / "folder" / "shard-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.safetensors is missing"):
        export_embeddings(mapped, tmp_path / "out", format, TOKENS, shard_size=shard_size)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_target_below_a_file(tmp_path, embeddings):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        export_embeddings(embeddings, tmp_path / "file" / "out.jsonl", "seismic", TOKENS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "lucene"}, "unknown format 'lucene'; expected one of anserini, anserini-queries, qdrant"),
        ({"format": "seismic", "shard_size": 0}, "shard_size must be at least 1"),
        ({"format": "scipy", "shard_size": 5}, "format 'scipy' writes one file"),
        (
            {"format": "seismic", "tokens": [*TOKENS, *"abcdef"]},
            "the vocabulary has 33 tokens, but .* only 32 dimensions",
        ),
    ],
)
def test_bad_export_arguments(tmp_path, embeddings, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_embeddings(embeddings, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_topic_ids_without_tabs(tmp_path):
    embeddings = SparseEmbeddings(["a\tb"], scipy.sparse.csr_matrix(np.ones((1, 2), dtype=np.float32)))
    with pytest.raises(ValueError, match="holds a tab or a line break"):
        export_embeddings(embeddings, tmp_path / "topics.tsv", "anserini-queries", ["a", "b"])
    assert not list(tmp_path.iterdir())


VECTOR = '{"id": "1", "vector": {"a": 100}}'
POINT = '{"id": 1, "vector": {"sparse_embedding": {"indices": [0], "values": [1.0]}}}'
BULK = '{"index": {"_id": "1"}}\n{"sparse_embedding": {"a": 1.0}}'


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("anserini", f"{VECTOR}\n{VECTOR[:-1]}", "line 2: not valid JSON"),
        ("anserini", f"{VECTOR}\n{'1' * 5000}", "line 2: not valid JSON"),
        ("anserini", "[1]", "line 1: expected a JSON object, found list"),
        ("anserini", f"{VECTOR}\n\n{VECTOR}", "line 3: the id '1' occurs twice"),
        ("anserini", '{"id": "1", "vector": {"zebra": 1}}', "line 1: the token 'zebra' is not in the vocabulary; was"),
        ("anserini", '{"id": "1", "vector": {"same": 1}}', r"token 'same' is ambiguous, it names the entries \[1, 2\]"),
        ("anserini", '{"id": "1", "vector": {"<id:4>": 1}}', "'<id:4>' lies outside the vocabulary of 4 entries"),
        ("anserini", '{"id": "1", "vector": {"a": 1, "<id:0>": 2}}', "vocabulary entry 0 occurs twice in one vector"),
        ("anserini", '{"id": "1", "vector": {"a": 1, "a": 2}}', "the key 'a' occurs twice in one JSON object"),
        ("anserini", '{"id": "1", "vector": {"a": 0}}', "the weight of 'a' is 0; expected a positive, finite number"),
        ("anserini", '{"id": "1", "vector": {"a": -3}}', "the weight of 'a' is -3"),
        ("anserini", '{"id": "1", "vector": {"a": "3"}}', "line 1: the weight of 'a' is '3'; expected a positive"),
        ("anserini", '{"id": "1", "vector": [1]}', r"expected 'vector' to be a JSON object, found \[1\]"),
        ("anserini", '{"vector": {"a": 1}}', "expected 'id' to be a string or an integer, found None"),
        ("anserini", "", "holds no vectors"),
        ("anserini", b"\xff", "line 1: not UTF-8"),
        ("seismic", '{"id": "1", "vector": {"a": NaN}}', "the weight of 'a' is nan"),
        ("seismic", '{"id": "1", "vector": {"a": 1e39}}', "the weight of 'a' is 1e"),
        ("seismic", '{"id": "1", "vector": {"b": 1, "a": 1e-50}}', "the weight of 'a' is 1e-50"),
        ("anserini", '{"id": "1", "vector": {"b": 1, "a": 1' + "0" * 400 + "}}", "the weight of 'a' is 1000"),
        ("seismic", '{"id": "1", "vector": {"a": true}}', "the weight of 'a' is True; expected"),
        ("anserini-queries", "1\ta a\n2 a a\n", "line 2: expected 2 columns .id, tab, repeated tokens., found 1"),
        ("anserini-queries", "1\ta zebra\n", "line 1: the token 'zebra' is not in the vocabulary"),
        ("qdrant", POINT.replace("[0]", "[0, 1]"), "expected as many integer indices as values, found 2 and 1"),
        ("qdrant", POINT.replace("[0]", "[0.0]"), "expected as many integer indices as values"),
        ("qdrant", POINT.replace("[0]", "[4]"), "line 1: 4 lies outside the vocabulary of 4 entries"),
        (
            "qdrant",
            POINT.replace("sparse_embedding", "other"),
            "expected 'sparse_embedding' to be a JSON object, found None",
        ),
        ("opensearch", BULK.replace("index", "delete"), r"expected an action 'index' or 'create', found \['delete'\]"),
        ("opensearch", BULK.replace('"_id": "1"', ""), "expected '_id' to be a string or an integer, found None"),
        ("opensearch", BULK.split("\n")[0], "line 1: expected a JSON object, found NoneType"),
        ("elasticsearch", BULK.replace("1.0", "null"), "line 2: the weight of 'a' is None; expected"),
    ],
)
def test_bad_files(tmp_path, format, content, message):
    path = tmp_path / "vectors"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        import_embeddings(path, format, ["a", "same", "same", "b"])


def test_import_needs_a_size_and_a_vocabulary(tmp_path):
    path = tmp_path / "vectors.jsonl"
    path.write_text(VECTOR)
    with pytest.raises(ValueError, match="give vocabulary or vocab_size"):
        import_embeddings(path, "anserini")
    with pytest.raises(ValueError, match="the token 'a' is not in the vocabulary, because none was given"):
        import_embeddings(path, "anserini", vocab_size=4)
    with pytest.raises(ValueError, match="unknown format"):
        import_embeddings(path, "lucene", vocab_size=4)
    for format in ("anserini", "scipy"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            import_embeddings(tmp_path / "absent", format, vocab_size=4)


def test_bad_npz(tmp_path, embeddings):
    (tmp_path / "text.npz").write_text("no archive")
    with gzip.open(tmp_path / "packed.npz", "wb") as file:
        file.write(b"no archive")
    scipy.sparse.save_npz(tmp_path / "without_ids.npz", embeddings.matrix)
    np.savez(tmp_path / "without_matrix.npz", ids=np.array(["a"]))
    for name in ("text", "packed", "without_ids", "without_matrix"):
        with pytest.raises(ValueError, match=r"expected a scipy\.sparse \.npz file with an array 'ids'"):
            import_embeddings(tmp_path / f"{name}.npz", "scipy")
    export_embeddings(embeddings, tmp_path / "good.npz", "scipy")
    with pytest.raises(ValueError, match="expected 7 dimensions, found 32"):
        import_embeddings(tmp_path / "good.npz", "scipy", vocab_size=7)
