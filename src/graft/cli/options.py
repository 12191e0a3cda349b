"""Values of options, read and checked before anything else is done."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

import click

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_DTYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}


def size(text: str) -> int:
    """A number of bytes with a unit: 5GB (10⁹), 500MB, 2GiB (2³⁰), 1000000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise click.BadParameter(f"{text!r} is not a size; write it as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * unit)


def dtype(text: str) -> str:
    """A floating dtype of weights, by its torch name or its short one."""
    found = _DTYPES.get(text.removeprefix("torch.").lower())
    if found is None:
        raise click.BadParameter(f"{text!r} is not a dtype to round to; use one of: {', '.join(_DTYPES)}")
    return found


def finite(text: str) -> float:
    """A finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise click.BadParameter(f"{text!r} is not a finite number")
    return number


class FormatName(click.ParamType[str]):
    """One of the names in a table of :mod:`graft.formats`, which is asked only when it is needed.

    Importing it takes torch's seconds, and the command's help should not wait for it.
    """

    name = "format"

    def __init__(self, table: str) -> None:
        self._table = table

    def _names(self) -> list[str]:
        from .. import formats

        return list(getattr(formats, self._table))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join(self._names())}]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        names = self._names()
        if value not in names:
            self.fail(f"{value!r} is not one of: {', '.join(names)}", param, ctx)
        return value


def switches(words: Iterable[str]) -> list[bool] | dict[str, list[bool]] | None:
    """Which blocks are on: ``1,0,1`` for every module, or ``qkv=1,0,1`` for those whose name ends so."""
    named = dict(_switches(word) for word in words)
    if not named:
        return None
    if "" not in named:
        return named
    if len(named) > 1:
        raise click.BadParameter("give one list for all modules, or MODULE=LIST for each, not both")
    return named[""]


#: options that verbs share
alpha = click.option(
    "--alpha",
    type=finite,
    metavar="NUMBER",
    help="The adapter's alpha, for formats that do not carry it (loralib; DeepSpeed-Chat: lora_scaling).",
)
adapter_config = click.option(
    "--adapter-config",
    type=click.Path(path_type=Path),
    help="The adapter's configuration, when it does not lie beside the weights.",
)
component = click.option(
    "--component",
    metavar="NAME",
    help="Use only the adapter's part for this model of a diffusers pipeline: unet, text_encoder, …",
)
threads = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads that stream.  [default: two more than the cores]",
)


def _switches(word: str) -> tuple[str, list[bool]]:
    known = {"1": True, "true": True, "0": False, "false": False}
    module, _, text = word.rpartition("=")
    found = [known.get(each.strip().lower()) for each in text.split(",")]
    if None in found or True not in found:
        raise click.BadParameter(
            f"{word!r} does not switch blocks on and off; write it as 1,0,1 or qkv=1,0,1"
        )
    return module, [on is True for on in found]
