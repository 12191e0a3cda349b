"""Oracles in exact rational arithmetic: slow, obvious, and independent of the library's own ways."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

#: precision in bits and least exponent of a subnormal's unit, per dtype
_FORMAT = {torch.bfloat16: (8, -133), torch.float16: (11, -24), torch.float32: (24, -149)}


def round_fraction(x: Fraction, dtype: torch.dtype) -> float:
    """A rational rounded to nearest even; magnitudes below the dtype's overflow threshold only."""
    precision, least = _FORMAT[dtype]
    if x == 0:
        return 0.0
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - precision + 1, least)
    return math.copysign(float(round(x / unit) * unit), x)


def fused(w: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """``round(w + scale · left · right)`` element by element in rationals; where ΔW = 0, w itself."""
    out = w.clone()
    rank = left.shape[1]
    s = Fraction(scale)
    l_rows = [[Fraction(x) for x in row] for row in left.double().tolist()]
    r_rows = [[Fraction(x) for x in row] for row in right.double().tolist()]
    for o, base in enumerate(w.double().tolist()):
        for i, value in enumerate(base):
            delta = s * sum((l_rows[o][k] * r_rows[k][i] for k in range(rank)), Fraction(0))
            if delta:
                out[o, i] = round_fraction(Fraction(value) + delta, w.dtype)
    return out
