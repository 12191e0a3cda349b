"""Engine objects and wrappers around a model, and the processes that work together on it.

Wrappers are known by the names of their classes, so that none of their libraries is imported.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from ..errors import StateError
from ..layout import Layout
from . import engine_of, masters, world
from .plain import Plain
from .protocol import Engine

_WRAPPERS = {"DeepSpeedEngine", "DistributedDataParallel", "Float16Module", "PartOfWrapped"}
_REFUSED = {
    "PipelineEngine": "DeepSpeed's pipeline engine cuts the model into stages; use ZeRO without pipeline",
    "FullyShardedDataParallel": "FSDP1 replaces weights by flat parameters; use torch's fully_shard (FSDP2)",
}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of engine objects and wrappers: DeepSpeedEngine, DistributedDataParallel, ….

    Raises:
        StateError: a wrapper in which weights have no names or shapes of their own.
    """
    while names := _names(model) & (_WRAPPERS | _REFUSED.keys()):
        for name in names & _REFUSED.keys():
            raise StateError(f"{type(model).__name__} cannot be worked on: {_REFUSED[name]}")
        masters.find(model)
        model = cast(nn.Module, cast(Any, model).module)
    return model


def is_wrapped(model: nn.Module) -> bool:
    return bool(_names(model) & (_WRAPPERS | _REFUSED.keys()))


def _names(model: nn.Module) -> set[str]:
    return {c.__name__ for c in type(model).__mro__}


class PartOfWrapped(nn.Module):
    """A part of a model that all processes train together, to be given to a verb as an engine object is.

    A wrapper (DDP, DeepSpeed) is around the whole model, and a trainer may keep it to itself.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Replicas(world.Team, Plain):
    """Processes that each hold the whole model and wait for each other (DDP, ZeRO stages 0 to 2)."""

    name = "replicas"

    def place(
        self, weight: torch.Tensor, layout: Layout, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._first(a), self._first(b)

    def _first(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the first process has: each may have drawn other numbers."""
        value = tensor.detach().to(world.device()).contiguous()
        dist.broadcast(value, src=0)
        return value.to(tensor.device)


def team_of(model: nn.Module) -> Engine:
    """The processes that work on this model: of its spread parameters, or the replicas of a wrapper.

    A plain model that is not wrapped is this process's own, also where ``torch.distributed`` runs.
    """
    for parameter in unwrap(model).parameters():
        engine = engine_of(parameter)
        if engine.name != "plain":
            return engine
    return Replicas() if is_wrapped(model) and world.running() else Plain()


def is_alone(team: Engine) -> bool:
    """Whether no other process works on the model."""
    return team.name == "plain"


def is_spread(team: Engine) -> bool:
    """Whether parts of weights must travel, not only whole replicas agree."""
    return not is_alone(team) and team.name != "replicas"


def beside(team: Engine) -> Engine:
    """The engine of the team's weights that no engine spreads: every process has them in full."""
    return Replicas() if team.name in ("replicas", "dtensor") else Plain()


class Together:
    """The steps of a work of several processes: an error of one is an error of all at their next step."""

    def __init__(self, team: Engine) -> None:
        self.team = team

    def step(self) -> None:
        """Go on only if no process has failed. Collective.

        Raises:
            StateError: another process has.
        """
        if not self.team.agree(True):
            raise world.known(StateError("another process failed, so this one stopped too; see its error"))


@contextmanager
def together(team: Engine) -> Generator[Together]:
    """Work in steps; the block's end is the last one."""
    work = Together(team)
    try:
        yield work
    except BaseException as error:
        if not world.is_known(error):
            with suppress(Exception):  # a process that died cannot be told; the first error is the news
                team.agree(False)
            if not is_alone(team):
                world.known(error)  # a work may be a step of another
        raise
    work.step()
