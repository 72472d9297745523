"""What a transplantation did, token by token, and where its result came from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from .token_bytes import Vocabulary
from .transplant_matrix import CombinationRows, SourceKind, TransplantMatrix

REPORT_NAME = "transplant_report.json"


@dataclass(frozen=True)
class TransplantReport:
    """The report of a transplantation; `save` writes it as JSON, one line per new id.

    provenance: plain JSON: method and options, matching, seed, versions, the tokenizers' hashes, counts per kind.
        The same dictionary stands in the new model's configuration as `tokenizer_transplant`.
    notes: figures of the methods, and how many rows each method gave.
    matrix, base, new: what the lines are made from.
    """

    provenance: dict[str, Any]
    matrix: TransplantMatrix
    base: Vocabulary
    new: Vocabulary
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows per source kind; they add up to the rows of the new tables."""
        return self.matrix.counts()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every new id in order: id, token (None for padding), source kind, base ids, base tokens and weights; the
        head's under "head" where they differ."""
        kinds = self.matrix.kinds.tolist()
        sources = _entries(self.matrix.input)
        head_sources = None if self.matrix.head is None else _entries(self.matrix.head)
        for new_id, kind in enumerate(kinds):
            row = {
                "id": new_id,
                "token": self.new.tokens[new_id] if new_id < self.new.size else None,
                "source": SourceKind(kind).name.lower(),
                **self._named(*next(sources)),
            }
            if head_sources is not None:
                row["head"] = self._named(*next(head_sources))
            yield row

    def to_dict(self) -> dict[str, Any]:
        return {"provenance": self.provenance, "notes": self.notes, "tokens": list(self.rows())}

    def save(self, path: str | os.PathLike) -> None:
        """Write the report as JSON, beside its place first and then renamed."""
        beside = Path(f"{path}.partial")
        with beside.open("w", encoding="utf-8") as file:
            heading = json.dumps({"provenance": self.provenance, "notes": self.notes}, ensure_ascii=False)
            file.write(heading[:-1] + ', "tokens": [')
            for number, row in enumerate(self.rows()):
                file.write(("\n" if number == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
            file.write("\n]}\n")
        beside.replace(path)

    def _named(self, base_ids: list[int], weights: list[float]) -> dict[str, Any]:
        tokens = [self.base.tokens[base_id] if base_id < self.base.size else None for base_id in base_ids]
        return {"base_ids": base_ids, "base_tokens": tokens, "weights": weights}


def _entries(rows: CombinationRows) -> Iterator[tuple[list[int], list[float]]]:
    offsets, base_ids, weights = rows.offsets.tolist(), rows.base_ids.tolist(), rows.weights.tolist()
    for start, stop in pairwise(offsets):
        yield base_ids[start:stop], weights[start:stop]


def as_json(value: Any) -> Any:
    """A JSON value that tells what an argument was: itself where it is plain, else the name of its type. Of a file the
    name alone: where it lies is nobody's business but its owner's."""
    if isinstance(value, os.PathLike) or (isinstance(value, str) and os.path.isabs(value)):
        return Path(value).name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and len(value) <= 100:
        return [as_json(member) for member in value]
    if isinstance(value, Mapping) and len(value) <= 100:
        return {str(key): as_json(member) for key, member in value.items()}
    return f"<{type(value).__name__}>"
