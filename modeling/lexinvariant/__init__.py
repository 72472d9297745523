"""Lexinvariant language model: any vocabulary, invariance to the names of symbols, a transformer's speed."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_lexinvariant import LexinvariantConfig as LexinvariantConfig
    from .decipher_probe import Decipherment as Decipherment
    from .decipher_probe import DecipherProbe as DecipherProbe
    from .evaluation import PositionCurve as PositionCurve
    from .evaluation import alpha_covariance as alpha_covariance
    from .evaluation import position_curve as position_curve
    from .modeling_lexinvariant import LexinvariantForCausalLM as LexinvariantForCausalLM
    from .modeling_lexinvariant import LexinvariantModel as LexinvariantModel
    from .symbolic_tasks import Cipher as Cipher
    from .symbolic_tasks import SymbolicTask as SymbolicTask
    from .symbolic_tasks import TaskAccuracy as TaskAccuracy
    from .symbolic_tasks import evaluate_task as evaluate_task
    from .symbolic_tasks import make_cipher as make_cipher
    from .symbolic_tasks import make_lookup as make_lookup
    from .symbolic_tasks import make_permutation as make_permutation
    from .symbolic_tasks import task_batch as task_batch

_LAZY = {
    "Cipher": ".symbolic_tasks",
    "DecipherProbe": ".decipher_probe",
    "Decipherment": ".decipher_probe",
    "LexinvariantConfig": ".configuration_lexinvariant",
    "LexinvariantForCausalLM": ".modeling_lexinvariant",
    "LexinvariantModel": ".modeling_lexinvariant",
    "PositionCurve": ".evaluation",
    "SymbolicTask": ".symbolic_tasks",
    "TaskAccuracy": ".symbolic_tasks",
    "alpha_covariance": ".evaluation",
    "evaluate_task": ".symbolic_tasks",
    "make_cipher": ".symbolic_tasks",
    "make_lookup": ".symbolic_tasks",
    "make_permutation": ".symbolic_tasks",
    "position_curve": ".evaluation",
    "task_batch": ".symbolic_tasks",
}

__all__ = list(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)
