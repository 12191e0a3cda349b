"""An adapter as its file says it → the same adapter on the parameters of one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .adapter import Adapter, LowRank
from .bind_layouts import EMBEDDINGS, HEADS, Misfit, Transposed, Witness, fit
from .bind_names import Repair, layer_numbers, nearest, renamed, repairs
from .errors import BaseMismatchError, Problems

_MEND = "Use the base that the adapter was trained on, or the adapter that was trained on this base"


def bind(
    adapter: Adapter,
    shapes: Mapping[str, Sequence[int]],
    *,
    config: Mapping[str, object] | None = None,
    transposed: Transposed | None = None,
) -> Adapter:
    """Fit an adapter to a base: names, layouts, shapes; every tensor of the adapter finds its parameter.

    Args:
        adapter: as read; binding a bound adapter again checks it against the base.
        shapes: the base's parameters, by name.
        config: the base's ``config.json``: ``model_type`` tells how square weights are stored,
            ``vocab_size`` which rows may grow.
        transposed: whether the parameter of this name is stored ``[in, out]``; None if it does not know.
            Asked only where shapes cannot tell.
    Returns:
        The adapter with the base's names, a layout and shape at each site, and notes on what was repaired.
    Raises:
        BaseMismatchError: names that the base lacks and no single prefix repair explains, shapes that do
            not fit, or an ambiguity; all of them in one message.
    """
    base = {name: tuple(int(n) for n in shape) for name, shape in shapes.items()}
    binder = _Binder(base, config or {}, Witness(config, transposed))
    adapter = binder.without_tied(adapter)
    needs = _needs(adapter)
    if all(any(name in base for name in names) for names in needs.values()):
        found = renamed(needs, base, Repair((), ()))
        assert found is not None
        return binder.apply(adapter, found)
    return binder.repaired(adapter, needs)


def _needs(adapter: Adapter) -> dict[str, list[str]]:
    """Each of the adapter's names → the parameters it may stand for."""
    needs: dict[str, list[str]] = {}
    for key in (*adapter.replace, *adapter.shift, *adapter.rows):
        needs[key] = [key]
    for key, site in adapter.sites.items():
        module, _, leaf = key.rpartition(".")
        if site.among:
            needs[key] = [f"{module}.{name}" for name, _ in site.among]
        elif site.kind == "loralib":
            needs[key] = [key, f"{module}.conv.{leaf}"]
        else:
            needs[key] = [key]
    return needs


@dataclass(frozen=True)
class _Binder:
    base: Mapping[str, tuple[int, ...]]
    config: Mapping[str, object]
    witness: Witness

    def repaired(self, adapter: Adapter, needs: Mapping[str, Sequence[str]]) -> Adapter:
        """The adapter under the one prefix repair that makes everything fit."""
        first = next(names for names in needs.values() if not any(name in self.base for name in names))
        working: dict[tuple[str, ...], tuple[Repair, Adapter]] = {}
        misfit: BaseMismatchError | None = None
        for repair in repairs(first, self.base):
            found = renamed(needs, self.base, repair)
            if found is None:
                continue
            try:
                bound = self.apply(adapter, found)
            except BaseMismatchError as error:
                misfit = error
                continue
            working[tuple(sorted(bound.touched))] = (repair, bound)
        if len(working) == 1:
            repair, bound = next(iter(working.values()))
            return replace(bound, notes=(*bound.notes, f"names repaired: {repair}"))
        if working:
            ways = "; ".join(str(repair) for repair, _ in working.values())
            raise BaseMismatchError(
                f"the adapter's names fit the base in {len(working)} ways ({ways}); "
                "rename its tensors to the base's"
            )
        raise misfit or self._missing(needs)

    def apply(self, adapter: Adapter, found: Mapping[str, Sequence[str]]) -> Adapter:
        """The adapter under the base's names, all shapes checked.

        Raises:
            BaseMismatchError: everything that does not fit.
        """
        problems = Problems(BaseMismatchError, "the adapter does not fit this base:")
        full = {found[key][0]: tensor for key, tensor in adapter.replace.items()}
        for name, tensor in full.items():
            self._check_replaced(name, tensor, problems)
        self._check_vocabulary(full, problems)
        shapes = {**self.base, **{name: tuple(tensor.shape) for name, tensor in full.items()}}
        sites = self._sites(adapter, found, shapes, problems)
        shift = {found[key][0]: value for key, value in adapter.shift.items()}
        for name, (tensor, _) in shift.items():
            if name in shapes and tuple(tensor.shape) != shapes[name]:
                problems.add(f"{name}: the base has {list(shapes[name])}, the adapter {list(tensor.shape)}")
        rows = {found[key][0]: value for key, value in adapter.rows.items()}
        for name, (indices, tensor) in rows.items():
            self._check_rows(name, indices, tensor, shapes, problems)
            if name in sites:
                problems.add(
                    f"{name}: trained rows and a low-rank update of one embedding cannot be combined"
                )
        problems.raise_if_any(_MEND)
        notes = (*adapter.notes, *self._base_note(adapter))
        return replace(adapter, sites=sites, replace=full, shift=shift, rows=rows, notes=notes)

    def _sites(
        self,
        adapter: Adapter,
        found: Mapping[str, Sequence[str]],
        shapes: Mapping[str, tuple[int, ...]],
        problems: Problems,
    ) -> dict[str, LowRank]:
        fits: dict[str, dict[str, LowRank]] = {}
        for key, site in adapter.sites.items():
            fits[key], reasons = {}, list[str]()
            for name in found[key]:
                try:
                    fits[key][name] = fit(_with_scale(site, name), name, shapes[name], self.witness)
                except Misfit as error:
                    reasons.append(f"{name}: {error}")
            if not fits[key]:
                problems.add("; or ".join(reasons))
        sites: dict[str, LowRank] = {}
        while waiting := {key: options for key, options in fits.items() if options}:
            key = min(waiting, key=lambda key: len(waiting[key]))
            name = _choose(key, list(waiting[key]), problems)
            sites[name] = fits.pop(key)[name]
            for other, options in fits.items():
                if options.pop(name, None) is not None and not options:
                    problems.add(f"{name} is adapted by both {key} and {other}")
        return {name: sites[name] for name in shapes if name in sites}

    def _check_replaced(self, name: str, tensor: torch.Tensor, problems: Problems) -> None:
        have, got = self.base[name], tuple(tensor.shape)
        if got == have:
            return
        if got[1:] == have[1:] and len(got) > 0 and got[0] > have[0] and self._is_vocabulary(name):
            return
        problems.add(
            f"{name}: full tensor of another shape\n      base has {list(have)}\n      adapter  {list(got)}"
        )

    def _is_vocabulary(self, name: str) -> bool:
        module = name.split(".")[-2:-1]
        return bool(module) and (module[0] in EMBEDDINGS or module[0] in HEADS)

    def _check_vocabulary(self, full: Mapping[str, torch.Tensor], problems: Problems) -> None:
        """A vocabulary grows as a whole: every embedding and head of the old size must be there."""
        grown = {n: t.shape[0] for n, t in full.items() if tuple(t.shape) != self.base[n]}
        for name, rows in grown.items():
            if not self._is_vocabulary(name):
                continue
            old = self.base[name][0]
            for other, shape in self.base.items():
                behind = self._is_vocabulary(other) and shape[:1] == (old,) and grown.get(other) != rows
                if behind and other.rpartition(".")[2] in ("weight", "bias"):
                    problems.add(f"{name} grows from {old} to {rows} rows, but {other} keeps {old}")

    def _check_rows(
        self,
        name: str,
        indices: Sequence[int],
        tensor: torch.Tensor,
        shapes: Mapping[str, tuple[int, ...]],
        problems: Problems,
    ) -> None:
        shape = shapes[name]
        if tuple(tensor.shape) != (len(indices), *shape[1:]):
            problems.add(
                f"{name}: {len(indices)} trained rows of shape {list(tensor.shape)} for {list(shape)}"
            )
        bad = [index for index in indices if not 0 <= index < shape[0]]
        if bad:
            problems.add(f"{name}: trained token {bad[0]} is outside the vocabulary of {shape[0]}")

    def without_tied(self, adapter: Adapter) -> Adapter:
        """Drop a head's tensors that repeat, number for number, those of the embedding it is tied to."""
        sites, full, notes = dict(adapter.sites), dict(adapter.replace), list(adapter.notes)
        for key in [k for k in (*adapter.sites, *adapter.replace) if self._is_absent_head(k)]:
            if _twin_of_embedding(key, adapter):
                sites.pop(key, None)
                full.pop(key, None)
                notes.append(f"{key} repeats the embedding it is tied to and is applied once")
        return replace(adapter, sites=sites, replace=full, notes=tuple(dict.fromkeys(notes)))

    def _is_absent_head(self, key: str) -> bool:
        tail = tuple(key.split(".")[-2:])
        return tail[0] in HEADS and not any(tuple(name.split(".")[-2:]) == tail for name in self.base)

    def _missing(self, needs: Mapping[str, Sequence[str]]) -> BaseMismatchError:
        names = list(self.base)
        missing = [alternatives[0] for alternatives in needs.values() if not _any_in(alternatives, self.base)]
        problems = Problems(
            BaseMismatchError,
            f"the adapter names {len(missing)} of {len(needs)} parameters that the base lacks:",
        )
        for n, name in enumerate(missing):
            problems.add(name + self._why(name) + (nearest(name, names) if n < 12 else ""))
        theirs, ours = max(layer_numbers(missing), default=-1), max(layer_numbers(names), default=-1)
        more = f"The adapter has layers up to {theirs}, the base up to {ours}. " if theirs > ours >= 0 else ""
        try:
            problems.raise_if_any(more + _MEND)
        except BaseMismatchError as error:
            return error
        raise AssertionError("nothing is missing")

    def _why(self, name: str) -> str:
        module, _, leaf = name.rpartition(".")
        if leaf.endswith("bias") and f"{module}.weight" in self.base:
            return " (the base's module has no bias to add lora_bias to)"
        if self._is_absent_head(name) and self.config.get("tie_word_embeddings", True):
            return (
                " (tied to the embedding here, so fusing it would change both; save the base with "
                "tie_word_embeddings=False and a head of its own first)"
            )
        return ""

    def _base_note(self, adapter: Adapter) -> list[str]:
        theirs = adapter.config.get("base_model_name_or_path")
        ours = self.config.get("_name_or_path")
        if not (isinstance(theirs, str) and isinstance(ours, str) and theirs and ours):
            return []
        if theirs.rstrip("/").rpartition("/")[2] == ours.rstrip("/").rpartition("/")[2]:
            return []
        if Path(theirs).is_absolute() or Path(theirs).exists():
            return []
        return [f"the adapter names {theirs} as its base; the base's config.json names {ours}"]


def _any_in(names: Sequence[str], base: Mapping[str, object]) -> bool:
    return any(name in base for name in names)


def _with_scale(site: LowRank, name: str) -> LowRank:
    scales = dict(site.among)
    return replace(site, scale=scales[name.rpartition(".")[2]]) if scales else site


#: packed experts' parameters in the order in which every model of transformers declares them
_DECLARED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w3", "w2")


def _choose(key: str, names: list[str], problems: Problems) -> str:
    """The one parameter a wrapper belongs to: PEFT nests them in the order of declaration."""
    if len(names) == 1:
        return names[0]
    leaves = {name.rpartition(".")[2]: name for name in names}
    depth = key.rpartition("?")[2]
    if all(leaf in _DECLARED for leaf in leaves) and depth == "0":
        return leaves[min(leaves, key=_DECLARED.index)]
    problems.add(
        f"{key.rpartition('.')[0]}: its update fits {' and '.join(sorted(leaves))}; which is not told"
    )
    return names[0]


def _twin_of_embedding(key: str, adapter: Adapter) -> bool:
    for other, tensor in adapter.replace.items():
        if other != key and key in adapter.replace and other.split(".")[-2:-1][0] in EMBEDDINGS:
            mine = adapter.replace[key]
            if mine.shape == tensor.shape and torch.equal(mine, tensor):
                return True
    site = adapter.sites.get(key)
    for other in adapter.sites.values():
        if site is None or other.kind != "embedding" or other is site:
            continue
        same = other.A.T.shape == site.B.shape and other.B.T.shape == site.A.shape
        if (
            same
            and site.scale == other.scale
            and torch.equal(other.A.T, site.B)
            and torch.equal(other.B.T, site.A)
        ):
            return True
    return False
