"""What holds an adapter's tensors: a weight file, or a container that torch does not read.

A container is recognised by its first bytes or by a marker inside a directory, never by its name. A format
with a container of its own brings an opener (:class:`Container`), which the registry lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from ..mapped import is_safetensors, load_file, metadata
from ..pickled import load_pickled
from .nested import is_alone, nested
from .stored import Stored
from .zero_checkpoint import find_files, is_checkpoint, open_zero_checkpoint
from .zero_checkpoint.states import FRAMEWORKS


@dataclass(frozen=True)
class Opened:
    """A container, opened.

    Args:
        weights: the file, or the directory, that holds the tensors; for messages.
        folders: where companions of the weights (json, yaml) are looked for, in this order.
        files: every file that decides the tensors.
        kind: the container's name: ``tensors`` for plain weight files.
        tensors: by key, on the CPU; may load each on access.
        metadata: what the container says beside them: strings in safetensors, any values elsewhere.
        whole: in the place of ``tensors``: the whole state dict of a training run, adapter and model.
        buffers: names in ``whole`` that are buffers.
    """

    weights: Path
    folders: tuple[Path, ...]
    files: tuple[Path, ...]
    kind: str = "tensors"
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    metadata: Mapping[str, object] = field(default_factory=dict[str, object])
    whole: Mapping[str, Stored] | None = None
    buffers: frozenset[str] = frozenset()


class Container(Protocol):
    """How one kind of container is recognised and opened."""

    def holds(self, path: Path) -> bool:
        """Whether the file's first bytes, or a marker in the directory, say so; reads next to nothing."""
        ...

    def open(self, path: Path) -> Opened:
        """Open it without reading more than is needed; optional packages are imported here.

        Raises:
            FormatError: damaged, or a package is missing that reads it.
        """
        ...


class EngineCheckpoint:
    """A DeepSpeed engine's checkpoint directory, of any ZeRO stage."""

    def holds(self, path: Path) -> bool:
        return path.is_dir() and is_checkpoint(path)

    def open(self, path: Path) -> Opened:
        checkpoint, found = open_zero_checkpoint(path), find_files(path)
        files = tuple((found.optimizer or found.model).values())
        return Opened(
            path, (path, path.parent), files, "engine", whole=checkpoint.stored, buffers=checkpoint.buffers
        )


class TensorFile:
    """safetensors, or what torch.save writes: a dict of tensors, or a trainer's file with one in it."""

    def holds(self, path: Path) -> bool:
        return path.is_file()

    def open(self, path: Path) -> Opened:
        state = None if is_safetensors(path) else nested(load_pickled(path, inert=FRAMEWORKS), path)
        if state is None:
            return Opened(
                path, (path.parent,), (path,), tensors=load_file(path), metadata=dict(metadata(path))
            )
        if is_alone(state):
            return Opened(path, (path.parent,), (path,), tensors=state)
        whole = {name: Stored.of(tensor) for name, tensor in state.items()}
        return Opened(path, (path.parent,), (path,), whole=whole)


def begins(path: Path, count: int = 16) -> bytes:
    """The file's first bytes; none if it cannot be read (opening it then says why)."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""
