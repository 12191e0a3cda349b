"""A model that PEFT adapted, seen as one that Graft adapted: other module objects, the same parameters.

The verbs then need to know nothing of PEFT, and whatever engine holds the parameters holds them still. Facts
on PEFT's layers from its ``tuners/lora/layer.py`` and ``utils/other.py`` (0.21): a layer keeps its plain
module as ``base_layer``, A ``[r, in]`` as ``lora_A[name].weight``, B ``[out, r]`` as ``lora_B[name].weight``,
those of an embedding as ``lora_embedding_A[name]`` ``[r, num]`` and ``lora_embedding_B[name]``
``[dim, r]``, and its scale as ``scaling[name]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from ..adapted import Adapted, Site, slots_of
from ..attach import attach, without_fsdp
from ..engines import settle
from ..errors import Problems, StateError
from ..formats.peft.config import parse
from ..kinds import natural_layout
from ..options import Options
from .find import is_a

_MEND = (
    "Train on, and fuse from files after it, which reads more of PEFT: "
    "graft fuse BASE CHECKPOINT --adapter-config adapter_config.json -o OUT"
)
_LAYERS = {f"peft.tuners.lora.layer.{name}" for name in ("Linear", "Embedding")}


def holds_peft(model: nn.Module) -> bool:
    return any(is_a(m, "BaseTunerLayer") or is_a(m, "PeftModel") for m in model.modules())


def plain_view(model: nn.Module) -> nn.Module:
    """The plain model with PEFT's active adapter as Graft's sites.

    ``modules_to_save`` are in their modules' place. The model itself is not touched: the view's modules are
    other objects. It is to be read only, and dropped before the next step.

    Raises:
        StateError: what is not plain LoRA on linear layers and embeddings, by name; merged, switched off or
            several active adapters; an adapter on one of two tied weights.
        FormatError: settings of the adapter that no fused weight equals.
    """
    settle(model)
    _judge_configs(model)
    plain = model
    while is_a(plain, "PeftModel"):
        plain = cast(Any, plain).get_base_model()
    problems = Problems(StateError, "the model that PEFT adapted cannot be exported while it trains:")
    view = _View(problems).of(plain, "")
    _judge_ties(view, plain, problems)
    problems.raise_if_any(_MEND)
    return view


def _judge_configs(model: nn.Module) -> None:
    for module in model.modules():
        configs: object = getattr(module, "peft_config", None)
        if not isinstance(configs, Mapping):
            continue
        active: Any = getattr(module, "active_adapters", None)
        names: Any = active() if callable(active) else active
        for name, config in cast("Mapping[str, Any]", configs).items():
            if names is None or name in names:
                settings = config.to_dict()
                kind = settings["peft_type"]
                parse({**settings, "peft_type": getattr(kind, "value", kind)}, f"PEFT's adapter {name!r}")
        return


class _View:
    """Copies of module objects, each made once."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.made: dict[int, nn.Module] = {}

    def of(self, module: nn.Module, path: str) -> nn.Module:
        if id(module) not in self.made:
            self.made[id(module)] = self._make(module, path)
        return self.made[id(module)]

    def _make(self, module: nn.Module, path: str) -> nn.Module:
        if is_a(module, "BaseTunerLayer"):
            return self._layer(module, path)
        if is_a(module, "AuxiliaryTrainingWrapper"):
            return self._saved(module, path)
        return self._copy(module, path)

    def _copy(self, module: nn.Module, path: str) -> nn.Module:
        """The same parameters and buffers in another object, which registers what it likes."""
        cls = without_fsdp(type(module))
        copy = cls.__new__(cls)
        copy.__dict__ = dict(module.__dict__)
        for table in ("_parameters", "_buffers"):
            copy.__dict__[table] = dict(module.__dict__[table])
        copy.__dict__["_modules"] = {
            name: None if child is None else self.of(child, f"{path}.{name}" if path else name)
            for name, child in cast("dict[str, nn.Module | None]", module.__dict__["_modules"]).items()
        }
        if isinstance(copy, Adapted):
            copy.graft_slots = dict(slots_of(module))
        return copy

    def _layer(self, module: nn.Module, path: str) -> nn.Module:
        layer = cast(Any, module)
        base = self._copy(layer.base_layer, path)
        names = [n for n in layer.active_adapters if n in layer.scaling]
        if (reason := _unfit(layer, names)) is not None:
            self.problems.add(f"{path}: {reason}")
        elif names:
            (name,) = names
            embedding = name in layer.lora_embedding_A
            a = layer.lora_embedding_A[name] if embedding else layer.lora_A[name].weight
            b = layer.lora_embedding_B[name] if embedding else layer.lora_B[name].weight
            rank, scale = int(layer.r[name]), float(layer.scaling[name])
            layout = natural_layout(base, "weight", cast(Any, base).weight)
            attach(base, "weight", Site(Options(rank, scale * rank, layout=layout), layout, scale), a, b)
        return base

    def _saved(self, module: nn.Module, path: str) -> nn.Module:
        wrapper = cast(Any, module)
        if not is_a(module, "ModulesToSaveWrapper"):
            self.problems.add(f"{path}: a {type(module).__name__} trains a part of a weight")
            return self._copy(wrapper.original_module, path)
        names = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
        if wrapper.disable_adapters:
            self.problems.add(f"{path}: the adapter is switched off; call enable_adapter_layers() first")
        return self.of(wrapper.modules_to_save[names[0]] if names else wrapper.original_module, path)


def _unfit(layer: Any, names: list[str]) -> str | None:
    """Why a layer of PEFT's is not ``W + scale · B · A`` with factors as they are stored."""
    cls = without_fsdp(type(layer))
    if f"{cls.__module__}.{cls.__qualname__}" not in _LAYERS:
        return f"PEFT's layer {cls.__name__} of a {type(layer.get_base_layer()).__name__}"
    if layer.merged:
        return "the adapter is merged into the weight; call unmerge_adapter() first"
    if layer.disable_adapters:
        return "the adapter is switched off; call enable_adapter_layers() first"
    if len(names) > 1:
        return f"several adapters are active ({', '.join(names)}); activate one with set_adapter"
    if any(name in layer.lora_variant for name in names):
        return f"a variant of LoRA ({type(layer.lora_variant[names[0]]).__name__})"
    if any(layer.lora_bias.get(name) for name in names):
        return "lora_bias, which changes the bias too"
    if is_a(layer.base_layer, "BaseTunerLayer"):
        return "adapters in each other"
    return None


def _judge_ties(view: nn.Module, plain: nn.Module, problems: Problems) -> None:
    """PEFT adapts a module; where another holds the same weight, W + ΔW would become the other's too."""
    held: dict[int, list[tuple[str, bool]]] = {}
    for path, module in view.named_modules():
        for name, p in module.named_parameters(recurse=False):
            held.setdefault(id(p), []).append((f"{path}.{name}" if path else name, name in slots_of(module)))
    for places in held.values():
        if len(places) > 1 and any(adapted for _, adapted in places):
            names = " and ".join(name for name, _ in places)
            problems.add(f"{names} are one weight, and PEFT adapts the modules apart")
    for path, module in plain.named_modules():
        if is_a(module, "ModulesToSaveWrapper"):
            own = {id(p) for p in cast(Any, module).original_module.parameters()}
            others = [name for key in own & held.keys() for name, _ in held[key]]
            if others:
                problems.add(f"{path} is trained apart from {', '.join(others)}, one weight in the base")
