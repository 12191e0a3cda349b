"""``LinearAdapter`` and ``LoRALinear``: linears with ``linear_in`` and ``linear_out`` in child modules."""

from __future__ import annotations

from itertools import count, takewhile
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn

from ...adapted import Site, factor_names
from ...attach import attach
from ...branches import branch_of
from ...errors import TargetError
from ...layout import Layout
from ...options import Options
from .bridged import Adapter, Bridged, become, dropout_of, refuse_adapted
from .transforming import adapt_linear

Module = TypeVar("Module", bound=nn.Module)


class LinearAdapter(Bridged, nn.Linear):
    """``y = x Wᵀ + b + (alpha / dim) · drop(x) Aᵀ Bᵀ``, A in ``linear_in``, B in ``linear_out``.

    Made by :class:`LoRA` of an ``nn.Linear``, in its place. Called by hand it copies W and the bias.

    Args:
        orig_linear: the layer.
        dim, alpha: the rank, and the numerator of the scale.
        dropout, dropout_position: see :class:`graft.Options`.
        lora_A_init_method: see :class:`LoRA`.
        lora_dtype: the factors' dtype; W's when None.
    Raises:
        TargetError: the layer is adapted already; an option outside its range.
    """

    graft_plain = nn.Linear
    graft_children = ("dropout", "linear_in", "linear_out")
    graft_branch = staticmethod(cast(Any, branch_of(nn.Linear)))

    def __init__(
        self,
        orig_linear: nn.Linear,
        dim: int = 8,
        alpha: float = 32,
        dropout: float = 0.0,
        dropout_position: Literal["pre", "mid", "post"] = "pre",
        lora_A_init_method: str = "xavier",
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        refuse_adapted(orig_linear)
        w, bias = orig_linear.weight, orig_linear._parameters["bias"]  # pyright: ignore[reportPrivateUsage]
        super().__init__(
            orig_linear.in_features, orig_linear.out_features, bias is not None, w.device, w.dtype
        )
        self.__class__ = cast(Any, nn.Linear)
        self.load_state_dict(orig_linear.state_dict())
        options = Options(dim, alpha, dropout=dropout, dropout_position=dropout_position, dtype=lora_dtype)
        adapt_in_place(self, "weight", options, (lora_A_init_method, "zero"))

    @property
    def dim(self) -> int:
        return self._site.options.rank

    @property
    def alpha(self) -> float:
        return cast(float, self._site.options.alpha)

    @property
    def scale(self) -> float:
        return self._site.scale

    @property
    def dropout_position(self) -> str:
        return self._site.options.dropout_position

    def _get_name(self) -> str:
        return "LinearAdapter"

    @property
    def _site(self) -> Site:
        return self.graft_slots["weight"].site


class LoRALinear(Bridged):
    """A Megatron linear with factors in its child ``adapter``; made by :class:`LoRA`, in the layer's place.

    ``LoRALinear(to_wrap, adapter)`` by hand makes ``to_wrap`` itself one, with the adapter's ``linear_in``
    and ``linear_out`` as factors, its ``alpha`` and its ``dim``. The matrices ``weight0``, ``weight1``, … of
    a grouped linear share the factors.

    Raises:
        TargetError: by hand, a module with neither, or an adapter without these four.
    """

    graft_children = ("adapter",)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is LoRALinear:
            return _wrap(*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Everything is done already: the layer was a whole module before it became this."""

    @property
    def to_wrap(self) -> nn.Module:
        """The layer itself."""
        return self

    def graft_home(self) -> nn.Module:
        return cast(nn.Module, self.adapter)


def _wrap(to_wrap: nn.Module, adapter: nn.Module) -> nn.Module:
    try:
        made: Any = adapter
        options, scale = Options(made.dim, made.alpha), made.alpha / made.dim
        a, b = made.linear_in.weight, made.linear_out.weight
        weights = _matrices(to_wrap)
    except AttributeError as error:
        raise TargetError(
            "LoRALinear needs a layer with a weight (or weight0, weight1, …), and an adapter with alpha, "
            f"dim, linear_in and linear_out: {error}"
        ) from None
    layer = become(to_wrap, LoRALinear)
    layer.add_module("adapter", adapter)
    for name in weights:
        attach(layer, name, Site(options, Layout("o i"), scale), a, b, names=factor_names("weight"))
        layer.get_parameter(name).requires_grad_(False)
    return layer


def _matrices(module: nn.Module) -> list[str]:
    """``weight``, or those of a grouped linear: ``weight0``, ``weight1``, …"""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    grouped = list(takewhile(own.__contains__, (f"weight{n}" for n in count())))
    if "weight" in own or not grouped:
        module.get_parameter("weight")
        return ["weight"]
    return grouped


def adapt_in_place(module: Module, name: str, options: Options, inits: tuple[str, str]) -> Module:
    """Make an ``nn.Linear`` a :class:`LinearAdapter`, or Megatron's linear a :class:`LoRALinear`.

    Arguments and errors are those of :func:`.transforming.adapt_linear`.
    """
    if isinstance(module, nn.Linear):
        return adapt_linear(
            module, name, options, inits, LinearAdapter, lambda site: ("dropout", dropout_of(site))
        )
    return adapt_linear(module, name, options, inits, LoRALinear, lambda site: ("adapter", Adapter(site)))
