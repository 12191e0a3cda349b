"""What the user may choose for one adapted weight, checked where it is given."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from .engines import engine_of, shape_of
from .errors import TargetError
from .layout import Layout

Position = Literal["pre", "mid", "post"]
Init = Literal["kaiming", "xavier", "normal"]


@dataclass(frozen=True)
class Options:
    """The update of one weight: ``ΔW = scale · B · A``, ``scale = alpha / rank`` (rsLoRA: ``alpha / √rank``).

    Args:
        rank: the rank r, at least 1. It may exceed the weight's own sizes.
        alpha: the scale's numerator; None means ``rank``, so that the plain scale is 1.
        rslora: ``alpha / √rank`` (Kalajdzievski, "A rank stabilization scaling factor", 2023).
        dropout: probability in ``[0, 1)``; active in training mode only, on the low-rank branch only.
        dropout_position: ``pre`` drops from x, ``mid`` from ``x Aᵀ``, ``post`` from ``x Aᵀ Bᵀ``. An
            embedding has no dense x: there ``pre`` means ``mid``.
        init: how A begins, B being zero: ``kaiming`` is ``U(−1/√i, 1/√i)`` (loralib, PEFT), ``xavier``
            is ``U(−√(6/(i+r)), √(6/(i+r)))``, ``normal`` is ``N(0, 1/r²)``. None: ``normal`` for
            embeddings, whose A is looked up and not summed over; ``kaiming`` for all else.
        dtype: the factors' dtype; None is float32 for a half-precision base and the base's own otherwise.
        layout: how the stored weight reads as M[g, o, i]; None takes the module's natural one.
    Raises:
        TargetError: a value outside these ranges.
    """

    rank: int = 8
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    dropout_position: Position = "pre"
    init: Init | None = None
    dtype: torch.dtype | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise TargetError(f"rank must be an integer of at least 1, got rank={self.rank!r}")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise TargetError(f"alpha must be a finite number, got alpha={self.alpha!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise TargetError(f"dropout must be at least 0 and below 1, got dropout={self.dropout!r}")
        if self.dropout_position not in get_args(Position):
            raise TargetError(
                f"dropout_position must be one of {get_args(Position)}, got {self.dropout_position!r}"
            )
        if self.init is not None and self.init not in get_args(Init):
            raise TargetError(f"init must be one of {get_args(Init)}, got {self.init!r}")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise TargetError(f"the factors' dtype must be a floating-point one, got dtype={self.dtype}")

    @property
    def scale(self) -> float:
        """The multiplier of B·A."""
        alpha = float(self.rank if self.alpha is None else self.alpha)
        return alpha / math.sqrt(self.rank) if self.rslora else alpha / self.rank

    def changed(self, **values: Any) -> Options:
        """These options with some of them replaced.

        Raises:
            TargetError: a name that is no option.
        """
        known = [f.name for f in fields(self)]
        if unknown := sorted(set(values) - set(known)):
            raise TargetError(
                f"unknown option {unknown[0]!r}; the options of a target are: {', '.join(known)}"
            )
        return replace(self, **values)


def new_factors(
    weight: torch.Tensor, layout: Layout, options: Options, *, embedding: bool = False
) -> tuple[nn.Parameter, nn.Parameter]:
    """Fresh factors ``A [(n r), i]`` and ``B [(n o), r]`` for a stored weight, on its device; ΔW is 0.

    Both are made for the weight's global shape, in full, whatever part of it this process holds.
    """
    shape_a, shape_b = layout.factor_shapes(shape_of(weight), options.rank)
    dtype = options.dtype or factor_dtype(weight)
    a = torch.empty(shape_a, dtype=dtype, device=weight.device)
    init_a(a, options.init or ("normal" if embedding else "kaiming"), options.rank)
    b = torch.zeros(shape_b, dtype=dtype, device=weight.device)
    return nn.Parameter(a), nn.Parameter(b)


def factor_dtype(weight: torch.Tensor) -> torch.dtype:
    """float32 for a half-precision weight, whose own dtype is too coarse for small steps; else its own.

    The weight's own under ZeRO-3, which wants one dtype and keeps fp32 masters of what trains itself.
    """
    if engine_of(weight).name == "zero3":
        return weight.dtype
    return torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype


def init_a(a: torch.Tensor, init: Init, rank: int) -> None:
    """Fill ``A [(n r), i]`` in place; the groups are independent, so n does not enter the bounds."""
    if init == "normal":
        nn.init.normal_(a, std=1.0 / rank)
        return
    columns = a.shape[1]
    bound = math.sqrt(6.0 / (columns + rank)) if init == "xavier" else 1.0 / math.sqrt(columns)
    nn.init.uniform_(a, -bound, bound)
