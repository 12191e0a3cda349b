"""Megatron-core's module classes, known by their names in the MRO: Megatron is never imported."""

from __future__ import annotations

from typing import Any

from torch import nn

COLUMN, ROW, EMBEDDING = "ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding"
_HOME = "megatron.core.tensor_parallel.layers"
# Transformer Engine's layers, by their names in Megatron
_OTHERS = {
    "TEColumnParallelLinear": COLUMN,
    "TELayerNormColumnParallelLinear": COLUMN,
    "TERowParallelLinear": ROW,
}


def core_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class of Megatron-core's own layers that this one is or descends from."""
    for base in cls.__mro__:
        if base.__module__ == _HOME and base.__name__ in (COLUMN, ROW, EMBEDDING):
            return base
    return None


def role_of(module: nn.Module) -> str | None:
    """``ColumnParallelLinear``, ``RowParallelLinear`` or ``VocabParallelEmbedding``; None for all else."""
    core = core_class(type(module))
    if core is not None:
        return core.__name__
    for base in type(module).__mro__:
        if base.__name__ in _OTHERS and base.__module__.startswith("megatron."):
            return _OTHERS[base.__name__]
    return None


def shared_embedding(module: nn.Module) -> nn.Module | None:
    """The vocabulary embedding whose weight this language model reads itself, for its output layer."""
    if not getattr(module, "share_embeddings_and_output_weights", False):
        return None
    found = getattr(getattr(module, "embedding", None), "word_embeddings", None)
    return found if isinstance(found, nn.Module) and role_of(found) == EMBEDDING else None


def copied_embedding(module: nn.Module) -> list[nn.Module]:
    """The embedding, and the output layer with its copy, of a language model whose stages hold one each."""
    m: Any = module
    if not getattr(m, "share_embeddings_and_output_weights", False):
        return []
    if getattr(m, "pre_process", True) and getattr(m, "post_process", True):
        return []
    found = [
        getattr(getattr(m, "embedding", None), "word_embeddings", None),
        getattr(m, "output_layer", None),
    ]
    return [child for child in found if isinstance(child, nn.Module) and role_of(child) is not None]
