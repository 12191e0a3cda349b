"""From a loralib training script to a Hugging Face directory: fuse loralib's file into the base."""

from __future__ import annotations

import tempfile
from pathlib import Path

import loralib
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from graft.fuse_files import fuse

RANK, ALPHA = 4, 8
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")

    # What a loralib user does: exchange layers by hand, train, save the factors.
    for block in model.model.layers:
        plain = block.self_attn.q_proj
        layer = loralib.Linear(32, 32, r=RANK, lora_alpha=ALPHA, bias=False)
        layer.weight.data.copy_(plain.weight)
        torch.nn.init.normal_(layer.lora_B, std=0.02)
        block.self_attn.q_proj = layer
    torch.save(loralib.lora_state_dict(model), folder / "lora.pt")

    # From the shell: graft fuse base lora.pt -o fused --alpha 8
    report = fuse(folder / "base", folder / "lora.pt", folder / "fused", alpha=ALPHA)
    print("\n".join(report.to_dict()["notes"]))

    fused = AutoModelForCausalLM.from_pretrained(folder / "fused").eval()
    tokens = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        difference = (fused(tokens).logits - model.eval()(tokens).logits).abs().max().item()
    print(f"largest difference from loralib's own merge: {difference:.1e}")
    assert difference < 1e-5
