"""Graft: LoRA for PyTorch. Adapt, train, save, fuse, unfuse and export; exactly, on every road."""

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
from .model import AdaptReport, adapt, freeze, state_dict, unadapt
from .options import Options
from .persist import load, save
from .verify_model import verify

__version__ = "0.1.0"

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
