"""Outputs and gradients of adapted modules against loralib's and peft's own, given the same factors."""

from __future__ import annotations

import copy
from typing import Any

import loralib
import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import graft
from graft.adapted import factor_names

G = torch.Generator().manual_seed(4)


def given(model: nn.Module, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Put these factors in an adapted module."""
    module = model.get_submodule(name) if name else model
    with torch.no_grad():
        for factor, value in zip(factor_names("weight"), (a, b), strict=True):
            getattr(module, factor).copy_(value.reshape(getattr(module, factor).shape))


def agree(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, pairs: list[tuple[Any, Any]]) -> None:
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((y * weights).sum(), [p for p, _ in pairs])
    other = torch.autograd.grad((z * weights).sum(), [p for _, p in pairs])
    for m, o in zip(mine, other, strict=True):
        assert o.abs().sum() > 0
        torch.testing.assert_close(m.flatten(), o.flatten(), rtol=1e-4, atol=1e-4)


LORALIB: dict[str, tuple[Any, Any, torch.Tensor, graft.Layout | None]] = {
    "linear": (
        lambda: loralib.Linear(6, 10, r=3, lora_alpha=5),
        lambda: nn.Linear(6, 10),
        torch.randn(2, 4, 6),
        None,
    ),
    "fan_in_fan_out": (
        lambda: loralib.Linear(6, 10, r=3, lora_alpha=5, fan_in_fan_out=True),
        lambda: Conv1D(10, 6),
        torch.randn(2, 4, 6),
        None,
    ),
    "embedding": (
        lambda: loralib.Embedding(9, 6, r=3, lora_alpha=5),
        lambda: nn.Embedding(9, 6),
        torch.tensor([[1, 1, 8]]),
        None,
    ),
    "merged": (
        lambda: loralib.MergedLinear(6, 12, r=3, lora_alpha=5, enable_lora=[True, False, True]),
        lambda: nn.Linear(6, 12),
        torch.randn(2, 4, 6),
        graft.Layout("(g o) i", 3, only=(0, 2)),
    ),
    "conv2d": (
        lambda: loralib.Conv2d(4, 8, 3, r=1, lora_alpha=5),
        lambda: nn.Conv2d(4, 8, 3),
        torch.randn(2, 4, 6, 7),
        graft.Layout("o i", matrix=(24, 12)),
    ),
}


@pytest.mark.parametrize("name", LORALIB)
def test_loralib(name: str) -> None:
    make, plain, x, layout = LORALIB[name]
    theirs = make()
    with torch.no_grad():
        theirs.lora_A.normal_(generator=G), theirs.lora_B.normal_(generator=G)
    base = theirs.conv if name == "conv2d" else theirs
    ours = plain()
    with torch.no_grad():
        # loralib keeps a transposed weight in the storage that Conv1D has
        ours.weight.copy_(base.weight)
        if getattr(ours, "bias", None) is not None:
            ours.bias.copy_(base.bias)
    rank = theirs.lora_B.shape[1]
    # loralib's scale is alpha / r, where a convolution's factors have rank r · kernel size
    scale = 5 / (3 if name != "conv2d" else 1)
    graft.adapt(ours, "weight", rank=rank, alpha=scale * rank, layout=layout, quiet=True)
    given(ours, "", theirs.lora_A, theirs.lora_B)
    agree(ours, theirs, x, [(ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)])


PEFT: dict[str, tuple[Any, torch.Tensor]] = {
    "linear": (lambda: nn.Linear(6, 10), torch.randn(2, 4, 6)),
    "Conv1D": (lambda: Conv1D(10, 6), torch.randn(2, 4, 6)),
    "embedding": (lambda: nn.Embedding(9, 6), torch.tensor([[1, 1, 8]])),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1), torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, (3, 2), padding=1), torch.randn(2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2), torch.randn(1, 4, 4, 5, 4)),
}


@pytest.mark.parametrize("name", PEFT)
@pytest.mark.parametrize("rslora", [False, True])
# peft decides fan_in_fan_out by the class and says so
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_peft(name: str, rslora: bool) -> None:
    make, x = PEFT[name]
    base = nn.Sequential(make())
    config = peft.LoraConfig(target_modules=["0"], r=3, lora_alpha=5, use_rslora=rslora)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    layer: Any = theirs.base_model.model[0]
    if name == "embedding":
        pair = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    else:
        pair = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    with torch.no_grad():
        for p in pair:
            p.normal_(generator=G)
    graft.adapt(base, "0", rank=3, alpha=5, rslora=rslora, quiet=True)
    given(base, "0", *pair)
    agree(base, theirs, x, [(base[0].lora_A, pair[0]), (base[0].lora_B, pair[1])])
