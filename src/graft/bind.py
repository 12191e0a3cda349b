"""An adapter as its file says it → the same adapter on the parameters of one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from .adapter import Adapter, LowRank
from .bind_beside import settle
from .bind_checks import (
    check_replaced,
    check_rows,
    check_shift,
    check_vocabulary,
    is_absent_head,
    without_tied,
)
from .bind_components import bind_each
from .bind_flat import spelled_out
from .bind_layouts import Misfit, Transposed, Witness, fit
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
    if adapter.components:
        return bind_each(adapter, base, partial(_bind_part, config, transposed))
    binder = _Binder(base, config or {}, Witness(config, transposed))
    adapter = without_tied(spelled_out(adapter, base), base)
    needs = _needs(adapter)
    exact = {key: [name for name in names if name in base] for key, names in needs.items()}
    if not all(exact.values()):
        return binder.repaired(adapter, needs)
    return settle(binder.apply(adapter, exact), base, Repair((), ()))


def _bind_part(
    config: Mapping[str, object] | None,
    transposed: Transposed | None,
    adapter: Adapter,
    shapes: Mapping[str, Sequence[int]],
    prefix: str,
) -> Adapter:
    """Bind one component of a pipeline; the pipeline's own configuration says nothing of its models."""
    told = None if transposed is None else (lambda name: transposed(prefix + name))
    return bind(adapter, shapes, config=None if prefix else config, transposed=told)


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
            if adapter.unmatched:
                raise BaseMismatchError(
                    f"the adapter's names would fit if {repair}, but {', '.join(adapter.unmatched)} in its "
                    "configuration matches no module under the names that it has, so its ranks and scales "
                    "cannot be trusted; rename its tensors to the base's names, or remove the pattern"
                )
            bound = settle(bound, self.base, repair)
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
            check_replaced(name, tensor, self.base, problems)
        check_vocabulary(full, self.base, problems)
        shapes = {**self.base, **{name: tuple(tensor.shape) for name, tensor in full.items()}}
        sites = self._sites(adapter, found, shapes, problems)
        shift = {found[key][0]: value for key, value in adapter.shift.items()}
        for name, (tensor, _) in shift.items():
            check_shift(name, tensor, shapes, problems)
        rows = {found[key][0]: value for key, value in adapter.rows.items()}
        for name, (indices, tensor) in rows.items():
            check_rows(name, indices, tensor, shapes, sites, problems)
        problems.raise_if_any(_MEND)
        notes = (*adapter.notes, *self._base_note(adapter))
        seen = {found[key][0]: told for key, told in adapter.base.items() if len(found.get(key, ())) == 1}
        return replace(adapter, sites=sites, replace=full, shift=shift, rows=rows, notes=notes, base=seen)

    def _sites(
        self,
        adapter: Adapter,
        found: Mapping[str, Sequence[str]],
        shapes: Mapping[str, tuple[int, ...]],
        problems: Problems,
    ) -> dict[str, LowRank]:
        """Every site on its parameter; wrappers that only name their module come last, module by module."""
        sites: dict[str, LowRank] = {}
        owners: dict[str, str] = {}
        pending: dict[str, dict[str, dict[str, LowRank]]] = {}
        for key, site in adapter.sites.items():
            fits = self._fits(site, found[key], shapes, problems)
            if len(found[key]) > 1 and len(site.among) > 1:
                pending.setdefault(key.rpartition(".")[0], {})[key] = fits
            else:
                _assign(sites, owners, key, fits, problems)
        for waiting in pending.values():
            while waiting:
                key = min(waiting, key=lambda key: len(waiting[key]))
                name = _assign(sites, owners, key, waiting.pop(key), problems)
                for other, options in waiting.items():
                    if options.pop(name, None) is not None and not options:
                        problems.add(f"{name} is adapted by both {key} and {other}")
        return {name: sites[name] for name in shapes if name in sites}

    def _fits(
        self, site: LowRank, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], problems: Problems
    ) -> dict[str, LowRank]:
        fits: dict[str, LowRank] = {}
        reasons: list[str] = []
        for name in names:
            try:
                fits[name] = fit(_with_scale(site, name), name, shapes[name], self.witness)
            except Misfit as error:
                reasons.append(f"{name}: {error}")
        if not fits:
            problems.add("; or ".join(reasons))
        return fits

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
        if is_absent_head(name, self.base) and self.config.get("tie_word_embeddings", True):
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


def _assign(
    sites: dict[str, LowRank],
    owners: dict[str, str],
    key: str,
    fits: Mapping[str, LowRank],
    problems: Problems,
) -> str:
    """Put the site on its parameter; the parameter's name, or nothing where none is left."""
    if not fits:
        return ""
    name = _choose(key, list(fits), problems)
    if name in owners:
        problems.add(f"{name} is adapted by both {owners[name]} and {key}")
    sites[name], owners[name] = fits[name], key
    return name


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
