"""FSDP2 on two processes: adapt, shard, train, export each epoch, save the adapter sharded, fuse, unfuse.

    torchrun --nproc-per-node 2 examples/fsdp2.py

On GPUs take "nccl" and "cuda" below.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import graft

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world,))

# 1. A model of Hugging Face, adapted, then sharded: the factors become sharded parameters like the weights.
#    Adapting after fully_shard works as well.
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
model = transformers.LlamaForCausalLM(config)
graft.adapt(model, "all-linear", rank=4, alpha=8, quiet=rank > 0)
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)


def shards() -> list[torch.Tensor]:
    return [p.to_local().clone() for p in model.parameters()]


# 2. Train. Every process calls every verb; the first one writes. Export leaves the training untouched.
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
numbers = torch.randint(0, 30, (4, 8), generator=torch.Generator().manual_seed(rank))
with tempfile.TemporaryDirectory() as own:
    folders = [own]
    dist.broadcast_object_list(folders, 0)
    out = Path(folders[0])
    losses: list[float] = []
    for epoch in range(2):
        for _ in range(10):
            loss = model(input_ids=numbers, labels=numbers).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        graft.export(model, out / f"epoch-{epoch}")

    # 3. The adapter alone: in PEFT's form, and as a sharded checkpoint that any number of processes can load.
    graft.save(model, out / "adapter")
    checkpoint.save({"adapter": graft.state_dict(model)}, checkpoint_id=str(out / "sharded"))

    # 4. Fuse: every process adds ΔW to its own shards. Unfuse: every bit is back.
    before = shards()
    fused = graft.fuse(model)
    if rank == 0:
        print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; {fused} weights fused on {world} processes")

    # 5. What was exported loads with plain transformers, and holds the fused shards' numbers.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out / "epoch-1")
    plain = dict(loaded.named_parameters())
    names = [n for n, _ in model.named_parameters() if n in plain]
    same = all(torch.equal(model.get_parameter(n).full_tensor(), plain[n]) for n in names)
    graft.unfuse(model)
    back = all(torch.equal(now, was) for now, was in zip(shards(), before, strict=True))
    dist.barrier()  # the folder goes when the first process is through

if rank == 0:
    print(f"exported files hold the fused numbers: {same}; every bit is back: {back}")
assert same and back and len(names) == len(plain) and losses[-1] < losses[0]
dist.destroy_process_group()
