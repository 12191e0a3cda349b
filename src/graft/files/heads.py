"""Modules that an adapter brings along whole and the base never had: the classifier of a fine-tuned model.

PEFT trains such a module beside its LoRA and saves it under ``modules_to_save``. The base's files have no
tensor of that name, so the output gets one more, and the user is told which model class reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ..adapter import Adapter
from ..bind_layouts import EMBEDDINGS, HEADS

#: PEFT's task → the transformers class that has such a head
_READERS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def new_tensors(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Full tensors of declared modules for which the base has no module of that name, prefixed or not.

    Vocabulary modules are never new: where their tensors are missing they are tied.
    """
    declared = adapter.config.get("modules_to_save")
    modules = {str(m) for m in cast("list[object]", declared)} if isinstance(declared, list) else set[str]()
    leaves = {leaf.rpartition(".")[2] for leaf in modules} - EMBEDDINGS - HEADS
    known = {part for name in shapes for part in name.split(".")[:-1]}
    return [
        name
        for name in adapter.replace
        if name not in shapes and (set(name.split(".")[:-1]) & leaves) - known
    ]


def config_of(adapter: Adapter, names: list[str]) -> dict[str, object]:
    """What config.json must say of a classifier: its number of labels."""
    if adapter.config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        return {}
    last = [adapter.replace[n] for n in names if n.endswith(".weight") and adapter.replace[n].dim() == 2]
    if not last:
        return {}
    labels = {f"LABEL_{n}": n for n in range(last[-1].shape[0])}
    return {"id2label": {str(n): label for label, n in labels.items()}, "label2id": labels}


def note_of(adapter: Adapter, names: list[str]) -> str:
    """For the user."""
    reader = _READERS.get(str(adapter.config.get("task_type")))
    how = f"; load the output with {reader}" if reader else "; load the output with the class that has it"
    return f"{', '.join(names)}: not in the base, added from the adapter's modules_to_save{how}"
