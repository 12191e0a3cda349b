"""What of an adapter Megatron's modules cannot hold."""

from __future__ import annotations

from collections.abc import Mapping

from ...adapter import Adapter, LowRank
from ..blocks import joined
from ..holding import Holds
from ..model_facts import ModelFacts, expert_count, model_facts, model_type
from ..protocol import Loss, Target
from . import fused
from .names import Module, Modules, modules_of, place_of

_HOLDS = Holds("Megatron", dora=True)
Groups = dict[Module, dict[str, LowRank]]


def groups_of(sites: Mapping[str, LowRank], table: Modules) -> Groups:
    """Sites by Megatron's modules and their parts; of sites that have a place."""
    groups: Groups = {}
    for name, site in sites.items():
        place = place_of(name, table)
        if place is not None:
            groups.setdefault(place[0], {})[place[1]] = joined(site)
    return groups


def losses(adapter: Adapter, target: Target) -> list[Loss]:
    """Everything but linear weights of a decoder's layers and its head.

    Raises:
        FormatError: no base, whose number of heads decides the order of rows.
    """
    facts = model_facts(target.model, "Megatron")
    table = modules_of(model_type(target.model))
    found = _HOLDS.losses(adapter)
    lost = {loss.name for loss in found if loss.part == "site"}
    kept = {name: site for name, site in adapter.sites.items() if name not in lost}
    groups = groups_of(kept, table)
    experts = _experts(groups, target)
    for name, site in kept.items():
        why = _refuses(name, joined(site), table, facts, experts)
        if why:
            found.append(Loss("site", name, why))
    return found + _magnitudes(kept, groups, table)


def _refuses(
    name: str, site: LowRank, table: Modules, facts: ModelFacts, experts: Mapping[Module, int]
) -> str:
    place = place_of(name, table)
    if place is None:
        return "Megatron has no module for it that is known here"
    module, part = place
    assert site.layout is not None
    if site.layout.pattern != "o i":
        return "Megatron stores no weight [in, out]"
    if module.layer is not None and module.layer >= facts.layers:
        return f"the base has {facts.layers} layers"
    if part in fused.QKV:
        try:
            fused.sizes(fused.QKV, {part: site.B.shape[0]}, facts)
        except ValueError as error:
            return str(error)
    missing = experts.get(module._replace(expert=None), 0)
    return f"all experts are one tensor, and {missing} of them have no update" if missing else ""


def _experts(groups: Groups, target: Target) -> dict[Module, int]:
    """Modules of experts → how many of the experts are not adapted."""
    there: dict[Module, int] = {}
    for module in groups:
        if module.is_expert:
            whole = module._replace(expert=None)
            there[whole] = there.get(whole, 0) + 1
    return {module: expert_count(target.model, "Megatron") - count for module, count in there.items()}


def _magnitudes(kept: Mapping[str, LowRank], groups: Groups, table: Modules) -> list[Loss]:
    """DoRA is of the whole adapter, and a fused module has one magnitude for all of its rows."""
    normed = [name for name, site in kept.items() if site.magnitude is not None]
    if not normed:
        return []
    why = ""
    if len(normed) < len(kept):
        why = "Megatron has DoRA on all modules or none"
    for module, parts in groups.items():
        if module.is_expert:
            why = "Megatron has no DoRA for experts"
        elif not module.is_head and set(parts) != set(table[module.name]):
            missing = ", ".join(sorted(set(table[module.name]) - set(parts)))
            why = f"{module.name} has one magnitude for all of its rows, and {missing} is not adapted"
    return [Loss("magnitude", name, why) for name in normed] if why else []
