"""Tied weights: an adapter on an output head that the files do not hold, because it is the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..adapter import Adapter, LowRank
from ..bind_layouts import EMBEDDINGS, HEADS
from ..checkpoint import Checkpoint
from ..errors import BaseMismatchError, GraftError
from .packed import Both


@dataclass(frozen=True)
class Tied:
    """What becomes of the head.

    Args:
        adapter: the adapter, its update of the head moved where the files can take it.
        added: head tensor → the embedding tensor that it begins as (untied).
        both: embedding tensor → the sum of its own update and the head's (shared).
        config: changes of config.json.
        notes: sentences for the user.
    """

    adapter: Adapter
    added: Mapping[str, str]
    both: Mapping[str, Both]
    config: Mapping[str, object]
    notes: tuple[str, ...]


def absent_head(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
    """The head parameter that the adapter changes and the base ties to its embedding: (head, embedding)."""
    tails = {tuple(name.split(".")[-2:]) for name in shapes}
    found = [n for n, shape in shapes.items() if _leaf(n) in EMBEDDINGS and len(shape) == 2]
    for key in sorted({*adapter.sites, *adapter.replace}):
        tail = tuple(key.split(".")[-2:])
        inside_layer = any(part.isdigit() for part in key.split("."))
        if inside_layer or tail in tails or _leaf(key) not in HEADS:
            continue
        fits = [n for n in found if _fits(adapter, key, shapes[n])]
        if len(fits) == 1:
            return key, fits[0]
    return None


def _leaf(name: str) -> str:
    """The module's own name of a parameter ``….module.weight``; empty for other parameters."""
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "weight" else ""


def _fits(adapter: Adapter, key: str, shape: tuple[int, ...]) -> bool:
    if key in adapter.replace:
        return adapter.replace[key].shape[1:] == shape[1:]
    site = adapter.sites[key]
    return (site.B.shape[0], site.A.shape[1]) == shape


def settle(adapter: Adapter, head: str, embedding: str, choice: str | None, base: Checkpoint) -> Tied:
    """Decide what a bound update of a tied head does.

    Args:
        choice: ``untie`` (write the head as a tensor of its own, W + ΔW, as the adapter was trained) or
            ``shared`` (add ΔW to the one weight, as PEFT's merge does).
    Raises:
        BaseMismatchError: no choice was made where the two differ.
    """
    if head in adapter.replace or choice == "untie":
        note = f"{head} is written apart from {embedding} (tie_word_embeddings is now false)"
        return Tied(adapter, {head: embedding}, {}, {"tie_word_embeddings": False}, (note,))
    if choice is None:
        raise BaseMismatchError(
            f"the adapter changes {head}, which this base ties to {embedding}: one weight, while the adapter "
            "was trained on the head alone.\nChoose: --tied untie writes the head as a tensor of its own "
            "(what was trained), --tied shared changes both (what PEFT's merge does)"
        )
    sites: dict[str, LowRank] = dict(adapter.sites)
    mine, both = sites.pop(head), dict[str, Both]()
    if mine.magnitude is not None or embedding in {*adapter.replace, *adapter.rows}:
        raise GraftError(
            f"--tied shared cannot combine what the adapter does to {head} and {embedding}; use --tied untie"
        )
    if embedding in sites:
        both[embedding] = Both(sites.pop(embedding), mine, base.entries[embedding].shape)
    else:
        sites[embedding] = mine
    note = f"{embedding} and the head tied to it both get the head's update"
    return Tied(replace(adapter, sites=sites), {}, both, {}, (note,))


def notes_of(adapter: Adapter, base: Checkpoint) -> tuple[str, ...]:
    """That an update of an embedding changes the head too, where the two are one weight in the files."""
    if base.config.get("tie_word_embeddings") is not True or any(_leaf(n) in HEADS for n in base.entries):
        return ()
    sites = [n for n in adapter.sites if _leaf(n) in EMBEDDINGS]
    return tuple(
        f"{name} is tied to the output head, so its update changes both (as PEFT's merge does; its forward "
        "changes the embedding alone)"
        for name in sites
    )


def without_copies(adapter: Adapter, base: Checkpoint, origin: Mapping[str, str]) -> Adapter:
    """Drop full tensors that only repeat the base's: PEFT saves the weight of an adapted embedding too.

    Args:
        origin: a tied head → the embedding whose weight it is.
    """
    full = dict(adapter.replace)
    for name in adapter.sites.keys() & full.keys():
        stored = origin.get(name, name)
        if stored in base.entries and _same(full[name], base.read(stored)):
            del full[name]
    return replace(adapter, replace=full)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal numbers, whatever their dtypes, a few rows at a time."""
    if a.shape != b.shape:
        return False
    if a.dtype == b.dtype:
        return torch.equal(a, b)
    return all(torch.equal(x.double(), y.double()) for x, y in zip(a.split(64), b.split(64), strict=True))


def is_vocabulary(name: str) -> bool:
    """Whether the parameter's rows are the vocabulary's tokens."""
    return _leaf(name) in EMBEDDINGS | HEADS


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """The adapter with every update multiplied by ``scale``; full tensors stay as they are."""
    if scale == 1.0:
        return adapter
    sites = {name: replace(site, scale=site.scale * scale) for name, site in adapter.sites.items()}
    shift: dict[str, tuple[torch.Tensor, float]] = {n: (t, s * scale) for n, (t, s) in adapter.shift.items()}
    notes = adapter.notes
    if adapter.replace or adapter.rows:
        notes = (
            *notes,
            f"scale {scale:g} multiplies ΔW only: full tensors and rows are replaced as they are",
        )
    return replace(adapter, sites=sites, shift=shift, notes=notes)
