"""The table of quantization schemes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# bitsandbytes quantizes 4-bit weights in blocks of 64; its CPU kernel wants whole blocks in a row and tiles of 32 rows.
FOUR_BIT_BLOCK_SIZE = 64
FOUR_BIT_ROW_TILE = 32


@dataclass(frozen=True)
class Scheme:
    """One row of the table.

    Attributes:
        name: what users type.
        library: package that runs it: "bitsandbytes", "torchao" or "torch".
        bits_per_weight: storage of one quantized weight with its scales; a row scale is neglected.
        summary: one sentence.
        configuration: (modules to keep in full precision, compute dtype) -> transformers quantization config; None
            where the scheme is a dtype only.
    """

    name: str
    library: str
    bits_per_weight: float
    summary: str
    configuration: Callable[[list[str], torch.dtype], Any] | None = None

    @property
    def is_four_bit(self) -> bool:
        return self.bits_per_weight < 8


def _bitsandbytes_four_bit(quant_type: str, double: bool) -> Callable[[list[str], torch.dtype], Any]:
    def build(full_precision: list[str], compute_dtype: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=full_precision,
        )

    return build


def _bitsandbytes_int8(full_precision: list[str], compute_dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=full_precision)


def _torchao_int8_weights(full_precision: list[str], compute_dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=full_precision)


def _torchao_int8_dynamic(full_precision: list[str], compute_dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=full_precision)


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "nf4",
            "bitsandbytes",
            4.5,
            "4-bit normal-float blocks of 64 (QLoRA, arXiv 2305.14314).",
            _bitsandbytes_four_bit("nf4", double=False),
        ),
        Scheme(
            "nf4-double",
            "bitsandbytes",
            4.127,
            "nf4 whose block scales are quantized to 8 bits as well.",
            _bitsandbytes_four_bit("nf4", double=True),
        ),
        Scheme(
            "fp4",
            "bitsandbytes",
            4.5,
            "4-bit floating-point blocks of 64.",
            _bitsandbytes_four_bit("fp4", double=False),
        ),
        Scheme(
            "fp4-double",
            "bitsandbytes",
            4.127,
            "fp4 whose block scales are quantized to 8 bits as well.",
            _bitsandbytes_four_bit("fp4", double=True),
        ),
        Scheme(
            "int8",
            "bitsandbytes",
            8,
            "8-bit rows with outlier columns of the activations apart (LLM.int8(), arXiv 2208.07339).",
            _bitsandbytes_int8,
        ),
        Scheme("bf16", "torch", 16, "All weights in bfloat16; nothing to install."),
        Scheme("int8-torchao", "torchao", 8, "8-bit rows; activations stay as they are.", _torchao_int8_weights),
        Scheme(
            "int8-torchao-dynamic",
            "torchao",
            8,
            "8-bit rows; activations quantized to 8 bits per token at run time.",
            _torchao_int8_dynamic,
        ),
    )
}
