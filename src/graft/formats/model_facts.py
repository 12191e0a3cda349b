"""What a base's ``config.json`` says of its attention and depth, for formats that need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from ..errors import FormatError

#: transformers' names of one quantity, in the order in which they are asked for
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_INNER = ("intermediate_size", "ffn_hidden_size", "n_inner")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a decoder.

    Args:
        heads, kv_heads, head_dim: of its attention.
        layers: how many.
        model_type: transformers' name of the architecture; empty if not said.
    """

    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    model_type: str

    @property
    def per_group(self) -> int:
        """Query heads of each key/value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class ModelSizes:
    """Widths of a decoder.

    Args:
        layers: how many.
        hidden: of the residual stream.
        inner: of the MLP, or of one expert's.
        experts: of a layer; 0 without.
    """

    layers: int
    hidden: int
    inner: int
    experts: int


def model_sizes(config: Mapping[str, object] | None, needed_by: str) -> ModelSizes:
    """Read them, as :func:`model_facts` does.

    Raises:
        FormatError: as there.
    """
    layers = model_facts(config, needed_by).layers
    table = _flat(config or {})
    hidden, inner = _number(table, _HIDDEN), _number(table, ("moe_intermediate_size", *_INNER))
    if not hidden or not inner:
        missing = _INNER[0] if hidden else _HIDDEN[0]
        raise FormatError(f"{needed_by} needs {missing}, which the base's config.json does not say")
    return ModelSizes(layers, hidden, inner, _number(table, _EXPERTS) or 0)


def model_facts(config: Mapping[str, object] | None, needed_by: str) -> ModelFacts:
    """Read them; a vision-language model's are its language model's (``text_config``).

    Args:
        needed_by: the format, for messages.
    Raises:
        FormatError: no base is given, or its config does not say them.
    """
    table = _table(config, needed_by)
    heads, hidden, layers = (_number(table, names) for names in (_HEADS, _HIDDEN, _LAYERS))
    head_dim = _number(table, ("head_dim",)) or (hidden // heads if hidden and heads else None)
    if not heads or not head_dim or not layers:
        missing = [n[0] for n, v in ((_HEADS, heads), (_HIDDEN, head_dim), (_LAYERS, layers)) if not v]
        raise FormatError(
            f"{needed_by} needs {', '.join(missing)}, which the base's config.json does not say"
        )
    return ModelFacts(
        heads, _number(table, _KV_HEADS) or heads, head_dim, layers, str(table.get("model_type", ""))
    )


def layers_of(config: Mapping[str, object] | None) -> int | None:
    """How many layers; None if no config.json says it."""
    return _number(_flat(config or {}), _LAYERS)


def experts_of(config: Mapping[str, object] | None) -> int | None:
    """How many routed experts a layer has; None if no config.json says it."""
    return _number(_flat(config or {}), _EXPERTS)


def model_type(config: Mapping[str, object] | None) -> str:
    """transformers' name of the (language model's) architecture; empty if no base is given, or not said."""
    return "" if config is None else str(_table(config, "").get("model_type", ""))


def expert_count(config: Mapping[str, object] | None, needed_by: str) -> int:
    """How many routed experts each mixture has.

    Raises:
        FormatError: no base is given, or its config does not say it.
    """
    count = _number(_table(config, needed_by), _EXPERTS)
    if count is None:
        raise FormatError(f"{needed_by} needs {_EXPERTS[0]}, which the base's config.json does not say")
    return count


def _table(config: Mapping[str, object] | None, needed_by: str) -> dict[str, object]:
    if config is None:
        raise FormatError(f"{needed_by} needs the base's config.json: give the base (--base BASE)")
    return _flat(config)


def _flat(config: Mapping[str, object]) -> dict[str, object]:
    inner = config.get("text_config")
    return {**config, **(cast("dict[str, object]", inner) if isinstance(inner, dict) else {})}


def _number(table: Mapping[str, object], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = table.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
