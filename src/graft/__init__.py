"""Graft: LoRA for PyTorch. Adapt, train, save, fuse, unfuse and export; exactly, on every road.

The names are imported when they are first used: torch takes seconds, and the command line's help or a
mistake in a call should not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapted import Adapted
    from .errors import (
        BaseMismatchError,
        FormatError,
        GraftError,
        LayoutError,
        OutputError,
        StateError,
        TargetError,
        VerifyError,
    )
    from .export_model import export
    from .fusing import disabled, fuse, fused, unfuse
    from .layers import Conv1d, Conv2d, Conv3d, Embedding, Linear
    from .layout import Layout
    from .loading import load
    from .model import AdaptReport, adapt, freeze, state_dict, unadapt
    from .options import Options
    from .saving import save
    from .verify_model import verify

__version__ = "0.1.0"

#: module → the public names that it holds
_HOMES = {
    "adapted": "Adapted",
    "errors": "BaseMismatchError FormatError GraftError LayoutError OutputError StateError TargetError "
    "VerifyError",
    "export_model": "export",
    "fusing": "disabled fuse fused unfuse",
    "layers": "Conv1d Conv2d Conv3d Embedding Linear",
    "layout": "Layout",
    "loading": "load",
    "model": "AdaptReport adapt freeze state_dict unadapt",
    "options": "Options",
    "saving": "save",
    "verify_model": "verify",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AdaptReport",
    "Adapted",
    "BaseMismatchError",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "FormatError",
    "GraftError",
    "Layout",
    "LayoutError",
    "Linear",
    "Options",
    "OutputError",
    "StateError",
    "TargetError",
    "VerifyError",
    "adapt",
    "disabled",
    "export",
    "freeze",
    "fuse",
    "fused",
    "load",
    "save",
    "state_dict",
    "unadapt",
    "unfuse",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        value: object = getattr(import_module(f".{_HOME[name]}", __name__), name)
    elif not name.startswith("_") and find_spec(f".{name}", __name__):
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
