"""Transplanted models between the two forms in which they are stored.

A plain folder, as `transplant_tokenizer`, mergekit-tokensurgeon and TokenAdapt write it, holds all weights. rarezoo's
names the base and holds the matrix that makes the new tables from the base's: rows that the base has bit for bit are
copies, rows that a `transplant_report.json` beside the weights explains are combinations, and all others are stored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from rarezoo.conversion.checkpoint_files import ConversionError, listed
from rarezoo.conversion.engine import ConversionReport, FolderReport, staged_folder
from rarezoo.tokenizer_transplant import SourceKind, TransplantedConfig, TransplantMatrix
from rarezoo.tokenizer_transplant.checkpoint_streaming import StoredCheckpoint, rewrite_checkpoint
from rarezoo.tokenizer_transplant.modeling_tokenizer_transplant import (
    MATRIX_NAME,
    TransplantedForCausalLM,
    TransplantedForMaskedLM,
    TransplantedModel,
    TransplantedPreTrainedModel,
    base_fingerprint,
    base_of,
)
from rarezoo.tokenizer_transplant.table_surgery import TokenIds
from rarezoo.tokenizer_transplant.transplant_matrix import CombinationRows, concatenate_rows
from rarezoo.tokenizer_transplant.transplant_report import REPORT_NAME

_FAMILY = "tokenizer_transplant"
_PLAIN = "plain"
_CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def to_rarezoo(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    base: str | os.PathLike | None = None,
    base_revision: str | None = None,
) -> ConversionReport:
    """A plain folder to a checkpoint that stores the matrix alone.

    Args:
        source: folder or Hub repository of a model with a transplanted tokenizer.
        destination: as in `rarezoo.conversion.convert`.
        dtype, max_shard_size: must stay as they are: the weights are the base's.
        base: folder or Hub repository of the model that it was made from; the checkpoint remembers it.
        base_revision: of a Hub repository.

    Raises:
        ConversionError: no base; weights outside the tables that are not the base's (trained since); tables that the
            base's with a matrix do not give.
    """
    _refuse_settings(dtype, max_shard_size)
    source_folder = _local(source)
    if (source_folder / MATRIX_NAME).is_file():
        raise ConversionError(f"{source} has the layout 'rarezoo' already; expected a plain folder")
    if base is None:
        raise ConversionError(f"which model was {source} made from? Give its folder or Hub repository as base")
    new, old = _opened(source_folder), _opened(_local(base, base_revision))
    _check_other_weights(new, old)
    tokenizer, base_tokenizer = AutoTokenizer.from_pretrained(new.folder), AutoTokenizer.from_pretrained(old.folder)
    matrix = _matrix_between(new, old, tokenizer)
    with staged_folder(Path(destination)) as staging:
        model = _class_for(new).from_base(
            str(base),
            matrix,
            tokenizer,
            base_tokenizer,
            revision=base_revision,
            provenance=getattr(new.config, "tokenizer_transplant", None),
        )
        _check_tables(new, model, matrix)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        size = (staging / MATRIX_NAME).stat().st_size
    halves = [rows for rows in (matrix.input, matrix.head) if rows is not None]
    notes = [f"counts of rows: {json.dumps(matrix.counts())}", *_differing_ids(new.config, model.config.text_config)]
    dense = matrix.counts().get("dense", 0)
    if dense:
        notes.append(f"{dense} rows are stored as they are, since nothing tells how they were made")
    folder = FolderReport(
        str(destination),
        "rarezoo",
        tensors=len(new.vocabulary),
        parameters=sum(len(rows.weights) + (0 if rows.dense is None else rows.dense.numel()) for rows in halves),
        size_bytes=size,
        files=1,
        dtype=str(model.dtype).removeprefix("torch."),
        dropped={name: f"is in the base, {base}" for name in new.files if name not in new.vocabulary},
        notes=tuple(notes),
    )
    return ConversionReport(_FAMILY, str(source), _PLAIN, "rarezoo", (folder,))


def to_official(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    base: str | os.PathLike | None = None,
) -> ConversionReport:
    """A checkpoint that stores the matrix to the plain folder that it stands for, shard by shard.

    Args:
        source, destination: as in `rarezoo.conversion.convert`.
        dtype, max_shard_size: must stay as they are: the shards are the base's.
        base: where the base is, if it is no longer where the checkpoint says.

    Raises:
        ConversionError: a base that is not the one the matrix was made for.
    """
    _refuse_settings(dtype, max_shard_size)
    folder = _local(source)
    config = TransplantedConfig.from_pretrained(folder)
    if config.model_type != TransplantedConfig.model_type or not (folder / MATRIX_NAME).is_file():
        raise ConversionError(f"{folder} does not hold {MATRIX_NAME}: it is no checkpoint of this family")
    named = str(base) if base is not None else base_of(config.base_model_name_or_path, folder)
    found = base_fingerprint(named, revision=None if base is not None else config.base_revision)
    if found != config.base_fingerprint:
        raise ConversionError(
            f"{named} is not the base that {source} was made for: expected the fingerprint {config.base_fingerprint}, "
            f"found {found}"
        )
    checkpoint = _opened(_local(named, None if base is not None else config.base_revision))
    matrix = TransplantMatrix.load(folder / MATRIX_NAME)
    ids = TokenIds.from_roles(matrix, config.token_ids or {}, config.base_token_ids or {})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rewrite_checkpoint(checkpoint, destination, matrix, ids, tokenizer, provenance=config.tokenizer_transplant)
    written = _opened(Path(destination))
    parameters = sum(written.read(name).numel() for name in written.files)
    sizes = [(Path(destination) / file).stat().st_size for file in set(written.files.values())]
    report = FolderReport(
        str(destination),
        _PLAIN,
        tensors=len(written.files),
        parameters=parameters,
        size_bytes=sum(sizes),
        files=len(sizes),
        dtype=str(written.tables()[0].dtype).removeprefix("torch."),
    )
    return ConversionReport(_FAMILY, str(source), "rarezoo", "official", (report,))


def _refuse_settings(dtype: Any, max_shard_size: Any) -> None:
    if dtype is not None:
        raise ConversionError(f"the weights are the base's, in its dtype: convert the base first; found dtype={dtype}")
    if max_shard_size != "5GB":
        raise ConversionError(f"the shards are the base's; found max_shard_size={max_shard_size}")


def _local(checkpoint: str | os.PathLike, revision: str | None = None) -> Path:
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    return Path(snapshot_download(str(checkpoint), revision=revision, allow_patterns=list(_CHECKPOINT_FILES)))


def _opened(folder: Path) -> StoredCheckpoint:
    try:
        return StoredCheckpoint.open(folder)
    except ValueError as error:
        raise ConversionError(str(error)) from error


def _class_for(checkpoint: StoredCheckpoint) -> type[TransplantedPreTrainedModel]:
    kinds: tuple[tuple[Any, type[TransplantedPreTrainedModel]], ...] = (
        (AutoModelForCausalLM, TransplantedForCausalLM),
        (AutoModelForMaskedLM, TransplantedForMaskedLM),
    )
    for auto_class, ours in kinds:
        if auto_class._model_mapping.get(type(checkpoint.config), None) is checkpoint.model_class:
            return ours
    return TransplantedModel


def _check_other_weights(new: StoredCheckpoint, old: StoredCheckpoint) -> None:
    """All that does not belong to the vocabulary must be the base's."""
    if set(new.files) != set(old.files):
        different = sorted(set(new.files) ^ set(old.files))
        raise ConversionError(f"{new.folder} and {old.folder} do not store the same tensors: {listed(different)}")
    changed = [
        name for name in new.files if name not in new.vocabulary and not _same_bits(new.read(name), old.read(name))
    ]
    if changed:
        raise ConversionError(
            f"{len(changed)} tensors of {new.folder} are not those of {old.folder}, such as {changed[0]}: it is not "
            "its base, or was trained since; such a model is stored whole"
        )


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
    )


# --- the matrix -------------------------------------------------------------------------------------------------------


def _matrix_between(new: StoredCheckpoint, old: StoredCheckpoint, tokenizer: Any) -> TransplantMatrix:
    """The matrix that makes the new tables from the old ones, exactly, in the rows that have a token."""
    table, head, _ = old.tables()
    new_table, new_head, _ = new.tables()
    told_kinds, told, told_head = _told(new, len(table), len(new_table))
    kinds, rows = _rows_between(table, new_table, told_kinds, told)
    head_rows = None
    if head is not None and new_head is not None:
        head_kinds, head_rows = _rows_between(head, new_head, told_kinds, told_head)
        kinds = kinds.maximum(head_kinds)  # a row is copied if it is in both tables
        head_rows = None if _same_rows(rows, head_rows) else head_rows
    tokens = torch.zeros(len(new_table), dtype=torch.bool)
    tokens[[token_id for token_id in tokenizer.get_vocab().values() if token_id < len(new_table)]] = True
    matrix = TransplantMatrix(kinds, rows, len(table), head_rows)
    without = (~tokens).nonzero()[:, 0]
    return matrix.replaced(without, TransplantMatrix.constant(len(without), len(table), SourceKind.PADDING))


def _told(
    checkpoint: StoredCheckpoint, base_rows: int, rows: int
) -> tuple[Tensor, CombinationRows | None, CombinationRows | None]:
    """What `transplant_report.json` says, where there is one that fits: source kinds, combinations of the input table
    and of the head."""
    kinds = torch.full((rows,), int(SourceKind.COMBINED), dtype=torch.uint8)
    path = checkpoint.folder / REPORT_NAME
    if not path.is_file():
        return kinds, None, None
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))["tokens"]
        kinds = torch.tensor([SourceKind[line["source"].upper()] for line in lines], dtype=torch.uint8)
        entries = [(line["base_ids"], line["weights"]) for line in lines]
        heads = [(line.get("head", line)["base_ids"], line.get("head", line)["weights"]) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path} is no report of a transplantation ({error!r}): remove it") from error
    if len(lines) != rows:
        raise ConversionError(f"{path} tells of {len(lines)} rows, the tables have {rows}: remove it")
    return kinds, _combinations(entries, base_rows, path), _combinations(heads, base_rows, path)


def _combinations(entries: list[tuple[list[int], list[float]]], base_rows: int, origin: object) -> CombinationRows:
    ids = torch.tensor([base_id for base_ids, _ in entries for base_id in base_ids], dtype=torch.int64)
    weights = torch.tensor([weight for _, own in entries for weight in own], dtype=torch.float32)
    offsets = torch.tensor([0, *accumulate(len(base_ids) for base_ids, _ in entries)], dtype=torch.int64)
    if len(ids) != len(weights) or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < base_rows):
        raise ConversionError(f"{origin} does not fit the base, whose tables have {base_rows} rows: remove it")
    return CombinationRows(offsets, ids, weights, torch.full((len(entries),), -1))


def _rows_between(
    table: Tensor, wanted: Tensor, told_kinds: Tensor, told: CombinationRows | None
) -> tuple[Tensor, CombinationRows]:
    """Source kinds and combinations that give the wanted rows exactly: what was told where that is true, else a copy
    of the first equal row of the base, else the row itself."""
    kinds, rows = told_kinds.clone(), told
    unexplained = torch.ones(len(wanted), dtype=torch.bool)
    if rows is not None:
        unexplained = (rows.apply(table) != wanted).any(1)
    positions = unexplained.nonzero()[:, 0]
    first: dict[bytes, int] = {}
    for base_id, row in enumerate(_rows_as_bytes(table)):
        first.setdefault(row, base_id)
    found = torch.tensor([first.get(row, -1) for row in _rows_as_bytes(wanted[positions])], dtype=torch.int64)
    kinds[positions] = torch.where(found >= 0, int(SourceKind.COPIED), int(SourceKind.DENSE)).to(torch.uint8)
    copies = CombinationRows.from_padded(found[:, None], (found[:, None] >= 0).float())
    dense = wanted[positions[found < 0]].float()
    dense_positions = torch.full((len(found),), -1)
    dense_positions[found < 0] = torch.arange(len(dense))
    made = CombinationRows(
        copies.offsets, copies.base_ids, copies.weights, dense_positions, dense if len(dense) else None
    )
    if rows is None:
        return kinds, made
    order = torch.arange(len(wanted))
    order[positions] = len(wanted) + torch.arange(len(positions))
    return kinds, concatenate_rows([rows, made]).select(order)


def _rows_as_bytes(table: Tensor) -> Iterator[bytes]:
    for row in table.contiguous().view(torch.uint8).numpy():
        yield row.tobytes()


def _same_rows(first: CombinationRows, second: CombinationRows) -> bool:
    if first.dense is not None or second.dense is not None:
        return False
    pairs = (first.offsets, second.offsets), (first.base_ids, second.base_ids), (first.weights, second.weights)
    return all(torch.equal(one, other) for one, other in pairs)


def _check_tables(new: StoredCheckpoint, model: TransplantedPreTrainedModel, matrix: TransplantMatrix) -> None:
    """All tensors of the vocabulary, as the model has them now, in the rows that have a token."""
    tokens = (matrix.kinds != int(SourceKind.PADDING)).nonzero()[:, 0]
    state = model.merge_and_unload().state_dict()
    for name, stored in new.names.items():
        dim = new.vocabulary[stored].dim
        made, wanted = state[name].index_select(dim, tokens), new.read(stored).index_select(dim, tokens)
        if not torch.equal(made, wanted):
            raise ConversionError(
                f"{stored} of {new.folder} is not what the base's tensors give with any matrix, in "
                f"{int((made != wanted).sum()):,} numbers: such a model is stored whole"
            )


def _differing_ids(plain: Any, stored: Any) -> list[str]:
    """Special ids that the plain folder's configuration names otherwise than its tokenizer does."""
    notes = []
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        before, now = getattr(plain, field, None), getattr(stored, field, None)
        if before != now:
            notes.append(f"{field} was {before} in the configuration; it is {now} now, by the tokenizer")
    return notes
