"""Rows of Megatron's fused weights: q, k, v by query groups, gate above up."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..model_facts import ModelFacts

QKV = ("q", "k", "v")
GATED = ("gate", "up")


def split(rows: torch.Tensor, parts: tuple[str, ...], facts: ModelFacts | None) -> dict[str, torch.Tensor]:
    """The parts of a fused tensor: ``linear_qkv`` holds q…q k v for each query group.

    Args:
        rows: ``[out, …]``: B, or a magnitude.
        facts: of the attention; needed for q, k, v.
    Raises:
        ValueError: the rows are not that many heads, or not two halves.
    """
    if parts == GATED:
        if rows.shape[0] % 2:
            raise ValueError(f"{rows.shape[0]} rows are not a gate and an up projection")
        return dict(zip(GATED, rows.chunk(2), strict=True))
    assert facts is not None and parts == QKV
    groups, queries, size = facts.kv_heads, facts.per_group, facts.head_dim
    if rows.shape[0] != groups * (queries + 2) * size:
        raise ValueError(
            f"{rows.shape[0]} rows are not {facts.heads} query heads and {groups} key and value heads "
            f"of {size} rows each"
        )
    heads = rows.reshape(groups, queries + 2, size, *rows.shape[1:])
    blocks = heads.split((queries, 1, 1), dim=1)
    return {part: block.reshape(-1, *rows.shape[1:]) for part, block in zip(QKV, blocks, strict=True)}


def join(parts: Mapping[str, torch.Tensor], facts: ModelFacts) -> torch.Tensor:
    """The inverse of :func:`split`, of all parts."""
    if set(parts) == set(GATED):
        return torch.cat([parts[part] for part in GATED])
    groups = facts.kv_heads
    heads = [parts[part].reshape(groups, -1, facts.head_dim, *parts[part].shape[1:]) for part in QKV]
    return torch.cat(heads, dim=1).flatten(0, 2)


def sizes(parts: tuple[str, ...], rows: Mapping[str, int], facts: ModelFacts) -> dict[str, int]:
    """Rows of every part, of which at least one is known.

    Raises:
        ValueError: rows that are not the heads' of this model.
    """
    if parts == GATED:
        return dict.fromkeys(parts, next(iter(rows.values())))
    wanted = {part: facts.head_dim * (facts.heads if part == "q" else facts.kv_heads) for part in QKV}
    odd = {part: n for part, n in rows.items() if n != wanted[part]}
    if odd:
        raise ValueError(f"{odd} rows, where the base's heads have {wanted}")
    return wanted
