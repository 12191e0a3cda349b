"""mlx-lm's stacked experts ↔ the base's, one by one."""

from __future__ import annotations

#: mlx-lm's stacked experts → the Hugging Face names of one expert's matrices, by the block's name
_EXPERTS = {
    "block_sparse_moe": {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    "mlp": {"gate_proj": "gate_proj", "down_proj": "down_proj", "up_proj": "up_proj"},
}


def expert_name(module: str) -> str | None:
    """One expert's matrix, ``{}`` for its number, of mlx-lm's stacked experts; None for other modules."""
    parts = module.split(".")
    if len(parts) < 3 or parts[-2] != "switch_mlp":
        return None
    leaf = _EXPERTS.get(parts[-3], {}).get(parts[-1])
    return None if leaf is None else ".".join((*parts[:-2], "experts", "{}", leaf))


def stacked_name(module: str) -> tuple[str, int] | None:
    """The inverse of :func:`expert_name`: the stacked module and the expert's number."""
    parts = module.split(".")
    if len(parts) < 4 or parts[-3] != "experts" or not parts[-2].isdigit():
        return None
    names = {theirs: ours for ours, theirs in _EXPERTS.get(parts[-4], {}).items()}
    if parts[-1] not in names:
        return None
    return ".".join((*parts[:-3], "switch_mlp", names[parts[-1]])), int(parts[-2])
