"""The rest of the model that an adapter was trained in, against the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .adapter import Adapter, Beside
from .bind_checks import is_absent_head
from .bind_names import Repair
from .errors import BaseMismatchError, Problems

_MEND = "The checkpoint is of another model than this base; use the base that training started from"


def settle(adapter: Adapter, base: Mapping[str, tuple[int, ...]], repair: Repair) -> Adapter:
    """Find each tensor's place: trained ones replace the base's, frozen ones leave their fingerprints.

    Args:
        adapter: bound, except for ``beside``.
        repair: the one that its sites needed.
    Raises:
        BaseMismatchError: tensors of the adapted model that the base lacks, or has in another shape.
    """
    problems = Problems(BaseMismatchError, "the checkpoint does not fit this base:")
    trained = dict(adapter.replace)
    seen = dict(adapter.base)
    outside: list[str] = []
    frozen = 0
    for name, other in adapter.beside.items():
        place = name if name in base else repair.apply(name)
        if place is None or place not in base:
            if place is None:
                outside.append(name)
            elif not _has_none(place, other, base):
                problems.add(f"{name}: the base has no such tensor")
        elif base[place] != other.shape:
            problems.add(f"{name}: the base has {list(base[place])}, the checkpoint {list(other.shape)}")
        elif other.value is not None:
            trained.setdefault(place, other.value)
        elif other.fingerprint is not None:
            seen[place] = other.fingerprint
            frozen += 1
    problems.raise_if_any(_MEND)
    notes = _notes(adapter.beside, outside, frozen)
    return replace(adapter, replace=trained, base=seen, beside={}, notes=(*adapter.notes, *notes))


def _has_none(place: str, other: Beside, base: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a base may well lack it: a buffer, or a head that is tied to the embedding."""
    return (other.value is None and other.fingerprint is None) or is_absent_head(place, base)


def _notes(beside: Mapping[str, Beside], outside: list[str], frozen: int) -> list[str]:
    notes: list[str] = []
    if frozen:
        notes.append(f"{frozen} frozen tensors of the checkpoint are not used: the base's own are")
    trained = [name for name in outside if beside[name].value is not None]
    if trained:
        notes.append(f"trained outside the adapted model, so not used: {', '.join(trained[:6])}")
    if len(outside) > len(trained):
        notes.append(f"{len(outside) - len(trained)} tensors of the checkpoint lie outside the adapted model")
    return notes
