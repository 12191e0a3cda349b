"""New factors for one linear, in its place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import nn

from ...adapted import Adapted, Site
from ...adapting import attach_target
from ...attach import become_plain
from ...engines import notice, shape_of
from ...errors import TargetError
from ...kinds import natural_layout
from ...options import Options
from ...targets import Holder, Target
from .bridged import Bridged, become

Module = TypeVar("Module", bound=nn.Module)
Fill = Callable[[torch.Tensor], object]


def _kaiming(factor: torch.Tensor) -> None:
    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


def _normal(factor: torch.Tensor) -> None:
    nn.init.normal_(factor, std=0.2)


#: how a factor [o, i] begins: U(±1/√i), N(0, 0.2²), 0; "xavier" depends on the layer's kind
_FILLS: dict[str, Fill] = {
    "kaiming": _kaiming,
    "uniform": _kaiming,
    "normal": _normal,
    "zero": nn.init.zeros_,
    "xavier": nn.init.xavier_normal_,
}


def fill(method: str, *, plain: bool) -> Fill:
    """The initial distribution of this name: ``xavier`` is uniform for ``nn.Linear``, normal for Megatron's.

    Raises:
        TargetError: an unknown name.
    """
    if method not in _FILLS:
        raise TargetError(f"an init method must be one of {', '.join(_FILLS)}, got {method!r}")
    return nn.init.xavier_uniform_ if plain and method == "xavier" else _FILLS[method]


def check_inits(inits: tuple[str, str]) -> None:
    """Refuse unknown names of initial distributions, and factors that could never train.

    Raises:
        TargetError: one of these.
    """
    for method in inits:
        fill(method, plain=True)
    if inits == ("zero", "zero"):
        raise TargetError(
            "lora_A_init_method='zero' with lora_B_init_method='zero' would never train: the gradient of "
            "each factor is a multiple of the other"
        )


def adapt_linear(
    module: Module,
    name: str,
    options: Options,
    inits: tuple[str, str],
    kind: type[Bridged],
    child: Callable[[Site], tuple[str, nn.Module]],
) -> Module:
    """Give a linear new factors and freeze its weight and bias; the module itself, with its class swapped.

    Args:
        name: the weight's full name, for messages.
        options: with ``dtype`` None the factors have the weight's.
        inits: names of the initial distributions of A and B.
        kind, child: what it becomes, and the child that this needs, by name.
    Raises:
        TargetError: the weight or the options do not allow it; the module is left as it was.
    """
    check_inits(inits)
    notice(name, module, "weight")
    weight = module.get_parameter("weight")
    if not weight.is_floating_point():
        raise TargetError(f"{name} is stored as {weight.dtype} (quantised); dequantise it first")
    plain = isinstance(module, nn.Linear)
    layout = natural_layout(module, "weight", weight)
    options = options.changed(dtype=options.dtype or weight.dtype)
    site = Site(options, layout, options.scale)
    pair: list[nn.Parameter] = []
    for shape, method in zip(layout.factor_shapes(shape_of(weight), options.rank), inits, strict=True):
        factor = torch.empty(shape, dtype=options.dtype, device=weight.device)
        fill(method, plain=plain)(factor)
        pair.append(nn.Parameter(factor))
    layer = become(module, kind)
    layer.add_module(*child(site))
    try:
        attach_target(layer, Target((Holder(name, layer, "weight"),)), site, (pair[0], pair[1]))
    except BaseException:
        become_plain(cast(Adapted, layer))
        raise
    for own in layer.parameters(recurse=False):
        own.requires_grad_(False)
    return module
