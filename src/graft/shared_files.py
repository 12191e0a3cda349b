"""safetensors files of a model that are made at full size first and then filled piece by piece.

Several processes may fill them at once, each at its own places: on one machine, or through a file system
that all of them see. The headers come last, so until then no file can be read as anything.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .safetensors_header import build_header, nbytes
from .tensors import plan_shards, raw_bytes, write_index


@dataclass(frozen=True)
class Plan:
    """Where every tensor's bytes go.

    Args:
        heads: file → its header; sizes: file → its length in bytes.
        places: tensor → its file, and the position there of its first byte.
        total: bytes of all tensors.
    """

    heads: Mapping[str, bytes]
    sizes: Mapping[str, int]
    places: Mapping[str, tuple[str, int]]
    total: int

    def prepare(self, folder: Path) -> None:
        """Make every file, without its header. A disk that has no room shows here.

        Raises:
            OSError: as the system says it.
        """
        for file, size in self.sizes.items():
            fd = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                reserve(fd, size)
            finally:
                os.close(fd)

    def finish(self, folder: Path) -> None:
        """Put the headers, and the index where there are several files; every byte is on the disk then."""
        for file, head in self.heads.items():
            fd = os.open(folder / file, os.O_WRONLY)
            try:
                write_all(fd, memoryview(head), 0)
                os.fsync(fd)
            finally:
                os.close(fd)
        if len(self.heads) > 1:
            table = {name: file for name, (file, _) in self.places.items()}
            write_index(folder, table, {"total_size": self.total})


def lay_out(
    items: Iterable[tuple[str, Sequence[int], torch.dtype]],
    *,
    max_shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Plan:
    """Files for tensors ``(name, shape, dtype)``, in this order.

    Raises:
        FormatError: a dtype that the format does not know.
    """
    by_name = {name: (name, tuple(shape), dtype) for name, shape, dtype in items}
    sizes = {name: nbytes(shape, dtype) for name, shape, dtype in by_name.values()}
    heads: dict[str, bytes] = {}
    lengths: dict[str, int] = {}
    places: dict[str, tuple[str, int]] = {}
    for file, names in plan_shards(sizes, max_shard_size).items():
        heads[file] = build_header((by_name[n] for n in names), metadata)
        at = len(heads[file])
        for name in names:
            places[name] = file, at
            at += sizes[name]
        lengths[file] = at
    return Plan(heads, lengths, places, sum(sizes.values()))


class Filler:
    """Writes this process's pieces into the files of a plan."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._plan = folder, plan
        self._open: dict[str, int] = {}

    def write(self, name: str, first: int, values: torch.Tensor) -> None:
        """The tensor's elements from flat position ``first`` on: flat, contiguous, on the CPU."""
        if not values.numel():
            return
        file, start = self._plan.places[name]
        if file not in self._open:
            self._open[file] = os.open(self._folder / file, os.O_WRONLY)
        at, view = start + first * values.element_size(), raw_bytes(values)
        write_all(self._open[file], view, at)
        start_writeback(self._open[file], at, len(view))

    def close(self, *, sync: bool) -> None:
        """Close the files; with ``sync`` what this process wrote is on the disk, or the server's, then."""
        try:
            for fd in self._open.values() if sync else ():
                os.fsync(fd)
        finally:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()


def reserve(fd: int, size: int) -> None:
    """Give the file its size and, where the file system can, its blocks: full disks show before any work.

    Not os.posix_fallocate: where the file system cannot, the C library would write the zeros itself.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        taken = libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size))
    except (OSError, AttributeError):
        taken = -1
        ctypes.set_errno(0)
    if taken != 0 and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(fd, size)


def start_writeback(fd: int, at: int, count: int) -> None:
    """Let the system (Linux) begin to move these bytes to the disk, so that fsync waits less."""
    begin = 2  # SYNC_FILE_RANGE_WRITE: start, do not wait
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).sync_file_range(fd, ctypes.c_int64(at), ctypes.c_int64(count), begin)


def write_all(fd: int, view: memoryview, at: int) -> None:
    """``os.pwrite`` until everything is written."""
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done
