"""Megatron-core's mixture-of-experts layers, known by the names of their classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..errors import StateError
from .megatron_groups import stages
from .megatron_modules import role_of

_HOMES = ("megatron", "transformer_engine")
_SEQUENTIAL = "SequentialMLP"
#: one parameter, or one module, for the weights of several experts
_PACKED = {
    "GroupedMLP",
    "TEGroupedMLP",
    "TEGroupedLinear",
    "TEColumnParallelGroupedLinear",
    "TERowParallelGroupedLinear",
    "GroupedLinear",
}


@dataclass(frozen=True)
class Expert:
    """Where a linear of one expert stands.

    Args:
        layer: the layer of all experts of this process.
        where: the layer's full name.
        index: the expert's place among them.
        leaf: the linear's name inside of its expert, ``linear_fc1``.
    """

    layer: nn.Module
    where: str
    index: int
    leaf: str

    @property
    def group(self) -> Any:
        """The processes that hold the layer's other experts; None without expert parallelism."""
        return getattr(self.layer, "ep_group", None)

    @property
    def topk(self) -> int | None:
        """The number of experts that the router gives each token to."""
        return getattr(getattr(self.layer, "config", None), "moe_router_topk", None)


def is_expert_layer(module: nn.Module) -> bool:
    """Whether this is the layer of all experts, each with linears of its own."""
    return _is_of(module, {_SEQUENTIAL})


def experts_of(model: nn.Module) -> dict[int, Expert]:
    """The linears of a model's experts, by the identity of their modules."""
    found: dict[int, Expert] = {}
    for where, layer in model.named_modules():
        if not is_expert_layer(layer):
            continue
        for index, expert in enumerate(cast(Any, layer).local_experts):
            for leaf, module in expert.named_modules():
                if role_of(module) is not None:
                    found[id(module)] = Expert(layer, where, index, leaf)
    return found


def packs_experts(module: nn.Module) -> bool:
    """Whether the parameters of this module hold several experts each, or are those of a packed layer."""
    return _is_of(module, _PACKED)


def _is_of(module: nn.Module, names: set[str]) -> bool:
    return any(c.__name__ in names and c.__module__.partition(".")[0] in _HOMES for c in type(module).__mro__)


def refuse_scattered(model: nn.Module, verb: str, *, experts: bool) -> None:
    """Refuse what needs the whole model under one set of names, where no process has all names.

    Args:
        verb: what is refused, as the user calls it.
        experts: whether the experts' weights are part of it.
    Raises:
        StateError: pipeline stages, or expert parallelism, of Megatron-core.
    """
    if not any(role_of(module) is not None for module in model.modules()):
        return
    why = ""
    if stages(model) > 1:
        why = f"{stages(model)} pipeline stages each name their layers from 0"
    layers = [m for m in model.modules() if _is_of(m, {_SEQUENTIAL} | _PACKED)] if experts else []
    groups = [g for g in (getattr(m, "ep_group", None) for m in layers) if g is not None]
    wide = max((int(g.size()) for g in groups), default=1)
    if wide > 1:
        why = f"{wide} expert-parallel processes each name their experts from 0"
    if why:
        raise StateError(
            f"{verb} needs every weight under a name of its own, and {why}; save the model with Megatron's "
            "dist_checkpointing, which knows them apart, and load it with one stage and one expert-parallel "
            "process to do this"
        )
