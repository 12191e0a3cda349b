"""Write W + ΔW as a Hugging Face directory, tensor by tensor; the model is not touched and trains on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .adapted import factor_names, slots_of
from .attach import own_class
from .engines import Engine, engine_of
from .engines.wrappers import Together, is_spread, team_of, together, unwrap
from .errors import OutputError, StateError
from .fusing import Held, effective_weight, held_sites

#: the tensor, on the process that writes; None on the others, which call it in the same order
Make = Callable[[], "torch.Tensor | None"]


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the output before names are converted: how it looks, and how to make it.

    Args:
        like: a meta tensor of the global shape.
        same: equal for tensors that are one in memory.
    """

    like: torch.Tensor
    dtype: torch.dtype
    make: Make
    same: tuple[Any, ...] = ()


@torch.no_grad()
def export(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = 5 * 10**9,
    force: bool = False,
) -> Path:
    """Write the model with every adapted weight as W + ΔW, rounded once, to a new directory.

    A transformers model is written as its own ``save_pretrained`` would name things (config, generation
    config, tied weights once, transformers 5's packed experts one by one) and loads with
    ``from_pretrained``; of any other module the safetensors alone are written. One adapted weight is in
    memory at a time. The directory appears whole or not at all.

    Given an engine (DeepSpeed, DDP) or a model whose parameters are spread over processes, every process
    calls this with the same arguments. The first one writes; weights travel to it one by one, so no
    process holds more than one whole weight. If one fails, all raise.

    Args:
        tokenizer: anything with ``save_pretrained``; written beside the model.
        dtype: of all floating-point parameters; each rounded once. The model's own when None.
        max_shard_size: bytes of tensor data in a file; all in one file when None.
        force: replace an existing model directory.
    Raises:
        StateError: the model has no adapter, or a sum overflows the dtype.
        OutputError: the path exists or cannot be written; nothing is left behind.
    """
    from .atomic import atomic_directory
    from .tensors import write_shards

    team, model, out = team_of(model), unwrap(model), Path(path)
    with together(team) as work:
        if getattr(model, "hf_quantizer", None) is not None:
            raise StateError("the model is quantised; load the base unquantised to export W + ΔW")
        tensors = _convert(model, _without_tied(model, _plan(model, dtype)), team.is_writer())
        makes = {name: _stepping(t.make, work) for name, t in tensors.items()}
        if not team.is_writer():
            for make in makes.values() if is_spread(team) else ():
                make()
            return out
        items = [(name, tuple(t.like.shape), t.dtype, _whole(makes[name])) for name, t in tensors.items()]
        with atomic_directory(out, force=force) as folder:
            write_shards(folder, items, max_shard_size=max_shard_size, metadata={"format": "pt"})
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))
            _write_config(model, folder, dtype)
    return out


def _stepping(make: Make, work: Together) -> Make:
    """``make``, begun only if no process has failed since the last; whole replicas need not ask."""

    def step() -> torch.Tensor | None:
        if is_spread(work.team):
            work.step()
        return make()

    return step


def _whole(make: Make) -> Callable[[], torch.Tensor]:
    def made() -> torch.Tensor:
        tensor = make()
        assert tensor is not None
        return tensor

    return made


def _plan(model: nn.Module, dtype: torch.dtype | None) -> dict[str, _Tensor]:
    """The plain model's state dict, with a call for each tensor."""
    adapted = {id(h.parameter_tensor): h for h in held_sites(model)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ours = _factor_keys(model)
    ignored = set(cast("list[str]", getattr(model, "_keys_to_ignore_on_save", None) or []))
    plan: dict[str, _Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name in ours or name in ignored:
            continue
        if not isinstance(value, torch.Tensor):
            raise OutputError(f"{name} of the model's state is a {type(value).__name__}, not a tensor")
        if value.is_meta:
            raise StateError(f"{name} is not here in full (on the meta device, or offloaded)")
        cast_it = dtype is not None and name in parameters and value.is_floating_point()
        wanted = dtype if cast_it and dtype is not None else value.dtype
        engine = engine_of(value)
        like = torch.empty(engine.shape(value), dtype=value.dtype, device="meta")
        make = _maker(name, value, engine, adapted.get(id(value)), wanted)
        plan[name] = _Tensor(like, wanted, make, _identity(value, engine))
    return plan


def _identity(value: torch.Tensor, engine: Engine) -> tuple[Any, ...]:
    if engine.name != "plain" or not value.numel():
        return (id(value),)
    return (value.data_ptr(), value.device, value.shape, value.stride(), value.dtype)


def _maker(name: str, value: torch.Tensor, engine: Engine, held: Held | None, dtype: torch.dtype) -> Make:
    if held is not None:
        return lambda: effective_weight(held, dtype)

    def make() -> torch.Tensor | None:
        pieces: list[torch.Tensor] = []
        error: Exception | None = None
        try:
            pieces = [part.tensor.to(dtype) for part in engine.parts(value)]
        except Exception as e:  # the others wait in agree, whatever it is
            error = StateError(f"{name}: {e}") if isinstance(e, StateError) else e
        if not engine.agree(error is None):
            raise error or StateError(f"{name}: another process could not read its part; see its error")
        return engine.collect(value, pieces)

    return make


def _factor_keys(model: nn.Module) -> set[str]:
    keys: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in slots_of(module):
            own = (*factor_names(parameter), f"lora_fused_{parameter}")
            keys |= {f"{path}.{name}" if path else name for name in own}
    return keys


def _without_tied(model: nn.Module, plan: Mapping[str, _Tensor]) -> dict[str, _Tensor]:
    """Each stored tensor once; under the name that transformers keeps, else under its first."""
    tied = set(cast("dict[str, str]", getattr(model, "all_tied_weights_keys", None) or {}))
    kept: dict[tuple[Any, ...], str] = {}
    for name, t in plan.items():
        key = t.same
        if key not in kept or (kept[key] in tied and name not in tied):
            kept[key] = name
    names = set(kept.values())
    return {name: t for name, t in plan.items() if name in names}


def _convert(model: nn.Module, plan: Mapping[str, _Tensor], writes: bool) -> dict[str, _Tensor]:
    """Names and tensors as transformers 5 stores them on disk, where they differ from those in memory."""
    revert = _reverter(model)
    if revert is None:
        return dict(plan)
    meta = {name: torch.empty_like(t.like, dtype=t.dtype, device="meta") for name, t in plan.items()}
    whole = revert(dict(meta))
    found: dict[str, _Tensor] = {}
    for name, t in plan.items():
        try:
            parts = revert({name: meta[name]})
        except Exception:
            # a conversion that needs several tensors at once: its group cannot be streamed
            break
        last = _Cached(revert, name, t, parts)
        for part, value in parts.items():
            found[part] = _Tensor(value, t.dtype, last.maker(part))
    if {n: t.like.shape for n, t in found.items()} == {n: t.shape for n, t in whole.items()}:
        return found
    made = {name: t.make() for name, t in plan.items()}
    values = revert({name: t for name, t in made.items() if t is not None}) if writes else {}
    return {n: _Tensor(v, v.dtype, _given(v)) for n, v in values.items()}


def _given(value: torch.Tensor) -> Make:
    return lambda: value


class _Cached:
    """One tensor and the parts it is stored as; kept from its first part to its last."""

    def __init__(
        self,
        revert: Callable[[dict[str, Any]], dict[str, Any]],
        name: str,
        t: _Tensor,
        names: Iterable[str],
    ) -> None:
        self.revert, self.name, self.t, self.names = revert, name, t, list(names)
        self.parts: dict[str, torch.Tensor | None] = {}

    def maker(self, part: str) -> Make:
        def make() -> torch.Tensor | None:
            if part not in self.parts:
                made = self.t.make()
                self.parts = dict.fromkeys(self.names)
                if made is not None:
                    self.parts |= self.revert({self.name: made})
            return self.parts.pop(part)

        return make


def _reverter(model: nn.Module) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """transformers' own reversal of its weight conversions for this model; None if it has none."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        return None
    try:
        from transformers import core_model_loading
    except ImportError:
        return None
    function: Any = getattr(core_model_loading, "revert_weight_conversion", None)
    return None if function is None else lambda tensors: function(model, tensors)


def _write_config(model: nn.Module, folder: Path, dtype: torch.dtype | None) -> None:
    """config.json last: until it is there, no directory loads as a model."""
    config = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    if callable(getattr(model, "can_generate", None)) and cast(Any, model).can_generate():
        cast(Any, model).generation_config.save_pretrained(str(folder))
    config = copy.deepcopy(cast(Any, config))
    config.architectures = [own_class(model).__name__]
    first = dtype or cast(Any, model).dtype
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", str(first).removeprefix("torch."))
    config.save_pretrained(str(folder))
