"""Differentiable moves between the states in which tensor-parallel processes hold one tensor.

A tensor is *replicated* (equal everywhere), *partial* (its sum is the tensor), or a *shard* of an axis.
Each move's gradient is the move between the states of the gradients, so that gradients of replicated
tensors are complete on every process. With one process all of them do nothing.
"""

# torch 2.13 renames two collectives that older versions know by these names only
# pyright: reportDeprecated=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist

Group = dist.ProcessGroup
Step = Callable[[torch.Tensor, Group], torch.Tensor]
Move = Callable[[torch.Tensor, "Group | None"], torch.Tensor]


def all_reduce(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over the group, as a new tensor."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def all_gather(x: torch.Tensor, group: Group, axis: int = 0) -> torch.Tensor:
    """Every process's tensor, one after another along an axis; all have the same shape."""
    x = x.movedim(axis, 0).contiguous()
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x, group=group)
    return out.movedim(0, axis).contiguous()


def _gather_last(x: torch.Tensor, group: Group) -> torch.Tensor:
    return all_gather(x, group, -1)


def _reduce_scatter(x: torch.Tensor, group: Group) -> torch.Tensor:
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x, group=group)
    return out


def _exchange(x: torch.Tensor, group: Group) -> torch.Tensor:
    """What ``_reduce_scatter`` gives: each process receives its piece of every other's, and sums them."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out.unflatten(0, (group.size(), -1)).sum(0)


def _own_last(x: torch.Tensor, group: Group) -> torch.Tensor:
    return x.chunk(group.size(), dim=-1)[group.rank()].contiguous()


def _same(x: torch.Tensor, group: Group) -> torch.Tensor:
    return x.view_as(x)


def _move(there: Step, back: Step) -> Move:
    """A move that is ``there`` in forward and ``back`` in backward."""

    class Moved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            ctx.group = group
            return there(x, group)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return back(grad, ctx.group), None

    def move(x: torch.Tensor, group: Group | None) -> torch.Tensor:
        if group is None or group.size() == 1:
            return x
        return cast(torch.Tensor, Moved.apply(x, group))

    return move


#: replicated → replicated, where what follows is different on each process: gradients are summed
copy = _move(_same, all_reduce)
#: partial → replicated
reduce = _move(all_reduce, _same)
#: shard of axis 0 → replicated, where what follows is different on each process
gather_sequence = _move(all_gather, _reduce_scatter)
#: partial → shard of axis 0
scatter_sum = _move(_reduce_scatter, all_gather)
#: the same by an all-to-all, each process summing for itself in the order of the group
exchange_sum = _move(_exchange, all_gather)
#: shard of the last axis → replicated, where what follows is equal on each process
gather_last = _move(_gather_last, _own_last)
#: replicated → shard of the last axis
scatter_last = _move(_own_last, _gather_last)
