"""torchtune's module names ↔ the base's, and which rows it has in another order.

Source: torchtune 0.6.1, ``models/convert_weights.py``, ``models/qwen2/_convert_weights.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import FormatError
from .model_facts import model_facts
from .renames import Renames

RECIPE = "torchtune_config.yaml"
NAMES = Renames(
    {
        **{f"layers.{{}}.attn.{x}_proj": f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"},
        "layers.{}.attn.output_proj": "model.layers.{}.self_attn.o_proj",
        "layers.{}.mlp.w1": "model.layers.{}.mlp.gate_proj",
        "layers.{}.mlp.w2": "model.layers.{}.mlp.down_proj",
        "layers.{}.mlp.w3": "model.layers.{}.mlp.up_proj",
        "output": "lm_head",
    }
)
#: transformers' ``model_type`` → whether torchtune rotates neighbouring rows of a head, not its halves
_NEIGHBOURS = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2"), True),
    **dict.fromkeys(("qwen2", "qwen3"), False),
}


def heads_turned(name: str, model: Mapping[str, object] | None) -> int:
    """The heads whose rows are in another order, for q and k under the base's names; else 0.

    Raises:
        FormatError: a base whose order torchtune does not say, or that does not say its heads.
    """
    kind = (model or {}).get("model_type")
    if not kind:
        raise FormatError(
            "torchtune's order of the rows of q and k follows from the base: give it (--base BASE)"
        )
    if kind not in _NEIGHBOURS:
        raise FormatError(
            f"how torchtune has a base of model_type {kind!r} is not known here; known are: "
            f"{', '.join(_NEIGHBOURS)}"
        )
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if not _NEIGHBOURS[str(kind)] or leaf not in ("q_proj", "k_proj"):
        return 0
    facts = model_facts(model, "torchtune's order of the rows of q and k")
    return facts.heads if leaf == "q_proj" else facts.kv_heads
