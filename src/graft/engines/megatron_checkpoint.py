"""Adapted layers in Megatron's distributed checkpoints: factors under their global shapes.

Megatron's layers name the axes along which *their own* tensors are cut, and would write a cut factor as a
replicated one. With the factors described as they are, a checkpoint saved at one tensor-parallel size loads
at any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from .split import Split, split_of


def sharded_factors(
    factors: Mapping[str, torch.Tensor], prefix: str, offsets: tuple[Any, ...], metadata: Any
) -> dict[str, Any]:
    """Megatron's ``ShardedTensor`` (or factory, for gated layers) of every factor, by its full key."""
    found: dict[str, Any] = {}
    for name, factor in factors.items():
        split = split_of(factor)
        if split is not None:
            found[prefix + name] = _sharded(factor, prefix + name, split, offsets, metadata)
    return found


def _sharded(factor: torch.Tensor, key: str, split: Split, offsets: tuple[Any, ...], metadata: Any) -> Any:
    utils = import_module("megatron.core.utils")
    groups = {"tp_group": split.group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
    if None in groups.values():
        groups = {}  # Megatron then takes its global ones
    if split.axis is None:
        return utils.make_sharded_tensor_for_checkpoint(factor, key, prepend_offsets=offsets, **groups)
    made = utils.make_tp_sharded_tensor_for_checkpoint(
        factor,
        key,
        tp_axis=split.axis,
        prepend_offsets=offsets,
        allow_shape_mismatch=split.axis == 1,
        **groups,
    )
    if split.stride == 1:
        return made
    gated = import_module("megatron.core.transformer.mlp").apply_swiglu_sharded_factory
    return gated(made, offsets, bool((metadata or {}).get("singleton_local_shards", False)))
