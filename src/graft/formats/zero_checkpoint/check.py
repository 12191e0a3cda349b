"""Proof that the ranks' files are of one run and one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ...errors import FormatError, Problems
from ..stored import Stored
from .folder import Files
from .states import ModelStates, OptimizerStates

_MEND = "Copy every file of the checkpoint from the run that wrote it, or name another of its checkpoints."


def check_ranks(
    files: Files, models: Mapping[int, ModelStates], optimizers: Mapping[int, OptimizerStates]
) -> int:
    """The number of ranks, all of whose files are there and agree.

    Raises:
        FormatError: all that are missing, and all that disagree.
    """
    problems = Problems(FormatError, f"{files.folder} is not one whole checkpoint:")
    first = next(iter(optimizers.values()))
    worlds = sorted({rank.world for rank in optimizers.values()})
    if len(worlds) > 1:
        problems.add(f"its files are of runs with {' and '.join(map(str, worlds))} ranks")
    world = worlds[-1]
    _complete(files.optimizer, world, problems)
    if files.sharded:
        _complete(files.model, world, problems)
    if (first.stage == 3) != files.sharded:
        told = next(iter(files.model.values()))
        problems.add(f"{first.path.name} is of ZeRO stage {first.stage}, {told.name} of another stage")
    _equal("optimizer step", {r.path.name: r.steps for r in optimizers.values()}, problems)
    _equal("stage", {r.path.name: r.stage for r in optimizers.values()}, problems)
    if files.sharded:  # in stages 1 and 2 the last rank's part is shorter
        _equal("sizes", {r.path.name: [f.numel() for f in r.flats] for r in optimizers.values()}, problems)
    _equal("dtypes", {r.path.name: [str(f.dtype) for f in r.flats] for r in optimizers.values()}, problems)
    for what in ("steps", "version", "shapes", "frozen"):
        _equal(what, {m.path.name: getattr(m, what) for m in models.values()}, problems)
    problems.raise_if_any(_MEND)
    if any(model.shapes is None for model in models.values()):
        raise FormatError(f"{files.folder} does not hold param_shapes, without which nothing has a name")
    return world


def check_copies(model: ModelStates, ranks: Sequence[OptimizerStates], trained: Mapping[str, Stored]) -> None:
    """Stages 1 and 2: the module's copies must be the rounded masters, or the files are of two steps.

    The first elements of every piece of every parameter are compared.

    Raises:
        FormatError: naming the ranks whose files differ.
    """
    owners = {flat.data_ptr(): rank.path.name for rank in ranks for flat in rank.flats}
    wrong: dict[str, str] = {}
    for name, stored in trained.items():
        copy = model.module.get(name)
        if copy is None or tuple(copy.shape) != stored.shape:
            continue
        flat, at = copy.detach().reshape(-1), 0
        for master, start, count in stored.pieces():
            few = min(count, 64)
            rounded = master[start : start + few].to(flat.dtype)
            if not torch.equal(rounded, flat[at : at + few]) and not bool(rounded.isnan().any()):
                wrong.setdefault(owners.get(master.data_ptr(), "its masters"), name)
            at += count
    problems = Problems(FormatError, f"{model.path} is of another step than the optimizer states:")
    for file, name in wrong.items():
        problems.add(f"{file}: its master of {name} does not round to the module's copy")
    problems.raise_if_any(_MEND)


def _complete(files: Mapping[int, object], world: int, problems: Problems) -> None:
    names = {rank: getattr(path, "name", "") for rank, path in files.items()}
    like = next(iter(names.values()))
    for rank in range(world):
        if rank not in names:
            prefix, _, rest = like.partition("zero_pp_rank_")
            problems.add(
                f"rank {rank}'s file is missing: {prefix}zero_pp_rank_{rank}_{rest.partition('_')[2]}"
            )
    for rank, name in names.items():
        if rank >= world:
            problems.add(f"{name} is of rank {rank}, but the run had {world} ranks")


def _equal(what: str, values: Mapping[str, object], problems: Problems) -> None:
    """Record it if not all values are the same."""
    first, *others = values.items()
    for name, value in others:
        if value != first[1]:
            problems.add(f"{name} and {first[0]} differ in {what}: {_short(value)} and {_short(first[1])}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}…"
