"""Examples that need several processes run as their first lines say, with torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
#: example and its options → the package that it needs, and what it says on two processes
LAUNCHED = {
    "fsdp2.py": ("transformers", "exported files hold the fused numbers: True; every bit is back: True"),
    "ddp.py": (
        "transformers",
        "exported files hold the fused numbers: True; every bit is back: True; loaded: True",
    ),
    "zero3.py": ("deepspeed", "exported while fused and unfused alike: True; every bit is back: True"),
    "megatron_tp.py": (
        "megatron.core",
        "fused computes what the adapter did: True; every bit is back: True",
    ),
    "visualchat/main.py --zero_stage 3 --only_optimize_lora --num_train_epochs 2": (
        "deepspeed",
        "the files hold the fused bits, and every bit came back: True",
    ),
    "visualchat/main.py --zero_stage 2 --precision fp32 --vis_lora_dim 0 --num_train_epochs 1": (
        "deepspeed",
        "LoRA in 14 linears of lang_decoder and 0 of vis_encoder",
    ),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", LAUNCHED)
def test_example(name: str, tmp_path: Path) -> None:
    needs, says = LAUNCHED[name]
    script, *options = name.split()
    pytest.importorskip(needs)
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / script), *options],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert says in done.stdout
    assert not any(tmp_path.iterdir()), "an example leaves nothing behind where it was started"
