"""A training run's whole state dict, split: the adapter's tensors, and the model that it was trained in.

An adapter's tensor is told by its name. Of the others, those that the optimizer held were trained too and
belong to the adapter; the rest are the frozen base, which is compared with the base and never written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..adapter import Beside
from ..errors import FormatError
from ..fingerprint import rounded
from .ledger import listed
from .peft import keys
from .stored import Stored, gather

#: statistics that training changes although no optimizer holds them
_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_PAIR = keys.PREFIX


@dataclass(frozen=True)
class Split:
    """A state dict in two parts.

    Args:
        tensors: the adapter's own, under names from ``base_model.model`` on for PEFT's.
        beside: all others of the adapted model, under the names of the plain model.
        notes: what lies outside the adapted model.
    """

    tensors: Mapping[str, torch.Tensor]
    beside: Mapping[str, Beside]
    notes: tuple[str, ...]


def is_training(names: Iterable[str], config: Mapping[str, object] | None) -> bool:
    """Whether these are the names of a whole model's state dict with an adapter in it, as trained.

    Graft's names are loralib's too, whose weights may hold ΔW already; the configuration tells them apart.
    """
    parsed = [keys.parse(name) for name in names]
    peft = any(key.adapter and key.role in ("A", "embedding_A") for key in parsed)
    ours = "peft_type" in (config or {}) and any(_is_ours(key.text) for key in parsed)
    chat = any(_is_chats(key.text) for key in parsed)
    plain = [key for key in parsed if key.role == "plain" and not _is_ours(key.text)]
    weights = any(key.leaf == "weight" and "modules_to_save" not in key.module for key in plain)
    return weights and (peft or ours or chat)


def split(
    stored: Mapping[str, Stored], where: object, config: Mapping[str, object] | None, buffers: frozenset[str]
) -> Split:
    """Take the adapter out of a state dict.

    Args:
        where: the file or folder, for messages.
        config: PEFT's configuration, which says whether biases were trained where the file does not.
        buffers: names of buffers.
    Raises:
        FormatError: no adapter, adapters of two models, an adapter that was fused when it was saved.
    """
    _refuse_fused(stored, where)
    parsed = {name: keys.parse(name) for name in stored}
    if any(key.role in ("A", "embedding_A") for key in parsed.values()):
        prefix = _prefix(parsed, where)
        inside = {name: name[len(prefix) :] for name in stored if name.startswith(prefix)}
        chosen = {name: short for name, short in inside.items() if _is_pefts(short)}
        adapters = frozenset({key.adapter for key in parsed.values() if key.adapter} | {"default"})
        rest = {name: _plain(short, adapters) for name, short in inside.items() if name not in chosen}
        trained = _trained_biases(stored, inside, config)
    elif any(_is_ours(name) for name in stored):
        chosen = {name: name for name in stored if _is_ours(name)}
        rest = {name: name for name in stored if name not in chosen}
        trained = set[str]()
    else:
        raise FormatError(
            f"{where} is a whole model of {len(stored)} tensors without an adapter "
            f"({listed(stored, 3)}); it was trained in full, so there is nothing to fuse"
        )
    outside = [name for name in stored if name not in chosen and name not in rest]
    taken = {name for name in rest if stored[name].trained or name in trained}
    taken |= {name for name in rest if name.rpartition(".")[2] in _STATISTICS}
    values = gather({name: stored[name] for name in (*chosen, *(n for n in rest if n in taken))})
    beside = {
        short: Beside(
            stored[name].shape,
            values[name] if name in taken else None,
            None if name in buffers or name in taken else _fingerprint(stored[name]),
        )
        for name, short in rest.items()
    }
    tensors = {short: values[name] for name, short in chosen.items()}
    return Split(tensors, beside, _notes(stored, outside))


def _is_ours(name: str) -> bool:
    """Graft's ``lora_A…`` and ``lora_B…`` and DeepSpeed-Chat's: the base's own names stay as they are."""
    leaf = name.rpartition(".")[2]
    return leaf in ("lora_A", "lora_B") or leaf.startswith(("lora_A_", "lora_B_")) or _is_chats(name)


def _is_chats(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_right_weight", "lora_left_weight")


def _is_pefts(name: str) -> bool:
    key = keys.parse(name)
    return (
        key.role != "plain"
        or "modules_to_save" in key.module
        or any(part.startswith("lora_") for part in (*key.module, key.leaf))
    )


def _prefix(parsed: Mapping[str, keys.Key], where: object) -> str:
    """What stands before ``base_model.model`` in the adapter's names."""
    found: Counter[str] = Counter()
    for name, key in parsed.items():
        if key.role in ("A", "embedding_A"):
            parts = name.split(".")
            pair = next((i for i in range(len(parts)) if tuple(parts[i : i + 2]) == _PAIR), 0)
            found["".join(f"{part}." for part in parts[:pair])] += 1
    if len(found) > 1:
        raise FormatError(
            f"{where} holds adapters of {len(found)} models, {' and '.join(sorted(found))}; "
            "save the one to use alone"
        )
    return next(iter(found))


def _plain(name: str, adapters: frozenset[str]) -> str:
    """The name in the plain model."""
    key = keys.parse(name)
    return ".".join((*keys.plain_module(key.module, adapters), key.leaf))


def _trained_biases(
    stored: Mapping[str, Stored], inside: Mapping[str, str], config: Mapping[str, object] | None
) -> set[str]:
    """Biases that PEFT's configuration says were trained, where the file does not say it."""
    bias = (config or {}).get("bias", "none")
    adapted = {keys.plain_module(k.module) for k in map(keys.parse, inside.values()) if k.role == "A"}
    found: set[str] = set()
    for name, short in inside.items():
        key = keys.parse(short)
        told = bias == "all" or (bias == "lora_only" and keys.plain_module(key.module) in adapted)
        if told and stored[name].trained is None and key.role == "plain" and key.leaf == "bias":
            found.add(name)
    return found


def _fingerprint(stored: Stored) -> str:
    """:func:`graft.fingerprint.rounded` of a tensor, of which only the beginning is read."""
    head = torch.empty(min(stored.numel, 16384), dtype=stored.dtype)
    stored.read(0, head)
    return rounded(head)


def _notes(stored: Mapping[str, Stored], outside: list[str]) -> tuple[str, ...]:
    notes: list[str] = []
    trained = [name for name in outside if stored[name].trained]
    if trained:
        notes.append(
            f"trained outside the adapted model, so not in the adapter: {listed(trained)} "
            f"({len(trained)} tensors)"
        )
    if len(outside) > len(trained):
        rest = [name for name in outside if name not in set(trained)]
        notes.append(f"outside the adapted model and not trained: {listed(rest, 3)} ({len(rest)} tensors)")
    return tuple(notes)


def _refuse_fused(stored: Mapping[str, Stored], where: object) -> None:
    fused = [name for name in stored if name.rpartition(".")[2].startswith("lora_fused_")]
    if fused:
        raise FormatError(
            f"{where} was saved while the adapter was fused ({listed(fused, 2)}), so its weights hold ΔW "
            "already; save it again after graft.unfuse(model)"
        )
