"""The neutral carrier → a ``torch_dist`` checkpoint that Megatron-Bridge loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ...adapter import Adapter, LowRank
from ...algebra import padded
from ...fingerprint import dumps
from ...tensors import atomic_directory
from ..dcp.checkpoint import ABOUT
from ..dcp.writer import save_checkpoint
from ..model_facts import ModelFacts, model_facts, model_type
from ..protocol import Target, Written
from ..uniform import alpha_of, commonest_scale, with_scale
from . import fused, run_config
from .losses import Groups, groups_of
from .names import Module, Modules, key_of, modules_of
from .run_config_writer import made

Tensors = dict[tuple[Module, str], torch.Tensor]


def write(adapter: Adapter, path: Path, target: Target) -> Written:
    """Write the new directory ``path``: the checkpoint and its ``run_config.yaml``.

    Megatron-Bridge has one rank and one alpha for all, and one A for q, k, v and for gate, up. Where the A
    differ, each keeps its own as canonical LoRA if no part is missing; else they are joined to one of the
    ranks' sum.

    Raises:
        FormatError: PyYAML is not installed.
        OutputError: ``path`` exists or cannot be written.
    """
    facts = model_facts(target.model, "Megatron")
    table = modules_of(model_type(target.model))
    groups = groups_of(adapter.sites, table)
    canonical = _is_canonical(groups, table)
    rank = max(_rank(module, group, table, canonical) for module, group in groups.items())
    scale = commonest_scale(adapter.sites)
    alpha = float(alpha_of(scale, rank) if scale > 0 else rank)  # Bridge's alpha is positive
    sites, notes = with_scale(adapter.sites, alpha / rank)
    tensors: Tensors = {}
    for module, group in groups_of(sites, table).items():
        tensors |= _module(module, group, rank, table, facts, canonical)
    if rank > max(site.rank for site in adapter.sites.values()):
        notes.append(
            f"in Megatron q, k, v (and gate, up) have one A, so theirs were joined: the rank is {rank}"
        )
    kind = "DoRA" if _is_normed(groups) else "CanonicalLoRA" if canonical else "LoRA"
    config = made(kind, list(groups), facts, rank, alpha, target)
    with atomic_directory(path) as staging:
        save_checkpoint(_stacked(tensors, facts.layers), staging)
        (staging / run_config.NAME).write_text(config, encoding="utf-8")
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        common = {"common_backend": "torch", "common_backend_version": 1}
        (staging / "metadata.json").write_text(json.dumps({**backend, **common}), encoding="utf-8")
        torch.save({"checkpoint_version": 3.0, "iteration": 0}, staging / "common.pt")
        if adapter.base:
            (staging / ABOUT).write_text(json.dumps(dumps(adapter.base)), encoding="utf-8")
    return Written(notes)


def _fuses(module: Module, table: Modules) -> bool:
    return not module.is_head and len(table[module.name]) > 1


def _is_canonical(groups: Groups, table: Modules) -> bool:
    """Whether q, k, v and gate, up keep factors of their own: none missing, no DoRA, and some A differ."""
    members = [(m, g) for m, g in groups.items() if _fuses(m, table) and not m.is_expert]
    whole = all(set(group) == set(table[module.name]) for module, group in members)
    return whole and not _is_normed(groups) and not all(_is_shared(group) for _, group in members)


def _is_normed(groups: Groups) -> bool:
    return any(site.magnitude is not None for group in groups.values() for site in group.values())


def _is_shared(group: Mapping[str, LowRank]) -> bool:
    first, *others = (site.A for site in group.values())
    return all(a.dtype == first.dtype and torch.equal(a, first) for a in others)


def _rank(module: Module, group: Mapping[str, LowRank], table: Modules, canonical: bool) -> int:
    ranks = [site.rank for site in group.values()]
    own = not _fuses(module, table) or _is_shared(group) or (canonical and not module.is_expert)
    return max(ranks) if own else sum(ranks)


def _module(
    module: Module,
    group: Mapping[str, LowRank],
    rank: int,
    table: Modules,
    facts: ModelFacts,
    canonical: bool,
) -> Tensors:
    """The tensors of one module of one layer and one expert."""
    if not _fuses(module, table) or (canonical and not module.is_expert):
        made: Tensors = {}
        for part, site in group.items():
            between = f"adapter_{part}." if part else ""
            wide = padded(site, rank)
            made[module, f"{between}linear_in.weight"] = wide.A
            made[module, f"{between}linear_out.weight"] = wide.B
            if site.magnitude is not None:
                made[module, "weight_magnitude"] = site.magnitude
        return made
    a, rows = _joined(group, rank)
    parts = tuple(table[module.name])
    sizes = fused.sizes(parts, {part: b.shape[0] for part, b in rows.items()}, facts)
    whole = {part: rows.get(part, a.new_zeros((sizes[part], rank))) for part in parts}
    made = {
        (module, "linear_in.weight"): a,
        (module, "linear_out.weight"): fused.join(whole, facts),
    }
    norms = {part: site.magnitude for part, site in group.items() if site.magnitude is not None}
    if norms:
        made[module, "weight_magnitude"] = fused.join(norms, facts)
    return made


def _joined(group: Mapping[str, LowRank], rank: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One A for all parts, and each part's B over its rows: zero where the ranks are another part's."""
    if _is_shared(group):
        wide = {part: padded(site, rank) for part, site in group.items()}
        return next(iter(wide.values())).A, {part: site.B for part, site in wide.items()}
    a = torch.cat([site.A for site in group.values()])
    rows: dict[str, torch.Tensor] = {}
    start = 0
    for part, site in group.items():
        rows[part] = torch.nn.functional.pad(site.B, (start, rank - start - site.rank))
        start += site.rank
    return torch.nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])), rows


def _stacked(tensors: Tensors, layers: int) -> dict[str, torch.Tensor]:
    """By the checkpoint's keys: experts stacked, and layers too if every layer has every module."""
    experts: dict[tuple[Module, str], dict[int, torch.Tensor]] = {}
    for (module, suffix), tensor in tensors.items():
        experts.setdefault((module._replace(expert=None), suffix), {})[module.expert or 0] = tensor
    each = {
        (m, s): _stack([found[e] for e in sorted(found)]) if m.is_expert else found[0]
        for (m, s), found in experts.items()
    }
    rows: dict[tuple[Module, str], dict[int, torch.Tensor]] = {}
    for (module, suffix), tensor in each.items():
        rows.setdefault((module._replace(layer=None), suffix), {})[module.layer or 0] = tensor
    uniform = all(
        m.is_head or (set(found) == set(range(layers)) and len({t.shape for t in found.values()}) == 1)
        for (m, _), found in rows.items()
    )
    if not uniform:
        return {key_of(module, suffix): tensor for (module, suffix), tensor in each.items()}
    return {
        key_of(m, s): found[0] if m.is_head else _stack([found[n] for n in sorted(found)])
        for (m, s), found in rows.items()
    }


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    dtype = tensors[0].dtype
    for one in tensors[1:]:
        dtype = torch.promote_types(dtype, one.dtype)
    return torch.stack([one.to(dtype) for one in tensors])
