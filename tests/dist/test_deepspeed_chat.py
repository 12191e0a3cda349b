"""graft.compat.deepspeed_chat under real DeepSpeed on two processes, against one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.dist

from tests.dist.dschat_work import CASES, CHECKS, work  # noqa: E402
from tests.dist.zero_work import free_port  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes left their answers."""
    found = tmp_path_factory.mktemp("dschat")
    context, port = torch.multiprocessing.get_context("spawn"), free_port()
    both = [context.Process(target=work, args=(rank, 2, port, str(found))) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
        process.kill()
    return found


@pytest.mark.parametrize("check", [c.__name__ for c in CHECKS])
@pytest.mark.parametrize("case", [c.name for c in CASES])
def test_on_two_processes(case: str, check: str, folder: Path) -> None:
    for rank in range(2):
        file = folder / f"{case}.{rank}.json"
        result = json.loads(file.read_text()) if file.exists() else {}
        assert check in result, "an earlier check failed, so this one did not run"
        assert not result[check], f"process {rank}:\n{result[check]}"


def test_a_process_that_dies_while_saving_leaves_no_file(folder: Path) -> None:
    report = json.loads((folder / "death.json").read_text())
    assert report["met"] != "nothing" and not report["left"], report
