"""What an engine is: the part of a weight that is here, and how factors and whole weights travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ..delta import Delta
from ..layout import Layout, Span


@dataclass(frozen=True)
class Part:
    """A contiguous piece of a stored weight in this process's memory, to be read or edited in place.

    Args:
        tensor: the piece itself, contiguous, sharing memory with what the engine trains and saves.
        index: for each axis of the weight the range that the piece holds; None for a flat piece.
        start: for a flat piece, the position of its first element in the row-major weight.
    """

    tensor: torch.Tensor
    index: tuple[Span, ...] | None = None
    start: int = 0

    def localise(self, delta: Delta, layout: Layout, shape: Sequence[int]) -> tuple[Delta, int]:
        """ΔW of this piece, and the flat position in it of the piece's first element."""
        if self.index is None:
            return delta, self.start
        if all(span == (0, size) for span, size in zip(self.index, shape, strict=True)):
            return delta, 0
        return delta.local(*layout.region(shape, self.index)), 0


class Engine(Protocol):
    """How one library spreads parameters over processes. Every method with "collective" is called by all."""

    @property
    def name(self) -> str: ...

    def shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        """The parameter's global shape."""
        ...

    def parts(self, parameter: torch.Tensor) -> list[Part]:
        """What this process holds of the parameter; empty if nothing.

        Raises:
            StateError: it cannot be edited in place now (in flight, quantised, on NVMe, trainable).
        """
        ...

    def gather(self, factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Thin factors in full, on every process, in one batch. Collective."""
        ...

    def collect(self, parameter: torch.Tensor, pieces: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The whole weight from new values of every process's parts, on the writer; else None. Collective."""
        ...

    def place(
        self, weight: torch.Tensor, layout: Layout, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole new factors as this engine keeps them beside the weight: the writer's values. Collective.

        A is split where the weight is split on ``in``, B where it is split on ``out`` (aligned factors).
        """
        ...

    def agree(self, ok: bool) -> bool:
        """Whether all processes say yes. Collective."""
        ...

    def same(self, text: str) -> bool:
        """Whether all processes give the same text. Collective."""
        ...

    def is_writer(self) -> bool:
        """Whether this process writes files."""
        ...


@runtime_checkable
class Aligned(Protocol):
    """An engine that may keep factors cut as the weight is: then a shard's ΔW needs no other process."""

    def own(self, parameter: torch.Tensor, a: torch.Tensor, b: torch.Tensor, layout: Layout) -> Part | None:
        """The shard here, to be read as a weight of its own with these factors' own parts.

        None where the factors must be gathered.
        """
        ...

    def alike(self, factors: Sequence[torch.Tensor]) -> bool:
        """Whether the factors that every process keeps in full are equal everywhere. Collective."""
        ...
