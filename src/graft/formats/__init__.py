"""Adapter files of every known producer ↔ :class:`graft.adapter.Adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..adapter import Adapter
from ..bind_components import only
from ..errors import FormatError
from .container import Container
from .holding import carried
from .protocol import EnableLora, Format, Options, Target, Writer, Written
from .registry import CONTAINERS, FORMATS, PIPELINES, SERVERS, WRITERS
from .source import Source, find_source

__all__ = [
    "CONTAINERS", "FORMATS", "PIPELINES", "SERVERS", "WRITERS", "Container", "Format", "Options", "Source",
    "Target", "Writer", "Written", "read", "write", "writer", "written",
]  # fmt: skip


def read(
    path: Path,
    *,
    format: str | None = None,
    alpha: float | None = None,
    config: Path | None = None,
    enable_lora: EnableLora | None = None,
    model: Mapping[str, object] | None = None,
    component: str | None = None,
) -> Adapter:
    """Read an adapter file or directory, recognised by its content.

    Args:
        path: the adapter's file or directory.
        format: read it as this format instead of asking each.
        alpha: LoRA's alpha, for formats that do not carry it (loralib; DeepSpeed-Chat's lora_scaling).
        config: the adapter's configuration, if it does not lie beside the weights.
        enable_lora: loralib's MergedLinear: which output blocks are adapted, e.g. ``[True, False, True]``,
            or such a list for each module by the end of its name.
        model: the base's ``config.json``, for formats that have names or an order of rows of their own.
        component: only the part for this model of a diffusers pipeline (``unet``, ``text_encoder``).
    Returns:
        The adapter with the names and shapes of its file; :func:`graft.bind.bind` fits it to a base.
    Raises:
        FormatError: not an adapter of a known format, or one that cannot be honoured in full.
    """
    chosen = None if format is None else _reader(format)

    def recognised(source: Source) -> bool:
        return any(known.detect(source) for known in (FORMATS if chosen is None else (chosen,)))

    source = find_source(Path(path), CONTAINERS, recognised, config)
    adapter = (chosen or _detected(source)).read(source, Options(alpha, enable_lora, model))
    adapter = replace(adapter, beside=source.beside, files=source.files)
    adapter = replace(adapter, notes=(*adapter.notes, *source.notes))
    return adapter if component is None else only(adapter, component)


def write(
    adapter: Adapter,
    path: Path,
    *,
    format: str = "peft",
    base_name: str | None = None,
    model: Mapping[str, object] | None = None,
    extra_config: Mapping[str, object] | None = None,
    accept_loss: bool = False,
) -> list[str]:
    """Write an adapter that is bound to its base.

    Args:
        adapter: a bound adapter (layouts and shapes known).
        path: the new directory (PEFT) or file (loralib).
        format: the format's name.
        base_name: the base model's name, where the format has a place for it.
        model: the base's ``config.json``, for formats that have names or an order of rows of their own.
        extra_config: further entries of the format's configuration.
        accept_loss: leave out what the format cannot hold, and say it.
    Returns:
        Sentences about what was lost or rounded, and what the files cannot say and their reader must be told.
    Raises:
        FormatError: parts of the adapter that the format cannot hold, all of them in one message.
        OutputError: the path exists or cannot be written.
    """
    target = Target(base_name, model, extra_config or {})
    return written(adapter, path, writer(format), target, accept_loss=accept_loss).notes


def written(
    adapter: Adapter, path: Path, to: Writer, target: Target, *, accept_loss: bool = False
) -> Written:
    """:func:`write` with a chosen writer; also what the files' reader must be told."""
    if adapter.flattened:
        raise FormatError(
            "only the base's names tell which parameters the adapter's names stand for (they are spelled "
            "with _ for ., or may be those of the model's authors); give the base: --base BASE"
        )
    kept, lost = carried(to, adapter, target, accept=accept_loss)
    done = to.write(kept, Path(path), target)
    return replace(done, notes=[*lost, *done.notes])


def writer(name: str) -> Writer:
    """The format of this name, to be written.

    Raises:
        FormatError: no such format, or one that is only read.
    """
    if name in WRITERS:
        return WRITERS[name]
    _reader(name)
    raise FormatError(f"format {name!r} is read only; write one of: {', '.join(WRITERS)}")


def _reader(name: str) -> Format:
    for known in FORMATS:
        if known.name == name:
            return known
    raise FormatError(f"unknown format {name!r}; use one of: {', '.join(f.name for f in FORMATS)}")


def _detected(source: Source) -> Format:
    for known in FORMATS:
        if known.detect(source):
            return known
    keys = list(source.tensors)
    sample = f"its first keys are {', '.join(keys[:3])}" if keys else "it holds no tensors"
    raise FormatError(
        f"{source.weights} is not an adapter of a known format "
        f"({', '.join(f.name for f in FORMATS)}); {sample}"
    )
