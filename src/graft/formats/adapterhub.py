"""AdapterHub (``adapters``): a weight file and an ``adapter_config.json`` of its own schema.

``<module>.loras.<name>.lora_A`` is ``[r, in]``, ``.lora_B`` is ``[out, r]``; scale = alpha / r, both in
``config`` of the json. A fused q/k/v (GPT-2) is loralib's MergedLinear: ``attn_matrices`` says which blocks
are adapted. Files of version 0.x and 1.0 were trained with scale 1 whatever they say.
Source: adapters 1.3, ``methods/lora.py``, ``loading.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from ..adapter import Adapter, LowRank
from ..errors import FormatError, Problems
from ..layout import Layout
from .ledger import Ledger, listed
from .protocol import Options
from .source import Source

#: fused projections that ``adapters`` wraps as one merged module
_FUSED = frozenset({"c_attn", "qkv_proj", "query_key_value"})
#: settings that change what the adapter computes and are not LoRA's → their harmless values
_REFUSED: Mapping[str, tuple[object, ...]] = {
    "architecture": ("lora",),
    "composition_mode": ("add",),
    "use_gating": (False, None),
    "use_dora": (False, None),
    "vera_d": (None,),
    "vera_b": (None,),
}
_HEADS = ("pytorch_model_head.bin", "model_head.safetensors")


class AdapterHubFormat:
    """The format's entry in the registry."""

    name = "adapterhub"

    def detect(self, source: Source) -> bool:
        """By content: names in which ``loras`` stands before the adapter's name."""
        return any(_parse(key) is not None for key in source.tensors)

    def read(self, source: Source, options: Options) -> Adapter:
        options.refuse_unused("AdapterHub", alpha=True, enable_lora=True)
        rank, scale, blocks, notes = _settings(source)
        ledger = Ledger(source.tensors, source.weights)
        ledger.check_tensors()
        names = sorted({found[1] for key in source.tensors if (found := _parse(key))})
        if len(names) > 1:
            ledger.problems.add(f"it holds several adapters ({listed(names)}); save one of them alone")
        ledger.problems.raise_if_any()
        sites: dict[str, LowRank] = {}
        for key in source.tensors:
            found = _parse(key)
            if found is None or found[2] != "lora_A":
                continue
            module, other = found[0], key.removesuffix("lora_A") + "lora_B"
            a = ledger.take(key)
            if other not in source.tensors:
                ledger.problems.add(f"{key} has no lora_B")
                continue
            b = ledger.take(other)
            if a.dim() != 2 or b.dim() != 2 or b.shape[1] != rank or a.shape[0] % rank:
                ledger.problems.add(
                    f"{key} {list(a.shape)} and lora_B {list(b.shape)} are not of rank {rank}, which "
                    f"{source.config_path.name} says"
                )
                continue
            merged = a.shape[0] != rank or module.rpartition(".")[2] in _FUSED
            layout = Layout("(g o) i", 3, blocks) if merged and blocks else None
            kind = "loralib" if merged else "linear"
            sites[f"{module}.weight"] = LowRank(a, b, scale, layout=layout, kind=kind)
        ledger.close(explain=lambda key: "not a tensor of AdapterHub's LoRA")
        return Adapter(sites, format="adapterhub", config=dict(source.config or {}), notes=notes)


def _parse(key: str) -> tuple[str, str, str] | None:
    """Module, adapter's name and ``lora_A`` or ``lora_B``; None for other keys."""
    parts = key.split(".")
    if len(parts) < 4 or parts[-3] != "loras" or parts[-1] not in ("lora_A", "lora_B"):
        return None
    return ".".join(parts[:-3]), parts[-2], parts[-1]


def _settings(source: Source) -> tuple[int, float, tuple[int, ...], tuple[str, ...]]:
    """Rank, scale, the adapted blocks of a fused q/k/v, and notes.

    Raises:
        FormatError: no configuration, another method, or settings that no fused weight equals.
    """
    inner = (source.config or {}).get("config")
    if not isinstance(inner, Mapping):
        raise FormatError(
            f"{source.weights} is AdapterHub's, but {source.config_path} does not hold its config (r, "
            "alpha); put it there or name it with --adapter-config"
        )
    config = cast("Mapping[str, object]", inner)
    problems = Problems(FormatError, f"{source.config_path} cannot be honoured:")
    for key, harmless in _REFUSED.items():
        if key in config and config[key] not in harmless:
            problems.add(f"{key} {config[key]!r}: only plain LoRA can be read")
    rank, alpha = config.get("r"), config.get("alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        problems.add(f"r must be a positive integer, got {rank!r}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        problems.add(f"alpha must be a number, got {alpha!r}")
    problems.raise_if_any()
    assert isinstance(rank, int) and isinstance(alpha, (int, float))
    notes: list[str] = []
    version = re.match(r"adapters\.(\d+)\.(\d+)", str((source.config or {}).get("version", "")))
    if version and (int(version[1]), int(version[2])) < (1, 1) and alpha != rank:
        notes.append(
            f"version {version[0]} trained with scale 1, whatever its alpha {alpha:g} says; so 1 is used"
        )
        alpha = rank
    heads = [name for name in _HEADS if (source.weights.parent / name).is_file()]
    if heads:
        notes.append(f"the prediction head beside it ({heads[0]}) is no part of the adapter and is not read")
    matrices = config.get("attn_matrices")
    chosen = cast("list[object]", matrices) if isinstance(matrices, list) else []
    return rank, alpha / rank, tuple(n for n, one in enumerate("qkv") if one in chosen), tuple(notes)
