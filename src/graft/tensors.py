"""Named tensors in files: safetensors and .bin / .pt, single files and whole model directories.

The one place that reads and writes weight files. Reading maps: nothing is in memory until it is used.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from .atomic import atomic_directory, check_out, output_errors
from .checkpoint import INDEX, SINGLE, Checkpoint, read_json
from .mapped import load_file, metadata
from .pickled import load_pickled
from .pipeline import open_checkpoint
from .safetensors_header import Entry, Header, build_header, nbytes, read_header
from .weight_names import WeightNames

__all__ = [
    "INDEX", "SINGLE", "Checkpoint", "Entry", "Header", "Item", "atomic_directory", "check_out", "load_file",
    "load_pickled", "metadata", "open_checkpoint", "output_errors", "plan_shards", "read_header", "read_json",
    "save_file", "write_index", "write_shards",
]  # fmt: skip

_PLAIN = WeightNames()
#: name, shape, dtype, and a call that makes the tensor when it is its turn
Item = tuple[str, tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]


def save_file(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to one safetensors file, in the mapping's order; any strides, any device.

    Raises:
        FormatError: a dtype that the format does not know.
        OutputError: the disk is full or the folder cannot be written (the file is then removed).
    """
    with output_errors(path):
        _write_file(path, [_item(name, t) for name, t in tensors.items()], metadata)


def write_shards(
    folder: Path,
    items: Iterable[Item],
    *,
    max_shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, object]:
    """Write tensors one by one as ``model.safetensors``, or as shards and an index with a true size.

    Args:
        items: ``(name, shape, dtype, make)``; ``make()`` is called when its tensor is written, once.
        max_shard_size: bytes of tensor data in a shard; a single file when None. A larger tensor has
            a shard of its own.
    Returns:
        ``{"files": [...], "weight_map": {...}, "total_size": bytes}``.
    """
    items = list(items)
    sizes = {name: nbytes(shape, dtype) for name, shape, dtype, _ in items}
    files = plan_shards(sizes, max_shard_size)
    by_name = {item[0]: item for item in items}
    with output_errors(folder):
        for file, names in files.items():
            _write_file(folder / file, [by_name[n] for n in names], metadata or {"format": "pt"})
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(sizes.values())
        if len(files) > 1:
            write_index(folder, weight_map, {"total_size": total})
    return {"files": list(files), "weight_map": weight_map, "total_size": total}


def plan_shards(
    sizes: Mapping[str, int], max_shard_size: int | None, called: WeightNames = _PLAIN
) -> dict[str, list[str]]:
    """File names → tensor names, in order, none above ``max_shard_size`` bytes unless one tensor is."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and max_shard_size is not None and used + size > max_shard_size:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {called.single: groups[0]}
    return {called.shard(n, len(groups)): names for n, names in enumerate(groups, 1)}


def write_index(
    folder: Path, weight_map: Mapping[str, str], about: Mapping[str, object], called: WeightNames = _PLAIN
) -> None:
    """Write ``model.safetensors.index.json`` as transformers does (names sorted)."""
    table = {"metadata": dict(about), "weight_map": dict(sorted(weight_map.items()))}
    (folder / called.index).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, items: list[Item], metadata: Mapping[str, str] | None) -> None:
    header = build_header(((name, shape, dtype) for name, shape, dtype, _ in items), metadata)
    try:
        with path.open("wb") as f:
            f.write(header)
            for name, shape, dtype, make in items:
                tensor = make().detach()
                assert tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype, name
                flat = tensor.cpu().contiguous().view(-1)
                if flat.numel():
                    f.write(raw_bytes(flat))
            f.flush()
            os.fsync(f.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _item(name: str, tensor: torch.Tensor) -> Item:
    return name, tuple(tensor.shape), tensor.dtype, lambda: tensor


def raw_bytes(flat: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy and without numpy; keep the tensor alive."""
    size = flat.numel() * flat.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(flat.data_ptr())).cast("B")
