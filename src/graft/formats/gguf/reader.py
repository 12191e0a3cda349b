"""A GGUF adapter → the neutral carrier."""

from __future__ import annotations

import math

import torch

from ...adapter import Adapter, LowRank
from ...layout import Layout
from ..ledger import Ledger
from ..protocol import Options
from ..source import Source
from . import container, names
from .names import Names

_NO_BASE = (
    "names and the order of q's and k's rows are GGUF's, because no base is given; with --base BASE they "
    "become the base's"
)
_NO_ALPHA = "the file has no alpha, so the scale is 1, as in llama.cpp"


def read(source: Source, options: Options) -> Adapter:
    """Read a GGUF LoRA adapter; scale = alpha / the tensor's own rank.

    Raises:
        FormatError: a factor without its other, ranks that differ, a tensor that is no factor, an
            architecture that is not the base's.
    """
    options.refuse_unused("GGUF", alpha=True, enable_lora=True)
    ledger = Ledger(source.tensors, source.weights)
    ledger.check_tensors()
    ledger.problems.raise_if_any()
    architecture = str(source.metadata.get(container.ARCHITECTURE, ""))
    known = None if options.model is None else names.names_of(options.model)
    if known is not None and known.architecture != architecture:
        ledger.problems.add(
            f"it is for a model of architecture {architecture!r}, the base is {known.architecture!r}"
        )
        ledger.problems.raise_if_any("Give the base that the adapter was trained on")
    alpha = _alpha(source, ledger)
    sites: dict[str, LowRank] = {}
    for key in source.tensors:
        stem, _, leaf = key.rpartition(".")
        other = {"lora_a": "lora_b", "lora_b": "lora_a"}.get(leaf)
        if other is None:
            continue
        if f"{stem}.{other}" not in source.tensors:
            ledger.take(key)
            ledger.problems.add(f"{key} has no {other}")
        elif leaf == "lora_a":
            sites |= _sites(ledger, stem, alpha, known)
    ledger.close(explain=_explain)
    notes = (*([] if known else [_NO_BASE]), *([] if alpha else [_NO_ALPHA]))
    config: dict[str, object] = {"alpha": alpha, "architecture": architecture}
    return Adapter(sites, format="gguf", config=config, notes=notes, base=source.fingerprints)


def _alpha(source: Source, ledger: Ledger) -> float:
    alpha = source.metadata.get(container.ALPHA, 0.0)
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        ledger.problems.add(f"{container.ALPHA} must be a number, got {alpha!r}")
        return 0.0
    return float(alpha)


def _sites(ledger: Ledger, stem: str, alpha: float, known: Names | None) -> dict[str, LowRank]:
    """The sites of one tensor of the GGUF model: one, or one for each expert."""
    a, b = ledger.take(f"{stem}.lora_a"), ledger.take(f"{stem}.lora_b")
    embedding = stem == "token_embd.weight"
    a = a.transpose(-1, -2) if embedding else a
    if a.dim() not in (2, 3) or a.shape[:-2] != b.shape[:-2] or a.shape[-2] != b.shape[-1]:
        ledger.problems.add(
            f"{stem}: lora_a {list(a.shape)} and lora_b {list(b.shape)} do not agree on the rank"
        )
        return {}
    scale = alpha / b.shape[-1] if alpha else 1.0
    if known is None:
        return {stem: _unnamed(a, b, scale, embedding)}
    parameters = known.parameters.get(stem)
    if parameters is None:
        ledger.problems.add(f"{stem} is no tensor of {known.architecture} that is known here")
        return {}
    experts = known.places[parameters[0]].expert is not None
    if tuple(a.shape[:-2]) != ((len(parameters),) if experts else ()):
        wanted = f"{len(parameters)} experts" if experts else "one weight"
        ledger.problems.add(f"{stem}: lora_a {list(a.shape)} is not for {wanted}, which the base has there")
        return {}
    try:
        b = names.restored(b, known.heads[stem]) if stem in known.heads else b
    except ValueError as error:
        ledger.problems.add(f"{stem}: {error}")
        return {}
    pairs = zip(a, b, strict=True) if experts else [(a, b)]
    kind = "embedding" if embedding else "linear"
    return {
        name: LowRank(one, other, scale, kind=kind, fan_in_fan_out=False)
        for name, (one, other) in zip(parameters, pairs, strict=True)
    }


def _unnamed(a: torch.Tensor, b: torch.Tensor, scale: float, embedding: bool) -> LowRank:
    if a.dim() == 3:
        layout = Layout("g o i", a.shape[0])
        shape = (a.shape[0], b.shape[1], a.shape[2])
        return LowRank(a.flatten(0, 1), b.flatten(0, 1), scale, layout=layout, kind="parameter", shape=shape)
    return LowRank(a, b, scale, kind="embedding" if embedding else "linear", fan_in_fan_out=False)


def _explain(key: str) -> str:
    if key.rpartition(".")[0].endswith("_norm"):
        return (
            "a whole norm (mergekit writes it), which llama.cpp passes over; remove it, or use PEFT's files"
        )
    return "not a factor of LoRA (lora_a or lora_b)"
