"""What the adapted linears share: factors as weights of child modules, and the class swap."""

from __future__ import annotations

import copyreg
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ...adapted import Adapted, Site
from ...branches import branch_of
from ...engines import shape_of
from ...engines.megatron_checkpoint import sharded_factors
from ...errors import StateError, TargetError

_CHILDREN = {"lora_A": "linear_in", "lora_B": "linear_out"}


class Factor(nn.Module):
    """One factor, as the ``weight`` of a module: A ``[dim, in]`` or B ``[out, dim]``."""

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    @property
    def in_features(self) -> int:
        return shape_of(self.weight)[1]

    @property
    def out_features(self) -> int:
        return shape_of(self.weight)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias=False"


class SiteDropout(nn.Dropout):
    """The dropout of one adapted layer; setting ``p`` changes it."""

    def __init__(self, site: Site) -> None:
        nn.Module.__init__(self)
        self.inplace = False
        self.__dict__["site"] = site

    @property
    def p(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.__dict__["site"].options.dropout

    @p.setter
    def p(self, value: float) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        site: Site = self.__dict__["site"]
        site.options = site.options.changed(dropout=float(value))


def dropout_of(site: Site) -> nn.Module:
    return SiteDropout(site) if site.options.dropout else nn.Identity()


class Adapter(nn.Module):
    """The factors of one Megatron linear, ``<layer>.adapter``."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.__dict__["site"] = site
        self.dropout = dropout_of(site)

    @property
    def dim(self) -> int:
        return self.__dict__["site"].options.rank

    @property
    def alpha(self) -> float:
        return self.__dict__["site"].options.alpha

    @property
    def dropout_position(self) -> str:
        return self.__dict__["site"].options.dropout_position


class Bridged(Adapted):
    """An adapted module with its factors in children, which its class's subclasses place."""

    def graft_home(self) -> nn.Module:
        """The module that ``linear_in`` and ``linear_out`` are children of."""
        return self

    # graft_children go as they are when the class does, so that a failed adapt can put them back

    @property
    def lora_A(self) -> nn.Parameter:
        return cast(nn.Parameter, cast(Any, self.graft_home()).linear_in.weight)

    @lora_A.deleter
    def lora_A(self) -> None: ...

    @property
    def lora_B(self) -> nn.Parameter:
        return cast(nn.Parameter, cast(Any, self.graft_home()).linear_out.weight)

    @lora_B.deleter
    def lora_B(self) -> None: ...

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name not in _CHILDREN or param is None:
            super().register_parameter(name, param)
            return
        home, child = self.graft_home(), _CHILDREN[name]
        if getattr(getattr(home, child, None), "weight", None) is not param:
            home.add_module(child, Factor(param))

    def enable_adapter_layers(self) -> None:
        """Let forward add ΔW."""
        self._switch(disabled=False)

    def disable_adapter_layers(self) -> None:
        """Let forward be the plain layer's.

        Raises:
            StateError: the weight holds ΔW.
        """
        self._switch(disabled=True)

    def _switch(self, *, disabled: bool) -> None:
        for slot in self.graft_slots.values():
            if disabled and slot.site.fusion is not None:
                raise StateError(
                    "a merged layer cannot be switched off; use disable_adapter(model), or call "
                    "graft.unfuse(model) first"
                )
            slot.site.disabled = disabled

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a class made at run time has no name that pickle could import: name its parts instead
        reduced = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        kind = type(self).__dict__.get("graft_kind")
        if kind is None:
            return reduced
        assert reduced[0] is getattr(copyreg, "__newobj__")  # noqa: B009
        return (_blank, (kind, self.graft_plain), *reduced[2:])


def become(module: nn.Module, kind: type[Bridged]) -> Bridged:
    """Swap a plain module's class; it has no site yet.

    Raises:
        TargetError: it is adapted already, or its forward is replaced on the instance.
    """
    refuse_adapted(module)
    if "forward" in module.__dict__:
        raise TargetError(
            f"a {type(module).__name__} has its forward replaced on the instance (accelerate's device_map "
            "hooks do so), which would bypass the adapter; adapt the model before it is dispatched"
        )
    try:
        module.__class__ = cast(Any, bridged_class(kind, type(module)))
    except TypeError as error:
        raise TargetError(f"the class of a {type(module).__name__} cannot be swapped: {error}") from None
    layer = cast(Bridged, module)
    layer.graft_slots = {}
    return layer


def refuse_adapted(module: nn.Module) -> None:
    if isinstance(module, Adapted):
        raise TargetError(f"a {type(module).__name__} is adapted already; call graft.unadapt first")


@cache
def bridged_class(kind: type[Bridged], plain: type[nn.Module]) -> type[Bridged]:
    """The one subclass ``(kind, plain)``; ``kind`` itself if it is one of that plain class already."""
    if kind.__dict__.get("graft_plain") is plain:
        return kind
    branch = branch_of(plain)
    own: dict[str, Any] = {
        "__module__": plain.__module__,
        "graft_kind": kind,
        "graft_plain": plain,
        "graft_branch": None if branch is None else staticmethod(branch),
    }
    if hasattr(plain, "sharded_state_dict"):
        own["sharded_state_dict"] = _sharded_state_dict
    return cast("type[Bridged]", type(f"LoRA{plain.__name__}", (kind, plain), own))


def _sharded_state_dict(
    self: Bridged, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
) -> dict[str, Any]:
    """Megatron's description of this module's tensors, with the factors as they are cut."""
    plain = cast(Any, self.graft_plain)
    found: dict[str, Any] = plain.sharded_state_dict(self, prefix, sharded_offsets, metadata)
    own = {f"adapter.{child}.weight": getattr(self, name) for name, child in _CHILDREN.items()}
    return found | sharded_factors(own, prefix, sharded_offsets, metadata)


def _blank(kind: type[Bridged], plain: type[nn.Module]) -> nn.Module:
    cls = bridged_class(kind, plain)
    return cls.__new__(cls)
