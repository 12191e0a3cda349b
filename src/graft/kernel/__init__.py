"""The vectorised kernel: compiled once with the machine's C compiler, and never needed.

Every function has a pure torch twin with equal results. ``GRAFT_KERNEL=torch`` chooses the twins,
``GRAFT_KERNEL=c`` insists on the kernel and raises where it cannot be compiled.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch

from .build import BuildError, library

_CODE = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_int64, _pointer = ctypes.c_int64, ctypes.c_void_p


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    choice = os.environ.get("GRAFT_KERNEL", "")
    if choice == "torch":
        return "GRAFT_KERNEL=torch"
    try:
        lib = ctypes.CDLL(str(library()))
    except (BuildError, OSError) as error:
        if choice == "c":
            raise
        return str(error)
    factors = [_int64] * 3 + [_pointer, _int64] * 2 + [_pointer]
    lib.graft_add.argtypes = [ctypes.c_int, _pointer, _int64] * 2 + factors
    lib.graft_add.restype = _int64
    lib.graft_there_and_back.argtypes = [ctypes.c_int, _pointer, _int64, _pointer, _pointer, *factors]
    lib.graft_there_and_back.restype = _int64
    lib.graft_add_flat.argtypes = [ctypes.c_int, _pointer] * 2 + [_int64] * 7 + factors[2:]
    lib.graft_add_flat.restype = _int64
    exceptions = [_pointer, _int64, _int64] + [_pointer] * 4
    lib.graft_exceptions.argtypes = [ctypes.c_int, _pointer, _int64, *exceptions]
    lib.graft_exceptions.restype = None
    lib.graft_correct.argtypes = [
        ctypes.c_int,
        _pointer,
        _int64,
        _int64,
        _pointer,
        _int64,
        _pointer,
        _pointer,
    ]
    lib.graft_correct.restype = None
    lib.graft_checksum.argtypes = [_pointer, _int64, ctypes.c_uint64, _pointer]
    lib.graft_checksum.restype = ctypes.c_uint64
    return lib


def status() -> str:
    """``"c"``, or ``"torch (why)"``: which implementation runs on CPU tensors."""
    lib = _load()
    return f"torch ({lib})" if isinstance(lib, str) else "c"


def usable(tensor: torch.Tensor) -> bool:
    """Whether the compiled kernel can work on this tensor."""
    known = tensor.dtype in _CODE or tensor.dtype == torch.uint8
    return known and tensor.device.type == "cpu" and not isinstance(_load(), str)


def _lib() -> ctypes.CDLL:
    lib = _load()
    assert not isinstance(lib, str)
    return lib


def _factors(left: torch.Tensor, right: torch.Tensor, scale: torch.Tensor) -> list[int]:
    assert left.dtype == right.dtype == torch.float32 and scale.dtype == torch.float64
    assert left.stride(1) == 1 or left.shape[1] == 1
    assert right.stride(1) == 1 or right.shape[1] == 1
    assert scale.is_contiguous() and scale.device.type == "cpu"
    rows, rank = left.shape
    cols = right.shape[1]
    strides = left.stride(0), right.stride(0)
    return [rows, cols, rank, left.data_ptr(), strides[0], right.data_ptr(), strides[1], scale.data_ptr()]


def add(
    w: torch.Tensor,
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor,
    sign: int,
) -> int:
    """``out = round(w + sign·left·diag(scale)·right)`` for a block; returns how many became non-finite."""
    signed = scale if sign == 1 else -scale
    broken = _lib().graft_add(
        _CODE[w.dtype],
        w.data_ptr(),
        w.stride(0),
        _CODE[out.dtype],
        out.data_ptr(),
        out.stride(0),
        *_factors(left, right, signed),
    )
    return _enough(broken)


def add_flat(
    src: torch.Tensor,
    dst: torch.Tensor,
    start: int,
    width: int,
    rectangle: tuple[int, int, int, int],
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor,
) -> int:
    """:func:`add` for a flat range of a matrix of ``width`` columns that begins at ``start``.

    ``rectangle`` is (first row, end row, first column, end column) of the term; only that is written.
    """
    assert src.is_contiguous() and dst.is_contiguous() and src.numel() == dst.numel()
    broken = _lib().graft_add_flat(
        _CODE[src.dtype],
        src.data_ptr(),
        _CODE[dst.dtype],
        dst.data_ptr(),
        start,
        src.numel(),
        width,
        *rectangle,
        *_factors(left, right, scale)[2:],
    )
    return _enough(broken)


def there_and_back(
    w: torch.Tensor,
    fused: torch.Tensor,
    back: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: torch.Tensor,
) -> int:
    """``fused = round(w + ΔW)``, ``back = round(fused − ΔW)``; returns how many became non-finite."""
    assert fused.is_contiguous() and back.is_contiguous() and w.dtype == fused.dtype == back.dtype
    broken = _lib().graft_there_and_back(
        _CODE[w.dtype],
        w.data_ptr(),
        w.stride(0),
        fused.data_ptr(),
        back.data_ptr(),
        *_factors(left, right, scale),
    )
    return _enough(broken)


def exception_bytes(dtype: torch.dtype) -> int:
    """Room for one element's exception, at worst."""
    return dtype.itemsize + 2


def exceptions(
    w: torch.Tensor, back: torch.Tensor, room: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where ``back`` is not ``w``: gaps (uint8), fixes (int8), raw bits; see undo.c.

    ``room``: bytes to work in, :func:`exception_bytes` for each element.
    """
    n, item = w.numel(), w.element_size()
    assert room.numel() >= n * exception_bytes(w.dtype)
    raw, gap = room[: n * item].view(w.dtype), room[n * item : n * (item + 1)]
    fix = room[n * (item + 1) : n * (item + 2)].view(torch.int8)
    count = (_int64 * 3)()
    _lib().graft_exceptions(
        _CODE[w.dtype],
        w.data_ptr(),
        w.stride(0),
        back.data_ptr(),
        *w.shape,
        gap.data_ptr(),
        fix.data_ptr(),
        raw.data_ptr(),
        count,
    )
    return gap[: count[0]].clone(), fix[: count[1]].clone(), raw[: count[2]].clone()


def correct(w: torch.Tensor, gap: torch.Tensor, fix: torch.Tensor, raw: torch.Tensor) -> None:
    """Apply :func:`exceptions` to ``w``, which holds round(W' − ΔW)."""
    _lib().graft_correct(
        _CODE[w.dtype],
        w.data_ptr(),
        w.stride(0),
        w.shape[1],
        gap.data_ptr(),
        gap.numel(),
        fix.data_ptr(),
        raw.data_ptr(),
    )


def checksum(part: torch.Tensor, first: int, keys: torch.Tensor) -> int:
    """The chunks' sum of :mod:`graft.checksum` for a flat uint8 tensor that begins at chunk ``first``."""
    assert part.dtype == torch.uint8 and part.is_contiguous()
    return _lib().graft_checksum(part.data_ptr(), part.numel(), first, keys.data_ptr())


def _enough(broken: int) -> int:
    if broken < 0:
        raise MemoryError("the fuse kernel could not allocate its scratch memory")
    return broken
