"""The callbacks where a model is spread over two processes: Lightning and the Trainer, on CPU and gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

for _name in ("deepspeed", "lightning", "transformers", "peft", "accelerate"):
    pytest.importorskip(_name)
pytestmark = [
    pytest.mark.dist,
    # PEFT 0.21 reads what transformers 5 renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

from tests.checkpoints import models  # noqa: E402
from tests.dist.zero_work import free_port  # noqa: E402
from tests.train import small  # noqa: E402
from tests.train.spread_work import CASES, work  # noqa: E402

TRAININGS = [name for name in CASES if name != "failing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes ran all cases."""
    root = tmp_path_factory.mktemp("spread")
    models.llama(dtype=torch.float32).save_pretrained(root / "base")
    try:
        torch.multiprocessing.spawn(work, (2, free_port(), str(root), list(CASES)), nprocs=2)  # type: ignore[attr-defined]
    except Exception as error:
        print(error)
    return root


def reports(folder: Path, name: str) -> list[dict[str, Any]]:
    files = [folder / f"{name}.{rank}.json" for rank in range(2)]
    assert all(f.exists() for f in files), "an earlier case failed, so this one did not run"
    found = [json.loads(f.read_text()) for f in files]
    for rank, report in enumerate(found):
        assert not report["error"], f"process {rank}:\n{report['error']}"
    return found


@pytest.mark.parametrize("name", TRAININGS)
def test_training_goes_on_from_the_same_bits(folder: Path, name: str) -> None:
    for report in reports(folder, name):
        assert len(report["without"]) >= 6 and report["without"] == report["with_it"]
        assert report["without"][0] != report["without"][-1]


@pytest.mark.parametrize("name", TRAININGS)
def test_exports_compute_what_the_adapted_model_did(folder: Path, name: str) -> None:
    reports(folder, name)
    first = 0 if name.startswith("lightning") else 1
    folders = [f"{first}-2", f"{first}-3", f"{first + 1}-6"]
    made = sorted(p.name for p in (folder / name).iterdir() if p.name != "trainer")
    assert made == folders and not list((folder / name / "trainer").glob("*"))
    seen, other = (torch.load(folder / f"{name}.{rank}.pt") for rank in range(2))
    for path, want, there in zip(folders[1:], seen, other, strict=True):
        # masters of stage 0 in bf16: not the numbers that were run
        assert_computes(folder / name / path, want, 2e-2 if name == "trainer-0-graft" else 2e-6)
        torch.testing.assert_close(there, want, rtol=0, atol=2e-6)


def assert_computes(export: Path, want: torch.Tensor, far: float) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    fused = LlamaForCausalLM.from_pretrained(export / "fused")
    torch.testing.assert_close(small.logits(fused), want, rtol=0, atol=far)
    plain = models.llama(dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, export / "adapter")
    torch.testing.assert_close(small.logits(adapted), want, rtol=0, atol=far)


def test_masters_of_an_engine_that_the_trainer_keeps_to_itself(folder: Path) -> None:
    """Under stage 0 only the optimizer tells where they are."""
    from safetensors.torch import load_file

    reports(folder, "trainer-0-graft")
    export = folder / "trainer-0-graft" / "2-6"
    adapter = load_file(export / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for name, t in adapter.items() if ".lora_" in name} == {torch.float32}
    assert {t.dtype for t in load_file(export / "fused" / "model.safetensors").values()} == {torch.bfloat16}


def test_an_error_of_one_process_stops_both_and_leaves_nothing(folder: Path) -> None:
    found = reports(folder, "failing")
    for failing, other in ((0, 1), (1, 0)):
        assert "no space left" in found[failing][f"met-{failing}"]
        assert "another process failed" in found[other][f"met-{failing}"]
        assert [report[f"left-{failing}"] for report in found] == [[], []]
