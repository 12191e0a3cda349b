"""ZeRO stages 0 to 3 with real DeepSpeed on two and four processes: every verb, against one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")
pytestmark = pytest.mark.dist

from tests.dist.apart import stopped_and_left_nothing  # noqa: E402
from tests.dist.group import started  # noqa: E402
from tests.dist.zero_kinds import KINDS  # noqa: E402
from tests.dist.zero_work import PLAN, Plan, death, free_port, work  # noqa: E402

PLANS: dict[int, Plan] = {2: [*PLAN, *KINDS[2]], 4: KINDS[4]}
TESTS = [
    pytest.param(world, case.name, check.__name__, id=f"{world}-{case.name}-{check.__name__}")
    for world, plan in PLANS.items()
    for case, alone, shared in plan
    for check in (*alone, *shared)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], list[dict[str, str]]]:
    """What each process found in a case; the first question about a number of processes runs them."""
    folders: dict[int, Path] = {}

    def found(world: int, case: str) -> list[dict[str, str]]:
        if world not in folders:
            folders[world] = tmp_path_factory.mktemp(f"zero-{world}")
            args = (world, free_port(), str(folders[world]), PLANS[world])
            try:
                torch.multiprocessing.spawn(work, args, nprocs=world)  # type: ignore[attr-defined]
            except Exception as error:
                print(error)
        files = [folders[world] / f"{case}.{rank}.json" for rank in range(world)]
        return [json.loads(f.read_text()) if f.exists() else {} for f in files]

    return found


@pytest.mark.parametrize(("world", "case", "check"), TESTS)
def test_against_one_process(world: int, case: str, check: str, results: Callable[..., Any]) -> None:
    for rank, result in enumerate(results(world, case)):
        assert check in result, "an earlier check failed, so this one did not run"
        assert not result[check], f"process {rank}:\n{result[check]}"


@pytest.mark.parametrize("gather", [False, True])
def test_a_process_that_dies_in_export_leaves_nothing_and_stops_the_other(
    tmp_path: Path, gather: bool
) -> None:
    context = torch.multiprocessing.get_context("spawn")
    assert started(context, death, 2, 2, free_port(), str(tmp_path), gather, limit=240) == [0, 7]
    stopped_and_left_nothing(tmp_path)
