"""Sparse embeddings for other search engines, and back: one file format per engine, written and read row by row.

| format             | for                               | file     | weights                                       |
|--------------------|-----------------------------------|----------|-----------------------------------------------|
| `anserini`         | Anserini, Pyserini (documents)    | `.jsonl` | integers rint(100 w); below 0.005 dropped     |
| `anserini-queries` | Anserini, Pyserini (topics)       | `.tsv`   | the same, as a token repeated that many times |
| `qdrant`           | Qdrant                            | `.jsonl` | float32                                       |
| `opensearch`       | OpenSearch (`rank_features`)      | `.ndjson`| float32                                       |
| `elasticsearch`    | Elasticsearch (`sparse_vector`)   | `.ndjson`| float32                                       |
| `seismic`          | Seismic                           | `.jsonl` | float32                                       |
| `scipy`            | scipy, scikit-learn               | `.npz`   | float32                                       |

How vocabulary entries are called is in `rarezoo.retrieval.token_keys`. Qdrant and scipy take vocabulary ids.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import uuid
import warnings
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from rarezoo.retrieval import storage
from rarezoo.retrieval.fingerprint import vocabulary_fingerprint
from rarezoo.retrieval.sparse_embeddings import SparseEmbeddings
from rarezoo.retrieval.text_files import file_written_beside, open_text, read_lines, write_errors_for
from rarezoo.retrieval.token_keys import TokenLookup, token_keys

DEFAULT_FIELD = "sparse_embedding"
ANSERINI_SCALE = 100
# Lucene's FeatureField (OpenSearch, Elasticsearch) takes positive normal numbers only.
_SMALLEST_WEIGHT = np.finfo(np.float32).tiny
# Ids of points are made from document ids, so that uploading a document again replaces it.
_QDRANT_NAMESPACE = uuid.NAMESPACE_OID


class _Row(NamedTuple):
    """One vector on its way in or out: the keys (vocabulary ids for some formats) and their weights, side by side."""

    where: str
    id: str
    keys: list[Any]
    weights: list[Any]


@dataclass(frozen=True)
class _TextFormat:
    """How one row becomes text and text becomes rows.

    Attributes:
        suffix: of the files in a sharded export.
        weights: float32 weights of one row -> the numbers in the file; those that come out as 0 are dropped.
        write: (row, field name) -> the text of the row, with its line breaks.
        parse: (lines with their places, field name) -> rows.
        restore: the numbers in the file -> weights.
        named: keys are token keys, not vocabulary ids.
        forbidden: characters that token keys must not hold.
    """

    suffix: str
    weights: Callable[[np.ndarray], list[Any]]
    write: Callable[[_Row, str], str]
    parse: Callable[[Iterable[tuple[str, str]], str], Iterator[_Row]]
    restore: Callable[[list[Any]], list[float]]
    named: bool = True
    forbidden: str = ""


def export_embeddings(
    embeddings: SparseEmbeddings,
    path: str | os.PathLike[str],
    format: str,
    tokens: Any = None,
    *,
    field: str = DEFAULT_FIELD,
    shard_size: int | None = None,
    show_progress_bar: bool = False,
) -> None:
    """Write embeddings for another engine, row by row; the target is whole or absent.

    A row without weights is kept, with an empty vector, and reported with one warning.

    Args:
        embeddings: in memory or memory-mapped.
        path: a new file (text formats: gzip-compressed when it ends in `.gz`); a new folder with `shard_size`.
        format: a row of the table above.
        tokens: the model's tokenizer, or its tokens in the order of their ids; None writes every entry as `<id:N>`.
            Not used by `qdrant` and `scipy`.
        field: name of the vector field (`opensearch`, `elasticsearch`) or of the named vector (`qdrant`).
        shard_size: write a folder of files with that many rows each (a bulk request has a size limit, loaders work in
            parallel); not for `scipy`.
        show_progress_bar: show one.

    Raises:
        FileExistsError: `path` exists.
        ValueError: an unknown format, a weight that is not a positive normal number, an id or field that the format
            cannot hold, more tokens than dimensions, or tokens of another vocabulary than the embeddings'.
        OSError: the target cannot be written.
    """
    path = Path(path)
    _check_format(format)
    if shard_size is not None and (shard_size < 1 or format == "scipy"):
        raise ValueError(f"shard_size must be at least 1, and format 'scipy' writes one file; found {shard_size}")
    if path.exists():
        raise FileExistsError(f"{path} exists. Choose another path or remove it.")
    if format == "scipy":
        with file_written_beside(path) as partial:
            _write_npz(embeddings, partial)
        return
    _check_tokens(tokens, embeddings)
    text_format = _TEXT_FORMATS[format]
    keys = token_keys(tokens, embeddings.vocab_size, text_format.forbidden) if text_format.named else None
    rows = _counted(_rows_of(embeddings, text_format, keys), len(embeddings), show_progress_bar)
    texts = (text_format.write(row, field) for row in _report_empty(rows))
    if shard_size is None:
        with file_written_beside(path) as partial, open_text(partial, compressed=path.suffix == ".gz") as file:
            file.writelines(texts)
    else:
        with storage.folder_written_beside(path) as partial, write_errors_for(path):
            _write_parts(texts, len(embeddings), partial, shard_size, text_format.suffix)


def import_embeddings(
    path: str | os.PathLike[str],
    format: str,
    vocabulary: Any = None,
    *,
    vocab_size: int | None = None,
    field: str = DEFAULT_FIELD,
    fingerprint: str | None = None,
    show_progress_bar: bool = False,
) -> SparseEmbeddings:
    """Read embeddings that `export_embeddings` or another program wrote.

    Args:
        path: a file (`.gz` too), or a folder whose files are read in the order of their names.
        format: a row of the table above.
        vocabulary: the tokenizer or the tokens, as `tokens` in `export_embeddings`. Needed wherever tokens are named.
        vocab_size: number of dimensions where it is not the length of the vocabulary (padded heads), or where there is
            no vocabulary.
        field: as in `export_embeddings`.
        fingerprint: of the model that made the vectors, where it is known.
        show_progress_bar: show one.

    Returns:
        The vectors, in memory: equal to those exported (weights within 0.005 for the Anserini formats).

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: an unknown format or token, a weight that is not positive and finite, an id that occurs twice, an
            entry of another layout, or nothing to read; the message gives file and line.
    """
    path = Path(path)
    _check_format(format)
    if vocab_size is None and vocabulary is not None:
        vocab_size = len(vocabulary)
    if format == "scipy":
        return _read_npz(path, vocab_size, fingerprint)
    if vocab_size is None:
        raise ValueError(f"format {format!r} does not say how many dimensions there are: give vocabulary or vocab_size")
    text_format = _TEXT_FORMATS[format]
    rows = _counted(text_format.parse(_lines_below(path), field), None, show_progress_bar)
    return _collected(rows, text_format, TokenLookup(vocabulary, vocab_size), path, vocab_size, fingerprint)


def _check_format(format: str) -> None:
    if format != "scipy" and format not in _TEXT_FORMATS:
        raise ValueError(f"unknown format {format!r}; expected one of {', '.join([*_TEXT_FORMATS, 'scipy'])}")


def _check_tokens(tokens: Any, embeddings: SparseEmbeddings) -> None:
    if tokens is None or embeddings.vocabulary is None or len(tokens) > embeddings.vocab_size:
        return
    found = vocabulary_fingerprint(tokens)
    if found != embeddings.vocabulary:
        raise ValueError(
            f"the embeddings have the vocabulary {embeddings.vocabulary}, these tokens are of {found}: every dimension "
            "would get a wrong name. Take the tokenizer of the model that encoded them."
        )


def _counted(rows: Iterator[_Row], total: int | None, show_progress_bar: bool) -> Iterator[_Row]:
    from transformers.utils.logging import tqdm

    with tqdm(total=total, desc="Rows", unit="row", disable=not show_progress_bar) as bar:
        for row in rows:
            yield row
            bar.update()


def _rows_of(embeddings: SparseEmbeddings, text_format: _TextFormat, keys: list[str] | None) -> Iterator[_Row]:
    for shard in embeddings.iter_shards():
        matrix = shard.matrix
        _check_weights(matrix, shard.ids)
        for row, (row_id, start, end) in enumerate(zip(shard.ids, matrix.indptr, matrix.indptr[1:])):
            weights = text_format.weights(matrix.data[start:end])
            entries = [(entry, weight) for entry, weight in zip(matrix.indices[start:end].tolist(), weights) if weight]
            names = [keys[entry] if keys else entry for entry, _ in entries]
            yield _Row(f"row {row}", row_id, names, [weight for _, weight in entries])


def _check_weights(matrix: scipy.sparse.csr_matrix, ids: Any) -> None:
    wrong = np.flatnonzero(~_are_weights(matrix.data))
    if wrong.size:
        row = int(np.searchsorted(matrix.indptr, wrong[0], side="right")) - 1
        raise ValueError(
            f"the weight of vocabulary entry {matrix.indices[wrong[0]]} in {ids[row]!r} is {matrix.data[wrong[0]]}; "
            f"weights must be finite and at least {_SMALLEST_WEIGHT:.3g}"
        )


def _report_empty(rows: Iterator[_Row]) -> Iterator[_Row]:
    total = num_empty = 0
    examples: list[str] = []
    for row in rows:
        total += 1
        if not row.keys:
            num_empty += 1
            examples = examples if len(examples) == 3 else [*examples, row.id]
        yield row
    if num_empty:
        warnings.warn(
            f"{num_empty} of {total} rows have no weights and are kept with an empty vector, which no query finds: "
            f"{', '.join(map(repr, examples))}{', …' if num_empty > 3 else ''}",
            stacklevel=2,
        )


def _write_parts(texts: Iterator[str], total: int, folder: Path, shard_size: int, suffix: str) -> None:
    for number in range(max(1, math.ceil(total / shard_size))):
        with open_text(folder / f"part-{number:05d}{suffix}") as file:
            file.writelines(itertools.islice(texts, shard_size))


def _lines_below(path: Path) -> Iterator[tuple[str, str]]:
    """(file and line number, text) of every line that is not blank."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    else:
        files = [path]
    for file in files:
        for number, line in read_lines(file):
            if line.strip():
                yield f"{file}, line {number}", line


def _collected(
    rows: Iterable[_Row],
    text_format: _TextFormat,
    lookup: TokenLookup,
    path: Path,
    vocab_size: int,
    fingerprint: str | None,
) -> SparseEmbeddings:
    ids: dict[str, None] = {}
    indices, data, pointers = array("i"), array("f"), array("q", [0])
    for row in rows:
        if row.id in ids:
            raise ValueError(f"{row.where}: the id {row.id!r} occurs twice; ids must be unique")
        ids[row.id] = None
        indices.extend(lookup(row.keys, row.where))
        data.frombytes(_checked_weights(row, text_format).tobytes())
        pointers.append(len(indices))
    if not ids:
        raise ValueError(f"{path}: holds no vectors")
    parts = (np.frombuffer(data, np.float32), np.frombuffer(indices, np.int32), np.frombuffer(pointers, np.int64))
    return SparseEmbeddings(list(ids), scipy.sparse.csr_matrix(parts, shape=(len(ids), vocab_size)), fingerprint)


def _checked_weights(row: _Row, text_format: _TextFormat) -> np.ndarray:
    # type(): bool is a kind of int in Python, but `true` is no weight. Integers beyond 1e308 do not become floats.
    wrong = [
        entry for entry, number in enumerate(row.weights) if type(number) not in (int, float) or abs(number) > 1e300
    ]
    if not wrong:
        with np.errstate(over="ignore"):
            weights = np.array(text_format.restore(row.weights), dtype=np.float64).astype(np.float32)
        wrong = np.flatnonzero(~_are_weights(weights)).tolist()
    if wrong:
        key, number = row.keys[wrong[0]], row.weights[wrong[0]]
        raise ValueError(f"{row.where}: the weight of {key!r} is {number!r}; expected a positive, finite number")
    return weights


def _are_weights(weights: np.ndarray) -> np.ndarray:
    return (weights >= _SMALLEST_WEIGHT) & (weights < np.inf)


# --- numbers ---------------------------------------------------------------------------------------------------------


def _decimals(weights: np.ndarray) -> list[float]:
    """Nine significant digits give every float32 back exactly, in less space than the float64 of the same value."""
    return [float(f"{weight:.9g}") for weight in weights.tolist()]


def _impacts(weights: np.ndarray) -> list[int]:
    return [int(impact) for impact in np.rint(ANSERINI_SCALE * weights.astype(np.float64)).tolist()]


def _from_impacts(impacts: list[int]) -> list[float]:
    return [impact / ANSERINI_SCALE for impact in impacts]


# --- text formats ----------------------------------------------------------------------------------------------------


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one JSON object, so a weight would be lost")
    return content


def _member(content: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = content.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{where}: expected {key!r} to be a JSON {_JSON_NAMES[kind]}, found {value!r:.60}")
    return value


_JSON_NAMES: dict[type, str] = {dict: "object", list: "array"}


def _identifier(content: dict[str, Any], key: str, where: str) -> str:
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{where}: expected {key!r} to be a string or an integer, found {value!r:.60}")
    return str(value)


def _write_vector(row: _Row, field: str) -> str:
    return _to_json({"id": row.id, "content": "", "vector": dict(zip(row.keys, row.weights))})


def _parse_vectors(lines: Iterable[tuple[str, str]], field: str) -> Iterator[_Row]:
    for where, line in lines:
        content = _object(line, where)
        vector = _member(content, "vector", dict, where)
        yield _Row(where, _identifier(content, "id", where), list(vector), list(vector.values()))


def _write_topic(row: _Row, field: str) -> str:
    if any(character in row.id for character in "\t\r\n"):
        raise ValueError(f"the id {row.id!r} holds a tab or a line break and cannot stand in a file of topics")
    return f"{row.id}\t{' '.join(' '.join([key] * impact) for key, impact in zip(row.keys, row.weights))}\n"


def _parse_topics(lines: Iterable[tuple[str, str]], field: str) -> Iterator[_Row]:
    for where, line in lines:
        columns = line.split("\t")
        if len(columns) != 2:
            raise ValueError(f"{where}: expected 2 columns (id, tab, repeated tokens), found {len(columns)}")
        counts = Counter(columns[1].split())
        yield _Row(where, columns[0], list(counts), list(counts.values()))


def _write_point(row: _Row, field: str) -> str:
    point_id = str(uuid.uuid5(_QDRANT_NAMESPACE, row.id))
    vector = {field: {"indices": row.keys, "values": row.weights}}
    return _to_json({"id": point_id, "vector": vector, "payload": {"id": row.id}})


def _parse_points(lines: Iterable[tuple[str, str]], field: str) -> Iterator[_Row]:
    for where, line in lines:
        point = _object(line, where)
        payload = point.get("payload") or {}
        row_id = _identifier(payload if "id" in payload else point, "id", where)
        vector = _member(_member(point, "vector", dict, where), field, dict, where)
        indices, values = (_member(vector, key, list, where) for key in ("indices", "values"))
        if len(indices) != len(values) or not all(type(entry) is int for entry in indices):
            raise ValueError(
                f"{where}: expected as many integer indices as values, found {len(indices)} and {len(values)}"
            )
        yield _Row(where, row_id, indices, values)


def _write_bulk(row: _Row, field: str) -> str:
    return _to_json({"index": {"_id": row.id}}) + _to_json({field: dict(zip(row.keys, row.weights))})


def _parse_bulk(lines: Iterable[tuple[str, str]], field: str) -> Iterator[_Row]:
    lines = iter(lines)
    for where, line in lines:
        action = _object(line, where)
        operation = action.get("index", action.get("create"))
        if not isinstance(operation, dict):
            raise ValueError(f"{where}: expected an action 'index' or 'create', found {sorted(action)}")
        row_id = _identifier(operation, "_id", where)
        where, line = next(lines, (where, "null"))
        vector = _member(_object(line, where), field, dict, where)
        yield _Row(where, row_id, list(vector), list(vector.values()))


_TEXT_FORMATS = {
    "anserini": _TextFormat(".jsonl", _impacts, _write_vector, _parse_vectors, _from_impacts),
    "anserini-queries": _TextFormat(".tsv", _impacts, _write_topic, _parse_topics, _from_impacts),
    "qdrant": _TextFormat(".jsonl", _decimals, _write_point, _parse_points, list, named=False),
    # Both engines read a dot in a key as a path into an object.
    "opensearch": _TextFormat(".ndjson", _decimals, _write_bulk, _parse_bulk, list, forbidden="."),
    "elasticsearch": _TextFormat(".ndjson", _decimals, _write_bulk, _parse_bulk, list, forbidden="."),
    "seismic": _TextFormat(".jsonl", _decimals, _write_vector, _parse_vectors, list),
}


# --- scipy -----------------------------------------------------------------------------------------------------------


def _write_npz(embeddings: SparseEmbeddings, path: Path) -> None:
    """What `scipy.sparse.save_npz` writes, and an array `ids`, shard by shard instead of all in memory."""
    shards = list(embeddings.iter_shards())
    index_type = np.dtype(np.int32 if embeddings.num_postings < 2**31 else np.int64)
    id_type = np.dtype(f"U{max((len(row_id) for row_id in embeddings.ids), default=1) or 1}")
    for shard in shards:
        _check_weights(shard.matrix, shard.ids)
    if any(row_id.endswith("\0") for row_id in embeddings.ids):
        raise ValueError("an id ends with NUL, which numpy strings cannot hold")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _write_array(archive, "indices", embeddings.num_postings, index_type, (s.matrix.indices for s in shards))
        _write_array(archive, "indptr", len(embeddings) + 1, index_type, _pointers(shards))
        _write_array(archive, "data", embeddings.num_postings, np.dtype(np.float32), (s.matrix.data for s in shards))
        _write_array(archive, "ids", len(embeddings), id_type, (np.array(list(s.ids), id_type) for s in shards))
        for name, value in (("format", b"csr"), ("shape", (len(embeddings), embeddings.vocab_size))):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.array(value))


def _pointers(shards: list[SparseEmbeddings]) -> Iterator[np.ndarray]:
    written = 0
    yield np.zeros(1, np.int64)
    for shard in shards:
        yield shard.matrix.indptr[1:] + written
        written += shard.num_postings


def _write_array(archive: zipfile.ZipFile, name: str, length: int, dtype: np.dtype, blocks: Iterable[np.ndarray]):
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for block in blocks:
            member.write(np.ascontiguousarray(block, dtype).data.cast("B") if block.size else b"")


def _read_npz(path: Path, vocab_size: int | None, fingerprint: str | None) -> SparseEmbeddings:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        matrix = scipy.sparse.load_npz(path)
        with np.load(path, allow_pickle=False) as archive:
            ids = archive["ids"].tolist()
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected a scipy.sparse .npz file with an array 'ids' ({error})") from error
    if vocab_size not in (None, matrix.shape[1]):
        raise ValueError(f"{path}: expected {vocab_size} dimensions, found {matrix.shape[1]}")
    return SparseEmbeddings(ids, matrix, fingerprint)
