"""Another naming of a base's modules: what a file calls one module may be rows of several parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .adapter import LowRank

Span = tuple[int, int]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Spelling:
    """A module of another naming, as parameters of the base.

    Args:
        naming: whose names these are.
        rows: the module's outputs.
        parts: its parameters in the base, each with the bands of the module's rows that it is made of.
    """

    naming: str
    rows: int
    parts: Mapping[str, Sequence[Span]]

    @classmethod
    def joined(cls, naming: str, names: Sequence[str], base: Shapes) -> Spelling:
        """A module whose rows are those of these parameters, one after the other."""
        parts: dict[str, list[Span]] = {}
        at = 0
        for name in names:
            parts[name] = [(at, at + base[name][0])]
            at += base[name][0]
        return cls(naming, at, parts)

    @classmethod
    def swapped(cls, naming: str, name: str, base: Shapes) -> Spelling:
        """A module whose two halves are the parameter's in the other order."""
        rows = base[name][0]
        return cls(naming, rows, {name: [(rows // 2, rows), (0, rows // 2)]})

    def fits(self, site: LowRank) -> bool:
        """Whether the update has as many rows as the module."""
        return site.B.shape[0] == self.rows

    def sites(self, site: LowRank) -> dict[str, LowRank]:
        """The update of each parameter: rows of B (and of DoRA's magnitude) with all of A."""
        if len(self.parts) == 1 and self.parts == {name: [(0, self.rows)] for name in self.parts}:
            return dict.fromkeys(self.parts, site)
        return {
            name: replace(
                site,
                B=_bands(site.B, bands),
                magnitude=None if site.magnitude is None else _bands(site.magnitude, bands),
            )
            for name, bands in self.parts.items()
        }


def _bands(tensor: torch.Tensor, bands: Sequence[Span]) -> torch.Tensor:
    cut = [tensor[first:last] for first, last in bands]
    return cut[0] if len(cut) == 1 else torch.cat(cut)
