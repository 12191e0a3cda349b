"""Another naming of the same modules ↔ the base's names, told template by template."""

from __future__ import annotations

from collections.abc import Mapping


class Renames:
    """Names in which ``{}`` stands for a number, e.g. ``layers.{}.attention.wq`` ↔ the base's.

    Args:
        table: their template → the base's, with as many numbers in the same order.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        self._ours = dict(table)
        self._theirs = {ours: theirs for theirs, ours in table.items()}
        assert len(self._ours) == len(self._theirs), "two templates mean one module"

    def ours(self, name: str) -> str | None:
        """The base's name of their module; None if the table does not have it."""
        return _translated(name, self._ours)

    def theirs(self, name: str) -> str | None:
        """Their name of the base's module; None if the table does not have it."""
        return _translated(name, self._theirs)


def _translated(name: str, table: Mapping[str, str]) -> str | None:
    parts = name.split(".")
    found = table.get(".".join("{}" if part.isdigit() else part for part in parts))
    return None if found is None else found.format(*(part for part in parts if part.isdigit()))
