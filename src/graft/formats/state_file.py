"""Write one file of an adapter, whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..errors import OutputError


def save_state(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """A state dict to the new file ``path``, with torch.save.

    Raises:
        OutputError: the file exists or cannot be written.
    """
    state = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    save_new(path, lambda staging: torch.save(state, staging))


def save_new(path: Path, save: Callable[[Path], object]) -> None:
    """A new file that ``save`` writes: under a hidden name beside its final place, synced, then named.

    Raises:
        OutputError: the file exists or cannot be written.
    """
    if path.exists():
        raise OutputError(f"{path} already exists; choose another output")
    staging = path.with_name(f".{path.name}.graft-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(staging)
        with staging.open("rb") as written:
            os.fsync(written.fileno())
        os.link(staging, path)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    finally:
        staging.unlink(missing_ok=True)
