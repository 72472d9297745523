"""PLAID directories: one that colbert-ai wrote, and ours against the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings
from rarezoo.retrieval.multi_vector_index import MultiVectorIndex
from rarezoo.retrieval.plaid_directory import (
    PlaidChunk,
    PlaidDirectory,
    export_plaid,
    import_plaid,
    write_plaid_directory,
)
from rarezoo.retrieval.residual_codec import ResidualCodec

OFFICIAL = Path(__file__).parent / "fixtures" / "colbert_xm" / "plaid"


def documents(count: int = 60, dim: int = 64) -> MultiVectorEmbeddings:
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 9, count)
    vectors = generator.standard_normal((lengths.sum(), dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return MultiVectorEmbeddings([f"d{row}" for row in range(count)], vectors.astype(np.float32), lengths, "a model")


def loaded(path: Path) -> list[torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return list(content) if isinstance(content, tuple) else [content]


def test_reading_what_colbert_ai_wrote() -> None:
    expected = load_file(OFFICIAL / "decompressed.safetensors")
    directory = PlaidDirectory(OFFICIAL)
    assert (directory.num_passages, directory.num_chunks, directory.codec.num_bits) == (8, 2, 2)
    assert directory.config["doc_maxlen"] == 40
    found = directory.decompressed("a model")
    np.testing.assert_allclose(found.vectors, expected["decompressed"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found.lengths, expected["lengths"])
    assert list(found.ids) == [str(number) for number in range(8)] and found.fingerprint == "a model"


def test_writing_what_colbert_ai_wrote(tmp_path: Path) -> None:
    directory = PlaidDirectory(OFFICIAL)
    write_plaid_directory(tmp_path / "ours", directory.codec, directory.iter_chunks(), config=directory.config)
    names = {path.name for path in OFFICIAL.iterdir()} - {"README.md", "decompressed.safetensors"}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names
    for name in names:
        ours, theirs = tmp_path / "ours" / name, OFFICIAL / name
        if name.endswith(".json"):
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text()), name
            continue
        for found, expected in zip(loaded(ours), loaded(theirs), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected), name


@pytest.mark.parametrize("num_bits", [1, 2, 4, 8])
def test_there_and_back(tmp_path: Path, num_bits: int) -> None:
    embeddings = documents()
    index = MultiVectorIndex.build(embeddings, tmp_path / "index", f"{num_bits}-bit")
    index.delete(["d7", "d30"])
    export_plaid(index, tmp_path / "plaid", {"doc_maxlen": 220})
    directory = PlaidDirectory(tmp_path / "plaid")
    assert directory.config == {"doc_maxlen": 220, "dim": 64, "nbits": num_bits}
    left = [identifier for identifier in embeddings.ids if identifier not in ("d7", "d30")]
    stored = index.reconstruct(left)
    found = directory.decompressed()
    assert list(found.ids) == left
    np.testing.assert_array_equal(found.vectors, stored.vectors)
    np.testing.assert_array_equal(found.lengths, stored.lengths)
    again = import_plaid(tmp_path / "plaid", tmp_path / "again", "a model")
    queries = [vectors for _, vectors in embeddings[:5] if len(vectors)]
    assert again.fingerprint == "a model" and len(again) == 58
    assert again.search(queries, exhaustive=True) == index.search(queries, exhaustive=True)
    renamed = import_plaid(tmp_path / "plaid", tmp_path / "renamed", ids=[f"{name}!" for name in left])
    assert renamed.fingerprint is None and "d8!" in renamed and "d8" not in renamed
    with pytest.raises(ValueError, match="found 1 for 58"):
        import_plaid(tmp_path / "plaid", tmp_path / "never", ids=["a"])


def test_the_inverted_lists_name_every_passage_once(tmp_path: Path) -> None:
    index = MultiVectorIndex.build(documents(), tmp_path / "index", "2-bit", num_centroids=8)
    export_plaid(index, tmp_path / "plaid")
    passages, lengths = (part.numpy() for part in loaded(tmp_path / "plaid" / "ivf.pid.pt"))
    assert passages.dtype == np.int32 and lengths.dtype == np.int64 and len(lengths) == 8
    (chunk,) = PlaidDirectory(tmp_path / "plaid").iter_chunks()
    owners = np.repeat(np.arange(60), chunk.lengths)
    ends = np.cumsum(lengths)
    for centroid, (end, length) in enumerate(zip(ends, lengths)):
        expected = np.unique(owners[chunk.codes == centroid])
        np.testing.assert_array_equal(passages[end - length : end], expected)
    # colbert-ai looks at every list through a window of the longest list's length.
    assert ends[-2] + lengths.max() <= len(passages)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    folder = shutil.copytree(OFFICIAL, tmp_path / "plaid")

    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    torch.save(Harmful(), folder / "buckets.pt")
    with pytest.raises(ValueError, match=r"buckets\.pt is damaged, or holds something else than tensors"):
        PlaidDirectory(folder)
    assert not (tmp_path / "run").exists()


def test_damaged_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metadata\.json is missing"):
        PlaidDirectory(tmp_path)
    folder = shutil.copytree(OFFICIAL, tmp_path / "plaid")
    codes = folder / "1.codes.pt"
    whole = codes.read_bytes()
    for content in (whole[:-100], b"", b"not a tensor"):
        codes.write_bytes(content)
        with pytest.raises(ValueError, match=r"1\.codes\.pt is damaged"):
            PlaidDirectory(folder).decompressed()
    torch.save(loaded(OFFICIAL / "1.codes.pt")[0] + 8, codes)
    with pytest.raises(ValueError, match=r"1\.codes\.pt is damaged: it names centroids that do not exist"):
        PlaidDirectory(folder).decompressed()
    torch.save(loaded(OFFICIAL / "1.codes.pt")[0][:-1], codes)
    with pytest.raises(ValueError, match=r"chunk 1 of .* is damaged: doclens\.1\.json tells of 66 vectors"):
        PlaidDirectory(folder).decompressed()
    codes.unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.codes\.pt is missing"):
        PlaidDirectory(folder).decompressed()
    (folder / "doclens.0.json").write_text('["many"]')
    with pytest.raises(ValueError, match=r"doclens\.0\.json is damaged"):
        PlaidDirectory(folder).decompressed()
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["config"]["nbits"] = 4
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="16 dimensions and 4 bits, the codec has 16 and 2"):
        PlaidDirectory(folder)


def changed_json(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_an_inconsistent_directory_leaves_no_index_behind(tmp_path: Path) -> None:
    export_plaid(MultiVectorIndex.build(documents(), tmp_path / "index", "2-bit"), tmp_path / "whole")
    (tmp_path / "whole" / "document_ids.json").unlink()
    lengths = json.loads((tmp_path / "whole" / "doclens.0.json").read_text())
    longest = max(lengths)
    split = [1, longest - 1, *(sorted(lengths)[:-1])]
    damages = {
        r"0\.metadata\.json and doclens\.0\.json contradict": [
            lambda folder: changed_json(folder / "0.metadata.json", num_passages=59),
            lambda folder: changed_json(folder / "0.metadata.json", num_embeddings=7),
            lambda folder: (folder / "doclens.0.json").write_text(json.dumps(split)),
        ],
        r"metadata\.json is damaged: it tells of 0 chunks, but there are files of chunk 0": [
            lambda folder: changed_json(folder / "metadata.json", num_chunks=0)
        ],
        r"/metadata\.json is damaged: 'num_chunks' is missing": [
            lambda folder: changed_json(folder / "metadata.json", num_chunks=None)
        ],
        r"0\.metadata\.json is damaged: 'num_passages' is missing": [
            lambda folder: changed_json(folder / "0.metadata.json", num_passages="60")
        ],
        r"doclens\.0\.json is damaged: expected a list of lengths": [
            lambda folder: (folder / "doclens.0.json").write_text(json.dumps([-1, longest + 1, *sorted(lengths)[:-1]])),
            lambda folder: (folder / "doclens.0.json").write_text("[1.5]"),
        ],
        r"0\.metadata\.json is missing": [lambda folder: (folder / "0.metadata.json").unlink()],
    }
    for message, ways in damages.items():
        for damage in ways:
            folder = shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
            damage(folder)
            with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
                import_plaid(folder, tmp_path / "new")
            assert str(folder) in str(caught.value)
            assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))
            shutil.rmtree(folder)
    assert len(import_plaid(tmp_path / "whole", tmp_path / "new")) == 60


def test_stored_parts_that_do_not_fit_leave_no_index_behind(tmp_path: Path) -> None:
    index = MultiVectorIndex.build(documents(), tmp_path / "index", "2-bit")
    ((ids, lengths, stored),) = index.iter_stored()
    for part in ((ids[1:], lengths, stored), (ids, lengths, {**stored, "codes": stored["codes"][1:]})):
        with pytest.raises(ValueError, match="one length per identifier and one row per vector; found"):
            MultiVectorIndex.build_from_stored([part], tmp_path / "new", index.codec)
        assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_what_colbert_ai_cannot_hold_is_refused(tmp_path: Path) -> None:
    index = MultiVectorIndex.build(documents(dim=64), tmp_path / "int8", "int8")
    with pytest.raises(ValueError, match="vectors in int8"):
        export_plaid(index, tmp_path / "plaid")
    index = MultiVectorIndex.build(documents(dim=16), tmp_path / "4-bit", "4-bit")
    with pytest.raises(ValueError, match="multiple of 32 dimensions for 4 bits, found 16"):
        export_plaid(index, tmp_path / "plaid")
    codec = ResidualCodec(np.full((1, 16), 0.1, dtype=np.float32), [0], [-1, 1])
    with pytest.raises(ValueError, match="centroids in float16"):
        write_plaid_directory(tmp_path / "plaid", codec, [])
    codec = ResidualCodec(np.full((1, 16), 0.5), [0], [-1, 1])
    chunk = PlaidChunk(np.array([2]), np.zeros(2, dtype=np.int32), np.zeros((2, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match="found 2 for 1"):
        write_plaid_directory(tmp_path / "plaid", codec, [chunk], ["a", "b"])
    with pytest.raises(ValueError, match="add up to 3 vectors, found 2 codes"):
        write_plaid_directory(tmp_path / "plaid", codec, [chunk._replace(lengths=np.array([3]))])
    assert not (tmp_path / "plaid").exists() and not list(tmp_path.glob(".*"))
