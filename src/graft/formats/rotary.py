"""The two orders of a head's rows under rotary embedding.

Meta's and Mistral's own checkpoints rotate neighbours: rows 0, 1, 2, 3, … of a head are pairs (0, 1), (2, 3).
transformers rotates halves: row j with row j + dim/2. The order of q's and k's rows differs by
``W.view(heads, dim/2, 2, in).transpose(1, 2)`` (transformers, ``convert_mistral_weights_to_hf.py``); of an
update that is the order of B's rows, and A stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ..adapter import LowRank
from ..errors import FormatError
from .renames import Renames


def to_halves(site: LowRank, heads: int) -> LowRank:
    """From neighbours, as Meta and Mistral store them, to halves, as transformers does."""
    return _reordered(site, heads, (-1, 2))


def to_neighbours(site: LowRank, heads: int) -> LowRank:
    """The inverse of :func:`to_halves`."""
    return _reordered(site, heads, (2, -1))


def can_turn(site: LowRank, heads: int) -> bool:
    """Whether the update's rows divide into heads of an even number of rows."""
    return site.B.shape[0] % (2 * heads) == 0


def renamed(
    sites: Mapping[str, LowRank], names: Renames, heads_of: Callable[[str], int]
) -> dict[str, LowRank]:
    """Sites under the base's names, rows of q and k in the order of transformers.

    Args:
        sites: by weights' names that the table has.
        heads_of: the number of heads of a weight (by the base's name) whose rows are turned; else 0.
    Raises:
        FormatError: rows that are not so many heads.
    """
    found: dict[str, LowRank] = {}
    for name, site in sites.items():
        ours = f"{names.ours(name.removesuffix('.weight'))}.weight"
        heads = heads_of(ours)
        if heads and not can_turn(site, heads):
            raise FormatError(
                f"{name}: {site.B.shape[0]} rows are not {heads} heads of the base's; use the base that it "
                "was trained on"
            )
        found[ours] = to_halves(site, heads) if heads else site
    return found


def _reordered(site: LowRank, heads: int, split: tuple[int, int]) -> LowRank:
    def turned(rows: torch.Tensor) -> torch.Tensor:
        pairs = rows.reshape(heads, *(n if n > 0 else rows.shape[0] // heads // 2 for n in split), -1)
        return pairs.transpose(1, 2).reshape(rows.shape)

    magnitude = None if site.magnitude is None else turned(site.magnitude)
    return replace(site, B=turned(site.B), magnitude=magnitude)
