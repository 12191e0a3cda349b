"""The snippets of docs/training.md run, and its table has the callback's options."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

for _name in ("lightning", "transformers", "accelerate", "peft"):
    pytest.importorskip(_name)

import transformers  # noqa: E402

import graft  # noqa: E402
from graft.train.exporter import Exporter  # noqa: E402
from tests.checkpoints import models  # noqa: E402
from tests.test_docs import ROOT, blocks  # noqa: E402
from tests.train import small  # noqa: E402

PAGE = ROOT / "docs" / "training.md"


@pytest.mark.filterwarnings("ignore")  # the page's trainer has loggers and checkpoints, as by default
def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models.llama(dtype=torch.float32).save_pretrained("base")
    names: dict[str, Any] = {
        "graft": graft,
        "torch": torch,
        "transformers": transformers,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "loader": torch.utils.data.DataLoader(small.rows(8), batch_size=4),  # type: ignore[arg-type]
        "model": models.llama(dtype=torch.float32),
        "rows": small.rows(8),
        "arguments": transformers.TrainingArguments("trainer", report_to=[], use_cpu=True, disable_tqdm=True),
    }
    found = blocks(PAGE, "python")
    assert len(found) == 2
    for block in found:
        exec(compile(block, str(PAGE), "exec"), names)  # the page's own code is what is tested
    assert sorted(p.name for p in Path("runs").iterdir()) == ["epoch-1", "epoch-2"]
    assert sorted(p.name for p in Path("exports").iterdir()) == ["epoch-1", "epoch-3"]


def test_the_table_has_every_option() -> None:
    cells = re.findall(r"^\| (`[^|]*`) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    told = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert told == inspect.signature(Exporter).parameters.keys()
