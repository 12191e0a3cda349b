"""DeepSpeed ZeRO-3 on two processes: adapt, train, export each epoch, fuse on the shards, unfuse.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/zero3.py

On GPUs leave DS_ACCELERATOR out and take "nccl" below.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import graft

os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a CPU operator, compiled for half a minute
deepspeed.init_distributed("gloo", verbose=False)
torch.set_num_threads(1)
rank = dist.get_rank()

config = {
    "train_micro_batch_size_per_gpu": 8,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}

# 1. Build under zero.Init: no process ever holds the whole model. Then adapt, before deepspeed.initialize.
torch.manual_seed(0)
with deepspeed.zero.Init(config_dict_or_path=config):
    model = nn.Sequential(nn.Embedding(20, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 20))
report = graft.adapt(model, ["1", "3"], rank=4, alpha=8, quiet=rank > 0)

trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-2)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

# 2. Train. Every process calls every verb; the first one writes. Export leaves the training untouched.
numbers = torch.randint(0, 19, (8,), generator=torch.Generator().manual_seed(rank))
with tempfile.TemporaryDirectory() as own:
    folders = [own]
    dist.broadcast_object_list(folders, 0)
    out = Path(folders[0])
    losses: list[float] = []
    for epoch in range(2):
        for _ in range(20):
            loss = nn.functional.cross_entropy(engine(numbers).float(), numbers + 1)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        graft.export(engine, out / f"epoch-{epoch}")

    # 3. The adapter alone, in PEFT's form, from the optimizer's fp32 masters.
    notes = graft.save(engine, out / "adapter", masters=True)

    # 4. Fuse: every process adds ΔW to its own slice. Unfuse: every bit is back.
    before = [p.ds_tensor.clone() for p in model.parameters()]
    fused = graft.fuse(engine)
    graft.export(engine, out / "fused")  # a fused model is exported as it is: the same numbers
    graft.unfuse(engine)
    back = all(torch.equal(p.ds_tensor, was) for p, was in zip(model.parameters(), before, strict=True))

    dist.barrier()
    last, while_fused = (load_file(out / name / "model.safetensors") for name in ("epoch-1", "fused"))
    same = all(torch.equal(last[name], while_fused[name]) for name in last)
    dist.barrier()  # the folder goes when the first process is through

if rank == 0:
    print(
        f"loss {losses[0]:.3f} → {losses[-1]:.3f}; {fused} weights fused on {dist.get_world_size()} processes"
    )
    print(*notes, sep="\n")
    print(f"exported while fused and unfused alike: {same}; every bit is back: {back}")
assert same and back and losses[-1] < losses[0] / 2
dist.destroy_process_group()
