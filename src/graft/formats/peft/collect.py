"""The neutral carrier → PEFT's tensors, and what its configuration must say of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from ...adapter import Adapter, LowRank
from ...algebra import padded
from ...errors import FormatError, Problems
from ...layout import Layout
from ..blocks import all_experts, joined, turned
from .parameters import rank_major

_PREFIX = "base_model.model."
_SEPARATE = frozenset({"q_proj_weight", "k_proj_weight", "v_proj_weight"})
_RECURRENT = re.compile(r"weight_(ih|hh|hr)_l\d+(_reverse)?$")
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
    """Everything that the two files will hold.

    Raises:
        FormatError: an adapter that is not bound, or a part that PEFT cannot hold.
    """
    problems = Problems(FormatError, "PEFT's format cannot hold this adapter:")
    files = Files()
    attention = {name.rpartition(".")[0] for name in adapter.sites if name.split(".")[-1] == "in_proj_weight"}
    packed: dict[str, list[str]] = {}
    for name, site in adapter.sites.items():
        module, _, leaf = name.rpartition(".")
        reason = _unwritable(name, site)
        if reason:
            problems.add(f"{name}: {reason}")
        elif module in attention or (module.endswith(".out_proj") and module[:-9] in attention):
            continue
        elif leaf == "weight" and site.kind != "parameter":
            plain = _plain(site, name, problems)
            if plain is not None:
                _add_module(files, module, plain)
        else:
            packed.setdefault(module, []).append(leaf)
    for module in sorted(attention):
        _add_attention(files, module, adapter, problems)
    for module, leaves in packed.items():
        _add_parameters(files, module, leaves, adapter, problems)
    if not adapter.sites:
        problems.add("it has no low-rank update, and PEFT needs one")
    _check_uniform(adapter, problems)
    _add_biases(files, adapter, problems)
    _add_replaced(files, adapter)
    _add_rows(files, adapter)
    problems.raise_if_any()
    return files


def _unwritable(name: str, site: LowRank) -> str:
    layout = site.layout
    if layout is None or site.shape is None:
        return "it is not bound to a base; call graft.bind.bind first"
    if _RECURRENT.search(name):
        return "PEFT has no LoRA for recurrent layers"
    if name.rpartition(".")[2] in _SEPARATE:
        return "PEFT has no LoRA for MultiheadAttention with separate projections"
    if layout.pattern == "(g i) o":
        return "PEFT has no LoRA for transposed convolutions"
    if len(site.shape) > 2 and layout.groups > 1 and layout.pattern == "(g o) i":
        return "PEFT's LoRA of a grouped convolution is not grouped"
    if site.kind == "loralib":
        return "whether it is an embedding or stored [in, out] is not known; bind it with the base's config"
    if site.kind == "parameter" and len(site.shape) > 2 and layout.pattern not in ("g o i", "g i o"):
        return f"PEFT reads a parameter of shape {list(site.shape)} as packed experts"
    if len(site.shape) < 2:
        return f"PEFT has no LoRA for a parameter of shape {list(site.shape)}"
    if site.magnitude is not None and not name.endswith(".weight") and name != "weight":
        return "PEFT has no DoRA for named parameters"
    return ""


def _plain(site: LowRank, name: str, problems: Problems) -> LowRank | None:
    try:
        return joined(site)
    except ValueError as error:
        problems.add(f"{name}: PEFT has no module with layout {error}")
        return None


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


def _add_attention(files: Files, module: str, adapter: Adapter, problems: Problems) -> None:
    """MultiheadAttention: PEFT always adapts in_proj and out_proj, with one rank and one alpha."""
    inner = _plain(adapter.sites[f"{module}.in_proj_weight"], f"{module}.in_proj_weight", problems)
    outer = adapter.sites.get(f"{module}.out_proj.weight")
    if inner is None:
        return
    key = f"{_PREFIX}{module}"
    if outer is None:
        width = inner.A.shape[1]
        a, b = inner.A.new_zeros((inner.rank, width)), inner.B.new_zeros((width, inner.rank))
    elif outer.scale != inner.scale:
        problems.add(
            f"{module}: in_proj has scale {inner.scale:g} and out_proj {outer.scale:g}; PEFT has one for both"
        )
        return
    else:
        outer = joined(outer)
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


def _add_parameters(
    files: Files, module: str, leaves: list[str], adapter: Adapter, problems: Problems
) -> None:
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
            plain, experts = _plain(site, name, problems), 1
            if plain is None:
                continue
            site = turned(plain) if plain.layout == Layout("i o") else plain
        key = _PREFIX + module + ".base_layer" * depth
        files.tensors[f"{key}.lora_A.weight"] = site.A
        files.tensors[f"{key}.lora_B.weight"] = rank_major(site.B, experts)
        files.settings[name] = (site.rank, site.scale)
        files.parameters.append(name)


def _check_uniform(adapter: Adapter, problems: Problems) -> None:
    """use_dora and lora_bias hold for the whole adapter."""
    plain = [name for name, site in adapter.sites.items() if site.magnitude is None]
    if 0 < len(plain) < len(adapter.sites):
        problems.add(f"DoRA on some modules only; {plain[0]} has no magnitude")
    if adapter.shift:
        embedded = [name for name, site in adapter.sites.items() if site.kind == "embedding"]
        if embedded:
            problems.add(f"lora_bias together with an embedding ({embedded[0]})")
        if len(plain) < len(adapter.sites):
            problems.add("lora_bias together with DoRA")


def _add_biases(files: Files, adapter: Adapter, problems: Problems) -> None:
    """lora_bias: a bias of lora_B for every adapted module, zero where the adapter has none."""
    if not adapter.shift:
        return
    wanted = dict(adapter.shift)
    for key, b in list(files.tensors.items()):
        if not key.endswith(".lora_B.weight"):
            continue
        module = key[len(_PREFIX) : -len(".lora_B.weight")].replace(".base_layer.out_proj", ".out_proj")
        _, scale = files.settings.get(module, (0, 0.0))
        shift = wanted.pop(f"{module}.bias", None) or wanted.pop(f"{module}.in_proj_bias", None)
        if shift is not None and shift[1] != scale and scale:
            problems.add(f"{module}.bias: its scale {shift[1]:g} differs from its weight's {scale:g}")
        bias = b.new_zeros(b.shape[0]) if shift is None else shift[0]
        files.tensors[key.removesuffix("weight") + "bias"] = bias
    for name in wanted:
        problems.add(f"{name}: a change of the bias of a module that is not adapted")


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
