"""Save a model's adapter to a file of any known format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import nn

from .adapted import slots_of
from .attach import sites
from .engines.masters import has_master
from .engines.megatron_experts import experts_of, refuse_scattered
from .engines.wrappers import is_wrapped, team_of, together, unwrap
from .errors import StateError
from .model import adapter_of, factor_parameters


def save(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "peft",
    trained: bool = True,
    base_name: str | None = None,
    masters: bool = False,
    accept_loss: bool = False,
) -> list[str]:
    """Write the model's adapter: factors, and every other parameter that trains (``trained``).

    A fused model may be saved: A and B are what is written, and they do not change by fusing. Given an
    engine (DeepSpeed, DDP) or a model whose parameters are spread over processes, every process calls
    this; the first one writes, and if one fails, all raise.

    Args:
        path: the new directory (``peft``, ``mlx``, …) or file (``loralib``, …).
        base_name: the base's name for the adapter's configuration; the model's own if it has one.
        masters: DeepSpeed's fp32 masters, which the optimizer trains, in the place of the low-precision
            copies, which the model computes with. ``graft.fuse`` and ``graft.export`` use the copies.
        accept_loss: leave out what the format cannot hold, and say it.
    Returns:
        Sentences about what was lost or rounded, and what the files cannot say and their reader must be told.
    Raises:
        StateError: the model has no adapter; ``masters`` of a model without them, or not of an engine;
            Megatron's pipeline stages, or adapted experts under its expert parallelism.
        FormatError: a part of the adapter that the format cannot hold.
        OutputError: the path exists or cannot be written.
    """
    from .formats import write

    team, module = team_of(model), unwrap(model)
    name = base_name or getattr(getattr(module, "config", None), "_name_or_path", None) or None
    with together(team):
        experts = experts_of(module)
        among = any(id(holder) in experts for holder, _ in sites(module).values())
        refuse_scattered(module, "graft.save", experts=among)
        notes = _say_which(model, module, masters) + _say_shared(module)
        adapter = adapter_of(model, trained=trained, masters=masters)
        if team.is_writer():
            notes += write(
                adapter,
                Path(path),
                format=format,
                base_name=name,
                model=config_of(module),
                accept_loss=accept_loss,
            )
    return notes


def _say_shared(model: nn.Module) -> list[str]:
    shared = [n for n, (m, p) in sites(model).items() if slots_of(m)[p].site.options.share_experts]
    if not shared:
        return []
    return [f"experts share factors, and the file holds a copy for each ({shared[0]}, …): loaded into a new "
            "model they train apart; adapt it with share_experts=True before graft.load"]  # fmt: skip


def _say_which(model: nn.Module, module: nn.Module, masters: bool) -> list[str]:
    """Where the numbers come from, if there are two places.

    Raises:
        StateError: masters are asked for and there are none to be had.
    """
    kept = factor_parameters(module)
    has = any(has_master(p) for p in kept.values())
    if masters and not has:
        raise StateError("masters=True needs a model in a DeepSpeed engine; no factor has an fp32 master")
    if masters and not is_wrapped(model):
        raise StateError("masters=True needs the DeepSpeed engine, not its module: graft.save(engine, …)")
    low = sorted({str(p.dtype).removeprefix("torch.") for p in kept.values()} - {"float32"})
    if not has or not low:
        return []
    if masters:
        return [f"A and B are the optimizer's fp32 masters, not the {', '.join(low)} copies that were run"]
    return [f"A and B are the {', '.join(low)} copies that were run, not the optimizer's fp32 masters"]


def config_of(model: nn.Module) -> Mapping[str, object] | None:
    """The model's ``config.json``, if it is one of transformers' or of diffusers'."""
    config: object = getattr(model, "config", None)
    if isinstance(config, Mapping):
        return {**cast("Mapping[str, object]", config), "_class_name": type(model).__name__}
    to_dict = getattr(config, "to_dict", None)
    return cast("Mapping[str, object]", to_dict()) if callable(to_dict) else None
