"""Timing and memory for the benchmark scripts: interleaved runs on one thread, medians, peak resident memory."""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(cases: dict[str, Callable[[], object]], rounds: int = 7, calls: int = 1) -> dict[str, float]:
    """Median CPU seconds of each case; every round runs all cases in turn, after one round that is not counted.

    calls: how often a case runs when it is its turn, of which the mean counts. With 1, every call finds the caches as
    the other cases left them; with several, most find them as a program does that does one thing.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for counted in range(-1, rounds):
        for name, case in cases.items():
            start = time.process_time()
            for _ in range(calls):
                case()
            if counted >= 0:
                seconds[name].append((time.process_time() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def extra_memory(prepare: Callable[..., Callable[[], object]], *arguments) -> float:
    """Mebibytes by which one call of `prepare(*arguments)()` raises the resident memory of a fresh process at its
    peak."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_growth, (prepare, arguments))


def _peak_growth(prepare, arguments) -> float:
    torch.set_num_threads(1)
    case = prepare(*arguments)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    case()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def report(
    name: str,
    description: str,
    figures: dict,
    packages: tuple[str, ...] = ("torch", "transformers", "sentence-transformers"),
) -> None:
    """Print the figures and write them to `results/<name>.json` with the versions that gave them."""
    result = {
        "description": description,
        "figures": figures,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {package: version(package) for package in packages},
    }
    text = json.dumps(result, indent=2)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def rounded(values: dict[str, float], digits: int = 4) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}
