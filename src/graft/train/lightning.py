"""Lightning: a callback that exports the model while it trains.

It is one more of the Trainer's callbacks::

    from graft.train.lightning import ExportCallback

    Trainer(callbacks=[ExportCallback("exports/epoch-{epoch}", masters=True)], strategy="deepspeed_stage_3")
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..engines.wrappers import unwrap
from .exporter import Exporter


class ExportCallback(Exporter):
    """A callback for ``lightning.pytorch`` and ``pytorch_lightning``, whichever is imported.

    Epochs have the numbers of ``trainer.current_epoch``, from 0, as in ModelCheckpoint's names; steps are
    those of ``trainer.global_step``. ``fast_dev_run`` writes nothing. Call :func:`graft.adapt` in the
    LightningModule's ``__init__`` or ``configure_model``: before the strategy wraps it. What is done, and
    all options: :class:`graft.train.exporter.Exporter`.
    """

    _homes, _base = ("lightning.pytorch", "pytorch_lightning"), "Callback"
    _harness = True

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        unwrap(trainer.strategy.model)
        self._begin(pl_module, max(0, trainer.current_epoch - 1), trainer.global_step)
        self._armed = not trainer.fast_dev_run

    def on_train_batch_end(
        self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._after_step(pl_module, trainer.current_epoch, trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        epoch = trainer.current_epoch
        self._after_epoch(pl_module, epoch, epoch + 1, trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: Any) -> None:
        self._after_checkpoint(pl_module, trainer.current_epoch, trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self._finish(pl_module)
