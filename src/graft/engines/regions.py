"""Differentiable moves between the states in which tensor-parallel processes hold one tensor.

A tensor is *replicated* (equal everywhere), *partial* (its sum is the tensor), or a *shard* of an axis.
Each move's gradient is the move between the states of the gradients, so that gradients of replicated
tensors are complete on every process. With one process all of them do nothing.
"""

# autograd's functions have no useful types
# pyright: reportIncompatibleMethodOverride=false
# torch 2.13 renames two collectives that older versions know by these names only

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist

Group = dist.ProcessGroup


def all_reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over the group, as a new tensor."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def all_gather(x: torch.Tensor, group: Group, axis: int = 0) -> torch.Tensor:
    """Every process's tensor, one after another along an axis; all have the same shape."""
    x = x.movedim(axis, 0).contiguous()
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x, group=group)  # pyright: ignore[reportDeprecated]
    return out.movedim(0, axis).contiguous()


def _reduce_scatter(x: torch.Tensor, group: Group) -> torch.Tensor:
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x, group=group)  # pyright: ignore[reportDeprecated]
    return out


def _own(x: torch.Tensor, group: Group, axis: int) -> torch.Tensor:
    return x.chunk(group.size(), dim=axis)[group.rank()].contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _reduce_scatter(grad, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return all_gather(grad, ctx.group), None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return all_gather(x, group, -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _own(grad, ctx.group, -1), None


class _ScatterLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _own(x, group, -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return all_gather(grad, ctx.group, -1), None


def _move(function: Any, x: torch.Tensor, group: Group | None) -> torch.Tensor:
    if group is None or group.size() == 1:
        return x
    return cast(torch.Tensor, function.apply(x, group))


def copy(x: torch.Tensor, group: Group | None) -> torch.Tensor:
    """Replicated → replicated, where what follows is different on each process: gradients are summed."""
    return _move(_Copy, x, group)


def reduce(x: torch.Tensor, group: Group | None) -> torch.Tensor:
    """Partial → replicated."""
    return _move(_Reduce, x, group)


def gather_sequence(x: torch.Tensor, group: Group | None) -> torch.Tensor:
    """Shard of axis 0 → replicated, where what follows is different on each process."""
    return _move(_GatherSequence, x, group)


def scatter_sum(x: torch.Tensor, group: Group | None) -> torch.Tensor:
    """Partial → shard of axis 0."""
    return _move(_ScatterSum, x, group)


def gather_last(x: torch.Tensor, group: Group | None) -> torch.Tensor:
    """Shard of the last axis → replicated, where what follows is equal on each process."""
    return _move(_GatherLast, x, group)


def scatter_last(x: torch.Tensor, group: Group | None) -> torch.Tensor:
    """Replicated → shard of the last axis."""
    return _move(_ScatterLast, x, group)
