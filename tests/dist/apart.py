"""What one process does or has otherwise than the rest: every process must raise, and none may wait.

For every engine that can be worked on as a whole: ``model`` is an adapted one, or an engine object, on all
processes, with B not zero. Each check leaves it as it was.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import graft
from graft.adapted import factor_names, slots_of
from graft.engines.wrappers import unwrap
from graft.shared_files import Filler


def refuses(call: Callable[[], Any], *says: str) -> None:
    """Every process raises, and each text is said by one of them."""
    said = "nothing"
    try:
        call()
    except graft.GraftError as error:
        said = str(error)
    every = [""] * dist.get_world_size()
    dist.all_gather_object(every, said)
    assert "nothing" not in every, every
    assert all(any(text in one for one in every) for text in says), every


def first_site(model: Any) -> Any:
    return next(m for m in unwrap(model).modules() if slots_of(m))


def local(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter, to be edited behind everybody's back."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor  # type: ignore[attr-defined]
    with torch.no_grad():
        return parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()


def bits(model: Any) -> dict[str, torch.Tensor]:
    graft.fuse(model, [])  # no site is named: FSDP2's units drop their copies, and nothing is fused
    return {n: local(p).clone() for n, p in unwrap(model).named_parameters()}


def arguments(model: Any, folder: Path) -> None:
    """One process calls a verb with other arguments."""
    last = dist.get_rank() == dist.get_world_size() - 1
    name = next(n for n, m in unwrap(model).named_modules() if slots_of(m))
    refuses(lambda: graft.fuse(model, "nowhere" if last else name), "names no adapted weight", "different")
    refuses(lambda: graft.fuse(model, name if last else None), "different adapters")
    refuses(lambda: graft.fuse(model, "nowhere"), "names no adapted weight")


def scales(model: Any, folder: Path) -> None:
    """One process has another scale."""
    site = next(iter(slots_of(first_site(model)).values())).site
    kept = site.scale
    site.scale += dist.get_rank()
    for call in (
        lambda: graft.fuse(model),
        lambda: graft.save(model, folder / "adapter"),
        lambda: graft.export(model, folder / "model"),
    ):
        refuses(call, "different adapters")
    site.scale = kept
    assert not any(folder.iterdir())


def files(model: Any, folder: Path) -> None:
    """One process reads another file, or none; the process that writes cannot."""
    last = dist.get_rank() == dist.get_world_size() - 1
    graft.save(model, folder / "one")
    before = bits(model)
    for p in unwrap(model).parameters():
        if p.requires_grad:
            local(p).mul_(2)
    graft.save(model, folder / "two")
    for p in unwrap(model).parameters():
        if p.requires_grad:
            local(p).mul_(0.5)
    dist.barrier()
    refuses(lambda: graft.load(model, folder / ("none" if last else "two"), quiet=True), "none", "different")
    refuses(lambda: graft.load(model, folder / ("two" if last else "one"), quiet=True), "different adapters")
    refuses(lambda: graft.save(model, folder / "one"), "already exists", "another process")
    refuses(lambda: graft.export(model, folder / "one"), "already exists", "another process")
    after = bits(model)
    assert all(torch.equal(after[n], was) for n, was in before.items())


def while_fused(model: Any, folder: Path) -> None:
    """A changes while it is fused, on all processes and on one; a fused weight is edited on one."""
    before, module = bits(model), first_site(model)
    last = dist.get_rank() == dist.get_world_size() - 1
    parameter = next(iter(slots_of(module)))
    weight, a = (local(getattr(module, n)) for n in (parameter, factor_names(parameter)[0]))
    kept, whole = a.clone(), weight.numel() > 0
    graft.fuse(model)
    fused = weight.clone()
    a.add_(1)
    for call in (lambda: graft.unfuse(model), lambda: graft.fuse(model)):
        refuses(call, "changed while it was fused")
    refuses(lambda: graft.export(model, folder / "model"), "changed while it was fused")
    a.copy_(kept)
    if last:
        a.add_(1)
    refuses(lambda: graft.unfuse(model), "")
    a.copy_(kept)
    if last and whole:
        weight.view(-1)[0] += 1
    refuses(lambda: graft.unfuse(model), "edited after fuse", "another process")
    weight.copy_(fused)
    assert graft.unfuse(model) > 0
    after = bits(model)
    assert all(torch.equal(after[n], was) for n, was in before.items())
    assert not any(folder.iterdir())


CHECKS: list[Callable[[Any, Path], None]] = [arguments, scales, files, while_fused]


def dies_in_export(model: Any, engine: object, folder: Path, gather: bool) -> None:
    """The second process dies while it sends or writes; the first reports what it met and what is left."""
    owner, name = (type(engine), "collect") if gather else (Filler, "write")
    real, calls = getattr(owner, name), iter(range(1000))

    def dying(self: Any, *args: Any) -> Any:
        if dist.get_rank() == 1 and next(calls) == 4:
            os._exit(7)
        return real(self, *args)

    setattr(owner, name, dying)
    began = time.perf_counter()
    try:
        graft.export(model, folder / "out" / "model", gather=gather)
        met = "nothing"
    except Exception as error:
        met = repr(error)
    left = [str(p) for p in (folder / "out").rglob("*")]
    report = {"met": met, "left": left, "seconds": time.perf_counter() - began}
    Path(folder, "death.json").write_text(json.dumps(report))
    os._exit(0)


def stopped_and_left_nothing(folder: Path) -> None:
    """What the first process of :func:`dies_in_export` must have met."""
    report = json.loads((folder / "death.json").read_text())
    assert report["met"] != "nothing" and not report["left"], report
    assert report["seconds"] < 60, report
