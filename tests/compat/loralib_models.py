"""Small models as loralib's users build them, once for each library: the import is the only difference."""

from __future__ import annotations

import copy
import math
from types import ModuleType
from typing import Any

import loralib
import torch
import torch.nn.functional as F
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

import graft.compat.loralib

ORIGINAL, OURS = loralib, graft.compat.loralib
WIDTH, HEADS, WORDS, LENGTH = 16, 2, 40, 12


class Conv1D(nn.Module):
    """GPT-2's linear, ``[in, out]``."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(into, out).normal_(std=0.2))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Block(nn.Module):
    """A GPT-2 block with ``MergedLinear`` in c_attn: queries and values have an adapter."""

    def __init__(self, lora: ModuleType, dropout: float) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())
        self.c_attn = lora.MergedLinear(
            WIDTH,
            3 * WIDTH,
            r=4,
            lora_alpha=32,
            lora_dropout=dropout,
            enable_lora=[True, False, True],
            fan_in_fan_out=True,
            merge_weights=False,
        )
        self.c_proj = Conv1D(WIDTH, WIDTH)
        self.c_fc, self.out = Conv1D(4 * WIDTH, WIDTH), Conv1D(WIDTH, 4 * WIDTH)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).chunk(3, -1)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        n = x.shape[1]
        weights = scores.masked_fill(~self.bias[:n, :n], -1e10).softmax(-1)
        x = x + self.c_proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.c_fc(self.ln_2(x))))


class GPT2(nn.Module):
    """loralib's NLG example in small: deep copies of one block, a tied head, weights drawn again by apply."""

    def __init__(self, lora: ModuleType, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        block = Block(lora, dropout)
        self.h = nn.ModuleList([copy.deepcopy(block) for _ in range(2)])
        self.ln_f = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.wte.weight
        self.apply(self._draw)
        # the example fills what a checkpoint lacks with the parameters themselves
        self.load_state_dict(dict(self.named_parameters()), strict=False)

    @staticmethod
    def _draw(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=0.2)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


def gpt2(lora: ModuleType, **options: Any) -> nn.Module:
    torch.manual_seed(11)
    return GPT2(lora, **options)


def roberta(lora: ModuleType, **options: Any) -> nn.Module:
    """loralib's NLU example in small: ``lora.Linear`` for queries and values, merged on ``eval()``."""
    torch.manual_seed(11)
    config = RobertaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH + 2,
        num_labels=3,
        initializer_range=0.2,
    )
    model: Any = RobertaForSequenceClassification(config)
    for layer in model.roberta.encoder.layer:
        attention = layer.attention.self
        for name in ("query", "value"):
            plain = getattr(attention, name)
            new = lora.Linear(WIDTH, WIDTH, 4, lora_alpha=8, **options)
            new.load_state_dict(plain.state_dict(), strict=False)
            setattr(attention, name, new)
    return model


class Everything(nn.Module):
    """One layer of every kind that loralib runs."""

    def __init__(self, lora: ModuleType, **options: Any) -> None:
        super().__init__()
        self.embed = lora.Embedding(9, 6, r=2, lora_alpha=3, padding_idx=0, **options)
        self.qkv = lora.MergedLinear(6, 18, 3, 5, 0.0, [True, False, True], True, **options)
        self.wide = lora.Linear(18, 8, r=2, **options)
        self.plain = lora.Linear(8, 8, **options)
        self.image = lora.Conv2d(1, 4, 3, r=2, padding=1, **options)
        self.grouped = lora.Conv2d(4, 4, 3, r=1, groups=2, padding=1, **options)
        self.line = lora.Conv1d(4, 4, 1, r=1, **options)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.plain(self.wide(self.qkv(self.embed(ids))))
        return self.line(self.grouped(self.image(x[:, None])).mean(2))


IDS = torch.tensor([[1, 2, 3, 0, 5], [8, 0, 0, 4, 1]])


def everything(lora: ModuleType, seed: int = 0, **options: Any) -> Everything:
    """All layers with random factors, equal for both libraries."""
    torch.manual_seed(seed)
    model = Everything(lora, **options)
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.rpartition(".")[2] in ("lora_A", "lora_B"):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def base(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything that is no factor, as it is in memory."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


def same_bits(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> bool:
    return x.keys() == y.keys() and all(
        a.dtype == y[n].dtype and torch.equal(bits(a), bits(y[n])) for n, a in x.items()
    )


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
