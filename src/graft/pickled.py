"""Tensors from torch.save's files, loaded with ``weights_only=True`` and mapped where possible."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import torch

from .errors import FormatError
from .safetensors_header import refuse_stub


class Inert:
    """Stands for an object of a class that is not wanted; whatever the pickle does to it does nothing."""

    args: tuple[object, ...] = ()

    def __new__(cls, *args: object, **_: object) -> Inert:
        found = super().__new__(cls)
        found.args = args
        return found

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def load_pickled(path: Path, inert: Sequence[str] = ()) -> object:
    """What a .bin / .pt / .pth file holds, tensors on the CPU, mapped from the file if it is a zip.

    Args:
        inert: beginnings of dotted names; an object of such a class becomes an :class:`Inert`, and the
            class is neither imported nor called.
    Raises:
        FormatError: empty, an LFS pointer, damaged, or a pickle that weights_only refuses.
    """
    try:
        with path.open("rb") as f:
            start = f.read(32)
        refuse_stub(path, start, path.stat().st_size)
        zipped = start.startswith(b"PK")
        with _stand_ins(path, inert if zipped else ()):
            if path.suffix == ".safetensors":  # torch goes by the name and would not read it as a pickle
                with path.open("rb") as f:
                    return torch.load(f, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FormatError:
        raise
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        if (refused := _refused(error)) is None:
            raise _unreadable(path, "its pickle is damaged, or holds more than tensors") from None
        raise FormatError(
            f"{path} holds more than tensors, and loading it could run code ({refused}). Nothing was run. "
            "Save it again as safetensors, or as a plain dict of tensors"
        ) from None
    except (KeyError, IndexError, EOFError):  # what the unpickler says of bytes that are no pickle
        raise _unreadable(path, "it is neither a zip nor a pickle") from None
    except Exception as error:
        raise _unreadable(path, _first_sentence(error)) from error


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


def _stand_ins(path: Path, inert: Sequence[str]) -> AbstractContextManager[object]:
    """While it is open, names that begin so are allowed, and mean :class:`Inert`."""
    names: Iterable[str] = torch.serialization.get_unsafe_globals_in_checkpoint(path) if inert else ()
    chosen = [name for name in names if name.startswith(tuple(inert))]
    return torch.serialization.safe_globals([(Inert, name) for name in chosen])


def _unreadable(path: Path, why: str) -> FormatError:
    return FormatError(
        f"{path} is not a readable PyTorch file: {why}. It may be truncated: download it again"
    )


def _refused(error: pickle.UnpicklingError) -> str | None:
    """The global that weights_only refused; None if the pickle is just damaged.

    Torch's whole text must not reach the user: it advises loading with weights_only=False.
    """
    found = re.search(r"GLOBAL:?\s+([\w.]+)", str(error))
    return found[1] if found else None


def _first_sentence(error: BaseException) -> str:
    """The first sentence of torch's long explanations."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
