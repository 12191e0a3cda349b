"""GGUF files of adapters, as a container.

Layout and keys: the GGUF specification and llama.cpp's ``llama-adapter.cpp``. The ``gguf`` package reads the
header; only float tensors are mapped.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from ...errors import FormatError
from ...mapped import map_entries
from ...safetensors_header import Entry
from ..container import Opened, begins
from ..ledger import listed

if TYPE_CHECKING:
    from gguf import GGUFReader

ALPHA = "adapter.lora.alpha"
ARCHITECTURE = "general.architecture"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KEPT = ("general.", "adapter.", "graft.")


class GgufFile:
    """A GGUF file that holds a LoRA adapter."""

    def holds(self, path: Path) -> bool:
        return path.is_file() and begins(path, 4) == b"GGUF"

    def open(self, path: Path) -> Opened:
        package = import_gguf(path)
        try:
            reader: GGUFReader = package.GGUFReader(path)
            fields = {
                name: field.contents() for name, field in reader.fields.items() if name.startswith(_KEPT)
            }
        except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError) as error:
            raise FormatError(f"{path} is not a readable GGUF file: {error}; download it again") from None
        _refuse_others(path, reader, fields)
        return Opened(
            path, (path.parent,), (path,), "gguf", map_entries(path, _entries(path, reader)), fields
        )


def import_gguf(where: object) -> ModuleType:
    """The ``gguf`` package.

    Raises:
        FormatError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise FormatError(f"{where} needs the gguf package: pip install gguf") from None
    return gguf


def _refuse_others(path: Path, reader: GGUFReader, fields: dict[str, object]) -> None:
    """Everything in GGUF that is no LoRA adapter.

    Raises:
        FormatError: a model, another kind of adapter, quantised tensors, another byte order.
    """
    if reader.byte_order != "I":
        raise FormatError(f"{path} has another byte order than this machine; convert it on one that has it")
    kind = fields.get("general.type", "model")
    if kind != "adapter":
        raise FormatError(f"{path} is a GGUF file of type {kind!r}, not an adapter; name the adapter's file")
    if fields.get("adapter.type") != "lora":
        raise FormatError(
            f"{path} holds an adapter of type {fields.get('adapter.type')!r}; only 'lora' is read"
        )
    if fields.get("adapter.alora.invocation_tokens"):
        raise FormatError(
            f"{path} is an activated LoRA (aLoRA), which works only after certain tokens, so no fused weight "
            "equals it"
        )
    odd = {t.name: t.tensor_type.name for t in reader.tensors if t.tensor_type.name not in _DTYPES}
    if odd:
        raise FormatError(
            f"{path} has tensors of types {', '.join(sorted(set(odd.values())))} ({listed(odd, 3)}); F32, "
            "F16 and BF16 are read. Convert the adapter again with --outtype f32"
        )


def _entries(path: Path, reader: GGUFReader) -> list[Entry]:
    """Where each tensor lies. ggml counts axes from the innermost, torch from the outermost.

    Raises:
        FormatError: the file ends before a tensor does.
    """
    size = path.stat().st_size
    entries: list[Entry] = []
    for one in reader.tensors:
        shape = tuple(int(n) for n in reversed(one.shape.tolist()))
        offset, count = int(one.data_offset), int(one.n_bytes)
        if offset + count > size:
            raise FormatError(f"{path} ends before its tensor {one.name}; it is truncated, download it again")
        entries.append(Entry(one.name, shape, _DTYPES[one.tensor_type.name], path, offset, count))
    return entries
