"""torch's DistributedDataParallel on two processes: every verb, against one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist.ddp_work import CHECKS, work
from tests.dist.group import run

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    try:
        run(2, work, str(folder))
    except Exception as error:
        print(error)
    return folder


@pytest.mark.parametrize("check", [c.__name__ for c in CHECKS])
def test_on_two_processes(check: str, folder: Path) -> None:
    for rank in range(2):
        result = folder / f"{rank}.json"
        found = json.loads(result.read_text()) if result.exists() else {}
        assert check in found, "an earlier check failed, so this one did not run"
        assert not found[check], f"process {rank}:\n{found[check]}"
