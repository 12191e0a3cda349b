"""Write W + ΔW as a Hugging Face directory, tensor by tensor; the model is not touched and trains on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .attach import adapter_keys, own_class
from .effective import effective_weight
from .engines import Engine, engine_of, masters, notice_all
from .engines.megatron_experts import refuse_scattered
from .engines.world import is_known, known
from .engines.wrappers import team_of, together, unwrap
from .errors import OutputError, StateError
from .export_write import Make, Planned, write
from .fusing import refuse_changed
from .held import Held, held_sites


@torch.no_grad()
def export(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = 5 * 10**9,
    force: bool = False,
    gather: bool = False,
) -> Path:
    """Write the model with every adapted weight as W + ΔW, rounded once, to a new directory.

    A transformers model is written as its own ``save_pretrained`` would name things (config, generation
    config, tied weights once, transformers 5's packed experts one by one) and loads with
    ``from_pretrained``; of any other module the safetensors alone are written. One block of one adapted
    weight is in memory at a time. The directory appears whole or not at all.

    Given an engine (DeepSpeed, DDP) or a model whose parameters are spread over processes, every process
    calls this with the same arguments. Where all see the directory (one machine, a shared file system),
    each writes its own slices into the one file, and only A and B travel. Elsewhere weights travel to the
    first process one by one, so no process holds more than one whole weight. If one fails, all raise.

    Args:
        tokenizer: anything with ``save_pretrained``; written beside the model.
        dtype: of all floating-point parameters; each rounded once. The model's own when None.
        max_shard_size: bytes of tensor data in a file; all in one file when None.
        force: replace an existing model directory.
        gather: let the weights travel although all processes see the directory. The bytes are the same.
    Raises:
        StateError: the model has no adapter, A or B changed while fused, or a sum overflows the dtype;
            Megatron's pipeline stages, or experts under its expert parallelism.
        OutputError: the path exists or cannot be written; nothing is left behind.
    """
    team, wrapped, model, out = team_of(model), model, unwrap(model), Path(path)

    def finish(folder: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        _write_config(model, folder, dtype)

    with together(team) as work:
        if getattr(model, "hf_quantizer", None) is not None:
            raise StateError("the model is quantised; load the base unquantised to export W + ΔW")
        # of replicas one is written, so all must be equal; of a fused site W is, so it must hold this ΔW
        refuse_changed([h for h in held_sites(wrapped) if h.site.fusion is not None])
        tensors = _convert(model, _without_tied(model, _plan(model, dtype)), team.is_writer())
        write(work, out, tensors, finish, max_shard_size=max_shard_size, force=force, gather=gather)
    return out


def _plan(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Planned]:
    """The plain model's state dict, with a call for each tensor."""
    refuse_scattered(model, "graft.export", experts=True)
    notice_all(model)
    adapted = {id(h.parameter_tensor): h for h in held_sites(model)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ours = adapter_keys(model)
    ignored = set(cast("list[str]", getattr(model, "_keys_to_ignore_on_save", None) or []))
    plan: dict[str, Planned] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        # what Transformer Engine keeps of its low-precision scales: no part of the weights, and no tensor
        if name in ours or name in ignored or name.split(".")[-1] == "_extra_state":
            continue
        if not isinstance(value, torch.Tensor):
            raise OutputError(f"{name} of the model's state is a {type(value).__name__}, not a tensor")
        if value.is_meta:
            raise StateError(f"{name} is not here in full (on the meta device, or offloaded)")
        cast_it = dtype is not None and name in parameters and value.is_floating_point()
        wanted = dtype if cast_it and dtype is not None else value.dtype
        engine = engine_of(value)
        like = torch.empty(engine.shape(value), dtype=value.dtype, device="meta")
        held = adapted.get(id(value))
        make = _maker(name, value, held, wanted)
        plan[name] = Planned(like, wanted, make, _identity(value, engine), value, held)
    return plan


def _identity(value: torch.Tensor, engine: Engine) -> tuple[Any, ...]:
    if engine.name != "plain" or not value.numel():
        return (id(value),)
    return (value.data_ptr(), value.device, value.shape, value.stride(), value.dtype)


def _maker(name: str, value: torch.Tensor, held: Held | None, dtype: torch.dtype) -> Make:
    if held is not None:
        return lambda: effective_weight(held, dtype)

    def make() -> torch.Tensor | None:
        try:
            return masters.whole(value, dtype=dtype)
        except StateError as error:
            renamed = StateError(f"{name}: {error}")
            raise known(renamed) if is_known(error) else renamed from None

    return make


def _without_tied(model: nn.Module, plan: Mapping[str, Planned]) -> dict[str, Planned]:
    """Each stored tensor once; under the name that transformers keeps, else under its first."""
    tied = set(cast("dict[str, str]", getattr(model, "all_tied_weights_keys", None) or {}))
    kept: dict[tuple[Any, ...], str] = {}
    for name, t in plan.items():
        key = t.same
        if key not in kept or (kept[key] in tied and name not in tied):
            kept[key] = name
    names = set(kept.values())
    return {name: t for name, t in plan.items() if name in names}


def _convert(model: nn.Module, plan: Mapping[str, Planned], writes: bool) -> dict[str, Planned]:
    """Names and tensors as transformers 5 stores them on disk, where they differ from those in memory."""
    revert = _reverter(model)
    if revert is None:
        return dict(plan)
    meta = {name: torch.empty_like(t.like, dtype=t.dtype, device="meta") for name, t in plan.items()}
    whole = revert(dict(meta))
    found: dict[str, Planned] = {}
    for name, t in plan.items():
        try:
            parts = revert({name: meta[name]})
        except Exception:
            # a conversion that needs several tensors at once: its group cannot be streamed
            break
        if len(parts) == 1 and next(iter(parts.values())) is meta[name]:  # another name for the same tensor
            found[next(iter(parts))] = t
            continue
        last = _Cached(revert, name, t, parts)
        for part, value in parts.items():
            found[part] = Planned(value, t.dtype, last.maker(part))
    if {n: t.like.shape for n, t in found.items()} == {n: t.shape for n, t in whole.items()}:
        return found
    made = {name: t.make() for name, t in plan.items()}
    values = revert({name: t for name, t in made.items() if t is not None}) if writes else {}
    return {n: Planned(v, v.dtype, _given(v)) for n, v in values.items()}


def _given(value: torch.Tensor) -> Make:
    return lambda: value


class _Cached:
    """One tensor and the parts it is stored as; kept from its first part to its last."""

    def __init__(
        self,
        revert: Callable[[dict[str, Any]], dict[str, Any]],
        name: str,
        t: Planned,
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
