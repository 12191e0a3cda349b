"""The neutral carrier → loralib's state dict."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from ..adapter import Adapter, LowRank
from .protocol import Loss, Written
from .state_file import save_state
from .uniform import alpha_of, with_scales


def losses(adapter: Adapter) -> list[Loss]:
    """What loralib's modules cannot hold."""
    found = [Loss("site", n, why) for n, s in adapter.sites.items() if (why := _unwritable(n, s))]
    normed = [n for n, site in adapter.sites.items() if site.magnitude is not None]
    found += [Loss("magnitude", name, "loralib has no DoRA") for name in normed]
    for name in adapter.replace:
        if not any("bias" in part for part in name.split(".")):
            found.append(Loss("replace", name, "a full tensor that is no bias"))
    found += [Loss("shift", name, "lora_bias is PEFT's") for name in adapter.shift]
    found += [Loss("rows", name, "trained rows are PEFT's") for name in adapter.rows]
    return found


def write(adapter: Adapter, path: Path) -> Written:
    """Write ``loralib.lora_state_dict`` of the adapted modules, with torch.save, to the new file ``path``.

    loralib's user gives one alpha for all modules, so a scale that it does not give is folded into B.

    Returns:
        The values to construct loralib's layers with: alpha, and enable_lora where blocks are fused.
    Raises:
        OutputError: the file exists or cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    notes: list[str] = []
    enabled: dict[str, list[bool]] = {}
    alphas = Counter(alpha_of(site.scale, _rank(site)) for site in adapter.sites.values())
    alpha = alphas.most_common(1)[0][0]
    scales = {name: alpha / _rank(site) for name, site in adapter.sites.items()}
    sites, rounded = with_scales(adapter.sites, scales)
    for name, site in sites.items():
        assert site.layout is not None
        module = name.removesuffix(".weight")
        module = module.removesuffix(".conv") if site.layout.matrix is not None else module
        tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = site.A, site.B
        if site.layout.groups > 1:
            enabled[module] = [g in site.layout.enabled for g in range(site.layout.groups)]
            notes.append(f"{module} needs MergedLinear(enable_lora={enabled[module]})")
    save_state({**tensors, **adapter.replace}, path)
    said = f"alpha is not in the file: construct loralib's layers with lora_alpha={alpha:g}"
    needs: dict[str, object] = {"alpha": float(alpha)}
    return Written([said, *notes, *rounded], {**needs, "enable_lora": enabled} if enabled else needs)


def _rank(site: LowRank) -> int:
    """loralib's r: its convolutions have rank r·kernel."""
    assert site.layout is not None and site.shape is not None
    return site.rank // site.shape[-1] if site.layout.matrix is not None else site.rank


def _unwritable(name: str, site: LowRank) -> str:
    layout, shape = site.layout, site.shape
    assert layout is not None and shape is not None
    if not name.endswith(".weight"):
        return "loralib adapts weights only"
    if layout.matrix is None and len(shape) > 2:
        return "loralib keeps a convolution's factors in another shape"
    if layout.only is not None and tuple(sorted(layout.only)) != layout.only:
        return f"loralib orders enabled blocks, got only={layout.only}"
    if layout.pattern in ("(g i) o", "g o i", "g i o"):
        return f"loralib has no module with layout {layout.pattern!r}"
    return ""
