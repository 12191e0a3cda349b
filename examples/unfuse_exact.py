"""Fuse and unfuse a hundred times: what adding and subtracting does to a weight, and what Graft does."""

from __future__ import annotations

import torch

import graft

torch.manual_seed(0)
layer = graft.Linear(256, 256, rank=8, alpha=16, bias=False, dtype=torch.bfloat16)
torch.nn.init.normal_(layer.lora_B, std=0.03)
before = layer.weight.detach().clone()
delta = (2.0 * layer.lora_B.float() @ layer.lora_A.float()).detach().to(torch.bfloat16)  # alpha / rank is 2

naive = before.clone()
for _ in range(100):
    naive += delta
    naive -= delta
print(f"adding and subtracting: {(naive != before).float().mean():.1%} of the weights changed")

for _ in range(100):
    graft.fuse(layer)
    graft.unfuse(layer)
same = torch.equal(layer.weight.view(torch.int16), before.view(torch.int16))
print(f"graft: every bit is back: {same}")

graft.fuse(layer)
try:
    layer.lora_B.data.mul_(2)
    graft.unfuse(layer)
except graft.StateError as error:
    print(f"refused: {error}")
assert same
