"""Errors for the user: what is wrong, the offending value, and the call or flag that mends it."""

from __future__ import annotations


class GraftError(ValueError):
    """Base of every error that a user can cause and mend."""


class LayoutError(GraftError):
    """A weight's shape does not fit the layout it is to be read with."""


class TargetError(GraftError):
    """Target patterns that match nothing, or modules that cannot be adapted as asked."""


class StateError(GraftError):
    """A verb that the model's state forbids: factors or base changed while fused, and the like."""


class FormatError(GraftError):
    """A file that is not what it claims to be, or holds what cannot be carried."""


class BaseMismatchError(GraftError):
    """An adapter that was not made for this base: names, shapes or vocabulary differ."""


class OutputError(GraftError):
    """An output that exists, cannot be written, or would overwrite an input."""


class VerifyError(GraftError):
    """A result that is not W + ΔW rounded once."""


class Problems:
    """Collect every fault first, then raise once, so that one run shows the user all of them."""

    def __init__(self, kind: type[GraftError], heading: str, shown: int = 12) -> None:
        self._kind, self._heading, self._shown = kind, heading, shown
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        self._lines.append(line)

    def __bool__(self) -> bool:
        return bool(self._lines)

    def raise_if_any(self, mend: str = "") -> None:
        """Raise the collected faults as one error that ends with ``mend``; do nothing without faults."""
        if not self._lines:
            return
        listed = "".join(f"\n  - {line}" for line in self._lines[: self._shown])
        more = len(self._lines) - self._shown
        rest = f"\n  … and {more} more" if more > 0 else ""
        raise self._kind(f"{self._heading}{listed}{rest}" + (f"\n{mend}" if mend else ""))
