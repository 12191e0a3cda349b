"""The neutral carrier → one safetensors file in the names of kohya-ss/sd-scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from ..adapter import Adapter, LowRank
from ..bind_flat import flat
from ..fingerprint import dumps
from ..tensors import save_file
from .blocks import joined
from .components import nameless, with_components
from .holding import Holds
from .ledger import listed
from .protocol import Loss, Target, Written
from .state_file import save_new
from .uniform import alpha_of

_HOLDS = Holds("kohya", convolutions=True, dora=True, turned=False)
_HEADS = {"unet": "lora_unet", "transformer": "lora_transformer", "text_encoder": "lora_te"}


def losses(adapter: Adapter, target: Target) -> list[Loss]:
    """All but linear layers and convolutions of the components that have a name in these files."""
    found = _HOLDS.losses(adapter)
    lost = {loss.name for loss in found if loss.part == "site"}
    unnamed = nameless("kohya", with_components(adapter, target, "kohya's"), _heads(target))
    return [*found, *(loss for loss in unnamed if loss.name not in lost)]


def write(adapter: Adapter, path: Path, target: Target) -> Written:
    """Write the new file ``path``; every module has its own alpha, so nothing is folded.

    Raises:
        OutputError: the file exists or cannot be written.
    """
    heads, tensors = _heads(target), dict[str, torch.Tensor]()
    base: dict[str, str] = {}
    inexact: list[str] = []
    for name, (component, rest) in with_components(adapter, target, "kohya's").items():
        site = joined(adapter.sites[name])
        key = f"{heads[component]}_{flat(rest).removesuffix('.weight')}"
        alpha = _alpha(site)
        if float(alpha) / site.rank != site.scale:
            inexact.append(name)
        tensors |= _module(key, site, alpha)
        if name in adapter.base:
            base[f"{component}.{rest}"] = adapter.base[name]
    save_new(path, lambda staging: save_file(tensors, staging, {"format": "pt", **dumps(base)}))
    return Written(_notes(adapter, inexact))


def _heads(target: Target) -> dict[str, str]:
    """What names of each component begin with, in a file for this pipeline.

    sd-scripts numbers text encoders where there are several; T5 is the third, though Flux has no second.
    """
    several = _class(target.model, "text_encoder_2")
    if several is None:
        return _HEADS | {"text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"}
    second = "lora_te3" if several.startswith("T5") else "lora_te2"
    return _HEADS | {
        "text_encoder": "lora_te1",
        "text_encoder_2": second,
        **({"text_encoder_3": "lora_te3"} if second == "lora_te2" else {}),
    }


def _class(model: Mapping[str, object] | None, component: str) -> str | None:
    """The class of a pipeline's component, by its ``model_index.json``."""
    entry = (model or {}).get(component)
    parts = cast("list[object]", entry) if isinstance(entry, list) else []
    return str(parts[1]) if len(parts) > 1 and parts[1] is not None else None


def _alpha(site: LowRank) -> torch.Tensor:
    """alpha in float32, as sd-scripts computes with it, where that is exact; else in float64."""
    wide = torch.tensor(float(alpha_of(site.scale, site.rank)), dtype=torch.float64)
    return wide.float() if wide.float().double() == wide else wide


def _module(key: str, site: LowRank, alpha: torch.Tensor) -> dict[str, torch.Tensor]:
    shape = site.shape
    assert shape is not None
    if site.scale == 0:  # alpha 0 would be read as "no scaling"
        site, alpha = replace(site, B=torch.zeros_like(site.B)), torch.tensor(float(site.rank))
    ones = (1,) * (len(shape) - 2)
    found = {
        f"{key}.lora_down.weight": site.A.reshape(site.rank, *shape[1:]),
        f"{key}.lora_up.weight": site.B.reshape(*site.B.shape, *ones),
        f"{key}.alpha": alpha,
    }
    if site.magnitude is not None:
        found[f"{key}.dora_scale"] = site.magnitude.reshape(-1, 1, *ones)
    return found


def _notes(adapter: Adapter, inexact: list[str]) -> list[str]:
    notes: list[str] = []
    if any(site.magnitude is not None for site in adapter.sites.values()):
        notes.append("dora_scale is LyCORIS's name for DoRA; sd-scripts itself and diffusers do not read it")
    if inexact:
        notes.append(f"alpha / rank differs from the scale in the 16th digit: {listed(inexact)}")
    return notes
