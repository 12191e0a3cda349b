"""Which part of a weight is in this process, and how thin factors and whole weights travel.

Law 2, ``(B·A)[rows, cols] = B[rows] · A[:, cols]``, means that no process ever needs all of W to fuse: it
adds the block of ΔW that belongs to what it holds. An engine answers five questions about a parameter
(its global shape, the parts held here and whether they are this process's to write, how to gather thin
factors, how to bring a whole weight to the one process that writes), and nothing else in Graft knows how a
model is spread.

Engines are found by the parameter itself, and only if their library is already imported: a model cannot
hold a ZeRO or Megatron parameter unless its program imported DeepSpeed or Megatron. To add an engine, write
a module here with ``recognises`` and an ``Engine``, and name it in ``_ENGINES``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from ..errors import StateError
from .protocol import Aligned, Engine, Part, cut
from .world import known

__all__ = [
    "Aligned",
    "Engine",
    "Part",
    "cut",
    "engine_of",
    "here",
    "notice",
    "notice_all",
    "refuse_unequal",
    "settle",
    "shape_of",
    "summed",
]


# module → what must be imported already for its parameters to exist; asked in this order
_ENGINES: dict[str, str] = {
    "zero3": "deepspeed",
    "dtensor": "torch.distributed.tensor",
    "megatron": "megatron.core",
}


def engine_of(parameter: torch.Tensor) -> Engine:
    """The engine that spreads this parameter; the plain one if none does."""
    for name, needs in _ENGINES.items():
        if needs in sys.modules:
            engine, recognises = _load(name)
            if recognises(parameter):
                return engine
    return _load("plain")[0]


@cache
def _load(name: str) -> tuple[Engine, Any]:
    module: Any = importlib.import_module(f"{__name__}.{name}")
    return cast(Engine, module.ENGINE), module.recognises


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The parameter's global shape, whatever its engine."""
    return engine_of(parameter).shape(parameter)


def refuse_unequal(team: Engine, forms: Iterable[str], error: Exception | None = None) -> None:
    """Processes whose adapters differ would wait for each other's factors forever. Collective.

    Args:
        team: the processes that work on the model.
        forms: the adapters of this process in words.
        error: what went wrong here before; it is raised when the others know.
    Raises:
        StateError: on every process, if their words are not the same or one has an error.
    """
    alike = team.same("" if error else "\n".join(forms))
    # a second question: not every team's processes have to be alike, but all have to know
    if team.agree(alike and error is None):
        return
    raise known(
        error
        or StateError(
            "the processes have different adapters (sites, ranks, scales, layouts, or which are fused): "
            "adapt, load, fuse and unfuse with the same arguments on every process"
        )
    )


def notice(name: str, module: Any, parameter: str) -> None:
    """Let engines that must see the module itself note how it holds a parameter of this full name."""
    for engine, needs in _ENGINES.items():
        if needs in sys.modules:
            _load(engine)
            look = getattr(importlib.import_module(f"{__name__}.{engine}"), "notice", None)
            if look is not None:
                look(name, module, parameter)


def notice_all(model: nn.Module) -> None:
    """:func:`notice` every parameter of a model, those included that are not adapted."""
    for path, module in model.named_modules():
        for parameter, _ in module.named_parameters(recurse=False):
            notice(f"{path}.{parameter}" if path else parameter, module, parameter)


def here(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a factor in this process."""
    if hasattr(tensor, "placements"):
        return cast(Any, _load("dtensor")[0]).here(tensor)
    return tensor


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the sums made that a DTensor has put off; any other tensor as it is."""
    if hasattr(tensor, "placements"):
        return cast(Any, _load("dtensor")[0]).summed(tensor)
    return tensor


def settle(model: nn.Module) -> None:
    """Put the parameters that are to be read or edited where the model's forward only has copies of them."""
    if "torch.distributed.fsdp" in sys.modules:
        cast(Any, _load("dtensor")[0]).settle(model)
