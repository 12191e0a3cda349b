"""Layers with an adapter from the start: what ``graft.adapt`` would make of their plain twins.

Every argument that is not an option of the adapter goes to the plain layer. W and the bias are frozen,
as after ``graft.adapt``; A and B train.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .adapted import Adapted, Site, register
from .attach import attach
from .kinds import kind_of, natural_layout
from .options import Init, Options, Position, new_factors


class _Layer(Adapted):
    """Shared constructor: the plain layer first, then its site.

    Args:
        rank, alpha, rslora, dropout, dropout_position, init, init_b: see :class:`graft.Options`.
        lora_dtype: the factors' dtype (``dtype`` is the plain layer's own argument).
        args, kwargs: the plain layer's arguments.
    Raises:
        TargetError: an option outside its range, or one that this layer does not admit.
    """

    def __init__(
        self,
        *args: Any,
        rank: int = 8,
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
        dropout_position: Position = "pre",
        init: Init | None = None,
        init_b: Init = "zero",
        lora_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        options = Options(rank, alpha, rslora, dropout, dropout_position, init, lora_dtype, init_b=init_b)
        super().__init__(*args, **kwargs)
        self.graft_slots = {}
        self.requires_grad_(False)
        weight = self.get_parameter("weight")
        layout = natural_layout(self, "weight", weight)
        a, b = new_factors(weight, layout, options, embedding=kind_of(self, "weight") == "embedding")
        attach(self, "weight", Site(options, layout, options.scale), a, b)


class Linear(_Layer, nn.Linear):
    """``y = x Wᵀ + b + scale · (x Aᵀ) Bᵀ`` with W ``[out, in]``, A ``[r, in]``, B ``[out, r]``."""


class Embedding(_Layer, nn.Embedding):
    """``y = W[x] + scale · A[:, x]ᵀ Bᵀ`` with W ``[num, dim]``, A ``[r, num]``, B ``[dim, r]``."""


class Conv1d(_Layer, nn.Conv1d):
    """W ``[out, in/g, k]``; for each of the g groups A ``[r, in/g · k]`` and B ``[out/g, r]``."""


class Conv2d(_Layer, nn.Conv2d):
    """W ``[out, in/g, k₁, k₂]``; for each of the g groups A ``[r, in/g · k₁k₂]`` and B ``[out/g, r]``."""


class Conv3d(_Layer, nn.Conv3d):
    """W ``[out, in/g, k₁, k₂, k₃]``; for each group A ``[r, in/g · k₁k₂k₃]`` and B ``[out/g, r]``."""


for _plain, _adapted in {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
}.items():
    register(_plain, _adapted)
