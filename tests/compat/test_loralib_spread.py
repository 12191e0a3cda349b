"""loralib's layers under FSDP2: eval() does not edit full copies that FSDP2 drops again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graft
import graft.compat.loralib as lora
from tests.dist import group


def make() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(
        lora.Embedding(9, 8, r=2), lora.MergedLinear(8, 24, r=2, enable_lora=[True, False, True])
    )
    model = nn.Sequential(first, lora.Linear(24, 9, r=2, lora_alpha=4))
    lora.mark_only_lora_as_trainable(model)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return model


def whole(spread: nn.Sequential) -> list[torch.Tensor]:
    """The base as it is stored."""
    spread.reshard(), spread[0].reshard()
    return [p.full_tensor() for p in spread.parameters() if not p.requires_grad]


@torch.no_grad()
def agree(spread: nn.Module, alone: nn.Module) -> None:
    x = torch.arange(9)
    for _ in range(2):  # the second forward finds the full weights that the first one left in the outer unit
        torch.testing.assert_close(spread(x), alone(x), rtol=1e-4, atol=1e-5)


def work() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone, spread = make(), make()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(spread[0], mesh=mesh)
    fully_shard(spread, mesh=mesh)
    base = whole(spread)
    for model in (alone, spread):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            model(torch.arange(9)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for mode in (False, True, False):
        alone.train(mode), spread.train(mode)
        agree(spread, alone)
        assert alone[1].merged is not mode and not spread[1].merged
    with graft.fused(spread):
        agree(spread, alone)
        assert spread[1].merged
        with graft.disabled(spread), graft.disabled(alone):
            agree(spread, alone)
        agree(spread, alone)
    agree(spread, alone)
    assert all(torch.equal(x, y) for x, y in zip(whole(spread), base, strict=True))


@pytest.mark.dist
def test_fsdp2() -> None:
    group.run(2, work)
