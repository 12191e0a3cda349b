"""Adapters as linear maps: a sum of LoRAs is one LoRA of the ranks' sum; scale, pad, shrink.

Nothing here multiplies B by A: sums concatenate factors, and the best approximation of a lower rank is
taken from the r × r core ``R_b · R_aᵀ`` of thin QR decompositions.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .adapter import Adapter, LowRank
from .errors import LayoutError
from .layout import Layout
from .rounding import two_product


def rescaled(site: LowRank, scale: float) -> LowRank:
    """The same ΔW with another scale: B is multiplied by ``site.scale / scale``.

    Exact where the quotient is a power of two; otherwise B becomes float32 (float64 if it was) and each of
    its elements is rounded once.
    """
    if site.scale == scale:
        return site
    ratio = site.scale / scale
    wide = site.B.double() * ratio
    same = wide.to(site.B.dtype)
    if torch.equal(same.double(), wide):
        return replace(site, B=same, scale=scale)
    return replace(site, B=wide.to(torch.promote_types(site.B.dtype, torch.float32)), scale=scale)


def folded(site: LowRank, scale: float) -> tuple[LowRank, bool]:
    """:func:`rescaled`, and whether ``scale · B`` is the same number as before, element by element."""
    new = rescaled(site, scale)
    if new is site:
        return site, True
    before = two_product(site.B.double(), torch.tensor(site.scale, dtype=torch.float64))
    after = two_product(new.B.double(), torch.tensor(scale, dtype=torch.float64))
    return new, all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def turned(site: LowRank) -> LowRank:
    """The same update read the other way round: M is transposed, A and B change places.

    ``i o`` becomes ``o i`` and ``g i o`` becomes ``g o i`` and back; each expert's factors are transposed.
    """
    layout = site.layout
    assert layout is not None
    other = {"i o": "o i", "o i": "i o", "g i o": "g o i", "g o i": "g i o"}[layout.pattern]
    n, rank = len(layout.enabled), site.rank
    a = site.B.reshape(n, -1, rank).transpose(1, 2).reshape(n * rank, -1)
    b = site.A.reshape(n, rank, -1).transpose(1, 2).reshape(-1, rank)
    return replace(site, A=a, B=b, layout=Layout(other, layout.groups, layout.only))


def read_as(site: LowRank, layout: Layout) -> LowRank:
    """The same update with this layout if it reads the plain matrix from its other side; else as it is."""
    own = site.layout
    return turned(site) if own is not None and {own.pattern, layout.pattern} == {"o i", "i o"} else site


def plus(one: LowRank, other: LowRank) -> LowRank:
    """ΔW₁ + ΔW₂ as one update of rank r₁ + r₂: A's rows and B's columns stand side by side.

    Raises:
        LayoutError: other layouts or shapes, or DoRA, whose update is not linear.
    """
    if one.layout is None or one.layout != other.layout or one.shape != other.shape:
        raise LayoutError(
            f"updates with layouts {one.layout} and {other.layout} cannot be added; bind both first"
        )
    if one.magnitude is not None or other.magnitude is not None:
        raise LayoutError("DoRA updates cannot be added: each divides by its own norm; fuse them one by one")
    other = rescaled(other, one.scale)
    n = len(one.layout.enabled)
    a_dtype = torch.promote_types(one.A.dtype, other.A.dtype)
    b_dtype = torch.promote_types(one.B.dtype, other.B.dtype)
    a = torch.cat([s.A.to(a_dtype).reshape(n, s.rank, -1) for s in (one, other)], dim=1).flatten(0, 1)
    return replace(one, A=a, B=torch.cat([s.B.to(b_dtype) for s in (one, other)], dim=1))


def padded(site: LowRank, rank: int) -> LowRank:
    """The same ΔW with zero rows in A and zero columns in B up to ``rank``.

    Raises:
        LayoutError: ``rank`` is below the site's.
    """
    extra = rank - site.rank
    if extra < 0:
        raise LayoutError(f"cannot pad rank {site.rank} to {rank}; shrink it with resized")
    if extra == 0:
        return site
    n = site.A.shape[0] // site.rank
    blocks = site.A.reshape(n, site.rank, -1)
    a = torch.nn.functional.pad(blocks, (0, 0, 0, extra)).flatten(0, 1)
    return replace(site, A=a, B=torch.nn.functional.pad(site.B, (0, extra)))


def resized(site: LowRank, rank: int) -> LowRank:
    """The ΔW of rank ``rank`` nearest to this one in the Frobenius norm (Eckart and Young), block by block.

    Computed in float64, returned in float32; the singular values go half to A and half to B.

    Raises:
        LayoutError: a rank below one, or DoRA.
    """
    if rank < 1:
        raise LayoutError(f"a rank must be at least 1, got {rank}")
    if site.magnitude is not None:
        raise LayoutError("a DoRA update cannot be resized: its norm depends on every rank")
    if rank >= site.rank:
        return padded(site, rank)
    n = site.A.shape[0] // site.rank
    a, b = site.A.double().reshape(n, site.rank, -1), site.B.double().reshape(n, -1, site.rank)
    q_a, r_a = torch.linalg.qr(a.transpose(1, 2))
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.transpose(1, 2), full_matrices=False)
    root = s[:, :rank].sqrt()
    small_a = (root[:, :, None] * vh[:, :rank]) @ q_a.transpose(1, 2)
    small_b = q_b @ (u[:, :, :rank] * root[:, None, :])
    fitted = replace(site, A=small_a.flatten(0, 1).float(), B=small_b.flatten(0, 1).float())
    return padded(fitted, rank)  # a block thinner than the rank gives fewer singular values


def add(one: Adapter, other: Adapter) -> Adapter:
    """The adapter whose ΔW is the sum, site by site. Both are bound to the same base.

    Raises:
        LayoutError: both replace one parameter, or one replaces what the other changes; see :func:`plus`.
    """
    for first, second in ((one, other), (other, one)):
        clash = sorted({*first.replace, *first.rows} & second.touched)
        if clash:
            raise LayoutError(f"one adapter replaces {clash[0]}, the other changes it; no sum says both")
    sites = dict(one.sites)
    for name, site in other.sites.items():
        sites[name] = plus(sites[name], site) if name in sites else site
    shift = dict(one.shift)
    for name, (tensor, scale) in other.shift.items():
        if name in shift:
            mine, own = shift[name]
            shift[name] = (mine.double() * own + tensor.double() * scale, 1.0)
        else:
            shift[name] = (tensor, scale)
    return Adapter(
        sites, {**one.replace, **other.replace}, shift, {**one.rows, **other.rows},
        notes=tuple(dict.fromkeys((*one.notes, *other.notes))),
    )  # fmt: skip


def scale(adapter: Adapter, factor: float) -> Adapter:
    """The adapter with every ΔW times ``factor``.

    Raises:
        LayoutError: tensors that replace the base's, or DoRA: half of a replacement is not defined.
    """
    whole = [*adapter.replace, *adapter.rows]
    whole += [name for name, site in adapter.sites.items() if site.magnitude is not None]
    if whole and factor != 1.0:
        raise LayoutError(
            f"{whole[0]} is replaced or normalised (DoRA), not added, so it cannot be scaled by {factor:g}; "
            "use scale 1"
        )
    sites = {name: replace(site, scale=site.scale * factor) for name, site in adapter.sites.items()}
    shift = {name: (tensor, own * factor) for name, (tensor, own) in adapter.shift.items()}
    return replace(adapter, sites=sites, shift=shift)
