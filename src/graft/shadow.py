"""W + ΔW as one differentiable tensor, put in the parameter's place only while a forward runs.

This is the road for every forward that Graft does not know: it needs no knowledge of what the forward
does with its weight. The instance's ``__dict__`` comes before ``_parameters`` in attribute look-up, so
the parameter itself stays registered, untouched and visible to optimisers and engines.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import StateError
from .layout import Layout


def effective(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, layout: Layout
) -> torch.Tensor:
    """``W + scale · B · A`` with gradients, summed in the wider of the two dtypes, in W's dtype.

    The number that fuse and export write is :meth:`graft.delta.Delta.add`; this is the same formula in
    the compute dtype, for forward and backward.
    """
    wide = torch.promote_types(weight.dtype, a.dtype)
    n = len(layout.enabled)
    with torch.autocast(weight.device.type, enabled=False):
        blocks = torch.bmm(b.to(wide).unflatten(0, (n, -1)), a.to(wide).unflatten(0, (n, -1)))
        return (weight.to(wide) + layout.place(blocks * scale, weight.shape)).to(weight.dtype)


def _thread() -> int:
    # dynamo cannot trace the call, and a compiled forward is guarded by its own caller
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class Shadow:
    """One module's parameters covered by tensors; removed again in any case."""

    def __init__(self, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        self.module, self.names = module, list(tensors)
        self.thread = _thread()
        module.__dict__.update(tensors)
        self._flat: list[Any] | None = None
        if isinstance(module, nn.RNNBase):
            # RNN forwards read this list, not the attributes
            before: list[Any] = module._flat_weights  # pyright: ignore[reportPrivateUsage]
            names = module._flat_weights_names  # pyright: ignore[reportPrivateUsage]
            flat = [tensors.get(n, w) for n, w in zip(names, before, strict=True)]
            self._flat = before
            module.__dict__["_flat_weights"] = flat
        module.__dict__["_graft_shadow"] = self

    def remove(self) -> None:
        d = self.module.__dict__
        for name in self.names:
            d.pop(name, None)
        if self._flat is not None:
            d["_flat_weights"] = self._flat
        d.pop("_graft_shadow", None)


def shadowed(module: nn.Module) -> bool:
    """Whether this module's weights are covered at this moment, by an outer call of the same thread.

    Raises:
        StateError: another thread runs this module's forward; the two would share one shadow.
    """
    shadow: Shadow | None = module.__dict__.get("_graft_shadow")
    if shadow is None:
        return False
    if shadow.thread != _thread():
        raise StateError(
            f"two threads run the forward of one {type(module).__name__} whose weight is replaced during "
            "forward; call graft.fuse(model) before serving from several threads"
        )
    return True


@contextmanager
def shadowing(covered: Sequence[tuple[nn.Module, dict[str, torch.Tensor]]]) -> Generator[None]:
    """Cover these modules' parameters for the time of the block."""
    shadows: list[Shadow] = []
    try:
        for module, tensors in covered:
            shadows.append(Shadow(module, tensors))
        yield
    finally:
        for shadow in reversed(shadows):
            shadow.remove()
