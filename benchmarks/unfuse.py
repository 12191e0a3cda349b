"""In memory: graft's exact fuse + unfuse against the plain add and subtract, and its memory while fused.

    python benchmarks/unfuse.py [--size 4096] [--rank 16] [--runs 9]

The plain way is what loralib, DeepSpeed and PEFT do: ``W += scale·(B @ A)`` in the weight's dtype, then
``W -= …``. It leaves the base changed; the table says in how many weights.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import interleaved, machine, median_ratio

from graft import kernel, undo
from graft.delta import Delta
from graft.layout import Layout
from graft.rounding import bits


def measure(dtype: torch.dtype, ratio: float, size: int, rank: int, runs: int) -> str:
    torch.manual_seed(0)
    w = torch.randn(size, size).mul(0.02).to(dtype)
    base = bits(w).clone()
    a, b = torch.randn(rank, size), torch.randn(size, rank)
    scale = ratio * float(w.float().norm() / (b @ a).norm())
    plain = w.clone()
    a_plain, b_plain = a.to(dtype), b.to(dtype)
    kept: list[undo.Undo] = []

    def add() -> None:
        plain.add_(scale * (b_plain @ a_plain))

    def subtract() -> None:
        plain.sub_(scale * (b_plain @ a_plain))

    def fuse() -> None:
        kept[:] = [undo.fuse(w, Delta.of(a, b, scale, Layout(), w.shape))]

    def unfuse() -> None:
        undo.unfuse(w, Delta.of(a, b, scale, Layout(), w.shape), kept[0])

    t = interleaved({"add": add, "fuse": fuse, "subtract": subtract, "unfuse": unfuse}, runs)
    assert torch.equal(bits(w), base), "unfuse must give every bit back"
    lost = float((bits(plain) != base).double().mean())
    both = [x + y for x, y in zip(t["fuse"], t["unfuse"], strict=True)]
    pair = [x + y for x, y in zip(t["add"], t["subtract"], strict=True)]
    return (
        f"| {str(dtype).removeprefix('torch.')} | {ratio:g} | {statistics.median(pair) * 1e3:.1f} "
        f"| {statistics.median(both) * 1e3:.1f} | {median_ratio(both, pair):.2f} "
        f"| {kept[0].nbytes * 8 / w.numel():.3f} | 0 | {lost:.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    print(f"{machine()}; kernel: {kernel.status()}; weight {args.size}², rank {args.rank}")
    print(
        "| dtype | ‖ΔW‖/‖W‖ | add + subtract, ms | fuse + unfuse, ms | ratio | bits a weight while fused "
        "| weights changed by graft | by add + subtract |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for ratio in (1e-4, 1e-3, 1e-2, 1e-1):
            print(measure(dtype, ratio, args.size, args.rank, args.runs), flush=True)


if __name__ == "__main__":
    main()
