"""Output files as streams of bytes: a background that is copied, and regions that are computed."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from threading import local

import torch

from .. import checksum
from ..errors import StateError
from .ops import Op
from .sources import OpenFile, Source

#: bytes of an output file that are read, computed and written in one go; a multiple of a disk block
CHUNK = 2 << 20


@dataclass(frozen=True)
class Region:
    """One tensor's bytes ``[start, stop)`` in the output file.

    ``op`` is None where the source's elements are the output's. ``elements`` of ``dtype`` begin at
    ``start`` and may lie unaligned, in the file and in a chunk.
    """

    name: str
    start: int
    stop: int
    dtype: torch.dtype
    source: Source
    op: Op | None
    #: whether the source's bytes are the background's, at the same place
    own: bool = False

    def fill(self, out: torch.Tensor, at: int, held: bool) -> int:
        """Fill ``out`` (uint8) with the tensor's bytes from byte ``at`` of it on.

        Args:
            held: ``out`` holds the background's bytes already.
        Returns:
            How many elements overflowed.
        """
        size, end = self.dtype.itemsize, at + out.numel()
        first, last = at // size, -(-end // size)
        whole = at % size == 0 and end % size == 0 and out.data_ptr() % size == 0
        dst = out.view(self.dtype) if whole else torch.empty(last - first, dtype=self.dtype)
        src = dst
        if not (whole and held and self.own):
            src = dst if self.source.dtype == self.dtype else scratch(last - first, self.source.dtype)
            self.source.read(first, src)
        broken = 0 if self.op is None else self.op.apply(src, dst, first)
        if not whole:
            out.copy_(dst.view(torch.uint8)[at - first * size : end - first * size])
        return broken


@dataclass
class Shard:
    """One output file.

    Args:
        name: the file's name.
        size: its length in bytes.
        head: the header's bytes; not needed where there is a background.
        background: the base's file of equal header and length; only the regions differ from it.
        regions: in order, without overlap; without a background they fill everything after the head.
        data_bytes: the tensors' bytes, which is what an index counts.
    """

    name: str
    size: int
    head: bytes
    background: OpenFile | None
    regions: list[Region]
    data_bytes: int
    written: int = 0
    read: int = 0
    overflow: dict[str, int] = field(default_factory=dict[str, int])

    def chunks(self, size: int) -> int:
        return -(-self.size // size)

    @cached_property
    def _starts(self) -> list[int]:
        return [r.start for r in self.regions]

    def fill(self, out: torch.Tensor, at: int) -> tuple[int, int]:
        """Fill ``out`` with the file's bytes from ``at`` on; the chunk's hash sums (base's, output's)."""
        before = 0
        if self.background is not None:
            self.background.read(at, out)
            before = checksum.update(out, at)
        elif at < len(self.head):
            part = self.head[at : at + out.numel()]
            out[: len(part)] = torch.frombuffer(bytearray(part), dtype=torch.uint8)
        touched = False
        for region in self._between(at, at + out.numel()):
            first, last = max(at, region.start), min(at + out.numel(), region.stop)
            window = out[first - at : last - at]
            broken = region.fill(window, first - region.start, self.background is not None)
            if broken:
                self.overflow[region.name] = self.overflow.get(region.name, 0) + broken
            touched = True
        fresh = touched or self.background is None
        return before, checksum.update(out, at) if fresh else before

    def _between(self, first: int, last: int) -> list[Region]:
        n = max(0, bisect_right(self._starts, first) - 1)
        found: list[Region] = []
        while n < len(self.regions) and self.regions[n].start < last:
            if self.regions[n].stop > first:
                found.append(self.regions[n])
            n += 1
        return found

    def names(self, at: int, stop: int) -> list[str]:
        """Names of the regions that meet ``[at, stop)``."""
        return [r.name for r in self._between(at, stop)]


def refuse_overflow(shards: list[Shard]) -> None:
    """Refuse a result that holds infinities which the base and the adapter do not.

    Raises:
        StateError: naming the tensors.
    """
    found = {
        name: (n, r.dtype)
        for s in shards
        for r in s.regions
        for name, n in s.overflow.items()
        if r.name == name
    }
    if found:
        listed = ", ".join(f"{name} ({n} elements)" for name, (n, _) in list(found.items())[:5])
        dtype = str(next(iter(found.values()))[1]).removeprefix("torch.")
        mend = "use --dtype bfloat16" if dtype == "float16" else "use --dtype float32, or check the adapter"
        raise StateError(f"W + ΔW overflows {dtype} and becomes infinite in {listed}; {mend}")


_own = local()


def scratch(count: int, dtype: torch.dtype) -> torch.Tensor:
    """This thread's reusable memory for elements in the source's dtype."""
    held: torch.Tensor | None = getattr(_own, "bytes", None)
    size = count * dtype.itemsize
    if held is None or held.numel() < size:
        held = torch.empty(size, dtype=torch.uint8)
        _own.bytes = held
    return held[:size].view(dtype)
