"""How pieces of DTensors travel: whole weights to the writer, thin factors to everybody."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..checksum import checksum
from ..errors import StateError
from . import world
from .dtensor_blocks import axis_of, boxes, local, numel, sizes, slices

_ALIGN = 8  # bytes: a piece of any dtype may be viewed where it begins


def collect(p: DTensor, pieces: Sequence[torch.Tensor], writer: int = 0) -> torch.Tensor | None:
    """The whole tensor on the CPU of the writer, from every process's new values; one piece travels at once.

    Raises:
        StateError: the writer holds no part of it.
    """
    me = dist.get_rank()
    here = local(p)
    if len(pieces) == 1 and pieces[0].shape == here.shape:
        mine = cast("list[int]", p.device_mesh.get_coordinate())
        pieces = [pieces[0][inside] for _, inside in boxes(p, mine)]
    if me == writer:
        return _receive(p, pieces)
    if sends(p, writer):
        for piece in pieces:
            dist.send(_bytes(piece).to(world.device()), dst=writer)
    return None


def sends(p: DTensor, writer: int = 0) -> bool:
    """Whether the file's copy of what this process holds is this process's."""
    # in a mesh without the writer there are only copies of what others send
    where = p.device_mesh.get_coordinate()
    return where is not None and bool((p.device_mesh.mesh == writer).any()) and _is_first(p, where)


def _is_first(p: DTensor, where: Sequence[int]) -> bool:
    """Whether the process at ``where`` is the first of those that hold the same."""
    cuts = zip(p.placements, where, strict=True)
    return all(at == 0 or axis_of(placement) is not None for placement, at in cuts)


def _receive(p: DTensor, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    mine = p.device_mesh.get_coordinate()
    if mine is None:
        raise StateError("the process that writes (rank 0) is not in the mesh of this weight")
    dtype = pieces[0].dtype if pieces else p.dtype
    whole = torch.empty(tuple(p.shape), dtype=dtype)
    for (box, _), piece in zip(boxes(p, mine), pieces, strict=True):
        whole[slices(box)] = piece.to(whole.device)
    for where in itertools.product(*(range(n) for n in p.device_mesh.shape)):
        if list(where) == list(mine) or not _is_first(p, where):
            continue
        for box, _ in boxes(p, where):
            buffer = torch.empty(numel(box) * dtype.itemsize, dtype=torch.uint8, device=world.device())
            dist.recv(buffer, src=int(p.device_mesh.mesh[where]))
            whole[slices(box)] = buffer.cpu().view(dtype).view(sizes(box))
    return whole


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # bytes: not every backend knows every dtype
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def alike(factors: Sequence[DTensor]) -> bool:
    """Whether processes that hold the same positions of a factor hold the same numbers. Collective."""
    rows: list[int] = []
    for f in factors:
        where = f.device_mesh.get_coordinate()
        mine = 0
        for placement, at, count in zip(
            f.placements, where or (), f.device_mesh.shape, strict=where is not None
        ):
            mine = mine if axis_of(placement) is None else mine * count + at
        rows += [mine if where is not None else -1, checksum(local(f)) - (1 << 63)]
    sent = torch.tensor(rows, dtype=torch.int64, device=world.device())
    every = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(every, sent)
    table = [row.view(-1, 2).tolist() for row in every]
    for column in zip(*table, strict=True):
        held: dict[int, int] = {}
        if any(held.setdefault(place, value) != value for place, value in column if place >= 0):
            return False
    return True


def gather(factors: Sequence[DTensor], dims: int | None = None) -> list[torch.Tensor]:
    """Factors of one mesh, in one message for each dimension of the mesh that cuts any of them.

    Args:
        dims: gather over that many leading dimensions of the mesh only; what others hold is left undefined.
    """
    mesh = factors[0].device_mesh
    dims = mesh.ndim if dims is None else dims
    mine = mesh.get_coordinate()
    assert mine is not None, "a factor of a mesh in which this process is not"
    over = [d for d in range(dims) if any(axis_of(f.placements[d]) is not None for f in factors)]
    ranges = [range(n) if d in over else (mine[d],) for d, n in enumerate(mesh.shape)]
    places = list(itertools.product(*ranges))
    longest = max(sum(_room(f, where) for f in factors) for where in places)
    every = _exchange(_packed(factors, mine, longest), mesh, over).view(len(places), longest)
    wholes = [torch.empty(tuple(f.shape), dtype=f.dtype, device=every.device) for f in factors]
    for row, where in zip(every, places, strict=True):
        _unpack(row, factors, where, wholes)
    return [w.to(local(f).device) for w, f in zip(wholes, factors, strict=True)]


def _room(f: DTensor, where: Sequence[int]) -> int:
    size = sum(numel(box) for box, _ in boxes(f, where)) * f.dtype.itemsize
    return -(-size // _ALIGN) * _ALIGN


def _packed(factors: Sequence[DTensor], mine: Sequence[int], longest: int) -> torch.Tensor:
    packed = torch.zeros(longest, dtype=torch.uint8, device=world.device())
    at = 0
    for f in factors:
        begin = at
        for _, inside in boxes(f, mine):
            piece = _bytes(local(f)[inside])
            packed[begin : begin + piece.numel()] = piece
            begin += piece.numel()
        at += _room(f, mine)
    return packed


def _unpack(
    row: torch.Tensor, factors: Sequence[DTensor], where: Sequence[int], wholes: Sequence[torch.Tensor]
) -> None:
    at = 0
    for f, whole in zip(factors, wholes, strict=True):
        begin = at
        for box, _ in boxes(f, where):
            size = numel(box) * f.dtype.itemsize
            whole[slices(box)] = row[begin : begin + size].view(f.dtype).view(sizes(box))
            begin += size
        at += _room(f, where)


def _exchange(packed: torch.Tensor, mesh: DeviceMesh, over: Sequence[int]) -> torch.Tensor:
    """Everybody's bytes, in the order of the mesh's coordinates."""
    for d in reversed(over):
        every = [torch.empty_like(packed) for _ in range(mesh.size(d))]
        dist.all_gather(every, packed, group=mesh.get_group(d))
        packed = torch.cat(every)
    return packed
