"""What is refused, by name, before anything is changed or written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.dist.mcore import shim
from tests.dist.mcore.fusing import fused_pair
from tests.dist.mcore.models import LINEARS, adapt, bits, factors, fill, gpt, refused, weights
from tests.dist.mcore.run import check


@check(2)
def unequal_factors_are_refused(_: Path) -> None:
    import graft

    split, _dense = fused_pair(torch.float32, False)
    before = weights(split)
    if dist.get_rank() == 1:
        with torch.no_grad():
            split.linear_fc1.lora_A[0, 0] += 1
    with refused("another process"):
        graft.fuse(split)
    assert all(torch.equal(w, before[n]) for n, w in weights(split).items())


@check(2, 4)
def replicas_with_other_factors_are_refused(_: Path) -> None:
    """Also where the factor is cut, so that the tensor-parallel group cannot see it."""
    import graft

    model = gpt(dist.get_world_size() // 2, tied=False)
    adapt(model, LINEARS)
    fill(model)
    before = weights(model)
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            model.decoder.layers[1].mlp.linear_fc1.lora_B[0, 0] += 1
    with refused("another process"):
        graft.fuse(model)
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())


@check(2)
def unequal_adapters_are_refused(_: Path) -> None:
    import graft

    for tp in (1, 2):
        model = gpt(tp, tied=False)
        with refused("different adapters"):
            graft.adapt(model, LINEARS, rank=2 + dist.get_rank(), quiet=True)
        assert not any("lora_" in n for n in model.state_dict())
        adapt(model, LINEARS)
        if dist.get_rank() == 0:
            model.decoder.layers[0].mlp.linear_fc1.graft_slots["weight"].site.scale = 7.0
        with refused("different adapters"):
            graft.fuse(model)


@check(2)
def factors_changed_while_fused_are_refused(_: Path) -> None:
    """On one process only; both refuse, and the old values give every bit back."""
    import graft

    model = gpt(2, tied=False, params_dtype=torch.bfloat16)
    adapt(model, LINEARS)
    fill(model)
    before, kept = weights(model), factors(model)
    graft.fuse(model)
    fused = weights(model)
    changed = model.decoder.layers[0].self_attention.linear_proj.lora_B
    value = changed.detach().clone()
    if dist.get_rank() == 0:
        changed.data += 1
    words = ["another than at fuse"] if dist.get_rank() == 0 else ["refused by another process"]
    for verb in (graft.fuse, graft.unfuse):
        with refused(*words):
            verb(model)
    assert all(torch.equal(bits(w), bits(fused[n])) for n, w in weights(model).items())
    changed.data.copy_(value)
    assert all(torch.equal(f, kept[n]) for n, f in factors(model).items())
    graft.unfuse(model)
    assert all(torch.equal(bits(w), bits(before[n])) for n, w in weights(model).items())


@check(2)
def a_weight_edited_while_fused_is_refused(_: Path) -> None:
    import graft

    model = gpt(2, tied=False)
    adapt(model, LINEARS)
    fill(model)
    graft.fuse(model)
    weight = model.decoder.layers[0].self_attention.linear_proj.weight
    before = weights(model)
    if dist.get_rank() == 1:
        weight.data[0, 0] += 1
        before = weights(model)
    words = "changed" if dist.get_rank() == 1 else "another process"
    with refused(words):
        graft.unfuse(model)
    assert all(torch.equal(bits(w), bits(before[n])) for n, w in weights(model).items())


@check(2)
def an_embedding_copied_to_another_stage_is_refused(_: Path) -> None:
    model = gpt(1, tied=True, pp=2)
    name = "output_layer" if dist.get_rank() else "word_embeddings"
    with refused("pipeline stage", name):
        adapt(model, [name, "linear_qkv"])
    assert not any("lora_" in n for n in model.state_dict())


@check(2)
def a_router_is_refused(_: Path) -> None:
    model = gpt(2, tied=False, experts=2, sequence_parallel=True)
    with refused("TopKRouter", "cannot be swapped"):
        adapt(model, ["router", "linear_proj"])
    assert not any("lora_" in n for n in model.state_dict())


def _packed() -> dict[str, nn.Module]:
    """Packed experts as Megatron has them; their kernels, and so their constructors, need a GPU."""
    from megatron.core.transformer.moe.experts import GroupedMLP

    grouped = GroupedMLP.__new__(GroupedMLP)
    nn.Module.__init__(grouped)
    grouped.weight1 = nn.Parameter(torch.zeros(32, 96))
    grouped.weight2 = nn.Parameter(torch.zeros(48, 32))
    home = "megatron.core.extensions.transformer_engine"
    te = type("TEColumnParallelGroupedLinear", (nn.Module,), {"__module__": home})()
    te.weight0 = nn.Parameter(torch.zeros(24, 32))
    te.weight1 = nn.Parameter(torch.zeros(24, 32))
    return {"grouped": grouped, "linear_fc1": te}


@check(2)
def packed_experts_are_refused(_: Path) -> None:
    import graft

    shim.parallel(2)
    for target in (
        "grouped",
        "grouped.weight1",
        "weight2",
        "linear_fc1",
        "linear_fc1.weight0",
        "re:.*weight.*",
    ):
        model: Any = nn.ModuleDict(_packed())
        with warnings.catch_warnings(), refused("SequentialMLP", "moe_grouped_gemm=False"):
            graft.adapt(model, target, quiet=True)
        assert not any("lora_" in n for n in model.state_dict()), target
    # also where the name stands for plain linears too, unless it is left out by name
    model = nn.ModuleDict({**_packed(), "dense": nn.ModuleDict({"linear_fc1": nn.Linear(4, 4)})})
    with refused("linear_fc1 is a TEColumnParallelGroupedLinear", "exclude="):
        graft.adapt(model, "linear_fc1", quiet=True)
    report = graft.adapt(model, "linear_fc1", exclude="re:linear_fc1", quiet=True)
    assert report.sites == ("dense.linear_fc1.weight",)
