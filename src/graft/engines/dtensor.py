"""DTensor: FSDP2 (``fully_shard``), tensor parallel (``parallelize_module``), and both in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..layout import Layout
from . import dtensor_forward, dtensor_travel, world
from .dtensor_blocks import axis_of, boxes, local, positions, whole_cuts
from .protocol import Part


def recognises(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, DTensor)


class Spread(world.Team):
    """Parameters that are DTensors."""

    name = "dtensor"

    def shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def parts(self, parameter: torch.Tensor) -> list[Part]:
        p = whole_cuts(parameter)
        where = p.device_mesh.get_coordinate()
        mine = local(p).detach()
        if where is None:
            return []
        return [
            Part(mine[inside], box, within=tuple((s.start, s.stop) for s in inside))
            for box, inside in boxes(p, where)
        ]

    def gather(self, factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        by_mesh: dict[DeviceMesh, list[tuple[int, DTensor]]] = {}
        for n, factor in enumerate(factors):
            if isinstance(factor, DTensor):
                p = whole_cuts(factor)
                by_mesh.setdefault(p.device_mesh, []).append((n, p))
            else:
                found[n] = factor.detach()
        for members in by_mesh.values():
            values = dtensor_travel.gather([p for _, p in members])
            found |= {n: value for (n, _), value in zip(members, values, strict=True)}
        return [found[n] for n in range(len(factors))]

    def collect(self, parameter: torch.Tensor, pieces: Sequence[torch.Tensor]) -> torch.Tensor | None:
        return dtensor_travel.collect(whole_cuts(parameter), pieces)

    def writes(self, parameter: torch.Tensor) -> bool:
        return dtensor_travel.sends(whole_cuts(parameter))

    def place(
        self, weight: torch.Tensor, layout: Layout, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        w = cast(DTensor, weight)
        return _place(w, a, _aligned(w, layout, "in")), _place(w, b, _aligned(w, layout, "out"))

    def ready(
        self, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return dtensor_forward.ready(a, b, weight)

    def here(self, tensor: torch.Tensor) -> torch.Tensor:
        return local(cast(DTensor, tensor))

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        p = cast(DTensor, tensor)
        return p.redistribute(placements=[Replicate() if q.is_partial() else q for q in p.placements])

    def own(self, parameter: torch.Tensor, a: torch.Tensor, b: torch.Tensor, layout: Layout) -> Part | None:
        w = cast(DTensor, parameter)
        for factor, side in ((a, "in"), (b, "out")):
            if not isinstance(factor, DTensor) or factor.device_mesh != w.device_mesh:
                return None
            if w.ndim > 2 or list(factor.placements) != _aligned(w, layout, side):
                return None
        whole = layout.groups > 1 or layout.matrix is not None
        if whole and any(axis_of(placement) is not None for placement in w.placements):
            return None
        return Part(local(whole_cuts(w)).detach())

    def alike(self, factors: Sequence[torch.Tensor]) -> bool:
        return dtensor_travel.alike([whole_cuts(f) for f in factors if isinstance(f, DTensor)])

    def settle(self, model: nn.Module) -> None:
        """Let every FSDP unit drop its full weights: they are copies, and edits of them are lost."""
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _aligned(w: DTensor, layout: Layout, side: str) -> list[Placement]:
    """Placements of A (``in``) or B (``out``) beside a weight of these placements."""
    plain = layout.groups == 1 and layout.matrix is None
    first = "in" if layout.transposed else "out"  # what the weight's axis 0 counts
    own = 1 if side == "in" else 0
    found: list[Placement] = []
    for placement in w.placements:
        axis = axis_of(placement)
        if not plain or axis is None or axis > 1 or (axis == 0) != (side == first):
            found.append(Replicate())
        elif (split := getattr(placement, "split_factor", None)) is None:
            found.append(Shard(own))
        else:
            found.append(cast(Any, type(placement))(own, split_factor=split))
    return found


def _place(w: DTensor, value: torch.Tensor, placements: Sequence[Placement]) -> DTensor:
    """A whole tensor as a DTensor, with the values that rank 0 has."""
    value = value.detach().to(world.device()).contiguous()
    dist.broadcast(value, src=0)
    mine = value
    where = w.device_mesh.get_coordinate()
    if where is not None:
        for axis, held in enumerate(positions(value.shape, placements, w.device_mesh, where)):
            mine = mine.index_select(axis, held.to(mine.device))
    return DTensor.from_local(
        mine.to(local(w).device).contiguous(),
        w.device_mesh,
        placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


ENGINE = Spread()
