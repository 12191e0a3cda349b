"""PEFT's ``target_parameters``: LoRA on named parameters, mostly packed experts ``[E, …]``.

PEFT stores A as ``[(E r), i]`` with row e·r + k and B as ``[o, (r E)]`` with column k·E + e, and nests one
wrapper per parameter: the parameter declared last on the module is the outermost.
"""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

import torch

from ...adapter import LowRank

if TYPE_CHECKING:
    from .keys import Key
    from .reader import _Reader  # pyright: ignore[reportPrivateUsage]

#: PEFT up to this version never swaps in and out, and reads every 3-D weight as ``[E, in, out]``
_LAST_UNSWAPPED = (0, 18, 1)


def packed(
    reader: _Reader, module: tuple[str, ...], pairs: list[tuple[Key, Key]], candidates: list[str]
) -> None:
    """Add the sites of one module's parameters.

    Args:
        pairs: (A, B) keys, innermost wrapper first.
        candidates: names of the module's parameters that ``target_parameters`` lists.
    """
    name = ".".join(module)
    if len(pairs) > len(candidates):
        reader.problems.add(
            f"{name} has {len(pairs)} adapters for parameters, but target_parameters names only "
            f"{', '.join(candidates)}"
        )
        for key in (key for pair in pairs for key in pair):
            reader.ledger.take(key.text)
        return
    settings = {leaf: reader.settings.of(f"{name}.{leaf}") for leaf in candidates}
    taken = [(reader.ledger.take(a.text), reader.ledger.take(b.text)) for a, b in pairs]
    fitting = _fitting([raw_a.shape[0] for raw_a, _ in taken], {n: r for n, (r, _) in settings.items()})
    for depth, ((a, b), (raw_a, raw_b), leaves) in enumerate(zip(pairs, taken, fitting, strict=True)):
        if raw_a.dim() != 2 or raw_b.dim() != 2 or raw_a.shape[0] != raw_b.shape[1]:
            reader.problems.add(
                f"{a.text} and {b.text} do not agree on the rank: "
                f"A {list(raw_a.shape)}, B {list(raw_b.shape)}"
            )
            continue
        ranks = {settings[leaf][0] for leaf in leaves}
        if len(ranks) != 1:
            known = ", ".join(f"{leaf} {rank}" for leaf, (rank, _) in settings.items())
            reader.problems.add(
                f"{a.text} has {raw_a.shape[0]} rows, which tell no rank; the configuration has {known}"
            )
            continue
        experts = raw_a.shape[0] // ranks.pop()
        _check_dialect(reader, b, raw_a.shape[0] // experts, experts)
        site = LowRank(
            raw_a,
            expert_major(raw_b, experts),
            settings[leaves[0]][1],
            kind="parameter",
            fan_in_fan_out=True if _unswapped(reader) and experts > 1 else None,
            among=tuple((leaf, settings[leaf][1]) for leaf in leaves),
        )
        reader.sites[f"{name}.{leaves[0]}" if len(leaves) == 1 else f"{name}.?{depth}"] = site


def _fitting(rows: list[int], ranks: dict[str, int]) -> list[list[str]]:
    """For each wrapper the parameters that it may adapt: A has experts · rank rows, with one experts."""
    possible: list[set[str]] = [set() for _ in rows]
    loose: list[set[str]] = [set() for _ in rows]
    for leaves in permutations(ranks, min(len(rows), len(ranks))):
        pairs = list(zip(rows, leaves, strict=False))
        if any(n % ranks[leaf] for n, leaf in pairs):
            continue
        same = len({n // ranks[leaf] for n, leaf in pairs}) == 1
        for index, leaf in enumerate(leaves):
            loose[index].add(leaf)
            if same:
                possible[index].add(leaf)
    return [sorted(strict or free) for strict, free in zip(possible, loose, strict=True)]


def expert_major(b: torch.Tensor, experts: int) -> torch.Tensor:
    """PEFT's B ``[o, (r E)]`` as the canonical ``[(E o), r]``."""
    if experts == 1:
        return b
    o = b.shape[0]
    return b.reshape(o, -1, experts).permute(2, 0, 1).reshape(experts * o, -1)


def rank_major(b: torch.Tensor, experts: int) -> torch.Tensor:
    """The canonical B ``[(E o), r]`` as PEFT's ``[o, (r E)]``."""
    if experts == 1:
        return b
    rank = b.shape[1]
    return b.reshape(experts, -1, rank).permute(1, 2, 0).reshape(-1, rank * experts)


def _unswapped(reader: _Reader) -> bool:
    version = reader.settings.version
    return version is not None and version <= _LAST_UNSWAPPED


def _check_dialect(reader: _Reader, b: Key, rank: int, experts: int) -> None:
    if reader.settings.version is None and rank > 1 and experts > 1:
        reader.problems.add(
            f"{b.text}: the order of its columns is unknown, because {reader.source.config_path.name} lacks "
            "peft_version (Megatron-Bridge orders them expert by expert, PEFT rank by rank); if PEFT wrote "
            'it, add "peft_version": "0.17.1"'
        )
