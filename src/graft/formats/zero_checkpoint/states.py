"""One rank's two files, unpickled safely and checked for what the reader needs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ...errors import FormatError
from ...pickled import Inert, load_pickled

#: packages whose own classes may stand in a checkpoint beside its tensors; none of them is needed
FRAMEWORKS = (
    "deepspeed.", "lightning.", "lightning_fabric.", "lightning_utilities.", "pytorch_lightning.",
    "omegaconf.", "argparse.Namespace", "pathlib.", "datetime.", "collections.defaultdict", "typing.",
    "transformers.", "peft.", "numpy.", "torch.",
)  # fmt: skip


@dataclass(frozen=True)
class ModelStates:
    """What one file of model states says.

    Args:
        module: the module's tensors: placeholders of size 0 in stage 3.
        shapes: for each group of parameters, names → shapes in the order of the flat buffer; None where the
            engine does not say it (stage 0).
        frozen: names → shapes of parameters that are not trained, and their (parts of) values.
        shared: alias → the name that it is stored under.
        steps: counters that every rank must agree on.
    """

    path: Path
    module: Mapping[str, torch.Tensor]
    buffers: frozenset[str]
    shapes: tuple[Mapping[str, tuple[int, ...]], ...] | None
    frozen: Mapping[str, tuple[int, ...]]
    fragments: Mapping[str, torch.Tensor]
    shared: Mapping[str, str]
    steps: tuple[object, ...]
    version: str


@dataclass(frozen=True)
class OptimizerStates:
    """What one rank's optimizer states say.

    Args:
        stage: 3, or at most 2.
        world: how many ranks share the parameters.
        flats: stage 3: the rank's flat buffers, which follow each other; else its part of each group's.
        gaps: stages 1 and 2: elements left free behind each parameter of each group; None for none.
        steps: of the optimizer, where it counts them.
    """

    path: Path
    stage: int
    world: int
    flats: tuple[torch.Tensor, ...]
    gaps: tuple[tuple[int, ...], ...] | None
    steps: tuple[float, ...]


def model_states(path: Path) -> ModelStates:
    """Read a file of model states.

    Raises:
        FormatError: damaged, refused by the safe loader, or something else than model states.
    """
    table = _table(path)
    module = table.get("module")
    if not isinstance(module, Mapping) or "buffer_names" not in table:
        raise _other(path, "model states")
    tensors = {str(n): t for n, t in cast("dict[Any, Any]", module).items() if isinstance(t, torch.Tensor)}
    shapes = table.get("param_shapes")
    groups = [shapes] if isinstance(shapes, Mapping) else shapes
    return ModelStates(
        path=path,
        module=tensors,
        buffers=frozenset(map(str, table["buffer_names"] or ())),
        shapes=None if groups is None else tuple(_shapes(path, group) for group in groups),
        frozen=_shapes(path, table.get("frozen_param_shapes") or {}),
        fragments=dict(table.get("frozen_param_fragments") or {}),
        shared={str(k): str(v) for k, v in (table.get("shared_params") or {}).items()},
        steps=tuple(table.get(key) for key in ("global_steps", "global_samples", "skipped_steps")),
        version=str(table.get("ds_version")),
    )


def optimizer_states(path: Path) -> OptimizerStates:
    """Read a file of optimizer states.

    Raises:
        FormatError: damaged, refused by the safe loader, or something else than a ZeRO optimizer's states.
    """
    states = _table(path).get("optimizer_state_dict")
    if not isinstance(states, Mapping):
        raise _other(path, "ZeRO optimizer states")
    table = cast("Mapping[str, Any]", states)
    sharded = "fp32_flat_groups" in table
    flats = table.get("fp32_flat_groups" if sharded else "single_partition_of_fp32_groups")
    stage = table.get("zero_stage", 3 if sharded else 1)
    stage = stage.args[0] if isinstance(stage, Inert) and stage.args else stage
    counts = table.get("partition_count")
    worlds = cast("list[object]", counts if isinstance(counts, (list, tuple)) else [counts])
    if not (
        _tensors(flats) and isinstance(stage, int) and all(isinstance(n, int) for n in worlds) and worlds
    ):
        raise _other(path, "ZeRO optimizer states")
    gaps = table.get("param_alignment_paddings")
    return OptimizerStates(
        path=path,
        stage=int(stage),
        world=max(cast("list[int]", worlds)),
        flats=tuple(cast("list[torch.Tensor]", flats)),
        gaps=None if gaps is None else tuple(tuple(int(n) for n in group) for group in gaps),
        steps=_steps(table.get("optimizer_state_dict" if sharded else "base_optimizer_state")),
    )


def _table(path: Path) -> dict[str, Any]:
    value = load_pickled(path, inert=FRAMEWORKS)
    if not isinstance(value, dict):
        raise _other(path, "an engine's states")
    return cast("dict[str, Any]", value)


def _other(path: Path, wanted: str) -> FormatError:
    return FormatError(f"{path} does not hold {wanted}; copy the checkpoint again, or name another folder")


def _tensors(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(one, torch.Tensor) and one.dim() == 1 for one in cast("Sequence[object]", value)
    )


def _shapes(path: Path, table: object) -> dict[str, tuple[int, ...]]:
    if not isinstance(table, Mapping):
        raise _other(path, "model states")
    return {str(name): tuple(int(n) for n in shape) for name, shape in cast("Any", table).items()}


def _steps(optimizer: object) -> tuple[float, ...]:
    """The distinct step counts of an optimizer's states."""
    states = cast("Mapping[str, Any]", optimizer).get("state") if isinstance(optimizer, Mapping) else None
    if not isinstance(states, Mapping):
        return ()
    each = [state.get("step") for state in cast("Any", states).values() if isinstance(state, Mapping)]
    return tuple(sorted({float(step) for step in each if isinstance(step, (int, float, torch.Tensor))}))
