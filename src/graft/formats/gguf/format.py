"""llama.cpp's GGUF adapters in the registry.

One file: ``<tensor>.weight.lora_a`` [r, in] and ``.lora_b`` [out, r] under GGUF's names, one
``adapter.lora.alpha`` for all; the embedding's ``lora_a`` is [num, r], mixtures have all experts in one
tensor [experts, …]. scale = alpha / r of each tensor, 1 without alpha. Source: llama.cpp's
``convert_lora_to_gguf.py`` and ``llama-adapter.cpp``.
"""

from __future__ import annotations

from pathlib import Path

from ...adapter import Adapter
from ..protocol import Loss, Options, Target, Written
from ..source import Source


class GgufFormat:
    """The format's entry in the registry."""

    name = "gguf"

    def detect(self, source: Source) -> bool:
        """By the container: GGUF files hold nothing else that is read here."""
        return source.kind == "gguf"

    def read(self, source: Source, options: Options) -> Adapter:
        from . import reader

        return reader.read(source, options)

    def losses(self, adapter: Adapter, target: Target) -> list[Loss]:
        from . import writer

        return writer.losses(adapter, target)

    def write(self, adapter: Adapter, path: Path, target: Target) -> Written:
        from . import writer

        return writer.write(adapter, path, target)
