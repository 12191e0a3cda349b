"""The neutral carrier → PEFT's tensors, and what its configuration must say of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...adapter import Adapter, LowRank
from ...algebra import folded, padded, turned
from ...layout import Layout
from ..blocks import all_experts, joined
from .dialects import rank_major

_PREFIX = "base_model.model."
#: parameters that packed-expert modules of transformers declare, in that order
_DECLARED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Files:
    """What is being collected for the two files.

    Args:
        tensors: the tensor file, by PEFT's keys.
        settings: rank and scale by the name that PEFT's patterns match.
        modules, parameters, saved: target_modules, target_parameters, modules_to_save.
        biases: modules whose bias is in the file.
        tokens: trainable_token_indices.
        notes: what the files cannot say.
        turned: whether linear weights are stored ``[in, out]``, as met.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    settings: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])
    modules: list[str] = field(default_factory=list[str])
    parameters: list[str] = field(default_factory=list[str])
    saved: list[str] = field(default_factory=list[str])
    biases: list[str] = field(default_factory=list[str])
    tokens: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    notes: list[str] = field(default_factory=list[str])
    turned: set[bool] = field(default_factory=set[bool])


def collect(adapter: Adapter) -> Files:
    """Everything that the two files will hold, of an adapter that PEFT can hold (:mod:`.losses`)."""
    files = Files()
    attention = {name.rpartition(".")[0] for name in adapter.sites if name.split(".")[-1] == "in_proj_weight"}
    packed: dict[str, list[str]] = {}
    for name, site in adapter.sites.items():
        module, _, leaf = name.rpartition(".")
        if module in attention or (module.endswith(".out_proj") and module[:-9] in attention):
            continue
        if leaf == "weight" and site.kind != "parameter":
            _add_module(files, module, joined(site))
        else:
            packed.setdefault(module, []).append(leaf)
    for module in sorted(attention):
        _add_attention(files, module, adapter)
    for module, leaves in packed.items():
        _add_parameters(files, module, leaves, adapter)
    _add_biases(files, adapter)
    _add_replaced(files, adapter)
    _add_rows(files, adapter)
    return files


def _add_module(files: Files, module: str, site: LowRank) -> None:
    key = f"{_PREFIX}{module}"
    assert site.shape is not None and site.layout is not None
    if site.kind == "embedding":
        files.tensors[f"{key}.lora_embedding_A"], files.tensors[f"{key}.lora_embedding_B"] = site.A, site.B
    elif len(site.shape) > 2:
        ones = (1,) * (len(site.shape) - 2)
        files.tensors[f"{key}.lora_A.weight"] = site.A.reshape(site.rank, *site.shape[1:])
        files.tensors[f"{key}.lora_B.weight"] = site.B.reshape(*site.B.shape, *ones)
    else:
        files.tensors[f"{key}.lora_A.weight"], files.tensors[f"{key}.lora_B.weight"] = site.A, site.B
        files.turned.add(site.layout.pattern == "i o")
    if site.magnitude is not None:
        ones = (1,) * (len(site.shape) - 2)
        shape = (1, -1, *ones) if ones else (-1,)
        files.tensors[f"{key}.lora_magnitude_vector"] = site.magnitude.reshape(shape)
    files.settings[module] = (site.rank, site.scale)
    files.modules.append(module)


def _add_attention(files: Files, module: str, adapter: Adapter) -> None:
    """MultiheadAttention: PEFT always adapts in_proj and out_proj, with one rank and one alpha."""
    inner = joined(adapter.sites[f"{module}.in_proj_weight"])
    outer = adapter.sites.get(f"{module}.out_proj.weight")
    key = f"{_PREFIX}{module}"
    if outer is None:
        width = inner.A.shape[1]
        a, b = inner.A.new_zeros((inner.rank, width)), inner.B.new_zeros((width, inner.rank))
    else:
        outer, exact = folded(joined(outer), inner.scale)
        if not exact:
            files.notes.append(
                f"{module}.out_proj: PEFT has one scale for it and in_proj, so its own was folded into B, "
                "whose elements were rounded once to float32"
            )
        rank = max(inner.rank, outer.rank)
        inner, outer = padded(inner, rank), padded(outer, rank)
        a, b = outer.A, outer.B
        files.notes.append(
            f"{module}.out_proj: PEFT 0.21 adds this update twice in its forward and merge; "
            "the file says it once"
        )
    files.tensors[f"{key}.lora_A.weight"], files.tensors[f"{key}.lora_B.weight"] = inner.A, inner.B
    files.tensors[f"{key}.base_layer.out_proj.lora_A.weight"] = a
    files.tensors[f"{key}.base_layer.out_proj.lora_B.weight"] = b
    files.settings[module] = (inner.rank, inner.scale)
    files.modules.append(module)


def _add_parameters(files: Files, module: str, leaves: list[str], adapter: Adapter) -> None:
    """Named parameters: one wrapper each, the one declared last outermost."""
    if all(leaf in _DECLARED for leaf in leaves):
        leaves = sorted(leaves, key=_DECLARED.index)
    for depth, leaf in enumerate(reversed(leaves)):
        name = f"{module}.{leaf}"
        site = adapter.sites[name]
        assert site.layout is not None and site.shape is not None
        if site.layout.pattern in ("g o i", "g i o"):
            site = all_experts(site)
            experts = site.shape[0] if site.shape else 1
        else:
            plain, experts = joined(site), 1
            site = turned(plain) if plain.layout == Layout("i o") else plain
        key = _PREFIX + module + ".base_layer" * depth
        files.tensors[f"{key}.lora_A.weight"] = site.A
        files.tensors[f"{key}.lora_B.weight"] = rank_major(site.B, experts)
        files.settings[name] = (site.rank, site.scale)
        files.parameters.append(name)


def _add_biases(files: Files, adapter: Adapter) -> None:
    """lora_bias: a bias of lora_B for every adapted module, zero where the adapter has none."""
    if not adapter.shift:
        return
    wanted = dict(adapter.shift)
    for key, b in list(files.tensors.items()):
        if not key.endswith(".lora_B.weight"):
            continue
        module = key[len(_PREFIX) : -len(".lora_B.weight")].replace(".base_layer.out_proj", ".out_proj")
        shift = wanted.pop(f"{module}.bias", None) or wanted.pop(f"{module}.in_proj_bias", None)
        bias = b.new_zeros(b.shape[0]) if shift is None else shift[0]
        files.tensors[key.removesuffix("weight") + "bias"] = bias
    assert not wanted, wanted


def _add_replaced(files: Files, adapter: Adapter) -> None:
    """Full tensors: biases and embeddings under plain names, whole modules in modules_to_save."""
    known = adapter.config.get("modules_to_save")
    listed = [str(m) for m in known] if isinstance(known, (list, tuple)) else []
    leaves: dict[str, set[str]] = {}
    for name in adapter.replace:
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, set()).add(leaf)
    for name, tensor in adapter.replace.items():
        module, _, leaf = name.rpartition(".")
        wrapped = module in files.modules or f"{module}.weight" in adapter.rows
        between = ".token_adapter.base_layer" if f"{module}.weight" in adapter.rows else ".base_layer"
        files.tensors[f"{_PREFIX}{module}{between if wrapped else ''}.{leaf}"] = tensor
        if leaf == "bias" and (wrapped or leaves[module] == {"bias"}):
            files.biases.append(module)
        elif not wrapped and _is_whole(module, leaves[module], adapter, listed) and module not in files.saved:
            files.saved.append(module)


def _is_whole(module: str, leaves: set[str], adapter: Adapter, listed: list[str]) -> bool:
    """Whether PEFT may list the module: it then needs every tensor of the module."""
    if any(module == one or module.endswith(f".{one}") for one in listed):
        return True
    weight = adapter.replace.get(f"{module}.weight")
    return leaves == {"weight", "bias"} and weight is not None and weight.dim() > 1


def _add_rows(files: Files, adapter: Adapter) -> None:
    for name, (indices, tensor) in adapter.rows.items():
        module = name.rpartition(".")[0]
        files.tensors[f"{_PREFIX}{module}.token_adapter.trainable_tokens_delta"] = tensor
        files.tokens[module] = list(indices)
