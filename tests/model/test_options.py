"""How both factors begin, and options that concern layers of another library: refused, never ignored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import graft

from .kinds import KINDS, run

INITS = ["kaiming", "xavier", "normal", "zero"]


def _spread(factor: torch.Tensor, init: str, inputs: int, outputs: int, rank: int) -> None:
    """A factor's values have the range and the deviation that the option's definition names."""
    values = factor.detach().flatten()
    if init == "zero":
        assert not values.any()
    elif init == "normal":
        assert abs(float(values.std()) * rank - 1) < 0.1
    else:
        bound = 1 / math.sqrt(inputs) if init == "kaiming" else math.sqrt(6 / (inputs + outputs))
        assert 0.95 * bound < float(values.abs().max()) <= bound
        assert abs(float(values.std()) - bound / math.sqrt(3)) < 0.05 * bound


@pytest.mark.parametrize("init_b", INITS)
@pytest.mark.parametrize("init", INITS)
def test_initialisation_of_both_factors(init: Any, init_b: Any) -> None:
    torch.manual_seed(0)
    layout = graft.Layout("(g o) i", 3, only=(0, 2))
    for module, rank, i, o, options in (
        (nn.Linear(200, 300), 12, 200, 300, {}),
        (nn.Linear(200, 900), 12, 200, 300, {"layout": layout}),
        (nn.Embedding(200, 300), 12, 200, 300, {}),
        (nn.Conv2d(40, 600, 3, groups=2), 8, 180, 300, {}),
    ):
        options = {"rank": rank, "init": init, "init_b": init_b, "quiet": True, **options}
        if init == init_b == "zero":
            with pytest.raises(graft.TargetError, match="never train"):
                graft.adapt(module, "weight", **options)
            assert set(module.state_dict()) <= {"weight", "bias"}
            continue
        graft.adapt(module, "weight", **options)
        _spread(module.lora_A, init, i, rank, rank)
        _spread(module.lora_B, init_b, rank, o, rank)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", KINDS)
def test_a_b_that_is_not_zero_is_part_of_the_model_at_once(name: str) -> None:
    kind = KINDS[name]
    torch.manual_seed(0)
    module, x = kind.make(), kind.inputs()
    plain = run(module, x).detach()
    graft.adapt(module, kind.targets, rank=2, init_b="normal", quiet=True, **kind.options)
    adapted = run(module, x).detach()
    assert not torch.allclose(adapted, plain, atol=1e-4)
    with graft.fused(module.eval()):
        torch.testing.assert_close(run(module, x), adapted, rtol=1e-4, atol=1e-4)
    with graft.disabled(module):
        torch.testing.assert_close(run(module, x), plain, rtol=1e-5, atol=1e-6)


def test_public_layers_take_it_too() -> None:
    assert graft.Linear(8, 8, rank=2, init_b="normal").lora_B.any()
    with pytest.raises(graft.TargetError, match="init_b must be one of"):
        graft.Embedding(8, 8, init_b="ones")  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["share_experts", "normalize_experts", "all_to_all"])
@pytest.mark.parametrize("name", KINDS)
def test_options_of_megatrons_layers_are_refused_elsewhere(name: str, option: str) -> None:
    kind = KINDS[name]
    module = kind.make()
    before = {n: type(m) for n, m in module.named_modules()}
    ways = [(kind.targets, {option: True})]
    if not isinstance(kind.targets, dict):
        first = kind.targets if isinstance(kind.targets, str) else kind.targets[0]
        ways.append(({first: {option: True}}, {}))
    for targets, options in ways:
        with pytest.raises(graft.TargetError, match=rf"{option}=True is for .*Megatron-core"):
            graft.adapt(module, targets, rank=2, quiet=True, **kind.options, **options)
    assert {n: type(m) for n, m in module.named_modules()} == before
