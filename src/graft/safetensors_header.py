"""The header of a safetensors file, read and written without touching the data.

A file is ``n`` (8 bytes, little-endian), ``n`` bytes of JSON ``{name: {dtype, shape, data_offsets}}``
with an optional ``__metadata__`` of strings, then the data, without holes or overlaps
(huggingface/safetensors, README "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from .errors import FormatError

#: safetensors' own limit on the length of a header
_LONGEST = 100_000_000
_LFS = b"version https://git-lfs"

_NAMES: dict[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "F64": "float64", "I64": "int64",
    "U64": "uint64", "C64": "complex64",
}  # fmt: skip
#: safetensors' dtype names and torch's dtypes (those that this torch has)
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)
}
CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one stored tensor lies: ``nbytes`` bytes at ``offset`` of ``file``.

    ``offset`` is −1 in pickled checkpoints (.bin), whose tensors are reached by name only.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A parsed header; ``entries`` are in the order of their data, offsets counted in the whole file."""

    raw: bytes
    entries: tuple[Entry, ...]
    metadata: dict[str, str]


def nbytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor of this shape in a safetensors file."""
    count = math.prod(shape)
    return count // 2 if CODES.get(dtype) == "F4" else count * dtype.itemsize


def read_header(path: Path) -> Header:
    """Read and validate the header of a safetensors file.

    Raises:
        FormatError: anything but a complete, consistent safetensors file, with what to do about it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            refuse_stub(path, start + f.read(len(_LFS) - 8), size)
            length = int.from_bytes(start, "little")
            if size < 8 or length > _LONGEST:
                raise FormatError(
                    f"{path} is not a safetensors file: it begins with {start!r}. Check the download"
                )
            if 8 + length > size:
                raise FormatError(
                    f"{path} is truncated: its header needs {8 + length} bytes, the file has {size}. "
                    "Download it again"
                )
            f.seek(8)
            text = f.read(length)
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error
    return _parse(path, start + text, size)


def refuse_stub(path: Path, start: bytes, size: int) -> None:
    """Refuse what is downloaded in place of a weight file.

    Raises:
        FormatError: an empty file or a Git LFS pointer.
    """
    if size == 0:
        raise FormatError(f"{path} is empty (0 bytes). Download it again")
    if start.startswith(_LFS[: len(start)]) and len(start) >= 8:
        raise FormatError(
            f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its repository, "
            "or download it again"
        )


def build_header(
    items: Iterable[tuple[str, Sequence[int], torch.dtype]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length and JSON for tensors stored in this order, padded with spaces to a multiple of 8 bytes.

    Raises:
        FormatError: a dtype that safetensors has no name for.
    """
    table: dict[str, object] = {}
    if metadata:
        table["__metadata__"] = dict(metadata)
    offset = 0
    for name, shape, dtype in items:
        if dtype not in CODES:
            raise FormatError(f"{name}: safetensors files cannot hold dtype {dtype}")
        assert name not in table, name
        end = offset + nbytes(shape, dtype)
        table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse(path: Path, raw: bytes, size: int) -> Header:
    def bad(why: str) -> FormatError:
        return FormatError(f"{path}: bad safetensors header: {why}. The file is damaged: download it again")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [k for k, _ in pairs]
            raise bad(f"the name {next(k for k in names if names.count(k) > 1)!r} occurs twice")
        return table

    try:
        table: object = json.loads(raw[8:].decode(), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise bad(f"no JSON ({error})") from None
    if not isinstance(table, dict):
        raise bad("no JSON object")
    fields = cast("dict[str, object]", table)
    meta = fields.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise bad("__metadata__ does not map strings to strings")
    try:
        entries = [_entry(path, name, value, len(raw)) for name, value in fields.items()]
    except ValueError as error:
        raise bad(str(error)) from None
    entries.sort(key=lambda e: (e.offset, e.nbytes))
    at = len(raw)
    for e in entries:
        if e.offset != at:
            kind = "overlaps another tensor" if e.offset < at else "leaves a hole before it"
            raise bad(f"tensor {e.name!r} {kind} (byte {e.offset - len(raw)} of the data)")
        at += e.nbytes
    if at > size:
        raise FormatError(
            f"{path} is truncated: its header promises {at} bytes, the file has {size}. Download it again"
        )
    if at < size:
        raise bad(f"{size - at} bytes after the last tensor")
    return Header(raw, tuple(entries), cast("dict[str, str]", meta))


def _entry(path: Path, name: str, value: object, start: int) -> Entry:
    """One validated line of the header; ValueError says what is wrong with it."""
    if not isinstance(value, dict):
        raise ValueError(f"tensor {name!r} has no description")
    fields = cast("dict[str, object]", value)
    code = fields.get("dtype")
    if code not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {code!r}, which is not known here")
    shape, span = _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if shape is None or span is None or len(span) != 2 or span[1] < span[0]:
        raise ValueError(f"tensor {name!r} has no valid shape and data_offsets")
    dtype = DTYPES[str(code)]
    if nbytes(shape, dtype) != span[1] - span[0]:
        raise ValueError(
            f"tensor {name!r}: shape {list(shape)} in {code} needs {nbytes(shape, dtype)} bytes, "
            f"data_offsets give {span[1] - span[0]}"
        )
    return Entry(name, shape, dtype, path, start + span[0], span[1] - span[0])


def _sizes(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in items):
        return None
    return tuple(cast("list[int]", items))
