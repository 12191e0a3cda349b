"""Megatron-core tensor parallelism: fuse against gathering every weight, on real processes.

    torchrun --nproc-per-node 2 benchmarks/tp_wire.py

Three ways run in turn on column- and row-parallel linears, each fusing and unfusing all of them: graft
with its own aligned factors, graft with factors laid out as Megatron-Bridge's (A of a column layer cut along
the rank, B of a row layer along its outputs), and gathering: the whole W, A and B of one layer after another,
the edit on the first process, and W scattered again. For each: seconds (median of the runs, slowest process)
and bytes that a process receives. The size is set by GRAFT_WIDTH, GRAFT_LAYERS and GRAFT_RUNS.
"""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from common import Received, interleaved, machine, median_ratio
from torch import nn

WIDTH = int(os.environ.get("GRAFT_WIDTH", "2048"))
LAYERS = int(os.environ.get("GRAFT_LAYERS", "8"))
RUNS = int(os.environ.get("GRAFT_RUNS", "5"))
RANK = 16


def main() -> None:
    warnings.simplefilter("ignore")
    received = Received()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    measure(build(), lay_out_as_bridge(build()), received)
    dist.destroy_process_group()


def build() -> nn.ModuleList:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    import graft

    torch.manual_seed(0)
    config = ModelParallelConfig(
        tensor_model_parallel_size=dist.get_world_size(),
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
    )
    flags: dict[str, Any] = {"bias": False, "skip_bias_add": True, "config": config}
    flags["init_method"] = nn.init.xavier_normal_
    model = nn.ModuleList()
    for _ in range(LAYERS // 2):
        model.append(ColumnParallelLinear(WIDTH, WIDTH, gather_output=False, **flags))
        model.append(RowParallelLinear(WIDTH, WIDTH, input_is_parallel=True, **flags))
    graft.adapt(model, "all-linear", rank=RANK, init_b="normal", quiet=True)
    return model


def lay_out_as_bridge(model: nn.ModuleList) -> nn.ModuleList:
    from graft.engines.split import Split, mark

    for module in model:
        column = type(module).__name__.endswith("ColumnParallelLinear")
        factor: Any = module.lora_A if column else module.lora_B
        cut = Split(module.tp_group, 0)
        factor.data = cut.cut(factor.data)
        mark(factor, cut)
    return model


def gathered_edit(model: nn.ModuleList, sign: float) -> None:
    """``W ± B·A`` of each layer on the first process, which gathers all three and scatters W."""
    from graft.engines.split import split_of

    for m in model:
        whole: list[torch.Tensor] = []
        for p in (m.weight, m.lora_A, m.lora_B):
            split: Any = split_of(p)
            parts = [torch.empty_like(p) for _ in range(split.size)]
            if split.spread:
                dist.all_gather(parts, p.detach())
            whole.append(split.join(parts) if split.spread else p.detach())
        split = split_of(m.weight)
        pieces = None
        if dist.get_rank() == 0:
            w, a, b = whole
            edited = (w.float() + sign * (b @ a)).to(w.dtype)
            pieces = [p.contiguous() for p in edited.chunk(split.size, dim=split.axis)]
        dist.scatter(m.weight.data, pieces, src=0)


def measure(aligned: nn.ModuleList, bridge: nn.ModuleList, received: Received) -> None:
    import graft

    def both(model: nn.ModuleList) -> None:
        graft.fuse(model)
        graft.unfuse(model)

    def gather() -> None:
        gathered_edit(aligned, 1.0)
        gathered_edit(aligned, -1.0)

    ways = {"aligned": lambda: both(aligned), "bridge": lambda: both(bridge), "gathered": gather}
    told: dict[str, int] = {}

    def watched(name: str, way: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            before = received.bytes
            way()
            told[name] = received.bytes - before
            dist.barrier()  # seconds of the slowest process

        return run

    seconds = interleaved({n: watched(n, w) for n, w in ways.items()}, RUNS)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, told)
    if dist.get_rank() == 0:
        report(seconds, {n: max(figures[n] for figures in every) for n in ways}, len(every))


def report(seconds: dict[str, list[float]], most: dict[str, int], size: int) -> None:
    print(f"{LAYERS} × {WIDTH}×{WIDTH} bf16, rank {RANK}, {size} processes; {machine()}")
    for name, taken in seconds.items():
        print(f"{name:10} {statistics.median(taken) * 1e3:8.0f} ms  {most[name] / 1e6:10.4f} MB received")
    for name in ("aligned", "bridge"):
        faster = median_ratio(seconds["gathered"], seconds[name])
        print(f"{name}: {faster:.2f}× faster, {most['gathered'] / most[name]:.0f}× fewer bytes")


if __name__ == "__main__":
    main()
