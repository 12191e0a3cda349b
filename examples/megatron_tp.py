"""Train an adapter over Megatron-core's tensor-parallel layers, then fuse each process's shard in place.

    torchrun --nproc-per-node 2 examples/megatron_tp.py

Runs on GPUs with NCCL, or on the CPU with gloo.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from torch import nn

import graft

warnings.simplefilter("ignore")
GPU = torch.cuda.is_available()


class Model(nn.Module):
    """Embedding → column → row → logits cut over the vocabulary."""

    def __init__(self, config: ModelParallelConfig) -> None:
        super().__init__()
        init = {"config": config, "init_method": nn.init.xavier_normal_}
        flags = {"bias": False, "skip_bias_add": True, **init}
        self.embedding = VocabParallelEmbedding(128, 64, **init)
        self.up = ColumnParallelLinear(64, 256, gather_output=False, **flags)
        self.down = RowParallelLinear(256, 64, input_is_parallel=True, **flags)
        self.output_layer = ColumnParallelLinear(64, 128, gather_output=False, **flags)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = x + self.down(torch.relu(self.up(x)[0]))[0]
        return self.output_layer(x)[0]


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return vocab_parallel_cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()


def main() -> None:
    dist.init_process_group("nccl" if GPU else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if GPU else torch.device("cpu")
    if GPU:
        torch.cuda.set_device(device)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    torch.manual_seed(0)
    config = ModelParallelConfig(
        tensor_model_parallel_size=dist.get_world_size(), use_cpu_initialization=True
    )
    model = Model(config).to(device)

    # the factors are made for the global shapes and cut as the weights are
    graft.adapt(model, ["embedding", "up", "down", "output_layer"], rank=4, quiet=dist.get_rank() > 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    ids = torch.randint(0, 128, (4, 33)).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    with tempfile.TemporaryDirectory() as folder:
        graft.save(model, Path(folder) / "adapter")  # gathered; the process of rank 0 writes
        graft.export(model, Path(folder) / "fused")  # whole weights under their own names, for one process

    model.eval()
    with torch.no_grad():
        adapted = loss_of(model, ids)
        graft.fuse(model)  # no process sends a weight or a factor
        fused = loss_of(model, ids)
        graft.unfuse(model)
    trained = ("lora_A", "lora_B")
    same = all(
        torch.equal(p, before[name]) for name, p in model.named_parameters() if not name.endswith(trained)
    )
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; fused {fused.item():.3f}")
        print(f"fused computes what the adapter did: {torch.allclose(adapted, fused, atol=1e-4)}; "
              f"every bit is back: {same}")  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
