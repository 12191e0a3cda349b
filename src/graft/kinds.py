"""What Graft knows of module classes: which parameters can be adapted and how they are stored.

Classes of other packages are looked up among the modules already imported; nothing is imported here.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]

from .engines import shape_of
from .engines.megatron_modules import COLUMN, EMBEDDING, ROW, role_of, shared_embedding
from .layout import Layout

#: Modules whose forward reads parameters of their children without calling them. A child is listed as
#: (path, only in eval mode): the encoder layer's fast path, taken in eval mode, hands all of its
#: children's parameters to one kernel.
_READERS: tuple[tuple[type[nn.Module], tuple[str, ...], bool], ...] = (
    (nn.MultiheadAttention, ("out_proj",), False),
    (nn.TransformerEncoderLayer, ("self_attn", "self_attn.out_proj", "linear1", "linear2"), True),
)


def conv1d_class() -> type[nn.Module] | None:
    """GPT-2's ``Conv1D`` if transformers has been imported, whose weight is stored ``[in, out]``."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def is_conv1d(module: nn.Module) -> bool:
    kind = conv1d_class()
    return kind is not None and isinstance(module, kind)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module) or role_of(module) in (COLUMN, ROW)


def is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or role_of(module) == EMBEDDING


def kind_of(module: nn.Module, parameter: str) -> str:
    """The carrier's word for this parameter: ``linear``, ``embedding``, ``conv`` or ``parameter``."""
    if parameter != "weight":
        return "parameter"
    if is_embedding(module):
        return "embedding"
    if isinstance(module, _ConvNd):
        return "conv"
    return "linear" if is_linear(module) else "parameter"


def natural_layout(module: nn.Module, parameter: str, weight: torch.Tensor) -> Layout:
    """How this module stores this parameter, as far as its class tells."""
    shape = shape_of(weight)
    if len(shape) == 3 and not isinstance(module, _ConvNd) and not isinstance(module, nn.Bilinear):
        # transformers marks experts that multiply from the left, ``x @ W[e]``
        transposed = bool(getattr(module, "is_transposed", False))
        return Layout("g i o" if transposed else "g o i", shape[0])
    if parameter != "weight":
        return Layout("o i")
    if is_embedding(module) or is_conv1d(module):
        return Layout("i o")
    if isinstance(module, _ConvTransposeNd):
        return Layout("(g i) o", module.groups)
    if isinstance(module, _ConvNd) and module.groups > 1:
        return Layout("(g o) i", module.groups)
    return Layout("o i")


def stored_transposed(module: nn.Module, parameter: str) -> bool | None:
    """Whether the class stores this parameter ``[in, out]``; None if the class does not tell."""
    kind = kind_of(module, parameter)
    if kind == "linear":
        return is_conv1d(module)
    if kind == "embedding":
        return True
    return None


def adaptable(module: nn.Module) -> list[str]:
    """Relative names of the parameters that stand for a target module of this class; [] if it has none."""
    own = module._parameters  # pyright: ignore[reportPrivateUsage]
    if isinstance(module, nn.MultiheadAttention):
        joint = own.get("in_proj_weight") is not None
        names = ["in_proj_weight"] if joint else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        return [*names, "out_proj.weight"]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return [n for n, p in own.items() if n.startswith("weight_") and p is not None]
    weight = own.get("weight")
    return ["weight"] if weight is not None and _matrix(weight) else []


def _matrix(weight: Any) -> bool:
    lazy = isinstance(weight, nn.parameter.UninitializedParameter)
    return lazy or len(shape_of(weight)) >= 2


def read_children(module: nn.Module, *, always: bool = False) -> list[nn.Module]:
    """Children whose parameters this module's forward reads itself, now or (``always``) in any mode."""
    shared = shared_embedding(module)
    found: list[nn.Module] = [] if shared is None else [shared]
    for kind, paths, eval_only in _READERS:
        if isinstance(module, kind) and (always or not (eval_only and module.training)):
            found += [child for child in (_descend(module, path) for path in paths) if child is not None]
    return found


def read_always(module: nn.Module) -> list[nn.Module]:
    """Children whose parameters this module's forward reads itself in every mode."""
    shared = shared_embedding(module)
    found = [shared, module.out_proj if isinstance(module, nn.MultiheadAttention) else None]
    return [child for child in found if child is not None]


def _descend(module: nn.Module, path: str) -> nn.Module | None:
    """A descendant, or None where a subclass has no such child."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None
