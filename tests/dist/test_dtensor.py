"""FSDP2 and tensor parallel, alone and together, on two and four processes, against one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

import graft
from tests.dist.apart import stopped_and_left_nothing
from tests.dist.dtensor_work import CASES, adapt, death, make, names, values, work
from tests.dist.group import exit_codes, run

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes have been; those of two read what those of four wrote."""
    folder = tmp_path_factory.mktemp("dtensor")
    for size in CASES:
        try:
            run(size, work, str(folder))
        except Exception as error:
            print(error)
    return folder


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in CASES for name in names(size)])
def test_on_several_processes(size: int, name: str, folder: Path) -> None:
    for rank in range(size):
        result = Path(folder, f"{size}.{rank}.json")
        found = json.loads(result.read_text()) if result.exists() else {}
        assert name in found, "an earlier check failed, so this one did not run"
        assert not found[name], f"process {rank} of {size}:\n{found[name]}"


@pytest.mark.filterwarnings("ignore:.*torch.distributed is.*:UserWarning")  # dcp alone in a process says so
def test_a_checkpoint_of_four_processes_loads_in_one(folder: Path) -> None:
    source = folder / "4-2d-after-checkpoints"
    model = make()
    adapt(model)
    dcp.load({"adapter": graft.state_dict(model)}, checkpoint_id=str(source / "dcp"))
    want = torch.load(source / "factors.pt", weights_only=True)
    got = values(model)
    assert all(torch.equal(got[n], v) for n, v in want.items())


@pytest.mark.parametrize("gather", [False, True])
def test_a_process_that_dies_in_export_leaves_nothing_and_stops_the_other(
    tmp_path: Path, gather: bool
) -> None:
    assert exit_codes(2, death, str(tmp_path), gather) == [0, 7]
    stopped_and_left_nothing(tmp_path)
