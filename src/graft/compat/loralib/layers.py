"""loralib's ``Linear``, ``Embedding`` and ``MergedLinear``; convolutions are in :mod:`.conv`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ... import branches
from ...adapted import Adapted
from ...errors import TargetError
from ...factors import Factors
from ...layout import Layout
from ...shadow import effective
from .conv import Conv1d, Conv2d, Conv3d, ConvLoRA
from .guard import unmerged
from .merging import Layer, LoRALayer, attach_factors

__all__ = [
    "Conv1d", "Conv2d", "Conv3d", "ConvLoRA", "Embedding", "Linear", "LoRALayer", "MergedLinear",
]  # fmt: skip

#: loralib's default of MergedLinear
_NO_BLOCK = [False]


class DenseLinear(nn.Linear):
    """A linear layer that may store its weight ``[in, out]``: what is left of a layer without its adapter."""

    fan_in_fan_out: bool = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)


def _branch(module: Any, f: Factors, x: torch.Tensor) -> torch.Tensor:
    """Graft's branch behind the layer's own ``lora_dropout``, which its user may exchange."""
    plain = branches.conv1d if module.fan_in_fan_out else branches.linear
    return plain(module, f, module.lora_dropout(x))


class _Dense(Layer, Adapted, DenseLinear):
    """Shared by Linear and MergedLinear."""

    graft_plain = DenseLinear
    graft_branch = staticmethod(_branch)
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def _get_name(self) -> str:
        return type(self).__name__

    def _build(self, fan_in_fan_out: bool, blocks: int, only: Sequence[int]) -> None:
        """Store W as asked, add the factors of the enabled blocks, and draw everything as loralib does."""
        self.graft_slots = {}
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            self.weight.data = self.weight.data.transpose(0, 1)
        if self.r > 0 and only:
            pattern = ("i o" if fan_in_fan_out else "o i") if blocks == 1 else _BLOCKED[fan_in_fan_out]
            layout = Layout(pattern, blocks, None if len(only) == blocks else tuple(only))
            # the branch above computes every layout that is made here
            attach_factors(self, self, layout, self.r).factored = True
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw W, the bias and A anew, and set B to zero."""
        with unmerged(self.graft_holder()):
            self._turn()
            super().reset_parameters()
            self._turn()
            if "lora_A" in self._parameters:
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
                nn.init.zeros_(self.lora_B)

    def _turn(self) -> None:
        """W ``[out, in]`` while it is drawn: the bounds depend on its fan-in."""
        if self.fan_in_fan_out:
            self.weight.data = self.weight.data.transpose(0, 1)


_BLOCKED = {False: "(g o) i", True: "i (g o)"}


class Linear(_Dense):
    """``y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ`` with A ``[r, in]`` and B ``[out, r]``.

    Args:
        in_features, out_features, kwargs: those of ``nn.Linear``.
        r, lora_alpha, lora_dropout, merge_weights: see :class:`LoRALayer`.
        fan_in_fan_out: W is stored ``[in, out]``, as GPT-2's Conv1D stores it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: int = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self._build(fan_in_fan_out, 1, (0,))


class MergedLinear(_Dense):
    """Several linears in one weight, those that ``enable_lora`` names with an adapter of rank r each.

    With n of the g blocks enabled: A ``[n·r, in]``, B ``[n·out/g, r]``; the j-th enabled block's rows of W
    behave as ``W[j] + scaling · B[j] · A[j]``.

    Args:
        in_features, out_features, kwargs: those of ``nn.Linear``.
        r, lora_alpha, lora_dropout, merge_weights: see :class:`LoRALayer`.
        enable_lora: for each block whether it has an adapter.
        fan_in_fan_out: W is stored ``[in, out]``, as GPT-2's Conv1D stores it.
    Raises:
        TargetError: blocks that do not divide ``out_features``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: int = 1,
        lora_dropout: float = 0.0,
        enable_lora: list[bool] = _NO_BLOCK,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.enable_lora = [bool(on) for on in enable_lora]
        if not self.enable_lora or out_features % len(self.enable_lora):
            raise TargetError(
                f"enable_lora={self.enable_lora} does not cut out_features={out_features} into equal blocks"
            )
        self._build(fan_in_fan_out, len(self.enable_lora), [n for n, on in enumerate(self.enable_lora) if on])

    @property
    def lora_ind(self) -> torch.Tensor:
        """For each output whether its block is enabled."""
        blocks = torch.tensor(self.enable_lora, device=self.weight.device)
        return blocks.repeat_interleave(self.out_features // len(self.enable_lora))

    def zero_pad(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of the enabled blocks ``[n·out/g, …]`` as rows of all blocks ``[out, …]``, zero elsewhere."""
        padded = x.new_zeros((self.out_features, *x.shape[1:]))
        return padded.index_copy(0, self.lora_ind.nonzero().flatten(), x)

    def merge_AB(self) -> torch.Tensor:
        """``ΔW / scaling`` in W's shape, with gradients."""
        layout = self.graft_slots["weight"].site.layout
        return effective(torch.zeros_like(self.weight), self.lora_A, self.lora_B, 1.0, layout)


class Embedding(Layer, Adapted, nn.Embedding):
    """``y = W[x] + scaling · A[:, x]ᵀ Bᵀ`` with A ``[r, num]``, zero at first, and B ``[dim, r]``, N(0, 1).

    Args:
        num_embeddings, embedding_dim, kwargs: those of ``nn.Embedding``.
        r, lora_alpha, merge_weights: see :class:`LoRALayer`.
    Raises:
        TargetError: ``max_norm`` with r > 0, since every forward would edit W.
    """

    graft_plain = nn.Embedding
    graft_branch = staticmethod(branches.embedding)
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: int = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, 0.0, merge_weights)
        self.graft_slots = {}
        if self.r > 0:
            attach_factors(self, self, Layout("i o"), self.r)
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        else:
            self._reset_factors()

    def _get_name(self) -> str:
        return type(self).__name__

    def reset_parameters(self) -> None:
        """Draw W and B anew, and set A to zero."""
        with unmerged(self.graft_holder()):
            super().reset_parameters()
            self._reset_factors()

    def _reset_factors(self) -> None:
        if "lora_A" in self._parameters:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)
