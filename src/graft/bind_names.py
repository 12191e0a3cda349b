"""An adapter's names ↔ a base's names: exact, or one proven prefix repair, or an error with hints."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

#: components that wrappers put anywhere in a name
_INTERIOR = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: components that wrappers put in front of a model's names; they name nothing of the model
_WRAPPERS = _INTERIOR | {"base_model", "module", "_forward_module"}

Parts = tuple[str, ...]


@dataclass(frozen=True)
class Repair:
    """Replace the prefix ``strip`` by ``add`` in names that the base does not have."""

    strip: Parts
    add: Parts

    def apply(self, name: str) -> str | None:
        """The repaired name; None if the name does not begin with ``strip``."""
        parts = clean(name)
        if parts[: len(self.strip)] != self.strip:
            return None
        return ".".join((*self.add, *parts[len(self.strip) :]))

    def __str__(self) -> str:
        before, after = ".".join(self.strip), ".".join(self.add)
        if not before and not after:
            return f"what wrappers insert ({', '.join(sorted(_INTERIOR, reverse=True))}) was taken out"
        if before and after:
            return f"the prefix {before!r} is {after!r} in the base"
        return f"the prefix {before!r} was taken off" if before else f"the prefix {after!r} was put in front"


def clean(name: str) -> Parts:
    """The name's components without those that FSDP, activation checkpointing and torch.compile insert."""
    return tuple(part for part in name.split(".") if part not in _INTERIOR)


def unwrapped(name: str) -> str:
    """The name in the plain model: without the components that wrappers insert or put in front."""
    parts = clean(name)
    while parts and parts[0] in _WRAPPERS:
        parts = parts[2 if parts[:2] == ("base_model", "model") else 1 :]
    return ".".join(parts)


def repairs(missing: Sequence[str], base: Iterable[str]) -> list[Repair]:
    """Prefix repairs under which one of the alternative names ``missing`` is a name of the base.

    A repair puts in or takes off wrapper components, ``model``, and at most one name of the model's own
    (``bert``, or ``language_model`` after ``model``); it never exchanges one name for another nor touches a
    layer's number, so a renamed layer or another tower of the model cannot be repaired.
    """
    found: dict[Repair, None] = {}
    names = [name.split(".") for name in base]
    for name in missing:
        parts = clean(name)
        for other in names:
            if other[-1] != parts[-1]:
                continue
            common = _common_suffix(parts, other)
            repair = Repair(parts[: len(parts) - common], tuple(other[: len(other) - common]))
            if _allowed(repair):
                found[repair] = None
    return list(found)


def _common_suffix(one: Sequence[str], other: Sequence[str]) -> int:
    n = 0
    while n < min(len(one), len(other)) and one[-1 - n] == other[-1 - n]:
        n += 1
    return n


def _allowed(repair: Repair) -> bool:
    if any(part.isdigit() for part in (*repair.strip, *repair.add)):
        return False
    strip, add = ([p for p in side if p not in _WRAPPERS] for side in (repair.strip, repair.add))
    while strip and add and strip[0] == add[0]:
        strip, add = strip[1:], add[1:]
    named = [p for p in (*strip, *add) if p != "model"]
    return len(named) <= 1 and not (named and strip and add)


def renamed(
    needs: Mapping[str, Sequence[str]], base: Mapping[str, object], repair: Repair
) -> dict[str, list[str]] | None:
    """For each need, its alternatives that the base has, repaired where needed; None if one has none."""
    result: dict[str, list[str]] = {}
    for key, alternatives in needs.items():
        there = [name for name in alternatives if name in base]
        if not there:
            tried = [repair.apply(name) for name in alternatives]
            there = [name for name in tried if name is not None and name in base]
        if not there:
            return None
        result[key] = there
    return result


def nearest(name: str, base: Sequence[str]) -> str:
    """A hint: the base's names most like this one."""
    tail = name.split(".")[-2:]
    alike = [other for other in base if other.split(".")[-2:] == tail] or list(base)
    close = difflib.get_close_matches(name, alike[:2000], n=2, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else ""


def layer_numbers(names: Iterable[str]) -> Iterator[int]:
    """The first number in each dotted name."""
    for name in names:
        number = next((part for part in name.split(".") if part.isdigit()), None)
        if number is not None:
            yield int(number)
