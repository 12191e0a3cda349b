"""One site's factors with their scale and layout, as the factored forwards use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .layout import Layout
from .options import Options


@dataclass(frozen=True)
class Factors:
    """What a branch needs of one site."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    layout: Layout
    options: Options

    def oriented(self, inputs_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """``down`` and ``up`` for a module that stores its weight ``[in, out]`` (or ``[out, in]``)."""
        if self.layout.transposed == inputs_first:
            return self.a, self.b
        return self.b.T, self.a.T

    def drop(self, x: torch.Tensor, position: str, training: bool) -> torch.Tensor:
        o = self.options
        if not training or o.dropout == 0.0 or o.dropout_position != position:
            return x
        return F.dropout(x, o.dropout)


Branch = Callable[..., torch.Tensor]


def into(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x in the factors' dtype, unless autocast chooses the dtype of the products itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(factor.dtype)


def rise(f: Factors, h: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Out of the rank, each group by its own block of ``up``."""
    layout = f.layout
    if layout.groups == 1:
        return F.linear(h, up)
    n = len(layout.enabled)
    parts = torch.einsum("...nr,nor->...no", h.unflatten(-1, (n, -1)), _like(up, h).unflatten(0, (n, -1)))
    return _spread(parts, layout).flatten(-2)


def _like(factor: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return factor.to(h.dtype)


def _spread(parts: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[…, n, o]`` of the enabled groups as ``[…, g, o]`` with zeros for the others."""
    if layout.only is None:
        return parts
    full = parts.new_zeros((*parts.shape[:-2], layout.groups, parts.shape[-1]))
    return full.index_copy(-2, torch.tensor(layout.only, device=parts.device), parts)
