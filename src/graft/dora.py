"""DoRA's update: ``W' = m · (W + ΔW) / ‖W + ΔW‖``, the norm taken over each row of M.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, eq. 5, with PEFT's axes: the
rows of M are output features (Linear, Conv) or embedding dimensions (Embedding), so m has o elements.

Everything is computed in float64 and rounded once. A norm is a long sum, so unlike a plain W + ΔW the
number is not proven to be the nearest one; it is independent of chunks and threads, because all sums
run over fixed blocks of rows counted from row 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from threading import Lock

import torch

from .adapter import LowRank
from .delta import Delta
from .errors import FormatError
from .rounding import round_once

#: elements of a block in float64: a few blocks in work stay small
_BLOCK = 1 << 17

#: gives rows r0 to r1 of the stored matrix S, in its own dtype, as ``[r1 − r0, C]``
ReadRows = Callable[[int, int], torch.Tensor]


def check(site: LowRank, shape: tuple[int, ...]) -> None:
    """Whether :class:`Dora` can honour a site, from its shapes alone.

    Raises:
        FormatError: a magnitude of another size, or a layout that DoRA is not defined for.
    """
    layout, magnitude = site.layout, site.magnitude
    assert layout is not None and magnitude is not None
    if len(layout.enabled) != layout.groups or layout.pattern not in ("o i", "i o", "(g o) i"):
        raise FormatError(f"DoRA is not defined for layout {layout.pattern!r} or groups left out")
    rows, cols = layout.stored(shape)
    count = cols if layout.pattern == "i o" else rows
    if magnitude.numel() != count:
        raise FormatError(
            f"DoRA's magnitude has {magnitude.numel()} elements, the weight {tuple(shape)} needs {count}"
        )


class Dora:
    """The DoRA update of one stored parameter, in fixed blocks of whole rows of its stored matrix.

    Args:
        site: factors with a ``magnitude`` of as many elements as M has rows.
        shape: the stored parameter's shape.
        read: gives rows of the stored matrix; called again for every pass.
    Raises:
        FormatError: see :func:`check`.
    """

    def __init__(self, site: LowRank, shape: tuple[int, ...], read: ReadRows) -> None:
        check(site, shape)
        layout, magnitude = site.layout, site.magnitude
        assert layout is not None and magnitude is not None
        self._delta: Delta = site.delta(shape)
        self._rows, self.width = layout.stored(shape)
        self._by_column = layout.pattern == "i o"
        self._magnitude = magnitude.detach().reshape(-1).double()
        self._read = read
        self._step = max(1, _BLOCK // max(1, self.width))
        self._lock = Lock()

    def add(self, src: torch.Tensor, dst: torch.Tensor, *, start: int = 0) -> int:
        """As :meth:`graft.delta.Delta.add`: ``dst = round(m·(W + ΔW)/‖W + ΔW‖)`` for a flat range."""
        with self._lock:
            factor = self._factor
        broken = 0
        stop = start + src.numel()
        pieces = list(self._blocks(start // self.width, -(-stop // self.width)))
        # In place, a block is read again from the source only where the range cuts it: its other rows'
        # numbers do not matter, so zeros stand for them.
        for r0, r1 in pieces:
            first, last = max(start, r0 * self.width), min(stop, r1 * self.width)
            held = torch.zeros((r1 - r0) * self.width, dtype=src.dtype)
            own = slice(first - r0 * self.width, last - r0 * self.width)
            held[own] = src[first - start : last - start]
            value = self._sum(held.view(-1, self.width), r0, r1)
            value *= factor if self._by_column else factor[r0:r1, None]
            part = round_once(value.view(-1)[own], dst.dtype)
            broken += int((held[own].isfinite() & ~part.isfinite()).sum())
            dst[first - start : last - start] = part
        return broken

    @cached_property
    def _factor(self) -> torch.Tensor:
        """``m / ‖W + ΔW‖`` for each row of M, float64."""
        squares = torch.zeros(self.width if self._by_column else self._rows, dtype=torch.float64)
        for r0, r1 in self._blocks(0, self._rows):
            value = self._sum(self._read(r0, r1), r0, r1).square_()
            if self._by_column:
                squares += value.sum(dim=0)
            else:
                squares[r0:r1] = value.sum(dim=1)
        return self._magnitude / squares.sqrt_()

    def _sum(self, rows: torch.Tensor, r0: int, r1: int) -> torch.Tensor:
        """``W + ΔW`` in float64 for whole rows."""
        return rows.double() + self._delta.local([(r0, r1)], (0, self.width)).dense()

    def _blocks(self, r0: int, r1: int) -> Iterator[tuple[int, int]]:
        """Blocks of rows counted from row 0 that meet ``[r0, r1)``."""
        for top in range(r0 - r0 % self._step, r1, self._step):
            yield top, min(top + self._step, self._rows)
