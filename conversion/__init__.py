"""Published checkpoint layouts to rarezoo's and back: `convert(family, source, destination)`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from typing import Any

import torch

from rarezoo.auto import FAMILIES
from rarezoo.conversion.checkpoint_files import ConversionError as ConversionError
from rarezoo.conversion.engine import ConversionReport as ConversionReport
from rarezoo.conversion.engine import FolderReport as FolderReport

_DIRECTIONS = {"rarezoo": "to_rarezoo", "official": "to_official"}


def convert(
    family: str,
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    to: str = "rarezoo",
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    **options: Any,
) -> ConversionReport:
    """Convert a checkpoint folder, one tensor at a time; the model itself is never built.

    Every tensor of the source is used once or reported as dropped with a reason. The result is written beside the
    destination, opened again and only then renamed: a failed or killed conversion leaves no destination.

    Args:
        family: name in `rarezoo.FAMILIES`.
        source: folder, or Hub repository "owner/name".
        destination: folder that does not exist or is empty.
        to: "rarezoo" (reads every layout of the family) or "official" (reads rarezoo's).
        dtype: of the written weights: "float32", "bfloat16" or "float16" (or "fp32", "bf16", "fp16", or a torch.dtype);
            None keeps the source's.
        max_shard_size: bytes or a string such as "5GB"; larger checkpoints are written as shards with an index.
        options: of the family's converter, see `rarezoo.conversion.convert_<family>`.

    Returns:
        What was read and written; `dataclasses.asdict` makes it JSON.

    Raises:
        ConversionError: the source or an option is not what the family can read; a `ValueError`.
        FileNotFoundError: no such source, base or weight file.
        FileExistsError: the destination is not empty.
        OSError: the destination cannot be written.
    """
    module_name = f"rarezoo.conversion.convert_{family}"
    if family not in FAMILIES or importlib.util.find_spec(module_name) is None:
        raise ConversionError(f"no converter for family {family!r}; known families: {', '.join(sorted(FAMILIES))}")
    if to not in _DIRECTIONS:
        raise ConversionError(f"to must be one of {', '.join(_DIRECTIONS)}; found {to!r}")
    function = getattr(importlib.import_module(module_name), _DIRECTIONS[to])
    allowed = [name for name in inspect.signature(function).parameters if name not in ("source", "destination")]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise ConversionError(
            f"unknown option {', '.join(unknown)} for to={to!r}; {family} takes {', '.join(sorted(allowed))}"
        )
    return function(source, destination, dtype=dtype, max_shard_size=max_shard_size, **options)
