"""Where a parameter's elements lie in the ranks' flat buffers.

Stage 3 splits each parameter: rank r of n holds elements ``[r·p, (r+1)·p)``, ``p = ceil(numel / n)``, and on
every rank the parameters follow each other. Stages 1 and 2 split each group's flat buffer: the ranks' parts
follow each other, the parameters in them, and one may lie on two ranks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch

from ...errors import FormatError
from ..stored import Piece, Stored
from .states import ModelStates, OptimizerStates


def stage_3(model: ModelStates, ranks: Sequence[OptimizerStates]) -> dict[str, Stored]:
    """The trained parameters.

    Raises:
        FormatError: the shapes do not add up to the ranks' buffers.
    """
    rows = [_Row(rank.flats) for rank in ranks]
    found: dict[str, Stored] = {}
    at, world = 0, len(ranks)
    for shapes in model.shapes or ():
        for name, shape in shapes.items():
            count = math.prod(shape)
            part = -(-count // world)
            found[name] = _split(rows, at, part, shape)
            at += part
    for rank, row in zip(ranks, rows, strict=True):
        if row.total != at:
            raise _unequal(model, rank, at, row.total)
    return found


def stage_2(model: ModelStates, ranks: Sequence[OptimizerStates]) -> dict[str, Stored]:
    """The trained parameters of stages 1 and 2 (BF16_Optimizer's too).

    Raises:
        FormatError: the shapes do not add up to the ranks' buffers.
    """
    found: dict[str, Stored] = {}
    groups = model.shapes or ()
    if any(len(rank.flats) != len(groups) for rank in ranks):
        raise _unequal(model, ranks[0], len(groups), len(ranks[0].flats), "groups")
    for index, shapes in enumerate(groups):
        row = _Row([rank.flats[index] for rank in ranks])
        gaps = ranks[0].gaps[index] if ranks[0].gaps is not None else (0,) * len(shapes)
        if len(gaps) != len(shapes):
            raise _unequal(model, ranks[0], len(shapes), len(gaps), f"parameters in group {index}")
        at = end = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            found[name] = _one(row, at, shape)
            end = at + math.prod(shape)
            at = end + gap
        # the end is padded to a multiple of 2 · ranks, and the padding may have been left out of the file
        step = 2 * len(ranks)
        if not (end <= row.total <= -(-at // step) * step):
            raise _unequal(model, ranks[0], end, row.total)
    return found


def frozen(first: ModelStates, models: Sequence[ModelStates], sharded: bool) -> dict[str, Stored]:
    """Parameters that are not trained, where their values are in the files."""
    found: dict[str, Stored] = {}
    for name, shape in first.frozen.items():
        held = [model.fragments[name].reshape(-1) for model in models if name in model.fragments]
        if len(held) == len(models) and (sharded or len(held) == 1):
            row = _Row(held)
            if row.total >= math.prod(shape):
                found[name] = _one(row, 0, shape, trained=False)
    return found


def buffer(tensor: torch.Tensor) -> Stored:
    """A buffer as DeepSpeed hands it out: floating ones in fp32."""
    return Stored.of(tensor, trained=False, dtype=torch.float32 if tensor.is_floating_point() else None)


class _Row:
    """Flat tensors that follow each other."""

    def __init__(self, flats: Sequence[torch.Tensor]) -> None:
        self.flats = [flat.detach() for flat in flats]
        self.ends = list(accumulate(flat.numel() for flat in self.flats))
        self.total = self.ends[-1] if self.ends else 0
        self.dtype = self.flats[0].dtype if self.flats else torch.float32

    def cut(self, start: int, count: int) -> list[Piece]:
        pieces: list[Piece] = []
        index = bisect_right(self.ends, start)
        while count > 0:
            first = start - (self.ends[index - 1] if index else 0)
            take = min(count, self.ends[index] - start)
            pieces.append(Piece(self.flats[index], first, take))
            start, count, index = start + take, count - take, index + 1
        return pieces


def _one(row: _Row, at: int, shape: tuple[int, ...], trained: bool = True) -> Stored:
    return Stored(shape, row.dtype, lambda: row.cut(at, math.prod(shape)), trained)


def _split(rows: list[_Row], at: int, part: int, shape: tuple[int, ...]) -> Stored:
    def pieces() -> list[Piece]:
        left = math.prod(shape)
        found: list[Piece] = []
        for row in rows:
            found += row.cut(at, min(part, left))
            left -= min(part, left)
        return found

    return Stored(shape, rows[0].dtype, pieces, True)


def _unequal(
    model: ModelStates, rank: OptimizerStates, want: int, got: int, what: str = "elements"
) -> FormatError:
    return FormatError(
        f"{rank.path} holds {got} {what} of trained parameters, the shapes in {model.path.name} need {want}: "
        "the files are of two models or runs, or parameters were offloaded to NVMe; copy the checkpoint again"
    )
