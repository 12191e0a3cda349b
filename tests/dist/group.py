"""Real processes with gloo: one function, run by each of them, that must end without error in all."""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(size: int, work: Callable[..., None], *args: Any, timeout: float = 60) -> None:
    """Call ``work(*args)`` in ``size`` processes that form a gloo group; raise the first one's error."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (size, _free_port(), folder, timeout, work, args), nprocs=size, join=True)  # pyright: ignore


def exit_codes(size: int, work: Callable[..., None], *args: Any, timeout: float = 60) -> list[int | None]:
    """The same where a process may die: the others go on, and nothing is raised."""
    with tempfile.TemporaryDirectory() as folder:
        rest = (size, _free_port(), folder, timeout, work, args)
        return started(mp.get_context("spawn"), _enter, size, *rest, limit=240)


def started(
    context: Any, enter: Callable[..., None], size: int, *args: Any, limit: float | None = None
) -> list[int | None]:
    """Call ``enter(rank, *args)`` in as many processes; their exit codes, None of one that takes too long."""
    team = [context.Process(target=enter, args=(rank, *args)) for rank in range(size)]
    for process in team:
        process.start()
    for process in team:
        process.join(limit)
    return [process.exitcode for process in team]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _enter(
    rank: int,
    size: int,
    port: int,
    folder: str,
    timeout: float,
    work: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_SIZE=str(size),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    try:
        work(*args)
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        raise
    dist.barrier()
    dist.destroy_process_group()
