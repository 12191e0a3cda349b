"""Names that are spelled with ``_`` in the place of ``.`` (kohya's), against the names of a base.

``down_blocks_0_attentions_1_proj_in`` may be read in many ways; only the base's own names say which is
meant. One prefix of the base's names (``unet_``) may be missing from all of them, or one too many be there
(``text_model_``). Where they are not the base's names at all, they may be those of the model's own authors,
which sd-scripts trains some models under (:mod:`.bind_ldm`, :mod:`.bind_flux`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .adapter import Adapter, LowRank
from .bind_flux import flux_names
from .bind_ldm import ldm_names
from .bind_names import nearest
from .bind_spelling import Shapes, Spelling
from .errors import BaseMismatchError, Problems

_LDM = "LDM's names"
_HEADING = "the adapter's names are spelled with _ for ., and of the base's:"
#: how many names get a hint: each takes a search through all of the base's
_HINTS = 12
_ONE = "Remove one of the two from the file"
_MEND = "Use the base that the adapter was trained on, with the names that it had then"


def spelled_out(adapter: Adapter, base: Shapes) -> Adapter:
    """The adapter under the base's dotted names.

    Raises:
        BaseMismatchError: names that are none of the base's, or more than one; all in one message.
    """
    if not adapter.flattened:
        return adapter
    meant: dict[str, list[str]] = {}
    for name in base:
        meant.setdefault(flat(name), []).append(name)
    keys = sorted(adapter.touched)
    repair = _repair(keys, meant)
    ours = {key: meant.get(repair.apply(key, meant), []) for key in keys}
    missing = [key for key in keys if not ours[key]]
    theirs = _other_names(base) if missing else {}
    problems = Problems(BaseMismatchError, _HEADING)
    for key in keys:
        if len(ours[key]) > 1:
            problems.add(f"{key} may be any of {', '.join(ours[key])}")
    for n, key in enumerate(missing):
        if key not in theirs or key not in adapter.sites:
            problems.add(f"{key} is none" + (nearest(key, list(meant)) if n < _HINTS else ""))
        elif not theirs[key].fits(adapter.sites[key]):
            names, have = ", ".join(theirs[key].parts), adapter.sites[key].B.shape[0]
            problems.add(f"{key} has {have} outputs; it is {names} in the base, {theirs[key].rows} in all")
    problems.raise_if_any(_MEND)
    known = {key: names[0] for key, names in ours.items() if names}
    _refuse_twice(known)
    spelled = adapter.renamed(lambda key: known.get(key))
    return replace(
        spelled,
        sites=_with(spelled.sites, {key: theirs[key].sites(adapter.sites[key]) for key in missing}),
        notes=(*adapter.notes, *repair.notes, *_said(theirs[key] for key in missing)),
        flattened=False,
    )


def flat(name: str) -> str:
    """``a.b_c.weight`` as ``a_b_c.weight``: the parameter's own name stays apart."""
    module, dot, leaf = name.rpartition(".")
    return f"{module.replace('.', '_')}{dot}{leaf}"


def _other_names(base: Shapes) -> dict[str, Spelling]:
    """Flattened names that the model's authors have for the base's parameters."""
    found = {told: Spelling.joined(_LDM, [name], base) for told, name in ldm_names(base).items()}
    return {flat(told): spelling for told, spelling in (found | flux_names(base)).items()}


def _said(used: Iterable[Spelling]) -> list[str]:
    namings = dict.fromkeys(spelling.naming for spelling in used)
    return [f"the file has {naming} for the base's modules, and was mapped" for naming in namings]


def _refuse_twice(known: Mapping[str, str]) -> None:
    """Two of the adapter's names of one parameter: as it is and repaired.

    Raises:
        BaseMismatchError: naming them.
    """
    problems = Problems(BaseMismatchError, "the adapter has two names for one parameter of the base:")
    owners: dict[str, str] = {}
    for key, name in known.items():
        if name in owners:
            problems.add(f"{owners[name]} and {key} are {name}")
        owners[name] = key
    problems.raise_if_any(_ONE)


def _with(sites: Mapping[str, LowRank], more: Mapping[str, Mapping[str, LowRank]]) -> dict[str, LowRank]:
    """The sites and those that other names stand for.

    Raises:
        BaseMismatchError: two names of one parameter.
    """
    found = dict(sites)
    problems = Problems(BaseMismatchError, "the adapter has two names for one parameter of the base:")
    for key, parts in more.items():
        for name, site in parts.items():
            if name in found:
                problems.add(f"{key} is {name}, which is there under its own name or another too")
            found[name] = site
    problems.raise_if_any(_ONE)
    return found


@dataclass(frozen=True)
class _Repair:
    """A prefix that is missing from names, or one that is too many."""

    strip: str = ""
    add: str = ""

    def apply(self, key: str, meant: Mapping[str, object]) -> str:
        """The name in the base: as it is if the base has it, else repaired."""
        if key in meant or not key.startswith(self.strip):
            return key
        return self.add + key.removeprefix(self.strip)

    @property
    def notes(self) -> list[str]:
        if self.add:
            return [f"names repaired: the prefix {self.add!r} was put in front"]
        return [f"names repaired: the prefix {self.strip!r} was taken off"] if self.strip else []


def _repair(keys: list[str], meant: Mapping[str, list[str]]) -> _Repair:
    """The one repair that makes all keys the base's; none if they are, or if no repair fits all.

    Raises:
        BaseMismatchError: several repairs fit.
    """
    missing = next((key for key in keys if key not in meant), None)
    if missing is None:
        return _Repair()
    found = [_Repair(add=name.removesuffix(missing)) for name in meant if name.endswith(f"_{missing}")]
    found += [_Repair(strip=missing.removesuffix(name)) for name in meant if missing.endswith(f"_{name}")]
    working = [
        repair
        for repair in found
        if not any(part.isdigit() for part in f"{repair.strip}{repair.add}".split("_"))
        and all(repair.apply(key, meant) in meant for key in keys)
    ]
    if len(working) > 1:
        prefixes = ", ".join(repair.strip or repair.add for repair in working)
        raise BaseMismatchError(
            f"the adapter's names fit the base under {len(working)} prefixes ({prefixes}); rename its tensors"
        )
    return working[0] if working else _Repair()
