"""The neutral carrier → mlx-lm's two files.

mlx-lm wraps every module that ``keys`` names, in the last ``num_layers`` layers, with one rank and one scale,
and then loads what the file has; a wrapped module without tensors changes nothing, for its b is zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..adapter import Adapter, LowRank
from ..fingerprint import dumps
from ..tensors import atomic_directory, save_file
from .blocks import joined
from .holding import Holds
from .mlx_names import stacked_name
from .model_facts import experts_of, layers_of
from .protocol import Loss, Target, Written
from .uniform import commonest_scale, one_rank, with_scale

_HOLDS = Holds("MLX", embeddings=True, dora=True)


def losses(adapter: Adapter, target: Target) -> list[Loss]:
    """Everything that mlx-lm's modules, or its settings for the whole adapter, cannot hold."""
    found = _HOLDS.losses(adapter)
    normed = [name for name, site in adapter.sites.items() if site.magnitude is not None]
    for name in normed:
        if adapter.sites[name].kind == "embedding":
            found.append(Loss("magnitude", name, "MLX's DoRA of an embedding has a norm for each token"))
        elif stacked_name(name.removesuffix(".weight")):
            found.append(Loss("magnitude", name, "MLX has no DoRA for experts"))
        elif len(normed) < len(adapter.sites):
            found.append(Loss("magnitude", name, "DoRA on some modules only, and MLX has it on all or none"))
    if experts_of(target.model) is None:
        why = "MLX stacks all experts, and how many there are only the base's config.json says: --base BASE"
        found += [Loss("site", n, why) for n in adapter.sites if stacked_name(n.removesuffix(".weight"))]
    return found


def write(adapter: Adapter, path: Path, target: Target) -> Written:
    """Write ``adapters.safetensors`` and ``adapter_config.json`` into the new directory ``path``.

    Raises:
        OutputError: ``path`` exists or cannot be written.
    """
    rank, sites = one_rank({name: joined(site) for name, site in adapter.sites.items()})
    scale = commonest_scale(sites)
    sites, notes = with_scale(sites, scale)
    tensors = _tensors(sites, target.model)
    modules = [key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a")]
    dora = any(site.magnitude is not None for site in sites.values())
    config: dict[str, object] = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": layers_of(target.model) or -1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": sorted({_in_layer(module) for module in modules}),
        },
        **({"model": target.base_name} if target.base_name else {}),
        **target.extra,
    }
    with atomic_directory(path) as staging:
        save_file(tensors, staging / "adapters.safetensors", {"format": "mlx", **dumps(adapter.base)})
        text = json.dumps(config, indent=4, sort_keys=True, ensure_ascii=False)
        (staging / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    return Written(notes)


def _tensors(sites: Mapping[str, LowRank], model: Mapping[str, object] | None) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, site in sites.items():
        module = name.removesuffix(".weight")
        stacked = stacked_name(module)
        if stacked is None:
            found[f"{module}.lora_a"], found[f"{module}.lora_b"] = site.A.T, site.B.T
            if site.magnitude is not None:
                found[f"{module}.m"] = site.magnitude
            continue
        count = experts_of(model)
        assert count is not None
        for key, factor in (("lora_a", site.A), ("lora_b", site.B)):
            whole = found.setdefault(f"{stacked[0]}.{key}", factor.new_zeros((count, *factor.shape)))
            wide = torch.promote_types(whole.dtype, factor.dtype)
            found[f"{stacked[0]}.{key}"] = whole = whole.to(wide)
            whole[stacked[1]] = factor
    return found


def _in_layer(module: str) -> str:
    """mlx-lm's key of a module: its path inside its layer, or in the model if it is in no layer."""
    parts = module.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[number + 1 :])
