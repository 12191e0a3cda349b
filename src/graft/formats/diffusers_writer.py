"""The neutral carrier → one safetensors file as diffusers' ``save_lora_weights`` writes it.

Scales are folded into B where that is exact: then the file needs no settings, and loaders that know none
(older diffusers, ComfyUI) load it right too. Otherwise PEFT's settings go into the metadata.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import torch

from ..adapter import Adapter, LowRank
from ..fingerprint import dumps
from ..tensors import save_file
from .blocks import joined
from .components import nameless, with_components
from .diffusers import METADATA_KEY
from .holding import Holds
from .ledger import listed
from .protocol import Loss, Target, Written
from .state_file import save_new
from .uniform import alpha_of, with_scale

_HOLDS = Holds("diffusers", convolutions=True, dora=True, turned=False)
Names = dict[str, tuple[str, str]]


def losses(adapter: Adapter, target: Target) -> list[Loss]:
    """All but linear layers and convolutions, and DoRA where not every module of a component has it."""
    found = _HOLDS.losses(adapter)
    lost = {loss.name for loss in found if loss.part == "site"}
    names = with_components(adapter, target, "diffusers'")
    found += [loss for loss in nameless("diffusers", names, None) if loss.name not in lost]
    by_component: dict[str, list[str]] = {}
    for name, (component, _) in names.items():
        by_component.setdefault(component, []).append(name)
    for mine in by_component.values():
        plain = [name for name in mine if adapter.sites[name].magnitude is None]
        if plain:
            why = f"DoRA on some modules only ({plain[0]} has none), and diffusers has it on all or none"
            normed = set(mine) - set(plain) - lost
            found += [Loss("magnitude", name, why) for name in mine if name in normed]
    return found


def write(adapter: Adapter, path: Path, target: Target) -> Written:
    """Write the new file ``path``.

    Raises:
        OutputError: the file exists or cannot be written.
    """
    names = with_components(adapter, target, "diffusers'")
    sites = {name: joined(site) for name, site in adapter.sites.items()}
    notes: list[str] = []
    metadata: dict[str, str] = {}
    folded, rounded = with_scale(sites, 1.0)
    if not rounded:
        sites = folded
    else:
        metadata[METADATA_KEY] = json.dumps(_settings(sites, names, notes), indent=2, sort_keys=True)
        notes.append(
            "the scales are in the file's metadata, which diffusers reads; loaders that do not, such as "
            "ComfyUI, would take 1"
        )
    tensors: dict[str, torch.Tensor] = {}
    base: dict[str, str] = {}
    for name, (component, rest) in names.items():
        tensors |= _module(f"{component}.{rest.removesuffix('.weight')}", sites[name])
        if name in adapter.base:
            base[f"{component}.{rest}"] = adapter.base[name]
    told = {"format": "pt", **metadata, **dumps(base)}
    save_new(path, lambda staging: save_file(tensors, staging, told))
    return Written(notes)


def _module(key: str, site: LowRank) -> dict[str, torch.Tensor]:
    assert site.shape is not None
    ones = (1,) * (len(site.shape) - 2)
    found = {
        f"{key}.lora_A.weight": site.A.reshape(site.rank, *site.shape[1:]),
        f"{key}.lora_B.weight": site.B.reshape(*site.B.shape, *ones),
    }
    if site.magnitude is not None:
        shape = (1, -1, *ones) if ones else (-1,)
        found[f"{key}.lora_magnitude_vector"] = site.magnitude.reshape(shape)
    return found


def _settings(sites: dict[str, LowRank], names: Names, notes: list[str]) -> dict[str, object]:
    """PEFT's settings of each component, in one table."""
    table: dict[str, object] = {}
    inexact: list[str] = []
    for component in dict.fromkeys(component for component, _ in names.values()):
        mine = {rest.removesuffix(".weight"): sites[n] for n, (c, rest) in names.items() if c == component}
        alphas = {module: alpha_of(site.scale, site.rank) for module, site in mine.items()}
        inexact += [module for module, site in mine.items() if alphas[module] / site.rank != site.scale]
        rank = Counter(site.rank for site in mine.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        told: dict[str, object] = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {_anchored(m): site.rank for m, site in mine.items() if site.rank != rank},
            "alpha_pattern": {_anchored(m): a for m, a in alphas.items() if a != alpha},
            "target_modules": sorted(mine),
            "use_dora": any(site.magnitude is not None for site in mine.values()),
            "use_rslora": False,
            "lora_bias": False,
            "bias": "none",
        }
        table |= {f"{component}.{key}": value for key, value in told.items()}
    if inexact:
        notes.append(f"alpha / rank differs from the scale in the 16th digit: {listed(inexact)}")
    return table


def _anchored(module: str) -> str:
    return "^" + re.escape(module)
