"""loralib's convolutions: the factors belong to the layer, the weight to its child ``conv``."""

from __future__ import annotations

import copyreg
import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from ...adapted import Adapted
from ...errors import TargetError
from ...layout import Layout
from .guard import Guarded, unmerged
from .merging import Layer, LoRALayer, attach_factors

_FACTORS = ("lora_A", "lora_B")


class Lent(Guarded, Adapted):
    """An adapted module whose ``lora_A`` and ``lora_B`` are parameters of another module, its owner."""

    graft_owner: nn.Module

    @property
    def lora_A(self) -> nn.Parameter:
        return cast(nn.Parameter, self.graft_owner.lora_A)

    @lora_A.deleter
    def lora_A(self) -> None:
        del self.graft_owner.lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        return cast(nn.Parameter, self.graft_owner.lora_B)

    @lora_B.deleter
    def lora_B(self) -> None:
        del self.graft_owner.lora_B

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in _FACTORS:
            self.graft_owner.register_parameter(name, param)
        else:
            super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        assert reduced[0] is getattr(copyreg, "__newobj__")  # noqa: B009
        return (_blank, (self.graft_plain,), *reduced[2:])


@cache
def _lent_class(plain: type[nn.Module]) -> type[Lent]:
    own = {"__module__": plain.__module__, "graft_plain": plain}
    return type(f"LoRA{plain.__name__}", (Lent, plain), own)


def _blank(plain: type[nn.Module]) -> nn.Module:
    cls = _lent_class(plain)
    return cls.__new__(cls)


def _lend(conv: nn.Module, owner: nn.Module) -> Lent:
    """Give a convolution the owner's factors; a plain attribute, so that the owner is not its child."""
    conv.__dict__["graft_owner"] = owner
    conv.__dict__["graft_slots"] = {}
    conv.__class__ = cast(Any, _lent_class(type(conv)))
    return cast(Lent, conv)


class ConvLoRA(Layer):
    """A convolution with ``W + scaling · (B·A).view(W.shape)`` in its weight's place.

    For kernel k in d dimensions: A ``[r·k, in·k]`` and B ``[out/groups · k^(d−1), r·k]``, which for two
    dimensions are loralib's shapes; its other shapes do not fit W unless k is 1.

    Args:
        conv_module: the class of the convolution, such as ``nn.Conv2d``.
        in_channels, out_channels, kwargs: those of the convolution.
        kernel_size: k, or a tuple of equal numbers.
        r, lora_alpha, merge_weights: see :class:`LoRALayer`.
        lora_dropout: has no effect, as in loralib; said in a warning.
    Raises:
        TargetError: a kernel with unequal sides.
    """

    weight_key = "conv.weight"
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        conv_module: Callable[..., nn.Module],
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: int = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        k = _side(kernel_size)
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if lora_dropout > 0.0 and r > 0:
            warnings.warn(
                f"lora_dropout={lora_dropout} of a convolution has no effect, in loralib as here: it adds ΔW "
                "to its weight and has no x to drop from",
                stacklevel=3,
            )
        if self.r > 0:
            columns = in_channels * k
            weight = self.conv.get_parameter("weight")
            layout = Layout("o i", matrix=(weight.numel() // columns, columns))
            attach_factors(self, _lend(self.conv, self), layout, self.r * k)
        self.reset_parameters()

    def graft_holder(self) -> Adapted | None:
        conv = self._modules.get("conv")
        return conv if isinstance(conv, Adapted) and conv.graft_slots else None

    def reset_parameters(self) -> None:
        """Draw W, the bias and A anew, and set B to zero."""
        with unmerged(self.graft_holder()):
            cast(Any, self.conv).reset_parameters()
            if "lora_A" in self._parameters:
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
                nn.init.zeros_(self.lora_B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def _side(kernel_size: Any) -> int:
    sides = set(kernel_size) if isinstance(kernel_size, (tuple, list)) else {kernel_size}
    if len(sides) != 1:
        raise TargetError(f"kernel_size={kernel_size!r}: loralib's factors need a kernel of equal sides")
    return int(sides.pop())


class Conv2d(ConvLoRA):
    """:class:`ConvLoRA` of ``nn.Conv2d``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv1d(ConvLoRA):
    """:class:`ConvLoRA` of ``nn.Conv1d``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """:class:`ConvLoRA` of ``nn.Conv3d``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)
