"""What every benchmark needs: interleaved runs, medians and ratios, bytes received, and the machine."""

from __future__ import annotations

import inspect
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


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


class Received:
    """Bytes that this process receives by the collectives of torch.distributed, from now on.

    Made before a library is imported that keeps the functions which it finds (DeepSpeed).
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._count("all_gather_into_tensor", 0, _others)
        self._count("all_gather", 0, _others)
        self._count("gather", 1, _others)
        self._count("all_to_all_single", 0, _others)
        self._count("broadcast", 0, lambda t, g, source: 0 if source else t[0].nbytes)
        self._count("scatter", 0, lambda t, g, source: 0 if source else t[0].nbytes)
        self._count("all_reduce", 0, lambda t, g, _: t[0].nbytes)
        self._count("reduce_scatter_tensor", 0, lambda t, g, _: t[0].nbytes * (dist.get_world_size(g) - 1))

    def _count(self, name: str, at: int, size: Callable[[list[torch.Tensor], Any, bool], int]) -> None:
        own = getattr(dist, name)
        names = list(inspect.signature(own).parameters)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            many, source = given.get(names[at]), dist.get_rank() == given.get("src", 0)
            outs = [many] if isinstance(many, torch.Tensor) else many or []
            self.bytes += size(outs, given.get("group"), source)
            return own(*args, **kwargs)

        setattr(dist, name, call)


def _others(outs: list[torch.Tensor], group: Any, _: bool) -> int:
    size = dist.get_world_size(group)
    return sum(o.nbytes for o in outs) * (size - 1) // size


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
