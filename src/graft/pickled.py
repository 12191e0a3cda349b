"""Tensors from torch.save's files, loaded with ``weights_only=True`` and mapped where possible."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import cast

import torch

from .errors import FormatError
from .safetensors_header import refuse_stub


def load_pickled(path: Path) -> object:
    """What a .bin / .pt / .pth file holds, tensors on the CPU, mapped from the file if it is a zip.

    Raises:
        FormatError: empty, an LFS pointer, damaged, or a pickle that weights_only refuses.
    """
    try:
        with path.open("rb") as f:
            start = f.read(32)
        refuse_stub(path, start, path.stat().st_size)
        zipped = start.startswith(b"PK")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FormatError:
        raise
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path} holds more than tensors, and loading it could run code: {_first_line(error)}. "
            "Save it again as safetensors, or as a plain dict of tensors"
        ) from None
    except Exception as error:
        raise FormatError(
            f"{path} is not a readable PyTorch file: {_first_line(error)}. It may be truncated: download "
            "it again"
        ) from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A flat dict of tensors from a .bin / .pt / .pth file.

    Raises:
        FormatError: as :func:`load_pickled`, or the file holds something else than named tensors.
    """
    value = load_pickled(path)
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, not a dict of tensors")
    table = cast("dict[object, object]", value)
    odd = [k for k, v in table.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)]
    if odd:
        raise FormatError(
            f"{path} is not a flat dict of tensors: {odd[0]!r} is a {type(table[odd[0]]).__name__}. "
            "Save the state dict alone"
        )
    tensors = cast("dict[str, torch.Tensor]", table)
    return {name: t.detach() for name, t in tensors.items()}


def _first_line(error: BaseException) -> str:
    """The first sentence of torch's long explanations."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    refused = [line for line in lines if line.startswith("WeightsUnpickler error")]
    return (refused or lines or [type(error).__name__])[0].rstrip(".")
