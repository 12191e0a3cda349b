"""Where the elements of a tensor come from: a range of a file, a mapped tensor, or bytes at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

import torch

from ..errors import FormatError
from ..tensors import raw_bytes


class OpenFile:
    """A file opened at the first read; ``read`` may be called from many threads at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._lock = Lock()

    def read(self, at: int, into: torch.Tensor) -> None:
        """Fill ``into`` (uint8, contiguous) with the bytes at ``at``.

        Raises:
            FormatError: the file became shorter since its header was read.
        """
        fd = self._open()
        view, done = raw_bytes(into), 0
        while done < len(view):
            got = os.preadv(fd, [view[done:]], at + done)
            if got == 0:
                raise FormatError(f"{self.path} became shorter while it was read; was it changed meanwhile?")
            done += got

    def _open(self) -> int:
        with self._lock:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            return self._fd

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


class Source(Protocol):
    """The elements of one stored tensor, in row-major order."""

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, first: int, into: torch.Tensor) -> None:
        """Fill ``into`` (flat, contiguous, of ``dtype``) with the elements from ``first`` on."""


@dataclass(frozen=True)
class FileSource:
    """Elements that lie in a file from byte ``offset`` on."""

    file: OpenFile
    offset: int
    dtype: torch.dtype

    def read(self, first: int, into: torch.Tensor) -> None:
        if into.numel():
            self.file.read(self.offset + first * self.dtype.itemsize, into.view(torch.uint8))


@dataclass(frozen=True)
class TensorSource:
    """Elements of a (mapped) tensor of any strides, made when first asked for."""

    make: Callable[[], torch.Tensor]
    dtype: torch.dtype

    def read(self, first: int, into: torch.Tensor) -> None:
        tensor, count = self.make(), into.numel()
        if tensor.is_contiguous() or tensor.dim() < 2:
            into.copy_(tensor.reshape(-1)[first : first + count])
            return
        width = tensor.numel() // tensor.shape[0]
        top, bottom = first // width, -(-(first + count) // width)
        into.copy_(tensor[top:bottom].reshape(-1)[first - top * width :][:count])
