"""How one tensor is cut over a process group along one axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..layout import Span

_MARK = "graft_split"


@dataclass(frozen=True, eq=False)
class Split:
    """A tensor cut into ``stride`` bands along ``axis``, each band cut evenly over ``group``.

    With stride 2 (a gated layer's ``[gate; up]``) a process holds its part of the gate, then its part of
    the other half: the shards one after another are not the weight. ``axis`` None: replicated.

    ``users`` is a group whose processes hold this part alike and put it to different use: what one of them
    computes for its gradient is a share of it. None where each computes all of it, or where the branch of
    the layer sees to it.
    """

    group: Any
    axis: int | None
    stride: int = 1
    users: Any = None

    @property
    def size(self) -> int:
        return 1 if self.group is None else int(self.group.size())

    @property
    def rank(self) -> int:
        return 0 if self.group is None else int(self.group.rank())

    @property
    def spread(self) -> bool:
        """Whether a process holds less than the whole."""
        return self.axis is not None and self.size > 1

    def whole_shape(self, local: Sequence[int]) -> tuple[int, ...]:
        """The global shape for a process's own."""
        shape = list(local)
        if self.axis is not None:
            shape[self.axis] *= self.size
        return tuple(shape)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's part of a whole tensor, as a new one."""
        if not self.spread:
            return whole
        assert self.axis is not None
        pieces = whole.chunk(self.stride * self.size, dim=self.axis)
        return torch.cat(pieces[self.rank :: self.size], dim=self.axis)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor from every process's part, in the order of the group."""
        if not self.spread:
            return parts[0]
        assert self.axis is not None
        bands = [p.chunk(self.stride, dim=self.axis) for p in parts]
        return torch.cat([b[s] for s in range(self.stride) for b in bands], dim=self.axis)

    def spans(self, local: Sequence[int]) -> list[tuple[Span, Span]]:
        """For each band held here: its range along ``axis`` in the local tensor and in the whole one."""
        assert self.axis is not None
        n = local[self.axis] // self.stride
        place = [(s * self.size + self.rank) * n for s in range(self.stride)]
        return [((s * n, (s + 1) * n), (p, p + n)) for s, p in enumerate(place)]


def mark(tensor: torch.Tensor, split: Split) -> None:
    """Remember on a parameter how it is cut."""
    setattr(tensor, _MARK, split)


def split_of(tensor: torch.Tensor) -> Split | None:
    """What :func:`mark` remembered."""
    return getattr(tensor, _MARK, None)
