"""A DCP directory as a container: tensors are put together from their chunks when they are asked for."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple, cast

import torch

from ...errors import FormatError
from ...tensors import read_json
from ..container import Opened
from .records import Record, load_records

METADATA = ".metadata"
#: what Graft says beside a checkpoint that it writes: the base's fingerprints
ABOUT = "graft_base.json"
_TRACKER = "latest_checkpointed_iteration.txt"
Offsets = tuple[int, ...]


class Chunk(NamedTuple):
    """A block of a tensor, and the bytes of a file that hold it as ``torch.save`` wrote it."""

    offsets: Offsets
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """One tensor: all of its blocks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class DistributedCheckpoint:
    """A directory with a ``.metadata`` file: torch's own, Megatron-Core's ``torch_dist``, NeMo's."""

    def holds(self, path: Path) -> bool:
        return path.is_dir() and find_folder(path) is not None

    def open(self, path: Path) -> Opened:
        folder = find_folder(path)
        assert folder is not None
        entries = read_entries(folder)
        data = sorted({chunk.file for entry in entries.values() for chunk in entry.chunks})
        folders = tuple(dict.fromkeys((folder, path, folder.parent)))
        about = folder / ABOUT
        told, files = (read_json(about), (about,)) if about.is_file() else ({}, ())
        return Opened(folder, folders, (folder / METADATA, *data, *files), "dcp", Tensors(entries), told)


def find_folder(path: Path) -> Path | None:
    """The directory with the metadata: this one, its ``weights`` (NeMo 2), or the run's latest iteration."""
    for folder in (path, path / "weights"):
        if (folder / METADATA).is_file():
            return folder
    found = sorted(p.parent for p in path.glob(f"iter_*/{METADATA}"))
    try:
        latest = (path / _TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return found[0] if len(found) == 1 else None
    name = f"iter_{int(latest):07d}" if latest.isdigit() else latest
    return next((folder for folder in found if folder.name == name), None)


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor that the metadata names; what is stored as bytes (random states, counters) is left out.

    Raises:
        FormatError: metadata that is damaged, or that names files outside the directory.
    """
    where = folder / METADATA
    metadata = load_records(where)
    try:
        stored = {
            (index.get("fqn"), index.get("offset")): info
            for index, info in cast("dict[Record, Record]", metadata.get("storage_data")).items()
        }
        return {
            name: _entry(folder, name, record, stored)
            for name, record in cast("dict[str, Record]", metadata.get("state_dict_metadata")).items()
            if record.get("size") is not None
        }
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise FormatError(f"{where} does not describe a checkpoint ({error!r}); copy it again") from None


def _entry(
    folder: Path, name: str, record: Record, stored: Mapping[tuple[str, Offsets | None], Record]
) -> Entry:
    dtype = record.get("properties").state[0]
    chunks: list[Chunk] = []
    for chunk in record.get("chunks"):
        offsets, sizes = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
        info = stored[name, offsets]
        if info.get("transform_descriptors"):
            how = ", ".join(map(str, info.get("transform_descriptors")))
            raise FormatError(f"{folder}: {name} is compressed ({how}); save it without extensions")
        inside = PurePosixPath(info.get("relative_path"))
        if inside.is_absolute() or ".." in inside.parts:
            raise FormatError(f"{folder / METADATA} names the file {inside}, outside the checkpoint")
        chunks.append(Chunk(offsets, sizes, folder / inside, info.get("offset"), info.get("length")))
    return Entry(tuple(int(n) for n in record.get("size")), dtype, tuple(chunks))


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors by name, each loaded when it is first asked for."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        self._loaded: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._loaded:
            self._loaded[name] = read_tensor(name, self.entries[name])
        return self._loaded[name]


def read_tensor(name: str, entry: Entry) -> torch.Tensor:
    """One tensor, put together from its blocks.

    Raises:
        FormatError: a block that is missing, unreadable, or of another shape.
    """
    if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.shape):
        raise FormatError(f"{name}: the checkpoint does not hold all of its blocks; a rank's part is missing")
    whole = torch.empty(entry.shape, dtype=entry.dtype)
    for chunk in entry.chunks:
        block = _load(name, chunk)
        if tuple(block.shape) != chunk.sizes:
            raise FormatError(f"{name}: {chunk.file} holds {list(block.shape)}, not {list(chunk.sizes)}")
        index = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[index] = block
    return whole


def _load(name: str, chunk: Chunk) -> torch.Tensor:
    """The block that lies at these bytes, with torch's safe loader."""
    try:
        with chunk.file.open("rb") as file:
            file.seek(chunk.start)
            data = file.read(chunk.length)
        found: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FormatError(f"{name}: {chunk.file} is missing; copy the whole checkpoint") from None
    except Exception:  # torch's text advises to load without its safeguard
        raise FormatError(f"{name}: {chunk.file} is damaged or cut short; copy it again") from None
    if not isinstance(found, torch.Tensor):
        raise FormatError(f"{name}: {chunk.file} holds a {type(found).__name__}, not a tensor")
    return found.detach()
