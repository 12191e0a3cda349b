"""From targets and options to sites: what each weight takes, and new factors on all modules that hold it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from torch import nn

from .adapted import Site, slots_of
from .attach import attach, release
from .engines import Engine, engine_of, shape_of
from .engines.megatron import share
from .engines.megatron_modules import copied_embedding
from .engines.plain import ENGINE as PLAIN
from .errors import Problems, TargetError
from .kinds import kind_of, natural_layout, read_always
from .layout import Layout
from .megatron_options import Experts, expert_of, own_options, refuse_idle, sharing
from .options import Options, new_factors
from .targets import Target


@dataclass(frozen=True)
class Plan:
    """One weight to adapt, with the options and the layout that it takes."""

    target: Target
    options: Options
    layout: Layout

    def __str__(self) -> str:
        return f"{self.target.name} {self.options} {self.layout}"


def attach_plans(model: nn.Module, plans: Iterable[Plan], experts: Experts, whole: Engine = PLAIN) -> None:
    """New factors for every plan, shared where its options say so; ``whole`` as for :func:`place`."""
    pairs: dict[Hashable, tuple[nn.Parameter, nn.Parameter]] = {}
    for plan in plans:
        target, site = plan.target, Site(plan.options, plan.layout, plan.options.scale)
        for h in target.holders:
            release(h.module, h.parameter)
        key, expert = sharing(target, plan.options, experts), expert_of(target, experts)
        if key is None:
            attach_target(model, target, site, whole=whole)
        elif key in pairs:
            attach_pair(model, target, site, pairs[key])
        else:
            assert expert is not None
            pairs[key] = place(target, site, whole=whole)
            share(pairs[key], expert.group)
            attach_pair(model, target, site, pairs[key])


def attach_target(
    model: nn.Module,
    target: Target,
    site: Site,
    pair: tuple[nn.Parameter, nn.Parameter] | None = None,
    names: tuple[str, str] | None = None,
    whole: Engine = PLAIN,
) -> None:
    """Give every module that holds a weight the same site and the same factors.

    Args:
        pair, whole: as for :func:`place`.
        names: what the modules call them; see :func:`graft.attach.attach`.
    """
    attach_pair(model, target, site, place(target, site, pair, whole), names)


def place(
    target: Target,
    site: Site,
    pair: tuple[nn.Parameter, nn.Parameter] | None = None,
    whole: Engine = PLAIN,
) -> tuple[nn.Parameter, nn.Parameter]:
    """Whole factors (new ones without ``pair``) as the weight's engine keeps them. Collective.

    Args:
        whole: the engine of weights that are not spread (:func:`graft.engines.wrappers.beside`).
    """
    first = target.holders[0]
    embedding = kind_of(first.module, first.parameter) == "embedding"
    made = pair or new_factors(target.weight, site.layout, site.options, embedding=embedding)
    engine = engine_of(target.weight)
    placed = (whole if engine.name == "plain" else engine).place(target.weight, site.layout, *made)
    a, b = (f if isinstance(f, nn.Parameter) else nn.Parameter(f) for f in placed)
    return a, b


def attach_pair(
    model: nn.Module,
    target: Target,
    site: Site,
    pair: tuple[nn.Parameter, nn.Parameter],
    names: tuple[str, str] | None = None,
) -> None:
    """Give every module that holds a weight the same site and these very factors."""
    read = {id(child) for m in model.modules() for child in read_always(m)}
    _refuse_copied(model, target)
    for h in target.holders:
        attach(h.module, h.parameter, site, *pair, through_parent=id(h.module) in read, names=names)


def _refuse_copied(model: nn.Module, target: Target) -> None:
    copied = {id(child) for m in model.modules() for child in copied_embedding(m)}
    if any(id(h.module) in copied for h in target.holders):
        raise TargetError(
            f"{target.name} is shared by the first and the last pipeline stage, each with a copy of its own; "
            "build the model with share_embeddings_and_output_weights=False to adapt it"
        )


def plan_targets(chosen: Iterable[Target], options: Options, replace: bool, experts: Experts) -> list[Plan]:
    problems = Problems(TargetError, "cannot adapt:")
    plans: list[Plan] = []
    taken: list[tuple[Target, Options, Options]] = []
    for target in chosen:
        first = target.holders[0]
        slot = slots_of(first.module).get(first.parameter)
        if slot is not None and slot.site.fusion is not None:
            problems.add(f"{target.name} is fused; call graft.unfuse(model) first")
        elif slot is not None and not replace:
            problems.add(f"{target.name} is adapted already; pass replace=True or call graft.unadapt first")
        try:
            asked = options.changed(**target.overrides)
            own = own_options(target, asked, experts)
            layout = own.layout or natural_layout(first.module, first.parameter, target.weight)
            layout.factor_shapes(shape_of(target.weight), own.rank)
            plans.append(Plan(target, own, layout))
            taken.append((target, asked, own))
        except ValueError as error:
            problems.add(f"{target.name}: {error}")
    refuse_idle(taken, problems)
    _refuse_other_forms(plans, experts, problems)
    problems.raise_if_any()
    return plans


def _refuse_other_forms(plans: Iterable[Plan], experts: Experts, problems: Problems) -> None:
    """Experts that are to share factors and could not."""
    first: dict[Hashable, Plan] = {}
    for plan in plans:
        key = sharing(plan.target, plan.options, experts)
        if key is None:
            continue
        other = first.setdefault(key, plan)
        forms = [(p.options, p.layout, shape_of(p.target.weight)) for p in (plan, other)]
        if forms[0] != forms[1]:
            problems.add(
                f"{plan.target.name} and {other.target.name} are to share factors, with other options or "
                "shapes; give the experts of one layer the same options"
            )
