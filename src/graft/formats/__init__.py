"""Adapter files of every known producer ↔ :class:`graft.adapter.Adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..adapter import Adapter
from ..errors import FormatError
from .graft_states import GraftFormat
from .loralib import LoralibFormat
from .peft import PeftFormat
from .protocol import EnableLora, Format, Options
from .source import Source, open_source, weight_files

__all__ = ["FORMATS", "Format", "Options", "Source", "read", "weight_files", "write"]

#: every known format, in the order in which detection asks them
FORMATS: tuple[Format, ...] = (GraftFormat(), PeftFormat(), LoralibFormat())


def read(
    path: Path,
    *,
    format: str | None = None,
    alpha: float | None = None,
    config: Path | None = None,
    enable_lora: EnableLora | None = None,
) -> Adapter:
    """Read an adapter file or directory, recognised by its content.

    Args:
        path: the adapter's file or directory.
        format: read it as this format instead of asking each.
        alpha: LoRA's alpha, for formats that do not carry it (loralib).
        config: the adapter's json, if it does not lie beside the weights.
        enable_lora: loralib's MergedLinear: which output blocks are adapted, e.g. ``[True, False, True]``,
            or such a list for each module by the end of its name.
    Returns:
        The adapter with the names and shapes of its file; :func:`graft.bind.bind` fits it to a base.
    Raises:
        FormatError: not an adapter of a known format, or one that cannot be honoured in full.
    """
    source = open_source(Path(path), config)
    options = Options(alpha, enable_lora)
    adapter = _choose(source, format).read(source, options)
    return replace(adapter, beside=source.beside, notes=(*adapter.notes, *source.notes))


def write(
    adapter: Adapter,
    path: Path,
    *,
    format: str = "peft",
    base_name: str | None = None,
    extra_config: Mapping[str, object] | None = None,
) -> list[str]:
    """Write an adapter that is bound to its base.

    Args:
        adapter: a bound adapter (layouts and shapes known).
        path: the new directory (PEFT) or file (loralib).
        format: the format's name.
        base_name: the base model's name, where the format has a place for it.
        extra_config: further entries of the format's configuration.
    Returns:
        Sentences about what the files cannot say and their reader must be told.
    Raises:
        FormatError: a part of the adapter that the format cannot hold.
        OutputError: the path exists or cannot be written.
    """
    return by_name(format).write(adapter, Path(path), base_name, extra_config or {})


def by_name(name: str) -> Format:
    """The format of this name.

    Raises:
        FormatError: no such format.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    raise FormatError(f"unknown format {name!r}; use one of: {', '.join(f.name for f in FORMATS)}")


def _choose(source: Source, name: str | None) -> Format:
    if name is not None:
        return by_name(name)
    for known in FORMATS:
        if known.detect(source):
            return known
    keys = list(source.tensors)
    sample = f"its first keys are {', '.join(keys[:3])}" if keys else "it holds no tensors"
    raise FormatError(
        f"{source.weights} is not an adapter of a known format "
        f"({', '.join(f.name for f in FORMATS)}); {sample}"
    )
