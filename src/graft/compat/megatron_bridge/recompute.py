"""Gradients through recomputed layers whose input does not train.

Re-entrant checkpointing, as Megatron-core's, gives no gradient to anything inside of a block unless an
input of the block needs one, and behind a frozen embedding none does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_BLOCK = "TransformerBlock"


def let_recomputed_layers_train(model: nn.Module) -> None:
    """Make the inputs of Megatron's blocks with full recomputation need gradients; once for each block."""
    for module in model.modules():
        whole = getattr(getattr(module, "config", None), "recompute_granularity", None) == "full"
        known = any(c.__name__ == _BLOCK for c in type(module).__mro__)
        hooks = module._forward_pre_hooks.values()  # pyright: ignore[reportPrivateUsage]
        if known and whole and _require not in hooks:
            module.register_forward_pre_hook(_require, with_kwargs=True)


def _require(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not (module.training and torch.is_grad_enabled() and isinstance(hidden, torch.Tensor)):
        return
    if hidden.is_floating_point():
        hidden.requires_grad_(True)
