"""A module whose weight behaves as W + ΔW, by a class swap.

The module's class becomes a cached subclass of ``(Adapted, its class)``; ``lora_A`` and ``lora_B`` join
the module's own parameters (``lora_A_<name>``, ``lora_B_<name>`` for a parameter not called ``weight``).
Nothing else moves: the weight object, the base's state-dict keys, ``isinstance`` and hooks stay. A layer of
another library's names (:mod:`graft.compat`) says what it calls A and B.

Two ways to run forward: **factored**, ``plain(x) + scale · (x Aᵀ) Bᵀ``, for the forwards in
:mod:`graft.branches`; **shadowed**, with W + ΔW in the weight's place while forward runs, for all others.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar, cast

import torch
from torch import nn

from .branches import branch_of
from .branches_megatron import joined, shared
from .engines import engine_of
from .engines.megatron_checkpoint import sharded_factors
from .engines.megatron_experts import is_expert_layer
from .engines.split import split_of
from .errors import StateError
from .factors import Branch, Factors
from .kinds import read_children
from .layout import Layout
from .options import Options
from .shadow import effective, shadowed, shadowing
from .undo import Undo

NO_ADAPTER = "the model has no adapter; call graft.adapt(model, …) or graft.load(model, path) first"


@dataclass(eq=False)
class Site:
    """The state of one adapted weight, shared by every module that holds that weight (tied weights)."""

    options: Options
    layout: Layout
    scale: float
    disabled: bool = False
    fusion: tuple[Undo, ...] | None = None  # one for each part of the weight in this process

    @property
    def live(self) -> bool:
        """Whether forward has to add ΔW: it is neither switched off nor in the weight already."""
        return not self.disabled and self.fusion is None


@dataclass(eq=False)
class Slot:
    """One module's parameter that is a site."""

    site: Site
    factored: bool
    names: tuple[str, str]  # of A and B on the module
    spread: bool = False  # the engine gathers the factors in forward
    used_elsewhere: bool = False  # other processes use these factors for tokens or weights of their own


def factor_names(parameter: str) -> tuple[str, str]:
    """Names of A and B on the module, unless its slot says others."""
    tail = "" if parameter == "weight" else f"_{parameter}"
    return f"lora_A{tail}", f"lora_B{tail}"


class Adapted(nn.Module):
    """Mixed into a module's class in front of it; see the module's documentation."""

    graft_plain: ClassVar[type[nn.Module]]
    graft_branch: ClassVar[Branch | None] = None
    graft_children: ClassVar[tuple[str, ...]] = ()  # submodules that the plain class does not have
    graft_slots: dict[str, Slot]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slots = self.graft_slots
        slot = slots.get("weight")
        for name, s in slots.items():
            if s.site.fusion is not None:
                _refuse_training(self, name)
        covered = _uncovered(self)
        if covered:
            with shadowing(_shadows(covered)):
                return super().forward(*args, **kwargs)
        y = super().forward(*args, **kwargs)
        if slot is None or not slot.factored or not slot.site.live or shadowed(self):
            return y
        branch = cast("Callable[..., torch.Tensor]", type(self).graft_branch)
        if isinstance(y, tuple):  # Megatron's linears give (output, bias)
            out = cast("tuple[Any, ...]", y)
            update = branch(self, _ready(self, "weight"), *args, **kwargs)
            return (out[0] + update.to(out[0].dtype), *out[1:])
        inputs = (*args, *kwargs.values())
        return y + branch(self, _ready(self, "weight"), *inputs).to(y.dtype)

    def _get_name(self) -> str:
        return f"LoRA{self.graft_plain.__name__}"

    def extra_repr(self) -> str:
        own = [
            f"{name}: rank={s.site.options.rank}, scale={s.site.scale:g}"
            + (", fused" if s.site.fusion else "")
            + (", disabled" if s.site.disabled else "")
            for name, s in self.graft_slots.items()
        ]
        return ", ".join([part for part in [super().extra_repr(), *own] if part])

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a class made at run time has no name that pickle could import: name its base instead
        reduced = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if type(self) is not _CLASSES.get(self.graft_plain):
            return reduced
        if reduced[0] is getattr(copyreg, "__newobj__") and reduced[1] == (type(self),):  # noqa: B009
            return (_blank, (self.graft_plain,), *reduced[2:])
        return reduced

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, slot in self.graft_slots.items():
            if slot.site.fusion is not None:
                destination[f"{prefix}lora_fused_{name}"] = torch.ones(1, dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, slot in self.graft_slots.items():
            if f"{prefix}lora_fused_{name}" in state_dict:
                raise StateError(
                    f"{prefix}{name} was fused when this state dict was saved, so its weight already holds "
                    "ΔW; save it again after graft.unfuse(model), or load it into the plain model"
                )
            if slot.site.fusion is not None and f"{prefix}{name}" in state_dict:
                raise StateError(
                    f"{prefix}{name} is fused; loading over it would make it impossible to unfuse. "
                    "Call graft.unfuse(model) first"
                )
        if is_expert_layer(self):
            _refuse_unshared(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _refuse_unshared(layer: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Refuse values that differ among experts whose factors are one; the last expert's would win."""
    first: dict[int, str] = {}
    for name, parameter in layer.named_parameters(remove_duplicate=False):
        key, other = prefix + name, prefix + first.setdefault(id(parameter), name)
        if key in state_dict and other in state_dict and not torch.equal(state_dict[key], state_dict[other]):
            raise StateError(
                f"{key} and {other} have different values, and the model's experts share one; load them into "
                "a model that was adapted with share_experts=False"
            )


def _refuse_training(module: nn.Module, parameter: str) -> None:
    a = getattr(module, names_of(module, parameter)[0])
    if module.training and torch.is_grad_enabled() and a.requires_grad:
        raise StateError(
            f"{type(module).__name__}.{parameter} is fused, so training would give A and B no gradient; call "
            "graft.unfuse(model) before training, or model.eval() or torch.no_grad() to run it as it is"
        )


def _uncovered(module: Adapted) -> list[tuple[Adapted, str]]:
    """The parameters that must be shadowed for this module's forward."""
    found = [(module, n) for n, s in module.graft_slots.items() if not s.factored and s.site.live]
    for child in read_children(module):
        if isinstance(child, Adapted):
            for name, slot in child.graft_slots.items():
                if slot.site.fusion is not None:
                    _refuse_training(child, name)
                elif slot.site.live:
                    found.append((child, name))
    return [(m, n) for m, n in found if not shadowed(m)]


def _shadows(covered: list[tuple[Adapted, str]]) -> list[tuple[nn.Module, dict[str, torch.Tensor]]]:
    by_module: dict[int, tuple[nn.Module, dict[str, torch.Tensor]]] = {}
    for module, name in covered:
        f = _shared(getattr(module, name), _ready(module, name))
        weight = effective(getattr(module, name), f.a, f.b, f.scale, f.layout)
        by_module.setdefault(id(module), (module, {}))[1][name] = weight
    return list(by_module.values())


def _shared(weight: torch.Tensor, f: Factors) -> Factors:
    """Factors whose gradients are complete although each process uses them for its own part of W."""
    if split_of(weight) is None:
        return f
    return shared(weight, f)


def _ready(module: Adapted, parameter: str) -> Factors:
    """The factors for forward: gathered where the weight is, and the factors are not, by the engine."""
    f, slot = factors(module, parameter), module.graft_slots[parameter]
    if slot.used_elsewhere:
        return joined(f)
    if not slot.spread:
        return f
    engine: Any = engine_of(f.a)
    a, b = engine.ready(f.a, f.b, getattr(module, parameter))
    return replace(f, a=a, b=b)


def factors(module: nn.Module, parameter: str) -> Factors:
    """The live factors of one site with their scale and layout."""
    slot = cast(Adapted, module).graft_slots[parameter]
    site = slot.site
    a, b = (getattr(module, name) for name in slot.names)
    return Factors(a, b, site.scale, site.layout, site.options)


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """The adapted parameters of one module."""
    return module.graft_slots if isinstance(module, Adapted) else {}


def names_of(module: nn.Module, parameter: str) -> tuple[str, str]:
    """Names of a site's A and B on its module."""
    return slots_of(module)[parameter].names


# --- the class swap ---------------------------------------------------------------------------------

_CLASSES: dict[type[nn.Module], type[Adapted]] = {}


def register(plain: type[nn.Module], adapted: type[Adapted]) -> None:
    """Use this public class as the swapped class of ``plain``."""
    adapted.graft_plain, adapted.graft_branch = plain, _static(branch_of(plain))
    _CLASSES[plain] = adapted


def adapted_class(plain: type[nn.Module]) -> type[Adapted]:
    """The one subclass ``(Adapted, plain)``; equal for every instance, so torch.compile compiles once."""
    # the public layers must be registered first: a pickle may be the first to need this module
    import_module(f"{__package__}.layers")

    if plain not in _CLASSES:
        own: dict[str, Any] = {"__module__": plain.__module__}
        if hasattr(plain, "sharded_state_dict"):
            own["sharded_state_dict"] = _sharded_state_dict
        made = type(f"LoRA{plain.__name__}", (Adapted, plain), own)
        register(plain, made)
    return _CLASSES[plain]


def _sharded_state_dict(
    self: Adapted, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
) -> dict[str, Any]:
    """Megatron's description of this module's tensors, with the factors as they are cut."""
    plain = cast(Any, self.graft_plain)
    found: dict[str, Any] = plain.sharded_state_dict(self, prefix, sharded_offsets, metadata)
    own = {name: getattr(self, name) for slot in self.graft_slots.values() for name in slot.names}
    return found | sharded_factors(own, prefix, sharded_offsets, metadata)


def _static(branch: Branch | None) -> Any:
    return None if branch is None else staticmethod(branch)


def _blank(plain: type[nn.Module]) -> nn.Module:
    cls = adapted_class(plain)
    return cls.__new__(cls)
