"""Every layout reads a stored weight as M[g, o, i], and its pieces are the same reading."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.delta import Delta
from graft.errors import LayoutError
from graft.layout import Layout

# (layout, shape of the stored weight, (g, o, i))
CASES = [
    (Layout(), (6, 4), (1, 6, 4)),
    (Layout(), (6, 2, 3, 3), (1, 6, 18)),
    (Layout("i o"), (6, 4), (1, 4, 6)),
    (Layout("(g o) i", 3), (12, 5), (3, 4, 5)),
    (Layout("(g o) i", 3, (0, 2)), (12, 5), (3, 4, 5)),
    (Layout("(g o) i", 2), (6, 2, 5), (2, 3, 10)),
    (Layout("i (g o)", 3), (5, 12), (3, 4, 5)),
    (Layout("i (g o)", 3, (2, 0)), (5, 12), (3, 4, 5)),
    (Layout("(g i) o", 2), (6, 4, 3), (2, 12, 3)),
    (Layout("g o i", 4), (4, 5, 3), (4, 5, 3)),
    (Layout("g i o", 4), (4, 5, 3), (4, 3, 5)),
    (Layout(matrix=(18, 12)), (6, 4, 3, 3), (1, 18, 12)),
]


@pytest.mark.parametrize(("layout", "shape", "dims"), CASES)
def test_dims_and_view(layout: Layout, shape: tuple[int, ...], dims: tuple[int, int, int]) -> None:
    w = torch.zeros(shape)
    m = layout.view(w)
    assert layout.dims(shape) == tuple(m.shape) == dims
    m[0, 0, 0] = 1
    assert w.sum() == 1, "the view writes to the weight"


@pytest.mark.parametrize(("layout", "shape", "dims"), CASES)
def test_delta_is_the_definition_on_the_view(
    layout: Layout, shape: tuple[int, ...], dims: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    rank = 2
    shape_a, shape_b = layout.factor_shapes(shape, rank)
    a, b = torch.randn(shape_a), torch.randn(shape_b)
    w = torch.zeros(shape, dtype=torch.float64)
    m = layout.view(w)
    n = len(layout.enabled)
    for g, a_g, b_g in zip(layout.enabled, a.chunk(n), b.chunk(n), strict=True):
        m[g] += 0.5 * b_g.double() @ a_g.double()
    torch.testing.assert_close(Delta.of(a, b, 0.5, layout, shape).dense().view(shape), w)


@given(st.sampled_from(CASES), st.integers(1, 5))
def test_pieces_are_disjoint_and_cover_the_enabled_groups(
    case: tuple[Layout, tuple[int, ...], tuple[int, int, int]], rank: int
) -> None:
    layout, shape, (_, o, i) = case
    rows, cols = layout.stored(shape)
    seen = torch.zeros(rows, cols)
    for piece in layout.pieces(shape):
        seen[slice(*piece.rows), slice(*piece.cols)] += 1
    assert seen.max() == 1 and seen.sum() == len(layout.enabled) * o * i
    assert layout.factor_shapes(shape, rank) == (
        (len(layout.enabled) * rank, i),
        (len(layout.enabled) * o, rank),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout("o i o"), "unknown layout pattern 'o i o'"),
        (lambda: Layout("o i", 2), "has one group"),
        (lambda: Layout("(g o) i", 3, (3,)), r"only=\(3,\)"),
        (lambda: Layout("(g o) i", 3, (0, 0)), "distinct"),
        (lambda: Layout("(g o) i", 5).stored((12, 4)), "do not divide into 5"),
        (lambda: Layout("g o i", 3).stored((4, 2, 2)), "first axis has 4"),
        (lambda: Layout().stored((4,)), "needs 2 or more axes"),
        (lambda: Layout(matrix=(5, 5)).stored((6, 4)), "does not hold as many"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        make()  # type: ignore[operator]
