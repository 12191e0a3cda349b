"""Merging the weight of one module, and keeping W itself in sight of whatever must not see W + ΔW."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, ClassVar

from torch import nn

from ...adapted import Adapted
from ...errors import StateError
from ...fusing import fuse, unfuse

#: set while only the factors of a state dict are wanted, so that no weight is unmerged for it
factors_only: ContextVar[bool] = ContextVar("factors_only", default=False)

#: in a state dict's metadata, which no loader takes for a key: its weights do not hold ΔW
MARK = "lora_merged"


def is_merged(holder: Adapted | None) -> bool:
    """Whether the weight of this module holds ΔW now."""
    return holder is not None and any(s.site.fusion is not None for s in holder.graft_slots.values())


def merge(holder: Adapted) -> None:
    """Add ΔW to the weight, or prove that what was added is still right.

    Raises:
        StateError: A, B or the scale changed since ΔW was added; the sum is beyond the dtype's range.
    """
    site = holder.graft_slots["weight"].site
    if not holder.get_parameter("weight").is_meta and not site.disabled:
        fuse(holder)


@contextmanager
def unmerged(holder: Adapted | None, *, replaced: bool = False) -> Generator[None]:
    """W alone in the weight inside the block; merged again behind it, with what A and B are then.

    Args:
        replaced: the block puts another W in its place, so it does not matter if this one is lost.
    Raises:
        StateError: W cannot be restored, because it, A, B or the scale were edited while merged.
    """
    if holder is None or not is_merged(holder):
        yield
        return
    try:
        unfuse(holder)
    except StateError:
        if not replaced:
            raise
        holder.graft_slots["weight"].site.fusion = None
    try:
        yield
    finally:
        merge(holder)


class Guarded(nn.Module):
    """Conversions, loading and ``state_dict`` see W, whether or not it is merged."""

    weight_key: ClassVar[str] = "weight"

    def graft_holder(self) -> Adapted | None:
        """The module whose weight this one's factors change; None without an adapter."""
        return self if isinstance(self, Adapted) and self.__dict__.get("graft_slots") else None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with unmerged(self.graft_holder()):
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        replaced = f"{prefix}{self.weight_key}" in state_dict
        with unmerged(self.graft_holder(), replaced=replaced):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if keep_vars or factors_only.get():  # the live parameters, whatever they hold
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination.pop(f"{prefix}lora_fused_weight", None)
            return
        if isinstance(self, Adapted) and is_merged(self):
            _note_base()
            with unmerged(self):
                super()._save_to_state_dict(destination, prefix, keep_vars)
                destination[f"{prefix}weight"] = destination[f"{prefix}weight"].clone()
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        about = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if about is not None:
            about[MARK] = False


@cache  # once a process is enough
def _note_base() -> None:
    logging.getLogger(__name__).warning(
        "state_dict() in eval mode holds W, A and B, as in train mode, so that loading them adds ΔW once; "
        "loralib's holds W + ΔW. For W + ΔW call graft.unadapt(model, keep_fused=True) first"
    )
