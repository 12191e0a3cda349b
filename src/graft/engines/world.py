"""What every engine of several processes asks of torch.distributed's own group of all processes."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist


def running() -> bool:
    """Whether there is a group at all; without one this process is alone."""
    return dist.is_available() and dist.is_initialized()


def device() -> torch.device:
    """Where small tensors must be for the group to carry them."""
    kinds = str(dist.get_backend())
    accelerator = (
        torch.accelerator.current_accelerator() if "gloo" not in kinds and "mpi" not in kinds else None
    )
    return accelerator or torch.device("cpu")


def agree(ok: bool) -> bool:
    """Whether all processes say yes. Collective."""
    if not running():
        return ok
    answer = torch.tensor([int(ok)], device=device())
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer.item())


def same(text: str, group: dist.ProcessGroup | None = None) -> bool:
    """Whether all processes (of the group) give the same text. Collective."""
    if not running():
        return True
    words = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.int64)
    # the smallest and the largest of each word in one message: least(x) and least(~x)
    both = torch.cat([words, ~words]).to(device())
    dist.all_reduce(both, op=dist.ReduceOp.MIN, group=group)
    least, flipped = both.chunk(2)
    return torch.equal(least, ~flipped)


def is_writer() -> bool:
    """Whether this process writes files."""
    return not running() or dist.get_rank() == 0


def told(text: str) -> str:
    """The text that the process that writes has. Collective."""
    if not running():
        return text
    found = [text]
    dist.broadcast_object_list(found, src=0, device=device())
    return found[0]


class Team:
    """The part of an engine that is the same wherever all processes of the group work on one model."""

    def agree(self, ok: bool) -> bool:
        return agree(ok)

    def same(self, text: str) -> bool:
        return same(text)

    def is_writer(self) -> bool:
        return is_writer()

    def told(self, text: str) -> str:
        return told(text)
