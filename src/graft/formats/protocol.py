"""What a format is to the rest of Graft: a name, a test by content, a reader, perhaps a writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..adapter import Adapter
from ..errors import FormatError
from .source import Source

EnableLora = Sequence[bool] | Mapping[str, Sequence[bool]]


@dataclass(frozen=True)
class Options:
    """What the user says because the file does not.

    Args:
        alpha: LoRA's alpha, for formats that do not carry it.
        enable_lora: loralib's MergedLinear: which of the equal output blocks are adapted; one list, or one
            for each module by the end of its dotted name.
    """

    alpha: float | None = None
    enable_lora: EnableLora | None = None

    def refuse_unused(self, name: str, *, alpha: bool = False, enable_lora: bool = False) -> None:
        """Refuse what this format carries itself.

        Raises:
            FormatError: the option was given.
        """
        if alpha and self.alpha is not None:
            raise FormatError(f"{name} files carry alpha themselves; leave --alpha {self.alpha:g} out")
        if enable_lora and self.enable_lora is not None:
            raise FormatError(f"{name} files have no MergedLinear; leave enable_lora out")


class Format(Protocol):
    """One file format of adapters. To add one: a module with such a class, and its line in the registry."""

    @property
    def name(self) -> str: ...

    def detect(self, source: Source) -> bool:
        """Whether the content (keys, schema of the json), never the file's name, is this format's."""
        ...

    def read(self, source: Source, options: Options) -> Adapter:
        """The adapter, every tensor accounted for; names and layouts are bound to a base later."""
        ...

    def write(
        self, adapter: Adapter, path: Path, base_name: str | None, extra: Mapping[str, object]
    ) -> list[str]:
        """Write a bound adapter; return sentences about what the format cannot say and the reader must."""
        ...
