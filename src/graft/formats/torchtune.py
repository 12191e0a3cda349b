"""torchtune: ``layers.N.attn.q_proj.lora_a.weight`` in a .pt file; rank and alpha in the recipe.

``lora_a.weight`` is ``[r, in]``, ``lora_b.weight`` is ``[out, r]``, DoRA's ``magnitude`` is ``[out]``;
scale = alpha / rank. With a Hugging Face base names become the base's, and the rows of q and k go from
torchtune's order to transformers' (:mod:`.rotary`), but for Qwen, which torchtune rotates as transformers
does. Source: torchtune 0.6.1, ``modules/peft/``, ``models/convert_weights.py``,
``models/qwen2/_convert_weights.py``, ``training/checkpointing/_checkpointer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from ..adapter import Adapter, LowRank
from ..errors import FormatError
from .ledger import Ledger, listed
from .protocol import Loss, Options, Target, Written
from .rotary import renamed
from .source import CONFIG_NAME, Source
from .torchtune_names import NAMES, RECIPE, heads_turned

_ROLES = {"lora_a.weight": "A", "lora_b.weight": "B", "magnitude": "m"}


class TorchtuneFormat:
    """The format's entry in the registry."""

    name = "torchtune"

    def detect(self, source: Source) -> bool:
        """By content: names that end in ``lora_a.weight``."""
        return any(parse(key)[1] == "A" for key in source.tensors)

    def read(self, source: Source, options: Options) -> Adapter:
        options.refuse_unused("torchtune", enable_lora=True)
        rank, alpha, config = _settings(source, options)
        ledger = Ledger(source.tensors, source.weights)
        ledger.check_tensors()
        ledger.problems.raise_if_any()
        sites: dict[str, LowRank] = {}
        idle: list[str] = []
        for key in source.tensors:
            module, role = parse(key)
            if role != "A" or NAMES.ours(module) is None:
                continue
            site = _site(ledger, source.tensors, module, rank, alpha)
            if site is None:
                continue
            if site.magnitude is None and not site.A.any() and not site.B.any():
                idle.append(module)
            else:
                sites[f"{module}.weight"] = site
        ledger.close(explain=_explain)
        notes = [f"A and B are zero, as of a module that is not adapted: {listed(idle)}"] if idle else []
        if not (options.model or {}).get("model_type"):
            notes.append(
                "names and order of rows are torchtune's; a Hugging Face base (--base) translates them"
            )
        else:
            sites = renamed(sites, NAMES, lambda name: heads_turned(name, options.model))
        return Adapter(sites, format="torchtune", config=config, notes=tuple(notes))

    def losses(self, adapter: Adapter, target: Target) -> list[Loss]:
        from . import torchtune_writer

        return torchtune_writer.losses(adapter, target)

    def write(self, adapter: Adapter, path: Path, target: Target) -> Written:
        from . import torchtune_writer

        return torchtune_writer.write(adapter, path, target)


def parse(key: str) -> tuple[str, str]:
    """The module of a key, and ``A``, ``B``, ``m`` or nothing."""
    for ending, role in _ROLES.items():
        if key.endswith(f".{ending}"):
            return key[: -len(ending) - 1], role
    return key, ""


def _settings(source: Source, options: Options) -> tuple[int | None, float, dict[str, object]]:
    """Rank if it is told, alpha, and the file that told them."""
    config = source.settings(RECIPE, CONFIG_NAME) or {}
    inner = config.get("model")
    table = cast("Mapping[str, object]", inner) if isinstance(inner, Mapping) else config
    rank, alpha = table.get("lora_rank", table.get("r")), table.get("lora_alpha")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise FormatError(
            f"{source.where(RECIPE, CONFIG_NAME)}: the rank must be a whole number, got {rank!r}"
        )
    if isinstance(alpha, (int, float)) and not isinstance(alpha, bool):
        options.refuse_unused(f"{source.where(RECIPE, CONFIG_NAME).name} and torchtune", alpha=True)
        return rank, float(alpha), dict(config)
    return rank, options.alpha_for("torchtune", source.weights, "lora_alpha"), dict(config)


def _site(
    ledger: Ledger, tensors: Mapping[str, torch.Tensor], module: str, rank: int | None, alpha: float
) -> LowRank | None:
    a, other = ledger.take(f"{module}.lora_a.weight"), f"{module}.lora_b.weight"
    magnitude = ledger.take(f"{module}.magnitude") if f"{module}.magnitude" in tensors else None
    if other not in tensors:
        ledger.problems.add(f"{module}.lora_a.weight has no lora_b")
        return None
    b = ledger.take(other)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        ledger.problems.add(
            f"{module}: lora_a {list(a.shape)} and lora_b {list(b.shape)} are not of one rank"
        )
        return None
    if rank not in (None, b.shape[1]):
        ledger.problems.add(f"{module} is of rank {b.shape[1]}, its settings say {rank}")
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        ledger.problems.add(
            f"{module}.magnitude {list(magnitude.shape)} is not one for each of {b.shape[0]} rows"
        )
        return None
    return LowRank(a, b, alpha / b.shape[1], magnitude=magnitude, fan_in_fan_out=False)


def _explain(key: str) -> str:
    module, role = parse(key)
    if role and NAMES.ours(module) is None:
        return "not a module of torchtune's text decoders"
    return "its lora_a is missing" if role else "not a tensor of torchtune's LoRA"
