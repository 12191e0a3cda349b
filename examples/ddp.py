"""DistributedDataParallel on two processes: adapt, train, export each epoch, save, fuse, unfuse, load.

    torchrun --nproc-per-node 2 examples/ddp.py

On GPUs take "nccl", move the model and the numbers to the device, and pass device_ids.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel

import graft

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank = dist.get_rank()

# 1. Adapt, then wrap: DDP has to know the factors, and it gives each replica those of the first process.
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
graft.adapt(model, "all-linear", rank=4, alpha=8, quiet=rank > 0)
ddp = DistributedDataParallel(model)

# 2. Train. Every process calls every verb, with the wrapper; the first one writes. Training does not notice.
optimizer = torch.optim.AdamW([p for p in ddp.parameters() if p.requires_grad], lr=2e-2)
numbers = torch.randint(0, 30, (4, 8), generator=torch.Generator().manual_seed(rank))
with tempfile.TemporaryDirectory() as own:
    folders = [own]
    dist.broadcast_object_list(folders, 0)
    out = Path(folders[0])
    losses: list[float] = []
    for epoch in range(2):
        for _ in range(20):
            loss = ddp(input_ids=numbers, labels=numbers).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        graft.export(ddp, out / f"epoch-{epoch}")
    graft.save(ddp, out / "adapter")

    # 3. Fuse and unfuse every replica: the exported numbers, and then every bit of the base.
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fused = graft.fuse(ddp)
    exported = transformers.LlamaForCausalLM.from_pretrained(out / "epoch-1", dtype="auto").state_dict()
    same = all(torch.equal(p, exported[name]) for name, p in model.named_parameters() if name in exported)
    graft.unfuse(ddp)
    back = all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    # 4. The saved factors go back into the running model, here after they were lost.
    with torch.no_grad():
        for p in optimizer.param_groups[0]["params"]:
            p.zero_()
    graft.load(ddp, out / "adapter", quiet=True)
    loaded = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    dist.barrier()  # the folder goes when the first process is through

if rank == 0:
    world = dist.get_world_size()
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; {fused} weights fused on {world} replicas")
    print(f"exported files hold the fused numbers: {same}; every bit is back: {back}; loaded: {loaded}")
assert same and back and loaded and losses[-1] < losses[0] - 0.3
dist.destroy_process_group()
