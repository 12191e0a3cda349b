"""A checkpoint's tensors, stacked over layers and experts, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .names import Module

Each = tuple[Module, torch.Tensor, torch.Tensor, "torch.Tensor | None"]


def each(
    module: Module,
    a: torch.Tensor,
    b: torch.Tensor,
    magnitude: torch.Tensor | None,
    experts: Callable[[], int],
) -> Iterator[Each]:
    """Each layer's and each expert's own factors.

    Args:
        a: ``linear_in`` ``[layers?, experts?, r, in]``. b: ``linear_out`` ``[layers?, experts?, out, r]``.
        magnitude: ``[layers?, out]``.
        experts: how many there are; asked only where they all share one adapter.
    Raises:
        ValueError: axes that are neither layers nor experts, or that differ.
    """
    if module.layer is not None or module.is_head:
        yield from _experts(module, a, b, magnitude, experts)
        return
    counts = {t.shape[0] for t in (a, b, magnitude) if t is not None}
    if len(counts) > 1:
        raise ValueError(f"linear_in {list(a.shape)} and linear_out {list(b.shape)} have other layers")
    for n in range(counts.pop()):
        m = None if magnitude is None else magnitude[n]
        yield from _experts(module._replace(layer=n), a[n], b[n], m, experts)


def _experts(
    module: Module, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor | None, experts: Callable[[], int]
) -> Iterator[Each]:
    alone = module.expert is not None or not module.is_expert
    if not {a.dim(), b.dim()} <= ({2} if alone else {2, 3}) or (m is not None and m.dim() != 1):
        raise ValueError(f"linear_in {list(a.shape)} and linear_out {list(b.shape)} of one layer")
    if alone:
        yield module, a, b, m
        return
    # one adapter for all experts, or the shared side of Bridge's shared-outer adapters, has no axis
    counts = {t.shape[0] for t in (a, b) if t.dim() == 3} or {experts()}
    if len(counts) > 1:
        raise ValueError(f"linear_in {list(a.shape)} and linear_out {list(b.shape)} have other experts")
    for e in range(counts.pop()):
        one, other = (t[e] if t.dim() == 3 else t for t in (a, b))
        yield module._replace(expert=e), one, other, m
