"""What loralib's layers have in common: ``eval()`` merges, ``train()`` unmerges."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...adapted import Adapted, Site, Slot
from ...attach import attach
from ...engines import engine_of
from ...errors import StateError, TargetError
from ...fusing import unfuse
from ...layout import Layout
from ...options import Options
from .guard import MARK, Guarded, is_merged, merge, unmerged


def same(x: torch.Tensor) -> torch.Tensor:
    """No dropout; unlike a lambda it can be pickled."""
    return x


class LoRALayer:
    """The attributes of every LoRA layer; a base for layers of your own, as in loralib.

    Args:
        r: the rank; 0 for a plain layer.
        lora_alpha: the scale's numerator; ΔW = lora_alpha / r · B · A.
        lora_dropout: probability of dropping an element of x before A.
        merge_weights: whether ``eval()`` adds ΔW to the weight, and ``train()`` takes it out again.
    Raises:
        TargetError: r that is negative or no integer, lora_dropout outside [0, 1].
    """

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        try:
            self.r = operator.index(r)
        except TypeError:
            raise TargetError(f"r must be an integer, got r={r!r}") from None
        if self.r < 0:
            raise TargetError(f"r must be positive, or 0 for a plain layer, got r={r}")
        if not 0.0 <= lora_dropout <= 1.0:
            raise TargetError(f"lora_dropout must be between 0 and 1, got lora_dropout={lora_dropout!r}")
        self.lora_alpha = lora_alpha
        self.lora_dropout: Callable[[torch.Tensor], torch.Tensor]
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0.0 else same
        self.merged = False
        self.merge_weights = merge_weights


class Layer(Guarded, LoRALayer):
    """A LoRA layer of loralib's; its adapter, if r > 0, is a site of Graft's."""

    merge_weights: bool

    @property
    def r(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The rank; 0 without an adapter."""
        return self.__dict__.get("_r", 0)

    @r.setter
    def r(self, value: int) -> None:
        if self.graft_holder() is not None and value != self.r:
            raise StateError(
                f"r={value!r} cannot be set on a {type(self).__name__}, whose factors have rank {self.r}; "
                "scaling = 0 or graft.disabled(model) switches its adapter off"
            )
        self.__dict__["_r"] = value

    @property
    def merged(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the weight holds ΔW; without an adapter, whether the last mode would have merged."""
        holder = self.graft_holder()
        return bool(self.__dict__.get("_merged")) if holder is None else is_merged(holder)

    @merged.setter
    def merged(self, value: bool) -> None:
        if self.graft_holder() is None:
            self.__dict__["_merged"] = bool(value)
        elif bool(value) != self.merged:
            holds = "holds" if self.merged else "does not hold"
            raise StateError(
                f"merged={value!r} cannot be set on a {type(self).__name__}, whose weight {holds} ΔW; "
                "eval() merges and train() unmerges"
            )

    @property
    def scaling(self) -> float:
        """The multiplier of B·A, ``lora_alpha / r`` unless it is set; absent without an adapter."""
        return self._site().scale

    @scaling.setter
    def scaling(self, value: float) -> None:
        site, scale = self._site(), number("scaling", value)
        with unmerged(self.graft_holder()):
            site.scale = scale

    def _site(self) -> Site:
        holder = self.graft_holder()
        if holder is None:
            raise AttributeError(f"{type(self).__name__} without an adapter (r={self.r}) has no scaling")
        return holder.graft_slots["weight"].site

    def train(self, mode: bool = True) -> Any:
        """Set the mode, and with ``merge_weights`` merge (``mode=False``) or unmerge.

        A weight that is spread over processes (FSDP2, tensor parallel, ZeRO-3) is left as it is.

        Raises:
            StateError: W, A, B or the scale were edited while merged; the sum overflows.
        """
        holder = self.graft_holder()
        if self.merge_weights and holder is None:
            self.merged = not mode
        elif self.merge_weights and holder is not None and not self._is_spread(holder):
            if mode:
                unfuse(holder)
            else:
                merge(holder)
        return super().train(mode)

    def _is_spread(self, holder: Adapted) -> bool:
        """Whether the weight is spread, or was: FSDP2 shows full copies for a time, whose edits are lost."""
        if engine_of(holder.get_parameter("weight")).name != "plain":
            self.__dict__["_spread"] = True
        return "_spread" in self.__dict__

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        holder, key = self.graft_holder(), f"{prefix}{self.weight_key}"
        whole = f"{prefix}lora_A" in state_dict and key in state_dict
        doubtful = is_merged(holder) and whole and MARK not in local_metadata
        with unmerged(holder, replaced=key in state_dict):
            if holder is not None and doubtful:
                _say_doubt(holder.get_parameter("weight"), state_dict[key])
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)


def _say_doubt(own: torch.Tensor, given: torch.Tensor) -> None:
    """Warn, unless the state dict's weight is the model's own base."""
    plain = engine_of(own).name == "plain" and given.shape == own.shape
    if not (plain and torch.equal(given.to(own), own)):
        warnings.warn(
            "this state dict is loaded in eval mode and does not say whether its weights hold ΔW already, as "
            "those that loralib saves in eval mode do; they are taken as W without ΔW. If they hold it, load "
            "them without the lora_ keys",
            stacklevel=2,
        )


def number(name: str, value: Any) -> float:
    """A real number as a float.

    Raises:
        TargetError: anything else, also a tensor that could be trained.
    """
    if isinstance(value, torch.Tensor) or not hasattr(value, "__float__"):
        raise TargetError(f"{name} must be a number, got {name}={value!r}")
    return float(value)


def attach_factors(layer: Layer, holder: Adapted, layout: Layout, rank: int) -> Slot:
    """Zero factors of this rank for the holder's weight, in its dtype, and the weight frozen."""
    alpha = number("lora_alpha", layer.lora_alpha)
    weight = holder.get_parameter("weight")
    shapes = layout.factor_shapes(weight.shape, rank)
    options = Options(rank, alpha * rank / layer.r, dtype=weight.dtype, layout=layout)
    a, b = (nn.Parameter(weight.new_zeros(shape)) for shape in shapes)
    weight.requires_grad_(False)
    return attach(holder, "weight", Site(options, layout, alpha / layer.r), a, b)
