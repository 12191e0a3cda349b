"""``LoRA`` and ``VLMLoRA``: options, and which parts of a vision-language model stay frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ...adapted import slots_of
from ...engines.megatron_modules import ROW, role_of
from ...errors import TargetError
from ...options import Options
from .base import PEFT, chunks
from .layers import adapt_in_place
from .matcher import ModuleMatcher, _targets, is_linear  # pyright: ignore[reportPrivateUsage]


@dataclass
class LoRA(PEFT, ModuleMatcher):
    """``W + (alpha / dim) · B · A`` for the linears that :class:`ModuleMatcher` tells.

    Args:
        dim, alpha: the rank, and the numerator of the scale.
        dropout, dropout_position: a probability, and where: ``pre`` x, ``mid`` x Aᵀ, or ``post`` x Aᵀ Bᵀ.
        lora_A_init_method, lora_B_init_method: ``xavier`` (N(0, 2/(in + out)) of the factor; for an
            ``nn.Linear`` the uniform distribution of that variance), ``kaiming`` or ``uniform`` (U(±1/√in)),
            ``normal`` (N(0, 0.2²)), ``zero``.
        a2a_experimental: for row-parallel linears with sequence parallelism, an all-to-all in the place of a
            reduce-scatter: the same numbers.
        lora_dtype: the factors' dtype; the weight's when None.
        normalize_moe_lora: ``dim / moe_router_topk`` for the linears of experts; ``alpha`` stays.
        share_expert_adapters: one pair of factors for all experts of a *grouped* expert layer. Such layers
            are refused; the experts of a ``SequentialMLP`` have their own factors, as in the original.
    """

    target_modules: list[str] = field(default_factory=_targets)
    dim: int = 32
    alpha: float = 32
    dropout: float = 0.0
    dropout_position: Literal["pre", "mid", "post"] = "pre"
    lora_A_init_method: str = "xavier"
    lora_B_init_method: str = "zero"
    a2a_experimental: bool = False
    lora_dtype: torch.dtype | None = None
    normalize_moe_lora: bool = False
    share_expert_adapters: bool = True

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Adapt this module, in place, if it is a target and not adapted already.

        Raises:
            TargetError: a target by its exact name that is no linear; options that it does not allow.
        """
        found = None if slots_of(module) else self.match(module, name, prefix)
        if found is None:
            return module
        pattern, full = found
        if not is_linear(module):
            if pattern != name:
                return module  # a wildcard names what lies between, too
            raise TargetError(
                f"{full} is a {type(module).__name__}; LoRA adapts nn.Linear and Megatron-core's column- and "
                "row-parallel linears. For other layers use graft.adapt"
            )
        rank = self._rank_of(module, full)
        drop, position = self.dropout, self.dropout_position
        options = Options(
            rank,
            self.alpha,
            dropout=drop,
            dropout_position=position,
            dtype=self.lora_dtype,
            all_to_all=self.a2a_experimental and _sums_sequences(module),
        )
        weight = f"{full}.weight" if full else "weight"
        return adapt_in_place(module, weight, options, (self.lora_A_init_method, self.lora_B_init_method))

    def _rank_of(self, module: nn.Module, full: str) -> int:
        if not (self.normalize_moe_lora and is_expert(full)):
            return self.dim
        topk = getattr(getattr(module, "config", None), "moe_router_topk", None)
        if not isinstance(topk, int) or topk < 1:
            raise TargetError(
                f"normalize_moe_lora needs moe_router_topk in the config of {full}, which has {topk!r}"
            )
        if self.dim % topk:
            raise TargetError(
                f"dim={self.dim} must be divisible by moe_router_topk={topk} with normalize_moe_lora ({full})"
            )
        return self.dim // topk


def is_expert(full: str) -> bool:
    """Whether this is the name of an expert's linear: ``….mlp.experts.….linear_fc1``, not of a shared one."""
    *inside, last = full.split(".")
    routed = "mlp" in inside and not {"experts", "local_experts"}.isdisjoint(inside[inside.index("mlp") :])
    return routed and last in ("linear_fc1", "linear_fc2") and "shared_experts" not in inside


def _sums_sequences(module: nn.Module) -> bool:
    m: Any = module
    row = role_of(m) == ROW and bool(getattr(m, "sequence_parallel", False))
    return row and not getattr(m, "explicit_expert_comm", False)


@dataclass
class VLMLoRA(LoRA):
    """LoRA on a vision-language model, of which only the named parts are frozen.

    The parts are ``vision_model`` or ``vision_tower``, ``vision_projection`` or ``multi_modal_projector``,
    and ``language_model`` (with an ``lm_head`` beside it); in the model, its ``llava_model`` or its
    ``model``. An adapted layer's own weight and bias are always frozen.
    """

    freeze_vision_model: bool = True
    freeze_vision_projection: bool = True
    freeze_language_model: bool = True

    def freeze_model(self, model: nn.Module | list[Any], training: bool = True) -> None:
        """Freeze the chosen parts.

        Raises:
            TargetError: none of the three parts is there.
        """
        wanted = (self.freeze_vision_model, self.freeze_vision_projection, self.freeze_language_model)
        found = False
        for part in chunks(model):
            for freeze, names in zip(wanted, _PARTS, strict=True):
                modules = _parts(part, names)
                found = found or bool(modules)
                for module in modules if freeze else []:
                    module.requires_grad_(False)
        if not found:
            raise TargetError(
                "the model has no vision_model, vision_projection or language_model (in Hugging Face's names "
                "vision_tower, multi_modal_projector, language_model); use LoRA for it"
            )
        self._train(model, training)


_PARTS = (
    ("vision_model", "vision_tower"),
    ("vision_projection", "multi_modal_projector"),
    ("language_model", "lm_head"),
)
_WITHIN = ("llava_model", "model")


def _parts(model: nn.Module, names: tuple[str, str]) -> list[nn.Module]:
    inner = [getattr(model, name, None) for name in _WITHIN]
    places = [model, *(m for m in inner if isinstance(m, nn.Module))]
    found = [getattr(place, name, None) for place in places for name in names]
    return [m for m in found if isinstance(m, nn.Module)]
