"""How a stored weight reads as a stack of matrices ``M[g, o, i]``.

The law that everything here serves::

    M = layout.view(W)                       a torch view of the stored weight, no copy
    M[g] += scale · B[g] · A[g]              A[g] is [r, i], B[g] is [o, r]

Both factors are kept 2-D: ``A`` is ``[(n r), i]`` and ``B`` is ``[(n o), r]`` with n the number of
enabled groups, which is loralib's storage.

Every stored weight is also a row-major matrix ``S[R, C]`` (its first axes joined, its last axes
joined), and each M[g] is a rectangle of S, possibly transposed. So ΔW is a sum of rectangles
``left @ right``: see :class:`Piece`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import LayoutError

Span = tuple[int, int]

# pattern → (axes of the stored matrix that are joined into its rows, group axis, transposed)
#   group axis "rows" / "cols": the groups cut S into equal bands of rows / columns
_PATTERNS: dict[str, tuple[int, str | None, bool]] = {
    "o i": (1, None, False),
    "i o": (1, None, True),
    "(g o) i": (1, "rows", False),
    "i (g o)": (1, "cols", True),
    "(g i) o": (1, "rows", True),
    "g o i": (2, "rows", False),
    "g i o": (2, "rows", True),
}


@dataclass(frozen=True)
class Piece:
    """One group's rectangle ``S[rows, cols]`` of the stored matrix; transposed when S holds M[g]ᵀ."""

    index: int
    rows: tuple[int, int]
    cols: tuple[int, int]
    transposed: bool


@dataclass(frozen=True)
class Layout:
    """A stored weight read as ``M[g, o, i]``.

    Args:
        pattern: one of ``o i`` (Linear, Conv), ``i o`` (Embedding, GPT-2 Conv1D), ``(g o) i`` (fused
            q/k/v, grouped conv), ``i (g o)`` (GPT-2's fused q/k/v), ``(g i) o`` (transposed conv),
            ``g o i`` and ``g i o`` (packed experts). Axes after the named ones join the last name.
        groups: the number g of blocks.
        only: the groups that are adapted, in the order of the factors; all when None
            (``MergedLinear``'s ``enable_lora=[True, False, True]`` is ``only=(0, 2)``).
        matrix: reads the weight as this 2-D shape instead of its own (loralib's convolutions store
            ΔW as ``[out//groups·k, in·k]``).
    Raises:
        LayoutError: an unknown pattern, or groups that do not exist.
    """

    pattern: str = "o i"
    groups: int = 1
    only: tuple[int, ...] | None = None
    matrix: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.pattern not in _PATTERNS:
            raise LayoutError(
                f"unknown layout pattern {self.pattern!r}; use one of: {', '.join(map(repr, _PATTERNS))}"
            )
        if _PATTERNS[self.pattern][1] is None and self.groups != 1:
            raise LayoutError(f"layout {self.pattern!r} has one group, got groups={self.groups}")
        if self.groups < 1:
            raise LayoutError(f"layout {self.pattern!r} needs groups ≥ 1, got groups={self.groups}")
        if self.only is not None:
            bad = [g for g in self.only if not 0 <= g < self.groups]
            if bad or not self.only or len(set(self.only)) != len(self.only):
                raise LayoutError(
                    f"only={self.only} must name distinct groups between 0 and {self.groups - 1}"
                )

    @property
    def enabled(self) -> tuple[int, ...]:
        """Indices of the adapted groups, in the order in which the factors store them."""
        return tuple(range(self.groups)) if self.only is None else self.only

    def stored(self, shape: Sequence[int]) -> tuple[int, int]:
        """Shape ``(R, C)`` of the stored matrix S for a weight of this shape.

        Raises:
            LayoutError: the shape cannot be read with this layout.
        """
        shape = tuple(int(n) for n in shape)
        joined, axis, _ = _PATTERNS[self.pattern]
        if len(shape) < joined + 1:
            raise LayoutError(f"layout {self.pattern!r} needs {joined + 1} or more axes, got shape {shape}")
        if joined == 2 and shape[0] != self.groups:
            raise LayoutError(
                f"layout {self.pattern!r} with groups={self.groups} does not fit shape {shape}: "
                f"its first axis has {shape[0]}"
            )
        rows, cols = math.prod(shape[:joined]), math.prod(shape[joined:])
        if self.matrix is not None:
            if math.prod(self.matrix) != rows * cols:
                raise LayoutError(f"matrix {self.matrix} does not hold as many elements as shape {shape}")
            rows, cols = self.matrix
        size = cols if axis == "cols" else rows
        if size % self.groups:
            raise LayoutError(
                f"layout {self.pattern!r}: {size} {axis} of shape {shape} do not divide "
                f"into {self.groups} groups"
            )
        return rows, cols

    def dims(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Sizes ``(g, o, i)`` of M for a weight of this shape."""
        rows, cols = self.stored(shape)
        _, axis, transposed = _PATTERNS[self.pattern]
        if axis == "rows":
            rows //= self.groups
        elif axis == "cols":
            cols //= self.groups
        return (self.groups, cols, rows) if transposed else (self.groups, rows, cols)

    def factor_shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of ``A [(n r), i]`` and ``B [(n o), r]`` for a weight of this shape."""
        _, o, i = self.dims(shape)
        n = len(self.enabled)
        return (n * rank, i), (n * o, rank)

    def pieces(self, shape: Sequence[int]) -> list[Piece]:
        """The enabled groups' rectangles of S, in the factors' order."""
        rows, cols = self.stored(shape)
        _, axis, transposed = _PATTERNS[self.pattern]
        pieces = []
        for index, g in enumerate(self.enabled):
            row_band, col_band = (0, rows), (0, cols)
            if axis == "rows":
                row_band = (g * rows // self.groups, (g + 1) * rows // self.groups)
            elif axis == "cols":
                col_band = (g * cols // self.groups, (g + 1) * cols // self.groups)
            pieces.append(Piece(index, row_band, col_band, transposed))
        return pieces

    def region(self, shape: Sequence[int], index: Sequence[Span]) -> tuple[list[Span], Span]:
        """Rows (as bands) and columns of S that the block ``index`` of the weight covers.

        Args:
            index: for each axis of the weight the range that the block holds.
        Raises:
            LayoutError: a block that is not bands of rows cut to one range of columns.
        """
        joined = _PATTERNS[self.pattern][0]
        shape = tuple(shape)
        inner = [span == (0, n) for span, n in zip(index, shape, strict=True)][joined + 1 :]
        whole = all(span == (0, n) for span, n in zip(index, shape, strict=True))
        if (self.matrix is not None and not whole) or not all(inner):
            raise LayoutError(f"layout {self.pattern!r} of shape {shape} cannot be cut to the block {index}")
        if self.matrix is not None:
            return [(0, self.matrix[0])], (0, self.matrix[1])
        step = math.prod(shape[joined + 1 :])
        cols = (index[joined][0] * step, index[joined][1] * step)
        if joined == 1:
            return [index[0]], cols
        (first, last), (low, high), size = index[0], index[1], shape[1]
        if (low, high) == (0, size):
            return [(first * size, last * size)], cols
        return [(g * size + low, g * size + high) for g in range(first, last)], cols

    def view(self, weight: torch.Tensor) -> torch.Tensor:
        """``M[g, o, i]`` as a view of ``weight`` (all groups); writing to it writes to the weight.

        Raises:
            LayoutError: the shape does not fit.
            RuntimeError: the weight's strides admit no such view (channels-last).
        """
        g, o, i = self.dims(weight.shape)
        stored = weight.view(self.stored(weight.shape))
        _, axis, transposed = _PATTERNS[self.pattern]
        if axis == "cols":
            stacked = stored.view(i, g, o).permute(1, 2, 0)
        elif transposed:
            stacked = stored.view(g, i, o).transpose(1, 2)
        else:
            stacked = stored.view(g, o, i)
        return stacked

    @property
    def transposed(self) -> bool:
        """Whether the stored matrix holds M[g]ᵀ, or its columns are cut into groups."""
        _, axis, transposed = _PATTERNS[self.pattern]
        return transposed or axis == "cols"

    def place(self, blocks: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The enabled groups' blocks ``[n, o, i]`` as a weight of this shape, zero elsewhere.

        The inverse of :meth:`view`, differentiable.
        """
        g, o, i = self.dims(shape)
        if self.only is not None:
            index = torch.tensor(self.only, device=blocks.device)
            blocks = blocks.new_zeros((g, o, i)).index_copy(0, index, blocks)
        _, axis, transposed = _PATTERNS[self.pattern]
        if axis == "cols":
            blocks = blocks.permute(2, 0, 1)
        elif transposed:
            blocks = blocks.transpose(1, 2)
        return blocks.reshape(tuple(shape))
