"""The ranks' states, found to belong together, as one mapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import FormatError
from ..stored import Stored
from . import parts
from .check import check_copies, check_ranks
from .folder import Files, find_files
from .states import ModelStates, OptimizerStates, model_states, optimizer_states


@dataclass(frozen=True)
class ZeroCheckpoint(Mapping[str, torch.Tensor]):
    """Named tensors of a checkpoint; each is gathered when it is asked for, and not kept.

    Args:
        folder: the tag's.
        stage: of ZeRO. world: ranks that shared the parameters.
        stored: every tensor by the engine's name, buffers and aliases of shared parameters too.
        absent: parameters that the checkpoint names but does not hold (``exclude_frozen_parameters``).
        files: all files that were read.
    """

    folder: Path
    stage: int
    world: int
    stored: Mapping[str, Stored]
    buffers: frozenset[str]
    absent: tuple[str, ...]
    files: tuple[Path, ...]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.stored[name].tensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def open_zero_checkpoint(path: Path, tag: str | None = None) -> ZeroCheckpoint:
    """Open an engine's checkpoint without DeepSpeed.

    Trained parameters are the optimizer's fp32 masters, frozen ones have the module's dtype, floating
    buffers are fp32: exactly the tensors of DeepSpeed's ``zero_to_fp32``, and besides what that loses
    (frozen parameters of stage 1, BF16_Optimizer, stage 0).

    Args:
        path: the folder given to ``save_checkpoint``, a tag's folder in it, or Lightning's ``.ckpt``.
        tag: which tag; else what the file ``latest`` says, or the only one.
    Raises:
        FormatError: a rank's file that is missing or damaged, ranks of different steps or runs, model
            parallelism or experts, a pickle that could run code.
    """
    files = find_files(Path(path), tag)
    models = {rank: model_states(file) for rank, file in files.model.items()}
    if files.optimizer:
        optimizers = {rank: optimizer_states(file) for rank, file in files.optimizer.items()}
        world = check_ranks(files, models, optimizers)
        stored = _trained(models, optimizers, world, sharded=files.sharded)
        stage = next(iter(optimizers.values())).stage
    else:
        stored, stage, world = _untold(files, models), 0, 1
    first = next(iter(models.values()))
    return _complete(files, first, models, stored, stage, world)


def _trained(
    models: dict[int, ModelStates], optimizers: dict[int, OptimizerStates], world: int, *, sharded: bool
) -> dict[str, Stored]:
    first = next(iter(models.values()))
    ranks = [optimizers[rank] for rank in range(world)]
    if sharded:
        return parts.stage_3(first, ranks)
    found = parts.stage_2(first, ranks)
    check_copies(first, ranks, found)
    return found


def _untold(files: Files, models: dict[int, ModelStates]) -> dict[str, Stored]:
    """Stage 0: the module's own tensors are all there is."""
    first = next(iter(models.values()))
    if (files.folder / "zero").is_dir():
        raise FormatError(
            f"{files.folder} is a universal checkpoint, as ds_to_universal writes it, which is not read; "
            "name the checkpoint that it was made from"
        )
    if files.sharded or first.shapes:
        raise FormatError(
            f"{files.folder} has no optimizer states (zero_pp_rank_0_mp_rank_00_optim_states.pt, …), "
            "which hold the trained parameters; copy the whole folder"
        )
    return {}


def _complete(
    files: Files,
    first: ModelStates,
    models: dict[int, ModelStates],
    trained: dict[str, Stored],
    stage: int,
    world: int,
) -> ZeroCheckpoint:
    """Trained parameters, frozen ones, buffers and aliases, in the module's order."""
    found = {**trained, **parts.frozen(first, [models[rank] for rank in sorted(models)], files.sharded)}
    for name in first.buffers & first.module.keys():
        found[name] = parts.buffer(first.module[name])
    for alias, name in first.shared.items():
        if name in found:
            found[alias] = found[name]
    if not files.sharded:
        known = False if files.optimizer else None
        for name, tensor in first.module.items():
            found.setdefault(name, Stored.of(tensor, trained=known))
    order = [name for name in first.module if name in found]
    order += [name for name in found if name not in first.module]
    named = [*first.module, *first.frozen, *first.shared]
    return ZeroCheckpoint(
        folder=files.folder,
        stage=stage,
        world=world,
        stored={name: found[name] for name in order},
        buffers=first.buffers,
        absent=tuple(dict.fromkeys(name for name in named if name not in found)),
        files=(*files.model.values(), *files.optimizer.values()),
    )
