"""Megatron-core's process groups. Looked up among the modules already imported: Megatron never is here."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


def _state() -> Any:
    """``megatron.core.parallel_state`` where its groups exist."""
    state: Any = sys.modules.get("megatron.core.parallel_state")
    return state if state is not None and state.model_parallel_is_initialized() else None


def group_of(module: nn.Module) -> Any:
    """The process group over which this module's weight is split; None without one."""
    for name in ("tp_group", "_tp_group"):
        group = getattr(module, name, None)
        if group is not None:
            return group
    state = _state()
    if state is None:
        return None
    if getattr(module, "is_expert", False):
        return state.get_expert_tensor_parallel_group()
    return state.get_tensor_model_parallel_group()


def tensor_parallel_group() -> Any:
    """The processes that share a weight and its names; None for all of them."""
    state = _state()
    return None if state is None else state.get_tensor_model_parallel_group()


def replica_group(parameter: torch.Tensor) -> Any:
    """The data-parallel (and context-parallel) replicas of this part of a parameter; None without any."""
    state = _state()
    if state is None:
        return None
    if getattr(parameter, "allreduce", True):
        return state.get_data_parallel_group(with_context_parallel=True)
    return state.get_expert_data_parallel_group()


def stages(model: nn.Module) -> int:
    """Over how many pipeline stages the layers of this model are spread."""
    group = getattr(getattr(model, "pg_collection", None), "pp", None)
    if group is not None:
        return int(group.size())
    state = _state()
    return 1 if state is None else int(state.get_pipeline_model_parallel_world_size())
