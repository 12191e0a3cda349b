"""A fast 64-bit checksum of tensors and files, equal in the C kernel and in torch operations.

``Σ_c mix(h_c + c·φ) + mix(length)`` over 4 KiB chunks c, modulo 2⁶⁴, where h_c is NH of the chunk's 512
little-endian 64-bit words, each cut into 32-bit halves x, y with fixed keys k, l:
``h_c = Σ (x + k mod 2³²) · (y + l mod 2³²)`` (Black et al., "UMAC: fast and secure message authentication",
1999; mix is splitmix64's finaliser).
Chunks add up in any order, so threads and streams need no order. It detects edits and damage, not an
adversary: the keys are public.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from . import kernel

CHUNK = 4096
_WORDS = CHUNK // 8
_MASK, _HALF = (1 << 64) - 1, (1 << 32) - 1
_PHI = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """splitmix64's finaliser on a 64-bit integer."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@cache
def keys() -> torch.Tensor:
    """The 512 pairs of 32-bit keys, as int64 with the unsigned bits."""
    return torch.tensor([_signed(mix((j + 1) * _PHI & _MASK)) for j in range(_WORDS)])


def checksum(data: torch.Tensor) -> int:
    """Checksum of a tensor's bytes, in memory order (any dense strides, any dtype and device)."""
    flat = dense(data).view(torch.uint8)
    step = 512 * CHUNK
    if flat.numel() < 2 * step or not kernel.usable(flat) or torch.get_num_threads() < 2:
        return finish(update(flat, 0), flat.numel())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = pool.map(update, flat.split(step), range(0, flat.numel(), step))
    return finish(sum(parts), flat.numel())


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements in memory order as a flat view; a copy only if the strides leave holes."""
    tensor = tensor.detach()
    if torch.ops.aten.is_non_overlapping_and_dense.default(tensor):
        return torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())
    return tensor.contiguous().view(-1)


def update(part: torch.Tensor, offset: int) -> int:
    """The sum for ``part`` (flat uint8), which begins at byte ``offset``, a multiple of 4096.

    Only the last part of a stream may have a length that is not a multiple of 4096.
    """
    assert offset % CHUNK == 0
    if part.numel() == 0:
        return 0
    if kernel.usable(part):
        return kernel.checksum(part, offset // CHUNK, keys())
    return sum(_torch(p, (offset >> 12) + n * 256) for n, p in enumerate(part.split(256 * CHUNK))) & _MASK


def finish(total: int, length: int) -> int:
    """The checksum of a stream from the sum of its parts and its length in bytes."""
    return (total + mix(length)) & _MASK


def _torch(part: torch.Tensor, first: int) -> int:
    tail = part.numel() % CHUNK
    if tail or part.storage_offset() % 8 or part.data_ptr() % 8:
        part = torch.cat([part, part.new_zeros(-part.numel() % CHUNK)])
    words, key = part.view(torch.int64).view(-1, _WORDS), keys().to(part.device)
    products = (words + key & _HALF) * (_shift(words, 32) + _shift(key, 32) & _HALF)
    index = torch.arange(first, first + len(words), device=part.device)
    h = products.sum(dim=1) + index * _signed(_PHI)
    h = (h ^ _shift(h, 30)) * _signed(0xBF58476D1CE4E5B9)
    h = (h ^ _shift(h, 27)) * _signed(0x94D049BB133111EB)
    return int((h ^ _shift(h, 31)).sum()) & _MASK


def _shift(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
