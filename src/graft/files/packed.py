"""Parameters that a model packs in memory and its files keep in parts: each part gets its slice of ΔW.

Law 2 makes this one operation: slices commute with the product, so a part that is rows r0 to r1 and
columns c0 to c1 of the packed parameter's stored matrix gets exactly those rows and columns of ΔW.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..adapter import LowRank
from ..delta import Delta


@dataclass(frozen=True)
class Part:
    """One file tensor as a rectangle of a packed parameter's stored matrix S.

    Args:
        site: the packed parameter's update, bound.
        packed: the packed parameter's name.
        shape: the packed parameter's shape.
        rows: the rectangle's rows of S.
        cols: its columns.
        transposed: whether the file stores the rectangle's transpose.
    """

    site: LowRank
    packed: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    cols: tuple[int, int]
    transposed: bool = False

    @property
    def width(self) -> int:
        """Columns of the matrix that the file stores."""
        low, high = self.rows if self.transposed else self.cols
        return high - low

    @property
    def how(self) -> str:
        return f"rank {self.site.rank}, part of {self.packed}"

    def delta(self) -> Delta:
        """This part's ΔW."""
        site = self.site
        assert site.layout is not None
        whole = Delta.of(site.A, site.B, site.scale, site.layout, self.shape, rows=self.rows, cols=self.cols)
        part = whole.local([self.rows], self.cols)
        if not self.transposed:
            return part
        flipped = (
            replace(t, rows=t.cols, cols=t.rows, left=t.right.T.contiguous(), right=t.left.T.contiguous())
            for t in part.terms
        )
        return Delta((part.stored[1], part.stored[0]), tuple(flipped))


@dataclass(frozen=True)
class Both:
    """Two updates of one stored parameter: that of an embedding and that of the head tied to it."""

    first: LowRank
    second: LowRank
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        assert self.first.layout is not None
        return self.first.layout.stored(self.shape)[1]

    @property
    def how(self) -> str:
        return f"ranks {self.first.rank} + {self.second.rank}"

    def delta(self) -> Delta:
        """The sum of both ΔW."""
        return self.first.delta(self.shape) + self.second.delta(self.shape)
