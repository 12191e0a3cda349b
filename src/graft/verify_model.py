"""Prove that a model's forward is the plain forward on W + ΔW, or name the layer where it is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import nn

from .adapted import factors, names_of
from .attach import plain_classes
from .effective import whole_weight
from .engines.wrappers import is_spread, team_of, unwrap
from .errors import StateError, VerifyError
from .held import Held, held_sites

#: relative difference of the outputs that the weights' dtype explains
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
#: ‖ΔW‖ / ‖W‖ of the random update by which a forward that ignores its adapter is told
_PROBE = 0.3

Run = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class ModelReport:
    """``str``: ``forward is the plain forward on W + ΔW for all 64 sites (largest difference 3.1e-07)``."""

    sites: tuple[str, ...]
    difference: float

    def __str__(self) -> str:
        return (
            f"forward is the plain forward on W + ΔW for all {len(self.sites)} sites "
            f"(largest difference {self.difference:.1e})"
        )


@torch.no_grad()
def verify(model: nn.Module, *inputs: Any, tolerance: float | None = None, **kwargs: Any) -> ModelReport:
    """Compare the adapted forward with the plain classes' forward on the effective weights.

    The effective weights are the numbers that :func:`graft.fuse` would write, lent to the plain model for
    one forward. Compared are the adapter as it is and, because an untrained or small update could be
    ignored unseen, a random update of 0.3 ‖W‖ in its place. The model runs in eval mode; it and its
    parameters are afterwards as they were. Memory: one copy of the adapted weights. Time: four forwards;
    for half-precision weights, and after a difference, two more for each site.

    Args:
        inputs, kwargs: arguments of the model's forward.
        tolerance: largest relative difference of the outputs in norm; by the weights' dtype when None.
    Raises:
        VerifyError: the outputs differ; the message names the sites that forward bypasses.
        StateError: the model has no adapter, or its weights are spread over processes.
    """
    if is_spread(team_of(model)):
        raise StateError(
            "verify lends the model whole weights, and this model's are spread over processes; verify it in "
            "one process before it is, or verify what graft.export wrote"
        )
    model = unwrap(model)
    held = held_sites(model)
    coarse = max((h.weight.dtype for h in held), key=lambda d: _TOLERANCE[d])
    limit = _TOLERANCE[coarse] if tolerance is None else tolerance

    def run() -> list[torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [t.detach().clone() for t in _tensors(model(*inputs, **kwargs))]

    with _evaluating(model):
        worst = _difference(run(), _reference(model, held, run))
        with _probing(held):
            probed = _difference(run(), _reference(model, held, run))
            failed = max(worst, probed) > limit
            bypassed: list[str] = []
            if failed or limit > _TOLERANCE[torch.float32]:
                eps = torch.finfo(coarse).eps
                bypassed = [h.name for h in held if _is_bypassed(model, held, h, run, eps)]
    if failed or bypassed:
        raise VerifyError(_message(bypassed, max(worst, probed), limit))
    return ModelReport(tuple(h.name for h in held), max(worst, probed))


def _message(bypassed: list[str], difference: float, limit: float) -> str:
    text = f"forward is not the plain forward on W + ΔW: relative difference {difference:.1e}"
    if not bypassed:
        return f"{text}, limit {limit:.1e}; no single site explains it"
    more = f" and {len(bypassed) - 1} more" if len(bypassed) > 1 else ""
    return (
        f"{text}. Forward reads the weight of {bypassed[0]}{more} past its adapter; name the module that "
        "reads it in targets=, or leave it out with exclude="
    )


def _reference(model: nn.Module, held: Iterable[Held], run: Run) -> list[torch.Tensor]:
    """The plain model's outputs with W + ΔW in these sites (fused weights are that already)."""
    lent = [(h.parameter_tensor, h.weight, whole_weight(h)) for h in held if h.site.live]
    try:
        for parameter, _, value in lent:
            parameter.data = value
        with plain_classes(model):
            return run()
    finally:
        for parameter, own, _ in lent:
            parameter.data = own


def _is_bypassed(model: nn.Module, held: Sequence[Held], one: Held, run: Run, eps: float) -> bool:
    """Whether this site's update, alone, moves the plain model's outputs but not as it moves the adapted."""
    if not one.site.live:
        return False
    others = [h.site for h in held if h.site is not one.site and h.site.live]
    for site in others:
        site.disabled = True
    try:
        got, want, base = run(), _reference(model, [one], run), _reference(model, [], run)
    finally:
        for site in others:
            site.disabled = False
    effect = _difference(want, base)
    return effect > 8 * eps and _difference(got, want) > 0.5 * effect


@contextmanager
def _probing(held: Iterable[Held]) -> Generator[None]:
    """Random factors for every site that is not fused, with ‖ΔW‖ near 0.3 ‖W‖."""
    own: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        for h in held:
            f = factors(h.module, h.parameter)
            if not h.site.live or f.scale == 0.0:
                continue
            for name in names_of(h.module, h.parameter):
                p = cast(nn.Parameter, getattr(h.module, name))
                own.append((p, p.data))
                p.data = torch.randn(p.shape, device=p.device).to(p.dtype)
            # E‖B·A‖² = n·o·r·i for independent N(0, 1) entries
            wanted = _PROBE * (_norm(h.weight) or 1.0) / abs(f.scale)
            own[-1][0].data.mul_(wanted / math.sqrt(f.b.numel() * f.a.shape[1]))
        yield
    finally:
        for p, data in own:
            p.data = data


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    modes = [(m, m.training) for m in model.modules()]
    for module, _ in modes:  # not model.eval(), on which graft.compat's layers merge
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _norm(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)))


def _tensors(output: Any) -> list[torch.Tensor]:
    """Every floating-point tensor of a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    parts: list[Any] = []
    if isinstance(output, Mapping):
        parts = list(cast("Mapping[Any, Any]", output).values())
    elif isinstance(output, (list, tuple)):
        parts = list(cast("Sequence[Any]", output))
    elif is_dataclass(output):
        parts = [getattr(output, f.name) for f in fields(output)]
    return [t for part in parts for t in _tensors(part)]


def _difference(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """Largest ``‖x − y‖ / ‖y‖``; infinite where the outputs have other shapes or one alone is not finite."""
    if len(got) != len(want) or any(x.shape != y.shape for x, y in zip(got, want, strict=True)):
        return math.inf
    worst = 0.0
    for x, y in zip(got, want, strict=True):
        if torch.equal(x, y) or (same := x.isfinite() & y.isfinite()).sum() == 0:
            continue
        if bool((x.isfinite() != y.isfinite()).any()):
            return math.inf
        x, y = torch.where(same, x, 0).double(), torch.where(same, y, 0).double()
        worst = max(worst, float((x - y).norm()) / max(float(y.norm()), 1e-30))
    return worst
