"""``run_config.yaml``, which Megatron-Bridge writes beside each checkpoint: how the adapter was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from ...errors import FormatError
from ..model_facts import ModelFacts
from ..source import Source

NAME = "run_config.yaml"
_KNOWN = ("LoRA", "VLMLoRA", "CanonicalLoRA", "DoRA")


@dataclass(frozen=True)
class RunConfig:
    """What of the file decides an adapter.

    Args:
        alpha, dim: of LoRA; None if the file has no ``peft``.
        expert_dims: ranks that an expert's adapter may have (``normalize_moe_lora``).
        ranks: tensor parallel size of the run; None if not said.
        facts: of the model's attention; None if not said.
        gated: False if the model's MLP has no gate.
    """

    alpha: float | None
    dim: int | None
    expert_dims: frozenset[int]
    ranks: int | None
    facts: ModelFacts | None
    gated: bool


def read(source: Source) -> RunConfig:
    """The file beside the checkpoint; empty answers if there is none.

    Raises:
        FormatError: a kind of adapter that is not LoRA, or values that make no sense.
    """
    settings = source.settings(NAME) or {}
    where = source.where(NAME)
    peft, model = (_section(settings, name) for name in ("peft", "model"))
    target = str(peft.get("_target_", "LoRA")).rpartition(".")[2]
    if target not in _KNOWN:
        raise FormatError(f"{where}: peft is {target}, of which only {', '.join(_KNOWN)} are read")
    dim, alpha = peft.get("dim"), peft.get("alpha")
    if dim is not None and not _whole(dim):
        raise FormatError(f"{where}: peft.dim must be a positive integer, got {dim!r}")
    if alpha is not None and (
        isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not alpha > 0
    ):
        raise FormatError(f"{where}: peft.alpha must be a positive number, got {alpha!r}")
    ranks = model.get("tensor_model_parallel_size")
    return RunConfig(
        alpha=None if alpha is None else float(alpha),
        dim=cast("int | None", dim),
        expert_dims=frozenset() if dim is None else _expert_dims(cast(int, dim), peft, model),
        ranks=cast(int, ranks) if _whole(ranks) else None,
        facts=_facts(model),
        gated=model.get("gated_linear_unit") is not False,
    )


def _section(settings: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = settings.get(name)
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {}


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _expert_dims(dim: int, peft: Mapping[str, object], model: Mapping[str, object]) -> frozenset[int]:
    """dim, or ``dim // topk``, which Bridge rounds up to a multiple of the experts' tensor parallel size."""
    topk, split = model.get("moe_router_topk"), model.get("expert_tensor_parallel_size")
    if not peft.get("normalize_moe_lora") or not isinstance(topk, int) or topk < 1:
        return frozenset({dim})
    step = split if isinstance(split, int) and split > 0 else 1
    return frozenset({dim // topk, -(-(dim // topk) // step) * step})


def _facts(model: Mapping[str, object]) -> ModelFacts | None:
    heads, hidden = model.get("num_attention_heads"), model.get("hidden_size")
    groups, size = model.get("num_query_groups") or heads, model.get("kv_channels")
    if size is None and _whole(heads) and _whole(hidden):
        size = cast(int, hidden) // cast(int, heads)
    layers = model.get("num_layers")
    if not all(_whole(value) for value in (heads, groups, size)):
        return None
    return ModelFacts(
        cast(int, heads), cast(int, groups), cast(int, size), cast(int, layers) if _whole(layers) else 0, ""
    )
