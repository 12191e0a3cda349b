"""A loralib script, run by loralib and by Graft: only the import differs."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import nn


def run(library: str) -> tuple[list[float], float]:
    """Train as a loralib user does, validating after each epoch; the losses, and how far the base moved."""
    lora = import_module(library)  # import loralib as lora, or import graft.compat.loralib as lora

    torch.manual_seed(0)
    model = nn.Sequential(
        lora.Embedding(32, 16, r=2, lora_alpha=4),
        lora.MergedLinear(16, 48, r=4, lora_alpha=8, enable_lora=[True, False, True]),
        nn.GELU(),
        lora.Linear(48, 32, r=4, lora_alpha=8, lora_dropout=0.1),
    )
    lora.mark_only_lora_as_trainable(model)
    base = [p.clone() for p in model.parameters() if not p.requires_grad]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    words = torch.arange(32)
    losses: list[float] = []
    for _ in range(10):
        model.train()
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(words), words.roll(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()  # merges
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(model(words), words.roll(1)).item())
    model.train()  # unmerges
    now = [p for p in model.parameters() if not p.requires_grad]
    return losses, max((a - b).abs().max().item() for a, b in zip(base, now, strict=True))


theirs, their_drift = run("loralib")
ours, our_drift = run("graft.compat.loralib")
print("loss     ", " ".join(f"{loss:.3f}" for loss in ours))
difference = (torch.tensor(ours) - torch.tensor(theirs)).abs().max().item()
print(f"largest difference from loralib's curve: {difference:.1e}")
print(f"largest change of the base: loralib {their_drift:.1e}, Graft {our_drift:.1e}")
assert our_drift == 0.0 and difference < 1e-5
