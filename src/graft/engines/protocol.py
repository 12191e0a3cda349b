"""What an engine is: the part of a weight that is here, and how factors and whole weights travel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
        within: for each axis of this process's own tensor the range where the piece lies; None for all.
    """

    tensor: torch.Tensor
    index: tuple[Span, ...] | None = None
    start: int = 0
    within: tuple[Span, ...] | None = None

    def localise(self, delta: Delta, layout: Layout, shape: Sequence[int]) -> tuple[Delta, int]:
        """ΔW of this piece, and the flat position in it of the piece's first element."""
        if self.index is None:
            return delta, self.start
        return cut(delta, layout, shape, self.index), 0

    def runs(self, shape: Sequence[int], first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Elements that lie side by side in the row-major weight too, of ``count`` from ``first`` on.

        Yields:
            Flat position in the piece, flat position in the weight of this shape, length.
        """
        if self.index is None:
            yield first, self.start + first, count
            return
        sizes = [high - low for low, high in self.index]
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        # the last axis that is cut: what follows it is whole, so its elements follow each other
        axis = max((n for n, size in enumerate(sizes) if size != shape[n]), default=0)
        length = math.prod(sizes[axis:])
        while count > 0:
            run, inside = divmod(first, length)
            at = inside
            for n in reversed(range(len(sizes))):
                run, here = divmod(run, sizes[n]) if n < axis else (run, 0)
                at += (self.index[n][0] + here) * strides[n]
            taken = min(count, length - inside)
            yield first, at, taken
            first, count = first + taken, count - taken


def cut(delta: Delta, layout: Layout, shape: Sequence[int], index: Sequence[Span]) -> Delta:
    """ΔW of the block ``index`` of a weight of this shape."""
    if all(span == (0, size) for span, size in zip(index, shape, strict=True)):
        return delta
    return delta.local(*layout.region(shape, index))


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

    def writes(self, parameter: torch.Tensor) -> bool:
        """Whether this process's parts are its to write: of those that hold the same, one says yes."""
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

    def told(self, text: str) -> str:
        """The text that the process that writes has. Collective."""
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
