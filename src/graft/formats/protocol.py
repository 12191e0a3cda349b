"""What a format is to the rest of Graft: a name, a test by content, a reader, perhaps a writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from ..adapter import Adapter
from ..errors import FormatError
from .source import Source

EnableLora = Sequence[bool] | Mapping[str, Sequence[bool]]


@dataclass(frozen=True)
class Options:
    """What a reader is told because the file does not say it.

    Args:
        alpha: LoRA's alpha, for formats that do not carry it.
        enable_lora: loralib's MergedLinear: which of the equal output blocks are adapted; one list, or one
            for each module by the end of its dotted name.
        model: the base's ``config.json``, for formats whose names or order of rows depend on it; None
            where no base is given, and then names stay as the file has them as far as that goes.
    """

    alpha: float | None = None
    enable_lora: EnableLora | None = None
    model: Mapping[str, object] | None = None

    def refuse_unused(self, name: str, *, alpha: bool = False, enable_lora: bool = False) -> None:
        """Refuse what this format carries itself.

        Raises:
            FormatError: the option was given.
        """
        if alpha and self.alpha is not None:
            raise FormatError(f"{name} files carry alpha themselves; leave --alpha {self.alpha:g} out")
        if enable_lora and self.enable_lora is not None:
            raise FormatError(f"{name} files have no MergedLinear; leave enable_lora out")

    def alpha_for(self, name: str, where: object, called: str) -> float:
        """Alpha, which this format does not carry.

        Raises:
            FormatError: it is not given, or not positive.
        """
        if self.alpha is None:
            raise FormatError(
                f"{where} is {name}'s, whose files do not carry alpha; give the {called} used in "
                "training with --alpha (alpha= in Python)"
            )
        if not self.alpha > 0:
            raise FormatError(f"alpha must be positive, got {self.alpha:g}")
        return self.alpha


@dataclass(frozen=True)
class Target:
    """What a writer is told beside the adapter.

    Args:
        base_name: the base model's name, where the format has a place for it.
        model: the base's ``config.json``; None if no base is given.
        extra: further entries of the format's configuration.
    """

    base_name: str | None = None
    model: Mapping[str, object] | None = None
    extra: Mapping[str, object] = field(default_factory=dict[str, object])


Part = Literal["site", "magnitude", "replace", "shift", "rows"]


@dataclass(frozen=True)
class Loss:
    """A part of an adapter that a format cannot hold.

    Args:
        part: what is left out if the user accepts it: a whole site, DoRA's magnitude alone (the site stays,
            as plain LoRA), a full tensor, a change of a bias, trained rows.
        name: the parameter.
        why: the reason, without the name.
    """

    part: Part
    name: str
    why: str


@dataclass(frozen=True)
class Written:
    """What was written, for whoever reads it.

    Args:
        notes: sentences about what the files cannot say, and what was rounded.
        needs: what the files' reader must be told: keyword arguments of :func:`graft.formats.read`.
    """

    notes: list[str] = field(default_factory=list[str])
    needs: Mapping[str, object] = field(default_factory=dict[str, object])


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


@runtime_checkable
class Writer(Protocol):
    """A format that can be written too."""

    @property
    def name(self) -> str: ...

    def losses(self, adapter: Adapter, target: Target) -> list[Loss]:
        """All parts of a bound adapter that the format cannot hold: refused, or left out if accepted."""
        ...

    def write(self, adapter: Adapter, path: Path, target: Target) -> Written:
        """Write a bound adapter that has no losses to ``path``, whole or not at all.

        Raises:
            OutputError: the path exists or cannot be written.
        """
        ...
