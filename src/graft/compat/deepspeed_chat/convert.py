"""The verbs on a model: convert, choose what trains, fuse and unfuse."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ... import fusing
from ...adapted import slots_of
from ...attach import all_or_nothing, become_adapted, sites
from ...engines.wrappers import is_spread, is_wrapped, team_of, unwrap
from ...errors import Problems, StateError, TargetError
from ...kinds import read_always
from ...model import factor_parameters
from ...targets import Holder, Inventory
from .layer import LinearLayer_LoRA, add_factors, checked, new_pair

Model = TypeVar("Model", bound=nn.Module)


def recursive_getattr(model: Any, module_name: str) -> Any:
    """What a dotted name leads to."""
    for name in module_name.split("."):
        model = getattr(model, name)
    return model


def recursive_setattr(model: Any, module_name: str, module: Any) -> None:
    """Put ``module`` where a dotted name leads to."""
    parent, _, name = module_name.rpartition(".")
    setattr(recursive_getattr(model, parent) if parent else model, name, module)


def convert_linear_layer_to_lora(
    model: Model,
    part_module_name: str,
    lora_dim: int = 0,
    lora_scaling: float = 1,
    lora_droppout: float = 0,
) -> Model:
    """Make every ``nn.Linear`` whose dotted name contains ``part_module_name`` a :class:`LinearLayer_LoRA`.

    Their weights are frozen, nothing else is. The factors are drawn in torch's default dtype and on its
    default device, in the order of the model's modules, and rounded to the weight's dtype. Layers that are
    converted already stay as they are.

    Returns:
        The model itself.
    Raises:
        TargetError: no name contains it, a linear that cannot be converted, an argument outside its range.
        StateError: the model is in a training engine already.
    """
    if is_wrapped(model):
        raise StateError(
            "the engine's optimizer would not know new factors; call convert_linear_layer_to_lora before "
            "deepspeed.initialize"
        )
    chosen = _chosen(model, part_module_name, lora_droppout)
    weights = [cast(nn.Parameter, h.module.weight) for h in chosen]
    options = [checked(weight, lora_dim, lora_scaling, lora_droppout) for weight in weights]
    with all_or_nothing(model):
        for holder, weight, own in zip(chosen, weights, options, strict=True):
            layer = become_adapted(holder.module)
            layer.__class__ = cast(Any, LinearLayer_LoRA)
            pair = new_pair(cast(nn.Linear, layer), lora_dim)
            for factor in pair:
                factor.data = factor.data.to(weight.device, weight.dtype)
            add_factors(model, holder, own, lora_droppout, pair)
    return model


def _chosen(model: nn.Module, part: str, dropout: float) -> list[Holder]:
    """The linears to convert, each once.

    Raises:
        TargetError: none, or some that cannot be converted.
    """
    inventory = Inventory(model)
    read = {id(child) for m in model.modules() for child in read_always(m)}
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    matched = {name: m for name, m in linears.items() if part in name}
    new = {name: m for name, m in matched.items() if not isinstance(m, LinearLayer_LoRA)}
    problems = Problems(TargetError, "cannot convert to LoRA:")
    if not new:
        problems.add(_none(part, list(linears), len(matched)))
    for name, module in new.items():
        reason = _unfit(module, inventory)
        if not reason and dropout and id(module) in read:
            reason = "the module around it reads its weight itself, so lora_droppout must be 0"
        if reason:
            problems.add(f"{name}: {reason}")
    problems.raise_if_any()
    return [Holder(f"{name}.weight" if name else "weight", m, "weight") for name, m in new.items()]


def _none(part: str, linears: list[str], converted: int) -> str:
    if converted:
        return f"all {converted} linears whose names contain {part!r} are LoRA layers already"
    near = difflib.get_close_matches(part, linears, 3, 0.3) or linears[:3]
    said = f"; linears are {', '.join(near)} …" if near else "; the model has no nn.Linear"
    return f"no nn.Linear's name contains {part!r}{said}"


def _unfit(module: nn.Linear, inventory: Inventory) -> str:
    """Why a linear cannot be converted; empty if it can."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if slots_of(module):
        return "it has an adapter of graft.adapt"
    if weight is None:
        return "its weight is not a parameter (parametrised or weight-normed); remove that first"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape yet (a lazy module); run a forward first"
    if type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own, which would be lost; use graft.adapt"
    others = [h.name for h in inventory.holders.get(id(weight), []) if h.module is not module]
    if others:
        return f"its weight is {others[0]} too (tied), and fusing would change both; untie them"
    return ""


def only_optimize_lora_parameters(model: Model, force_optimize_params: Sequence[str] = ()) -> Model:
    """Train the factors and the parameters of these full names; freeze everything else.

    Raises:
        StateError: the model has no LoRA layer.
        TargetError: a name that the model does not have.
    """
    inner = unwrap(model)
    if not sites(inner):
        raise StateError(
            "nothing would train: the model has no LoRA layer; convert_linear_layer_to_lora first"
        )
    named = dict(inner.named_parameters(remove_duplicate=False))
    problems = Problems(TargetError, "force_optimize_params:")
    for name in force_optimize_params:
        if name not in named:
            near = difflib.get_close_matches(name, named, 3)
            problems.add(
                f"no parameter is called {name!r}" + (f"; nearest: {', '.join(near)}" if near else "")
            )
    problems.raise_if_any()
    wanted = {id(p) for p in factor_parameters(inner).values()}
    wanted |= {id(named[name]) for name in force_optimize_params}
    for parameter in inner.parameters():
        parameter.requires_grad = id(parameter) in wanted
    return model


def convert_lora_to_linear_layer(model: Model, fuse_lora: bool = True) -> Model:
    """Fuse (or, with ``fuse_lora=False``, unfuse) every adapted weight of the model; all of them or none.

    The layers keep their class, and the factors stay. A model without LoRA layers is returned as it is. Under
    ZeRO-3 every process calls this; A and B alone are gathered, and each process edits its own slice. Under
    the other stages it is each process's own affair.

    Raises:
        StateError: as :func:`graft.fuse` and :func:`graft.unfuse`; nothing is changed.
    """
    inner = unwrap(model)
    if sites(inner):
        verb = fusing.fuse if fuse_lora else fusing.unfuse
        verb(model if is_spread(team_of(model)) else inner)
    return model


def fuse_lora(model: Model) -> Model:
    """``convert_lora_to_linear_layer(model, fuse_lora=True)``."""
    return convert_lora_to_linear_layer(model, fuse_lora=True)


def unfuse_lora(model: Model) -> Model:
    """``convert_lora_to_linear_layer(model, fuse_lora=False)``: every bit comes back."""
    return convert_lora_to_linear_layer(model, fuse_lora=False)


def make_model_gradient_checkpointing_compatible(model: Model) -> Model:
    """Let gradients through the input embeddings, which reentrant checkpointing needs when only LoRA trains.

    Asked of the model, or else of the first module inside it that can do it (a reward model's transformer).
    Where there is none, a warning says so.
    """
    modules = list(unwrap(model).modules())
    for module in cast("list[Any]", modules):
        if hasattr(module, "enable_input_require_grads"):
            module.enable_input_require_grads()
            return model
    for module in cast("list[Any]", modules):
        if hasattr(module, "get_input_embeddings"):
            module.get_input_embeddings().register_forward_hook(_let_gradients_in)
            return model
    warnings.warn(
        f"a {type(model).__name__} has neither enable_input_require_grads nor get_input_embeddings: with "
        "reentrant gradient checkpointing its LoRA layers would get no gradient; set use_reentrant=False",
        stacklevel=2,
    )
    return model


def _let_gradients_in(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def _z3_params_to_fetch(param_list: Iterable[Any]) -> list[Any]:  # pyright: ignore[reportUnusedFunction]
    """The parameters that ZeRO-3 holds and has not gathered."""
    return [p for p in param_list if hasattr(p, "ds_id") and p.ds_status.name == "NOT_AVAILABLE"]
