"""The fp32 masters that DeepSpeed keeps of parameters that train, under every ZeRO stage.

At each step the optimizer changes the masters and rounds them into the model's parameters, so an edit of
a parameter alone is undone, and a parameter alone is less than what was trained. DeepSpeed's own accessors
are used, and looked up only where a parameter shows that DeepSpeed holds it. Under stage 0 (bf16, fp16) a
parameter shows nothing, so the masters are found in the engine's optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, cast

import torch
from torch import nn

from ..errors import StateError
from . import engine_of
from .world import known

_MASTER = "graft_master"
_STAGE_0 = ("FP16_Optimizer", "FP16_UnfusedOptimizer")


def find(engine: nn.Module) -> None:
    """Remember on each parameter where the optimizer of a stage 0 engine keeps its master.

    ``fp16_groups`` lists the parameters (bf16 too) of each group; the masters are ``fp32_groups`` in the
    same order, or lie one after another in ``fp32_groups_flat``.
    """
    optimizer: Any = getattr(engine, "optimizer", None)
    if type(optimizer).__name__ not in _STAGE_0:
        return
    for n, parameters in enumerate(optimizer.fp16_groups):
        if hasattr(optimizer, "fp32_groups"):
            kept = optimizer.fp32_groups[n]
        else:
            sizes = [p.numel() for p in parameters]
            kept = optimizer.fp32_groups_flat[n].detach()[: sum(sizes)].split(sizes)
        for parameter, own in zip(parameters, kept, strict=True):
            setattr(parameter, _MASTER, own.detach().view(parameter.shape))


def has_master(parameter: torch.Tensor) -> bool:
    """Whether a DeepSpeed optimizer keeps an fp32 master of this parameter."""
    return _stage3(parameter) or hasattr(parameter, "_hp_mapping") or hasattr(parameter, _MASTER)


def _stage3(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "_z3_optimizer") and parameter.requires_grad


def master(parameter: torch.Tensor) -> torch.Tensor:
    """The fp32 master in full, on every process. Collective."""
    if (own := getattr(parameter, _MASTER, None)) is not None:
        return cast(torch.Tensor, own).clone()
    found = import_module("deepspeed.utils").safe_get_full_fp32_param(parameter)
    return cast(torch.Tensor, found).detach().clone()


@torch.no_grad()
def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give a parameter, and its fp32 master if it has one, new values; each process takes its parts.

    Raises:
        StateError: the parameter cannot be edited now.
    """
    engine = engine_of(parameter)
    flat = value.detach().contiguous().view(-1)
    for part in engine.parts(parameter):
        if part.index is None:
            part.tensor.copy_(flat[part.start : part.start + part.tensor.numel()])
        else:
            part.tensor.copy_(value[tuple(slice(*span) for span in part.index)])
    if (own := getattr(parameter, _MASTER, None)) is not None:
        own.copy_(value)
    elif _stage3(parameter):
        size = cast(Any, parameter).ds_tensor.numel()
        mine = torch.zeros(size, dtype=torch.float32)
        (part,) = engine.parts(parameter)
        mine[: part.tensor.numel()] = flat[part.start : part.start + part.tensor.numel()]
        import_module("deepspeed.utils").safe_set_local_fp32_param(parameter, mine)
    elif has_master(parameter):
        import_module("deepspeed.utils").safe_set_full_fp32_param(parameter, value.detach().float())


def thin(parameters: Sequence[torch.Tensor], *, masters: bool = False) -> list[torch.Tensor]:
    """Factors in full, on every process: what the model computes with, or the fp32 masters. Collective."""
    found: dict[int, torch.Tensor] = {}
    by_engine: dict[str, list[int]] = {}
    for n, parameter in enumerate(parameters):
        if masters and has_master(parameter):
            found[n] = master(parameter)
        else:
            by_engine.setdefault(engine_of(parameter).name, []).append(n)
    for _, members in sorted(by_engine.items()):
        values = engine_of(parameters[members[0]]).gather([parameters[n] for n in members])
        found |= dict(zip(members, values, strict=True))
    return [found[n] for n in range(len(parameters))]


def whole(
    parameter: torch.Tensor, *, masters: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor | None:
    """A parameter in full, on the process that writes (None elsewhere). Collective.

    Args:
        dtype: that of the answer; the parameter's own when None.
    Raises:
        StateError: on every process, if one cannot read its part now.
    """
    if masters and has_master(parameter):
        return master(parameter)
    engine = engine_of(parameter)
    pieces: list[torch.Tensor] = []
    error: Exception | None = None
    try:
        pieces = [part.tensor.to(dtype or part.tensor.dtype) for part in engine.parts(parameter)]
    except Exception as e:  # the others wait in agree, whatever it is
        error = e
    if not engine.agree(error is None):
        raise known(error or StateError("another process could not read its part; see its error"))
    return engine.collect(parameter, pieces)
