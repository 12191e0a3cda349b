"""What every benchmark needs: interleaved runs, medians and ratios, and a line about the machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def interleaved(ways: dict[str, Callable[[], object]], runs: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each way, run in turn (A B C A B C …), so that a drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(warm + runs):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if run >= warm:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def median_ratio(one: list[float], other: list[float]) -> float:
    """Median over the runs of one / other, pair by pair."""
    return statistics.median(x / y for x, y in zip(one, other, strict=True))


def machine() -> str:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
