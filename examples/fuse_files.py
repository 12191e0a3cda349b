"""Fuse an adapter into a Hugging Face directory without loading the model, and prove the result."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import graft
from graft.fuse_files import fuse
from graft.verify_files import verify

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")

    # An adapter, as training would leave it.
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto").eval()
    graft.adapt(model, ["q_proj", "v_proj"], rank=4, alpha=8)
    for key, factor in graft.state_dict(model).items():
        if key.endswith("lora_B"):
            factor.normal_(std=0.02)
    graft.save(model, folder / "adapter")

    # From the shell: graft fuse base adapter -o fused; graft verify fused --base base --adapter adapter
    fuse(folder / "base", folder / "adapter", folder / "fused")
    report = verify(folder / "fused", folder / "base", folder / "adapter")
    print(f"proved: {report.tensors} tensors, {report.recomputed} of them recomputed")

    # The fused directory is plain: what it computes is what the fused model in memory computes.
    plain = AutoModelForCausalLM.from_pretrained(folder / "fused", dtype="auto").eval()
    tokens = torch.arange(16).unsqueeze(0)
    with torch.no_grad(), graft.fused(model):
        same = torch.equal(plain(tokens).logits, model(tokens).logits)
    print(f"logits equal those of the model fused in memory, bit for bit: {same}")
    assert same
