"""Fuse in place so that unfuse gives every bit back: an exact inverse in a fraction of a bit per weight.

``W' = round(W + ΔW)`` loses up to half a unit in the last place, and ``U = round(W' − ΔW)`` is W again
for nearly all elements. Both roundings are of exact real numbers (see :mod:`graft.delta`), so U is the
same number whenever and wherever it is computed, and only the exceptions U ≠ W need keeping.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .delta import Delta


@dataclass(frozen=True)
class Undo:
    """What a fused weight needs to become the base again. Opaque; ``nbytes`` is its memory."""

    saved: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.saved.numel() * self.saved.element_size()


def fuse(weight: torch.Tensor, delta: Delta, *, start: int = 0) -> Undo:
    """Add ΔW to ``weight`` in place, rounded once, and return what undoes it.

    ``weight`` is the whole stored weight (any dense strides), or with ``start`` a flat shard of it.

    Raises:
        StateError: the sum overflows the weight's dtype (the weight is left as it was).
    """
    raise NotImplementedError


def unfuse(weight: torch.Tensor, delta: Delta, undo: Undo, *, start: int = 0) -> None:
    """Give ``weight`` every bit back that it had before :func:`fuse`.

    Raises:
        StateError: the weight or the factors are not those that fuse left (nothing is written).
    """
    raise NotImplementedError
