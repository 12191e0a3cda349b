"""Megatron-Bridge's and NeMo's adapters in the registry.

A directory that ``torch.distributed.checkpoint`` reads, with ``<module>.adapter.linear_in.weight`` [r, in],
``.linear_out.weight`` [out, r] and DoRA's ``.weight_magnitude``; canonical LoRA has ``adapter_q`` and so on
in between. ``run_config.yaml`` beside it says ``peft.alpha`` and ``peft.dim``; scale = alpha / r of each.
"""

from __future__ import annotations

from pathlib import Path

from ...adapter import Adapter
from ..protocol import Loss, Options, Target, Written
from ..source import Source
from .names import is_adapter


class MegatronFormat:
    """The format's entry in the registry."""

    name = "megatron"

    def detect(self, source: Source) -> bool:
        """By content: a distributed checkpoint with tensors below ``adapter``."""
        return source.kind == "dcp" and any(is_adapter(name) for name in source.tensors)

    def read(self, source: Source, options: Options) -> Adapter:
        from . import reader

        return reader.read(source, options)

    def losses(self, adapter: Adapter, target: Target) -> list[Loss]:
        from . import losses

        return losses.losses(adapter, target)

    def write(self, adapter: Adapter, path: Path, target: Target) -> Written:
        from . import writer

        return writer.write(adapter, path, target)
