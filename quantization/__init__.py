"""Quantized variants of a checkpoint: the schemes, one command, a fidelity report, and a guarded save."""

from rarezoo.quantization.fidelity import EvaluationSet as EvaluationSet
from rarezoo.quantization.fidelity import measure_fidelity as measure_fidelity
from rarezoo.quantization.four_bit_guard import dequantize as dequantize
from rarezoo.quantization.four_bit_guard import restore_four_bit_layout as restore_four_bit_layout
from rarezoo.quantization.four_bit_guard import save_quantized as save_quantized
from rarezoo.quantization.quantize import quantize as quantize
from rarezoo.quantization.schemes import SCHEMES as SCHEMES
from rarezoo.quantization.schemes import Scheme as Scheme
