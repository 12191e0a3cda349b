"""The neutral carrier → torchtune's .pt file, and the part of a recipe that builds its modules.

A recipe adapts a kind of module in every layer and wants its tensors; those that the adapter does not have
are written as zeros, whose ΔW is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..adapter import Adapter, LowRank
from ..errors import FormatError
from ..tensors import atomic_directory, output_errors
from .blocks import joined
from .holding import Holds
from .model_facts import layers_of
from .protocol import Loss, Target, Written
from .rotary import can_turn, to_neighbours
from .torchtune_names import NAMES, RECIPE, heads_turned
from .uniform import alpha_of, commonest_scale, one_rank, with_scale
from .yaml_text import yaml_text

_HOLDS = Holds("torchtune", dora=True)
_ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")
_MLP = ("w1", "w2", "w3")
_PARTLY = "DoRA on some modules only, and torchtune has it on all or none"


def losses(adapter: Adapter, target: Target) -> list[Loss]:
    """Everything that torchtune's modules, or its settings for the whole adapter, cannot hold."""
    found = _HOLDS.losses(adapter)
    gone = {loss.name for loss in found if loss.part == "site"}
    for name, site in adapter.sites.items():
        if name not in gone and (why := _unwritable(name, site, target)):
            found.append(Loss("site", name, why))
            gone.add(name)
    left = {name: site for name, site in adapter.sites.items() if name not in gone}
    normed = [name for name, site in left.items() if site.magnitude is not None]
    if len(normed) < len(left):
        found += [Loss("magnitude", name, _PARTLY) for name in normed]
    return found


def write(adapter: Adapter, path: Path, target: Target) -> Written:
    """Write ``adapter_model.pt`` and ``torchtune_config.yaml`` into the new directory ``path``.

    Raises:
        OutputError: ``path`` exists or cannot be written.
    """
    rank, sites = one_rank({name: joined(site) for name, site in adapter.sites.items()})
    alpha = alpha_of(commonest_scale(sites), rank)
    sites, notes = with_scale(sites, alpha / rank)
    found: dict[str, LowRank] = {}
    for name, site in sites.items():
        heads = _heads(name, target)
        found[_theirs(name) or ""] = to_neighbours(site, heads) if heads else site
    dora = any(site.magnitude is not None for site in sites.values())
    tensors = _tensors(found)
    if dora:
        notes.append("torchtune wants DoRA's tensors in every layer; the file has those of the adapter")
    else:
        tensors |= _fill(found, layers_of(target.model) or 0, rank)
    leaves = {module.rpartition(".")[2] for module in found}
    recipe = {
        "lora_attn_modules": [name for name in _ATTENTION if name in leaves],
        "apply_lora_to_mlp": bool(leaves & {*_MLP}),
        "apply_lora_to_output": "output" in leaves,
        "lora_rank": rank,
        "lora_alpha": alpha,
        "use_dora": dora,
    }
    with atomic_directory(path) as staging, output_errors(path):
        state = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        torch.save(state, staging / "adapter_model.pt")
        text = yaml_text({"model": recipe, **target.extra})
        (staging / RECIPE).write_text(text, encoding="utf-8")
    return Written(notes)


def _theirs(name: str) -> str | None:
    """torchtune's name of a module's weight, given the base's name or torchtune's own."""
    module, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return None
    return module if NAMES.ours(module) is not None else NAMES.theirs(module)


def _heads(name: str, target: Target) -> int:
    """Heads to reorder; none for torchtune's own names, whose rows are in its order already."""
    if NAMES.ours(name.removesuffix(".weight")) is not None:
        return 0
    return heads_turned(name, target.model)


def _unwritable(name: str, site: LowRank, target: Target) -> str:
    layout = joined(site).layout
    if _theirs(name) is None or (layout is not None and layout.transposed):
        return "torchtune has no such module"
    try:
        heads = _heads(name, target)
    except FormatError as error:
        return str(error)
    return f"its rows are not {heads} heads" if heads and not can_turn(joined(site), heads) else ""


def _tensors(found: Mapping[str, LowRank]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for module, site in found.items():
        state[f"{module}.lora_a.weight"], state[f"{module}.lora_b.weight"] = site.A, site.B
        if site.magnitude is not None:
            state[f"{module}.magnitude"] = site.magnitude
    return state


def _fill(found: Mapping[str, LowRank], layers: int, rank: int) -> dict[str, torch.Tensor]:
    """Zeros for the modules that a recipe builds beside these: the same in other layers, all of the MLP."""
    shapes: dict[str, tuple[int, int]] = {}
    for module, site in found.items():
        parts = module.split(".")
        if parts[0] != "layers":
            continue
        out, wide = site.B.shape[0], site.A.shape[1]
        shapes[".".join(parts[2:])] = out, wide
        if parts[2] == "mlp":
            up, down = ((wide, out), (out, wide)) if parts[3] == "w2" else ((out, wide), (wide, out))
            shapes |= {"mlp.w1": up, "mlp.w2": down, "mlp.w3": up}
    state: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for name, (out, wide) in shapes.items():
            module = f"layers.{layer}.{name}"
            if module not in found:
                state[f"{module}.lora_a.weight"] = torch.zeros(rank, wide)
                state[f"{module}.lora_b.weight"] = torch.zeros(out, rank)
    return state
