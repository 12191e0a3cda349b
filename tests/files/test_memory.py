"""Anonymous memory does not grow with the model, the adapter, or the kind of update."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graft.tensors import save_file, write_shards

_MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
import graft.fuse_files as f
def anonymous():
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')) / 1024
before, peak, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch); watcher.start()
f.fuse(*map(Path, sys.argv[1:4]), threads=2)
done.set(); watcher.join()
print(max(peak[0], anonymous()) - before)
"""


def _pair(folder: Path, layers: int, wide: int, dora: bool) -> None:
    dtype = torch.bfloat16
    items = []
    factors: dict[str, torch.Tensor] = {}
    for n in range(layers):
        module = f"layers.{n}.up_proj"
        items.append(
            (f"{module}.weight", (4 * wide, wide), dtype, lambda: torch.ones(4 * wide, wide, dtype=dtype))
        )
        site = f"base_model.model.{module}"
        factors[f"{site}.lora_A.weight"] = torch.full((64, wide), 0.01, dtype=dtype)
        factors[f"{site}.lora_B.weight"] = torch.full((4 * wide, 64), 0.01, dtype=dtype)
        if dora:
            factors[f"{site}.lora_magnitude_vector"] = torch.ones(4 * wide)
    (folder / "base").mkdir(parents=True)
    (folder / "adapter").mkdir()
    write_shards(folder / "base", items)
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 64, "fan_in_fan_out": False, "use_dora": dora}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def _peak(folder: Path) -> float:
    """MB of anonymous memory above that after the import."""
    words = [str(folder / name) for name in ("base", "adapter", "out")]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *words], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("layers", "wide", "dora"), [(2, 512, False), (24, 1024, False), (6, 1024, True)])
def test_memory_is_a_few_chunks(tmp_path: Path, layers: int, wide: int, dora: bool) -> None:
    """From 4 MB to 200 MB of weights and 0.6 to 15 MB of factors: below one bound."""
    _pair(tmp_path, layers, wide, dora)
    assert _peak(tmp_path) < 64
