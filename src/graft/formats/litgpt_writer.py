"""The neutral carrier → litgpt's two files.

litgpt builds a LoRA module for each kind that ``hyperparameters.yaml`` switches on, in every layer, and wants
its tensors; those that the adapter does not have are written as zeros, whose ΔW is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..adapter import Adapter, LowRank
from ..errors import FormatError
from ..tensors import atomic_directory, output_errors
from .blocks import joined
from .holding import Holds
from .litgpt_names import HYPERPARAMETERS, Family, family_of
from .litgpt_qkv import Heads, heads_of
from .model_facts import ModelSizes, model_sizes
from .protocol import Loss, Target, Written
from .uniform import alpha_of, commonest_scale, one_rank, with_scale
from .yaml_text import yaml_text

_HOLDS = Holds("litgpt")
_FLAGS = ("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp", "lora_head")


@dataclass(frozen=True)
class _Base:
    """What litgpt's files need to know of the base."""

    family: Family
    heads: Heads
    sizes: ModelSizes

    @classmethod
    def of(cls, model: Mapping[str, object] | None) -> _Base:
        """Read it.

        Raises:
            FormatError: no Hugging Face base, an unknown one, or one that does not say.
        """
        family = family_of(model)
        if family is None:
            raise FormatError("litgpt's names and sizes follow from the base: give it (--base BASE)")
        return cls(family, heads_of(model), model_sizes(model, "litgpt"))

    def place(self, name: str) -> tuple[str, int | None] | None:
        """litgpt's module of the base's weight, and which of q, k and v it is, if one."""
        module = name.removesuffix(".weight")
        found = self.family.part(module)
        if found is not None:
            return found
        theirs = self.family.names.theirs(module)
        return None if theirs is None else (theirs, None)


def losses(adapter: Adapter, target: Target) -> list[Loss]:
    """Everything that litgpt's modules cannot hold."""
    found = _HOLDS.losses(adapter)
    gone = {loss.name for loss in found if loss.part == "site"}
    left = {name: site for name, site in adapter.sites.items() if name not in gone}
    try:
        base = _Base.of(target.model)
    except FormatError as error:
        return [*found, *(Loss("site", name, str(error)) for name in left)]
    for name, site in left.items():
        layout = joined(site).layout
        if base.place(name) is None or (layout is not None and layout.transposed):
            found.append(Loss("site", name, "litgpt has no such module"))
    return found


def write(adapter: Adapter, path: Path, target: Target) -> Written:
    """Write ``lit_model.pth.lora`` and ``hyperparameters.yaml`` into the new directory ``path``.

    Raises:
        OutputError: ``path`` exists or cannot be written.
    """
    base = _Base.of(target.model)
    parts: dict[str, LowRank] = {}
    places: dict[str, tuple[str, int | None]] = {}
    for name, site in adapter.sites.items():
        place = base.place(name)
        assert place is not None
        fused = place[1] is not None and len(base.family.qkv) == 1
        pieces = _cut(name, joined(site), base.heads) if fused else {name: (joined(site), place[1])}
        parts |= {key: piece for key, (piece, _) in pieces.items()}
        places |= {key: (place[0], index) for key, (_, index) in pieces.items()}
    rank, parts = one_rank(parts)
    alpha = alpha_of(commonest_scale(parts), rank)
    parts, notes = with_scale(parts, alpha / rank)
    found = {places[key]: (part.A, part.B) for key, part in parts.items()}
    flags = _flags(found)
    hyper = {
        **({} if target.base_name is None else {"checkpoint_dir": target.base_name}),
        "lora_r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        **flags,
        **target.extra,
    }
    with atomic_directory(path) as staging, output_errors(path):
        torch.save({"model": _tensors(found, flags, base, rank)}, staging / "lit_model.pth.lora")
        (staging / HYPERPARAMETERS).write_text(yaml_text(hyper), encoding="utf-8")
    notes.append("for litgpt merge_lora, put the model_config.yaml of litgpt's base beside it")
    return Written(notes)


def _cut(name: str, site: LowRank, heads: Heads) -> dict[str, tuple[LowRank, int]]:
    """q, k and v of a weight that holds them by query group, without the columns of B that are zero there."""
    found: dict[str, tuple[LowRank, int]] = {}
    for n, rows in enumerate(site.B[heads.grouped()].split(heads.rows)):
        columns = rows.ne(0).any(0)
        if bool(columns.any()):
            found[f"{name} ({'qkv'[n]})"] = replace(site, A=site.A[columns], B=rows[:, columns]), n
    return found


def _flags(found: Mapping[tuple[str, int | None], object]) -> dict[str, bool]:
    on = {_flag(module, index) for module, index in found}
    return {flag: flag in on for flag in _FLAGS}


def _flag(module: str, index: int | None) -> str:
    if index is not None:
        return _FLAGS[index]
    if module == "lm_head":
        return "lora_head"
    return "lora_projection" if "attn" in module.split(".") else "lora_mlp"


Pairs = Mapping[tuple[str, int | None], tuple[torch.Tensor, torch.Tensor]]


def _tensors(found: Pairs, flags: Mapping[str, bool], base: _Base, rank: int) -> dict[str, torch.Tensor]:
    """litgpt's state: every module that the flags switch on, q, k and v joined."""
    dtype = next(iter(found.values()))[0].dtype
    state: dict[str, torch.Tensor] = {}

    def pair(module: str, index: int | None, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        zeros = torch.zeros(rank, shape[1], dtype=dtype), torch.zeros(shape[0], rank, dtype=dtype)
        return found.get((module, index), zeros)

    for layer in range(base.sizes.layers):
        on = [n for n in range(3) if flags[_FLAGS[n]]]
        if on:
            module = f"transformer.h.{layer}.attn.qkv"
            pairs = [pair(module, n, (base.heads.rows[n], base.sizes.hidden)) for n in on]
            state[f"{module}.lora_A"] = torch.cat([a for a, _ in pairs])
            state[f"{module}.lora_B"] = torch.cat([b for _, b in pairs])
        for module, shape in _modules(layer, base):
            if flags[_flag(module, None)]:
                state[f"{module}.lora_A"], state[f"{module}.lora_B"] = pair(module, None, shape)
    if flags["lora_head"]:
        state["lm_head.lora_A"], state["lm_head.lora_B"] = found["lm_head", None]
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _modules(layer: int, base: _Base) -> list[tuple[str, tuple[int, int]]]:
    """litgpt's other linear modules of a layer, with ``[out, in]``."""
    sizes, modules = base.sizes, list[tuple[str, tuple[int, int]]]()
    for template in base.family.table:
        parts = template.split(".")
        if parts[0] == "lm_head":
            continue
        leaf = parts[-1]
        if "attn" in parts:
            shape = (sizes.hidden, base.heads.rows[0])
        elif leaf == "gate":
            shape = (sizes.experts, sizes.hidden)
        else:
            shape = (sizes.hidden, sizes.inner) if leaf == "proj" else (sizes.inner, sizes.hidden)
        many = range(sizes.experts) if "experts" in parts else (None,)
        modules += [(template.format(layer, *(() if n is None else (n,))), shape) for n in many]
    return modules
