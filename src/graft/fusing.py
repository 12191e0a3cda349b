"""Fuse and unfuse a model's sites in place; all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from . import undo as exact
from .adapted import factors
from .delta import Delta
from .engines import Aligned, Part, settle
from .engines.masters import has_master
from .engines.world import known
from .engines.wrappers import team_of, together, unwrap
from .errors import Problems, StateError
from .held import Held, deltas, held_sites, pieces
from .targets import Patterns


def fuse(model: nn.Module, targets: Patterns | None = None) -> int:
    """Every adapted weight becomes ``W + ΔW``, rounded once to nearest even, in place.

    Idempotent; with ``targets`` only those sites. If one weight cannot be fused, none is. Returns the
    number of weights that were fused by this call.

    Raises:
        StateError: A, B or scale changed since a weight was fused; the sum overflows the weight's dtype;
            a site is disabled; a weight that is sharded, on the meta device or quantised.
    """
    with together(team_of(model)):
        held = held_sites(model, targets)
        refuse_changed([h for h in held if h.site.fusion is not None])
        todo = [h for h in held if h.site.fusion is None]
        _refuse_unfit(todo)
        _fuse_all(todo)
    return len(todo)


def unfuse(model: nn.Module, targets: Patterns | None = None) -> int:
    """Give every fused weight all of its bits back. Idempotent; returns the number of weights unfused.

    Raises:
        StateError: A, B, scale or the fused weight itself were changed since fuse; nothing is written.
    """
    with together(team_of(model)):
        todo = [h for h in held_sites(model, targets) if h.site.fusion is not None]
        refuse_changed(todo)
        _unfuse_all(todo)
    return len(todo)


@contextmanager
def fused(model: nn.Module, targets: Patterns | None = None) -> Generator[None]:
    """The model fused inside the block; afterwards each site is as it was, also after an exception."""
    before = [h for h in held_sites(model, targets) if h.site.fusion is None]
    fuse(model, targets)
    try:
        yield
    finally:
        settle(unwrap(model))  # forwards inside the block may have left full copies
        todo = [h for h in before if h.site.fusion is not None]
        refuse_changed(todo)
        _unfuse_all(todo)


@contextmanager
def disabled(model: nn.Module, targets: Patterns | None = None) -> Generator[None]:
    """The plain base inside the block; fused weights are unfused for it and fused again afterwards."""
    held = held_sites(model, targets)
    was_fused = [h for h in held if h.site.fusion is not None]
    was_disabled = [h.site.disabled for h in held]
    refuse_changed(was_fused)
    _unfuse_all(was_fused)
    for h in held:
        h.site.disabled = True
    try:
        yield
    finally:
        settle(unwrap(model))
        for h, before in zip(held, was_disabled, strict=True):
            h.site.disabled = before
        _fuse_all([h for h in was_fused if h.site.fusion is None])


def _fuse_one(h: Held, delta: Delta) -> None:
    done: list[tuple[Part, Delta, int, exact.Undo]] = []
    try:
        for part, local, start in pieces(h, delta):
            done.append((part, local, start, exact.fuse(part.tensor, local, start=start)))
    except StateError as error:
        for part, local, start, kept in reversed(done):
            exact.unfuse(part.tensor, local, kept, start=start)
        raise StateError(f"{h.name}: {error}") from None
    h.site.fusion = tuple(kept for *_, kept in done)
    # the kernel writes behind autograd's back: a backward that needs the old weight must raise
    torch.autograd.graph.increment_version(h.weight)


def _unfuse_one(h: Held, delta: Delta) -> None:
    assert h.site.fusion is not None
    try:
        for (part, local, start), kept in zip(pieces(h, delta), h.site.fusion, strict=True):
            exact.unfuse(part.tensor, local, kept, start=start)
    except StateError as error:
        raise StateError(f"{h.name}: {error}") from None
    torch.autograd.graph.increment_version(h.weight)
    h.site.fusion = None


def _fuse_all(todo: Sequence[Held]) -> None:
    _all_or_none(todo, _fuse_one, _unfuse_one)


def _unfuse_all(todo: Sequence[Held]) -> None:
    _all_or_none(todo, _unfuse_one, _fuse_one)


_Do = Callable[[Held, Delta], None]


def _all_or_none(todo: Sequence[Held], do: _Do, back: _Do) -> None:
    """``do`` on every site of every process, or on none.

    A process that meets an error still takes part in every gather, so that no other waits for it.
    """
    done: set[int] = set()
    error: BaseException | None = None
    for h, delta in deltas(todo):
        if error is not None:
            continue
        try:
            do(h, delta)
            done.add(id(h))
        except BaseException as e:
            error = e
    if todo and not _agree(todo, error is None):
        for h, delta in deltas(todo):
            if id(h) in done:
                back(h, delta)
        raise known(
            error or StateError("another process could not do this, so it was undone here; see its error")
        )


def _agree(held: Sequence[Held], ok: bool) -> bool:
    """Whether every process that shares a weight of these says yes."""
    engines = {e.name: e for e in (h.engine for h in held)}
    answers = [e.agree(ok) for _, e in sorted(engines.items())]  # a list: no engine's question may be skipped
    return all(answers)


def refuse_changed(held: Sequence[Held]) -> None:
    """Refuse fused sites whose factors are not those that they were fused with. Collective.

    Raises:
        StateError: on every process.
    """
    problems = Problems(StateError, "the adapter changed while it was fused:")
    for h, delta in deltas(held):
        assert h.site.fusion is not None
        for (_, local, _), kept in zip(pieces(h, delta), h.site.fusion, strict=True):
            if exact.fingerprint(local) != kept.factors:
                problems.add(f"{h.name}: A, B or the scale is another than at fuse")
                break
    _refuse_together(
        held,
        problems,
        "Subtracting another ΔW than was added would not give the base back: put the old values back and "
        "unfuse, or load the base again",
    )


def _refuse_unfit(held: Sequence[Held]) -> None:
    problems = Problems(StateError, "cannot fuse:")
    for h in held:
        if h.site.disabled:
            problems.add(f"{h.name} is disabled; leave graft.disabled(model) first")
            continue
        if h.parameter_tensor.requires_grad and has_master(h.parameter_tensor):
            problems.add(
                f"{h.name} trains itself, so the next step would put its fp32 master in the place of W + ΔW; "
                "freeze it, or use graft.export, which needs no fusing"
            )
            continue
        try:
            h.engine.parts(h.parameter_tensor)
        except StateError as error:
            problems.add(f"{h.name}: {error}")
    if held and not _alike(held):
        problems.add(
            "a factor that several processes hold alike has other values on another process; "
            "load or adapt on all of them alike"
        )
    _refuse_together(held, problems)


def _refuse_together(held: Sequence[Held], problems: Problems, mend: str = "") -> None:
    """Raise the problems on the processes that have them, and an error on all others."""
    if not held or _agree(held, not problems):
        return
    try:
        (problems or _elsewhere()).raise_if_any(mend)
    except StateError as error:
        known(error)
        raise


def _alike(held: Sequence[Held]) -> bool:
    engines = {e.name: e for e in (h.engine for h in held) if isinstance(e, Aligned)}
    pairs = [(h.engine.name, factors(h.module, h.parameter)) for h in held]
    answers = [
        e.alike([t for own, f in pairs if own == name for t in (f.a, f.b)])
        for name, e in sorted(engines.items())
    ]
    return all(answers)


def _elsewhere() -> Problems:
    problems = Problems(StateError, "refused by another process:")
    problems.add("see that process's error for the names")
    return problems
