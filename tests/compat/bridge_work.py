"""Checks of ``graft.compat.megatron_bridge`` that every process of a group of two runs."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from graft.compat.megatron_bridge import LoRA, LoRALinear, LoRAMerge
from tests.dist.mcore import shim


def work() -> None:
    warnings.simplefilter("ignore")
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    shim.install()
    merge_gathers_the_cut_factor()
    merge_takes_torchs_group()
    a_layer_of_cut_factors_is_merged_by_hand()
    factors_after_ddp_are_refused()
    megatron()


def _cut(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    w = torch.randn(rows, columns, generator=g).bfloat16()
    b, a = (torch.randint(-31, 32, shape, generator=g).bfloat16() / 32 for shape in ((rows, 4), (4, columns)))
    return w, b, a, (w.double() + 1.5 * (b.double() @ a.double())).bfloat16()


def merge_gathers_the_cut_factor() -> None:
    w, b, a, want = _cut(6, 10)
    rank, merge = dist.get_rank(), LoRAMerge().merge
    group = dist.new_group([0, 1])

    def mine(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.chunk(2, dim)[rank]

    for held, out, inside, expected in (
        (mine(w, 0), mine(b, 0), mine(a, 0), mine(want, 0)),  # column-parallel
        (mine(w, 1), mine(b, 0), mine(a, 1), mine(want, 1)),  # row-parallel
        (mine(w, 0), mine(b, 0), a, mine(want, 0)),  # aligned
        (mine(w, 1), b, mine(a, 1), mine(want, 1)),
        (w, b, a, want),
    ):
        given = [x.clone() for x in (held, out, inside)]
        for sizes in ({"tp_size": 2, "tp_group": group}, {"tp_group": group}):
            assert torch.equal(merge(held, out, inside, 6, 4, **sizes), expected)
        assert all(torch.equal(x, y) for x, y in zip((held, out, inside), given, strict=True))
    with pytest.raises(ValueError, match="neither whole"):
        merge(mine(w, 0), mine(b, 0), mine(a, 0), 6, 4)
    alone = [dist.new_group([n]) for n in range(2)][rank]
    with pytest.raises(ValueError, match="the group has 1; pass tp_group"):
        merge(mine(w, 0), mine(b, 0), mine(a, 0), 6, 4, tp_size=2, tp_group=alone)


def merge_takes_torchs_group() -> None:
    w, b, a, want = _cut(6, 10)
    held, out, inside = (x.chunk(2)[dist.get_rank()] for x in (w, b, a))
    assert torch.equal(LoRAMerge().merge(held, out, inside, 6, 4, tp_size=2), want.chunk(2)[dist.get_rank()])


class Given(nn.Module):
    def __init__(self, out: torch.Tensor, inside: torch.Tensor) -> None:
        super().__init__()
        self.alpha, self.dim = 6, 4
        self.linear_in = nn.Linear(1, 1, bias=False)
        self.linear_out = nn.Linear(1, 1, bias=False)
        self.linear_in.weight = nn.Parameter(inside)
        self.linear_out.weight = nn.Parameter(out)


def a_layer_of_cut_factors_is_merged_by_hand() -> None:
    """As the original's, with Megatron's group."""
    shim.parallel(2)
    w, b, a, want = _cut(6, 10)
    rank = dist.get_rank()
    base = nn.Linear(5, 6, bias=False, dtype=w.dtype)
    base.weight.data.copy_(w.chunk(2, 1)[rank])
    layer = LoRALinear(base, Given(b.chunk(2)[rank].clone(), a.chunk(2, 1)[rank].clone()))
    model = nn.Sequential(layer)
    LoRAMerge()(model, training=False)
    assert torch.equal(layer.to_wrap.weight, want.chunk(2, 1)[rank])
    x = torch.eye(5, dtype=w.dtype)
    assert torch.equal(model(x), layer.weight.T)
    LoRAMerge()(model, training=False)
    assert torch.equal(layer.to_wrap.weight, want.chunk(2, 1)[rank])


def factors_after_ddp_are_refused() -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="call the LoRA on the model first"):
        LoRA(["0"])(DistributedDataParallel(model))
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    wrapped = DistributedDataParallel(LoRA(["0"])(model))
    assert LoRA(["0"])(wrapped) is wrapped and model[0].linear_in.weight.requires_grad


# --- Megatron-core's layers ------------------------------------------------------------------------------


def mlp(tp: int, gated: bool, sequence: bool, dtype: torch.dtype) -> Any:
    """Megatron's MLP with the same global weights for every ``tp``."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    shim.parallel(tp)
    torch.manual_seed(3)
    config = shim.config(
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence and tp > 1,
        gated_linear_unit=gated,
        activation_func=nn.functional.silu if gated else nn.functional.gelu,
        params_dtype=dtype,
    )
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return MLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size)


METHOD: dict[str, Any] = {"dim": 3, "alpha": 6, "lora_B_init_method": "kaiming"}


def adapted(tp: int, gated: bool, sequence: bool, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = mlp(tp, gated, sequence, dtype)
    torch.manual_seed(11 + dist.get_rank() % tp)  # the first process's numbers count
    return LoRA(["linear_fc1", "linear_fc2"], **{**METHOD, **options})(model)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    from graft.engines import engine_of

    return engine_of(tensor).gather([tensor])[0].detach().clone()


def train(model: Any, tp: int, sequence: bool) -> list[float]:
    g = torch.Generator().manual_seed(5)
    x, t = torch.randn(8, 2, 32, generator=g), torch.randn(8, 2, 32, generator=g)
    cut = sequence and tp > 1
    if cut:
        x, t = (v.chunk(tp)[dist.get_rank()] for v in (x, t))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses: list[float] = []
    for _ in range(3):
        out, bias = model(x)
        loss = ((out if bias is None else out + bias) - t).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if cut:
            dist.all_reduce(total)
        losses.append(float(total))
    return losses


def megatron() -> None:
    for gated, sequence in ((False, False), (True, True)):
        runs = [(tp, adapted(tp, gated, sequence, a2a_experimental=True)) for tp in (1, 2)]
        exchanges = [runs[1][1].linear_fc1, runs[1][1].linear_fc2]
        assert [m.graft_slots["weight"].site.options.all_to_all for m in exchanges] == [False, sequence]
        factors = [{n: whole(p) for n, p in model.named_parameters() if p.requires_grad} for _, model in runs]
        assert factors[0].keys() == factors[1].keys() == KEYS
        assert all(torch.equal(v, factors[1][n]) for n, v in factors[0].items())
        single, split = [train(model, tp, sequence) for tp, model in runs]
        torch.testing.assert_close(single, split, rtol=1e-5, atol=1e-4)
        assert split[-1] < split[0]
    looks_like_the_original()
    merging_does_not_depend_on_the_processes()
    options_reach_the_layers()


KEYS = {f"linear_{fc}.adapter.linear_{end}.weight" for fc in ("fc1", "fc2") for end in ("in", "out")}


def looks_like_the_original() -> None:
    plain = mlp(2, True, False, torch.float32)
    keys = set(plain.state_dict())
    model = adapted(2, True, False)
    assert set(model.state_dict()) == keys | KEYS
    for layer in (model.linear_fc1, model.linear_fc2):
        assert isinstance(layer, LoRALinear) and layer.to_wrap is layer
        assert (layer.adapter.dim, layer.adapter.alpha) == (3, 6)
        assert not layer.weight.requires_grad
    # gate and up of 48 rows each; A whole, B cut, and the other way round
    assert tuple(model.linear_fc1.adapter.linear_in.weight.shape) == (3, 32)
    assert tuple(model.linear_fc1.adapter.linear_out.weight.shape) == (48, 3)
    assert tuple(model.linear_fc2.adapter.linear_in.weight.shape) == (3, 24)
    assert tuple(model.linear_fc2.adapter.linear_out.weight.shape) == (32, 3)
    assert model.linear_fc1.adapter.linear_out.out_features == 96
    from megatron.core import parallel_state

    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for layer, axes in ((model.linear_fc1, (None, 0)), (model.linear_fc2, (1, None))):
        described = layer.sharded_state_dict("x.", (), groups)
        assert {"x.adapter.linear_in.weight", "x.adapter.linear_out.weight"} < set(described)
        for end, axis in zip(("in", "out"), axes, strict=True):
            found = described[f"x.adapter.linear_{end}.weight"]
            pieces = found.build() if hasattr(found, "build") else [found]
            # a gated layer's B is described as its gate and its up
            assert {p.axis_fragmentations[axis or 0] for p in pieces} == {
                1 if axis is None else 2 * len(pieces)
            }


def merging_does_not_depend_on_the_processes() -> None:
    merged: list[dict[str, torch.Tensor]] = []
    for tp in (1, 2):
        model = adapted(tp, True, False, torch.bfloat16).eval()
        x = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
        before = {fc: whole(getattr(model, fc).weight) for fc in ("linear_fc1", "linear_fc2")}
        plain = model(x)[0].detach()
        LoRAMerge()(model, training=False)
        torch.testing.assert_close(model(x)[0], plain, rtol=0.05, atol=0.05)
        merged.append({fc: whole(getattr(model, fc).weight) for fc in before})
        assert not any(torch.equal(merged[-1][fc], w) for fc, w in before.items())
        with LoRA().disable_adapter(model):
            assert all(torch.equal(whole(getattr(model, fc).weight), w) for fc, w in before.items())
    assert all(torch.equal(w, merged[1][fc]) for fc, w in merged[0].items())


def options_reach_the_layers() -> None:
    model = adapted(2, False, False, lora_dtype=torch.float64, dropout=0.5, dropout_position="post", dim=64)
    a = whole(model.linear_fc1.adapter.linear_in.weight)
    assert a.dtype == torch.float64
    std = (2 / (32 + 64)) ** 0.5
    assert abs(float(a.std()) / std - 1) < 0.1
    assert float(a.abs().max()) > 2 * std  # normal, where an nn.Linear's are uniform
    x = torch.randn(64, 1, 32)
    layer = model.linear_fc1
    update = layer(x)[0] - nn.functional.linear(x, layer.weight)
    assert 0.4 < float((update.abs() < 1e-6).float().mean()) < 0.6
    layer.adapter.dropout.p = 0.0
    assert (layer(x)[0] - nn.functional.linear(x, layer.weight)).abs().min() > 0
