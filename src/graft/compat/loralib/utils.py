"""loralib's two functions on a model: what trains, and what is saved."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ...adapted import slots_of
from ...attach import become_adapted
from ...errors import TargetError
from ...kinds import read_always, read_children
from .guard import factors_only
from .merging import Layer, LoRALayer

__all__ = ["lora_state_dict", "mark_only_lora_as_trainable"]


class BiasError(TargetError, NotImplementedError):
    """An unknown ``bias``; also what loralib raises for it."""


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze every parameter without ``lora_`` in its name.

    Modules that read a child's weight themselves, such as ``nn.MultiheadAttention``, are made to see its ΔW.

    Args:
        bias: ``all`` unfreezes every parameter with ``bias`` in its name, ``lora_only`` the bias of every
            LoRA layer.
    Raises:
        BiasError: another ``bias``.
    """
    _check(bias)
    parameters = dict(model.named_parameters())
    _warn_of_longer_words(parameters, "lora_", "train, because of 'lora_' in their names")
    _warn_of_tied(model)
    for name, parameter in parameters.items():
        if "lora_" not in name:  # loralib's rule, which its users name parameters by
            parameter.requires_grad = False
    if bias == "all":
        _warn_of_longer_words(parameters, "bias", "train, because of 'bias' in their names")
        for name, parameter in parameters.items():
            if "bias" in name:
                parameter.requires_grad = True
    elif bias == "lora_only":
        for name in _own_biases(model):
            model.get_parameter(name).requires_grad = True
    _see_children(model)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, torch.Tensor]:
    """The entries of ``model.state_dict()`` with ``lora_`` in their names; the same in every mode.

    Args:
        bias: ``all`` adds every entry with ``bias`` in its name, ``lora_only`` the bias of every LoRA layer.
    Raises:
        BiasError: another ``bias``.
    """
    _check(bias)
    token = factors_only.set(True)
    try:
        state: dict[str, torch.Tensor] = model.state_dict()
    finally:
        factors_only.reset(token)
    wanted = {name for name in state if "lora_" in name}
    if bias == "all":
        wanted |= {name for name in state if "bias" in name}
    elif bias == "lora_only":
        wanted |= {name.partition("lora_")[0] + "bias" for name in wanted} | set(_own_biases(model))
    return {name: value for name, value in state.items() if name in wanted}


def _check(bias: str) -> None:
    if bias not in ("none", "all", "lora_only"):
        raise BiasError(f"bias must be 'none', 'all' or 'lora_only', got bias={bias!r}")


def _own_biases(model: nn.Module) -> Iterator[str]:
    """Full names of the biases of the LoRA layers."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALayer):
            for name in ("bias", "conv.bias"):
                owner, _, leaf = name.rpartition(".")
                inner = getattr(module, owner, None) if owner else module
                if isinstance(inner, nn.Module) and isinstance(getattr(inner, leaf, None), nn.Parameter):
                    yield f"{path}.{name}" if path else name


def _warn_of_longer_words(names: Iterable[str], word: str, what: str) -> None:
    bounded = re.compile(rf"(?<![A-Za-z]){word}(?![A-Za-z])" if word == "bias" else rf"(?<![A-Za-z]){word}")
    odd = [name for name in names if word in name and not bounded.search(name)]
    if odd:
        warnings.warn(f"{', '.join(odd)}: these {what}, as in loralib", stacklevel=3)


def _warn_of_tied(model: nn.Module) -> None:
    """A weight that two modules hold is changed for both when one merges."""
    holders: dict[int, set[tuple[int, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), set()).add((id(module), f"{path}.{name}" if path else name))
    for layer in model.modules():
        holder = layer.graft_holder() if isinstance(layer, Layer) and layer.merge_weights else None
        if holder is None:
            continue
        held = holders[id(holder.get_parameter("weight"))]
        if len({module for module, _ in held}) > 1:
            warnings.warn(
                f"{' = '.join(sorted(name for _, name in held))} is one tied weight, and eval() will add ΔW "
                "for all of these modules; pass merge_weights=False to the LoRA layer",
                stacklevel=3,
            )


def _see_children(model: nn.Module) -> None:
    """Let modules that compute with a child's weight themselves take its W + ΔW."""
    for module in list(model.modules()):
        read = [child for child in read_children(module, always=True) if slots_of(child)]
        if read:
            become_adapted(module)
        always = [child for child in read_always(module) if child in read]
        ignored = [c for c in always if isinstance(getattr(c, "lora_dropout", None), nn.Dropout)]
        if ignored:
            warnings.warn(
                f"{type(module).__name__} reads the weight of its {type(ignored[0]).__name__} itself, so "
                "lora_dropout has no effect there",
                stacklevel=3,
            )
