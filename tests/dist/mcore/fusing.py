"""Fused shards are slices of the single-process fuse, bit for bit, and nothing but factors ever travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.dist.mcore.models import (
    LINEARS,
    Dense,
    Wire,
    adapt,
    bits,
    fill,
    gpt,
    mlp,
    mlp_settings,
    refused,
    weights,
)
from tests.dist.mcore.run import check


def fused_pair(dtype: torch.dtype, gated: bool, **options: Any) -> tuple[Any, nn.Module]:
    """The split model and the dense one in one process, with one set of numbers; both unfused."""
    settings = mlp_settings(gated, params_dtype=dtype)
    base = {k: v for k, v in mlp(1, **settings).state_dict().items() if v is not None}
    dense = Dense(gated, dtype)
    dense.load_state_dict(base)
    split = mlp(dist.get_world_size(), **settings)
    for model in (dense, split):
        adapt(model, **options)
        fill(model)
    return split, dense


def _are_slices(split: nn.Module, whole: nn.Module) -> None:
    from graft.engines.split import split_of

    for name, w in weights(split).items():
        layer = split_of(split.get_parameter(name))
        want = whole.get_parameter(name).detach()
        assert torch.equal(bits(w), bits(want if layer is None else layer.cut(want))), name


@check(2, 4)
def fuse_is_the_slice_of_the_dense_fuse(_: Path) -> None:
    import graft

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for gated in (False, True):
            split, dense = fused_pair(dtype, gated)
            before = weights(split)
            graft.fuse(dense)
            with Wire() as wire:
                assert graft.fuse(split) == 2
            # some questions of 72 bytes to all processes, however large the model
            assert wire.sent == 72 * wire.calls["all_reduce"] < 1000, (wire.sent, wire.calls)
            _are_slices(split, dense)
            assert all(not torch.equal(w, before[n]) for n, w in weights(split).items())
            graft.unfuse(split)
            for name, w in weights(split).items():
                assert torch.equal(bits(w), bits(before[name])), (name, dtype, gated)


@check(4)
def fuse_of_a_whole_model(_: Path) -> None:
    import graft

    targets = [*LINEARS, "output_layer", "word_embeddings"]
    single = gpt(1, tied=False, params_dtype=torch.bfloat16)
    adapt(single, targets)
    fill(single)
    graft.fuse(single)
    for tp in (2, 4):
        model = gpt(tp, tied=False, params_dtype=torch.bfloat16)
        adapt(model, targets)
        fill(model)
        before = weights(model)
        graft.fuse(model)
        _are_slices(model, single)
        graft.unfuse(model)
        assert all(torch.equal(bits(w), bits(before[n])) for n, w in weights(model).items())


@check(2)
def grouped_layout_of_a_gated_layer(_: Path) -> None:
    """A and B for the gate and for the other half, as merged q/k/v have them."""
    import graft

    layout = graft.Layout("(g o) i", 2)
    only = graft.Layout("(g o) i", 2, only=(1,))
    for chosen in (layout, only):
        split, dense = fused_pair(torch.float32, True, targets={"linear_fc1": {"layout": chosen}})
        x = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(split(x)[0] + split(x)[1], dense(x)[0], rtol=1e-4, atol=1e-4)
        graft.fuse(dense)
        graft.fuse(split)
        _are_slices(split, dense)
    with refused("is cut"):
        adapt(mlp(2), {"linear_fc1": {"layout": layout}})


@check(2)
def whole_weights_reach_the_writer(_: Path) -> None:
    import graft
    from graft.effective import effective_weight
    from graft.held import held_sites

    split, dense = fused_pair(torch.bfloat16, True)
    graft.fuse(dense)
    for h in held_sites(split):
        found = effective_weight(h)
        if dist.get_rank() == 0:
            assert found is not None
            assert torch.equal(bits(found), bits(dense.get_parameter(h.name)))
        else:
            assert found is None


# --- Megatron-Bridge's layout and its merge ---------------------------------------------------------------


def lay_out_as_bridge(model: nn.Module) -> None:
    """A of a column layer cut along the rank, B of a row layer along its outputs.

    So Megatron-Bridge's ``ParallelLinearAdapter`` has them (``src/megatron/bridge/peft/utils.py``): for a
    column layer ``linear_in`` is a ColumnParallelLinear of ``dim`` outputs, for a row layer ``linear_out``
    is one of the layer's outputs.
    """
    from graft.adapted import slots_of
    from graft.engines.megatron_modules import COLUMN, role_of
    from graft.engines.split import Split, mark

    for module in model.modules():
        if "weight" in slots_of(module):
            factor = module.lora_A if role_of(module) == COLUMN else module.lora_B
            cut = Split(module.tp_group, 0)
            factor.data = cut.cut(factor.data)
            mark(factor, cut)


def bridge_merge(
    base: torch.Tensor, linear_out: torch.Tensor, linear_in: torch.Tensor, scale: float, rank: int, group: Any
) -> torch.Tensor:
    """This process's shard of W + ΔW from its parts of both factors, as Bridge's ``LoRAMerge.merge`` defines.

    Facts from ``src/megatron/bridge/peft/lora_merge.py``: a ``linear_in`` of fewer rows than the rank is
    gathered along them; else a ``linear_out`` of fewer rows than the weight is.
    """

    def whole(x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    if linear_in.shape[0] != rank:
        linear_in = whole(linear_in)
    elif linear_out.shape[0] != base.shape[0]:
        linear_out = whole(linear_out)
    return base + scale * (linear_out @ linear_in)


@check(2, 4)
def bridges_own_merge_gives_the_same_shards(_: Path) -> None:
    """Numbers with few bits, so that sums are exact and any two right answers are equal."""
    import graft
    from graft.adapted import factors, slots_of

    def coarse(p: torch.Tensor) -> None:
        p.data = (p.data * 64).round().clamp(-64, 64) / 64

    model = gpt(dist.get_world_size(), tied=False)
    adapt(model, LINEARS, rank=8, alpha=16)
    fill(model)
    for p in model.parameters():
        coarse(p)
    lay_out_as_bridge(model)
    want: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if "weight" in slots_of(module):
            f = factors(module, "weight")
            args = (module.weight.detach(), f.b.detach(), f.a.detach(), f.scale, 8, module.tp_group)
            want[name + ".weight"] = bridge_merge(*args)
    with Wire() as wire:
        assert graft.fuse(model) == len(want) == 8
    thin = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora_" in n)
    assert wire.sent - 72 * wire.calls["all_reduce"] <= thin, (wire.sent, thin)
    for name, w in want.items():
        assert torch.equal(model.get_parameter(name).detach(), w), name


@check(2)
def factors_laid_out_by_rank_are_gathered(_: Path) -> None:
    import graft

    split, dense = fused_pair(torch.bfloat16, True, rank=4)
    before = weights(split)
    lay_out_as_bridge(split)
    graft.fuse(dense)
    graft.fuse(split)
    _are_slices(split, dense)
    graft.unfuse(split)
    assert all(torch.equal(bits(w), bits(before[n])) for n, w in weights(split).items())
