"""Reading one weight file: mapped where the file allows, so that nothing is in memory until it is used."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from .errors import FormatError
from .pickled import load_tensors
from .safetensors_header import Entry, read_header

#: how torch.save's files begin: a zip, or a bare pickle of protocol 2 and later
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def load_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one weight file, mapped (file-backed; do not write to them).

    Raises:
        FormatError: a missing, empty, truncated or damaged file, a Git LFS pointer, a pickle that is not
            a plain dict of tensors.
    """
    path = Path(path)
    if path.is_dir():
        raise FormatError(f"{path} is a directory; name a weight file")
    if not is_safetensors(path):
        return load_tensors(path)
    return map_entries(path, read_header(path).entries)


def map_entries(path: Path, entries: Iterable[Entry]) -> dict[str, torch.Tensor]:
    """Tensors that lie as plain bytes in a file of any container, mapped; all lie inside the file."""
    storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    data = torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return {entry.name: _mapped(data, entry) for entry in entries}


def metadata(path: Path) -> dict[str, str]:
    """The ``__metadata__`` strings of a safetensors file; ``{}`` for other files.

    Raises:
        FormatError: the file is damaged.
    """
    path = Path(path)
    return dict(read_header(path).metadata) if is_safetensors(path) else {}


def is_safetensors(path: Path) -> bool:
    """By content: the header's brace follows its length. By name where the file begins as nothing known."""
    try:
        with path.open("rb") as f:
            start = f.read(9)
    except OSError:
        start = b""
    if start[8:] == b"{":
        return True
    return path.suffix == ".safetensors" and not start.startswith(_PICKLES)


def _mapped(data: torch.Tensor, entry: Entry) -> torch.Tensor:
    """The entry as a view of the mapped file; a copy only where its data lie unaligned."""
    part = data[entry.offset : entry.offset + entry.nbytes]
    if entry.offset % entry.dtype.itemsize:
        part = part.clone()
    shape = entry.shape
    if part.numel() != math.prod(shape) * entry.dtype.itemsize:
        shape = (*shape[:-1], shape[-1] // 2)  # F4: torch counts pairs
    return part.view(entry.dtype).view(shape) if part.numel() else torch.empty(shape, dtype=entry.dtype)
