"""The neutral carrier → loralib's state dict."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ..adapter import Adapter, LowRank
from ..errors import FormatError, OutputError, Problems


def write(adapter: Adapter, path: Path) -> list[str]:
    """Write ``loralib.lora_state_dict`` of the adapted modules, with torch.save, to the new file ``path``.

    Returns:
        The values to construct loralib's layers with: alpha, and enable_lora where blocks are fused.
    Raises:
        FormatError: parts that loralib cannot hold, several alphas.
        OutputError: the file exists or cannot be written.
    """
    problems = Problems(FormatError, "loralib's format cannot hold this adapter:")
    tensors: dict[str, torch.Tensor] = {}
    notes: list[str] = []
    alphas: dict[float, str] = {}
    for name, site in adapter.sites.items():
        reason = _unwritable(name, site)
        if reason:
            problems.add(f"{name}: {reason}")
            continue
        module = name.removesuffix(".weight")
        rank = site.rank
        if site.layout is not None and site.layout.matrix is not None:
            assert site.shape is not None
            module, rank = module.removesuffix(".conv"), rank // site.shape[-1]
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = site.A, site.B
        alphas.setdefault(_close(site.scale * rank), name)
        if site.layout is not None and site.layout.groups > 1:
            on = [g in site.layout.enabled for g in range(site.layout.groups)]
            notes.append(f"{module} needs MergedLinear(enable_lora={on})")
    if len(alphas) > 1:
        said = ", ".join(f"{alpha:g} ({name})" for alpha, name in alphas.items())
        problems.add(f"it has several alphas, and loralib's user gives one: {said}")
    for name, tensor in adapter.replace.items():
        if any("bias" in part for part in name.split(".")):
            tensors[name] = tensor
        else:
            problems.add(f"{name}: a full tensor that is no bias")
    for name in (*adapter.shift, *adapter.rows):
        problems.add(f"{name}: lora_bias and trained rows are PEFT's")
    problems.raise_if_any('Write it with format="peft"')
    _save(tensors, path)
    alpha = next(iter(alphas), 0.0)
    return [f"alpha is not in the file: construct loralib's layers with lora_alpha={alpha:g}", *notes]


def _unwritable(name: str, site: LowRank) -> str:
    layout = site.layout
    if layout is None or site.shape is None:
        return "it is not bound to a base; call graft.bind.bind first"
    if site.magnitude is not None:
        return "loralib has no DoRA"
    if not name.endswith(".weight"):
        return "loralib adapts weights only"
    if layout.matrix is None and len(site.shape) > 2:
        return "loralib keeps a convolution's factors in another shape"
    if layout.only is not None and tuple(sorted(layout.only)) != layout.only:
        return f"loralib orders enabled blocks, got only={layout.only}"
    if layout.pattern in ("(g i) o", "g o i", "g i o"):
        return f"loralib has no module with layout {layout.pattern!r}"
    return ""


def _close(alpha: float) -> float:
    whole = round(alpha)
    return float(whole) if math.isclose(alpha, whole, rel_tol=1e-12) else alpha


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    import os
    import secrets

    if path.exists():
        raise OutputError(f"{path} already exists; choose another output")
    staging = path.with_name(f".{path.name}.graft-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, staging)
        with staging.open("rb") as written:
            os.fsync(written.fileno())
        os.link(staging, path)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    finally:
        staging.unlink(missing_ok=True)
