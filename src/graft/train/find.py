"""The adapted model inside of what a trainer holds."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapted import NO_ADAPTER, slots_of
from ..errors import StateError, TargetError
from ..formats.ledger import listed

#: names in a message
_SHOWN = 8


def find(root: nn.Module, name: str | None, *, harness: bool) -> nn.Module:
    """The model to export.

    Args:
        name: its dotted path in ``root``; "" is ``root`` itself.
        harness: ``root`` is code around a model (a LightningModule), so without a name its one adapted part
            is taken: the outermost transformers or PEFT model, else the child that holds the adapter.
    Raises:
        StateError: nothing is adapted.
        TargetError: no such path, or several parts are adapted and none is named.
    """
    if name is None:
        name = _only(root) if harness else ""
    try:
        model = root.get_submodule(name)
    except AttributeError:
        children = listed((child for child, _ in root.named_children()), _SHOWN)
        raise TargetError(
            f"{type(root).__name__} has no part {name!r}, which model= names; it has {children}"
        ) from None
    if not any(is_adapted(m) for m in model.modules()):
        raise StateError(
            f"model={name!r}: {NO_ADAPTER}"
            if name
            else f"{NO_ADAPTER}; under Lightning in configure_model or __init__"
            if harness
            else NO_ADAPTER
        )
    return model


def trained_outside(root: nn.Module, model: nn.Module) -> list[str]:
    """Notes on what trains and is not of the exported model."""
    inside = {id(p) for p in model.parameters()}
    names = [n for n, p in root.named_parameters() if p.requires_grad and id(p) not in inside]
    if not names:
        return []
    return [f"trained outside the exported model, so in neither output: {listed(names, _SHOWN)}"]


def is_adapted(module: nn.Module) -> bool:
    """Whether the module has an adapter of its own, Graft's or PEFT's."""
    return bool(slots_of(module)) or is_a(module, "BaseTunerLayer")


def is_a(module: nn.Module, name: str) -> bool:
    """Whether a class of this name is among the module's: its library need not be imported."""
    return any(cls.__name__ == name for cls in type(module).__mro__)


def _only(root: nn.Module) -> str:
    """The path of the one part that is adapted."""
    parts = sorted({_part(root, path) for path, m in root.named_modules() if is_adapted(m)})
    if len(parts) > 1:
        raise TargetError(
            f"{type(root).__name__} has {len(parts)} adapted parts, {listed(parts, _SHOWN)}; name the one to "
            f'export, model="{parts[0]}", or make a callback for each. model="" is the whole module'
        )
    return parts[0] if parts else ""


def _part(root: nn.Module, path: str) -> str:
    names = path.split(".")
    for depth in range(len(names) + 1):
        prefix = ".".join(names[:depth])
        if _is_model(root.get_submodule(prefix)):
            return prefix
    return names[0]


def _is_model(module: nn.Module) -> bool:
    config: Any = getattr(module, "config", None)
    saves = hasattr(config, "save_pretrained") and hasattr(module, "save_pretrained")
    return saves or is_a(module, "PeftModel")
