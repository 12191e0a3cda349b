"""The portable form of an adapter, which vLLM and other servers of PEFT files load right.

They take linear modules with one rank and one alpha: patterns are not applied, and DoRA, biases and whole
modules are refused or dropped. So ranks are padded with zeros to the largest, each scale is folded into its
B, and ``lora_alpha = r``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...adapter import Adapter
from ..blocks import joined
from ..holding import Holds
from ..protocol import Loss, Target, Written
from ..uniform import one_rank, with_scale
from . import writer

_HOLDS = Holds("vLLM")


def losses(adapter: Adapter) -> list[Loss]:
    """Everything but linear weights."""
    return _HOLDS.losses(adapter)


def write(adapter: Adapter, path: Path, target: Target) -> Written:
    """PEFT's two files with uniform settings; the scale is 1, said as ``lora_alpha = r``."""
    rank, sites = one_rank({name: joined(site) for name, site in adapter.sites.items()})
    sites, notes = with_scale(sites, 1.0)
    plain = replace(adapter, sites=sites, config=_plain(adapter))
    done = writer.write(plain, path, target)
    notes.append(f"vLLM loads ranks up to --max-lora-rank; this adapter's is {rank}")
    return replace(done, notes=[*done.notes, *notes])


def _plain(adapter: Adapter) -> dict[str, object]:
    """The configuration's entries that say nothing of ranks and scales."""
    kept = ("base_model_name_or_path", "task_type", "revision")
    return {key: adapter.config[key] for key in kept if key in adapter.config}
