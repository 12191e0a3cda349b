"""``run_config.yaml`` for an adapter that is written: what Megatron-Bridge and the reader here ask of it."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import FormatError
from ..model_facts import ModelFacts
from ..protocol import Target
from .names import Module
from .run_config import NAME

_CLASSES = {"LoRA": "lora.LoRA", "CanonicalLoRA": "canonical_lora.CanonicalLoRA", "DoRA": "dora.DoRA"}
_CANONICAL = {
    "self_attention.linear_qkv": ("linear_q", "linear_k", "linear_v"),
    "mlp.linear_fc1": ("linear_fc1_gate", "linear_fc1_up"),
}


def made(
    kind: str, modules: Sequence[Module], facts: ModelFacts, rank: int, alpha: float, target: Target
) -> str:
    """The file's text.

    Args:
        kind: Bridge's class: ``LoRA``, ``CanonicalLoRA`` or ``DoRA``.
    Raises:
        FormatError: PyYAML is not installed.
    """
    names = sorted({module.name for module in modules})
    own = kind == "CanonicalLoRA"
    targets = [_CANONICAL.get(n, (n.split(".")[-1],)) if own else (n.split(".")[-1],) for n in names]
    peft: dict[str, object] = {
        "_target_": f"megatron.bridge.peft.{_CLASSES[kind]}",
        "target_modules": sorted({target for found in targets for target in found}),
        "dim": rank,
        "alpha": int(alpha) if alpha.is_integer() else alpha,
        "dropout": 0.0,
    }
    if any(module.is_expert for module in modules):
        peft["share_expert_adapters"] = False
    model: dict[str, object] = {
        "num_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "num_query_groups": facts.kv_heads,
        "kv_channels": facts.head_dim,
        "gated_linear_unit": True,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    if target.base_name:
        model["hf_model_id"] = target.base_name
    checkpoint = {"save_optim": False, "save_rng": False, "fully_parallel_save": False}
    try:
        import yaml
    except ImportError:
        raise FormatError(f"Megatron's {NAME} needs PyYAML: pip install pyyaml") from None
    return yaml.safe_dump(
        {"peft": peft, "model": model, "checkpoint": checkpoint, **target.extra}, sort_keys=False
    )
