"""State dicts that lie inside another table of a ``torch.save`` file, as trainers and their users nest them.

Lightning has ``state_dict``, DeepSpeed ``module``, litgpt ``model``, loralib's own GPT-2 example
``model_state_dict`` (``examples/NLG/src/gpt2_ft.py``); others choose names of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch

from ..errors import FormatError
from .peft import keys

Tensors = dict[str, torch.Tensor]

#: where frameworks put a model's state dict, with an adapter in it or without
_FRAMEWORKS = ("state_dict", "module")


def nested(value: object, where: object) -> Tensors | None:
    """The state dict in the table that a file holds; None if the file is none, or holds it at the top.

    Under a framework's name it is taken as it is; under any other it is taken if it holds an adapter.

    Raises:
        FormatError: adapters under several names.
    """
    if not isinstance(value, dict):
        return None
    table = {str(key): _tensors(inner) for key, inner in cast("dict[object, object]", value).items()}
    for key in _FRAMEWORKS:
        if isinstance(cast("dict[object, object]", value).get(key), dict):
            return table[key]
    found = {key: inner for key, inner in table.items() if any(map(adapted, inner))}
    if len(found) > 1:
        raise FormatError(
            f"{where} holds adapters under {len(found)} names, {' and '.join(found)}; "
            "save the one to use in a file of its own"
        )
    return next(iter(found.values()), None)


def is_alone(state: Iterable[str]) -> bool:
    """Whether these are an adapter's names without the weights that it adapts.

    PEFT's names are not settled here: what stands before ``base_model`` must be told first.
    """
    names = set(state)
    modules = {module for name in names if (module := adapted(name)) is not None}
    if any(keys.parse(name).role in ("A", "embedding_A") for name in names):
        return False
    own = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "linear.weight", "conv.weight")}
    return bool(modules) and not own & names


def adapted(name: str) -> str | None:
    """The module that this tensor of an adapter is for; None for any other tensor."""
    parts = name.split(".")
    at = next((n for n, part in enumerate(parts) if part.startswith("lora_")), None)
    return None if at is None else ".".join(parts[:at])


def _tensors(value: object) -> Tensors:
    if not isinstance(value, Mapping):
        return {}
    table = cast("Mapping[object, object]", value)
    return {str(name): one.detach() for name, one in table.items() if isinstance(one, torch.Tensor)}
