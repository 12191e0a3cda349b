"""The low-rank branch of Megatron-core's tensor-parallel layers.

The factors are aligned with the weight (see :mod:`graft.engines.megatron`), and each branch hands over its
result in the state of the plain layer's output, with collectives over the rank only:

==========================  ============================================================
column                      ``B (copy (A x))``; with sequence parallelism ``B (gather (A x))``
row                         ``B (reduce (A x))``; with sequence parallelism ``B (scatter_sum (A x))``,
                            or ``B (exchange_sum (A x))`` with ``all_to_all=True``
vocabulary embedding        as row, A being looked up
expert under expert-TP      no collective: the dispatcher brings x and sums the output
==========================  ============================================================

Where the processes see different tokens or partial sums, the replicated factor goes through ``copy``, so
that its gradient is the complete sum everywhere, with any optimiser.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from .engines import regions
from .engines.megatron_groups import group_of
from .engines.megatron_modules import COLUMN, EMBEDDING, ROW, core_class
from .engines.split import split_of
from .factors import Branch, Factors, into, rise


def _drop(
    module: nn.Module, f: Factors, x: torch.Tensor, position: str, differs: bool, group: Any
) -> torch.Tensor:
    """Dropout, with its own mask on each process where these hold different numbers."""
    if not module.training or f.options.dropout == 0.0 or f.options.dropout_position != position:
        return x
    with _own_numbers(differs and group is not None and group.size() > 1):
        return f.drop(x, position, module.training)


def _own_numbers(differs: bool) -> AbstractContextManager[Any]:
    random: Any = sys.modules.get("megatron.core.tensor_parallel.random")
    tracker = random.get_cuda_rng_tracker() if differs and random is not None else None
    if tracker is None or not tracker.is_initialized():
        return nullcontext()
    return cast("AbstractContextManager[Any]", tracker.fork())


def column(
    module: nn.Module,
    f: Factors,
    input_: torch.Tensor,
    weight: torch.Tensor | None = None,
    runtime_gather_output: bool | None = None,
) -> torch.Tensor:
    """For ``ColumnParallelLinear``: x replicated or a sequence shard, y a shard of the last axis."""
    m, group = cast(Any, module), group_of(module)
    if weight is not None and weight is not m.weight:
        return input_.new_zeros(())  # the plain layer did not use the weight that is adapted
    partial = bool(m.explicit_expert_comm or m.disable_grad_reduce)
    sequence = bool(m.sequence_parallel) and not m.explicit_expert_comm
    a = regions.copy(f.a, group) if sequence or partial else f.a
    x = _drop(module, f, into(input_, a), "pre", sequence, group)
    h = _drop(module, f, F.linear(x, a), "mid", sequence, group)
    if sequence:
        h = regions.gather_sequence(h, group)
    elif not partial:
        h = regions.copy(h, group)
    y = _drop(module, f, rise(f, h, f.b) * f.scale, "post", True, group)
    gathered = m.gather_output if runtime_gather_output is None else runtime_gather_output
    return regions.gather_last(y, group) if gathered else y


def row(module: nn.Module, f: Factors, input_: torch.Tensor) -> torch.Tensor:
    """For ``RowParallelLinear``: x a shard of the last axis, y replicated, a sequence shard or partial."""
    m, group = cast(Any, module), group_of(module)
    sequence = bool(m.sequence_parallel) and not m.explicit_expert_comm
    b = regions.copy(f.b, group) if sequence or m.explicit_expert_comm else f.b
    x = into(input_, f.a)
    if not m.input_is_parallel:
        x = regions.scatter_last(x, group)
    h = F.linear(_drop(module, f, x, "pre", True, group), f.a)
    if sequence:
        h = (regions.exchange_sum if f.options.all_to_all else regions.scatter_sum)(h, group)
    elif not m.explicit_expert_comm:
        h = regions.reduce(h, group)
    h = _drop(module, f, h, "mid", sequence, group)
    return _drop(module, f, rise(f, h, b) * f.scale, "post", sequence, group)


def embedding(module: nn.Module, f: Factors, input_: torch.Tensor) -> torch.Tensor:
    """For ``VocabParallelEmbedding``: ids replicated, y replicated or a sequence shard ``[s/p, b, d]``."""
    m, group = cast(Any, module), group_of(module)
    elsewhere = (input_ < m.vocab_start_index) | (input_ >= m.vocab_end_index)
    ids = (input_ - m.vocab_start_index).masked_fill(elsewhere, 0)
    h = F.embedding(ids, f.a.T).masked_fill(elsewhere.unsqueeze(-1), 0.0)
    sequence = bool(m.reduce_scatter_embeddings)
    h = regions.scatter_sum(h.transpose(0, 1), group) if sequence else regions.reduce(h, group)
    b = regions.copy(f.b, group) if sequence else f.b
    for position in ("pre", "mid"):
        h = _drop(module, f, h, position, sequence, group)
    return _drop(module, f, F.linear(h, b) * f.scale, "post", sequence, group)


_BRANCHES: dict[str, Callable[..., torch.Tensor]] = {COLUMN: column, ROW: row, EMBEDDING: embedding}


def megatron_branch(plain: type[nn.Module]) -> Branch | None:
    """The branch of a class whose forward is that of one of Megatron-core's layers."""
    core = core_class(plain)
    return _BRANCHES[core.__name__] if core is not None and plain.forward is core.forward else None


def shared(weight: torch.Tensor, f: Factors) -> Factors:
    """Factors to form this process's shard of W + ΔW: the replicated one's gradients are summed."""
    split = split_of(weight)
    if split is None or not split.spread:
        return f
    a, b = (
        regions.copy(t, split.group) if (s := split_of(t)) is not None and s.axis is None else t
        for t in (f.a, f.b)
    )
    return replace(f, a=a, b=b)


def joined(f: Factors) -> Factors:
    """Factors that other processes put to a use of their own: their gradients are summed over all uses."""
    a, b = (t if (s := split_of(t)) is None else regions.copy(t, s.users) for t in (f.a, f.b))
    return f if a is f.a and b is f.b else replace(f, a=a, b=b)
