"""Fuse in place so that unfuse gives every bit back, for a fraction of a bit per weight.

``W' = round(W + ΔW)`` loses up to half a unit in the last place, and ``U = round(W' − ΔW)`` is W again
for nearly all elements (99.8 % of bf16 at ‖ΔW‖/‖W‖ = 1e-3, 92 % at 1e-1). Both roundings are of exact real
numbers (see :mod:`graft.delta`), so U is the same number whenever and wherever it is computed, and only
the exceptions U ≠ W are kept: per block of rows a list of

    gap  uint8   elements passed since the last exception; 255 passes 255 and is none itself
    fix  int8    how many floats lie between U and W; −128: W's own bits are the next in ``raw``

Checksums of the fused weight, the factors and the base guard the way back: a weight or factor that
changed while fused is refused before anything is written, and the restored base is proven.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

from . import checksum, kernel
from .delta import Block, Delta, add_block, each, exact_block
from .errors import StateError
from .rounding import bits, from_ordered, ordered

_SKIP, _RAW = 255, -128


@dataclass(frozen=True)
class Exceptions:
    """Where U is not W inside one block, counted row by row."""

    gap: torch.Tensor
    fix: torch.Tensor
    raw: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.gap, self.fix, self.raw))


@dataclass(frozen=True)
class Undo:
    """What a fused weight needs to become the base again; ``nbytes`` is the memory it holds.

    ``base`` and ``fused`` are checksums of the weight before and after, ``factors`` of A, B and scale.
    """

    blocks: list[Exceptions] = field(repr=False)
    base: int
    fused: int
    factors: int

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.blocks)


def fuse(weight: torch.Tensor, delta: Delta, *, start: int = 0) -> Undo:
    """Add ΔW to ``weight`` in place, rounded once, and return what undoes it.

    Args:
        weight: the whole stored weight; with ``start``, a flat shard of it. A weight that is not
            contiguous (channels-last) is worked on in a contiguous copy.
        delta: the update, for the whole stored weight.
        start: flat position of the shard's first element.
    Raises:
        StateError: the sum overflows the weight's dtype (the weight is left as it was).
    """
    weight = weight.detach()
    base = checksum.checksum(weight)
    flat = _flat(weight)
    width = delta.stored[1]

    def one(block: Block) -> tuple[Exceptions, int]:
        return _fuse_block(block.window(flat, start, width), block)

    results = list(each(one, delta.blocks(start, flat.numel()), flat))
    _write_back(weight, flat)
    undo = Undo([e for e, _ in results], base, checksum.checksum(weight), fingerprint(delta))
    broken = sum(n for _, n in results)
    if broken:
        unfuse(weight, delta, undo, start=start)
        raise StateError(
            f"{broken} elements of the fused weight are beyond the range of {weight.dtype}; the weight "
            "was left unfused. Lower the scale, or convert the base to bfloat16 or float32 first"
        )
    return undo


def unfuse(weight: torch.Tensor, delta: Delta, undo: Undo, *, start: int = 0) -> None:
    """Give ``weight`` every bit back that it had before :func:`fuse`.

    Raises:
        StateError: the weight or the factors are not those that fuse left (nothing is written).
    """
    weight = weight.detach()
    if fingerprint(delta) != undo.factors:
        raise StateError(
            "A, B or the scale changed while fused, so the base cannot be restored from them. "
            "Unfuse before the factors are trained or loaded; now put the factors back as they were at "
            "fuse, or reload the base"
        )
    if checksum.checksum(weight) != undo.fused:
        raise StateError(
            "the fused weight was edited after fuse, so the base cannot be restored from it. "
            "Unfuse before the weight is changed; now undo that edit, or reload the base"
        )
    flat = _flat(weight)
    width = delta.stored[1]
    work = list(zip(delta.blocks(start, flat.numel()), undo.blocks, strict=True))

    def one(item: tuple[Block, Exceptions]) -> None:
        block, found = item
        _unfuse_block(block.window(flat, start, width), block, found)

    list(each(one, work, flat))
    _write_back(weight, flat)
    assert checksum.checksum(weight) == undo.base, "unfuse did not restore the base"


def fingerprint(delta: Delta) -> int:
    """Checksum of everything that ΔW is computed from."""
    total = 0
    for n, t in enumerate(delta.terms):
        for tensor in (t.left, t.right, t.scale):
            total = checksum.mix((total * 31 + checksum.checksum(tensor) + n) & ((1 << 64) - 1))
    return total


def _flat(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous().view(-1)


def _write_back(weight: torch.Tensor, flat: torch.Tensor) -> None:
    if flat.data_ptr() != weight.data_ptr():
        weight.copy_(flat.view(weight.shape))


def _fuse_block(w: torch.Tensor, block: Block) -> tuple[Exceptions, int]:
    """Fuse one block; return its exceptions and how many finite elements became non-finite."""
    left, right = block.factors
    scale = block.term.scale
    if kernel.usable(w) and left.dtype == right.dtype == torch.float32:
        fused, back, room = _scratch(w)
        broken = kernel.there_and_back(w, fused, back, left, right, scale)
        found = Exceptions(*kernel.exceptions(w, back, room))
    else:
        fused = exact_block(w, w.dtype, left, right, scale, 1)
        back = exact_block(fused, w.dtype, left, right, scale, -1)
        broken = int((~fused.isfinite() & w.isfinite()).sum())
        found = _encode(w, back)
    w.copy_(fused)
    return found, broken


_kept = threading.local()


def _scratch(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two blocks like ``w``, and bytes for its exceptions; the same memory for every block of a thread.

    Fresh memory would cost more than the sums: the system clears each page when it is touched first.
    """
    item, n = w.element_size(), w.numel()
    size = n * (2 * item + kernel.exception_bytes(w.dtype))
    room: torch.Tensor | None = getattr(_kept, "room", None)
    if room is None or room.numel() < size:
        room = _kept.room = torch.empty(size, dtype=torch.uint8)
    fused, back = (room[k * n * item : (k + 1) * n * item].view(w.dtype).view(w.shape) for k in range(2))
    return fused, back, room[2 * n * item : size]


def _unfuse_block(w: torch.Tensor, block: Block, found: Exceptions) -> None:
    add_block(w, w, *block.factors, block.term.scale, -1)
    if kernel.usable(w):
        kernel.correct(w, found.gap, found.fix, found.raw)
        return
    where, value = _decode(found, w)
    w[where // w.shape[1], where % w.shape[1]] = value


def _encode(w: torch.Tensor, back: torch.Tensor) -> Exceptions:
    """Twin of graft_exceptions in kernel/undo.c."""
    where = (bits(w) != bits(back)).flatten().nonzero().flatten()
    before = torch.cat([where.new_full((1,), -1), where[:-1]])
    passed = where - before - 1
    skips = passed // _SKIP
    gap = torch.full((int(skips.sum()) + len(where),), _SKIP, dtype=torch.uint8, device=w.device)
    gap[(skips + 1).cumsum(0) - 1] = (passed % _SKIP).to(torch.uint8)
    own, other = w.flatten()[where], back.flatten()[where]
    far = (ordered(own) - ordered(other)).clamp(_RAW, -_RAW)
    if w.dtype == torch.float64:
        far = far.fill_(_RAW)
    raw = far.abs() >= -_RAW
    return Exceptions(gap, torch.where(raw, _RAW, far).to(torch.int8), own[raw])


def _decode(found: Exceptions, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions of the exceptions in the block, and the values that belong there."""
    steps = found.gap.long()
    real = steps != _SKIP
    ends = (steps + real).cumsum(0)
    where = ends[real] - 1
    now = w.flatten()[where]
    fix = found.fix.long()
    value = from_ordered(ordered(now) + fix, w.dtype)
    value[fix == _RAW] = found.raw
    return where, value
