"""``LoRAMerge``: W + ΔW, where the originals' factors are cut over tensor-parallel processes."""

from __future__ import annotations

import sys
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from ...adapted import slots_of
from ...attach import sites
from ...delta import Delta
from ...engines import engine_of
from ...errors import LayoutError, StateError
from ...fusing import fuse
from ...layout import Layout
from .base import PEFT, chunks
from .layers import LoRALinear

Model = TypeVar("Model", bound="nn.Module | list[Any]")


class LoRAMerge(PEFT):
    """Adds ΔW to the weights. Called on a model it merges all of its adapted layers, or none."""

    @torch.no_grad()
    def merge(
        self,
        base_weight: torch.Tensor,
        linear_out: torch.Tensor,
        linear_in: torch.Tensor,
        alpha: float,
        dim: int,
        *,
        tp_size: int | None = None,
        tp_group: Any = None,
    ) -> torch.Tensor:
        """``W + (alpha / dim) · B · A`` as a new tensor, rounded once; W ``[o, i]`` is this process's part.

        With p tensor-parallel processes, by the shapes of B (``linear_out``) and A (``linear_in``):

        ==================  ===============  ==================  =========================
        layout              B                A                   gathered over ``tp_group``
        ==================  ===============  ==================  =========================
        whole, or aligned   ``[o, dim]``     ``[dim, i]``        nothing
        column-parallel     ``[o, dim]``     ``[dim / p, i]``    A
        row-parallel        ``[o / p, dim]`` ``[dim, i]``        B
        ==================  ===============  ==================  =========================

        Args:
            tp_size: p; None takes ``tp_group``'s, or Megatron-core's if its parallel state is set, or 1.
            tp_group: None takes Megatron-core's, or torch's default group if that has p processes.
        Raises:
            LayoutError: shapes of no layout, or no group of p processes.
            StateError: a quantised weight; a sum beyond the weight's dtype.
        """
        size, group = _team(tp_size, tp_group)
        a, b = linear_in.detach(), linear_out.detach()
        split = _split(base_weight, b, a, dim, size)
        if split is not None and size > 1:
            group = _group(size, group)
            a, b = (_gather(a, size, group), b) if split == "in" else (a, _gather(b, size, group))
        weight = base_weight.detach().contiguous()
        delta = Delta.of(
            a.to(weight.device), b.to(weight.device), alpha / dim, Layout("o i"), tuple(weight.shape)
        )
        merged = torch.empty_like(weight)
        broken = delta.add(weight.view(-1), merged.view(-1))
        if broken:
            raise StateError(f"{broken} elements of W + ΔW are beyond the range of {weight.dtype}")
        return merged

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Merge this module's weight, if it is adapted and not merged already; the module itself.

        Its forward then adds nothing, and ``graft.unfuse(module)`` gives every bit of W back. A
        :class:`LoRALinear` made by hand of factors that are cut over processes is merged for good.
        """
        if all(slot.site.fusion is not None for slot in slots_of(module).values()):
            return module
        if isinstance(module, LoRALinear) and _is_cut(module):
            f = module.graft_slots["weight"].site.options
            weight = module.get_parameter("weight")
            merged = self.merge(weight, module.lora_B, module.lora_A, cast(float, f.alpha), f.rank)
            weight.data.copy_(merged)
            del module.graft_slots["weight"]
        else:
            fuse(module)
        return module

    def __call__(self, model: Model, training: bool = True) -> Model:
        """Merge every adapted layer, all or none in each chunk, and freeze the model."""
        for part in chunks(cast(Any, model)):
            by_hand = [m for m in part.modules() if isinstance(m, LoRALinear) and _is_cut(m)]
            for module in by_hand:
                self.transform(module)
            if sites(part):
                fuse(part)
        self.freeze_model(model, training=False)
        for part in [model] if isinstance(model, nn.Module) else model:
            part.train(training)
        return model


def _is_cut(module: LoRALinear) -> bool:
    """Whether plain factors do not fit a plain weight, since they are cut as the original's are."""
    if "weight" not in module.graft_slots:
        return False
    weight = module.get_parameter("weight")
    if engine_of(weight).name != "plain" or weight.dim() != 2:
        return False
    rank, (rows, columns) = module.graft_slots["weight"].site.options.rank, weight.shape
    return tuple(module.lora_A.shape) != (rank, columns) or tuple(module.lora_B.shape) != (rows, rank)


def _split(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor, dim: int, size: int) -> str | None:
    """The factor that must be gathered: ``in``, ``out`` or None."""
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], str | None] = {}
    if w.dim() == 2 and dim > 0:
        (o, i), p = w.shape, size
        if dim % p == 0:
            known[(o, dim), (dim // p, i)] = "in"
        if o % p == 0:
            known[(o // p, dim), (dim, i)] = "out"
        known[(o, dim), (dim, i)] = None
    shapes = tuple(b.shape), tuple(a.shape)
    if shapes not in known:
        raise LayoutError(
            f"linear_out {list(b.shape)} and linear_in {list(a.shape)} of dim={dim} fit a weight "
            f"{list(w.shape)} over tp_size={size} neither whole, nor as column-parallel (linear_in cut along "
            "dim), nor as row-parallel (linear_out cut along its rows); pass the tp_size, tp_group and dim "
            "that they were made with"
        )
    return known[shapes]


def _team(size: int | None, group: Any) -> tuple[int, Any]:
    state: Any = sys.modules.get("megatron.core.parallel_state")
    if group is None and state is not None and state.model_parallel_is_initialized():
        group = state.get_tensor_model_parallel_group()
        if size is not None and int(group.size()) != size:
            group = None
    if size is None:
        size = 1 if group is None else int(group.size())
    if size < 1:
        raise LayoutError(f"tp_size must be at least 1, got tp_size={size}")
    return size, group


def _group(size: int, group: Any) -> Any:
    """A group of exactly ``size`` processes."""
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    have = size if group is None else int(group.size())
    if have != size:
        raise LayoutError(
            f"the factors are cut over tp_size={size} processes, and the group has {have}; pass tp_group"
        )
    return group


def _gather(shard: torch.Tensor, size: int, group: Any) -> torch.Tensor:
    parts = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(size)]
    try:
        dist.all_gather(parts, shard.contiguous(), group=group)
    except ValueError:  # torch's, of a group that was never made
        raise LayoutError(
            f"the factors are cut over tp_size={size} processes, and there is no process group; pass tp_group"
        ) from None
    return torch.cat(parts)
