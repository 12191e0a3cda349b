"""A training run's whole state dict in several files with an index, as newer ``zero_to_fp32`` writes it."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import open_model
from ..weight_names import places
from .container import Opened
from .stored import Stored


class ShardedStateDict:
    """``pytorch_model.bin.index.json`` or ``model.safetensors.index.json`` beside the files that it names."""

    def holds(self, path: Path) -> bool:
        return path.is_dir() and any((path / index).is_file() for _, _, index in places(path))

    def open(self, path: Path) -> Opened:
        checkpoint = open_model(path)
        whole = {name: Stored.of(checkpoint.read(name)) for name in checkpoint.entries}
        return Opened(path, (path, path.parent), tuple(checkpoint.files), whole=whole)
