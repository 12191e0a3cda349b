"""Names of Megatron's modules ↔ names of Hugging Face's parameters.

Megatron-Core fuses q, k, v to ``linear_qkv`` and gate, up to ``linear_fc1``, and a checkpoint stacks layers,
and experts, to one tensor unless it was told otherwise. Source: Megatron-Bridge's ``models/*_bridge.py`` and
``peft/*.py``, Megatron-Core's ``sharded_state_dict`` methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Modules = Mapping[str, Mapping[str, str]]

_DENSE: Modules = {
    "self_attention.linear_qkv": {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    "self_attention.linear_proj": {"": "self_attn.o_proj"},
    "mlp.linear_fc1": {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
    "mlp.linear_fc2": {"": "mlp.down_proj"},
}
_MIXTURE: Modules = {
    "mlp.router": {"": "mlp.gate"},
    "mlp.experts.linear_fc1": {"gate": "mlp.experts.{}.gate_proj", "up": "mlp.experts.{}.up_proj"},
    "mlp.experts.linear_fc2": {"": "mlp.experts.{}.down_proj"},
    "mlp.shared_experts.linear_fc1": {
        "gate": "mlp.shared_expert.gate_proj",
        "up": "mlp.shared_expert.up_proj",
    },
    "mlp.shared_experts.linear_fc2": {"": "mlp.shared_expert.down_proj"},
}
_MIXTRAL: Modules = {
    "mlp.router": {"": "block_sparse_moe.gate"},
    "mlp.experts.linear_fc1": {
        "gate": "block_sparse_moe.experts.{}.w1",
        "up": "block_sparse_moe.experts.{}.w3",
    },
    "mlp.experts.linear_fc2": {"": "block_sparse_moe.experts.{}.w2"},
}
_HEAD = "output_layer"
_WRAPPERS = frozenset({"model", "module", "llava_model"})
_TOWER = "language_model"
_ROLES: Mapping[tuple[str, ...], tuple[Literal["A", "B", "magnitude"], str]] = {
    ("linear_in", "weight"): ("A", ""),
    ("linear_out", "weight"): ("B", ""),
    ("linear_out", "weight_w"): ("B", "gate"),  # Megatron's singleton_local_shards
    ("linear_out", "weight_v"): ("B", "up"),
    ("weight_magnitude",): ("magnitude", ""),
}
_ADAPTERS = {f"adapter_{part}": part for part in ("q", "k", "v", "gate", "up")}


def modules_of(model_type: str) -> Modules:
    """Megatron's modules of a layer → their parts → Hugging Face's modules; ``{}`` is an expert's number."""
    return {**_DENSE, **(_MIXTRAL if model_type == "mixtral" else _MIXTURE)}


class Module(NamedTuple):
    """One of Megatron's linear modules.

    Args:
        tower: whether it belongs to the language model of a vision-language model.
        layer: its number; None for the head, and for layers that are stacked to one tensor.
        name: below the layer, as in :func:`modules_of`; ``output_layer`` for the head.
        expert: its number; None if there is none, or experts are stacked.
    """

    tower: bool
    layer: int | None
    name: str
    expert: int | None

    @property
    def is_head(self) -> bool:
        return self.name == _HEAD

    @property
    def is_expert(self) -> bool:
        return self.name.split(".")[1:2] == ["experts"]


@dataclass(frozen=True)
class Key:
    """A tensor of an adapter.

    Args:
        part: the adapter's own part of a fused module (canonical LoRA); empty for the whole.
        half: the half of B that a tensor of its own holds; empty for the whole.
    """

    text: str
    module: Module
    role: Literal["A", "B", "magnitude"]
    part: str
    half: str


def is_adapter(text: str) -> bool:
    """Whether a tensor's name says that it is an adapter's, and not the optimizer's state of one."""
    return "adapter" in text.split(".") and not is_optimizer(text)


def is_optimizer(text: str) -> bool:
    """``optimizer.…`` or ``chained_0.optimizer.…``."""
    return "optimizer" in text.split(".")[:2]


def parse(text: str) -> Key | None:
    """The tensor's name, understood; None if it is none of the modules that are known."""
    parts = text.split(".")
    at = parts.index("adapter")
    before, after = parts[:at], parts[at + 1 :]
    part = _ADAPTERS.get(after[0], "") if after else ""
    role = _ROLES.get(tuple(after[1:] if part else after))
    while before and before[0] in _WRAPPERS:
        before = before[1:]
    tower = before[:1] == [_TOWER]
    module = _module(before[1:] if tower else before, tower)
    if role is None or module is None or part not in ("", *_parts(module)):
        return None
    return Key(text, module, role[0], part, role[1])


def _module(parts: list[str], tower: bool) -> Module | None:
    if parts == [_HEAD]:
        return Module(tower, None, _HEAD, None)
    if parts[:2] != ["decoder", "layers"]:
        return None
    layer, rest = _number(parts[2:])
    expert = None
    if rest[:2] == ["mlp", "experts"]:
        inner = rest[3:] if rest[2:3] in (["experts"], ["local_experts"]) else rest[2:]
        expert, inner = _number(inner)
        rest = ["mlp", "experts", *inner]
    module = Module(tower, layer, ".".join(rest), expert)
    return module if module.name in {**_DENSE, **_MIXTURE} else None


def _number(parts: list[str]) -> tuple[int | None, list[str]]:
    return (int(parts[0]), parts[1:]) if parts and parts[0].isdigit() else (None, parts)


def _parts(module: Module) -> tuple[str, ...]:
    return () if module.is_head else tuple({**_DENSE, **_MIXTURE}[module.name])


def parameter_of(module: Module, part: str, table: Modules) -> str:
    """Hugging Face's name of one part of a module with a layer and, where there are experts, an expert."""
    if module.is_head:
        return "lm_head.weight"
    leaf = table[module.name][part].replace("{}", str(module.expert))
    return f"model.layers.{module.layer}.{leaf}.weight"


def place_of(parameter: str, table: Modules) -> tuple[Module, str] | None:
    """The module and the part of it that a Hugging Face parameter is; None if Megatron has none for it."""
    parts = parameter.split(".")
    tower = _TOWER in parts[:2]
    plain = [p for n, p in enumerate(parts) if not (n < 2 and p in (_TOWER, "model"))]
    if plain == ["lm_head", "weight"]:
        return Module(tower, None, _HEAD, None), ""
    if len(plain) < 3 or plain[0] != "layers" or not plain[1].isdigit() or plain[-1] != "weight":
        return None
    inner = plain[2:-1]
    number = next((p for p in inner if p.isdigit()), None)
    leaf = ".".join("{}" if p.isdigit() else p for p in inner)
    expert = None if number is None else int(number)
    for name, members in table.items():
        for part, module in members.items():
            if module == leaf:
                return Module(tower, int(plain[1]), name, expert), part
    return None


def key_of(module: Module, suffix: str) -> str:
    """The checkpoint's name of a tensor of this module; experts, and layers without number, are stacked."""
    tower = f"{_TOWER}." if module.tower else ""
    if module.is_head:
        return f"{tower}{_HEAD}.adapter.{suffix}"
    layer = "" if module.layer is None else f".{module.layer}"
    name = module.name.replace("mlp.experts.", "mlp.experts.experts.")
    return f"{tower}decoder.layers{layer}.{name}.adapter.{suffix}"
