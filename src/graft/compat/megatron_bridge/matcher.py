"""Which modules are meant: exact names, or patterns with ``*`` over full names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from ...engines.megatron_modules import COLUMN, ROW, role_of
from ...errors import TargetError


class ExclusiveError(TargetError, AssertionError):
    """``exclude_modules`` beside names to include; also what the original asserts."""


def is_linear(module: nn.Module) -> bool:
    """The layers that LoRA can be put on: ``nn.Linear`` and Megatron-core's parallel linears."""
    return isinstance(module, nn.Linear) or role_of(module) in (COLUMN, ROW)


def wildcard_match(pattern: str, key: str | None) -> bool | None:
    """Whether ``pattern`` stands for the whole of ``key``: ``*`` is any text, all else is literal.

    ``*.layers.1.*`` does not match layer 10. None for no key.
    """
    if key is None:
        return None
    return re.fullmatch(".*".join(re.escape(part) for part in pattern.split("*")), key) is not None


def _targets() -> list[str]:
    return ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def _sets() -> dict[str, set[str]]:
    return defaultdict(set)


@dataclass
class ModuleMatcher:
    """Tells the modules to adapt, in one of three modes.

    Args:
        target_modules: last names, or patterns with ``*`` for full names.
        exclude_modules: the same for what is left out of all linears; needs the other two to be empty.
        canonical_mapping: names or patterns as keys; they take the place of ``target_modules``.
    """

    target_modules: list[str] = field(default_factory=_targets)
    exclude_modules: list[str] = field(default_factory=list[str])
    canonical_mapping: dict[str, set[str]] = field(default_factory=_sets)

    def match(
        self, m: nn.Module, name: str | None = None, prefix: str | None = None
    ) -> tuple[str, str] | None:
        """The pattern that stands for a module and its full name ``prefix.name``; None if none does.

        Names to include are compared whatever the module is; without any, every linear that is not
        excluded matches under its own name.

        Raises:
            ExclusiveError: ``exclude_modules`` beside names to include.
        """
        full = f"{prefix}.{name}" if prefix else name
        wanted = self._wanted()
        if wanted is None:
            excluded = any(_means(pattern, name, full) for pattern in self.exclude_modules or [])
            return None if excluded or not is_linear(m) else (name or "", full or "")
        source, patterns = wanted
        if self.exclude_modules:
            raise ExclusiveError(
                f"exclude_modules should be empty when using {source}, got {self.exclude_modules}; "
                "set target_modules=[] to adapt all linears but those"
            )
        for pattern in patterns:
            if _means(pattern, name, full):
                return pattern, full or ""
        return None

    def _wanted(self) -> tuple[str, Iterable[str]] | None:
        """The names to include, and the field that they are from; None to include every linear."""
        if self.canonical_mapping:
            return "canonical_mapping", self.canonical_mapping
        return ("target_modules", self.target_modules) if self.target_modules else None


def _means(pattern: str, name: str | None, full: str | None) -> bool:
    return name == pattern or bool(wildcard_match(pattern, full))
