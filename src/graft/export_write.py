"""Tensors into the files of a model: each process writes what it holds, or sends it to the one that writes.

Where all processes see the directory, no weight travels: every element is written by one process that
holds it, at its place in the one file, a block at a time. Elsewhere, and for tensors that are stored in
another form than they have in memory, whole tensors travel one by one. Both ways give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from .atomic import atomic_directory, output_errors
from .effective import fused_blocks, part_blocks
from .engines import Part, engine_of, world
from .engines.wrappers import Together, is_spread, together
from .errors import StateError
from .held import Held, deltas
from .shared_files import Filler, Plan, lay_out

#: the tensor, on the process that writes; None on the others, which call it in the same order
Make = Callable[[], "torch.Tensor | None"]


@dataclass(frozen=True)
class Planned:
    """One tensor of the output.

    Args:
        like: a meta tensor of the global shape.
        dtype: that it is stored in.
        make: brings it to the process that writes. Collective where it is spread.
        same: equal for tensors that are one in memory.
        value: the model's own tensor, where its elements are stored in its own order; else None.
        held: its site, where it is adapted.
    """

    like: torch.Tensor
    dtype: torch.dtype
    make: Make
    same: tuple[object, ...] = ()
    value: torch.Tensor | None = None
    held: Held | None = None


def write(
    work: Together,
    out: Path,
    tensors: Mapping[str, Planned],
    finish: Callable[[Path], None],
    *,
    max_shard_size: int | None,
    force: bool,
    gather: bool,
) -> None:
    """Write the tensors to the new directory ``out``; ``finish`` adds the other files. Collective.

    Raises:
        StateError: another process failed, or plans other tensors.
        OutputError: the path exists or cannot be written.
    """
    items = [(name, tuple(t.like.shape), t.dtype) for name, t in tensors.items()]
    plan = lay_out(items, max_shard_size=max_shard_size, metadata={"format": "pt"})
    if is_spread(work.team):
        _refuse_other_plans(work, repr(items))
    writer = work.team.is_writer()
    target: AbstractContextManager[Path | None] = (
        atomic_directory(out, force=force) if writer else nullcontext()
    )
    with target as folder:
        # an error is told before the directory goes: others may be writing into it
        with together(work.team):
            if folder is not None:
                with output_errors(out):
                    plan.prepare(folder)
            if writer or is_spread(work.team):
                _fill(work, out, folder, plan, tensors, gather)
        if folder is not None:
            with output_errors(out):
                plan.finish(folder)
            finish(folder)


def _refuse_other_plans(work: Together, text: str) -> None:
    work.step()
    if not world.same(text):
        raise StateError(
            "the processes hold tensors of other names or shapes (pipeline stages, experts that are spread "
            "over processes), which cannot be written as one model; save the adapter, and fuse it from file "
            "to file"
        )


def _fill(
    work: Together, out: Path, folder: Path | None, plan: Plan, tensors: Mapping[str, Planned], gather: bool
) -> None:
    """Every tensor's bytes; what this process writes is on the disk when it returns."""
    spread = is_spread(work.team)
    shared = _shared(work, folder, plan) if spread and not gather else None
    here = shared or folder
    near = {n: t for n, t in tensors.items() if _is_near(t, not spread or shared is not None)}
    filler = Filler(here, plan) if here is not None else None
    try:
        with output_errors(out):
            _write_near(near, filler, work)
        for name, t in tensors.items():
            if name not in near:
                if spread:
                    work.step()
                whole = t.make()
                if filler is not None and whole is not None:
                    with output_errors(out):
                        filler.write(name, 0, whole.detach().cpu().contiguous().view(-1))
    finally:
        if filler is not None:
            with output_errors(out):
                filler.close(sync=True)


def _shared(work: Together, folder: Path | None, plan: Plan) -> Path | None:
    """The directory that is being made, if every process can write into it; else None. Collective."""
    work.step()
    found = Path(work.team.told(str(folder)))
    sees = all(os.access(found / file, os.W_OK) for file in plan.sizes)
    return found if work.team.agree(sees) else None


def _is_near(t: Planned, here: bool) -> bool:
    """Whether it reaches the files without a message; ``here``: each process can write what it holds."""
    return t.value is not None and (here or engine_of(t.value).name == "plain")


def _write_near(near: Mapping[str, Planned], filler: Filler | None, work: Together) -> None:
    """What this process holds and nobody else writes."""
    names = {id(t.held): name for name, t in near.items() if t.held is not None}
    error: BaseException | None = None
    # a process that meets an error still takes part in every gather of factors, so that no other waits for it
    for h, delta in deltas([t.held for t in near.values() if t.held is not None]):
        t = near[names[id(h)]]
        if error is None and filler is not None and _is_mine(t, work):
            try:
                _put(filler, names[id(h)], t, fused_blocks(h, delta, t.dtype))
            except BaseException as e:
                error = e
    if error is not None:
        raise error
    for name, t in near.items():
        if t.held is None and filler is not None and _is_mine(t, work):
            try:
                _put(filler, name, t, _own_blocks(t))
            except StateError as e:
                raise StateError(f"{name}: {e}") from None


def _is_mine(t: Planned, work: Together) -> bool:
    assert t.value is not None
    engine = engine_of(t.value)
    return work.team.is_writer() if engine.name == "plain" else engine.writes(t.value)


def _own_blocks(t: Planned) -> Iterable[tuple[Part, int, torch.Tensor]]:
    assert t.value is not None
    for part in engine_of(t.value).parts(t.value):
        for at, flat in part_blocks(part):
            yield part, at, flat.to(t.dtype).cpu()


def _put(filler: Filler, name: str, t: Planned, blocks: Iterable[tuple[Part, int, torch.Tensor]]) -> None:
    shape = tuple(t.like.shape)
    for part, at, values in blocks:
        for first, there, count in part.runs(shape, at, values.numel()):
            filler.write(name, there, values[first - at : first - at + count])
