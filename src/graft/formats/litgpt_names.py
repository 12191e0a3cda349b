"""litgpt's module names ↔ those of Hugging Face's models, family by family.

Source: Lightning-AI/litgpt, ``scripts/convert_hf_checkpoint.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import FormatError
from .renames import Renames

HYPERPARAMETERS = "hyperparameters.yaml"
BLOCK = "transformer.h.{}."
#: [q; k; v], since pull request 1013; before that, q…q k v of each query group
QKV, GROUPED = f"{BLOCK}attn.qkv", f"{BLOCK}attn.attn"
_MLP = ("fc", "fc_1", "fc_2", "proj", "gate", "experts.{}.fc_1", "experts.{}.fc_2", "experts.{}.proj")
MODULES = (f"{BLOCK}attn.proj", *(f"{BLOCK}mlp.{name}" for name in _MLP), "lm_head")


@dataclass(frozen=True)
class Family:
    """One way of Hugging Face's models to name what litgpt has.

    Args:
        table: litgpt's template → theirs, of all modules but q, k and v.
        qkv: the templates of q, k and v, or the one that holds them query group by query group.
    """

    table: Mapping[str, str]
    qkv: tuple[str, ...]

    @property
    def names(self) -> Renames:
        return Renames(self.table)

    def part(self, module: str) -> tuple[str, int] | None:
        """litgpt's qkv and which of ``qkv`` this module of the base is; None for any other."""
        for index, template in enumerate(self.qkv):
            found = Renames({QKV: template}).theirs(module)
            if found is not None:
                return found, index
        return None


def _decoder(mlp: Mapping[str, str], attention: str = "o_proj") -> Family:
    layer = "model.layers.{}."
    table = {f"{BLOCK}attn.proj": f"{layer}self_attn.{attention}", "lm_head": "lm_head"}
    table |= {f"{BLOCK}mlp.{theirs}": f"{layer}{ours}" for theirs, ours in mlp.items()}
    return Family(table, tuple(f"{layer}self_attn.{x}_proj" for x in "qkv"))


_GATED = {"fc_1": "gate_proj", "fc_2": "up_proj", "proj": "down_proj"}
_MIXTRAL = {"fc_1": "w1", "fc_2": "w3", "proj": "w2"}
_LLAMA = _decoder({name: f"mlp.{ours}" for name, ours in _GATED.items()})
_NEOX = "gpt_neox.layers.{}."

#: transformers' ``model_type`` → how its modules are named
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "olmo2"), _LLAMA
    ),
    "phi": _decoder({"fc": "mlp.fc1", "proj": "mlp.fc2"}, "dense"),
    "mixtral": _decoder(
        {
            "gate": "block_sparse_moe.gate",
            **{f"experts.{{}}.{n}": f"block_sparse_moe.experts.{{}}.{ours}" for n, ours in _MIXTRAL.items()},
        }
    ),
    "qwen3_moe": _decoder(
        {"gate": "mlp.gate", **{f"experts.{{}}.{n}": f"mlp.experts.{{}}.{o}" for n, o in _GATED.items()}}
    ),
    "gpt_neox": Family(
        {
            f"{BLOCK}attn.proj": f"{_NEOX}attention.dense",
            f"{BLOCK}mlp.fc": f"{_NEOX}mlp.dense_h_to_4h",
            f"{BLOCK}mlp.proj": f"{_NEOX}mlp.dense_4h_to_h",
            "lm_head": "embed_out",
        },
        (f"{_NEOX}attention.query_key_value",),
    ),
}


def family_of(model: Mapping[str, object] | None) -> Family | None:
    """How the base names its modules; None without a Hugging Face base.

    Raises:
        FormatError: a model that is not known here.
    """
    kind = (model or {}).get("model_type")
    if not kind:
        return None
    if kind not in FAMILIES:
        raise FormatError(
            f"litgpt's names are not known for a base of model_type {kind!r}; known are: "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[str(kind)]
