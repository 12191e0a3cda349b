"""Who packed the factors of experts, and how.

============  ==========================================  ====================  ==========================
producer      A ``[E·r, …]``, row e·r + k                 B's column            told by
============  ==========================================  ====================  ==========================
PEFT ≥ 0.19   over the inputs                             k·E + e               ``peft_version``
PEFT ≤ 0.18   over the weight's second axis, whatever it  k·E + e               ``peft_version``; 0.17 has
              is: of ``[E, out, in]`` the outputs                               all of LoraConfig's fields
Automodel     over the outputs                            k·E + e               its nine fields
Bridge        over the outputs                            e·r + k               its eighteen fields
============  ==========================================  ====================  ==========================

Sources: PEFT's ``ParamWrapper`` and pull request 2782 (``peft_version`` from 0.18 on), NeMo-Automodel's
``_convert_lora_to_paramwrapper`` and ``_get_hf_peft_config``, Megatron-Bridge's
``_pack_target_parameter_adapter_weights`` and ``build_adapter_config_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .config import LoraSettings

#: PEFT up to this version never swaps in and out, and reads every 3-D weight as ``[E, in, out]``
_LAST_UNSWAPPED = (0, 18, 1)

_BASIC = frozenset(
    {"task_type", "peft_type", "r", "lora_alpha", "use_dora", "target_modules", "bias"}
    | {"base_model_name_or_path", "target_parameters"}
)
_BRIDGE = _BASIC | {
    "auto_mapping", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_dropout",
    "modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora",
}  # fmt: skip
#: fields of LoraConfig since before ``target_parameters`` that neither of NVIDIA's producers writes
_PEFTS = frozenset(
    {"layers_to_transform", "layers_pattern", "layer_replication", "megatron_core", "exclude_modules"}
)


@dataclass(frozen=True)
class Dialect:
    """How one producer packs experts.

    Args:
        swapped: A is over the outputs and B over the inputs.
        positional: A is over the weight's second axis; whether that is the inputs is not asked.
        by_experts: B's column is e·r + k.
        sure: whether the file says all of this; if not, only shapes tell where A belongs.
    """

    swapped: bool = False
    positional: bool = False
    by_experts: bool = False
    sure: bool = True

    def factors(self, a: torch.Tensor, b: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The file's A ``[(E r), i]`` and B ``[o, …]`` as the canonical ``[(E r), i]`` and ``[(E o), r]``."""
        if experts == 1:
            return a, b
        rows = b.shape[0]
        b = _experts_first(b, experts) if self.by_experts else expert_major(b, experts)
        if not self.swapped:
            return a, b
        rank, columns = b.shape[1], a.shape[1]
        inputs = b.reshape(experts, rows, rank).transpose(1, 2).reshape(experts * rank, rows)
        outputs = a.reshape(experts, rank, columns).transpose(1, 2).reshape(experts * columns, rank)
        return inputs, outputs


def dialect_of(settings: LoraSettings, config: Mapping[str, object]) -> Dialect | None:
    """The producer's dialect; None if nothing tells it."""
    if settings.version is not None:
        return Dialect(positional=settings.version <= _LAST_UNSWAPPED)
    fields = frozenset(config) - {"peft_version"}
    if fields == _BASIC:
        return Dialect(swapped=True)
    if fields == _BRIDGE:
        return Dialect(swapped=True, by_experts=True)
    return Dialect(positional=True, sure=False) if fields >= _PEFTS else None


def expert_major(b: torch.Tensor, experts: int) -> torch.Tensor:
    """PEFT's B ``[o, (r E)]`` as the canonical ``[(E o), r]``."""
    if experts == 1:
        return b
    o = b.shape[0]
    return b.reshape(o, -1, experts).permute(2, 0, 1).reshape(experts * o, -1)


def rank_major(b: torch.Tensor, experts: int) -> torch.Tensor:
    """The canonical B ``[(E o), r]`` as PEFT's ``[o, (r E)]``."""
    if experts == 1:
        return b
    rank = b.shape[1]
    return b.reshape(experts, -1, rank).permute(1, 2, 0).reshape(-1, rank * experts)


def _experts_first(b: torch.Tensor, experts: int) -> torch.Tensor:
    """Bridge's B ``[o, (E r)]`` as the canonical ``[(E o), r]``."""
    o = b.shape[0]
    return b.reshape(o, experts, -1).permute(1, 0, 2).reshape(experts * o, -1)
