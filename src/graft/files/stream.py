"""Chunks through threads: each reads, computes, hashes and writes its own, so that all three overlap."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Condition, Event, Lock, Thread

import torch

from ..shared_files import reserve, write_all
from .shards import CHUNK, Shard

_BLOCK = 4096
#: may not be honoured by a file system; then plain writes do the same
_NOT_HERE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)

#: takes a finished chunk: shard, byte offset, bytes (valid during the call only)
Sink = Callable[[Shard, int, torch.Tensor, memoryview], None]
Progress = Callable[[int, int], None]


def workers(threads: int | None) -> int:
    """How many threads stream: two more than compute, so that some may wait for the disk."""
    if threads is not None:
        return max(1, threads)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, count + 2)


def stream(
    shards: list[Shard],
    sink: Sink,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    chunk: int = CHUNK,
) -> None:
    """Fill every chunk of every shard, once, and hand it to ``sink`` (called from several threads).

    The first error in any thread stops all and is raised here.
    """
    total = sum(s.size for s in shards)
    state = _State(_jobs(shards, chunk), total)
    team = [Thread(target=state.work, args=(sink, chunk), daemon=True) for _ in range(workers(threads))]
    try:
        for one in team:
            one.start()
        for one in team:
            while one.is_alive():
                one.join(0.05)
                if progress is not None:
                    progress(state.done, total)
    finally:
        # An interrupt must not leave threads that write into a directory which is being removed.
        state.finish()
    if state.error is not None:
        raise state.error
    if progress is not None:
        progress(total, total)


def _jobs(shards: list[Shard], chunk: int) -> Iterator[tuple[Shard, int]]:
    for shard in shards:
        for n in range(shard.chunks(chunk)):
            yield shard, n * chunk


class _State:
    def __init__(self, jobs: Iterator[tuple[Shard, int]], total: int) -> None:
        self._jobs, self._lock = jobs, Lock()
        self.done, self.total = 0, total
        self.error: BaseException | None = None
        self.stop = Event()
        self._idle, self._running = Condition(), 0

    def finish(self) -> None:
        """Stop, and wait for the threads in work; one that begins later finds nothing to do."""
        with self._idle:
            self.stop.set()
            while self._running:
                self._idle.wait()

    def work(self, sink: Sink, chunk: int) -> None:
        """One thread: take the next chunk until none is left."""
        with self._idle:
            if self.stop.is_set():
                return
            self._running += 1
        try:
            self._loop(sink, chunk)
        except BaseException as error:
            with self._lock:
                self.error = self.error or error
            self.stop.set()
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def _loop(self, sink: Sink, chunk: int) -> None:
        # Page-aligned, so that a file system may take the bytes without copying them.
        buffer = mmap.mmap(-1, chunk)
        bytes_ = torch.frombuffer(buffer, dtype=torch.uint8)
        view = memoryview(buffer)
        while not self.stop.is_set():
            with self._lock:
                job = next(self._jobs, None)
            if job is None:
                return
            shard, at = job
            count = min(chunk, shard.size - at)
            before, after = shard.fill(bytes_[:count], at)
            sink(shard, at, bytes_[:count], view[:count])
            with self._lock:
                shard.read += before
                shard.written += after
                self.done += count


class Writer:
    """Writes chunks to their files, past the page cache where the file system allows it."""

    def __init__(self, folder: Path, direct: bool = True) -> None:
        self._folder, self._lock = folder, Lock()
        self._files: dict[str, tuple[int, int]] = {}
        self._left: dict[str, int] = {}
        self.direct = direct and hasattr(os, "O_DIRECT")

    def __call__(self, shard: Shard, at: int, data: torch.Tensor, view: memoryview) -> None:
        plain, direct = self._open(shard)
        whole = len(view) - len(view) % _BLOCK if direct >= 0 and self.direct else 0
        if whole:
            try:
                write_all(direct, view[:whole], at)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                self.direct, whole = False, 0
        if whole < len(view):
            write_all(plain, view[whole:], at + whole)
        with self._lock:
            self._left[shard.name] -= len(view)
            if not self._left[shard.name]:
                self._close(shard.name)

    def _open(self, shard: Shard) -> tuple[int, int]:
        with self._lock:
            if shard.name not in self._files:
                path = self._folder / shard.name
                plain = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                self._files[shard.name] = (plain, self._open_direct(path))
                self._left[shard.name] = shard.size
                reserve(plain, shard.size)
            return self._files[shard.name]

    def _open_direct(self, path: Path) -> int:
        try:
            return os.open(path, os.O_WRONLY | os.O_DIRECT) if self.direct else -1
        except OSError:
            self.direct = False
            return -1

    def _close(self, name: str) -> None:
        plain, direct = self._files.pop(name)
        os.fsync(plain)
        os.close(plain)
        if direct >= 0:
            os.close(direct)

    def close(self) -> None:
        """Close what an error left open."""
        for plain, direct in self._files.values():
            os.close(plain)
            if direct >= 0:
                os.close(direct)
        self._files.clear()
