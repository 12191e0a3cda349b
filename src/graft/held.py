"""The sites of a model that a verb works on, each with its ΔW: from factors here, or gathered in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from .adapted import NO_ADAPTER, Adapted, Site, factors, names_of, slots_of
from .attach import sites
from .checksum import checksum
from .delta import Delta
from .engines import Aligned, Engine, Part, cut, engine_of, here, refuse_unequal, shape_of
from .engines.wrappers import beside, team_of, unwrap
from .errors import Problems, StateError, TargetError
from .factors import Factors
from .targets import Inventory, Patterns, as_patterns


@dataclass(frozen=True)
class Held:
    """One site with the module and parameter that hold it.

    Args:
        whole: the engine, if every process of a team has this weight in full.
    """

    name: str
    module: Adapted
    parameter: str
    whole: Engine

    @property
    def site(self) -> Site:
        return self.module.graft_slots[self.parameter].site

    @property
    def parameter_tensor(self) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self.module, self.parameter))

    @property
    def weight(self) -> torch.Tensor:
        return self.parameter_tensor.detach()

    @property
    def engine(self) -> Engine:
        engine = engine_of(self.parameter_tensor)
        return self.whole if engine.name == "plain" else engine

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's global shape."""
        return self.engine.shape(self.parameter_tensor)


def held_sites(model: nn.Module, targets: Patterns | None = None) -> list[Held]:
    """The sites of a model, or those that ``targets`` name. Collective.

    Raises:
        StateError: the model has no site; a tied weight that came apart; processes that differ.
        TargetError: a pattern that matches none.
    """
    team, model = team_of(model), unwrap(model)
    held: list[Held] = []
    chosen: list[Held] = []
    error: Exception | None = None
    try:
        held = _all_held(model, beside(team))
        chosen = held if targets is None else _named(model, held, targets)
    except Exception as e:  # the others ask whether all adapters are alike, whatever it is
        error = e
    named = {id(h) for h in chosen}
    refuse_unequal(team, (f"{_form(h)} {id(h) in named}" for h in held), error)
    return chosen


def _all_held(model: nn.Module, whole: Engine) -> list[Held]:
    held = [Held(name, module, parameter, whole) for name, (module, parameter) in sites(model).items()]
    if not held:
        raise StateError(NO_ADAPTER)
    first = {id(h.site): h for h in held}
    problems = Problems(StateError, "one adapter of a tied weight has come apart:")
    for path, module in model.named_modules():
        for parameter, slot in slots_of(module).items():
            h = first[id(slot.site)]
            names, own = (parameter, *slot.names), (h.parameter, *names_of(h.module, h.parameter))
            if any(getattr(module, x) is not getattr(h.module, y) for x, y in zip(names, own, strict=True)):
                problems.add(f"{path}.{parameter} and {h.name} were one weight when they were adapted")
    problems.raise_if_any(
        "parallelize_module and load_state_dict(assign=True) make two of them. Adapt the model after that, "
        "or let the second module have the first one's weight, lora_A and lora_B again"
    )
    return held


def _named(model: nn.Module, held: Sequence[Held], targets: Patterns) -> list[Held]:
    inventory = Inventory(model)
    problems = Problems(TargetError, "cannot choose the sites:")
    wanted: set[int] = set()
    ours = {id(getattr(h.module, h.parameter)) for h in held}
    for pattern in as_patterns(targets):
        found = {id(inventory.weights[n]) for n in inventory.match(pattern)} & ours
        if not found:
            problems.add(
                f"{pattern!r} names no adapted weight; adapted are {', '.join(h.name for h in held[:4])}…"
            )
        wanted |= found
    problems.raise_if_any()
    return [h for h in held if id(getattr(h.module, h.parameter)) in wanted]


def _form(h: Held) -> str:
    """The site in words; with its numbers, where they must be the same on every process."""
    f, site = factors(h.module, h.parameter), h.site
    fused = site.fusion is not None
    form = f"{h.name} {h.shape} {shape_of(f.a)} {shape_of(f.b)} {f.scale} {f.layout} {fused} {site.disabled}"
    copies = h.engine.name == "replicas"
    return f"{form} {checksum(f.a.detach())} {checksum(f.b.detach())}" if copies else form


#: factors gathered at once, in elements: bounds memory, and makes few messages of many small tensors
_BATCH = 1 << 24


def deltas(held: Sequence[Held]) -> Iterator[tuple[Held, Delta]]:
    """Every site's whole ΔW, from factors gathered in batches. Collective where the factors are spread."""
    batch: list[Held] = []
    size = 0
    for h in held:
        f = factors(h.module, h.parameter)
        batch.append(h)
        size += sum(math.prod(shape_of(t)) for t in (f.a, f.b))
        if size >= _BATCH:
            yield from _gathered(batch)
            batch, size = [], 0
    yield from _gathered(batch)


def _gathered(batch: list[Held]) -> Iterator[tuple[Held, Delta]]:
    by_engine: dict[str, list[tuple[Held, Factors]]] = {}
    for h in batch:
        f = factors(h.module, h.parameter)
        if _own(h) is None:
            by_engine.setdefault(engine_of(f.a).name, []).append((h, f))
    whole: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for members in by_engine.values():
        thin = engine_of(members[0][1].a).gather([t for _, f in members for t in (f.a, f.b)])
        for n, (h, _) in enumerate(members):
            whole[id(h)] = thin[2 * n], thin[2 * n + 1]
    for h in batch:
        f, own = factors(h.module, h.parameter), _own(h)
        if own is not None:
            yield h, Delta.of(here(f.a), here(f.b), f.scale, f.layout, own.tensor.shape)
            continue
        a, b = whole.pop(id(h))
        yield h, Delta.of(a, b, f.scale, f.layout, h.shape)


def _own(h: Held) -> Part | None:
    """The shard here, where the factors here are all that its ΔW needs."""
    engine, f = h.engine, factors(h.module, h.parameter)
    return engine.own(h.parameter_tensor, f.a, f.b, f.layout) if isinstance(engine, Aligned) else None


def pieces(h: Held, delta: Delta) -> list[tuple[Part, Delta, int]]:
    """The parts of one weight in this process, each with its own ΔW."""
    layout, own, parts = h.site.layout, _own(h), h.engine.parts(h.parameter_tensor)
    if own is None:
        return [(p, *p.localise(delta, layout, h.shape)) for p in parts]
    shape = own.tensor.shape
    return [(p, delta if p.within is None else cut(delta, layout, shape, p.within), 0) for p in parts]
