"""The neutral carrier → one safetensors file as diffusers' ``save_lora_weights`` writes it.

Scales are folded into B where that is exact: then the file needs no settings, and loaders that know none
(older diffusers, ComfyUI) load it right too. Otherwise PEFT's settings go into the metadata.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..adapter import Adapter, LowRank
from ..fingerprint import dumps
from ..tensors import save_file
from .blocks import joined
from .components import nameless, with_components
from .diffusers_settings import METADATA_KEY, table_of
from .holding import Holds
from .protocol import Loss, Target, Written
from .state_file import save_new
from .uniform import with_scale

_HOLDS = Holds("diffusers", convolutions=True, dora=True, turned=False)


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
        metadata[METADATA_KEY] = json.dumps(table_of(sites, names, notes), indent=2, sort_keys=True)
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
