"""What every engine of several processes asks of torch.distributed's own group of all processes."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import StateError

_Error = TypeVar("_Error", bound=BaseException)
_KNOWN = "graft_known_to_all"


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
    return _ask(ok, "")[0] if running() else ok


def same(text: str, group: dist.ProcessGroup | None = None) -> bool:
    """Whether all processes (of the group) give the same text. Collective.

    Raises:
        StateError: a process failed, and said so with :func:`agree`.
    """
    if not running():
        return True
    ok, alike = _ask(True, text, group)
    if not ok:
        raise known(StateError("another process failed, so this one stopped too; see its error"))
    return alike


def _ask(ok: bool, text: str, group: dist.ProcessGroup | None = None) -> tuple[bool, bool]:
    """Whether all say yes, and whether all give the same text.

    Every question is this one message: a process that fails says no to whatever the others ask, and a
    message of another size would leave them waiting.
    """
    words = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.int64)
    # the smallest and the largest of each word in one message: least(x) and least(~x)
    message = torch.cat([torch.tensor([int(ok)]), words, ~words]).to(device())
    dist.all_reduce(message, op=dist.ReduceOp.MIN, group=group)
    least, flipped = message[1:].chunk(2)
    return bool(message[0].item()), torch.equal(least, ~flipped)


def known(error: _Error) -> _Error:
    """Mark an error that follows from an answer, so that every process has one: none need be told."""
    setattr(error, _KNOWN, True)
    return error


def is_known(error: BaseException) -> bool:
    """Whether :func:`known` marked it."""
    return hasattr(error, _KNOWN)


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
