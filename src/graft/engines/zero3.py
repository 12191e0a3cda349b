"""DeepSpeed ZeRO-3: every process holds a flat slice of every row-major weight.

The slice (``ds_tensor``) is the truth; a full copy that is alive after a forward and hpZ's secondary slice
are caches of it, which DeepSpeed makes again when they are gone. So they are dropped before an edit. Only
attributes of the parameters are read: DeepSpeed itself is never imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..errors import StateError
from ..layout import Layout
from . import world
from .protocol import Part


def recognises(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id") and hasattr(parameter, "ds_shape")


class Zero3(world.Team):
    """Parameters of ``deepspeed.zero.Init`` or of an engine of stage 3."""

    name = "zero3"
    opaque = True  # a parameter's own tensor is empty while it is partitioned

    def shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        return tuple(_ds(parameter).ds_shape)

    def parts(self, parameter: torch.Tensor) -> list[Part]:
        p = _ds(parameter)
        _refuse_unreachable(p)
        if p.ds_status.name == "AVAILABLE":
            if p.ds_active_sub_modules:
                raise StateError(
                    "it is in use by a forward or by deepspeed.zero.GatheredParameters; call this outside"
                )
            p.partition()
        p.ds_secondary_tensor = None
        return [Part(_slice(p), start=_start(p))]

    def writes(self, parameter: torch.Tensor) -> bool:
        return True  # no element is in two slices

    def place(
        self, weight: torch.Tensor, layout: Layout, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # deepspeed.initialize partitions new parameters, and sends the first process's numbers to all
        return a, b

    def gather(self, factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        by_dtype: dict[torch.dtype, list[tuple[int, Any]]] = {}
        for n, factor in enumerate(factors):
            p = _ds(factor)
            _refuse_unreachable(p)
            by_dtype.setdefault(p.dtype, []).append((n, p))
        for members in by_dtype.values():
            values = _all_gather([p for _, p in members])
            found |= {n: value for (n, _), value in zip(members, values, strict=True)}
        return [found[n] for n in range(len(factors))]

    def collect(self, parameter: torch.Tensor, pieces: Sequence[torch.Tensor]) -> torch.Tensor | None:
        (piece,) = pieces
        p = _ds(parameter)
        size = p.ds_tensor.ds_numel
        mine = torch.zeros(size, dtype=piece.dtype, device=parameter.device)
        mine[: piece.numel()] = piece
        ranks = p.ds_zero_partition_world_size
        whole = mine.new_empty((ranks, size)) if self.is_writer() else None
        rows = None if whole is None else [row.view(torch.uint8) for row in whole]
        # bytes: not every backend knows every dtype
        dist.gather(mine.view(torch.uint8), rows, dst=0)
        return None if whole is None else whole.view(-1)[: p.ds_numel].view(self.shape(parameter))


def _ds(parameter: torch.Tensor) -> Any:
    return parameter


def _refuse_unreachable(p: Any) -> None:
    """What cannot be read or edited where it is.

    Raises:
        StateError: in flight, on NVMe, quantised, or partitioned over a part of the processes.
    """
    if p.ds_tensor is None or p.ds_status.name == "INFLIGHT":
        raise StateError("it is being gathered at this moment; call this between training steps")
    location = getattr(p.ds_tensor, "final_location", None)
    if p.ds_tensor.status.name != "AVAILABLE" or getattr(location, "value", location) == "nvme":
        raise StateError('it is offloaded to NVMe; use "offload_param": {"device": "cpu"} or none')
    if hasattr(p.ds_tensor, "ds_quant_scale"):
        raise StateError('it is quantised by DeepSpeed; set "zero_quantized_nontrainable_weights": false')
    if p.ds_zero_partition_world_size != dist.get_world_size():
        raise StateError(
            f"it is partitioned over {p.ds_zero_partition_world_size} of {dist.get_world_size()} processes "
            "(MiCS, experts or tensor parallelism); use ZeRO-3 over all of them"
        )


def _start(p: Any) -> int:
    """Position in the row-major weight of the slice's first element; its end for a slice of padding."""
    return min(p.ds_zero_partition_rank * p.ds_tensor.ds_numel, p.ds_numel)


def _slice(p: Any) -> torch.Tensor:
    """This process's slice without the padding at the weight's end; maybe empty."""
    count = min(p.ds_tensor.ds_numel, p.ds_numel - _start(p))
    return p.ds_tensor.detach().view(-1)[:count]


def _all_gather(parameters: list[Any]) -> list[torch.Tensor]:
    """Parameters of one dtype in full, in one message."""
    first = parameters[0]
    mine = torch.cat([p.ds_tensor.detach().view(-1).to(first.device) for p in parameters])
    every = mine.new_empty((first.ds_zero_partition_world_size, mine.numel()))
    dist.all_gather([row.view(torch.uint8) for row in every], mine.view(torch.uint8))
    values: list[torch.Tensor] = []
    at = 0
    for p in parameters:
        size = p.ds_tensor.ds_numel
        flat = every[:, at : at + size].reshape(-1)[: p.ds_numel]
        values.append(flat.view(tuple(p.ds_shape)))
        at += size
    return values


ENGINE = Zero3()
