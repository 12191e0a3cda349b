"""The accounting that every reader ends with: each key used exactly once, each tensor whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping

import torch

from ..errors import FormatError, Problems
from ..rounding import WEIGHT_DTYPES


class Ledger:
    """Hands out a file's tensors and remembers which were taken.

    Args:
        tensors: the file's tensors.
        where: the file, for messages.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], where: object) -> None:
        self._tensors, self._where = tensors, where
        self._taken: set[str] = set()
        self.problems = Problems(FormatError, f"{where} cannot be used:")

    def take(self, key: str) -> torch.Tensor:
        """The tensor of this key, to be taken once."""
        assert key not in self._taken, key
        self._taken.add(key)
        return self._tensors[key]

    def number(self, key: str) -> float | None:
        """The one finite number that the tensor of this key holds; None, and a fault, if it is another."""
        tensor = self.take(key)
        value = float(tensor.double().item()) if tensor.numel() == 1 else math.nan
        if math.isfinite(value):
            return value
        self.problems.add(f"{key} must be one finite number; it has shape {list(tensor.shape)}")
        return None

    def left(self) -> list[str]:
        """Keys not taken yet, in the file's order."""
        return [key for key in self._tensors if key not in self._taken]

    def check_tensors(self, numbers: Container[str] = ()) -> None:
        """Record every tensor that is empty, not floating point, or not finite.

        Args:
            numbers: keys of single numbers, which :meth:`number` takes and checks.
        """
        for key, tensor in self._tensors.items():
            if key in numbers:
                continue
            if tensor.numel() == 0:
                self.problems.add(
                    f"{key} is empty, shape {list(tensor.shape)}: the writer did not gather its shards "
                    "(ZeRO-3, FSDP); save the adapter again with gathered parameters"
                )
            elif tensor.dtype not in WEIGHT_DTYPES:
                self.problems.add(
                    f"{key} has dtype {tensor.dtype}; bfloat16, float16, float32 or float64 is needed"
                )
            elif not _finite(tensor):
                self.problems.add(f"{key} holds NaN or infinite values")

    def close(self, mend: str = "", explain: Callable[[str], str] = lambda key: "unknown key") -> None:
        """Raise everything recorded, each key that nobody took included.

        Raises:
            FormatError: at least one fault.
        """
        for key in self.left():
            self.problems.add(f"{key}: {explain(key)}")
        self.problems.raise_if_any(mend)


def listed(names: Iterable[str], shown: int = 6) -> str:
    """A short list for a sentence: ``a, b, c and 3 more``."""
    names = list(names)
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are finite; in parts, so that a mapped tensor of any size needs no memory."""
    parts = tensor.detach().reshape(-1).split(1 << 20)
    return all(bool(part.isfinite().all()) for part in parts)
