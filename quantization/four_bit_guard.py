"""Saving, dequantizing and training 4-bit models after they have answered: a guard around a bitsandbytes defect.

On CPUs with AVX512-BF16, bitsandbytes (seen in 0.50.2) packs the 4-bit weights of a layer in place at its first forward
without gradients, and from then on
- `state_dict` and `save_pretrained` write block scales in the packed order (or re-quantized, under double
  quantization), which damages the file and the live model;
- `dequantize` reads packed bytes as if they were not packed;
- a training forward runs an operator without derivative: every layer below it silently gets no gradient.
The functions here first bring the weights back to the layout of the checkpoint. They change nothing on other machines.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn


def restore_four_bit_layout(model: nn.Module) -> int:
    """Undo the in-place packing of every 4-bit layer, exactly: the model answers as before.

    Call it before continuing to train a 4-bit model that has been evaluated; `save_quantized` and `dequantize` call it
    themselves. A layer that was doubly quantized keeps its block scales in float32 from here on (0.37 bits per weight
    more), because packing has dropped their quantized form. Packing itself rounds the scales to bfloat16.

    Returns:
        The number of layers that were packed.
    """
    restored = 0
    for module in model.modules():
        if not _quant_state(module, "packing_format_for_cpu"):
            continue
        weight: Any = module.weight
        state = weight.quant_state
        # Else the library quantizes the scales a second time while unpacking, with another rounding.
        state.original_nested = False
        # The library unpacks a layer whenever it is asked for its state.
        module.state_dict()
        if state.absmax.dim() == 2:
            state.absmax = state.absmax.T.contiguous().reshape(-1)
        state.absmax = state.absmax.float()
        state.offset = None
        weight.compress_statistics = False
        restored += 1
    return restored


def _quant_state(module: nn.Module, attribute: str) -> Any:
    return getattr(getattr(getattr(module, "weight", None), "quant_state", None), attribute, None)


def save_quantized(model: Any, folder: str | os.PathLike[str]) -> Path:
    """Save a quantized (or dequantized) transformers model so that a reload gives equal outputs, also after a forward.

    The weights, the configuration and the model's own code files are written; the processor is not the model's to save.

    Args:
        model: a `PreTrainedModel`, quantized by bitsandbytes or torchao, or not quantized.
        folder: where to write; must not exist, or be empty. It appears whole or not at all.

    Raises:
        FileExistsError: the folder has files in it.
    """
    return write_folder_whole(folder, lambda temporary: write_model(model, temporary))


def write_model(model: Any, folder: Path) -> None:
    """`save_pretrained` in the names that the model has in memory, after `restore_four_bit_layout`."""
    if restore_four_bit_layout(model):
        _declare_double_quantization(model)
    # The reverse of a quantized load is not implemented by transformers; clean names need no reverse.
    model.save_pretrained(folder, save_original_format=False)


def _declare_double_quantization(model: Any) -> None:
    """Say in the saved configuration what the layers hold now."""
    config: Any = getattr(model.config, "quantization_config", None)
    if getattr(config, "bnb_4bit_use_double_quant", False):
        config.bnb_4bit_use_double_quant = any(_quant_state(module, "nested") for module in model.modules())


def write_folder_whole(folder: str | os.PathLike[str], write: Callable[[Path], Any]) -> Path:
    """Call `write` with a temporary folder beside `folder` and rename it when done; on failure leave nothing.

    Raises:
        FileExistsError: `folder` exists and is not an empty folder.
        OSError: the disk cannot take it; the message names `folder`.
    """
    destination = Path(folder).absolute()
    refuse_existing(destination)
    new_parents = [parent for parent in destination.parents if not parent.exists()]
    temporary = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        # mkdtemp makes private folders; a model folder has the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        write(temporary)
        if destination.exists():
            destination.rmdir()
        temporary.rename(destination)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            for parent in new_parents:
                parent.rmdir()
        if _disk_is_full(error):
            raise OSError(f"cannot write {destination} ({error}); nothing was kept, free some space") from error
        raise
    return destination


def _disk_is_full(error: BaseException) -> bool:
    """Libraries written in Rust give the system's error number in the message only."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    found = getattr(error, "errno", None) in numbers
    return found or any(f"(os error {number})" in str(error) for number in numbers)


def refuse_existing(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} already exists and is not an empty folder; give another output folder")


def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Turn a bitsandbytes-quantized model back into plain `nn.Linear` layers, in place, also after a forward.

    The result holds the quantized values in full-precision storage: it is what exact LoRA merging needs (merging into
    4-bit weights quantizes a second time). It can be saved by `save_pretrained`.

    Args:
        model: a `PreTrainedModel` loaded or reloaded with bitsandbytes 4-bit or 8-bit weights.
        dtype: dtype of the new weights; the model's own when None.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not quantized by bitsandbytes.
    """
    method = getattr(model, "quantization_method", None)
    method = str(getattr(method, "value", method))
    if method != "bitsandbytes":
        raise ValueError(
            f"only models quantized by bitsandbytes can be dequantized, but {type(model).__name__} is "
            f"{'not quantized' if method == 'None' else f'quantized by {method}'}; load the full-precision checkpoint"
        )
    restore_four_bit_layout(model)
    model = model.dequantize(dtype=dtype)
    _forget_deserialization(model)
    return model


def _forget_deserialization(model: Any) -> None:
    """Drop the load operations that made quantized layers, which `save_pretrained` would otherwise try to revert."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        kept = [conversion for conversion in conversions if not _makes_quantized_layers(conversion)]
        model._weight_conversions = kept or None


def _makes_quantized_layers(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))
