"""Other ways to remember the base while a weight is fused, in bits a weight.

    python benchmarks/undo_designs.py

gap + fix      what graft does: one byte for the distance, one for the correction of each exception
one byte       distance and the sign of a ±1 correction in one byte; other corrections escape to 3 bytes
bit mask       one bit a weight says where, one byte an exception says what
index list     a 32-bit position and the weight's own bits for each exception
deflate        zlib level 1 over the corrections of all weights, most of them zero
entropy        the order-0 entropy of the corrections: what no coder of independent symbols can beat
"""

from __future__ import annotations

import zlib

import torch

from graft import undo
from graft.delta import Delta
from graft.layout import Layout
from graft.rounding import ordered


def corrections(w: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, int]:
    """ordered(W) − ordered(round(W' − ΔW)) for every weight, and the bytes that graft keeps."""
    back = w.clone()
    kept = undo.fuse(back, delta)
    flat = back.view(-1)
    subtract = Delta(
        delta.stored, tuple(type(t)(t.rows, t.cols, t.left, t.right, -t.scale) for t in delta.terms)
    )
    subtract.add(flat, flat)
    return (ordered(w) - ordered(back)).flatten(), kept.nbytes


def designs(fix: torch.Tensor, kept: int, width: int) -> dict[str, float]:
    n = fix.numel()
    where = fix.nonzero().flatten()
    gaps = torch.diff(where, prepend=where.new_tensor([-1])) - 1
    far = int((fix[where].abs() > 1).sum())
    short = int((gaps // 126).sum()) + len(where) + 3 * far
    counts = torch.unique(fix, return_counts=True)[1].double() / n
    stream = fix.clamp(-128, 127).to(torch.int8).numpy().tobytes()
    return {
        "gap + fix": kept * 8 / n,
        "one byte": short * 8 / n,
        "bit mask": 1 + len(where) * 8 / n,
        "index list": len(where) * (32 + width) / n,
        "deflate": len(zlib.compress(stream, 1)) * 8 / n,
        "entropy": float(-(counts * counts.log2()).sum()),
        "full copy": float(width),
    }


def main() -> None:
    head = False
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for ratio in (1e-4, 1e-3, 1e-2, 1e-1):
            torch.manual_seed(0)
            w = torch.randn(1024, 1024).mul(0.02).to(dtype)
            a, b = torch.randn(16, 1024), torch.randn(1024, 16)
            scale = ratio * float(w.float().norm() / (b @ a).norm())
            fix, kept = corrections(w, Delta.of(a, b, scale, Layout(), w.shape))
            row = designs(fix, kept, dtype.itemsize * 8)
            if not head:
                print("| dtype | ‖ΔW‖/‖W‖ | exceptions | " + " | ".join(row) + " |")
                print("|" + "---|" * (len(row) + 3))
                head = True
            share = float((fix != 0).double().mean())
            cells = " | ".join(f"{x:.3f}" for x in row.values())
            print(f"| {str(dtype).removeprefix('torch.')} | {ratio:g} | {share:.2%} | {cells} |")


if __name__ == "__main__":
    main()
