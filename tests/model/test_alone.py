"""The core needs torch and the standard library only."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Block())
import graft, torch
from torch import nn
model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LSTM(4, 4))
graft.adapt(model, ["0", "1", "2"], rank=2, quiet=True)
graft.verify(model[:2], torch.arange(5))
with graft.fused(model), graft.disabled(model):
    model(torch.arange(5))
graft.unadapt(model)
print(sorted(n for n in {names} if n in sys.modules))
"""
NAMES = ["transformers", "peft", "deepspeed", "megatron", "lightning", "safetensors", "click", "rich"]


def test_the_core_runs_with_everything_else_blocked() -> None:
    code = CODE.replace("{names}", repr(NAMES)).replace("{{", "{").replace("}}", "}")
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_import_does_not_load_them() -> None:
    code = f"import graft, sys; print([n for n in {NAMES!r} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_a_pickle_read_first_of_all_finds_the_public_classes() -> None:
    code = (
        "import copy, graft.adapted, torch; from torch import nn;"
        "m = graft.adapted._blank(nn.Linear);"
        "import graft; assert type(m) is graft.Linear;"
        "assert graft.adapted.adapted_class(nn.Linear) is graft.Linear"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
