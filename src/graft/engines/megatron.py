"""Megatron-core tensor parallelism: a weight is cut over a process group along one of its axes.

**Aligned factors.** A is cut iff W is cut along its inputs, B iff W is cut along its outputs, the other is
replicated. A process's own factors are then all that ΔW of its own shard needs (law 2), so fuse sends
nothing. They are made for the global shape and cut afterwards, so that a run does not depend on the number
of processes.

A parameter alone does not tell enough (Megatron leaves ``tensor_model_parallel``, ``partition_dim`` and
``partition_stride`` off when ``perform_initialization`` is False, and never names its group), so the weight
is marked when its module is adapted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from ..checksum import checksum
from ..errors import TargetError
from ..layout import Layout
from . import world
from .megatron_groups import group_of, replica_group, tensor_parallel_group
from .megatron_modules import COLUMN, ROW, role_of
from .protocol import Part
from .regions import all_gather
from .split import Split, mark, split_of

_ALIGNABLE = ("o i", "(g o) i", "i o")


def recognises(parameter: torch.Tensor) -> bool:
    """Whether this is a weight or factor that was marked, or a parameter that Megatron cut."""
    return split_of(parameter) is not None


def notice(name: str, module: nn.Module, parameter: str) -> None:
    """Mark a module's parameter with how it is cut, as its attributes or else its class tell."""
    tensor: Any = getattr(module, parameter)
    role = role_of(module) if parameter == "weight" else None
    if role is not None or getattr(tensor, "tensor_model_parallel", False):
        axis = int(getattr(tensor, "partition_dim", -1))
        if axis < 0:
            axis = 1 if role == ROW else 0
        mark(tensor, Split(group_of(module), axis, _stride(name, module, tensor, role)))
    elif hasattr(tensor, "sequence_parallel"):
        # a replicated parameter (a router's); if true, each process sees some of the tokens only
        group = group_of(module)
        mark(tensor, Split(group, None, users=group if tensor.sequence_parallel else None))


def _stride(name: str, module: nn.Module, weight: Any, role: str | None) -> int:
    told = getattr(weight, "partition_stride", None) or getattr(
        getattr(module, "bias", None), "partition_stride", None
    )
    if told is not None:
        return int(told)
    gated = bool(getattr(getattr(module, "config", None), "gated_linear_unit", False))
    return 2 if gated and role == COLUMN and name.split(".")[-2:-1] == ["linear_fc1"] else 1


def _factor_splits(weight: torch.Tensor, layout: Layout) -> tuple[Split, Split]:
    """How A and B are cut so that they are aligned with the weight.

    Raises:
        TargetError: a layout whose blocks the processes do not hold in equal shares.
    """
    split = split_of(weight)
    assert split is not None
    whole = Split(split.group, None, users=split.users)
    if split.axis is None:
        return whole, whole
    if not split.spread and layout.pattern not in _ALIGNABLE:
        return whole, whole
    inputs = split.axis == (0 if layout.transposed else 1)
    fits = layout.pattern in _ALIGNABLE and layout.matrix is None
    if inputs:
        fits = fits and split.stride == 1
    elif layout.groups > 1:
        fits = fits and split.stride == layout.groups
    if split.spread and not fits:
        raise TargetError(
            f"layout {layout.pattern!r} with groups={layout.groups} does not follow how this weight is cut "
            f"over {split.size} processes (axis {split.axis}, {split.stride} bands); "
            "adapt it with the layout that its class has"
        )
    if inputs:
        return Split(split.group, 1), whole
    stride = len(layout.enabled) if layout.groups > 1 else split.stride
    return whole, Split(split.group, 0, stride)


class Megatron:
    """Weights cut over the tensor-parallel group (or the expert-tensor-parallel one)."""

    name = "megatron"

    def shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        split = split_of(parameter)
        assert split is not None
        return split.whole_shape(parameter.shape)

    def parts(self, parameter: torch.Tensor) -> list[Part]:
        split = split_of(parameter)
        assert split is not None
        local = parameter.detach()
        if split.axis is None:
            return [Part(local, tuple((0, n) for n in local.shape))]
        found: list[Part] = []
        for here, there in split.spans(local.shape):
            index = [(0, n) for n in local.shape]
            index[split.axis] = there
            within = [(0, n) for n in local.shape]
            within[split.axis] = here
            band = local.narrow(split.axis, here[0], here[1] - here[0])
            found.append(Part(band, tuple(index), within=tuple(within)))
        return found

    def writes(self, parameter: torch.Tensor) -> bool:
        """The processes of rank 0's own group; the others are its replicas."""
        split = split_of(parameter)
        if split is None or not split.spread:
            return self.is_writer()
        return dist.get_global_rank(split.group, 0) == 0

    def place(
        self, weight: torch.Tensor, layout: Layout, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole new factors cut as the weight is, the first process's numbers everywhere. Collective."""
        placed: list[nn.Parameter] = []
        for whole, split in zip((a, b), _factor_splits(weight, layout), strict=True):
            # each process may have drawn other numbers; the first one's count
            _take_first(whole, replica_group(weight))
            _take_first(whole, split.group)
            factor = nn.Parameter(split.cut(whole.detach()), whole.requires_grad)
            mark(factor, split)
            _tell_megatron(factor, weight, split)
            placed.append(factor)
        return placed[0], placed[1]

    def own(self, parameter: torch.Tensor, a: torch.Tensor, b: torch.Tensor, layout: Layout) -> Part | None:
        have = [split_of(a), split_of(b)]
        for x, y in zip(have, _factor_splits(parameter, layout), strict=True):
            if x is None or (x.axis, x.stride) != (y.axis, y.stride):
                return None
        return Part(parameter.detach())

    def alike(self, factors: Sequence[torch.Tensor]) -> bool:
        by_group: dict[int, tuple[Any, list[str]]] = {}
        for f in factors:
            split = split_of(f)
            if split is None:
                continue
            holders = [split.group if split.axis is None else None, split.users, replica_group(f)]
            groups = {id(g): g for g in holders if g is not None and g.size() > 1}
            value = str(checksum(f.detach())) if groups else ""
            for key, group in groups.items():
                by_group.setdefault(key, (group, []))[1].append(value)
        answers = [world.same(" ".join(found), group) for group, found in by_group.values()]
        return all(answers)

    def gather(self, factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All of them in one message for each group and dtype."""
        whole = [f.detach() for f in factors]
        batches: dict[tuple[int, torch.dtype], list[int]] = {}
        for n, f in enumerate(factors):
            split = split_of(f)
            if split is not None and split.spread:
                batches.setdefault((id(split.group), f.dtype), []).append(n)
        for members in batches.values():
            splits = [cast(Split, split_of(factors[n])) for n in members]
            flat = torch.cat([whole[n].reshape(-1) for n in members])
            size = splits[0].size
            out = all_gather(flat, splits[0].group)
            ranks = [r.split([whole[n].numel() for n in members]) for r in out.chunk(size)]
            for k, n in enumerate(members):
                whole[n] = splits[k].join([r[k].view(whole[n].shape) for r in ranks])
        return whole

    def cut(self, like: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """The part of a whole factor or weight that belongs in ``like``."""
        split = split_of(like)
        return whole if split is None else split.cut(whole)

    def collect(self, parameter: torch.Tensor, pieces: Sequence[torch.Tensor]) -> torch.Tensor | None:
        split = split_of(parameter)
        assert split is not None
        local = pieces[0] if split.axis is None else torch.cat(list(pieces), dim=split.axis)
        if not split.spread:
            return local if self.is_writer() else None
        first = split.rank == 0
        parts = [torch.empty_like(local) for _ in range(split.size)] if first else None
        dist.gather(local.contiguous(), parts, dst=dist.get_global_rank(split.group, 0), group=split.group)
        return split.join(parts) if parts is not None and self.is_writer() else None

    def agree(self, ok: bool) -> bool:
        """Over all processes: data-parallel replicas and pipeline stages fuse together or not at all."""
        return world.agree(ok)

    def same(self, text: str) -> bool:
        """Over the tensor-parallel group and its replicas: pipeline stages have sites of their own."""
        answers = [world.same(text, tensor_parallel_group()), world.same(text, replica_group(torch.empty(0)))]
        return all(answers)

    def is_writer(self) -> bool:
        return world.is_writer()

    def told(self, text: str) -> str:
        return world.told(text)


def share(factors: Sequence[nn.Parameter], group: Any) -> None:
    """Make factors those of all processes of a group, which use them for weights of their own. Collective.

    Their gradients are summed over the group, and Megatron counts them once in the norm of all gradients.
    """
    for factor in factors:
        split = split_of(factor)
        assert split is not None
        _take_first(factor, group)
        mark(factor, replace(split, users=group))
        cast(Any, factor).shared = group is not None and group.rank() > 0


def _take_first(tensor: torch.Tensor, group: Any) -> None:
    if group is not None and group.size() > 1:
        dist.broadcast(tensor.detach(), dist.get_global_rank(group, 0), group=group)


def _tell_megatron(factor: Any, weight: Any, split: Split) -> None:
    """The attributes by which Megatron's optimiser counts norms and its DDP sums gradients."""
    factor.tensor_model_parallel = split.axis is not None
    factor.partition_dim = -1 if split.axis is None else split.axis
    factor.partition_stride = split.stride
    factor.allreduce = getattr(weight, "allreduce", True)


ENGINE = Megatron()
