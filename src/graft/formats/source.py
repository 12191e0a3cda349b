"""The files of one adapter, opened once and looked at by every format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..adapter import Beside
from ..errors import FormatError
from ..pickled import load_pickled
from ..tensors import load_file, read_json
from .stored import Stored
from .training import is_training, split, state_dict_of
from .zero_checkpoint import find_files, is_checkpoint, open_zero_checkpoint
from .zero_checkpoint.states import FRAMEWORKS

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
        beside: the rest of the model, where the file holds a whole model as it was trained.
        notes: what the user must be told of the file.
    """

    path: Path
    weights: Path
    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, object] | None
    config_path: Path
    beside: Mapping[str, Beside] = field(default_factory=dict[str, Beside])
    notes: tuple[str, ...] = ()


def open_source(path: Path, config: Path | None = None) -> Source:
    """Open an adapter file or directory, or a trainer's checkpoint with an adapter in it.

    Args:
        path: a weight file, a directory that holds one, or a DeepSpeed engine's checkpoint directory.
        config: a json to use instead of the ``adapter_config.json`` beside the weights.
    Raises:
        FormatError: no such path, no weight file or several, a file that cannot be read.
    """
    path = Path(path)
    if _is_engines(path):
        return _open_engines(path, config)
    weights = _weight_file(path)
    found, config_path = _config(weights.parent, config)
    nested = None if weights.suffix == ".safetensors" else _state_dict(weights)
    tensors = load_file(weights) if nested is None else nested
    if nested is None and not is_training(tensors, found):
        return Source(path, weights, tensors, found, config_path)
    stored = {name: Stored.of(tensor) for name, tensor in tensors.items()}
    parts = split(stored, weights, found, frozenset())
    return Source(path, weights, parts.tensors, found, config_path, parts.beside, parts.notes)


def _open_engines(path: Path, config: Path | None) -> Source:
    """A DeepSpeed engine's checkpoint; the configuration may lie in its folder."""
    beside_tags = path.parent if not (path / CONFIG_NAME).is_file() else path
    found, config_path = _config(beside_tags if (beside_tags / CONFIG_NAME).is_file() else path, config)
    checkpoint = open_zero_checkpoint(path)
    parts = split(checkpoint.stored, path, found, checkpoint.buffers)
    return Source(path, path, parts.tensors, found, config_path, parts.beside, parts.notes)


def weight_files(path: Path) -> list[Path]:
    """The files that decide an adapter: its weights, or every rank's share of what was trained."""
    if not _is_engines(path):
        return [_weight_file(path)]
    found = find_files(path)
    return [*(found.optimizer or found.model).values()]


def _is_engines(path: Path) -> bool:
    """An engine's checkpoint, unless the trainer wrote an adapter's files into the same folder."""
    return path.is_dir() and not any((path / name).is_file() for name in _PREFERRED) and is_checkpoint(path)


def _state_dict(weights: Path) -> dict[str, torch.Tensor] | None:
    """The state dict inside a trainer's file; None if the file is not one."""
    return state_dict_of(load_pickled(weights, inert=FRAMEWORKS))


def _config(folder: Path, given: Path | None) -> tuple[Mapping[str, object] | None, Path]:
    path = Path(given) if given is not None else folder / CONFIG_NAME
    if given is not None and not path.is_file():
        raise FormatError(f"there is no adapter configuration at {path}; correct the path given")
    return (read_json(path) if path.is_file() else None), path


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
