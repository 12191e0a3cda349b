"""What of an adapter PEFT's files cannot hold."""

from __future__ import annotations

import re

from ...adapter import Adapter, LowRank
from ..blocks import joined
from ..holding import UNTOLD
from ..protocol import Loss

_SEPARATE = frozenset({"q_proj_weight", "k_proj_weight", "v_proj_weight"})
_RECURRENT = re.compile(r"weight_(ih|hh|hr)_l\d+(_reverse)?$")


def losses(adapter: Adapter) -> list[Loss]:
    """Every part that PEFT's modules, or its settings for the whole adapter, cannot hold."""
    found = [Loss("site", n, why) for n, s in adapter.sites.items() if (why := _unwritable(n, s))]
    normed = [name for name, site in adapter.sites.items() if site.magnitude is not None]
    if 0 < len(normed) < len(adapter.sites):
        plain = next(name for name, site in adapter.sites.items() if site.magnitude is None)
        why = f"DoRA on some modules only ({plain} has none), and PEFT has it on all or none"
        found += [Loss("magnitude", name, why) for name in normed]
    biasless = [name for name, site in adapter.sites.items() if site.kind in ("embedding", "parameter")]
    for name, (_, scale) in adapter.shift.items():
        why = _unshifted(name, scale, adapter, normed, biasless)
        if why:
            found.append(Loss("shift", name, why))
    return found


def _unshifted(name: str, scale: float, adapter: Adapter, normed: list[str], biasless: list[str]) -> str:
    if biasless:
        return f"lora_bias together with an embedding or a named parameter ({biasless[0]})"
    if normed:
        return "lora_bias together with DoRA"
    module = name.rpartition(".")[0]
    weight = "in_proj_weight" if name.endswith(".in_proj_bias") else "weight"
    site = adapter.sites.get(f"{module}.{weight}")
    if site is None:
        return "a change of the bias of a module that is not adapted"
    if site.scale != scale:
        return f"its scale {scale:g} differs from its weight's {site.scale:g}"
    return ""


def _unwritable(name: str, site: LowRank) -> str:
    layout, shape = site.layout, site.shape
    assert layout is not None and shape is not None
    if _RECURRENT.search(name):
        return "PEFT has no LoRA for recurrent layers"
    if name.rpartition(".")[2] in _SEPARATE:
        return "PEFT has no LoRA for MultiheadAttention with separate projections"
    if layout.pattern == "(g i) o":
        return "PEFT has no LoRA for transposed convolutions"
    if len(shape) > 2 and layout.groups > 1 and layout.pattern == "(g o) i":
        return "PEFT's LoRA of a grouped convolution is not grouped"
    if site.kind == "loralib":
        return UNTOLD
    if site.kind == "parameter" and len(shape) > 2 and layout.pattern not in ("g o i", "g i o"):
        return f"PEFT reads a parameter of shape {list(shape)} as packed experts"
    if len(shape) < 2:
        return f"PEFT has no LoRA for a parameter of shape {list(shape)}"
    if site.magnitude is not None and not name.endswith(".weight") and name != "weight":
        return "PEFT has no DoRA for named parameters"
    if layout.pattern not in ("g o i", "g i o"):
        try:
            joined(site)
        except ValueError as error:
            return f"PEFT has no module with layout {error}"
    return ""
