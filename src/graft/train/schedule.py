"""When a callback exports, and to which folder."""

from __future__ import annotations

import glob
import string
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ..errors import OutputError, Problems, TargetError

#: every n-th, or these
When: TypeAlias = "int | Collection[int]"
_FIELDS = ("epoch", "step")


@dataclass(frozen=True)
class Schedule:
    """The moments of export. Without any, the end of each epoch.

    Args:
        epochs: after every n-th epoch, or after these; their numbers are the trainer's.
        steps: after every n-th optimizer step, or after these.
        end: when training ends.
        checkpoints: whenever the trainer writes a checkpoint.
    Raises:
        TargetError: a number that no epoch or step has.
    """

    epochs: When | None
    steps: When | None
    end: bool
    checkpoints: bool

    def __post_init__(self) -> None:
        problems = Problems(TargetError, "cannot tell when to export:")
        for name, when in (("epochs", self.epochs), ("steps", self.steps)):
            if when is None:
                continue
            many = isinstance(when, Collection)
            numbers: list[object] = list(when) if many else [when]
            least = 0 if many else 1
            if not numbers or not all(type(n) is int and n >= least for n in numbers):
                problems.add(
                    f"{name} must be n ≥ 1 for every n-th, or a list of numbers, got {name}={when!r}"
                )
        problems.raise_if_any()

    def after_epoch(self, number: int, done: int) -> bool:
        """Whether to export after the epoch of this number; ``done``: epochs until now."""
        every = 1 if self.epochs is None and not (self.steps or self.end or self.checkpoints) else self.epochs
        return _due(every, number, done)

    def after_step(self, step: int) -> bool:
        return _due(self.steps, step, step)


def _due(when: When | None, number: int, done: int) -> bool:
    if when is None:
        return False
    if isinstance(when, int):
        return done > 0 and done % when == 0
    return number in when


class FolderPattern:
    """Where the exports go: a path with ``{epoch}`` or ``{step}`` in it.

    Args:
        again: whether one folder may be written more than once.
    Raises:
        OutputError: a field of another name, or a pattern that several exports share.
    """

    def __init__(self, pattern: str | Path, schedule: Schedule, *, again: bool) -> None:
        self.pattern = str(pattern)
        try:
            fields = {name for _, name, *_ in string.Formatter().parse(self.pattern) if name is not None}
            if unknown := sorted(fields - set(_FIELDS)):
                raise KeyError(f"{{{unknown[0]}}}")
            self.of(0, 0)
        except (ValueError, KeyError, IndexError) as error:
            raise OutputError(
                f"the folder {self.pattern!r} is not a pattern of {{epoch}} and {{step}}: {error.args[0]}"
            ) from None
        needs = "step" if schedule.steps or schedule.checkpoints else "epoch"
        alone = schedule.end and not (schedule.epochs or schedule.steps or schedule.checkpoints)
        if not (again or alone or fields & {needs, "step"}):
            raise OutputError(
                f"several exports would go to the one folder {self.pattern!r}; put {{{needs}}} into it, or "
                "pass force=True to replace each by the next"
            )

    def of(self, epoch: int, step: int) -> Path:
        return Path(self.pattern.format(epoch=epoch, step=step))

    def existing(self) -> list[Path]:
        """Everything on the disk that an export of this pattern may be."""
        fields = string.Formatter().parse(self.pattern)
        text = "".join(glob.escape(literal) + ("*" if name else "") for literal, name, *_ in fields)
        root = Path(text).anchor
        return sorted(Path(root or ".").glob(text.removeprefix(root)))
