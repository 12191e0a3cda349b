"""ZeRO-3: fuse and export against gathering every parameter, on real processes.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 benchmarks/zero3.py

The ways run in turn on one engine: graft's fuse and unfuse against the same edit inside
``GatheredParameters``, one weight at a time (DeepSpeed-VisualChat's way), and graft's export, with each
process writing its slices and with weights that travel, against fusing so, gathering every parameter for
``torch.save`` on the first process, and unfusing. Graft's files are synced to the disk, VisualChat's are not.
For each: seconds (median of the runs, slowest process), bytes that a process receives, and the growth of its
anonymous memory. GRAFT_WIDTH, GRAFT_LAYERS, GRAFT_RUNS and GRAFT_DTYPE (bf16, fp32) set the size.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Received, interleaved, machine, median_ratio
from torch import nn

WIDTH = int(os.environ.get("GRAFT_WIDTH", "2048"))
LAYERS = int(os.environ.get("GRAFT_LAYERS", "8"))
RUNS = int(os.environ.get("GRAFT_RUNS", "3"))
RANK = 16
DTYPE = os.environ.get("GRAFT_DTYPE", "bf16")


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


@contextmanager
def peak(found: list[int]) -> Generator[None]:
    """Append the growth of anonymous memory inside the block, sampled every 2 ms."""
    start, most, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found.append(most)


def main() -> None:
    received = Received()
    import deepspeed

    os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    torch.set_num_threads(1)
    engine = build(deepspeed)
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folders, 0)
    try:
        measure(engine, deepspeed, Path(folders[0]), received)
    finally:
        dist.barrier()
        shutil.rmtree(folders[0], ignore_errors=True)
    dist.destroy_process_group()


def build(deepspeed: Any) -> Any:
    import graft

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": DTYPE == "bf16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    graft.adapt(model, "all-linear", rank=RANK, quiet=True)
    factors = [p for p in model.parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters([m.lora_B for m in model], modifier_rank=0), torch.no_grad():
        if dist.get_rank() == 0:
            for module in model:
                nn.init.normal_(module.lora_B, std=1e-3)
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(factors), config=config)[0]


def measure(engine: Any, deepspeed: Any, folder: Path, received: Received) -> None:
    import graft

    gathered, model, number = deepspeed.zero.GatheredParameters, engine.module, itertools.count()

    def edit(sign: float) -> None:
        for m in model:
            with gathered([m.weight, m.lora_A, m.lora_B], modifier_rank=0), torch.no_grad():
                if dist.get_rank() == 0:
                    m.weight += sign * (m.lora_B @ m.lora_A)

    def graft_fuse() -> None:
        graft.fuse(engine)
        graft.unfuse(engine)

    def gathered_fuse() -> None:
        edit(1.0)
        edit(-1.0)

    def graft_export() -> None:
        graft.export(engine, folder / f"graft-{next(number)}")

    def travel_export() -> None:
        graft.export(engine, folder / f"travel-{next(number)}", gather=True)

    def gathered_export() -> None:
        edit(1.0)
        state: dict[str, torch.Tensor] = {}
        for name, p in model.named_parameters():
            with gathered([p]):
                if dist.get_rank() == 0 and not p.requires_grad:
                    state[name] = p.detach().cpu().clone()
        if dist.get_rank() == 0:
            torch.save(state, folder / "pytorch_model.bin")
        edit(-1.0)

    ways = {f.__name__: f for f in (graft_fuse, gathered_fuse, graft_export, travel_export, gathered_export)}
    told: dict[str, list[int]] = {name: [] for name in ways}
    grown: dict[str, list[int]] = {name: [] for name in ways}

    def watched(name: str, way: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            before = received.bytes
            with peak(grown[name]):
                way()
            told[name].append(received.bytes - before)
            dist.barrier()  # seconds of the slowest process

        return run

    seconds = interleaved({n: watched(n, w) for n, w in ways.items()}, RUNS)
    figures = {n: (told[n][-1], max(grown[n][1:])) for n in ways}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, figures)
    if dist.get_rank() == 0:
        report(seconds, every)


def report(seconds: dict[str, list[float]], every: list[dict[str, tuple[int, int]]]) -> None:
    print(f"{LAYERS} × Linear({WIDTH}, {WIDTH}) {DTYPE}, rank {RANK}, {len(every)} processes; {machine()}")
    for name, taken in seconds.items():
        most = max(figures[name][0] for figures in every)
        growth = max(figures[name][1] for figures in every)
        median = statistics.median(taken)
        print(
            f"{name:16} {median * 1e3:8.0f} ms  {most / 1e6:9.2f} MB received  {growth / 1e6:7.1f} MB grown"
        )
    for verb in ("fuse", "export"):
        faster = median_ratio(seconds[f"gathered_{verb}"], seconds[f"graft_{verb}"])
        fewer = [max(figures[f"{way}_{verb}"][0] for figures in every) for way in ("gathered", "graft")]
        print(f"{verb}: {faster:.2f}× faster, {fewer[0] / fewer[1]:.1f}× fewer bytes")


if __name__ == "__main__":
    main()
