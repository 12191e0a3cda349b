"""One pair of factors for a whole weight, where Graft keeps one pair for each of its blocks.

A block-structured B (zero outside each block's own ranks) says the same ΔW exactly: every added product
is a product with zero. Formats without blocks are written with it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..adapter import LowRank
from ..layout import Layout


def joined(site: LowRank) -> LowRank:
    """The same update with layout ``o i`` or ``i o``: fused blocks become one rank-(n·r) pair.

    Raises:
        ValueError: a layout whose groups read different inputs (grouped and transposed convolutions).
    """
    layout, shape = site.layout, site.shape
    assert layout is not None and shape is not None
    if layout.matrix is not None:
        site = _unmatrixed(site, layout.matrix, shape)
        layout = site.layout
        assert layout is not None
    if layout.pattern in ("o i", "i o"):
        return site
    if layout.pattern not in ("(g o) i", "i (g o)") or (len(shape) > 2 and layout.groups > 1):
        raise ValueError(layout.pattern)
    rank, enabled = site.rank, layout.enabled
    block = site.B.shape[0] // len(enabled)
    b = site.B.new_zeros((layout.groups * block, rank * len(enabled)))
    for n, g in enumerate(enabled):
        b[g * block : (g + 1) * block, n * rank : (n + 1) * rank] = site.B[n * block : (n + 1) * block]
    pattern = "o i" if layout.pattern == "(g o) i" else "i o"
    return _replaced(site, site.A, b, Layout(pattern))


def _unmatrixed(site: LowRank, matrix: tuple[int, int], shape: tuple[int, ...]) -> LowRank:
    """loralib's convolution ``[out·q, cols]`` as ``[out, q·cols]``: q bands a filter, each with own ranks."""
    bands, rest = divmod(matrix[0], shape[0])
    assert site.layout is not None
    grouped = matrix[1] != shape[1] * shape[2]  # loralib's columns are all input channels, W's only a group's
    if rest or grouped or site.layout.pattern != "o i":
        raise ValueError(f"matrix {matrix} of a weight {shape}")
    rank, cols = site.rank, matrix[1]
    assert math.prod(matrix) == math.prod(shape)
    a = site.A.new_zeros((bands * rank, bands * cols))
    for n in range(bands):
        a[n * rank : (n + 1) * rank, n * cols : (n + 1) * cols] = site.A
    b = site.B.reshape(shape[0], bands * rank)
    return _replaced(site, a, b, Layout("o i"))


def all_experts(site: LowRank) -> LowRank:
    """The same update with every group enabled: zero B for those that were not."""
    layout = site.layout
    assert layout is not None
    if layout.only is None:
        return site
    rank, n = site.rank, len(layout.only)
    a = site.A.new_zeros((layout.groups, rank, site.A.shape[1]))
    b = site.B.new_zeros((layout.groups, site.B.shape[0] // n, rank))
    index = torch.tensor(layout.only)
    a[index] = site.A.reshape(n, rank, -1)
    b[index] = site.B.reshape(n, -1, rank)
    return _replaced(site, a.flatten(0, 1), b.flatten(0, 1), Layout(layout.pattern, layout.groups))


def _replaced(site: LowRank, a: torch.Tensor, b: torch.Tensor, layout: Layout | None) -> LowRank:
    return replace(site, A=a, B=b, layout=layout)
