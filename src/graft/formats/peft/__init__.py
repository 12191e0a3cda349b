"""PEFT (Hugging Face): ``adapter_config.json`` + ``adapter_model.safetensors`` or ``.bin``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...adapter import Adapter
from .. import protocol
from ..source import Source
from . import keys, reader


class PeftFormat:
    """The format's entry in the registry."""

    name = "peft"

    def detect(self, source: Source) -> bool:
        """By content: a config with ``peft_type``, or PEFT's tensor names."""
        if source.config is not None and "peft_type" in source.config:
            return True
        roles = {keys.parse(text).role for text in source.tensors}
        return {"A", "B"} <= roles or {"embedding_A", "embedding_B"} <= roles

    def read(self, source: Source, options: protocol.Options) -> Adapter:
        options.refuse_unused("PEFT", alpha=True, enable_lora=True)
        return reader.read(source)

    def write(
        self, adapter: Adapter, path: Path, base_name: str | None, extra: Mapping[str, object]
    ) -> list[str]:
        from . import writer

        return writer.write(adapter, path, base_name, extra)
