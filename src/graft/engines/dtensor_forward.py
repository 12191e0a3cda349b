"""Factors of DTensors as a forward needs them, where no engine's own hooks bring them.

Factors that were there when ``fully_shard`` ran are the unit's own parameters, and FSDP gathers them with the
weight. Factors made afterwards are not: here they are gathered in forward, and their gradient is averaged
over the processes that saw other data, as FSDP averages the gradients of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .dtensor_blocks import axis_of, local, positions
from .dtensor_travel import gather

Pair = tuple[torch.Tensor, torch.Tensor]


def ready(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> Pair:
    """The factors spread over no more dimensions of the mesh than the weight is at this moment."""
    if not isinstance(a, DTensor) or not isinstance(b, DTensor):
        return a, b
    # FSDP's dimensions lead; what is left of the weight's mesh in forward is tensor parallel
    kept = weight.device_mesh if isinstance(weight, DTensor) else None
    drop = a.device_mesh.ndim - (0 if kept is None else kept.ndim)
    return cast(Pair, _Gather.apply(a, b, drop, kept)) if drop else (a, b)


class _Gather(torch.autograd.Function):
    """Gather over the first ``drop`` dimensions of the mesh; backwards, average over them."""

    @staticmethod
    def forward(ctx: Any, a: DTensor, b: DTensor, drop: int, kept: DeviceMesh | None) -> Pair:
        pair = cast("tuple[DTensor, DTensor]", (a.detach(), b.detach()))
        ctx.factors, ctx.drop = pair, drop
        whole_a, whole_b = gather(pair, drop)
        return _kept(pair[0], whole_a, drop, kept), _kept(pair[1], whole_b, drop, kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pairs = list(zip(ctx.factors, grads, strict=True))
        locals_ = [_settled(f, g, ctx.drop) for f, g in pairs if g is not None]
        averaged = iter(_average(locals_, ctx.factors[0].device_mesh, ctx.drop))
        return *(None if g is None else _own(f, next(averaged), ctx.drop) for f, g in pairs), None, None


def _held(f: DTensor, drop: int) -> list[torch.Tensor]:
    """Positions that this process holds of the factor once the first dimensions are gathered."""
    where = cast("list[int]", f.device_mesh.get_coordinate())
    mesh = f.device_mesh
    found = positions(f.shape, f.placements, mesh, where)
    for axis in {axis_of(p) for p in f.placements[:drop]} - {None}:
        every = [
            positions(f.shape, f.placements, mesh, (*lead, *where[drop:]))[cast(int, axis)]
            for lead in itertools.product(*(range(n) for n in mesh.shape[:drop]))
        ]
        found[cast(int, axis)] = torch.cat(every).unique()
    return found


def _select(tensor: torch.Tensor, axes: Sequence[torch.Tensor]) -> torch.Tensor:
    for axis, held in enumerate(axes):
        if len(held) != tensor.shape[axis]:
            tensor = tensor.index_select(axis, held.to(tensor.device))
    return tensor.contiguous()


def _kept(f: DTensor, whole: torch.Tensor, drop: int, kept: DeviceMesh | None) -> torch.Tensor:
    if kept is None:
        return whole
    mine = _select(whole, _held(f, drop))
    return DTensor.from_local(
        mine, kept, f.placements[drop:], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _settled(f: DTensor, grad: torch.Tensor, drop: int) -> torch.Tensor:
    """The gradient's local values, cut over the dimensions that stayed as the factor is."""
    if isinstance(grad, DTensor):
        grad = local(grad.redistribute(placements=f.placements[drop:]))
    return grad.contiguous()


def _average(grads: Sequence[torch.Tensor], mesh: DeviceMesh, drop: int) -> list[torch.Tensor]:
    """Means over the dropped dimensions, in one message for each of them."""
    flat = torch.cat([g.view(-1) for g in grads])
    count = 1
    for d in range(drop):
        dist.all_reduce(flat, group=mesh.get_group(d))
        count *= mesh.size(d)
    parts = (flat / count).split([g.numel() for g in grads])
    return [part.view(g.shape) for part, g in zip(parts, grads, strict=True)]


def _own(f: DTensor, grad: torch.Tensor, drop: int) -> DTensor:
    """This process's part of a gradient, as the factor itself is spread."""
    where = cast("list[int]", f.device_mesh.get_coordinate())
    mine = positions(f.shape, f.placements, f.device_mesh, where)
    # positions in the whole factor → positions in the gradient
    inside = [torch.searchsorted(held, own) for held, own in zip(_held(f, drop), mine, strict=True)]
    return DTensor.from_local(
        _select(grad, inside),
        f.device_mesh,
        f.placements,
        run_check=False,
        shape=f.shape,
        stride=f.stride(),
    )
