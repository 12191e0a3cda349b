"""Names of weights: Hugging Face's ↔ GGUF's.

The names are gguf's own (``TensorNameMap``). Which architecture a model type has, and whether its q and k
rows are reordered, is what llama.cpp's converter does (``conversion/*.py``, ``LlamaModel.permute``): the
rotary embedding there turns neighbouring rows, Hugging Face's turns rows half a head apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...errors import FormatError
from ..model_facts import expert_count, model_facts
from .container import import_gguf

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_DENSE = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_EXPERTS = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj")
_SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")
_MIXTRAL = tuple(f"block_sparse_moe.{m}" for m in ("gate", "experts.{}.w1", "experts.{}.w2", "experts.{}.w3"))
_HEADS = {"self_attn.q_proj": "heads", "self_attn.k_proj": "kv_heads"}


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp makes of one of transformers' model types.

    Args:
        name: ``general.architecture``.
        modules: a layer's linear modules; ``{}`` stands for an expert's number.
        permuted: whether rows of q and k are reordered.
    """

    name: str
    modules: tuple[str, ...] = _DENSE
    permuted: bool = False


#: transformers' ``model_type`` → what llama.cpp makes of it
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "mixtral": Architecture("llama", (*_ATTENTION, *_MIXTRAL), permuted=True),
    "granite": Architecture("granite", permuted=True),
    "smollm3": Architecture("smollm3", permuted=True),
    "olmo": Architecture("olmo", permuted=True),
    "olmo2": Architecture("olmo2"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2_moe": Architecture("qwen2moe", (*_ATTENTION, "mlp.gate", *_EXPERTS, *_SHARED)),
    "qwen3_moe": Architecture("qwen3moe", (*_ATTENTION, "mlp.gate", *_EXPERTS)),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3": Architecture("gemma3"),
    "gemma3_text": Architecture("gemma3"),
    "phi3": Architecture(
        "phi3", ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ),
    "starcoder2": Architecture("starcoder2", (*_ATTENTION, "mlp.c_fc", "mlp.c_proj")),
}


class Place(NamedTuple):
    """A tensor of the GGUF model, and which expert of it a weight is; None for a whole tensor."""

    tensor: str
    expert: int | None


@dataclass(frozen=True)
class Names:
    """One base's names in both directions.

    Args:
        architecture: of the GGUF model.
        places: the base's parameter → its place.
        parameters: GGUF's tensor → the base's parameters in it: one, or one for each expert.
        heads: GGUF's tensor → how many heads its rows are, where rows are reordered.
    """

    architecture: str
    places: Mapping[str, Place]
    parameters: Mapping[str, tuple[str, ...]]
    heads: Mapping[str, int]

    def place(self, parameter: str) -> Place | None:
        """Where a parameter goes; a vision-language model's language model has GGUF's names of its own."""
        parts = parameter.split(".")
        if "language_model" in parts[:2]:
            parts.remove("language_model")
        return self.places.get(".".join(parts))


def names_of(config: Mapping[str, object] | None) -> Names:
    """The names for a base with this ``config.json``.

    Raises:
        FormatError: no base, or one that llama.cpp's conversion is not known for here.
    """
    facts = model_facts(config, "GGUF")
    known = ARCHITECTURES.get(facts.model_type)
    if known is None:
        raise FormatError(
            f"GGUF: names of model type {facts.model_type!r} are not known; known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    package = import_gguf("GGUF")
    code = next(code for code, name in package.MODEL_ARCH_NAMES.items() if name == known.name)
    table = package.get_tensor_name_map(code, facts.layers)
    places: dict[str, Place] = {}
    parameters: dict[str, tuple[str, ...]] = {}
    heads: dict[str, int] = {}
    for module in ("model.embed_tokens", "lm_head", *_layers(known, facts.layers)):
        tensor = table.get_name(module.replace("{}.", ""))
        if tensor is None:
            continue  # no head of its own, as in Gemma
        tensor = f"{tensor}.weight"
        experts = range(expert_count(config, "GGUF")) if "{}" in module else (None,)
        members = {f"{module}.weight".format(e): Place(tensor, e) for e in experts}
        places |= members
        parameters[tensor] = tuple(members)
        if known.permuted and (which := _HEADS.get(module.partition(".layers.")[2].partition(".")[2])):
            heads[tensor] = getattr(facts, which)
    return Names(known.name, places, parameters, heads)


def _layers(known: Architecture, count: int) -> list[str]:
    return [f"model.layers.{n}.{module}" for n in range(count) for module in known.modules]


def reordered(b: torch.Tensor, heads: int) -> torch.Tensor:
    """B's rows as llama.cpp wants them: of each head, row i of the first half, row i of the second, ….

    Raises:
        ValueError: the rows are not that many heads.
    """
    return _split(b, heads, 2, -1).transpose(1, 2).reshape(b.shape)


def restored(b: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`reordered`."""
    return _split(b, heads, -1, 2).transpose(1, 2).reshape(b.shape)


def _split(b: torch.Tensor, heads: int, first: int, second: int) -> torch.Tensor:
    if b.shape[0] % (2 * heads):
        raise ValueError(f"{b.shape[0]} rows are not {heads} heads of two halves")
    return b.reshape(heads, first, second, b.shape[1])
