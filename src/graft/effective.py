"""W + ΔW as new numbers, beside the weight: whole on one process, or block by block on each."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .delta import Delta
from .engines import Part
from .engines.world import known
from .errors import StateError
from .held import Held, deltas, pieces

#: elements of a weight that are made at once where they go to a file
_ROOM = 1 << 18


def fused_blocks(h: Held, delta: Delta, dtype: torch.dtype) -> Iterator[tuple[Part, int, torch.Tensor]]:
    """``W + ΔW`` rounded once to ``dtype``, of the parts here, a block at a time.

    Yields:
        The part, the flat position in it, and the values (flat, on the CPU; valid until the next).
    Raises:
        StateError: the sum overflows that dtype, or would be rounded twice.
    """
    refuse_second_rounding(h, dtype)
    room = torch.empty(0)
    for part, local, start in pieces(h, delta):
        for at, flat in part_blocks(part):
            if h.site.fusion is not None:
                yield part, at, flat.cpu()
                continue
            if room.numel() < flat.numel() or room.device != flat.device:
                room = torch.empty(flat.numel(), dtype=dtype, device=flat.device)
            out = room[: flat.numel()]
            if broken := local.add(flat, out, start=start + at):
                raise _overflow(h, broken, dtype)
            yield part, at, out.cpu()


def part_blocks(part: Part) -> Iterator[tuple[int, torch.Tensor]]:
    """The part's elements, flat, a block at a time, each with its flat position in the part."""
    flat = part.tensor.contiguous().view(-1)
    for at in range(0, flat.numel(), _ROOM):
        yield at, flat[at : at + _ROOM]


def effective_weight(h: Held, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """``W + ΔW`` rounded once to ``dtype`` (the weight's own when None), as a new tensor.

    Collective where the weight is spread; the process that writes gets the tensor, the others None.

    Raises:
        StateError: the sum overflows that dtype.
    """
    dtype = dtype or h.weight.dtype
    refuse_second_rounding(h, dtype)
    ((_, delta),) = deltas([h])
    outs: list[torch.Tensor] = []
    error: Exception | None = None
    try:
        outs = _whole_parts(h, delta, dtype)
    except Exception as e:  # the others wait in agree, whatever it is
        error = e
    if not h.engine.agree(error is None):
        raise known(error or StateError(f"{h.name}: another process could not make its part; see its error"))
    return h.engine.collect(h.parameter_tensor, outs)


def refuse_second_rounding(h: Held, dtype: torch.dtype) -> None:
    """Refuse to round a weight to ``dtype`` that was rounded to another when it was fused.

    Raises:
        StateError: it is fused, and of another dtype.
    """
    if h.site.fusion is not None and dtype != h.weight.dtype:
        raise StateError(
            f"{h.name} is fused, and rounding it again to {dtype} would round twice; unfuse first"
        )


def _whole_parts(h: Held, delta: Delta, dtype: torch.dtype) -> list[torch.Tensor]:
    outs: list[torch.Tensor] = []
    broken = 0
    for part, local, start in pieces(h, delta):
        if h.site.fusion is not None:
            outs.append(part.tensor.clone())
            continue
        flat = part.tensor.contiguous().view(-1)
        out = torch.empty_like(flat, dtype=dtype)
        broken += local.add(flat, out, start=start)
        outs.append(out.view(part.tensor.shape))
    if broken:
        raise _overflow(h, broken, dtype)
    return outs


def _overflow(h: Held, broken: int, dtype: torch.dtype) -> StateError:
    return StateError(f"{h.name}: {broken} elements of W + ΔW here are beyond the range of {dtype}")


def whole_weight(h: Held, dtype: torch.dtype | None = None) -> torch.Tensor:
    """:func:`effective_weight` where this process is the one that writes."""
    whole = effective_weight(h, dtype)
    assert whole is not None
    return whole
