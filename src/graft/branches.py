"""The low-rank branch ``scale · (x Aᵀ) Bᵀ`` of the forwards that Graft knows, by identity of the function.

Each branch returns what the plain forward would compute with ΔW in W's place and no bias, without ever
forming ΔW. ``down`` and ``up`` below are A and B read in the module's own sense: ``down [(n r), in]``
takes the input to the rank, ``up [(n out), r]`` leads out of it. They are A and B themselves, or Bᵀ and
Aᵀ where the layout runs against the module (the output head tied to an embedding).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]

from .branches_megatron import megatron_branch
from .engines import shape_of, summed
from .engines.megatron_modules import EMBEDDING, core_class, role_of
from .factors import Branch, Factors, into, rise
from .kinds import conv1d_class
from .layout import Layout
from .shadow import shadowing


def _dense(module: nn.Module, x: torch.Tensor, f: Factors, inputs_first: bool) -> torch.Tensor:
    down, up = f.oriented(inputs_first)
    x = f.drop(into(x, down), "pre", module.training)
    h = f.drop(F.linear(x, down), "mid", module.training)
    return f.drop(rise(f, h, up) * f.scale, "post", module.training)


def linear(module: nn.Module, f: Factors, x: torch.Tensor) -> torch.Tensor:
    return _dense(module, x, f, inputs_first=False)


def conv1d(module: nn.Module, f: Factors, x: torch.Tensor) -> torch.Tensor:
    return _dense(module, x, f, inputs_first=True)


def embedding(module: nn.Module, f: Factors, x: torch.Tensor) -> torch.Tensor:
    """ΔW's rows: ``A[:, x]ᵀ Bᵀ``. Where x is padding they count, but give no gradient, as in torch."""
    down, up = f.oriented(inputs_first=True)
    pad = cast("int | None", module.padding_idx)
    h = summed(F.embedding(x, down.T, padding_idx=pad))
    if f.options.dropout_position == "pre":
        h = f.drop(h, "pre", module.training)
    y = F.linear(f.drop(h, "mid", module.training), up) * f.scale
    if pad is not None and y.requires_grad:
        y = torch.where((x == pad).unsqueeze(-1), y.detach(), y)
    return f.drop(y, "post", module.training)


_CONVOLVE: dict[int, Branch] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv(module: nn.Module, f: Factors, x: torch.Tensor) -> torch.Tensor:
    """A as a convolution like the module's own into ``groups · r`` channels, then B as a 1×1 one."""
    m = cast(Any, module)
    axes = len(m.kernel_size)
    down = f.a.unflatten(1, m.weight.shape[1:])
    x = f.drop(into(x, down), "pre", m.training)
    h = f.drop(m._conv_forward(x, down, None), "mid", m.training)
    up = f.b[(...,) + (None,) * axes]
    y = _CONVOLVE[axes](h, up, groups=m.groups)
    return f.drop(y * f.scale, "post", m.training)


def conv_transposed(
    module: nn.Module, f: Factors, x: torch.Tensor, output_size: list[int] | None = None
) -> torch.Tensor:
    """A as a 1×1 convolution, then the module's own forward with B in its weight's place."""
    m = cast(Any, module)
    axes, groups = len(m.kernel_size), m.groups
    x = f.drop(into(x, f.a), "pre", m.training)
    h = _CONVOLVE[axes](x, f.a[(...,) + (None,) * axes], groups=groups)
    h = f.drop(h, "mid", m.training)
    # B [(g o k…), r] → [(g r), o, k…]
    up = f.b.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).unflatten(1, m.weight.shape[1:])
    with shadowing([(module, {"weight": up, "bias": cast(torch.Tensor, None)})]):
        y = _PLAIN_TRANSPOSED[axes](m, h, output_size)
    return f.drop(y * f.scale, "post", m.training)


_PLAIN_TRANSPOSED: dict[int, Branch] = {
    1: nn.ConvTranspose1d.forward,
    2: nn.ConvTranspose2d.forward,
    3: nn.ConvTranspose3d.forward,
}
_TABLE: dict[Any, Branch] = {
    nn.Linear.forward: linear,
    nn.Embedding.forward: embedding,
    nn.Conv1d.forward: conv,
    nn.Conv2d.forward: conv,
    nn.Conv3d.forward: conv,
    nn.ConvTranspose1d.forward: conv_transposed,
    nn.ConvTranspose2d.forward: conv_transposed,
    nn.ConvTranspose3d.forward: conv_transposed,
}


def branch_of(plain: type[nn.Module]) -> Branch | None:
    """The branch for a class's own forward; None if Graft does not know that function."""
    if core_class(plain) is not None:
        return megatron_branch(plain)
    kind = conv1d_class()
    if kind is not None and plain.forward is kind.forward:
        return conv1d
    return _TABLE.get(plain.forward)


def fits(module: nn.Module, weight: torch.Tensor, layout: Layout) -> bool:
    """Whether the branch of this module's class computes this layout."""
    if layout.matrix is not None or len(shape_of(weight)) < 2:
        return False
    role = role_of(module)
    if role is not None:
        return layout.pattern == "i o" if role == EMBEDDING else layout.pattern in ("o i", "(g o) i")
    if isinstance(module, _ConvTransposeNd):
        return layout.transposed and layout.groups == module.groups and layout.only is None
    if isinstance(module, _ConvNd):
        return not layout.transposed and layout.groups == module.groups and layout.only is None
    if isinstance(module, nn.Embedding):
        # max_norm writes to the weight in forward; scale_grad_by_freq scales gradients of W's rows
        return layout.groups == 1 and module.max_norm is None and not module.scale_grad_by_freq
    if isinstance(module, nn.Linear):
        return layout.groups == 1 or layout.pattern == "(g o) i"
    return layout.groups == 1 or layout.pattern == "i (g o)"
