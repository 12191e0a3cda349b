"""One small model for every kind of layer, and the definition written out as an oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from graft import Layout


class Scaled(nn.Linear):
    """A user's subclass with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight * 2.0, self.bias)


class Experts(nn.Module):
    """Packed experts, [E, out, in] up and [E, in, out] down."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 10, 6))
        self.down = nn.Parameter(torch.randn(3, 10, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([F.linear(x, self.up[e]).relu() @ self.down[e] for e in range(3)]).sum(0)


class Attention(nn.MultiheadAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Cross(nn.MultiheadAttention):
    """Keys and values of another width: q_proj_weight, k_proj_weight, v_proj_weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, x[..., :6], x[..., :4], need_weights=False)[0]


@dataclass
class Kind:
    """How to make a module, its input, what to target, and the layouts that are not the natural ones."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], torch.Tensor]
    targets: Any
    options: dict[str, Any] = field(default_factory=dict)
    factored: bool = True


def _ids() -> torch.Tensor:
    return torch.tensor([[1, 4, 0, 7], [0, 2, 2, 9]])


def _x(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def _conv(axes: int, **kwargs: Any) -> Callable[[], nn.Module]:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return lambda: kind(4, 8, 3, **kwargs)


def _up(axes: int, **kwargs: Any) -> Callable[[], nn.Module]:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    return lambda: kind(4, 6, 3, **kwargs)


QKV = Layout("(g o) i", 3, only=(0, 2))
KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(6, 10), _x(2, 5, 6), "weight"),
    "linear no bias": Kind(lambda: nn.Linear(6, 10, bias=False), _x(6), "weight"),
    "linear qkv": Kind(lambda: nn.Linear(6, 12), _x(2, 5, 6), "weight", {"layout": QKV}),
    "linear as in-out": Kind(lambda: nn.Linear(6, 10), _x(2, 5, 6), "weight", {"layout": Layout("i o")}),
    "Conv1D": Kind(lambda: Conv1D(10, 6), _x(2, 5, 6), "weight"),
    "Conv1D qkv": Kind(
        lambda: Conv1D(12, 6), _x(2, 5, 6), "weight", {"layout": Layout("i (g o)", 3, only=(2, 0))}
    ),
    "embedding": Kind(lambda: nn.Embedding(10, 6), _ids, "weight"),
    "embedding padded": Kind(lambda: nn.Embedding(10, 6, padding_idx=0), _ids, "weight"),
    "embedding by frequency": Kind(
        lambda: nn.Embedding(10, 6, scale_grad_by_freq=True), _ids, "weight", factored=False
    ),
    "embedding bag": Kind(lambda: nn.EmbeddingBag(10, 6), _ids, "weight", factored=False),
    "conv1d": Kind(_conv(1, padding=1, dilation=2), _x(2, 4, 9), "weight"),
    "conv1d causal": Kind(_conv(1, groups=4), _x(2, 4, 9), "weight"),
    "conv2d": Kind(_conv(2, stride=2, padding=1, groups=2), _x(2, 4, 7, 8), "weight"),
    "conv2d reflect": Kind(_conv(2, padding=1, padding_mode="reflect"), _x(4, 7, 8), "weight"),
    "conv2d same": Kind(_conv(2, padding="same", dilation=2), _x(2, 4, 7, 8), "weight"),
    "conv2d loralib": Kind(
        _conv(2), _x(2, 4, 7, 8), "weight", {"layout": Layout("o i", matrix=(24, 12))}, factored=False
    ),
    "conv3d": Kind(_conv(3, groups=2, padding=1, padding_mode="circular"), _x(1, 4, 4, 5, 4), "weight"),
    "transposed 1d": Kind(_up(1, stride=2, output_padding=1), _x(2, 4, 6), "weight"),
    "transposed 2d": Kind(_up(2, stride=2, groups=2, padding=1), _x(2, 4, 5, 6), "weight"),
    "transposed 3d": Kind(_up(3, dilation=2), _x(1, 4, 3, 4, 3), "weight"),
    "attention": Kind(
        lambda: Attention(8, 2, batch_first=True), _x(2, 5, 8), ["in_proj_weight", "out_proj"], {}, False
    ),
    "attention qkv": Kind(
        lambda: Attention(8, 2, batch_first=True), _x(2, 5, 8), "in_proj_weight", {"layout": QKV}, False
    ),
    "attention out only": Kind(lambda: Attention(8, 2), _x(5, 2, 8), "out_proj", {}, False),
    "cross attention": Kind(
        lambda: Cross(8, 2, kdim=6, vdim=4), _x(5, 2, 8), ["*_proj_weight", "out_proj"], {}, False
    ),
    "encoder layer": Kind(
        lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0),
        _x(2, 5, 8),
        ["self_attn", "linear1", "linear2"],
        {},
        False,
    ),
    "lstm": Kind(
        lambda: nn.LSTM(6, 8, 2, bidirectional=True, proj_size=3), _x(5, 2, 6), "weight_*", {}, False
    ),
    "gru": Kind(lambda: nn.GRU(6, 8, bias=False), _x(5, 2, 6), "weight_*", {}, False),
    "rnn": Kind(lambda: nn.RNN(6, 8), _x(5, 2, 6), "weight_hh_l0", {}, False),
    "lstm cell": Kind(lambda: nn.LSTMCell(6, 8), _x(2, 6), "weight_ih", {}, False),
    "experts": Kind(
        Experts,
        _x(4, 6),
        {"up": {}, "down": {"layout": Layout("g i o", 3, only=(1,)), "rank": 2}},
        {},
        False,
    ),
    "own forward": Kind(lambda: Scaled(6, 10), _x(2, 6), "weight", {}, False),
    "bilinear": Kind(lambda: nn.Bilinear(6, 6, 4), _x(2, 6), "weight", {}, False),
}


def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The module's output as one tensor."""
    y = module(x, x) if isinstance(module, nn.Bilinear) else module(x)
    parts: list[torch.Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            parts.append(value.flatten())
        elif isinstance(value, tuple):
            for v in value:
                walk(v)

    walk(y)
    return torch.cat(parts)


def randomise(model: nn.Module, std: float = 0.3, seed: int = 3) -> None:
    """Give every factor random values."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.split(".")[-1].startswith(("lora_A", "lora_B")):
                p.copy_(torch.randn(p.shape, generator=g) * std)


def dense(
    a: torch.Tensor, b: torch.Tensor, scale: float, layout: Layout, shape: tuple[int, ...]
) -> torch.Tensor:
    """ΔW by the definition alone, one group at a time, with gradients: M[g] += scale · B[g] A[g]."""
    n = len(layout.enabled)
    template = torch.arange(torch.Size(shape).numel()).view(shape)
    index = layout.view(template)
    out = torch.zeros(template.numel(), dtype=a.dtype)
    for k, g in enumerate(layout.enabled):
        product = scale * (b.chunk(n)[k] @ a.chunk(n)[k])
        out = out.index_add(0, index[g].flatten(), product.flatten())
    return out.view(shape)
