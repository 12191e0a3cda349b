"""The originals' formulas, written down a second time in plain torch, to be the oracle of the tests.

Facts of microsoft/DeepSpeedExamples, ``applications/DeepSpeed-VisualChat/utils/module/lora.py``: shapes,
first values (``kaiming_uniform_`` with a = √5 on ``[in, r]``, then zeros), order of draws, scale, forward.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Reference(nn.Module):
    """``y = F.linear(x, W, b) + dropout(x) @ right @ left * scaling``, W frozen."""

    def __init__(self, linear: nn.Linear, rank: int, scaling: float = 1, dropout: float = 0) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        right = torch.zeros(linear.in_features, rank)
        nn.init.kaiming_uniform_(right, a=math.sqrt(5))
        self.right = nn.Parameter(right.to(linear.weight.dtype))
        self.left = nn.Parameter(torch.zeros(rank, linear.out_features, dtype=linear.weight.dtype))
        self.scaling, self.dropout = scaling / rank, dropout
        self.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.dropout(x, self.dropout, self.training) @ self.right @ self.left
        return F.linear(x, self.weight, self.bias) + low * self.scaling


def refer(model: nn.Module, part: str, rank: int, scaling: float = 1, dropout: float = 0) -> nn.Module:
    """Every linear whose name contains ``part`` replaced, in the order of the modules."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and part in n]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), leaf, Reference(linear, rank, scaling, dropout))
    return model


class Block(nn.Module):
    """An attention-like block with a module whose own name contains ``lora``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.flora_gate = nn.Linear(width, width, bias=False)
        self.down_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down_proj(self.q_proj(x).relu() * self.flora_gate(x)))


class Plain(nn.Module):
    """Embedding, blocks, a head tied to the embedding, and a buffer."""

    def __init__(self, width: int = 12, words: int = 17) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.arange(4.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def model(dtype: torch.dtype = torch.float32) -> Plain:
    torch.manual_seed(0)
    return Plain().to(dtype)
