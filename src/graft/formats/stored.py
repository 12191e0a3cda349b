"""One tensor of a checkpoint that is gathered only when it is asked for, whole or a range at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

#: adapters up to this size stay in memory; larger ones lie in an unlinked temporary file
SPOOL = 16 << 20


class Piece(NamedTuple):
    """``length`` elements of a flat tensor from ``start`` on."""

    flat: torch.Tensor
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A named tensor, as pieces that follow each other in row-major order.

    Args:
        shape: of the whole.
        dtype: of the elements as they are handed out.
        pieces: makes the pieces, views of mapped files; their counts add up to the shape's.
        trained: whether the optimizer held it; None where the file does not say.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Sequence[Piece]]
    trained: bool | None = None

    @classmethod
    def of(
        cls, tensor: torch.Tensor, *, trained: bool | None = None, dtype: torch.dtype | None = None
    ) -> Stored:
        """A whole tensor, read as ``dtype`` (its own if None)."""
        piece = Piece(tensor.detach().reshape(-1), 0, tensor.numel())
        return cls(tuple(tensor.shape), dtype or tensor.dtype, lambda: (piece,), trained)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, first: int, into: torch.Tensor) -> None:
        """Fill the flat ``into`` with the elements from ``first`` on."""
        at, done, end = 0, 0, into.numel()
        for flat, start, count in self.pieces():
            skip = max(first + done - at, 0)
            take = min(count - skip, end - done)
            if take > 0:
                into[done : done + take].copy_(flat[start + skip : start + skip + take])
                done += take
            at += count
        assert done == end, (first, end, self.shape)

    def tensor(self) -> torch.Tensor:
        """The whole: a view of the mapped file where it lies there in one piece, else a copy."""
        pieces = self.pieces()
        if len(pieces) == 1 and pieces[0].flat.dtype == self.dtype:
            flat, start, count = pieces[0]
            return flat[start : start + count].view(self.shape)
        whole = torch.empty(self.numel, dtype=self.dtype)
        self.read(0, whole)
        return whole.view(self.shape)


def gather(stored: Mapping[str, Stored]) -> dict[str, torch.Tensor]:
    """All of them as tensors; above 16 MB in a temporary file, so that they need no anonymous memory."""
    sizes = {name: -(-one.numel * one.dtype.itemsize // 64) * 64 for name, one in stored.items()}
    if sum(sizes.values()) <= SPOOL:
        return {name: one.tensor() for name, one in stored.items()}
    data = _spool(sum(sizes.values()))
    found: dict[str, torch.Tensor] = {}
    at = 0
    for name, one in stored.items():
        flat = data[at : at + one.numel * one.dtype.itemsize].view(one.dtype)
        one.read(0, flat)
        found[name] = flat.view(one.shape)
        at += sizes[name]
    return found


def _spool(size: int) -> torch.Tensor:
    """``size`` bytes mapped from a file that has no name any more."""
    import tempfile

    with tempfile.NamedTemporaryFile(prefix="graft-") as file:
        file.truncate(size)
        storage = torch.UntypedStorage.from_file(file.name, True, size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportArgumentType, reportCallIssue]
