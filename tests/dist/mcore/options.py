"""Every option on every kind of layer: honoured, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.dist.mcore import shim
from tests.dist.mcore.models import (
    LINEARS,
    Wire,
    adapt,
    close,
    equal_everywhere,
    factors,
    fill,
    gpt,
    gradients,
    layer,
    loss_of,
    mlp,
    refused,
    weights,
)
from tests.dist.mcore.run import check


def _kinds() -> dict[str, tuple[Any, str, Callable[[Any], torch.Tensor]]]:
    """A module of each kind with a target in it, and a call of it; each is built when it is asked for."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, 2, 32, generator=g)
    tp = dist.get_world_size()

    def linear(module: Any) -> torch.Tensor:
        wide = module.weight.shape[1]
        return module(x[..., :wide])[0]

    def embedding(module: Any) -> torch.Tensor:
        return module(torch.arange(32).view(4, 8))

    def model(module: Any) -> torch.Tensor:
        return loss_of(module)

    return {
        "column": (layer("ColumnParallelLinear", tp), "re:", linear),
        "row": (layer("RowParallelLinear", tp, input_is_parallel=True), "re:", linear),
        "embedding": (layer("VocabParallelEmbedding", tp), "re:", embedding),
        "output layer": (gpt(tp, tied=False), "output_layer", model),
        "expert": (gpt(tp, tied=False, experts=2, sequence_parallel=True), "linear_fc1", model),
        "expert's row": (gpt(tp, tied=False, experts=2, sequence_parallel=True), "linear_fc2", model),
    }


@check(2)
def dropout_on_every_kind(_: Path) -> None:
    """Half of the values go at the position that is named; the rest doubles."""
    shim.parallel(2)
    for position in ("pre", "mid", "post"):
        for kind, (module, target, call) in _kinds().items():
            adapt(module, target, dropout=0.5, dropout_position=position)
            fill(module)
            dropped = [call(module) for _ in range(2)]
            assert not torch.equal(*dropped), (kind, position)
            module.eval()
            assert torch.equal(call(module), call(module)), (kind, position)
            if kind in ("row", "embedding"):  # replicated outputs
                assert equal_everywhere(dropped[0]), (kind, position)


@check(2)
def dropout_is_at_its_position(_: Path) -> None:
    """A and B are all ones: *post* leaves 0 or twice the value, *mid* some of three ranks, *pre* neither."""
    shim.parallel(2)
    for kind, (module, target, call) in _kinds().items():
        if kind not in ("column", "row", "embedding"):
            continue
        nn.init.zeros_(module.weight)
        adapt(module, target, dropout=0.5, alpha=3)
        nn.init.ones_(module.lora_A)
        nn.init.ones_(module.lora_B)
        module.eval()
        whole = call(module).detach()
        module.train()
        for position in ("pre", "mid", "post"):
            site = module.graft_slots["weight"].site
            site.options = site.options.changed(dropout_position=position)
            ratio = (call(module).detach() / whole).flatten()
            seen = {round(float(r), 3) for r in ratio}
            mids, posts = {0.0, 0.667, 1.333, 2.0}, {0.0, 2.0}
            if position == "post":
                assert seen == posts, (kind, position, seen)
            elif position == "mid" or kind == "embedding":
                assert seen <= mids and len(seen) > 2, (kind, position, seen)
            else:
                assert not seen <= mids, (kind, position, seen)


@check(2)
def dropout_where_forward_is_unknown_is_refused(_: Path) -> None:
    with refused("dropout=0.1", "VocabParallelEmbedding", "set dropout=0"):
        adapt(gpt(2, tied=True), "word_embeddings", dropout=0.1)
    with refused("dropout=0.1", "SharedExpertMLP.gate_weight", "set dropout=0"):
        adapt(gpt(2, tied=False, experts=2, sequence_parallel=True, moe_shared_expert_intermediate_size=24,
                  moe_shared_expert_gate=True), "gate_weight", dropout=0.1)  # fmt: skip


@check(2)
def dtype_on_every_kind(_: Path) -> None:
    shim.parallel(2)
    for dtype in (torch.bfloat16, torch.float64):
        for kind, (module, target, call) in _kinds().items():
            adapt(module, target, dtype=dtype)
            fill(module)
            for name, f in factors(module).items():
                assert f.dtype == dtype, (kind, name)
            out = call(module)
            assert out.dtype == torch.float32, kind
            out.square().sum().backward()
            for name, p in module.named_parameters():
                if "lora_" in name:
                    assert p.grad is not None and p.grad.dtype == dtype and p.grad.any(), (kind, name)


@check(2)
def factors_of_a_half_precision_base_are_single(_: Path) -> None:
    model = gpt(2, tied=False, params_dtype=torch.bfloat16)
    adapt(model, [*LINEARS, "word_embeddings", "output_layer"])
    assert {f.dtype for f in factors(model).values()} == {torch.float32}


@check(2, 4)
def all_to_all_changes_the_wire_and_no_number(_: Path) -> None:
    tp = dist.get_world_size()
    found: list[tuple[float, dict[str, torch.Tensor], dict[str, int]]] = []
    for exchange in (False, True):
        model = gpt(tp, tied=False, sequence_parallel=True)
        adapt(model, [*LINEARS, "word_embeddings"], all_to_all=exchange)
        fill(model)
        with Wire() as wire:
            loss = float(loss_of(model).detach())
        found.append((loss, gradients(model), wire.calls))
    (loss, grads, plain), (other, others, swapped) = found
    assert abs(loss - other) < 1e-6
    close(others, grads, rtol=1e-4, atol=1e-6)
    # of each layer's linear_proj and linear_fc2
    assert swapped["all_to_all_single"] - plain["all_to_all_single"] == 4
    assert plain["reduce_scatter_tensor"] - swapped["reduce_scatter_tensor"] == 4


@check(2)
def options_that_no_target_takes_are_refused(_: Path) -> None:
    split = gpt(2, tied=False)
    before = set(split.state_dict())
    with refused("all_to_all=True", "RowParallelLinear with sequence parallelism", "linear_qkv"):
        adapt(split, LINEARS, all_to_all=True)
    with refused("all_to_all=True", "linear_qkv"):
        parallel = gpt(2, tied=False, sequence_parallel=True)
        adapt(parallel, {"linear_proj": {"all_to_all": True}, "linear_qkv": {"all_to_all": True}})
    for option in ("share_experts", "normalize_experts"):
        with refused(f"{option}=True", "SequentialMLP"):
            adapt(split, LINEARS, **{option: True})
    with refused("init_b='zero'", "init='zero'"):
        adapt(split, LINEARS, init="zero")
    with refused("init_b must be one of"):
        adapt(split, LINEARS, init_b="orthogonal")
    assert set(split.state_dict()) == before


@check(2)
def weights_without_megatrons_attributes(_: Path) -> None:
    """``perform_initialization=False`` leaves the weight without a word on how it is cut."""
    import graft
    from graft.engines import shape_of

    model = gpt(2, tied=False, perform_initialization=False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    adapt(model, [*LINEARS, "word_embeddings"])
    first = model.decoder.layers[0]
    assert not hasattr(first.mlp.linear_fc1.weight, "partition_dim")
    assert shape_of(first.mlp.linear_fc1.weight) == (96, 32)
    assert shape_of(first.mlp.linear_fc2.weight) == (32, 48)
    assert shape_of(first.mlp.linear_fc1.lora_B) == (96, 3)
    assert first.mlp.linear_fc1.lora_B.partition_stride == 2
    assert shape_of(model.embedding.word_embeddings.lora_A) == (3, 64)
    fill(model)
    model.eval()
    before, plain = weights(model), float(loss_of(model).detach())
    graft.fuse(model)
    assert abs(float(loss_of(model).detach()) - plain) < 1e-5
    graft.unadapt(model)
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())


@check(2)
def all_linear_leaves_the_head(_: Path) -> None:
    from graft.model import factor_parameters

    model = gpt(2, tied=False)
    adapt(model, "all-linear")
    names = {n.split(".")[-2] for n in factor_parameters(model)}
    assert names == set(LINEARS), names


@check(2)
def a_b_that_is_not_zero_changes_the_model_at_once(_: Path) -> None:
    def output(**options: Any) -> torch.Tensor:
        model = mlp(2)
        if options:
            adapt(model, **options)
        return model(torch.ones(4, 2, 32))[0].detach()

    plain = output()
    assert torch.equal(output(init="kaiming"), plain)
    assert torch.equal(output(init="zero", init_b="normal"), plain)
    assert not torch.allclose(output(init="kaiming", init_b="normal"), plain)
