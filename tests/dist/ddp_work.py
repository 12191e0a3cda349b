"""What the processes of test_ddp.py do: torch's DistributedDataParallel around an adapted model."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graft
from tests.dist import apart
from tests.dist.dtensor_work import Net, adapt, batches, make, values

Between = Callable[[DistributedDataParallel], object]


def wrapped() -> DistributedDataParallel:
    model = make()
    adapt(model)
    return DistributedDataParallel(model)


def train(model: nn.Module, between: Between | None = None, micro: int = 1) -> torch.Tensor:
    """Losses of each step over all processes; ``micro`` parts of a batch are accumulated."""
    spread = isinstance(model, DistributedDataParallel)
    part, parts = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses: list[torch.Tensor] = []
    for batch in batches():
        total = torch.zeros(())
        for n, x in enumerate(batch.chunk(parts)[part].chunk(micro)):
            with model.no_sync() if spread and n + 1 < micro else nullcontext():
                loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()) / micro
                loss.backward()
            total += loss.detach()
            if between is not None:
                between(model)  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    curve = torch.stack(losses)
    if spread:
        dist.all_reduce(curve)
    return curve / parts


def trained() -> tuple[DistributedDataParallel, Net]:
    """A trained one, and a plain model with the same numbers."""
    model, alone = wrapped(), make()
    train(model)
    adapt(alone)
    alone.load_state_dict(model.module.state_dict())
    return model, alone


def trains(folder: Path) -> None:
    alone = make()
    adapt(alone)
    want = train(alone)
    for micro in (1, 2):
        model = wrapped()
        plain = train(model, micro=micro)
        torch.testing.assert_close(plain, want, atol=2e-6, rtol=0)
        paths = (folder / f"{micro}-{n}" for n in range(100))
        got = train(wrapped(), lambda m, paths=paths: _every_verb(m, next(paths)), micro)
        assert torch.equal(got, plain), (got, plain)
        for name, value in values(model.module).items():
            if "lora_" in name:
                torch.testing.assert_close(value, alone.get_parameter(name), atol=2e-5, rtol=0)


def _every_verb(model: DistributedDataParallel, path: Path) -> None:
    graft.export(model, path)
    graft.fuse(model)
    graft.unfuse(model)
    graft.save(model, path.with_name(f"{path.name}-adapter"))


def fuses(folder: Path) -> None:
    model, alone = trained()
    base = values(model.module)
    assert graft.fuse(model) == graft.fuse(alone) == 6
    want = values(alone)
    assert all(torch.equal(v, want[n]) for n, v in values(model.module).items())
    assert graft.fuse(model) == 0 and graft.unfuse(model) == 6
    assert all(torch.equal(v, base[n]) for n, v in values(model.module).items())
    with graft.fused(model), torch.no_grad():
        assert torch.equal(model.eval()(batches()[0]), alone.eval()(batches()[0]))
    graft.unadapt(model)
    assert type(model.module.head) is nn.Linear


def writes(folder: Path) -> None:
    """The same files as one process; the adapter goes back into a running model."""
    model, alone = trained()
    graft.export(model, folder / "model", dtype=torch.bfloat16)
    graft.save(model, folder / "adapter")
    if dist.get_rank() == 0:
        graft.export(alone, folder / "alone", dtype=torch.bfloat16)
        graft.save(alone, folder / "adapter-alone")
        for one, other in (("model", "alone"), ("adapter", "adapter-alone")):
            for path in (folder / one).iterdir():
                assert path.read_bytes() == (folder / other / path.name).read_bytes(), path
        assert len(load_file(folder / "model" / "model.safetensors")) == len(list(make().parameters()))
    dist.barrier()
    then = values(model.module)
    train(model)
    graft.load(model, folder / "adapter", quiet=True)
    assert all(torch.equal(v, then[n]) for n, v in values(model.module).items())


def refuses(folder: Path) -> None:
    model, _ = trained()
    graft.save(model, folder / "adapter")
    late = DistributedDataParallel(make())
    dist.barrier()
    apart.refuses(lambda: graft.adapt(late, "all-linear", quiet=True), "before DistributedDataParallel")
    apart.refuses(lambda: graft.load(late, folder / "adapter", quiet=True), "before DistributedDataParallel")
    apart.refuses(
        lambda: graft.load(model, folder / "adapter", replace=True, quiet=True), "before Distributed"
    )
    apart.refuses(lambda: graft.fuse(late), "no adapter")
    # one replica has gone its own way
    b = next(p for n, p in model.module.named_parameters() if n.endswith("lora_B"))
    kept = b.detach().clone()
    b.data.add_(dist.get_rank())
    (folder / "out").mkdir(exist_ok=True)
    for call in (
        lambda: graft.fuse(model),
        lambda: graft.export(model, folder / "out" / "model"),
        lambda: graft.save(model, folder / "out" / "adapter"),
    ):
        apart.refuses(call, "different adapters")
    dist.barrier()
    assert not any((folder / "out").iterdir())
    b.data.copy_(kept)
    for check in apart.CHECKS:
        own = folder / check.__name__
        own.mkdir(exist_ok=True)
        check(model, own)


CHECKS: list[Callable[[Path], None]] = [trains, fuses, writes, refuses]


def work(folder: str) -> None:
    """Run the checks one after another; each process writes what went wrong."""
    warnings.simplefilter("ignore")
    results: dict[str, str] = {}
    for check in CHECKS:
        own = Path(folder, check.__name__)
        own.mkdir(exist_ok=True)
        try:
            check(own)
            results[check.__name__] = ""
        except BaseException:
            results[check.__name__] = traceback.format_exc()
            raise
        finally:
            Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(results))
