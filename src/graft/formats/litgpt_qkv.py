"""The update of litgpt's fused q, k and v: which rows of the weight each pair of factors changes.

``LoRAQKVLinear`` keeps r rows of A for each of q, k and v that is adapted, and their rows of B one after the
other. Blocks are of unequal height where queries share keys. Source: litgpt, ``lora.py``; its pull requests
900 and 1013 for the order of rows by query group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .model_facts import model_facts


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads, and the rows of each."""

    heads: int
    groups: int
    size: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v."""
        return self.heads * self.size, self.groups * self.size, self.groups * self.size

    def grouped(self) -> torch.Tensor:
        """For each row of [q; k; v] its place in the order q…q k v of each query group."""
        each = self.heads // self.groups
        places = torch.arange(sum(self.rows)).view(self.groups, each + 2, self.size)
        return torch.cat([part.reshape(-1) for part in places.split([each, 1, 1], dim=1)])


@dataclass(frozen=True)
class Block:
    """One pair of factors and the rows of [q; k; v] that it changes: A ``[r, in]``, B ``[n, r]``."""

    A: torch.Tensor
    B: torch.Tensor
    rows: torch.Tensor


def blocks(
    a: torch.Tensor, b: torch.Tensor, enabled: Sequence[int], heads: Heads, *, grouped: bool
) -> list[Block]:
    """The adapted blocks of one ``LoRAQKVLinear``.

    Args:
        a: ``[n r, in]`` for n adapted ones of q, k and v.
        b: ``[Σ rows, r]``.
        enabled: which are adapted: 0, 1 and 2 for q, k and v.
        grouped: the weight is in the order of query groups. With all three adapted, litgpt then laid B's
            rows on the weight as they come, so that a block is not q, k or v but a part of the weight.
    """
    ends = torch.tensor(heads.rows).cumsum(0).tolist()
    ranges = [torch.arange(ends[j] - heads.rows[j], ends[j]) for j in enabled]
    if grouped and len(enabled) == 3:
        place = torch.argsort(heads.grouped())
        ranges = [place[rows] for rows in ranges]
    parts = zip(a.chunk(len(enabled)), b.split([len(rows) for rows in ranges]), ranges, strict=True)
    return [Block(x, y, rows) for x, y, rows in parts if bool(x.any()) or bool(y.any())]


def cut(found: Sequence[Block], first: int, last: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One pair for rows ``first`` to ``last`` of [q; k; v], zero where no block is; None if none is."""
    chosen = [(one, (one.rows >= first) & (one.rows < last)) for one in found]
    chosen = [(one, mask) for one, mask in chosen if bool(mask.any())]
    if not chosen:
        return None
    rank = chosen[0][0].A.shape[0]
    b = chosen[0][0].B.new_zeros((last - first, rank * len(chosen)))
    for n, (one, mask) in enumerate(chosen):
        b[one.rows[mask] - first, n * rank : (n + 1) * rank] = one.B[mask]
    return torch.cat([one.A for one, _ in chosen]), b


def heads_of(model: Mapping[str, object] | None) -> Heads:
    """Of the base's attention.

    Raises:
        FormatError: no base, or one that does not say.
    """
    facts = model_facts(model, "litgpt's fused q, k and v")
    return Heads(facts.heads, facts.kv_heads, facts.head_dim)
