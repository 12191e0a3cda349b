"""Which part of a weight is in this process, and how thin factors and whole weights travel.

Law 2, ``(B·A)[rows, cols] = B[rows] · A[:, cols]``, means that no process ever needs all of W to fuse: it
adds the block of ΔW that belongs to what it holds. An engine answers four questions about a parameter
(its global shape, the parts held here, how to gather thin factors, how to bring a whole weight to the one
process that writes), and nothing else in Graft knows how a model is spread.

Engines are found by the parameter itself, and only if their library is already imported: a model cannot
hold a ZeRO or Megatron parameter unless its program imported DeepSpeed or Megatron. To add an engine, write
a module here with ``recognises`` and an ``Engine``, and name it in ``_ENGINES``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

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

    def agree(self, ok: bool) -> bool:
        """Whether all processes say yes. Collective."""
        ...

    def is_writer(self) -> bool:
        """Whether this process writes files."""
        ...


# module → what must be imported already for its parameters to exist; asked in this order
_ENGINES: dict[str, str] = {}


def engine_of(parameter: torch.Tensor) -> Engine:
    """The engine that spreads this parameter; the plain one if none does."""
    for name, needs in _ENGINES.items():
        if needs in sys.modules:
            engine, recognises = _load(name)
            if recognises(parameter):
                return engine
    return _load("plain")[0]


@cache
def _load(name: str) -> tuple[Engine, Any]:
    module: Any = importlib.import_module(f"{__name__}.{name}")
    return cast(Engine, module.ENGINE), module.recognises


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The parameter's global shape, whatever its engine."""
    return engine_of(parameter).shape(parameter)
