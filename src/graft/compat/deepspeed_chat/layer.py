"""The layer: a linear whose weight is read from its other side, so its factors are the original's own."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ...adapted import Adapted, Site
from ...adapting import attach_target
from ...branches import linear
from ...engines import shape_of
from ...errors import StateError, TargetError
from ...factors import Branch, Factors
from ...fusing import fuse, unfuse
from ...layout import Layout
from ...options import Options
from ...targets import Holder, Target

#: ``Wᵀ[in, out] += scale · right[in, r] · left[r, out]``: of Wᵀ, B is ``right`` and A is ``left``
LAYOUT = Layout("i o")
NAMES = ("lora_left_weight", "lora_right_weight")


def _branch(module: nn.Module, f: Factors, x: torch.Tensor) -> torch.Tensor:
    return linear(module, f, cast(Any, module).lora_dropout(x))


class LinearLayer_LoRA(Adapted, nn.Linear):
    """``y = x Wᵀ + b + lora_scaling · (lora_dropout(x) · right · left)``.

    ``lora_right_weight`` ``[in, r]`` begins as ``U(−1/√r, 1/√r)`` (the original's ``kaiming_uniform_`` takes
    the rank for the fan-in), ``lora_left_weight`` ``[r, out]`` as zero; both of torch's default dtype.

    Args:
        weight: W ``[out, in]``, kept as it is and frozen; it may be partitioned by ZeRO-3.
        lora_dim: the rank r, at least 1.
        lora_scaling: the scale's numerator; the attribute ``lora_scaling`` is ``lora_scaling / lora_dim``.
        lora_droppout: the probability of ``lora_dropout``, which acts in training mode.
        bias: b ``[out]``, kept as it is.
    Raises:
        TargetError: an argument outside its range, or a weight that is no matrix of floating-point numbers.
    """

    graft_plain: ClassVar[type[nn.Module]] = nn.Linear
    graft_branch: ClassVar[Branch | None] = staticmethod(_branch)
    graft_children: ClassVar[tuple[str, ...]] = ("lora_dropout",)

    lora_left_weight: nn.Parameter
    lora_right_weight: nn.Parameter

    def __init__(
        self,
        weight: nn.Parameter,
        lora_dim: int = 0,
        lora_scaling: float = 1,
        lora_droppout: float = 0,
        bias: nn.Parameter | None = None,
    ) -> None:
        options = checked(weight, lora_dim, lora_scaling, lora_droppout)
        nn.Module.__init__(self)
        self.weight = weight
        cast(Any, self).bias = bias
        self.out_features, self.in_features = shape_of(weight)
        self.graft_slots = {}
        add_factors(
            self, Holder("weight", self, "weight"), options, lora_droppout, new_pair(self, options.rank)
        )

    def reset_parameters(self) -> None:
        """Factors as at the beginning: ΔW is zero.

        Raises:
            StateError: the layer is fused.
        """
        if self.fuse_lora:
            raise StateError("the layer is fused; call unfuse_lora_weight() before reset_parameters()")
        _init(self.lora_left_weight, self.lora_right_weight)

    @property
    def lora_scaling(self) -> float:
        """The multiplier of ``right · left``."""
        return self.graft_slots["weight"].site.scale

    @lora_scaling.setter
    def lora_scaling(self, value: float) -> None:
        self.graft_slots["weight"].site.scale = float(value)

    @property
    def fuse_lora(self) -> bool:
        """Whether the weight is W + ΔW at this moment."""
        return self.graft_slots["weight"].site.fusion is not None

    def fuse_lora_weight(self) -> None:
        """The weight becomes W + ΔW, rounded once. Under ZeRO-3 every process calls this.

        Raises:
            StateError: as :func:`graft.fuse`.
        """
        fuse(self)

    def unfuse_lora_weight(self) -> None:
        """The weight gets every bit back. Under ZeRO-3 every process calls this.

        Raises:
            StateError: the factors, the scale or the weight changed while it was fused.
        """
        unfuse(self)

    def _get_name(self) -> str:
        return type(self).__name__


def checked(weight: torch.Tensor, lora_dim: int, lora_scaling: float, lora_droppout: float) -> Options:
    """The options of a layer with this weight.

    Raises:
        TargetError: an argument outside its range, or a weight that is no matrix of floating-point numbers.
    """
    if lora_dim < 1:
        raise TargetError(f"LoRA needs a rank of at least 1, got lora_dim={lora_dim!r}")
    if not 0 <= lora_droppout <= 1:
        raise TargetError(f"a probability lies between 0 and 1, got lora_droppout={lora_droppout!r}")
    shape = shape_of(weight)
    if len(shape) != 2 or not weight.is_floating_point():
        raise TargetError(f"the weight must be a floating-point matrix, got {list(shape)} of {weight.dtype}")
    return Options(lora_dim, float(lora_scaling), layout=LAYOUT)


def new_pair(linear: nn.Linear, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Fresh ``left`` and ``right``: the same random numbers as the original's from the same seed."""
    right = nn.Parameter(torch.zeros(linear.in_features, rank))
    left = nn.Parameter(torch.zeros(rank, linear.out_features))
    _init(left, right)
    return left, right


def _init(left: nn.Parameter, right: nn.Parameter) -> None:
    nn.init.kaiming_uniform_(right, a=math.sqrt(5))
    nn.init.zeros_(left)


def add_factors(
    model: nn.Module,
    holder: Holder,
    options: Options,
    dropout: float,
    pair: tuple[nn.Parameter, nn.Parameter],
) -> None:
    """Make a layer's weight a site of the model and freeze it; the factors join in the original's order."""
    layer = cast(LinearLayer_LoRA, holder.module)
    layer.lora_right_weight, layer.lora_left_weight = pair[1], pair[0]
    layer.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
    attach_target(model, Target((holder,)), Site(options, LAYOUT, options.scale), pair, NAMES)
    layer.weight.requires_grad = False
