"""Adapt a small transformer, train it, save the adapter, and load it into a fresh copy of the base."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

import graft

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
model = nn.Sequential(nn.Embedding(20, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 20))
base = copy.deepcopy(model)

# The task: read a sequence of numbers and say each number plus one.
numbers = torch.randint(0, 19, (64, 8))
graft.adapt(model, ["linear1", "linear2"], rank=4, alpha=8, train=["2"])

optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses: list[float] = []
for _ in range(40):
    loss = nn.functional.cross_entropy(model(numbers).flatten(0, 1), (numbers + 1).flatten())
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")

with tempfile.TemporaryDirectory() as folder:
    adapter = Path(folder) / "adapter"
    graft.save(model, adapter)
    size = sum(p.stat().st_size for p in adapter.iterdir())
    print(f"adapter: {size} bytes, {len(graft.state_dict(model))} factors")

    graft.load(base, adapter)
    same = torch.equal(base(numbers), model(numbers))
    print(f"the base with the loaded adapter computes the same: {same}")

graft.unadapt(base)
assert same and losses[-1] < losses[0] / 2
