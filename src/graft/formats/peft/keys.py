"""The grammar of PEFT's tensor names, read from the right and component by component."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PREFIX = ("base_model", "model")

#: last named components of an adapter tensor → its role; each may carry an adapter's name and ``.weight``
_ROLES = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "trainable_tokens_delta": "tokens",
    "trainable_tokens_original": "tokens_original",
}
_NO_WEIGHT = frozenset({"embedding_A", "embedding_B", "tokens", "tokens_original"})
#: components that PEFT's wrappers put between a module and its parameters
_WRAPPERS = frozenset({"base_layer", "token_adapter", "original_module"})


@dataclass(frozen=True)
class Key:
    """One tensor name, parsed.

    Args:
        text: the name in the file.
        module: the module's components, wrappers included (``mlp.experts.base_layer``).
        role: ``A``, ``B``, ``B_bias``, ``embedding_A``, ``embedding_B``, ``magnitude``, ``tokens``,
            ``tokens_original``, or ``plain`` for a parameter's own tensor.
        leaf: the parameter's name (``weight``, ``bias``) for a plain tensor.
        adapter: the adapter's name if the key carries one.
    """

    text: str
    module: tuple[str, ...]
    role: str
    leaf: str = ""
    adapter: str | None = None


def parse(text: str) -> Key:
    """Parse one tensor name; a name without an adapter's suffix is ``plain``."""
    parts = tuple(text.split("."))
    if parts[: len(PREFIX)] == PREFIX:
        parts = parts[len(PREFIX) :]
    for depth in (1, 2, 3):
        if len(parts) >= depth and (role := _ROLES.get(parts[-depth])) is not None:
            key = _factor(text, parts[:-depth], role, parts[len(parts) - depth + 1 :])
            if key is not None:
                return key
    return Key(text, parts[:-1], "plain", parts[-1])


def _factor(text: str, module: tuple[str, ...], role: str, rest: tuple[str, ...]) -> Key | None:
    leaf = rest[-1] if rest and rest[-1] in ("weight", "bias") else None
    names = rest[:-1] if leaf else rest
    if len(names) > 1 or (leaf == "bias" and role != "B"):
        return None
    if (leaf is None and role in ("A", "B")) or (leaf == "weight" and role in _NO_WEIGHT):
        return None
    role = "B_bias" if leaf == "bias" else role
    return Key(text, module, role, adapter=names[0] if names else None)


def plain_module(module: Iterable[str], adapters: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """The module's components in the base: PEFT's wrappers taken out.

    Args:
        adapters: adapter names, which follow ``modules_to_save`` in unprocessed state dicts.
    """
    parts: list[str] = []
    after_saved = False
    for part in module:
        named = after_saved and part in adapters
        after_saved = part == "modules_to_save"
        if part not in _WRAPPERS and not after_saved and not named:
            parts.append(part)
    return tuple(parts)
