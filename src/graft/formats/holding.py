"""What a format can hold, said once; and an adapter without the parts that it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..adapter import Adapter, LowRank
from ..errors import FormatError, Problems
from .blocks import joined
from .protocol import Loss, Target, Writer

#: why a site is not written whose module only the base's shapes could tell
UNTOLD = "whether it is an embedding or stored [in, out] is not known; bind it with the base's config"


@dataclass(frozen=True)
class Holds:
    """What a format holds beside plain linear weights, whose fused blocks are joined to one pair.

    Args:
        name: of the format, for messages.
        embeddings, convolutions, experts, dora, shifts, rows: whether it holds these.
        turned: whether its linear weights may be stored ``[in, out]``.
        full: the full tensors that it holds, by name.
    """

    name: str
    embeddings: bool = False
    convolutions: bool = False
    experts: bool = False
    dora: bool = False
    shifts: bool = False
    rows: bool = False
    turned: bool = True
    full: Callable[[str], bool] = lambda name: False

    def losses(self, adapter: Adapter) -> list[Loss]:
        """Every part of a bound adapter that does not fit this."""
        found: list[Loss] = []
        for name, site in adapter.sites.items():
            why = self.refuses(name, site)
            if why:
                found.append(Loss("site", name, why))
            elif site.magnitude is not None and not self.dora:
                found.append(Loss("magnitude", name, f"{self.name} has no DoRA"))
        for name in adapter.replace:
            if not self.full(name):
                found.append(Loss("replace", name, f"{self.name} has no place for this full tensor"))
        if not self.shifts:
            found += [Loss("shift", n, f"{self.name} has no lora_bias") for n in adapter.shift]
        if not self.rows:
            found += [Loss("rows", n, f"{self.name} has no trained rows") for n in adapter.rows]
        return found

    def refuses(self, name: str, site: LowRank) -> str:
        """Why this site cannot be held; empty if it can."""
        layout, shape = site.layout, site.shape
        assert layout is not None and shape is not None
        if name.rpartition(".")[2] != "weight":
            return f"{self.name} adapts the weights of modules only"
        if layout.pattern in ("g o i", "g i o"):
            return "" if self.experts else f"{self.name} has no packed experts"
        if site.kind == "loralib":
            return UNTOLD
        if site.kind == "embedding":
            return "" if self.embeddings else f"{self.name} has no LoRA for embeddings"
        if layout.transposed and not self.turned:
            return f"{self.name} has no weights that are stored [in, out]"
        if len(shape) > 2 and not self.convolutions:
            return f"{self.name} has no LoRA for convolutions"
        try:
            joined(site)
        except ValueError:
            return f"{self.name} has no module with layout {layout.pattern!r}"
        return ""


def without(adapter: Adapter, losses: Sequence[Loss]) -> Adapter:
    """The adapter without these parts."""
    gone = {(loss.part, loss.name) for loss in losses}
    sites = {
        name: replace(site, magnitude=None) if ("magnitude", name) in gone else site
        for name, site in adapter.sites.items()
        if ("site", name) not in gone
    }
    return replace(
        adapter,
        sites=sites,
        replace={n: t for n, t in adapter.replace.items() if ("replace", n) not in gone},
        shift={n: t for n, t in adapter.shift.items() if ("shift", n) not in gone},
        rows={n: t for n, t in adapter.rows.items() if ("rows", n) not in gone},
    )


def carried(writer: Writer, adapter: Adapter, target: Target, *, accept: bool) -> tuple[Adapter, list[str]]:
    """What of the adapter the format holds, and a note on each part that is lost.

    Args:
        accept: whether the user accepts losses.
    Raises:
        FormatError: an adapter that is not bound; losses that are not accepted, all of them in one message;
            nothing that would be left to write.
    """
    problems = Problems(FormatError, f"{writer.name}: the adapter cannot be written:", shown=1 << 30)
    for name, site in adapter.sites.items():
        if site.layout is None or site.shape is None:
            problems.add(f"{name}: it is not bound to a base; call graft.bind.bind first")
    problems.raise_if_any()
    kept, losses = adapter, list[Loss]()
    while more := writer.losses(kept, target):  # a lost module takes its bias with it
        assert not set(more) & set(losses), more
        losses += more
        kept = without(kept, more)
    if losses and not accept:
        problems = Problems(FormatError, f"{writer.name} cannot hold all of this adapter:", shown=1 << 30)
        for loss in losses:
            problems.add(f"{loss.name}: {loss.why}")
        problems.raise_if_any(
            "Write it in a format that holds them, or leave them out with --accept-loss (accept_loss=True)"
        )
    if not kept.sites:
        raise FormatError(f"{writer.name}: no low-rank update that it can hold would be left to write")
    return kept, [f"lost: {loss.name}: {loss.why}" for loss in losses]
