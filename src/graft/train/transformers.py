"""Hugging Face's Trainer: a callback that exports the model while it trains.

It is one more of the Trainer's callbacks::

    from graft.train.transformers import ExportCallback

    Trainer(model, args, train_dataset=data, callbacks=[ExportCallback("exports/epoch-{epoch}")])
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..engines import masters
from .exporter import Exporter


class ExportCallback(Exporter):
    """A callback for ``transformers.Trainer``, alone or under accelerate with DDP or DeepSpeed.

    Epochs are counted when they are done, from 1, as in the Trainer's logs; steps are ``state.global_step``.
    The Trainer's ``processing_class`` is written beside the model unless ``tokenizer`` is given. What is
    done, and all options: :class:`graft.train.exporter.Exporter`.
    """

    _homes, _base = ("transformers",), "TrainerCallback"

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        optimizer: Any = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        masters.find(optimizer)  # accelerate's, around DeepSpeed's: the engine itself is not given
        if self._export_how["tokenizer"] is None and hasattr(processing_class, "save_pretrained"):
            self._export_how["tokenizer"] = processing_class
        self._begin(model, _epoch(state), state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self._after_step(model, _epoch(state), state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        epoch = _epoch(state)
        self._after_epoch(model, epoch, epoch, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self._after_checkpoint(model, _epoch(state), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        best = getattr(state, "best_global_step", None)
        if args.load_best_model_at_end and best:  # its weights are in the model now
            self._last = (math.ceil(best * float(state.epoch) / state.global_step - 1e-6), best)
        self._finish(model)


def _epoch(state: Any) -> int:
    """The epoch that is going on or has just been done, from 1: the Trainer counts in fractions."""
    return max(1, math.ceil(float(state.epoch or 0) - 1e-6))
