"""Patterns → the stored weights to adapt; whatever matches nothing is an error with the nearest names.

A pattern is one of

* a name, ``q_proj`` or ``self_attn.q_proj``: every dotted path that ends with it;
* a glob, ``*.layers.1.*.q_proj``: the whole dotted path; ``*`` is any text, ``?`` one character, dots
  are literal dots;
* a regular expression, as a compiled pattern or with ``re:`` in front: the whole dotted path;
* ``all-linear``: every ``nn.Linear`` and GPT-2 ``Conv1D`` but the output head.

Patterns are held against the paths of modules that have a weight to adapt and against the full names of
all parameters with two axes or more (``*.experts.gate_up_proj``, ``attn.in_proj_weight``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, cast

from torch import nn

from .adapted import slots_of
from .engines import notice, shape_of
from .engines.megatron_experts import packs_experts
from .engines.megatron_modules import role_of
from .errors import Problems, TargetError
from .kinds import adaptable, is_linear

Pattern: TypeAlias = "str | re.Pattern[str]"
Patterns: TypeAlias = "Pattern | Iterable[Pattern] | Mapping[Any, Any]"

ALL_LINEAR = "all-linear"
_HEADS = ("score", "classifier")
_MEGATRON_HEAD = "output_layer"
_PACKED = (
    "holds the weights of several experts for one grouped multiplication, which an adapter could not be part "
    "of; build the model with a SequentialMLP (moe_grouped_gemm=False), or leave it out with exclude="
)


@dataclass(frozen=True)
class Holder:
    """One module that holds a weight, under one full name."""

    name: str
    module: nn.Module
    parameter: str


@dataclass(frozen=True)
class Target:
    """One stored weight to adapt, every module that holds it, and the options that its pattern carries."""

    holders: tuple[Holder, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def name(self) -> str:
        return self.holders[0].name

    @property
    def weight(self) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self.holders[0].module, self.holders[0].parameter))


class Inventory:
    """The names of a model that patterns can match, and the weights behind them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, list[str]] = {}  # path → full names of the weights that it stands for
        self.others: dict[str, nn.Module] = {}  # paths of modules without a weight to adapt
        self.weights: dict[str, nn.Parameter] = {}
        self.holders: dict[int, list[Holder]] = {}
        self._factors = {
            id(getattr(module, factor))
            for module in model.modules()
            for slot in slots_of(module).values()
            for factor in slot.names
        }
        for path, module in model.named_modules(remove_duplicate=False):
            own = adaptable(module)
            if own:
                self.modules[path] = [_join(path, name) for name in own]
            else:
                self.others[path] = module
            self._add_weights(path, module)

    def _add_weights(self, path: str, module: nn.Module) -> None:
        for parameter, value in module.named_parameters(recurse=False, remove_duplicate=False):
            lazy = isinstance(value, nn.parameter.UninitializedParameter)
            if id(value) in self._factors:
                continue
            name = _join(path, parameter)
            notice(name, module, parameter)
            if not (lazy or len(shape_of(value)) >= 2):
                continue
            self.weights[name] = value
            held = self.holders.setdefault(id(value), [])
            if not any(h.module is module and h.parameter == parameter for h in held):
                held.append(Holder(name, module, parameter))

    def match(self, pattern: Pattern) -> list[str]:
        """Full names of the weights that a pattern stands for, in the model's order."""
        if pattern == ALL_LINEAR:
            return [n for path in _linears(self.model) for n in self.modules[path]]
        found = {w: None for path, own in self.modules.items() if matches(pattern, path) for w in own}
        found |= {name: None for name in self.weights if matches(pattern, name)}
        return [name for name in self.weights if name in found]

    def packed(self, pattern: Pattern) -> list[str]:
        """Paths of the modules that a pattern stands for and that no adapter can be put on."""
        if pattern == ALL_LINEAR:
            return []
        return [p for p, module in self.others.items() if packs_experts(module) and matches(pattern, p)]

    def complaint(self, pattern: Pattern) -> str:
        """Why a pattern matches nothing, and what may have been meant."""
        shown = f"re:{pattern.pattern}" if isinstance(pattern, re.Pattern) else pattern
        for path, module in self.others.items():
            if path and matches(pattern, path):
                inside = [p for p in self.modules if p.startswith(path + ".")]
                mend = f"; inside it are {', '.join(inside[:4])}" if inside else ""
                return f"{shown!r} is a {type(module).__name__} without a weight to adapt{mend}"
        near = self.nearest(shown)
        return f"{shown!r} matches nothing" + (f"; nearest: {', '.join(near)}" if near else "")

    def nearest(self, text: str) -> list[str]:
        names = [*self.modules, *self.weights]
        leaves = list(dict.fromkeys(".".join(n.split(".")[-1:]) for n in names if n))
        bare = re.sub(r"^re:|[*?\[\]\\^$()]", "", text)
        found = difflib.get_close_matches(bare.split(".")[-1], leaves, 4, 0.4)
        if "." in bare:
            found = difflib.get_close_matches(bare, [n for n in names if n], 3, 0.5) + found
        return list(dict.fromkeys(found)) or leaves[:6]


def matches(pattern: Pattern, path: str) -> bool:
    """Whether a pattern (not ``all-linear``) stands for this dotted path."""
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    if any(c in pattern for c in "*?["):
        return fnmatchcase(path, pattern)
    return path == pattern or path.endswith("." + pattern)


def as_patterns(patterns: Patterns | None) -> list[Pattern]:
    """One pattern or many as a list.

    Raises:
        TargetError: something that is neither text nor a compiled expression, or a broken expression.
    """
    if patterns is None:
        return []
    listed: list[Any] = [patterns] if isinstance(patterns, (str, re.Pattern)) else list(patterns)
    for p in listed:
        if not isinstance(p, (str, re.Pattern)) or p == "":
            raise TargetError(f"a target is a name, a glob or a regular expression, got {p!r}")
        if isinstance(p, str) and p.startswith("re:"):
            try:
                re.compile(p[3:])
            except re.error as error:
                raise TargetError(f"{p!r} is not a regular expression: {error}") from None
    return cast("list[Pattern]", listed)


def select(
    model: nn.Module, targets: Patterns, exclude: Patterns | None = None
) -> tuple[list[Target], list[str]]:
    """The weights that ``targets`` name, without those that ``exclude`` names, each once.

    ``targets`` may map patterns to the options that they override; the first pattern that matches a
    weight decides. Returns the targets and the names that were excluded.

    Raises:
        TargetError: a pattern that matches nothing, or a weight that cannot be adapted.
    """
    inventory = Inventory(model)
    problems = Problems(TargetError, "cannot choose the weights to adapt:")
    chosen: dict[str, Mapping[str, Any]] = {}
    options = cast("Mapping[Any, Any]", targets) if isinstance(targets, Mapping) else {}
    patterns = as_patterns(targets)
    if not patterns:
        problems.add("no targets are given; name some, or use targets='all-linear'")
    without = as_patterns(exclude)
    for pattern in patterns:
        names = inventory.match(pattern)
        packed = [p for p in inventory.packed(pattern) if not any(matches(e, p) for e in without)]
        for path in packed:
            problems.add(f"{path} is a {type(inventory.others[path]).__name__}, which {_PACKED}")
        if not names and not packed:
            problems.add(inventory.complaint(pattern))
        for name in names:
            chosen.setdefault(name, options.get(pattern) or {})
    barred: dict[str, None] = {}
    for pattern in without:
        names = _excluded(inventory, pattern)
        if not names:
            problems.add("exclude: " + inventory.complaint(pattern))
        barred |= dict.fromkeys(names)
    kept = {n: o for n, o in chosen.items() if n not in barred}
    dropped = [n for n in chosen if n in barred]
    found = _once(inventory, kept, barred, problems)
    if chosen and not kept:
        problems.add(f"exclude leaves none of the {len(chosen)} targets")
    problems.raise_if_any()
    return found, dropped


def _excluded(inventory: Inventory, pattern: Pattern) -> list[str]:
    """As a target, and a whole subtree where the pattern names a container."""
    names = inventory.match(pattern)
    if pattern == ALL_LINEAR:
        return names
    for path in inventory.others:
        if path and matches(pattern, path):
            names += [n for n in inventory.weights if n.startswith(path + ".") and n not in names]
    return names


def _once(
    inventory: Inventory, kept: Mapping[str, Mapping[str, Any]], excluded: Container[str], problems: Problems
) -> list[Target]:
    """One target for each weight, however many modules hold it."""
    found: dict[int, Target] = {}
    for name, overrides in kept.items():
        weight = inventory.weights.get(name)
        if weight is None:
            problems.add(f"{name} is not a parameter (parametrised or weight-normed); remove that first")
        elif isinstance(weight, nn.parameter.UninitializedParameter):
            problems.add(f"{name} has no shape yet (a lazy module); run a forward first")
        elif not weight.is_floating_point():
            problems.add(f"{name} is stored as {weight.dtype} (quantised); dequantise it first")
        elif id(weight) not in found:
            holders = inventory.holders[id(weight)]
            barred = [h.name for h in holders if h.name in excluded]
            if packs_experts(holders[0].module):
                problems.add(f"{name} {_PACKED}")
            if barred:
                problems.add(f"{name} and {barred[0]}, which is excluded, are one tied weight; untie them")
            found[id(weight)] = Target(tuple(holders), overrides)
    return list(found.values())


def _linears(model: nn.Module) -> list[str]:
    """Paths of all linears but the output head (as PEFT's ``all-linear``)."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    heads = {id(head)} if head is not None else set[int]()
    if not heads and hasattr(model, "config"):
        heads = {id(getattr(model, name)) for name in _HEADS if hasattr(model, name)}
    paths: list[str] = []
    for path, module in model.named_modules():
        if role_of(module) is not None and path.split(".")[-1] == _MEGATRON_HEAD:
            continue
        if is_linear(module) and id(module) not in heads:
            paths.append(path)
    return paths


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
