"""Load an adapter file of any known format into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapted import Site, factors, names_of, slots_of
from .adapter import Adapter, LowRank
from .adapting import attach_target
from .algebra import read_as
from .attach import all_or_nothing, release, sites
from .checksum import checksum
from .engines import Engine, engine_of, refuse_unequal, shape_of
from .engines.masters import assign, has_master
from .engines.megatron_experts import refuse_scattered
from .engines.wrappers import beside, is_alone, is_wrapped, team_of, together, unwrap
from .errors import BaseMismatchError, FormatError, GraftError, Problems, StateError
from .fingerprint import check
from .kinds import stored_transposed
from .layout import Layout
from .model import AdaptReport, factor_parameters, freeze, report_of
from .options import Options, factor_dtype
from .saving import config_of
from .targets import Inventory, Target


def load(
    model: nn.Module,
    path: str | Path,
    *,
    format: str | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    replace: bool = False,
    other_base: bool = False,
    quiet: bool = False,
    component: str | None = None,
) -> AdaptReport:
    """Load an adapter file of any known format into a model, which is adapted for it if it is not yet.

    A model without adapter gets the file's sites, ranks and scales and is frozen but for them. An adapted
    model takes the values into its own factors, which must have the file's sites, ranks and layouts
    (``replace=True`` puts the file's adapter in the place of any other). Full tensors of the file
    (``modules_to_save``, biases) and trained rows are copied into the model's parameters. Given an engine or
    a model that is spread over processes, every process calls this, and if one fails, all raise.

    Args:
        format, alpha: as for ``graft fuse``: the format's name, and alpha where files do not carry it.
        dropout: of the sites that are made here; files of most formats do not decide it.
        other_base: load it although its fingerprints name another base.
        component: only the file's part for this model of a diffusers pipeline: ``unet`` for ``pipe.unet``.
    Raises:
        FormatError: not an adapter, or one that cannot be run in memory (DoRA, lora_bias).
        BaseMismatchError: an adapter for another base or other sites; nothing was changed.
        StateError: a model in a training engine, whose optimizer would not know new factors; Megatron's
            pipeline stages, or adapted experts under its expert parallelism; processes that read
            different files.
    """
    team, wrapped, model = team_of(model), is_wrapped(model), unwrap(model)
    with together(team):
        fresh = not sites(model)
        bound: Adapter | None = None
        error: Exception | None = None
        inventory = Inventory(model)
        try:
            bound = _read(model, inventory, Path(path), format, alpha, component, other_base)
            _refuse_late(model, bound, fresh or replace, wrapped)
            if not (fresh or replace):
                _check_same(model, bound)
        except Exception as e:  # the others ask whether all read the same, whatever it is
            error = e
        refuse_unequal(team, () if bound is None or is_alone(team) else _in_words(bound), error)
        assert bound is not None
        if fresh or replace:
            _attach(model, inventory, bound, dropout, beside(team))
        else:
            _copy_factors(model, bound)
        _copy_full(model, bound)
    if fresh:
        freeze(model)
        for parameter in (p for n, p in model.named_parameters() if n in bound.replace):
            parameter.requires_grad_(True)
    report = report_of(model, list(sites(model)))
    if not quiet:
        print("\n".join([str(report), *(f"  {note}" for note in bound.notes)]))
    return report


def _read(
    model: nn.Module,
    inventory: Inventory,
    path: Path,
    format: str | None,
    alpha: float | None,
    component: str | None,
    other_base: bool,
) -> Adapter:
    """The file's adapter, fitted to the model and found to belong to it."""
    from .bind import bind
    from .formats import read

    about = config_of(model)
    adapter = read(path, format=format, alpha=alpha, model=about, component=component)
    among = any("local_experts" in name.split(".") for name in adapter.sites)
    refuse_scattered(model, "graft.load", experts=among)
    bound = bind(
        adapter,
        {n: shape_of(t) for n, t in _stored(model).items()},
        config=about,
        transposed=_teller(inventory),
    )
    _refuse_unrunnable(bound)
    if not other_base:
        check(bound.base, _present(model))
    _check_full(model, bound)
    return bound


def _in_words(adapter: Adapter) -> Iterator[str]:
    """The adapter's form and numbers, to be compared with what other processes read."""
    for name, site in adapter.sites.items():
        yield f"{name} {site.scale} {site.layout} {site.A.shape} {checksum(site.A)} {checksum(site.B)}"
    for name, tensor in adapter.replace.items():
        yield f"{name} {checksum(tensor)}"
    for name, (indices, tensor) in adapter.rows.items():
        yield f"{name} {list(indices)} {checksum(tensor)}"


def _refuse_late(model: nn.Module, adapter: Adapter, makes_factors: bool, wrapped: bool) -> None:
    """What an engine's optimizer, or a spread parameter, would not take.

    Raises:
        StateError: new factors in an engine, or rows of a spread parameter.
    """
    if makes_factors and (wrapped or any(has_master(p) for p in model.parameters())):
        raise StateError(
            "the model is in a training engine already, whose optimizer would not know new factors; call "
            "graft.load before deepspeed.initialize and before DistributedDataParallel"
        )
    stored = _stored(model)
    for name in adapter.rows:
        if engine_of(stored[name]).name != "plain":
            raise StateError(
                f"the adapter replaces rows of {name}, which is spread over processes; load it before that"
            )


def _present(model: nn.Module) -> Callable[[str], torch.Tensor | None]:
    """A base weight that is here in full and unfused; else None."""
    stored = _stored(model)
    fused = {n for n, (m, p) in sites(model).items() if slots_of(m)[p].site.fusion is not None}

    def weight(name: str) -> torch.Tensor | None:
        found = stored.get(name)
        if found is None or name in fused or found.is_meta or engine_of(found).name != "plain":
            return None
        return found

    return weight


def _stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the base once: parameters without the factors, and buffers."""
    factor_ids = {id(p) for p in factor_parameters(model).values()}
    own = {n: p for n, p in model.named_parameters() if id(p) not in factor_ids}
    return {**own, **dict(model.named_buffers())}


def _teller(inventory: Inventory) -> Any:
    """Tells :func:`graft.bind.bind` how the module's class stores a weight, where shapes do not."""

    def transposed(name: str) -> bool | None:
        weight = inventory.weights.get(name)
        if weight is None:
            return None
        first = inventory.holders[id(weight)][0]
        return stored_transposed(first.module, first.parameter)

    return transposed


def _refuse_unrunnable(adapter: Adapter) -> None:
    problems = Problems(FormatError, "this adapter cannot be run as factors in a model:")
    for name, site in adapter.sites.items():
        if site.magnitude is not None:
            problems.add(f"{name} has a DoRA magnitude")
    for name in adapter.shift:
        problems.add(f"{name} is shifted by lora_bias")
    problems.raise_if_any("Fuse it into the base's files instead: graft fuse BASE ADAPTER -o OUT")


def _check_full(model: nn.Module, adapter: Adapter) -> None:
    problems = Problems(BaseMismatchError, "the adapter's full tensors do not fit the model:")
    stored = _stored(model)
    for name, tensor in adapter.replace.items():
        have = shape_of(stored[name])
        if have != tuple(tensor.shape):
            problems.add(f"{name}: the model has {list(have)}, the adapter {list(tensor.shape)}")
    problems.raise_if_any("Resize the model first (model.resize_token_embeddings(n) for a vocabulary)")


def _attach(model: nn.Module, inventory: Inventory, adapter: Adapter, dropout: float, whole: Engine) -> None:
    """The file's sites in the place of whatever the model had; as it was if one cannot be made."""
    from .fusing import unfuse

    if sites(model):
        unfuse(model)
    with all_or_nothing(model):
        for module in list(model.modules()):
            for parameter in list(slots_of(module)):
                release(module, parameter)
        for name, site in adapter.sites.items():
            target = Target(tuple(inventory.holders[id(inventory.weights[name])]))
            alpha = site.scale * site.rank
            options = Options(site.rank, alpha, dropout=dropout, layout=site.layout)
            try:
                pair = _pair(site, target.weight)
                attach_target(model, target, Site(options, _layout(site), site.scale), pair, whole=whole)
            except GraftError as error:
                raise type(error)(f"{name}: {error}") from None


def _layout(site: LowRank) -> Layout:
    assert site.layout is not None
    return site.layout


def _pair(site: LowRank, weight: torch.Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """The file's factors as parameters of a dtype that holds them exactly."""
    made: list[nn.Parameter] = []
    for factor in (site.A, site.B):
        dtype = torch.promote_types(factor.dtype, factor_dtype(weight))
        made.append(nn.Parameter(factor.detach().to(weight.device, dtype, copy=True).contiguous()))
    return made[0], made[1]


def _check_same(model: nn.Module, adapter: Adapter) -> None:
    """The adapter has the sites, ranks and layouts of the model's own."""
    problems = Problems(BaseMismatchError, "the file's adapter is not of the model's adapter's form:")
    ours = sites(model)
    values: dict[int, tuple[str, LowRank]] = {}
    for name in ours.keys() - adapter.sites.keys():
        problems.add(f"{name} is adapted in the model and not in the file")
    for name, theirs in adapter.sites.items():
        if name not in ours:
            problems.add(f"{name} is adapted in the file and not in the model")
            continue
        module, parameter = ours[name]
        f, site = factors(module, parameter), module.graft_slots[parameter].site
        theirs = read_as(theirs, f.layout)
        if site.fusion is not None:
            problems.add(f"{name} is fused; call graft.unfuse(model) first")
        elif not _same_layout(f.layout, _layout(theirs)):
            problems.add(f"{name}: layout {f.layout.pattern!r} here, {_layout(theirs).pattern!r} in the file")
        elif shape_of(f.b) != tuple(theirs.B.shape):
            problems.add(f"{name}: rank {shape_of(f.b)[1]} in the model, {theirs.rank} in the file")
        elif not has_master(f.a) and not (_holds(f.a, theirs.A) and _holds(f.b, theirs.B)):
            problems.add(f"{name}: factors of {f.a.dtype} cannot hold the file's {theirs.A.dtype} values")
        other, same = values.setdefault(id(f.a), (name, theirs))
        if not (torch.equal(same.A, theirs.A) and torch.equal(same.B, theirs.B)):
            problems.add(f"{name} has the factors of {other} in the model, and others in the file")
    problems.raise_if_any("Pass replace=True to put the file's adapter in the place of the model's")


def _same_layout(x: Layout, y: Layout) -> bool:
    """One group in rows is a plain matrix, and naming every group is naming none."""
    return (_plain(x), x.enabled) == (_plain(y), y.enabled)


def _plain(layout: Layout) -> Layout:
    one = {"(g o) i": "o i", "i (g o)": "i o", "(g i) o": "i o"}
    pattern = one.get(layout.pattern, layout.pattern) if layout.groups == 1 else layout.pattern
    return changed(layout, only=None, pattern=pattern)


def _holds(factor: torch.Tensor, value: torch.Tensor) -> bool:
    return torch.equal(value.to(factor.dtype).to(value.dtype), value)


@torch.no_grad()
def _copy_factors(model: nn.Module, adapter: Adapter) -> None:
    for name, (module, parameter) in sites(model).items():
        site = module.graft_slots[parameter].site
        theirs = read_as(adapter.sites[name], site.layout)
        for factor, value in zip(names_of(module, parameter), (theirs.A, theirs.B), strict=True):
            assign(getattr(module, factor), value)
        site.scale = theirs.scale


@torch.no_grad()
def _copy_full(model: nn.Module, adapter: Adapter) -> None:
    stored = _stored(model)
    for name, tensor in adapter.replace.items():
        assign(stored[name], tensor)
    for name, (indices, tensor) in adapter.rows.items():
        stored[name][list(indices)] = tensor.to(stored[name].device, stored[name].dtype)
