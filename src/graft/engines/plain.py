"""One process, or replicas that each hold every weight in full."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import StateError
from ..layout import Layout
from .protocol import Part


def recognises(parameter: torch.Tensor) -> bool:
    """Anything that no other engine knows."""
    return True


class Plain:
    """Every parameter is here in full; nothing travels."""

    name = "plain"

    def shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def parts(self, parameter: torch.Tensor) -> list[Part]:
        if parameter.is_meta:
            raise StateError("it is on the meta device and holds no numbers; load the weights first")
        return [Part(parameter.detach(), tuple((0, n) for n in parameter.shape))]

    def gather(self, factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [f.detach() for f in factors]

    def collect(self, parameter: torch.Tensor, pieces: Sequence[torch.Tensor]) -> torch.Tensor | None:
        (whole,) = pieces
        return whole

    def writes(self, parameter: torch.Tensor) -> bool:
        return self.is_writer()

    def place(
        self, weight: torch.Tensor, layout: Layout, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return a, b

    def agree(self, ok: bool) -> bool:
        return ok

    def same(self, text: str) -> bool:
        return True

    def is_writer(self) -> bool:
        return True

    def told(self, text: str) -> str:
        return text


ENGINE = Plain()
