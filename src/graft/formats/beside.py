"""What lies in an adapter's directory: the adapter's own file, a twin of it, and files of other things."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import FormatError
from ..mapped import load_file
from .ledger import listed

#: the file that a producer calls the adapter, where a directory holds more weight files than that
PREFERRED = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapters.safetensors",
    "adapter.safetensors",
    "pytorch_adapter.bin",
    "lit_model.pth.lora",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
#: how weight files end
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".lora", ".gguf")
#: how names of files begin that hold a trainer's state, no weights
_TRAINER = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "random_states")
#: the two forms of PEFT's file; its loader takes the first
_TWINS = PREFERRED[:2]


def preferred_in(path: Path) -> list[Path]:
    """The files in this directory whose names say that they are the adapter."""
    return [path / name for name in PREFERRED if path.is_dir() and (path / name).is_file()]


def twins(places: Sequence[Path]) -> bool:
    """Whether these are PEFT's two forms of one adapter, with the same tensors to the last bit."""
    if tuple(place.name for place in places) != _TWINS:
        return False
    try:
        one, two = (load_file(place) for place in places)
    except FormatError:
        return False
    return one.keys() == two.keys() and all(_equal(tensor, two[name]) for name, tensor in one.items())


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


def unread(path: Path, places: Sequence[Path]) -> list[str]:
    """A note on weight files beside the adapter, such as LLaVA's ``non_lora_trainables.bin``."""
    names = sorted(
        place.name
        for place in path.iterdir()
        if place.suffix in SUFFIXES
        and place.is_file()
        and place not in places
        and not place.name.startswith(_TRAINER)
    )
    if not names:
        return []
    return [
        f"not read, though it lies beside the adapter: {listed(names)}. Weights that were trained with the "
        "adapter and are stored there are not in the result"
    ]


def inside(path: Path) -> str:
    """For a message: the folders that hold adapters, or whatever there is."""
    entries = sorted(path.iterdir())
    folders = [entry.name for entry in entries if preferred_in(entry)]
    if folders:
        return f"adapters lie in its folders {listed(folders, 8)}: name one of them"
    names = [entry.name for entry in entries]
    return f"it holds: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}" if names else "it is empty"
