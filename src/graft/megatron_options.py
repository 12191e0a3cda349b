"""Options that concern some of Megatron-core's layers only: who takes them, and where they are refused.

Given for a whole call they concern those of its targets that they can; a call, or a pattern with options
of its own, none of whose targets they can concern is refused.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from torch import nn

from .engines.megatron_experts import Expert
from .engines.megatron_modules import ROW, core_class, role_of
from .errors import Problems, TargetError
from .options import Options
from .targets import Target

Experts = Mapping[int, Expert]

_EXPERTS = "the linears of a Megatron-core SequentialMLP's experts"
_NEEDS = {
    "normalize_experts": _EXPERTS,
    "share_experts": _EXPERTS,
    "all_to_all": "Megatron-core's RowParallelLinear with sequence parallelism",
}


def expert_of(target: Target, experts: Experts) -> Expert | None:
    """The expert that a target is a linear of."""
    return experts.get(id(target.holders[0].module))


def own_options(target: Target, asked: Options, experts: Experts) -> Options:
    """The options as one target takes them: off where they do not concern it, an expert's rank divided.

    Raises:
        TargetError: a rank that ``moe_router_topk`` does not divide, or a layer without that number.
    """
    expert = expert_of(target, experts)
    own = asked.changed(
        normalize_experts=asked.normalize_experts and expert is not None,
        share_experts=asked.share_experts and expert is not None,
        all_to_all=asked.all_to_all and _exchanges(target.holders[0].module),
    )
    if expert is None or not own.normalize_experts:
        return own
    if not expert.topk:
        raise TargetError("normalize_experts needs moe_router_topk in the layer's config, which has none")
    if own.rank % expert.topk:
        raise TargetError(
            f"rank={own.rank} with normalize_experts must be a multiple of moe_router_topk={expert.topk}"
        )
    return own.changed(rank=own.rank // expert.topk)


def _exchanges(module: nn.Module) -> bool:
    m: Any = module
    row = core_class(type(module)) is not None and role_of(module) == ROW
    return row and bool(m.sequence_parallel) and not m.explicit_expert_comm


def refuse_idle(plans: Iterable[tuple[Target, Options, Options]], problems: Problems) -> None:
    """Add every option that none of those it was given for takes.

    Args:
        plans: targets with the options asked for them and those that they take.
    """
    for option, needs in _NEEDS.items():
        taken: dict[int, bool] = {}
        first: dict[int, str] = {}
        for target, asked, own in plans:
            if getattr(asked, option):
                source = id(target.overrides) if option in target.overrides else 0
                taken[source] = taken.get(source, False) or getattr(own, option)
                first.setdefault(source, target.name)
        for source in (s for s, ok in taken.items() if not ok):
            problems.add(
                f"{option}=True is for {needs}; {first[source]} is none, nor is any other target of it"
            )


def sharing(target: Target, own: Options, experts: Experts) -> Hashable | None:
    """Equal for the targets that are to have one pair of factors; None for a target with its own."""
    expert = expert_of(target, experts)
    if expert is None or not own.share_experts:
        return None
    return id(expert.layer), expert.leaf, target.holders[0].parameter
