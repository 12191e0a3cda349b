"""Rounding once: from a real number to bf16, fp16 or fp32, to nearest even.

Two facts shape this file. torch casts float64 to bf16 *through* float32 and so rounds twice, which
misplaces 7.6e-6 of all elements; rounding to odd in between makes the second rounding harmless
(Boldo and Melquiond, "When double rounding is odd", 2005). And a sum of products in float64 is itself
rounded; where its error bound straddles a rounding boundary, the sum is taken again without any error
(Shewchuk's expansions, through :func:`math.fsum`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable

import torch

#: dtypes that a weight may have to be fused
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of the same width (a view)."""
    return x.view(_INT[x.element_size()])


def ordered(x: torch.Tensor) -> torch.Tensor:
    """Integers (int64) in the order of the floats, one apart for neighbours; −0 and +0 differ."""
    b = bits(x)
    return torch.where(b < 0, b ^ torch.iinfo(b.dtype).max, b).long()


def from_ordered(n: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of :func:`ordered`."""
    b = n.to(_INT[dtype.itemsize])
    return torch.where(b < 0, b ^ torch.iinfo(b.dtype).max, b).view(dtype)


def round_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 ``x`` rounded once, to nearest even, to ``dtype``; overflow gives ±inf, NaN stays NaN."""
    assert x.dtype == torch.float64
    if dtype in (torch.float32, torch.float64):
        return x.to(dtype)
    near = x.to(torch.float32)
    back = near.double()
    inexact = (back != x) & ~x.isnan()
    b = near.view(torch.int32)
    toward_zero = torch.where(inexact & (back.abs() > x.abs()), b - 1, b)
    odd = torch.where(inexact, toward_zero | 1, b)
    return odd.view(torch.float32).to(dtype)


def round_exact_sum(terms: Iterable[float], dtype: torch.dtype) -> float:
    """The exact sum of ``terms``, rounded once to ``dtype``; every term finite."""
    terms = list(terms)
    total = math.fsum(terms)
    if dtype == torch.float64 or not math.isfinite(total):
        return total
    rest = math.fsum([*terms, -total])
    if rest != 0.0 and struct.pack("<d", total)[0] & 1 == 0:
        total = math.nextafter(total, math.copysign(math.inf, rest))
    return float(round_once(torch.tensor(total, dtype=torch.float64), dtype))


def two_product(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 ``a · b`` as an exact pair ``hi + lo`` (Dekker 1971, Veltkamp splitting at 27 bits)."""

    def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = x * 134217729.0
        high = t - (t - x)
        return high, x - high

    hi = a * b
    (a1, a2), (b1, b2) = split(a), split(b)
    lo = ((a1 * b1 - hi) + a1 * b2 + a2 * b1) + a2 * b2
    return hi, lo
