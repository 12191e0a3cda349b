"""PEFT's entries in the registry."""

from __future__ import annotations

from pathlib import Path

from ...adapter import Adapter
from .. import protocol
from ..protocol import Loss, Target, Written
from ..source import Source
from . import keys, reader


class PeftFormat:
    """The format's entry in the registry."""

    name = "peft"

    def detect(self, source: Source) -> bool:
        """By content: PEFT's tensor names; with a ``peft_type`` in the config, names that resemble them."""
        if source.config is not None and "peft_type" in source.config:
            return not source.tensors or any(_resembles(text) for text in source.tensors)
        roles = {keys.parse(text).role for text in source.tensors}
        return {"A", "B"} <= roles or {"embedding_A", "embedding_B"} <= roles

    def read(self, source: Source, options: protocol.Options) -> Adapter:
        options.refuse_unused("PEFT", alpha=True, enable_lora=True)
        return reader.read(source)

    def losses(self, adapter: Adapter, target: Target) -> list[Loss]:
        from . import losses

        return losses.losses(adapter)

    def write(self, adapter: Adapter, path: Path, target: Target) -> Written:
        from . import writer

        return writer.write(adapter, path, target)


def _resembles(text: str) -> bool:
    parts = text.split(".")
    return parts[0] == "base_model" or any(part.startswith(("lora_", "trainable_tokens_")) for part in parts)


class PortablePeft:
    """The part of PEFT's format that every server loads right."""

    name = "vllm"

    def losses(self, adapter: Adapter, target: Target) -> list[Loss]:
        from . import portable

        return portable.losses(adapter)

    def write(self, adapter: Adapter, path: Path, target: Target) -> Written:
        from . import portable

        return portable.write(adapter, path, target)
