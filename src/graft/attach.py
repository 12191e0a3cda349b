"""Make parameters of a model sites, and plain again: the only code that adds or removes factors."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from torch import nn

from .adapted import Adapted, Site, Slot, adapted_class, factor_names, names_of, slots_of
from .branches import branch_of, fits
from .engines import engine_of, settle
from .engines.megatron_experts import is_expert_layer
from .engines.split import split_of
from .errors import TargetError
from .kinds import read_children


def become_adapted(module: nn.Module) -> Adapted:
    """Swap the module's class; it has no site yet.

    Raises:
        TargetError: a module whose class cannot be swapped.
    """
    if isinstance(module, Adapted):
        return module
    if "forward" in module.__dict__:
        raise TargetError(
            f"a {type(module).__name__} has its forward replaced on the instance (accelerate's device_map "
            "hooks do so), which would bypass the adapter; adapt the model before it is dispatched"
        )
    try:
        module.__class__ = adapted_class(type(module))
    except TypeError as error:
        raise TargetError(f"the class of a {type(module).__name__} cannot be swapped: {error}") from None
    adapted = cast(Adapted, module)
    adapted.graft_slots = {}
    return adapted


def become_plain(module: Adapted) -> None:
    """The plain class again; the module must have no site left."""
    assert not module.graft_slots
    for name in type(module).graft_children:
        if hasattr(module, name):  # a layer that failed half-way lacks some
            delattr(module, name)
    del module.graft_slots
    module.__class__ = cast(Any, unadapted(type(module)))


def attach(
    module: nn.Module,
    parameter: str,
    site: Site,
    a: nn.Parameter,
    b: nn.Parameter,
    *,
    through_parent: bool = False,
    names: tuple[str, str] | None = None,
) -> Slot:
    """Make one parameter of a module a site; tied modules are given the same site and factors.

    Args:
        through_parent: another module's forward reads the parameter.
        names: what the module calls A and B; ``lora_A`` and ``lora_B`` when None.
    Raises:
        TargetError: dropout on a parameter whose forward Graft does not know.
    """
    weight = getattr(module, parameter)
    known = branch_of(plain_class(module)) is not None and fits(module, weight, site.layout)
    factored = parameter == "weight" and known and not through_parent
    if not factored and site.options.dropout:
        raise TargetError(
            f"dropout={site.options.dropout} cannot be applied to {type(module).__name__}.{parameter}: its "
            "forward runs on W + ΔW as a whole, not on factors; set dropout=0 for it"
        )
    if getattr(module, "max_norm", None) is not None:
        raise TargetError(
            f"{type(module).__name__} with max_norm={module.max_norm} rewrites its weight in every forward; "
            "set module.max_norm = None to adapt it"
        )
    adapted = become_adapted(module)
    names = names or factor_names(parameter)
    for name, value in zip(names, (a, b), strict=True):
        adapted.register_parameter(name, value)
    used_elsewhere = any(split is not None and split.users is not None for split in map(split_of, (a, b)))
    spread = hasattr(engine_of(weight), "ready")
    adapted.graft_slots[parameter] = Slot(site, factored, names, spread, used_elsewhere)
    return adapted.graft_slots[parameter]


def detach(module: Adapted, parameter: str) -> None:
    """Remove one site's factors from a module."""
    for name in names_of(module, parameter):
        delattr(module, name)
    del module.graft_slots[parameter]


def plain_class(module: nn.Module) -> type[nn.Module]:
    return unadapted(type(module))


@cache
def unadapted(cls: type[nn.Module]) -> type[nn.Module]:
    """The class without Graft's, also where a library (FSDP2) swapped the class again after Graft did."""
    if not issubclass(cls, Adapted):
        return cls
    if not _by_fsdp(cls):
        return cls.graft_plain
    bases = tuple(unadapted(base) for base in cls.__bases__)
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(f"FSDP{bases[-1].__name__}", bases, own)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that the model was made of: without Graft's and without FSDP2's."""
    return without_fsdp(plain_class(module))


def without_fsdp(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that ``fully_shard`` was given."""
    while _by_fsdp(cls):
        cls = cls.__bases__[-1]
    return cls


def _by_fsdp(cls: type) -> bool:
    """Whether ``fully_shard`` made this class: ``(FSDPModule, the module's own)``."""
    return any(base.__name__ == "FSDPModule" for base in cls.__bases__)


def sites(model: nn.Module) -> Mapping[str, tuple[Adapted, str]]:
    """Every site once, under the first full name of its weight: ``{name: (module, parameter)}``."""
    settle(model)
    found: dict[str, tuple[Adapted, str]] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for parameter, slot in slots_of(module).items():
            if id(slot.site) not in seen:
                seen.add(id(slot.site))
                found[f"{path}.{parameter}" if path else parameter] = (cast(Adapted, module), parameter)
    return found


def adapter_keys(model: nn.Module) -> dict[str, Site]:
    """The keys of ``model.state_dict()`` that the plain model does not have, each with its site."""
    keys: dict[str, Site] = {}
    factors: dict[int, Site] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter, slot in slots_of(module).items():
            keys[f"{path}.lora_fused_{parameter}" if path else f"lora_fused_{parameter}"] = slot.site
            factors |= {id(getattr(module, name)): slot.site for name in slot.names}
    named = model.named_parameters(remove_duplicate=False)
    return keys | {name: factors[id(p)] for name, p in named if id(p) in factors}


def release(module: nn.Module, parameter: str) -> None:
    """Take a site from a module, if it is one; the plain class returns with the last of them."""
    if parameter in slots_of(module):
        adapted = cast(Adapted, module)
        detach(adapted, parameter)
        if not adapted.graft_slots:
            become_plain(adapted)


@contextmanager
def all_or_nothing(model: nn.Module) -> Generator[None]:
    """Attach and release inside the block; after an exception the model is adapted as it was before."""
    adapted = [m for m in model.modules() if isinstance(m, Adapted)]
    before = [
        (m, type(m), parameter, slot, {n: getattr(m, n) for n in (*type(m).graft_children, *slot.names)})
        for m in adapted
        for parameter, slot in m.graft_slots.items()
    ]
    orders = [(registry, list(registry)) for m in adapted for registry in _registries(m)]
    try:
        yield
    except BaseException:
        for module in list(model.modules()):
            for parameter in list(slots_of(module)):
                release(module, parameter)
        for module, cls, parameter, slot, own in before:
            layer = become_adapted(module)
            layer.__class__ = cast(Any, cls)
            for name, value in own.items():
                setattr(layer, name, value)
            layer.graft_slots[parameter] = slot
        for registry, order in orders:
            for name in order:
                registry[name] = registry.pop(name)
        raise
    finally:
        attach_readers(model)


def _registries(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its own parameters and children, whose order is that of the state dict and of optimisers."""
    return module._parameters, module._modules  # pyright: ignore[reportPrivateUsage]


@contextmanager
def plain_classes(model: nn.Module) -> Generator[None]:
    """Every module of its plain class inside the block: no adapter runs, whatever the sites' states."""
    swapped = [(m, type(m)) for m in model.modules() if isinstance(m, Adapted)]
    try:
        for module, _ in swapped:
            module.__class__ = cast(Any, unadapted(type(module)))
        yield
    finally:
        for module, cls in swapped:
            module.__class__ = cast(Any, cls)


def attach_readers(model: nn.Module) -> None:
    """Swap the modules that have to do with factors of children, and restore those that no longer have.

    They read adapted children themselves in forward, or hold several that share factors.
    """
    for module in list(model.modules()):
        needed = any(slots_of(child) for child in read_children(module, always=True))
        if needed or (is_expert_layer(module) and _shares(module)):
            become_adapted(module)
        elif isinstance(module, Adapted) and not module.graft_slots:
            become_plain(module)


def _shares(layer: nn.Module) -> bool:
    slots = [slot for module in layer.modules() for slot in slots_of(module).values()]
    return any(slot.site.options.share_experts for slot in slots)
