"""What the processes of test_dtensor.py do: each check runs on all of them, against one process's result."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import graft
from graft.engines.masters import assign
from tests.dist import apart

WORDS = 9  # uneven over 2 and over 4 processes, where the last holds nothing
TARGETS = ["embed", "up", "down", "head"]


class Block(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 12)
        self.blocks = nn.ModuleList([Block(12, 18), Block(12, 20)])
        self.head = nn.Linear(12, WORDS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make() -> Net:
    torch.manual_seed(0)
    return Net()


def adapt(model: nn.Module) -> None:
    torch.manual_seed(1)
    graft.adapt(model, TARGETS, rank=3, alpha=5, quiet=True)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, WORDS, (8, 6), generator=generator) for _ in range(4)]


def train(model: nn.Module, part: int = 0, parts: int = 1) -> torch.Tensor:
    """Losses of each step on this process's part of the batches."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses: list[torch.Tensor] = []
    for batch in batches():
        x = batch.chunk(parts)[part]
        loss = F.cross_entropy(model(x).flatten(0, 1).float(), x.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: full(p).detach().clone() for name, p in model.named_parameters()}


def shard(model: Net, mesh: Any, **options: Any) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def parallel(model: Net, mesh: Any) -> None:
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.up": ColwiseParallel(),
        "blocks.*.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)


def spread(model: Net, kind: str, **options: Any) -> tuple[int, int]:
    """Spread the model; which part of the data is this process's, of how many."""
    world = dist.get_world_size()
    if kind == "tp":
        parallel(model, init_device_mesh("cpu", (world,)))
        return 0, 1
    if kind == "2d":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        parallel(model, mesh["tp"])
        shard(model, mesh["dp"], **options)
        return mesh["dp"].get_local_rank(), world // 2
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "parts"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    shard(model, mesh, **options)
    return dist.get_rank(), world


def built(kind: str, order: str, **options: Any) -> tuple[Net, tuple[int, int]]:
    model = make()
    if order == "before":
        adapt(model)
    # other random numbers on every process: the factors must not depend on them
    torch.manual_seed(dist.get_rank())
    part = spread(model, kind, **options)
    if order == "after":
        if dist.get_rank() == 0:
            adapt(model)
        else:
            graft.adapt(model, TARGETS, rank=3, alpha=5, quiet=True)
    return model, part


def trained_alone() -> Net:
    model = make()
    adapt(model)
    train(model)
    return model


def give(model: nn.Module, factors: dict[str, torch.Tensor]) -> None:
    """Exactly one process's factors, for comparisons bit for bit."""
    for name, p in model.named_parameters():
        if name.rpartition(".")[2].startswith("lora_"):
            assign(p, factors[name])


# --- the checks, each on a model that is spread in some way ---------------------------------------------


def trains(folder: Path, kind: str, order: str) -> None:
    alone = make()
    adapt(alone)
    want = train(alone)
    model, part = built(kind, order)
    before = values(model)
    got = train(model, *part)
    if part[1] > 1:
        dist.all_reduce(got)
        got /= dist.get_world_size()
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    for name, value in values(model).items():
        if "lora_" in name:
            torch.testing.assert_close(value, alone.get_parameter(name).detach(), atol=2e-5, rtol=0)
        else:
            assert torch.equal(value, before[name]), f"{name} trained although it is frozen"


def fuses(folder: Path, kind: str, order: str) -> None:
    alone = trained_alone()
    base, factors = values(make()), values(alone)
    graft.fuse(alone)
    want = values(alone)
    model, _ = built(kind, order)
    give(model, factors)
    model.eval()
    with torch.no_grad():
        factored = full(model(batches()[0]))  # leaves the root unsharded: fuse must not edit that copy
    assert graft.fuse(model) == 6
    for name, value in values(model).items():
        assert torch.equal(value, want[name]), f"{name} is fused to other bits"
    with torch.no_grad():
        torch.testing.assert_close(full(model(batches()[0])), factored, atol=1e-5, rtol=0)
    assert graft.unfuse(model) == 6
    for name, value in values(model).items():
        assert "lora_" in name or torch.equal(value, base[name]), f"{name} is not the base again"
    graft.fuse(model)
    graft.unadapt(model)
    assert {n: (v == base[n]).all() for n, v in values(model).items()}.keys() == base.keys()
    assert all(torch.equal(v, base[n]) for n, v in values(model).items())
    assert not any(isinstance(m, graft.Adapted) for m in model.modules())


def exports(folder: Path, kind: str, order: str) -> None:
    alone = trained_alone()
    factors = values(alone)
    model, part = built(kind, order)
    give(model, factors)
    graft.export(model, folder / "exported")
    graft.export(model, folder / "half", dtype=torch.bfloat16)
    graft.export(model, folder / "gathered", dtype=torch.bfloat16, gather=True)
    graft.save(model, folder / "adapter")
    after = values(model)
    assert all(torch.equal(after[n], v) for n, v in factors.items()), "export changed the model"
    if dist.get_rank() == 0:
        graft.save(alone, folder / "adapter-alone")
        ours = load_file(folder / "adapter" / "adapter_model.safetensors")
        theirs = load_file(folder / "adapter-alone" / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], v) for n, v in theirs.items())
        graft.export(alone, folder / "half-alone", dtype=torch.bfloat16)
        graft.fuse(alone)
        want = {n: v for n, v in values(alone).items() if "lora_" not in n}
        got = load_file(folder / "exported" / "model.safetensors")
        assert got.keys() == want.keys()
        assert all(torch.equal(got[n], v) for n, v in want.items())
        half = load_file(folder / "half" / "model.safetensors")
        gathered = folder / "gathered" / "model.safetensors"
        assert gathered.read_bytes() == (folder / "half" / "model.safetensors").read_bytes()
        assert all(
            torch.equal(half[n], v) for n, v in load_file(folder / "half-alone" / "model.safetensors").items()
        )
    dist.barrier()
    fresh = make()
    spread(fresh, kind)
    graft.load(fresh, folder / "adapter", quiet=True)
    loaded = values(fresh)
    assert all(torch.equal(loaded[n], v) for n, v in factors.items() if "lora_" in n)
    train(model, *part)  # goes on


def checkpoints(folder: Path, kind: str, order: str) -> None:
    """Sharded and full state dicts go out and come back; what test_dtensor.py reads is left there."""
    factors = values(trained_alone())
    model, _ = built(kind, order)
    give(model, factors)
    dcp.save({"adapter": graft.state_dict(model)}, checkpoint_id=str(folder / "dcp"))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        assert all(torch.equal(whole[n], v) for n, v in factors.items())
        torch.save(factors, folder / "factors.pt")
    other, _ = built("tp" if kind == "fsdp" else "fsdp", "after" if order == "before" else "before")
    dcp.load({"adapter": graft.state_dict(other)}, checkpoint_id=str(folder / "dcp"))
    got = values(other)
    assert all(torch.equal(got[n], v) for n, v in factors.items() if "lora_" in n)
    third, _ = built(kind, order)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(third, {n: v.clone() for n, v in whole.items()}, options=options)
    got = values(third)
    assert all(torch.equal(got[n], v) for n, v in factors.items())


def loads_from_four(folder: Path, kind: str, order: str) -> None:
    """A checkpoint of another number of processes."""
    source = folder.parent / "4-2d-after-checkpoints"
    model, _ = built(kind, order)
    dcp.load({"adapter": graft.state_dict(model)}, checkpoint_id=str(source / "dcp"))
    want = torch.load(source / "factors.pt", weights_only=True)
    got = values(model)
    assert all(torch.equal(got[n], v) for n, v in want.items() if "lora_" in n)


def mixes_precision(folder: Path, kind: str, order: str) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    alone = make()
    adapt(alone)
    want = train(alone)
    model, part = built(kind, order, mp_policy=policy)
    got = train(model, *part)
    dist.all_reduce(got)
    torch.testing.assert_close(got / dist.get_world_size(), want, atol=2e-2, rtol=0)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    give(model, values(alone))
    graft.fuse(model)
    graft.fuse(alone)
    bits = values(alone)
    assert all(torch.equal(v, bits[n]) for n, v in values(model).items())


# --- refusals ---------------------------------------------------------------------------------------------


def refuses(call: Callable[[], Any], says: str) -> None:
    """Every process raises, and at least one of them says why."""
    try:
        call()
    except graft.GraftError as error:
        said = [""] * dist.get_world_size()
        dist.all_gather_object(said, str(error))
        assert any(says in text for text in said), said
    else:
        raise AssertionError("nothing was raised here")


def refuses_unequal(folder: Path, kind: str, order: str) -> None:
    rank = dist.get_rank()
    late = make()
    spread(late, kind)
    refuses(lambda: graft.adapt(late, TARGETS[:2] if rank else TARGETS, quiet=True), "different adapters")
    refuses(lambda: graft.adapt(late, TARGETS, alpha=2.0 + rank, quiet=True), "different adapters")
    early = make()
    graft.adapt(early, TARGETS, alpha=2.0 + rank, quiet=True)
    spread(early, kind)
    refuses(lambda: graft.fuse(early), "different adapters")
    refuses(lambda: graft.export(early, folder / "out"), "different adapters")
    other, _ = built(kind, order)
    if rank:
        other.register_buffer("mine", torch.zeros(2))
    refuses(lambda: graft.export(other, folder / "out"), "tensors of other names or shapes")
    assert not (folder / "out").exists()


def refuses_drift(folder: Path, kind: str, order: str) -> None:
    """A factor that every process keeps in full has other numbers on one."""
    model, _ = built(kind, order)
    up = model.get_submodule("blocks.0.up")
    assert all(q.is_replicate() for q in up.lora_A.placements)
    with torch.no_grad():
        up.lora_A.to_local().add_(dist.get_rank())
    refuses(lambda: graft.fuse(model), "other values on another process")


def differs(folder: Path, kind: str, order: str) -> None:
    model, _ = built(kind, order)
    give(model, values(trained_alone()))
    for check in apart.CHECKS:
        own = folder / check.__name__
        own.mkdir(exist_ok=True)
        check(model, own)


def fails_together(folder: Path, kind: str, order: str) -> None:
    """One process's error leaves every process as it was, and no directory."""
    model, _ = built(kind, order)
    give(model, values(trained_alone()))
    weight = model.get_submodule("blocks.1.down").weight
    with torch.no_grad():
        model.get_submodule("blocks.1.down").lora_B.to_local().fill_(1e37)
        if dist.get_rank() == 1:
            weight.to_local().fill_(torch.finfo(torch.float32).max)
    before = values(model)
    refuses(lambda: graft.fuse(model), "beyond the range")
    refuses(lambda: graft.export(model, folder / "out"), "beyond the range")
    assert not any(folder.iterdir())
    after = values(model)
    assert all(torch.equal(after[n], v) for n, v in before.items())


def death(folder: str, gather: bool) -> None:
    from graft.engines.dtensor import ENGINE

    model, _ = built("fsdp", "after")
    apart.dies_in_export(model, ENGINE, Path(folder), gather)


CASES: dict[int, list[tuple[str, str, list[Callable[[Path, str, str], None]]]]] = {
    4: [
        ("2d", "after", [trains, fuses, exports, checkpoints]),
        ("2d", "before", [trains, fuses, exports]),
        ("hsdp", "after", [trains, fuses]),
        ("fsdp", "before", [trains, fuses, exports, checkpoints, mixes_precision]),
    ],
    2: [
        ("fsdp", "after", [trains, fuses, exports, checkpoints, mixes_precision, refuses_unequal]),
        ("fsdp", "after", [refuses_drift, differs, fails_together, loads_from_four]),
        ("fsdp", "before", [trains, fuses, mixes_precision, loads_from_four, differs]),
        ("tp", "after", [trains, fuses, exports, checkpoints, refuses_drift, fails_together, differs]),
        ("tp", "before", [trains, fuses, exports, checkpoints, loads_from_four]),
    ],
}


def names(size: int) -> list[str]:
    return [f"{kind}-{order}-{c.__name__}" for kind, order, checks in CASES[size] for c in checks]


def work(folder: str) -> None:
    """Run this group's checks one after another; each process writes what went wrong."""
    warnings.simplefilter("ignore")
    size, rank = dist.get_world_size(), dist.get_rank()
    results: dict[str, str] = {}
    for kind, order, checks in CASES[size]:
        for check in checks:
            name = f"{kind}-{order}-{check.__name__}"
            own = Path(folder, f"{size}-{name}")
            own.mkdir(exist_ok=True)
            try:
                check(own, kind, order)
                results[name] = ""
            except BaseException:
                results[name] = traceback.format_exc()
                Path(folder, f"{size}.{rank}.json").write_text(json.dumps(results))
                raise
            Path(folder, f"{size}.{rank}.json").write_text(json.dumps(results))
            dist.barrier()
