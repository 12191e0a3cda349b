"""Fuse and unfuse a model's sites in place; all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from . import undo as exact
from .adapted import NO_ADAPTER, Adapted, Site, delta_of
from .attach import sites
from .errors import Problems, StateError, TargetError
from .targets import Inventory, Patterns, as_patterns


@dataclass(frozen=True)
class Held:
    """One site with the module and parameter that hold it."""

    name: str
    module: Adapted
    parameter: str

    @property
    def site(self) -> Site:
        return self.module.graft_slots[self.parameter].site

    @property
    def parameter_tensor(self) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self.module, self.parameter))

    @property
    def weight(self) -> torch.Tensor:
        return self.parameter_tensor.detach()


def held_sites(model: nn.Module, targets: Patterns | None = None) -> list[Held]:
    """The sites of a model, or those that ``targets`` name.

    Raises:
        StateError: the model has no site.
        TargetError: a pattern that matches none.
    """
    held = [Held(name, module, parameter) for name, (module, parameter) in sites(model).items()]
    if not held:
        raise StateError(NO_ADAPTER)
    if targets is None:
        return held
    inventory = Inventory(model)
    problems = Problems(TargetError, "cannot choose the sites:")
    wanted: set[int] = set()
    ours = {id(getattr(h.module, h.parameter)) for h in held}
    for pattern in as_patterns(targets):
        found = {id(inventory.weights[n]) for n in inventory.match(pattern)} & ours
        if not found:
            problems.add(
                f"{pattern!r} names no adapted weight; adapted are {', '.join(h.name for h in held[:4])}…"
            )
        wanted |= found
    problems.raise_if_any()
    return [h for h in held if id(getattr(h.module, h.parameter)) in wanted]


def fuse(model: nn.Module, targets: Patterns | None = None) -> int:
    """Every adapted weight becomes ``W + ΔW``, rounded once to nearest even, in place.

    Idempotent; with ``targets`` only those sites. If one weight cannot be fused, none is. Returns the
    number of weights that were fused by this call.

    Raises:
        StateError: A, B or scale changed since a weight was fused; the sum overflows the weight's dtype;
            a site is disabled; a weight that is sharded, on the meta device or quantised.
    """
    held = held_sites(model, targets)
    _refuse_changed([h for h in held if h.site.fusion is not None])
    todo = [h for h in held if h.site.fusion is None]
    _refuse_unfit(todo)
    _all_or_none(todo, _fuse_one, _unfuse_one)
    return len(todo)


def unfuse(model: nn.Module, targets: Patterns | None = None) -> int:
    """Give every fused weight all of its bits back. Idempotent; returns the number of weights unfused.

    Raises:
        StateError: A, B, scale or the fused weight itself were changed since fuse; nothing is written.
    """
    todo = [h for h in held_sites(model, targets) if h.site.fusion is not None]
    _refuse_changed(todo)
    _all_or_none(todo, _unfuse_one, _fuse_one)
    return len(todo)


@contextmanager
def fused(model: nn.Module, targets: Patterns | None = None) -> Generator[None]:
    """The model fused inside the block; afterwards each site is as it was, also after an exception."""
    before = [h for h in held_sites(model, targets) if h.site.fusion is None]
    fuse(model, targets)
    try:
        yield
    finally:
        todo = [h for h in before if h.site.fusion is not None]
        _refuse_changed(todo)
        _all_or_none(todo, _unfuse_one, _fuse_one)


@contextmanager
def disabled(model: nn.Module, targets: Patterns | None = None) -> Generator[None]:
    """The plain base inside the block; fused weights are unfused for it and fused again afterwards."""
    held = held_sites(model, targets)
    was_fused = [h for h in held if h.site.fusion is not None]
    was_disabled = [h.site.disabled for h in held]
    _refuse_changed(was_fused)
    _all_or_none(was_fused, _unfuse_one, _fuse_one)
    for h in held:
        h.site.disabled = True
    try:
        yield
    finally:
        for h, before in zip(held, was_disabled, strict=True):
            h.site.disabled = before
        _all_or_none([h for h in was_fused if h.site.fusion is None], _fuse_one, _unfuse_one)


def effective_weight(h: Held, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``W + ΔW`` rounded once to ``dtype`` (the weight's own when None), as a new tensor.

    Raises:
        StateError: the sum overflows that dtype.
    """
    dtype = dtype or h.weight.dtype
    if h.site.fusion is not None:
        if dtype != h.weight.dtype:
            raise StateError(
                f"{h.name} is fused, and rounding it again to {dtype} would round twice; unfuse first"
            )
        return h.weight.clone()
    flat = h.weight.contiguous().view(-1)
    out = torch.empty_like(flat, dtype=dtype)
    broken = delta_of(h.module, h.parameter).add(flat, out)
    if broken:
        raise StateError(f"{h.name}: {broken} elements of W + ΔW are beyond the range of {dtype}")
    return out.view(h.weight.shape)


def _fuse_one(h: Held) -> None:
    try:
        h.site.fusion = exact.fuse(h.weight, delta_of(h.module, h.parameter))
    except StateError as error:
        raise StateError(f"{h.name}: {error}") from None
    # the kernel writes behind autograd's back: a backward that needs the old weight must raise
    torch.autograd.graph.increment_version(h.weight)


def _unfuse_one(h: Held) -> None:
    assert h.site.fusion is not None
    try:
        exact.unfuse(h.weight, delta_of(h.module, h.parameter), h.site.fusion)
    except StateError as error:
        raise StateError(f"{h.name}: {error}") from None
    torch.autograd.graph.increment_version(h.weight)
    h.site.fusion = None


def _all_or_none(todo: Iterable[Held], do: Callable[[Held], None], back: Callable[[Held], None]) -> None:
    done: list[Held] = []
    try:
        for h in todo:
            do(h)
            done.append(h)
    except BaseException:
        for h in reversed(done):
            back(h)
        raise


def _refuse_changed(held: Iterable[Held]) -> None:
    problems = Problems(StateError, "the adapter changed while it was fused:")
    for h in held:
        assert h.site.fusion is not None
        if exact.fingerprint(delta_of(h.module, h.parameter)) != h.site.fusion.factors:
            problems.add(f"{h.name}: A, B or the scale is another than at fuse")
    problems.raise_if_any(
        "Subtracting another ΔW than was added would not give the base back: put the old values back and "
        "unfuse, or load the base again"
    )


def _refuse_unfit(held: Iterable[Held]) -> None:
    problems = Problems(StateError, "cannot fuse:")
    for h in held:
        weight = getattr(h.module, h.parameter)
        if h.site.disabled:
            problems.add(f"{h.name} is disabled; leave graft.disabled(model) first")
        elif weight.is_meta:
            problems.add(f"{h.name} is on the meta device and holds no numbers; load the weights first")
        elif hasattr(weight, "ds_id") or hasattr(weight, "device_mesh"):
            problems.add(f"{h.name} is sharded ({type(weight).__name__}); fuse in a single process")
    problems.raise_if_any()
