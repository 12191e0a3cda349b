"""Verbs on a model: adapt, unadapt, freeze, and its adapter as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import nn

from .adapted import Adapted, factors, slots_of
from .adapter import Adapter, LowRank
from .adapting import Plan, attach_plans, plan_targets
from .algebra import read_as
from .attach import all_or_nothing, attach_readers, detach, sites
from .checksum import checksum
from .engines import engine_of, refuse_unequal, shape_of
from .engines.masters import has_master, thin, whole
from .engines.megatron_experts import experts_of
from .engines.wrappers import beside, is_wrapped, team_of, unwrap
from .errors import Problems, StateError, TargetError
from .fingerprint import fingerprint
from .fusing import fuse as fuse_sites
from .fusing import unfuse
from .held import held_sites
from .kinds import kind_of, natural_layout, stored_transposed
from .layout import Layout
from .options import Init, Options, Position
from .targets import Inventory, Pattern, Patterns, Target, as_patterns, matches, select

Bias = Literal["none", "all", "lora_only"]


@dataclass(frozen=True)
class AdaptReport:
    """What :func:`adapt` did. ``str`` of it: ``64 of 64 targets, 8.4M of 1.2B parameters train (0.70 %)``."""

    sites: tuple[str, ...]
    excluded: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]
    trained: int
    total: int

    def __str__(self) -> str:
        share = 100.0 * self.trained / self.total if self.total else 0.0
        text = (
            f"{len(self.sites)} of {len(self.sites) + len(self.excluded)} targets, "
            f"{_short(self.trained)} of {_short(self.total)} parameters train ({share:.2f} %)"
        )
        return text + "".join(f"\n  one tied weight: {' = '.join(names)}" for names in self.tied)


def adapt(
    model: nn.Module,
    targets: Patterns,
    *,
    rank: int = 8,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    dropout_position: Position = "pre",
    init: Init | None = None,
    dtype: torch.dtype | None = None,
    layout: Layout | None = None,
    init_b: Init = "zero",
    normalize_experts: bool = False,
    share_experts: bool = False,
    all_to_all: bool = False,
    exclude: Patterns | None = None,
    bias: Bias = "none",
    train: Patterns | None = None,
    replace: bool = False,
    quiet: bool = False,
) -> AdaptReport:
    """Make the weights that ``targets`` name behave as ``W + scale · B · A``, in place, and freeze the rest.

    A begins random and B zero (``init``, ``init_b``), so nothing changes until training does. The options
    are those of :class:`graft.Options`; ``targets`` may map patterns to options of their own, ``{"q_proj":
    {"rank": 4}, "*.mlp.*": {}}``, where the first pattern that matches decides. A weight that several
    modules hold (tied) is adapted once, for all of them. ``bias`` and ``train`` are those of :func:`freeze`.

    Returns:
        What was adapted and how many parameters train; printed too, unless ``quiet``.
    Raises:
        TargetError: a pattern that matches nothing; a weight that cannot be adapted so; one that is
            adapted already (``replace=True`` puts new factors in the place of the old).
        StateError: the model is in an engine (DeepSpeed, DDP) already.
    """
    if is_wrapped(model) or any(has_master(p) for p in model.parameters()):
        raise StateError(
            "the model is in a training engine already, whose optimizer would not know the new factors; call "
            "graft.adapt before deepspeed.initialize and before DistributedDataParallel"
        )
    chosen: list[Target] = []
    excluded: list[str] = []
    plans: list[Plan] = []
    experts = experts_of(model)
    error: Exception | None = None
    try:
        options = Options(rank, alpha, rslora, dropout, dropout_position, init, dtype, layout, init_b,
                          normalize_experts, share_experts, all_to_all)  # fmt: skip
        chosen, excluded = select(model, targets, exclude)
        plans = plan_targets(chosen, options, replace, experts)
        _check_freeze(model, bias, train)
    except Exception as e:  # the others ask whether all adapters are alike, whatever it is
        error = e
    team = team_of(model)
    refuse_unequal(team, map(str, plans), error)
    with all_or_nothing(model):
        attach_plans(model, plans, experts, beside(team))
    freeze(model, bias=bias, train=train)
    tied = [[h.name for h in t.holders] for t in chosen if len(t.holders) > 1]
    report = report_of(model, [t.name for t in chosen], excluded, tied)
    if not quiet:
        print(report)
    return report


def unadapt(model: nn.Module, targets: Patterns | None = None, *, keep_fused: bool = False) -> None:
    """The plain classes again, with the same weight objects; the factors are dropped.

    Fused weights are unfused first, so the base is left bit for bit. With ``keep_fused=True`` every
    weight is left as W + ΔW instead (there is no way back). ``requires_grad`` stays as it is.

    Raises:
        StateError: nothing is adapted, or :func:`unfuse` refuses.
    """
    held = held_sites(model, targets)
    if keep_fused:
        fuse_sites(model, targets)
    else:
        unfuse(model, targets)
    model = unwrap(model)
    weights = {id(getattr(h.module, h.parameter)) for h in held}
    for module in list(model.modules()):
        for parameter in list(slots_of(module)):
            if id(getattr(module, parameter)) in weights:
                detach(cast(Adapted, module), parameter)
    attach_readers(model)


def freeze(model: nn.Module, *, bias: Bias = "none", train: Patterns | None = None) -> int:
    """Train the factors and what is named; freeze everything else. Returns the number that train.

    Args:
        bias: ``none``; ``all`` biases (parameters named ``bias`` or ``*_bias``); ``lora_only``, those of
            adapted modules.
        train: patterns of modules (with all inside them) or parameters that train in full.
    Raises:
        StateError: the model has no adapter.
        TargetError: a pattern of ``train`` that matches nothing.
    """
    model = unwrap(model)
    if not sites(model):
        raise StateError("the model has no adapter, so nothing would train; call graft.adapt(model, …) first")
    _check_freeze(model, bias, train)
    patterns = as_patterns(train)
    ids = {id(p) for p in factor_parameters(model).values()}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            wanted = bias == "all" or (bias == "lora_only" and bool(slots_of(module)))
            if (wanted and _is_bias(name)) or _named(patterns, f"{path}.{name}" if path else name):
                ids.add(id(p))
    for p in model.parameters():
        if p.is_floating_point() or p.is_complex():
            p.requires_grad_(id(p) in ids)
    return _count(p for p in model.parameters() if p.requires_grad)


def factor_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every factor once, under its full name: ``{"layers.0.q_proj.lora_A": …}``."""
    pairs = [factors(module, parameter) for module, parameter in sites(model).values()]
    ours = {id(t) for f in pairs for t in (f.a, f.b)}
    return {name: p for name, p in model.named_parameters() if id(p) in ours}


def state_dict(model: nn.Module, *, trained: bool = False) -> dict[str, torch.Tensor]:
    """The adapter's tensors only, under their names in ``model.state_dict()``; no copies.

    With ``trained=True`` also every other parameter that trains (biases, a classifier).
    ``model.load_state_dict(…, strict=False)`` takes it back. Where parameters are sharded tensors so are
    these. Under ZeRO-3, whose own tensors are empty, they are gathered, on every process: collective.
    """
    inner = unwrap(model)
    found = factor_parameters(inner) | (trained_parameters(inner) if trained else {})
    empty = [name for name, p in found.items() if engine_of(p).name == "zero3"]
    if empty:
        held_sites(model)
    values = dict(zip(empty, thin([found[name] for name in empty]), strict=True))
    return {name: values.get(name, p.detach()) for name, p in found.items()}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that trains and is not a factor, once."""
    ours = {id(p) for p in factor_parameters(model).values()}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours}


def adapter_of(model: nn.Module, *, trained: bool = True, masters: bool = False) -> Adapter:
    """The model's adapter as the neutral carrier, with live tensors; with full copies of spread ones.

    Collective where parameters are spread: every process gets the factors; the full tensors are
    complete on the process that writes, and left out elsewhere.

    Args:
        trained: also every other parameter that trains, as a full tensor that replaces the base's.
        masters: DeepSpeed's fp32 masters in the place of the parameters. Collective under every stage.
    Raises:
        StateError: the model has no adapter.
    """
    held_sites(model)
    team, model = team_of(model), unwrap(model)
    held = sites(model)
    pairs = [factors(module, parameter) for module, parameter in held.values()]
    values = iter(thin([t for f in pairs for t in (f.a, f.b)], masters=masters))
    found = {
        name: _carried(module, parameter, next(values).detach(), next(values).detach())
        for name, (module, parameter) in held.items()
    }
    others = trained_parameters(model) if trained else {}
    copies = team.name == "replicas"
    refuse_unequal(team, (f"{n} {checksum(p.detach()) if copies else ''}" for n, p in others.items()))
    full = {n: whole(p, masters=masters) for n, p in others.items()}
    replace = {n: t.detach() for n, t in full.items() if t is not None}
    return Adapter(found, replace=replace, format="graft", base=_fingerprints(model))


def _carried(module: nn.Module, parameter: str, a: torch.Tensor, b: torch.Tensor) -> LowRank:
    """One site with these values of its factors, read as its module's class stores the weight."""
    f, weight, kind = factors(module, parameter), getattr(module, parameter), kind_of(module, parameter)
    site = LowRank(a, b, f.scale, f.layout, kind=kind, shape=shape_of(weight))
    if stored_transposed(module, parameter) is None:
        return site
    return read_as(site, natural_layout(module, parameter, weight))


def _fingerprints(model: nn.Module) -> dict[str, str]:
    """Of the adapted weights that are here in full and unfused."""
    known: dict[str, str] = {}
    for name, (module, parameter) in sites(model).items():
        weight = getattr(module, parameter)
        fused = module.graft_slots[parameter].site.fusion is not None
        if engine_of(weight).name == "plain" and not fused and not weight.is_meta:
            known[name] = fingerprint(weight)
    return known


def _check_freeze(model: nn.Module, bias: str, train: Patterns | None) -> None:
    problems = Problems(TargetError, "cannot choose what trains:")
    if bias not in get_args(Bias):
        problems.add(f"bias must be one of {get_args(Bias)}, got {bias!r}")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in as_patterns(train):
        if not any(_named([pattern], name) for name in names):
            problems.add("train: " + Inventory(model).complaint(pattern))
    problems.raise_if_any()


def _named(patterns: Iterable[Pattern], name: str) -> bool:
    """Whether a pattern names this parameter or a module that it is inside of."""
    parts = name.split(".")
    paths = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(matches(pattern, path) for pattern in patterns for path in paths)


def _is_bias(name: str) -> bool:
    return name == "bias" or name.endswith("_bias") or name.startswith("bias_")


def report_of(
    model: nn.Module,
    names: Iterable[str],
    excluded: Iterable[str] = (),
    tied: Iterable[Iterable[str]] = (),
) -> AdaptReport:
    """The report on these sites, with the model's parameters counted now."""
    parameters = list(model.parameters())
    return AdaptReport(
        sites=tuple(names),
        excluded=tuple(excluded),
        tied=tuple(tuple(together) for together in tied),
        trained=_count(p for p in parameters if p.requires_grad),
        total=_count(parameters),
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    lazy = nn.parameter.UninitializedParameter
    return sum(math.prod(shape_of(p)) for p in parameters if not isinstance(p, lazy))


def _short(count: int) -> str:
    """``8.4M``, ``1.2B``; numbers below a thousand in full."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size * 0.99995:
            return f"{count / size:.1f}{unit}"
    return str(count)
