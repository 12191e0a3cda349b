"""Functions that every process of a group calls, one after another; what failed goes to a file.

``test_megatron.py`` starts the processes and reads the files. To run some of them alone, name parts of
their names in the environment: ``MEGATRON_CHECKS=fuse,dropout``.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

from tests.dist.group import started
from tests.dist.mcore import shim

Check = Callable[[Path], None]

_THEMES = ("training", "fusing", "options", "experts", "files", "refusals")
_CHECKS: dict[int, dict[str, Check]] = {}


def check(*worlds: int) -> Callable[[Check], Check]:
    """Make a function a check for groups of these sizes; its argument is an empty folder of its own."""

    def add(function: Check) -> Check:
        for world in worlds:
            _CHECKS.setdefault(world, {})[function.__name__] = function
        return function

    return add


def checks(world: int) -> dict[str, Check]:
    for theme in _THEMES:
        import_module(f"tests.dist.mcore.{theme}")
    only = os.environ.get("MEGATRON_CHECKS", "").split(",")
    return {n: f for n, f in _CHECKS[world].items() if any(part in n for part in only)}


def work(rank: int, world: int, folder: str) -> None:
    shim.start(rank, world, f"{folder}/store")
    failed: dict[str, str] = {}
    for name, function in checks(world).items():
        own = Path(folder, name)
        own.mkdir(exist_ok=True)
        began = time.perf_counter()
        try:
            function(own)
            failed[name] = ""
        except BaseException:
            failed[name] = traceback.format_exc()
        if os.environ.get("MEGATRON_TIMES") and rank == 0:
            print(f"{world} {name:55} {time.perf_counter() - began:6.2f}", flush=True)
        Path(folder, f"{rank}.json").write_text(json.dumps(failed))
        ok = torch.tensor([int(not failed[name])])
        dist.all_reduce(ok, op=dist.ReduceOp.MIN)
        if not ok:
            break
    dist.destroy_process_group()


def start(world: int, function: Callable[[int, int, str], None], folder: Path) -> list[int | None]:
    """Call ``function(rank, world, folder)`` in as many processes; their exit codes."""
    context = torch.multiprocessing.get_context("forkserver")
    # the server imports once what all processes need
    context.set_forkserver_preload(["graft", "megatron.core.models.gpt", "megatron.core.dist_checkpointing"])
    return started(context, function, world, world, str(folder))


def launch(world: int, folder: Path) -> list[dict[str, str]]:
    """The failures that each process of a new group wrote: ``{check: traceback, or nothing}``."""
    start(world, work, folder)
    files = [folder / f"{rank}.json" for rank in range(world)]
    return [json.loads(f.read_text()) if f.exists() else {} for f in files]
