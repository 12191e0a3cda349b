"""ZeRO stages 1, 2 and 3 with real DeepSpeed on two processes: every verb, against one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")
pytestmark = pytest.mark.dist

from tests.dist.zero_work import CASES, CHECKS, curves, death, free_port, work  # noqa: E402

Results = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("zero")
    names = [c.name for c in CASES]
    try:
        torch.multiprocessing.spawn(work, (2, free_port(), str(folder), names), nprocs=2)  # type: ignore[attr-defined]
    except Exception as error:
        print(error)
    found: Results = {}
    for name in names:
        files = [Path(folder, f"{name}.{rank}.json") for rank in range(2)]
        found[name] = [json.loads(f.read_text()) if f.exists() else {} for f in files]
    return found


@pytest.mark.parametrize("check", [c.__name__ for c in (curves, *CHECKS)])
@pytest.mark.parametrize("case", [c.name for c in CASES])
def test_on_two_processes(case: str, check: str, results: Results) -> None:
    for rank, result in enumerate(results[case]):
        assert check in result, "an earlier check failed, so this one did not run"
        assert not result[check], f"process {rank}:\n{result[check]}"


@pytest.mark.parametrize("gather", [False, True])
def test_a_process_that_dies_in_export_leaves_nothing_and_stops_the_other(
    tmp_path: Path, gather: bool
) -> None:
    context = torch.multiprocessing.get_context("spawn")
    port = free_port()
    both = [context.Process(target=death, args=(rank, 2, port, str(tmp_path), gather)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(240)
    assert [p.exitcode for p in both] == [0, 7]
    report = json.loads((tmp_path / "death.json").read_text())
    assert report["met"] != "nothing" and not report["left"], report
    assert report["seconds"] < 60, report
