"""The files of one adapter, opened once and looked at by every format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import FormatError
from ..tensors import load_file, read_json

#: weight files of an adapter directory, as PEFT names them
_PREFERRED = ("adapter_model.safetensors", "adapter_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """What a format's reader sees.

    Args:
        path: what the user named: a file or a directory.
        weights: the file that holds the tensors.
        tensors: all of its tensors by key, on the CPU, mapped where the file allows.
        config: the adapter's json beside it; None if there is none.
        config_path: where that json is or would be, for messages.
    """

    path: Path
    weights: Path
    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, object] | None
    config_path: Path


def open_source(path: Path, config: Path | None = None) -> Source:
    """Open an adapter file or directory.

    Args:
        path: a weight file, or a directory that holds one.
        config: a json to use instead of the ``adapter_config.json`` beside the weights.
    Raises:
        FormatError: no such path, no weight file or several, a file that cannot be read.
    """
    path = Path(path)
    weights = _weight_file(path)
    config_path = Path(config) if config is not None else weights.parent / CONFIG_NAME
    if config is not None and not config_path.is_file():
        raise FormatError(f"there is no adapter configuration at {config_path}; correct the path given")
    found = read_json(config_path) if config_path.is_file() else None
    return Source(path, weights, load_file(weights), found, config_path)


def _weight_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FormatError(f"there is no adapter at {path}; name an adapter file or directory that exists")
    preferred = [path / name for name in _PREFERRED if (path / name).is_file()]
    if len(preferred) > 1:
        raise FormatError(
            f"{path} holds both {' and '.join(p.name for p in preferred)}, which may differ; "
            "name the one to use, or remove the other"
        )
    if preferred:
        return preferred[0]
    found = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    if len(found) == 1:
        return found[0]
    if not found:
        raise FormatError(
            f"{path} holds no adapter weights ({' or '.join(_PREFERRED)}); it holds: {_listing(path)}"
        )
    names = ", ".join(p.name for p in found)
    raise FormatError(f"{path} holds several weight files ({names}); name the adapter's file itself")


def _listing(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "nothing"
