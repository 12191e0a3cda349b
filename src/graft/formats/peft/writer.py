"""The neutral carrier → PEFT's files, in the dialect of PEFT 0.21.

PEFT has one rank and one alpha for each module and one setting of the rest for the whole adapter. What its
modules cannot hold (recurrent weights, grouped and transposed convolutions, DoRA on some modules only) is
refused by name; fused blocks become block-structured factors of the same ΔW.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

from ...adapter import Adapter
from ...fingerprint import dumps
from ...tensors import atomic_directory, save_file
from ..protocol import Target, Written
from ..uniform import alpha_of
from .collect import Files, collect

#: the version whose dialect is written: it decides how a reader takes packed parameters
DIALECT = "0.21.0"


def write(adapter: Adapter, path: Path, target: Target) -> Written:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` into the new directory ``path``.

    Raises:
        OutputError: ``path`` exists or cannot be written.
    """
    files = collect(adapter)
    config = {**_config(adapter, files, target.base_name), **target.extra}
    with atomic_directory(path) as staging:
        save_file(
            files.tensors, staging / "adapter_model.safetensors", {"format": "pt", **dumps(adapter.base)}
        )
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        (staging / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    return Written(files.notes)


def _config(adapter: Adapter, files: Files, base_name: str | None) -> dict[str, object]:
    read = adapter.config if adapter.format == "peft" else {}
    rslora, alphas = _alphas(files, prefer=bool(read.get("use_rslora")))
    rank = Counter(rank for rank, _ in alphas.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in alphas.values()).most_common(1)[0][0]
    only_adapted = all(module in files.modules for module in files.biases)
    bias = "none" if not files.biases else "lora_only" if only_adapted else "all"
    return {
        "peft_type": "LORA",
        "peft_version": DIALECT,
        "task_type": read.get("task_type"),
        "auto_mapping": read.get("auto_mapping"),
        "base_model_name_or_path": base_name or read.get("base_model_name_or_path"),
        "revision": read.get("revision"),
        "inference_mode": True,
        "init_lora_weights": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_anchored(n): r for n, (r, _) in alphas.items() if r != rank},
        "alpha_pattern": {_anchored(n): a for n, (_, a) in alphas.items() if a != alpha},
        "use_rslora": rslora,
        "lora_dropout": 0.0 if files.parameters else read.get("lora_dropout") or 0.0,
        "fan_in_fan_out": bool(files.turned) and all(files.turned),
        "bias": bias,
        "lora_bias": bool(adapter.shift),
        "use_dora": any(site.magnitude is not None for site in adapter.sites.values()),
        "target_modules": sorted(files.modules),
        "target_parameters": sorted(files.parameters) or None,
        "modules_to_save": files.saved or None,
        "trainable_token_indices": files.tokens or None,
    }


def _anchored(name: str) -> str:
    return "^" + re.escape(name)


def _alphas(files: Files, prefer: bool) -> tuple[bool, dict[str, tuple[int, int | float]]]:
    """use_rslora, and each module's rank and alpha, so that PEFT finds every scale to the last bit."""
    ways = {
        rslora: {
            name: (rank, alpha_of(scale, math.sqrt(rank) if rslora else rank))
            for name, (rank, scale) in files.settings.items()
        }
        for rslora in (prefer, not prefer)
    }
    for rslora, found in ways.items():
        divided = {
            name: alpha / (math.sqrt(rank) if rslora else rank) for name, (rank, alpha) in found.items()
        }
        if all(divided[name] == scale for name, (_, scale) in files.settings.items()):
            return rslora, found
    files.notes.append("alpha / rank differs from some scales in the 16th digit")
    return prefer, ways[prefer]
