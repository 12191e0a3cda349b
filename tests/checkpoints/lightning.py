"""Genuine Lightning ``.ckpt`` directories on CPU, which Lightning's own DeepSpeed strategy refuses."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from tests.checkpoints import models


class OnCpu(DeepSpeedStrategy):
    """The same strategy, with the set-up of DDP and gloo."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        self.accelerator.setup_device(torch.device("cpu"))  # type: ignore[union-attr]
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _get_process_group_backend(self) -> str:
        return "gloo"


class Module(LightningModule):
    """A PEFT model as the attribute ``net``, and trained and frozen parts beside it."""

    def __init__(self, rank: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = models.with_peft(models.llama(), **models.PEFT)
        self.beside = nn.Linear(3, 2)
        self.teacher = nn.Linear(3, 2).requires_grad_(False)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        extra = self.beside(torch.ones(3, dtype=torch.bfloat16)).sum()
        return self.net(input_ids=batch, labels=batch).loss + 0.01 * extra

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def write(folder: Path, stage: int, world: int) -> None:
    from tests.checkpoints.write import config, oracle

    path = folder / f"lightning-{stage}-{world}.ckpt"
    strategy = OnCpu(
        accelerator=None,
        config=config(stage, {"bf16": {"enabled": True}}),
        cluster_environment=TorchElasticEnvironment(),
    )
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy=strategy, precision="bf16-true", max_steps=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip
    ids = torch.randint(0, 37, (8, 9), generator=torch.Generator().manual_seed(3))
    trainer.fit(Module(), torch.utils.data.DataLoader(list(ids), batch_size=2))  # type: ignore[arg-type]
    trainer.save_checkpoint(path)
    if trainer.global_rank == 0:
        oracle(path, folder / f"lightning-{stage}-{world}.oracle.pt")
    torch.distributed.barrier()
