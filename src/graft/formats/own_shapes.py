"""Shapes of the parameters that an adapter changes, as far as its own file tells them."""

from __future__ import annotations

import math

from ..adapter import Adapter, LowRank
from ..bind_layouts import is_embedding
from ..errors import FormatError, Problems


def own_shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """A stand-in for the base's shapes, to bind an adapter to without its base.

    The rest of the model in a checkpoint tells them all; else a linear's weight is ``[out, in]`` (``[in,
    out]`` if the file says so), an embedding's ``[num, dim]``.

    Raises:
        FormatError: sites whose shape only the base tells.
    """
    problems = Problems(FormatError, "without the base, the file does not tell the shape of:")
    shapes = {name: other.shape for name, other in adapter.beside.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in adapter.replace.items()}
    shapes |= {name: tuple(tensor.shape) for name, (tensor, _) in adapter.shift.items()}
    for name, site in adapter.sites.items():
        if name in shapes or any(f"{name.rpartition('.')[0]}.{leaf}" in shapes for leaf, _ in site.among):
            continue
        shape = site.shape or _shape(name, site)
        if shape is None:
            problems.add(name)
        else:
            shapes[name] = shape
    for name in adapter.rows:
        if name not in shapes:
            problems.add(name)
    problems.raise_if_any("Give the base: --base BASE")
    return shapes


def _shape(name: str, site: LowRank) -> tuple[int, ...] | None:
    """The weight's shape where the factors alone tell it."""
    out, wide = site.B.shape[0], math.prod(site.A.shape[1:])
    if site.kind == "embedding":
        return wide, out
    if site.kind == "linear":
        return (wide, out) if site.fan_in_fan_out else (out, wide)
    if site.kind == "graft" and site.A.shape[0] == site.rank and not is_embedding(name):
        return (wide, out) if site.fan_in_fan_out else (out, wide)
    return None
