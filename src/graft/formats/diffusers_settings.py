"""PEFT's settings of a pipeline's models in one table: ``unet.r``, ``text_encoder.lora_alpha``, …

diffusers keeps it as JSON in a safetensors file's metadata. Source: diffusers, ``loaders/lora_base.py``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import cast

from ..adapter import LowRank
from ..errors import FormatError
from .ledger import listed
from .peft import config as peft_config
from .peft.config import LoraSettings
from .source import Source
from .uniform import alpha_of

#: key of the table in the metadata
METADATA_KEY = "lora_adapter_metadata"


def read(source: Source, components: Iterable[str]) -> dict[str, LoraSettings]:
    """The settings of each component that the metadata speaks of; ``""`` is a file's only model.

    Raises:
        FormatError: metadata that cannot be read, or settings that cannot be honoured.
    """
    text = source.metadata.get(METADATA_KEY)
    if text is None:
        return {}
    where = f"{source.weights}: the metadata {METADATA_KEY}"
    try:
        table: object = json.loads(str(text))
    except ValueError as error:
        raise FormatError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise FormatError(f"{where} holds no JSON object")
    found: dict[str, LoraSettings] = {}
    for component in sorted(components):
        mine = _of(cast("dict[str, object]", table), component)
        if mine:
            told = {"peft_type": "LORA", **mine}
            found[component] = peft_config.parse(told, f"{where}, {component or 'whole'},")
    return found


def _of(table: Mapping[str, object], component: str) -> dict[str, object]:
    """The settings of one component, without its name; of a file for one model, all of them."""
    start = f"{component}." if component else ""
    return {key.removeprefix(start): value for key, value in table.items() if key.startswith(start)}


def table_of(
    sites: Mapping[str, LowRank], names: Mapping[str, tuple[str, str]], notes: list[str]
) -> dict[str, object]:
    """The table that says these sites' ranks and scales; a note is added where alpha / rank rounds.

    Args:
        names: each site's component, and its name within that.
    """
    table: dict[str, object] = {}
    inexact: list[str] = []
    for component in dict.fromkeys(component for component, _ in names.values()):
        mine = {rest.removesuffix(".weight"): sites[n] for n, (c, rest) in names.items() if c == component}
        alphas = {module: alpha_of(site.scale, site.rank) for module, site in mine.items()}
        inexact += [module for module, site in mine.items() if alphas[module] / site.rank != site.scale]
        told = _settings({module: site.rank for module, site in mine.items()}, alphas)
        told["use_dora"] = any(site.magnitude is not None for site in mine.values())
        table |= {f"{component}.{key}": value for key, value in told.items()}
    if inexact:
        notes.append(f"alpha / rank differs from the scale in the 16th digit: {listed(inexact)}")
    return table


def _settings(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, object]:
    """PEFT's settings of one model: the commonest rank and alpha, and a pattern for each other."""
    rank, alpha = (Counter(one.values()).most_common(1)[0][0] for one in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_anchored(module): r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {_anchored(module): a for module, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "lora_bias": False,
        "bias": "none",
    }


def _anchored(module: str) -> str:
    return "^" + re.escape(module)
