"""Packed experts (transformers 5): one parameter in memory, a file tensor per expert on disk."""

from __future__ import annotations

from dataclasses import dataclass

from ..adapter import Adapter, LowRank
from ..checkpoint import Checkpoint
from .packed import Part


@dataclass(frozen=True)
class Packed:
    """A packed parameter that the base's files keep in parts.

    Args:
        shape: the packed parameter's shape.
        places: file tensor → its rows and columns of the packed parameter's stored matrix, and whether
            the file stores that rectangle's transpose.
    """

    name: str
    shape: tuple[int, ...]
    places: dict[str, tuple[tuple[int, int], tuple[int, int], bool]]

    def parts(self, site: LowRank) -> dict[str, Part]:
        """Each file tensor's part of a bound update."""
        return {
            file: Part(site, self.name, self.shape, rows, cols, flipped)
            for file, (rows, cols, flipped) in self.places.items()
        }


def packed_parameters(base: Checkpoint, adapter: Adapter) -> dict[str, Packed]:
    """The packed parameters that this adapter may mean and this base keeps in parts."""
    return {}
