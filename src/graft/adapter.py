"""The neutral carrier of an adapter: the only thing that formats and models exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from .delta import Delta
from .errors import LayoutError
from .layout import Layout

_T = TypeVar("_T")


@dataclass(frozen=True)
class LowRank:
    """The update of one stored parameter: ``M[g] += scale · B[g] · A[g]``.

    Args:
        A: ``[(n r), i]``, any float dtype; may be a file-backed (mapped) tensor.
        B: ``[(n o), r]``.
        scale: the multiplier of B·A, already ``alpha / rank`` or ``alpha / √rank``.
        layout: how the stored parameter reads as M; None until the base's shape decides
            (:func:`graft.bind.bind`).
        magnitude: DoRA's m ``[o]``; then the weight becomes ``m · (W + ΔW) / ‖W + ΔW‖`` per row of M.
        fan_in_fan_out: what the file says of a weight stored ``[in, out]``; None if it says nothing.
        kind: what the module was, where the layout alone does not tell: ``linear`` (GPT-2 Conv1D
            too), ``embedding``, ``conv``, ``parameter`` (packed experts and other named parameters),
            ``loralib`` (any of the first three, not told by the file), ``projection`` (linear, or a
            convolution of kernel 1).
        shape: the stored parameter's shape, once known.
        among: where the file says only the module: the parameters that it may be, each with the scale it
            would have; the base's shapes decide.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    layout: Layout | None = None
    magnitude: torch.Tensor | None = None
    fan_in_fan_out: bool | None = None
    kind: str = "linear"
    shape: tuple[int, ...] | None = None
    among: tuple[tuple[str, float], ...] = ()

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    def delta(self, shape: Sequence[int]) -> Delta:
        """ΔW for a stored parameter of this shape (before DoRA's normalisation)."""
        if self.layout is None:
            raise LayoutError("this adapter is not bound to a base yet; call graft.bind.bind first")
        return Delta.of(self.A, self.B, self.scale, self.layout, shape)


@dataclass(frozen=True)
class Beside:
    """A tensor of the model that an adapter was trained in, from a checkpoint that holds both.

    Args:
        value: of a tensor that was trained; None for the base's own.
        fingerprint: of the base's own (:mod:`graft.fingerprint`); None where it need not be the base's
            (buffers).
    """

    shape: tuple[int, ...]
    value: torch.Tensor | None
    fingerprint: str | None


@dataclass(frozen=True)
class Adapter:
    """An adapter, free of any file format and of any model.

    Every key is the full dotted name of a stored parameter of the base, e.g.
    ``model.layers.0.self_attn.q_proj.weight``. A parameter may be both replaced and updated (PEFT saves
    adapted embeddings whole): full tensors take their place first, then rows, then ΔW and shifts are added.

    Args:
        sites: low-rank updates.
        replace: full tensors that take the parameter's place (``modules_to_save``, trained biases).
        shift: ``(tensor, scale)`` added to a parameter: PEFT's ``lora_bias`` is a shift of the bias.
        rows: ``(indices, tensor)``: rows of a parameter that are replaced (trainable tokens).
        format: the format it was read from.
        config: the format's own configuration, as read, for round trips.
        notes: sentences for the user: what was repaired or is unusual.
        base: fingerprints of the adapted weights (:mod:`graft.fingerprint`), by parameter; empty if unknown.
        beside: what else the file holds of the model, by name; binding finds each its place and empties it.
        unmatched: settings of the file that match none of its modules; if names must be repaired, they
            might have meant one.
        flattened: the names before each parameter's own are spelled with ``_`` in the place of ``.``
            (kohya's); binding spells them out by the base's names.
        components: the models of a diffusers pipeline (``unet``, ``text_encoder``) that its names begin with;
            none where all names are one model's.
        files: the files that it was read from, weights first.
    """

    sites: Mapping[str, LowRank]
    replace: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shift: Mapping[str, tuple[torch.Tensor, float]] = field(default_factory=dict)
    rows: Mapping[str, tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=dict)
    format: str = ""
    config: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    base: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Beside] = field(default_factory=dict[str, Beside])
    flattened: bool = False
    components: frozenset[str] = frozenset()
    files: tuple[Path, ...] = ()

    @property
    def touched(self) -> set[str]:
        """Names of all base parameters that this adapter changes."""
        return {*self.sites, *self.replace, *self.shift, *self.rows}

    def renamed(self, change: Callable[[str], str | None]) -> Adapter:
        """The adapter under other parameter names; what becomes None is left out."""

        def table(mine: Mapping[str, _T]) -> dict[str, _T]:
            return {new: value for name, value in mine.items() if (new := change(name)) is not None}

        return replace(
            self,
            sites=table(self.sites),
            replace=table(self.replace),
            shift=table(self.shift),
            rows=table(self.rows),
            base=table(self.base),
        )
