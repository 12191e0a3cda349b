"""ΔW = scale · B · A: the only place in Graft that computes it.

The number. For a stored weight W and factors A, B the fused weight is the **exact real number**
``W + Σ_k s_k · left[row, k] · right[k, col]`` rounded once, to nearest even, in the output's dtype.
Because the definition names no order of summation, every road to it gives the same bits: any block
size, thread count, device or shard, in memory or between files.

How it stays fast. A cheap sum with a proven error bound e decides almost every element: if ``v − e``
and ``v + e`` round to the same number, that number is the answer. The rest (about 0.1 % in fp32 sums
for bf16 weights) is decided in float64 with its own bound, and what still straddles a boundary (exact
ties) is summed without error. :mod:`graft.kernel` does the three steps in one vectorised pass; the
functions here do the last two in torch operations, on any device, with equal results.

Where the exact ΔW of an element is zero, the weight's own bits stay (so −0 stays −0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from . import kernel
from .errors import LayoutError, StateError
from .layout import Layout, Span
from .rounding import WEIGHT_DTYPES, bits, round_exact_sum, round_once, two_product

X = TypeVar("X")
Y = TypeVar("Y")

#: elements per block: large enough to hide a call's overhead, small enough to stay in cache
BLOCK = 1 << 18


@dataclass(frozen=True)
class Term:
    """One rectangle of ΔW: ``S[rows, cols] += Σ_k scale[k] · left[:, k] ⊗ right[k, :]``.

    ``left [rows, r]`` and ``right [r, cols]`` are contiguous, float32 (float64 only if the factors
    are); ``scale [r]`` is float64 on the CPU.
    """

    rows: Span
    cols: Span
    left: torch.Tensor
    right: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class Block:
    """A rectangle of the stored matrix S inside one term."""

    term: Term
    r0: int
    r1: int
    c0: int
    c1: int

    def window(self, flat: torch.Tensor, start: int, width: int) -> torch.Tensor:
        """This block as a 2-D view of ``flat``, which holds S from flat position ``start`` on."""
        first = self.r0 * width + self.c0 - start
        return torch.as_strided(
            flat, (self.r1 - self.r0, self.c1 - self.c0), (width, 1), flat.storage_offset() + first
        )

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``left`` and ``right`` cut to this block (law 2: slices commute with the product)."""
        t = _cut(self.term, (self.r0, self.r1), (self.c0, self.c1))
        assert t is not None
        return t.left, t.right


@dataclass(frozen=True)
class Delta:
    """ΔW of one stored weight: disjoint low-rank rectangles of its stored matrix ``S[R, C]``."""

    stored: tuple[int, int]
    terms: tuple[Term, ...]

    @classmethod
    def of(
        cls,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        layout: Layout,
        shape: Sequence[int],
        *,
        rows: Span | None = None,
        cols: Span | None = None,
    ) -> Delta:
        """ΔW of a weight of this shape from ``A [(n r), i]``, ``B [(n o), r]``: M[g] += scale·B[g]·A[g].

        Args:
            rows, cols: only this rectangle of S is wanted; the factors are cut before they are converted.
        Raises:
            LayoutError: the factors' shapes do not fit the weight.
        """
        rank = b.shape[1]
        want_a, want_b = layout.factor_shapes(shape, rank)
        if tuple(a.shape) != want_a or tuple(b.shape) != want_b:
            raise LayoutError(
                f"factors do not fit weight {tuple(shape)} with layout {layout.pattern!r}:\n"
                f"  A expected {list(want_a)}, got {list(a.shape)}\n"
                f"  B expected {list(want_b)}, got {list(b.shape)}"
            )
        stored = layout.stored(shape)
        scales = torch.full((rank,), float(scale), dtype=torch.float64)
        terms: list[Term] = []
        for piece in layout.pieces(shape):
            n = len(layout.enabled)
            a_g, b_g = a.detach().chunk(n)[piece.index], b.detach().chunk(n)[piece.index]
            left, right = (a_g.T, b_g.T) if piece.transposed else (b_g, a_g)
            term = _cut(Term(piece.rows, piece.cols, left, right, scales), rows, cols)
            if term is not None:
                terms.append(replace(term, left=wide(term.left), right=wide(term.right)))
        return cls(stored, tuple(terms))

    def local(self, bands: Sequence[Span], cols: Span) -> Delta:
        """ΔW of the matrix that a process holds: these bands of S's rows, one after another, cut to ``cols``.

        Law 2: ``(B·A)[rows, cols] = B[rows] · A[:, cols]``, so no element of ΔW is formed here.
        """
        terms: list[Term] = []
        above = 0
        for band in bands:
            for term in self.terms:
                t = _cut(term, band, cols)
                if t is not None:
                    moved = tuple(r - band[0] + above for r in t.rows), tuple(c - cols[0] for c in t.cols)
                    terms.append(replace(t, rows=moved[0], cols=moved[1]))
            above += band[1] - band[0]
        return Delta((above, cols[1] - cols[0]), tuple(terms))

    def __add__(self, other: Delta) -> Delta:
        """The sum of two updates: ranks are concatenated where the rectangles are the same.

        Raises:
            LayoutError: rectangles that overlap without being equal, or other stored shapes.
        """
        if self.stored != other.stored:
            raise LayoutError(f"cannot add updates of stored shapes {self.stored} and {other.stored}")
        merged = {(t.rows, t.cols): t for t in self.terms}
        for t in other.terms:
            key = (t.rows, t.cols)
            if key in merged:
                merged[key] = _concatenate(merged[key], t)
            elif any(_overlap(t, m) for m in merged.values()):
                raise LayoutError(
                    f"updates overlap in part: rows {t.rows}, columns {t.cols}. "
                    "Fuse one of them first, then the other"
                )
            else:
                merged[key] = t
        return Delta(self.stored, tuple(merged.values()))

    def blocks(self, start: int, count: int, size: int = BLOCK) -> Iterator[Block]:
        """The blocks of S inside the flat range ``[start, start + count)`` that a term touches."""
        width = self.stored[1]
        for r0, r1, c0, c1 in _rectangles(start, count, width):
            for term in self.terms:
                top, bottom = max(r0, term.rows[0]), min(r1, term.rows[1])
                first, last = max(c0, term.cols[0]), min(c1, term.cols[1])
                if top >= bottom or first >= last:
                    continue
                step = max(1, size // (last - first))
                for row in range(top, bottom, step):
                    yield Block(term, row, min(row + step, bottom), first, last)

    def covers_all(self) -> bool:
        """Whether every element of S is inside a term."""
        area = sum((t.rows[1] - t.rows[0]) * (t.cols[1] - t.cols[0]) for t in self.terms)
        return area == self.stored[0] * self.stored[1]

    def add(self, src: torch.Tensor, dst: torch.Tensor, *, start: int = 0, threads: int | None = None) -> int:
        """``dst = round(src + ΔW)`` for the flat range of S that begins at ``start``.

        Args:
            src: flat elements of the stored weight (1-D, contiguous; bf16, fp16, fp32 or fp64).
            dst: the same number of elements, any of those dtypes; may be ``src`` itself.
            start: flat position in S of the first element (a shard or a file chunk has ``start > 0``).
            threads: CPU threads for the kernel; torch's own number when None.
        Returns:
            The number of elements that became infinite or NaN although ``src`` was finite.
        Raises:
            StateError: a dtype that cannot be fused exactly (quantised, integer).
        """
        _check(src, dst)
        same = src.data_ptr() == dst.data_ptr()
        if not same and not self.covers_all():
            dst.copy_(round_once(src, dst.dtype) if src.dtype == torch.float64 else src)
        width = self.stored[1]
        if kernel.usable(src) and kernel.usable(dst) and self._single:
            return self._add_flat(src, dst, start, threads)

        def one(block: Block) -> int:
            w, out = block.window(src, start, width), block.window(dst, start, width)
            return add_block(w, out, *block.factors, block.term.scale)

        return sum(each(one, self.blocks(start, src.numel()), src, threads))

    @property
    def _single(self) -> bool:
        return all(t.left.dtype == t.right.dtype == torch.float32 for t in self.terms)

    def _add_flat(self, src: torch.Tensor, dst: torch.Tensor, start: int, threads: int | None) -> int:
        """:meth:`add` by the kernel, which cuts a flat range into blocks itself: one call a term."""
        width = self.stored[1]

        def one(span: Span) -> int:
            at, end = span
            first, last = (start + at) // width, -(-(start + end) // width)
            return sum(
                kernel.add_flat(
                    src[at:end], dst[at:end], start + at, width, (*t.rows, *t.cols), t.left, t.right, t.scale
                )
                for t in self.terms
                if t.rows[0] < last and first < t.rows[1]
            )

        step = 8 * BLOCK
        return sum(
            each(one, ((at, min(at + step, src.numel())) for at in range(0, src.numel(), step)), src, threads)
        )

    def dense(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """ΔW itself as ``[R, C]``, summed in float64 (for inspection and tests; not for fusing)."""
        device = self.terms[0].left.device if self.terms else torch.device("cpu")
        out = torch.zeros(self.stored, dtype=torch.float64, device=device)
        for t in self.terms:
            scaled = t.left.double() * t.scale.to(device)
            out[t.rows[0] : t.rows[1], t.cols[0] : t.cols[1]] = scaled @ t.right.double()
        return out.to(dtype)


def each(
    one: Callable[[X], Y], items: Iterable[X], like: torch.Tensor, threads: int | None = None
) -> Iterator[Y]:
    """``map(one, items)``, in threads where the kernel does the work (it releases the interpreter)."""
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 2 or like.numel() < 2 * BLOCK or not kernel.usable(like):
        yield from map(one, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(one, items)


def add_block(
    w: torch.Tensor,
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor,
    sign: int = 1,
) -> int:
    """``out = round(w + sign · left · diag(scale) · right)`` for one 2-D block; see :meth:`Delta.add`."""
    if kernel.usable(w) and kernel.usable(out) and left.dtype == right.dtype == torch.float32:
        return kernel.add(w, out, left, right, scale, sign)
    rounded = exact_block(w, out.dtype, left, right, scale, sign)
    broken = (~rounded.isfinite() & w.isfinite()).sum()
    out.copy_(rounded)
    return int(broken)


def exact_block(
    w: torch.Tensor,
    dtype: torch.dtype,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor,
    sign: int,
) -> torch.Tensor:
    """The reference: ``round(w + sign·left·diag(scale)·right)`` as a new block, in torch operations."""
    rank = left.shape[1]
    scaled = left.double() * (scale.to(left.device) * sign)
    delta = scaled @ right.double()
    wide = w.double()
    value = wide + delta
    # |sum error| ≤ γ_{r+2} Σ|left·right|, in any order of summation (Higham, Accuracy and Stability, §3.1)
    bound = scaled.abs() @ right.double().abs().amax(dim=1, keepdim=True)
    slack = (bound * (rank + 4) + value.abs()) * 2.0**-52
    low, high = round_once(value - slack, dtype), round_once(value + slack, dtype)
    own = round_once(wide, dtype) if w.dtype == torch.float64 else w.to(dtype)
    open_ = bits(low) != bits(high)
    if dtype == torch.float64:
        open_ = torch.ones_like(open_)
    open_ &= w.isfinite()
    out = torch.where(w.isfinite() & ((delta != 0) | (bound != 0)), low, own)
    where = open_.nonzero()
    if len(where):
        out[where[:, 0], where[:, 1]] = _settle(wide, own, dtype, left, right, scale * sign, where)
    return out


def _settle(
    wide: torch.Tensor,
    own: torch.Tensor,
    dtype: torch.dtype,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor,
    where: torch.Tensor,
) -> torch.Tensor:
    """The elements that float64 cannot decide, from sums without any error."""
    row, col = where[:, 0], where[:, 1]
    base, settled = wide[row, col].cpu(), own[row, col].cpu()
    hi, lo = two_product(left[row].double().cpu(), right[:, col].T.double().cpu())
    parts = [x for half in (hi, lo) for x in two_product(half, scale.expand_as(half))]
    terms = torch.cat(parts, dim=1)
    for n, (b, products) in enumerate(zip(base.tolist(), terms.tolist(), strict=True)):
        if math.fsum(products) != 0.0:
            settled[n] = round_exact_sum([b, *products], dtype)
    return settled.to(own.device)


def _cut(t: Term, rows: Span | None, cols: Span | None) -> Term | None:
    """A term restricted to a rectangle of S; None if they do not meet."""
    rows, cols = rows or t.rows, cols or t.cols
    top, bottom = max(rows[0], t.rows[0]), min(rows[1], t.rows[1])
    first, last = max(cols[0], t.cols[0]), min(cols[1], t.cols[1])
    if top >= bottom or first >= last:
        return None
    left = t.left[top - t.rows[0] : bottom - t.rows[0]]
    right = t.right[:, first - t.cols[0] : last - t.cols[0]]
    return Term((top, bottom), (first, last), left, right, t.scale)


def wide(factor: torch.Tensor) -> torch.Tensor:
    """A factor as terms hold it; every bf16 and fp16 number is a float32 number, so nothing is lost."""
    dtype = torch.float64 if factor.dtype == torch.float64 else torch.float32
    return factor.to(dtype).contiguous()


def _concatenate(x: Term, y: Term) -> Term:
    return Term(
        x.rows,
        x.cols,
        torch.cat([x.left, y.left], dim=1),
        torch.cat([x.right, y.right]),
        torch.cat([x.scale, y.scale]),
    )


def _overlap(x: Term, y: Term) -> bool:
    rows = max(x.rows[0], y.rows[0]) < min(x.rows[1], y.rows[1])
    return rows and max(x.cols[0], y.cols[0]) < min(x.cols[1], y.cols[1])


def _rectangles(start: int, count: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a flat range of a row-major matrix into at most three rectangles (r0, r1, c0, c1)."""
    stop = start + count
    row, col = divmod(start, width)
    if col:
        end = min(stop, (row + 1) * width)
        yield row, row + 1, col, col + end - start
        start, row = end, row + 1
    whole = (stop - start) // width
    if whole > 0:
        yield row, row + whole, 0, width
        start, row = start + whole * width, row + whole
    if start < stop:
        yield row, row + 1, 0, stop - start


def _check(src: torch.Tensor, dst: torch.Tensor) -> None:
    assert src.dim() == dst.dim() == 1 and src.numel() == dst.numel()
    assert src.is_contiguous() and dst.is_contiguous()
    for t in (src, dst):
        if t.dtype not in WEIGHT_DTYPES:
            raise StateError(
                f"a weight of dtype {t.dtype} cannot be fused exactly; convert the base to bfloat16, "
                "float16 or float32 first (dequantise it if it is quantised)"
            )
