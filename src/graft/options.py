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
Init = Literal["kaiming", "xavier", "normal", "zero"]


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
        init: how A begins: ``kaiming`` is ``U(−1/√i, 1/√i)`` (loralib, PEFT), ``xavier`` is
            ``U(−√(6/(i+r)), √(6/(i+r)))``, ``normal`` is ``N(0, 1/r²)``, ``zero`` is 0. None: ``normal``
            for embeddings, whose A is looked up and not summed over; ``kaiming`` for all else.
        dtype: the factors' dtype; None is float32 for a half-precision base and the base's own otherwise.
        layout: how the stored weight reads as M[g, o, i]; None takes the module's natural one.
        init_b: how B begins, by the same names with ``r`` and ``o`` in the place of ``i`` and ``r``.
            ``zero`` leaves the model as it was until it is trained; any other changes it at once, unless
            A is zero.
        normalize_experts: for the experts of a Megatron-core mixture, ``rank / moe_router_topk`` in the
            place of ``rank``, so that a token meets as many ranks as in a dense layer. ``alpha`` stays
            (as Megatron-Bridge's ``normalize_moe_lora``), so the scale grows by that number.
        share_experts: one A and one B for this linear of all experts of a Megatron-core ``SequentialMLP``.
        all_to_all: for row-parallel layers of Megatron-core with sequence parallelism, ``x Aᵀ`` is summed
            by an all-to-all and each process for itself, not by a reduce-scatter: the same numbers.
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
    init_b: Init = "zero"
    normalize_experts: bool = False
    share_experts: bool = False
    all_to_all: bool = False

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
        for name, value in (("init", self.init or "kaiming"), ("init_b", self.init_b)):
            if value not in get_args(Init):
                raise TargetError(f"{name} must be one of {get_args(Init)}, got {value!r}")
        if self.init == self.init_b == "zero":
            raise TargetError(
                "init='zero' with init_b='zero' would never train: the gradient of each factor is a multiple "
                "of the other; give one of them another init"
            )
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
    """Fresh factors ``A [(n r), i]`` and ``B [(n o), r]`` for a stored weight, on its device.

    Both are made for the weight's global shape, in full, whatever part of it this process holds.
    """
    shape_a, shape_b = layout.factor_shapes(shape_of(weight), options.rank)
    dtype = options.dtype or factor_dtype(weight)
    a, b = (torch.empty(shape, dtype=dtype, device=weight.device) for shape in (shape_a, shape_b))
    rank, rows = options.rank, shape_b[0] // len(layout.enabled)
    fill_factor(a, options.init or ("normal" if embedding else "kaiming"), (shape_a[1], rank), rank)
    fill_factor(b, options.init_b, (rank, rows), rank)
    return nn.Parameter(a), nn.Parameter(b)


def factor_dtype(weight: torch.Tensor) -> torch.dtype:
    """float32 for a half-precision weight, whose own dtype is too coarse for small steps; else its own.

    The weight's own under ZeRO-3, which wants one dtype and keeps fp32 masters of what trains itself.
    """
    if engine_of(weight).name == "zero3":
        return weight.dtype
    return torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype


def fill_factor(factor: torch.Tensor, init: Init, fans: tuple[int, int], rank: int) -> None:
    """Fill a factor in place; ``fans`` are one group's inputs and outputs, the groups being independent."""
    inputs, outputs = fans
    if init == "zero":
        nn.init.zeros_(factor)
    elif init == "normal":
        nn.init.normal_(factor, std=1.0 / rank)
    else:
        bound = math.sqrt(6.0 / (inputs + outputs)) if init == "xavier" else 1.0 / math.sqrt(inputs)
        nn.init.uniform_(factor, -bound, bound)
