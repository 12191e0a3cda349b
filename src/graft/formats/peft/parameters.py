"""PEFT's ``target_parameters``: LoRA on named parameters, mostly packed experts ``[E, …]``.

PEFT nests one wrapper per parameter: the parameter declared last on the module is the outermost. How the
factors of one lie is told by :mod:`.dialects`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import TYPE_CHECKING

from ...adapter import LowRank
from .dialects import Dialect, dialect_of

if TYPE_CHECKING:
    from .keys import Key
    from .reader import _Reader  # pyright: ignore[reportPrivateUsage]


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
        dialect = _dialect(reader, b, raw_a.shape, raw_b.shape, experts)
        factor_a, factor_b = dialect.factors(raw_a, raw_b, experts)
        site = LowRank(
            factor_a,
            factor_b,
            settings[leaves[0]][1],
            kind="parameter",
            fan_in_fan_out=True if dialect.positional and experts > 1 else None,
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


def _dialect(
    reader: _Reader, b: Key, shape_a: Sequence[int], shape_b: Sequence[int], experts: int
) -> Dialect:
    """How this file's factors lie; what nothing tells is recorded as a fault."""
    dialect = dialect_of(reader.settings, reader.source.config or {})
    where, rank = reader.source.config_path.name, shape_a[0] // experts
    if dialect is None and rank > 1 and experts > 1:
        reader.problems.add(
            f"{b.text}: the order of its columns is unknown, because {where} lacks peft_version and has not "
            "the fields of a known producer (Megatron-Bridge orders them expert by expert, PEFT rank by "
            'rank); if PEFT wrote it, add "peft_version": "0.17.1"'
        )
    elif experts > 1 and shape_a[1] == shape_b[0] and (dialect is None or not dialect.sure):
        reader.problems.add(
            f"{b.text}: its experts are square and {where} lacks peft_version, so that nothing says which "
            'factor is over the inputs; add "peft_version" (files of PEFT 0.17 have none)'
        )
    return dialect or Dialect(positional=True, sure=False)
