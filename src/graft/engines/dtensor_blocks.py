"""Which positions of a DTensor each process holds, computed from its placements.

A placement cuts one axis of the tensor over one dimension of the mesh. Cuts of several dimensions nest, so
what a process holds is, for each axis, bands of positions: nearly always one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from ..errors import StateError
from ..layout import Span

Box = tuple[Span, ...]


def axis_of(placement: Placement) -> int | None:
    """The axis of the tensor that a placement cuts; None if it cuts none."""
    return None if placement.is_replicate() else cast(int, cast(Any, placement).dim)


def positions(
    shape: Sequence[int], placements: Sequence[Placement], mesh: DeviceMesh, where: Sequence[int]
) -> list[torch.Tensor]:
    """For each axis of the whole tensor the positions that the process at ``where`` in the mesh holds."""
    found = [torch.arange(n) for n in shape]
    for placement, at, count in zip(placements, where, mesh.shape, strict=True):
        axis = axis_of(placement)
        if axis is not None:
            # FSDP cuts what tensor parallel has cut: its part of each of those, in their order
            outer = _cut(found[axis], getattr(placement, "split_factor", 1))
            found[axis] = torch.cat([_cut(each, count)[at] for each in outer])
    return found


def _cut(found: torch.Tensor, count: int) -> list[torch.Tensor]:
    """As torch.chunk, with empty pieces at the end: exactly ``count``."""
    chunks = list(found.chunk(count))
    return chunks + [found[:0]] * (count - len(chunks))


def _bands(found: torch.Tensor) -> list[tuple[Span, slice]]:
    """Runs of consecutive positions, and where each lies in the local tensor."""
    if not len(found):
        return []
    ends = [0, *((found.diff() != 1).nonzero().flatten() + 1).tolist(), len(found)]
    return [
        ((int(found[low]), int(found[high - 1]) + 1), slice(low, high))
        for low, high in itertools.pairwise(ends)
    ]


def boxes(p: DTensor, where: Sequence[int]) -> list[tuple[Box, tuple[slice, ...]]]:
    """The blocks of the whole tensor that a process holds, and where each lies in its local tensor."""
    axes = positions(p.shape, p.placements, p.device_mesh, where)
    products = itertools.product(*(_bands(axis) for axis in axes))
    return [(tuple(band for band, _ in each), tuple(inside for _, inside in each)) for each in products]


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*span) for span in box)


def sizes(box: Box) -> list[int]:
    return [high - low for low, high in box]


def numel(box: Box) -> int:
    return math.prod(sizes(box))


def local(p: DTensor) -> torch.Tensor:
    """The tensor that this process holds, sharing memory."""
    with torch.no_grad():
        return p.to_local()


def whole_cuts(parameter: torch.Tensor) -> DTensor:
    """The parameter, if each process holds final values of a part of it.

    Raises:
        StateError: on the meta device, sums that are not made yet, or a cut that Graft does not know.
    """
    p = cast(DTensor, parameter)
    if p.is_meta or local(p).is_meta:
        raise StateError("it is on the meta device and holds no numbers; load the weights first")
    for placement in p.placements:
        if placement.is_partial():
            raise StateError(
                f"its placement {placement} is a sum that is not made yet; redistribute it first"
            )
    where = p.device_mesh.get_coordinate()
    if where is not None:
        held = [len(axis) for axis in positions(p.shape, p.placements, p.device_mesh, where)]
        if held != list(local(p).shape):
            raise StateError(
                f"it is cut in a way unknown to Graft: {p.placements} of {tuple(p.shape)} should give "
                f"{held} here, not {tuple(local(p).shape)}"
            )
    return p
