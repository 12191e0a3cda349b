"""mistral-finetune: ``lora.safetensors`` under Mistral's own names; ``params.json`` with ``lora.scaling``.

``layers.N.attention.wq.lora_A.weight`` is ``[r, in]``, ``.lora_B.weight`` is ``[out, r]``; ``scaling`` is the
multiplier. Norms may be trained too and replace the base's. With a Hugging Face base (its config.json has a
``model_type``), names become the base's and the rows of q and k go from Mistral's order to transformers'
(:mod:`.rotary`).
Source: mistralai/mistral-finetune, ``model/lora.py``, ``finetune/checkpointing.py``, ``utils/merge_lora.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from ..adapter import Adapter, LowRank
from ..errors import FormatError
from ..fingerprint import dumps
from ..tensors import atomic_directory, save_file
from .blocks import joined
from .holding import Holds
from .ledger import Ledger
from .model_facts import model_facts
from .protocol import Loss, Options, Target, Written
from .renames import Renames
from .rotary import can_turn, renamed, to_neighbours
from .source import Source
from .uniform import commonest_scale, one_rank, with_scale

_LINEAR = {
    **{f"layers.{{}}.attention.w{x}": f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkvo"},
    "layers.{}.feed_forward.w1": "model.layers.{}.mlp.gate_proj",
    "layers.{}.feed_forward.w2": "model.layers.{}.mlp.down_proj",
    "layers.{}.feed_forward.w3": "model.layers.{}.mlp.up_proj",
    **{
        f"layers.{{}}.feed_forward.experts.{{}}.w{n}": f"model.layers.{{}}.block_sparse_moe.experts.{{}}.w{n}"
        for n in (1, 2, 3)
    },
}
_NORMS = {
    "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
    "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "norm": "model.norm",
}
_NAMES = Renames({**_LINEAR, **_NORMS})
_ADAPTED, _NORMED = Renames(_LINEAR), Renames(_NORMS)
_PARAMS = "params.json"


class MistralFormat:
    """The format's entry in the registry."""

    name = "mistral"

    def detect(self, source: Source) -> bool:
        """By content: LoRA's tensors are those of Mistral's modules, and nothing else is there but norms."""
        modules = [_module(key) for key in source.tensors]
        adapted = [module for module, role in modules if role in ("lora_A", "lora_B")]
        return bool(adapted) and all(
            (_ADAPTED if role else _NORMED).ours(module) is not None for module, role in modules
        )

    def read(self, source: Source, options: Options) -> Adapter:
        options.refuse_unused("mistral-finetune", alpha=True, enable_lora=True)
        scale, ledger = _scaling(source), Ledger(source.tensors, source.weights)
        ledger.check_tensors()
        ledger.problems.raise_if_any()
        sites: dict[str, LowRank] = {}
        full: dict[str, torch.Tensor] = {}
        for key in source.tensors:
            module, role = _module(key)
            if role == "lora_A":
                _add(ledger, sites, module, scale, source.tensors)
            elif role == "":
                full[f"{module}.weight"] = ledger.take(key)
        ledger.close(explain=lambda key: "its lora_A is missing")
        found = Adapter(sites, full, format="mistral", config=dict(source.settings(_PARAMS) or {}))
        if not (options.model or {}).get("model_type"):
            note = "names and order of rows are Mistral's own; a Hugging Face base (--base) translates them"
            return replace(found, notes=(note,), base=source.fingerprints)
        return replace(_for_transformers(found, options.model), base=source.fingerprints)

    def losses(self, adapter: Adapter, target: Target) -> list[Loss]:
        holds = Holds("mistral-finetune", full=lambda name: _theirs(name, _NORMED) is not None)
        found = holds.losses(adapter)
        dropped = {loss.name for loss in found if loss.part == "site"}
        for name, site in adapter.sites.items():
            if name not in dropped and (why := _unwritable(name, site, target)):
                found.append(Loss("site", name, why))
        return found

    def write(self, adapter: Adapter, path: Path, target: Target) -> Written:
        rank, sites = one_rank({name: joined(site) for name, site in adapter.sites.items()})
        scale = commonest_scale(sites)
        sites, notes = with_scale(sites, scale)
        tensors: dict[str, torch.Tensor] = {}
        for name, site in sites.items():
            theirs = _theirs(name, _ADAPTED)
            assert theirs is not None
            heads = _heads(name, target.model)
            site = to_neighbours(site, heads) if heads else site
            tensors[f"{theirs}.lora_A.weight"], tensors[f"{theirs}.lora_B.weight"] = site.A, site.B
        tensors |= {f"{_theirs(name, _NORMED)}.weight": tensor for name, tensor in adapter.replace.items()}
        params = {
            "lora": {"enable": True, "rank": rank, "dropout": 0.0, "scaling": scale},
            **target.extra,
        }
        with atomic_directory(path) as staging:
            save_file(tensors, staging / "lora.safetensors", dumps(adapter.base))
            (staging / _PARAMS).write_text(json.dumps(params, indent=4) + "\n", encoding="utf-8")
        notes.append(f"mistral-inference does not read params.json: load_lora(…, scaling={scale:g})")
        return Written(notes)


def _module(key: str) -> tuple[str, str]:
    """The module of a key, and ``lora_A``, ``lora_B`` or nothing."""
    parts = key.removesuffix(".weight").split(".")
    role = parts[-1] if parts[-1] in ("lora_A", "lora_B") else ""
    return ".".join(parts[:-1] if role else parts), role


def _scaling(source: Source) -> float:
    params = source.settings(_PARAMS) or {}
    lora = params.get("lora")
    scale = cast("Mapping[str, object]", lora).get("scaling") if isinstance(lora, Mapping) else None
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise FormatError(
            f"{source.weights} is mistral-finetune's, and {source.where(_PARAMS)} does not say lora.scaling; "
            "put the run's params.json there or name it with --adapter-config (the default was 2.0)"
        )
    return float(scale)


def _add(
    ledger: Ledger,
    sites: dict[str, LowRank],
    module: str,
    scale: float,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    a, other = ledger.take(f"{module}.lora_A.weight"), f"{module}.lora_B.weight"
    if other not in tensors:
        ledger.problems.add(f"{module}.lora_A.weight has no lora_B")
        return
    b = ledger.take(other)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        ledger.problems.add(
            f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are not of one rank"
        )
        return
    sites[f"{module}.weight"] = LowRank(a, b, scale, fan_in_fan_out=False)


def _for_transformers(adapter: Adapter, model: Mapping[str, object] | None) -> Adapter:
    sites = renamed(adapter.sites, _NAMES, lambda name: _heads(name, model))
    full = {f"{_NAMES.ours(n.removesuffix('.weight'))}.weight": t for n, t in adapter.replace.items()}
    return replace(adapter, sites=sites, replace=full)


def _heads(name: str, model: Mapping[str, object] | None) -> int:
    """The heads whose rows are in another order, for q and k under the base's names; else 0."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if leaf not in ("q_proj", "k_proj"):
        return 0
    facts = model_facts(model, "mistral-finetune's order of the rows of q and k")
    return facts.heads if leaf == "q_proj" else facts.kv_heads


def _theirs(name: str, names: Renames) -> str | None:
    """Mistral's name of a module's weight, given the base's name or Mistral's own."""
    module, _, leaf = name.rpartition(".")
    if leaf != "weight":
        return None
    return module if names.ours(module) is not None else names.theirs(module)


def _unwritable(name: str, site: LowRank, target: Target) -> str:
    if _theirs(name, _ADAPTED) is None:
        return "mistral-finetune has no such module"
    try:
        heads = _heads(name, target.model)
    except FormatError as error:
        return str(error)
    if heads and not can_turn(joined(site), heads):
        return f"its rows are not {heads} heads"
    return ""
