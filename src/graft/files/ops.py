"""What may happen to the elements of a stored tensor on their way to the output.

An operation sees a flat range of the tensor, whatever the chunk it lies in, and gives for every element
the number that the whole tensor would give: chunks and threads leave no trace in the bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Protocol, TypeVar, cast

import torch

from .. import kernel
from ..adapter import LowRank
from ..delta import Delta, Term, wide
from ..rounding import WEIGHT_DTYPES, round_once

#: fp32 factors of one tensor up to this many bytes are kept while it is streamed; larger ones are cut
_WHOLE = 6 << 20
#: elements that are computed at once without the kernel
_PLAIN = 1 << 16


class Op(Protocol):
    """``apply`` fills ``dst`` from ``src``, both holding the tensor's elements from ``start`` on.

    ``src`` may be ``dst``. Returns the number of elements that became infinite or NaN.
    """

    def apply(self, src: torch.Tensor, dst: torch.Tensor, start: int) -> int: ...


class Cast:
    """Each element rounded once to the output's dtype."""

    def apply(self, src: torch.Tensor, dst: torch.Tensor, start: int) -> int:
        if src.data_ptr() == dst.data_ptr():
            return 0
        dst.copy_(round_once(src, dst.dtype) if src.dtype == torch.float64 else src)
        return broken(src, dst)


class Add:
    """``dst = round(src + ΔW)``; ``delta(r0, r1)`` gives ΔW, at least in rows r0 to r1 of S."""

    def __init__(self, delta: Callable[[int, int], Delta], width: int) -> None:
        self._delta, self._width = delta, max(1, width)

    def apply(self, src: torch.Tensor, dst: torch.Tensor, start: int) -> int:
        rows = start // self._width, -(-(start + src.numel()) // self._width)
        delta, count = self._delta(*rows), 0
        # torch's way needs many temporaries of a block, so its blocks are small.
        step = src.numel() if kernel.usable(src) else _PLAIN
        for at in range(0, src.numel(), max(1, step)):
            part = slice(at, at + step)
            count += delta.add(src[part], dst[part], start=start + at, threads=1)
        return count if src.dtype == dst.dtype else broken(src, dst)


class Rows:
    """Whole rows replaced (trained tokens); the others cast."""

    def __init__(self, indices: tuple[int, ...], rows: torch.Tensor, width: int) -> None:
        self._at = sorted(zip(indices, range(len(indices)), strict=True))
        self._rows, self._width = rows, width

    def apply(self, src: torch.Tensor, dst: torch.Tensor, start: int) -> int:
        count = Cast().apply(src, dst, start)
        stop = start + dst.numel()
        for row, n in self._at:
            first, last = max(start, row * self._width), min(stop, (row + 1) * self._width)
            if first < last:
                part = self._rows[n].reshape(-1)[first - row * self._width : last - row * self._width]
                out = dst[first - start : last - start]
                count += Cast().apply(part.contiguous(), out, 0)
        return count


X = TypeVar("X")


class Deltas:
    """ΔW of the tensors in work, made when needed and dropped soon after, so that memory stays small."""

    def __init__(self, keep: int = 3) -> None:
        self._keep, self._held = keep, OrderedDict[object, object]()
        self._lock = Lock()

    def of(self, site: LowRank, shape: tuple[int, ...]) -> Callable[[int, int], Delta]:
        """ΔW of a stored parameter, whole or cut to the asked rows where its factors are large."""
        layout = site.layout
        assert layout is not None
        if (site.A.numel() + site.B.numel()) * 4 > _WHOLE:
            return lambda r0, r1: Delta.of(site.A, site.B, site.scale, layout, shape, rows=(r0, r1))
        return self.whole(lambda: Delta.of(site.A, site.B, site.scale, layout, shape))

    def whole(self, make: Callable[[], Delta]) -> Callable[[int, int], Delta]:
        """:meth:`kept`, for callers that ask for rows."""
        get = self.kept(make)
        return lambda r0, r1: get()

    def kept(self, make: Callable[[], X]) -> Callable[[], X]:
        """``make()``'s result, kept until a few others have been asked for."""

        def get() -> X:
            with self._lock:
                if make not in self._held:
                    self._held[make] = make()
                self._held.move_to_end(make)
                while len(self._held) > self._keep:
                    self._held.popitem(last=False)
                return cast("X", self._held[make])

        return get


def shift(tensor: torch.Tensor, scale: float) -> Delta:
    """``scale · b`` as a ΔW of rank 1 (left is [[1]], right is b), so that it is rounded once as all are."""
    count = tensor.numel()
    left = torch.ones(1, 1, dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    term = Term(
        (0, 1),
        (0, count),
        left,
        wide(tensor.detach().reshape(1, -1)),
        torch.tensor([scale], dtype=torch.float64),
    )
    return Delta((1, count), (term,))


def broken(src: torch.Tensor, dst: torch.Tensor) -> int:
    """Elements that are finite in ``src`` and not in ``dst``."""
    if dst.dtype not in WEIGHT_DTYPES:
        return 0
    return int((src.isfinite() & ~dst.isfinite()).sum())
