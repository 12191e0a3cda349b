"""The vectorised kernel: compiled once with the machine's C compiler, and never needed.

Every function has a pure torch twin with equal results; ``GRAFT_KERNEL=torch`` chooses the twins.
"""

from __future__ import annotations

import torch


def usable(tensor: torch.Tensor) -> bool:
    """Whether the compiled kernel can work on this tensor."""
    return False


def add(
    w: torch.Tensor,
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor,
    sign: int,
) -> int:
    raise NotImplementedError


def checksum(part: torch.Tensor, first: int, keys: torch.Tensor) -> int:
    raise NotImplementedError
