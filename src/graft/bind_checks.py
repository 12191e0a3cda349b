"""What a base allows an adapter to replace: shapes, the vocabulary's growth, tied heads."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch

from .adapter import Adapter, LowRank
from .bind_layouts import EMBEDDINGS, HEADS
from .errors import Problems

Shapes = Mapping[str, tuple[int, ...]]


def module_of(name: str) -> str:
    """The last component of a parameter's module: ``lm_head`` of ``model.lm_head.weight``."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else ""


def is_vocabulary(name: str) -> bool:
    """Whether the parameter's rows are the vocabulary, by its module's name."""
    return module_of(name) in EMBEDDINGS or module_of(name) in HEADS


def check_replaced(name: str, tensor: torch.Tensor, base: Shapes, problems: Problems) -> None:
    """A full tensor has the base's shape, or more rows where rows are the vocabulary."""
    have, got = base[name], tuple(tensor.shape)
    grows = len(got) > 0 and got[1:] == have[1:] and got[0] > have[0] and is_vocabulary(name)
    if got != have and not grows:
        problems.add(
            f"{name}: full tensor of another shape\n      base has {list(have)}\n      adapter  {list(got)}"
        )


def check_vocabulary(full: Mapping[str, torch.Tensor], base: Shapes, problems: Problems) -> None:
    """A vocabulary grows as a whole: every embedding and head of the old size must be there."""
    grown = {n: t.shape[0] for n, t in full.items() if is_vocabulary(n) and t.shape[:1] != base[n][:1]}
    for name, rows in grown.items():
        old = base[name][0]
        for other, shape in base.items():
            behind = is_vocabulary(other) and shape[:1] == (old,) and grown.get(other) != rows
            if behind and other.rpartition(".")[2] in ("weight", "bias"):
                problems.add(f"{name} grows from {old} to {rows} rows, but {other} keeps {old}")


def check_shift(name: str, tensor: torch.Tensor, shapes: Shapes, problems: Problems) -> None:
    """lora_bias has the bias's shape."""
    if tuple(tensor.shape) != shapes[name]:
        problems.add(f"{name}: the base has {list(shapes[name])}, the adapter {list(tensor.shape)}")


def check_rows(
    name: str,
    indices: Sequence[int],
    tensor: torch.Tensor,
    shapes: Shapes,
    sites: Container[str],
    problems: Problems,
) -> None:
    """Trained rows lie inside the vocabulary, and nothing else changes the embedding."""
    shape = shapes[name]
    if tuple(tensor.shape) != (len(indices), *shape[1:]):
        problems.add(f"{name}: {len(indices)} trained rows of shape {list(tensor.shape)} for {list(shape)}")
    bad = [index for index in indices if not 0 <= index < shape[0]]
    if bad:
        problems.add(f"{name}: trained token {bad[0]} is outside the vocabulary of {shape[0]}")
    if name in sites:
        problems.add(f"{name}: trained rows and a low-rank update of one embedding cannot be combined")


def is_absent_head(name: str, base: Shapes) -> bool:
    """Whether this is an output head that the base has no tensor of, because it is tied or not there."""
    if module_of(name) not in HEADS:
        return False
    tail = name.split(".")[-2:]
    return not any(other.split(".")[-2:] == tail for other in base)


def without_tied(adapter: Adapter, base: Shapes) -> Adapter:
    """Drop a head's tensors that repeat, number for number, those of the embedding it is tied to."""
    sites, full, notes = dict(adapter.sites), dict(adapter.replace), list(adapter.notes)
    for key in [k for k in (*adapter.sites, *adapter.replace) if is_absent_head(k, base)]:
        twin_site = key in sites and any(_transposed_twins(sites[key], s) for s in adapter.sites.values())
        twin_full = key in full and any(
            k != key
            and module_of(k) in EMBEDDINGS
            and t.shape == full[key].shape
            and torch.equal(t, full[key])
            for k, t in adapter.replace.items()
        )
        if twin_site:
            del sites[key]
        if twin_full:
            del full[key]
        if twin_site or twin_full:
            notes.append(f"{key} repeats the embedding it is tied to and is applied once")
    return replace(adapter, sites=sites, replace=full, notes=tuple(dict.fromkeys(notes)))


def _transposed_twins(head: LowRank, embedding: LowRank) -> bool:
    """Whether the embedding's ΔW, stored ``[num, dim]``, is the head's by its factors: A is Bᵀ, B is Aᵀ."""
    if embedding.kind != "embedding" or head.scale != embedding.scale:
        return False
    shapes = (embedding.A.T.shape, embedding.B.T.shape) == (head.B.shape, head.A.shape)
    return shapes and torch.equal(embedding.A.T, head.B) and torch.equal(embedding.B.T, head.A)
