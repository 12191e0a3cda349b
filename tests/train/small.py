"""What all tests of the callbacks train: a small Llama, under Lightning or the Trainer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

import graft
from tests.checkpoints import models

#: LoRA on linear layers and the embedding
TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
#: 24 sequences: three steps of four an epoch on two processes
IDS = torch.randint(0, 37, (24, 9), generator=torch.Generator().manual_seed(3))


def adapt(model: Any, how: str) -> Any:
    """Adapt by ``graft``, with dropout and a part that trains in full, or by ``peft``."""
    if how == "peft":
        return models.with_peft(model, r=3, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.1)
    torch.manual_seed(1)
    targets = {name: {"dropout": 0.0 if name == "embed_tokens" else 0.1} for name in TARGETS}
    graft.adapt(model, targets, rank=3, alpha=8, train=["model.norm"], quiet=True)
    return model


class Module(LightningModule):
    """A model as the attribute ``net``, and a part beside it that trains too.

    Args:
        late: build in ``configure_model``, where strategies shard what is built.
    """

    def __init__(self, how: str, *, late: bool = False, shard: bool = False) -> None:
        super().__init__()
        self.how, self.shard = how, shard
        self.curve: list[float] = []
        self.seen: list[torch.Tensor] = []
        self.beside = nn.Linear(3, 2)
        self.base = models.llama(dtype=torch.float32).state_dict() if late else {}
        if not late:
            self.net = adapt(models.llama(dtype=torch.float32), how)

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            net = models.llama(dtype=torch.float32)
            if hasattr(net.lm_head.weight, "ds_id"):
                _take(net, self.base)
            self.net = adapt(net, self.how)
            if self.shard:
                self._shard()

    def _shard(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        layers = [m for m in self.net.modules() if type(m).__name__ == "LlamaDecoderLayer"]
        for module in (*layers, self.net, self.beside):
            fully_shard(module, mesh=mesh)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        extra = self.beside(torch.ones(3)).sum()
        return self.net(input_ids=ids, labels=ids).loss + 0.01 * extra

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.curve.append(loss.item())
        return loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.curve.append(self.loss(batch).item())

    def on_train_epoch_end(self) -> None:
        self.seen.append(logits(self.net))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def _take(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Other numbers for a model that ``zero.Init`` spread when it was built."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0), torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])


def logits(model: nn.Module) -> torch.Tensor:
    """What the model computes now, without dropout."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found = model(input_ids=IDS[:4]).logits.float().clone()
    model.train(training)
    return found


def loader(count: int = 24) -> Any:
    return torch.utils.data.DataLoader(list(IDS[:count]), batch_size=4)  # type: ignore[arg-type]


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in IDS[:count]]


def digest(folder: Path) -> str:
    """Of all names and bytes in a folder."""
    seen = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        seen.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return seen.hexdigest()
