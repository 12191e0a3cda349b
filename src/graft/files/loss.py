"""How much of the update the rounding takes: predicted from norms, measured on a sample.

Rounding W + ΔW adds an error of about ``c · ‖W‖`` (c = 0.00165 for bfloat16, 0.00021 for float16: the
root mean square of a rounding error, relative to the number), so of the update the share
``c / (‖ΔW‖ / ‖W‖)`` is lost. The sample is short runs of elements spread over every updated tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from .ops import Add
from .plan import Plan
from .shards import Region

_ERROR = {torch.bfloat16: 0.00165, torch.float16: 0.00021, torch.float32: 2.5e-8}
_RUN, _RUNS, _TENSORS = 1024, 4, 64


@dataclass(frozen=True)
class Loss:
    """Rounding loss of a fuse, from a sample.

    Args:
        ratio: ‖ΔW‖ / ‖W‖.
        predicted: share of the update (as a norm) that the rounding should take.
        measured: ``‖round(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖`` on the sample.
        elements: size of the sample.
    """

    ratio: float
    predicted: float
    measured: float
    elements: int

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def measure(plan: Plan) -> Loss | None:
    """Sample the updated tensors of a plan; None if no tensor gets a plain ΔW."""
    weight = update = error = expected = 0.0
    count = 0
    for region, add in _sampled(plan):
        total = (region.stop - region.start) // region.dtype.itemsize
        for start in _starts(total):
            n = min(_RUN, total - start)
            src = torch.empty(n, dtype=region.source.dtype)
            region.source.read(start, src)
            out, delta = torch.empty(n, dtype=region.dtype), torch.zeros(n)
            add(src, out, start)
            add(torch.zeros(n), delta, start)
            w, d = src.double(), delta.double()
            weight += float(w.square().sum())
            update += float(d.square().sum())
            error += float((out.double() - w - d).square().sum())
            expected += float(w.square().sum()) * _ERROR.get(region.dtype, 0.0) ** 2
            count += n
    if update == 0.0 or weight == 0.0:
        return None
    return Loss(
        (update / weight) ** 0.5, min(1.0, (expected / update) ** 0.5), (error / update) ** 0.5, count
    )


def _sampled(plan: Plan) -> list[tuple[Region, Callable[[torch.Tensor, torch.Tensor, int], int]]]:
    """Regions with a plain ΔW, evenly thinned where a model has very many."""
    found = [(r, r.op.apply) for s in plan.shards for r in s.regions if isinstance(r.op, Add)]
    step = -(-len(found) // _TENSORS)
    return found[:: max(1, step)]


def _starts(total: int) -> list[int]:
    """Beginnings of the sampled runs, spread over the tensor."""
    return sorted({max(0, (total - _RUN) * n // (_RUNS - 1)) for n in range(_RUNS)})
