"""Megatron-core's tensor and expert parallelism on two and on four processes with gloo."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytestmark = [
    pytest.mark.dist,
    # Megatron's modules are imported here only to name the checks
    pytest.mark.filterwarnings("ignore"),
]

from tests.dist.apart import stopped_and_left_nothing  # noqa: E402
from tests.dist.mcore.files import death  # noqa: E402
from tests.dist.mcore.run import checks, launch, start  # noqa: E402

Results = Callable[[int], list[dict[str, str]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return cache(lambda world: launch(world, tmp_path_factory.mktemp(f"of{world}")))


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in (2, 4) for name in checks(world)])
def test_on_several_processes(world: int, name: str, results: Results) -> None:
    for rank, result in enumerate(results(world)):
        if name not in result:
            broken = [n for n, error in result.items() if error]
            pytest.fail(f"did not run, because of {broken or f'what ended process {rank}'}", pytrace=False)
        if result[name]:
            pytest.fail(f"process {rank}:\n{result[name]}", pytrace=False)


@pytest.mark.parametrize("gather", [False, True])
def test_a_process_that_dies_in_export_leaves_nothing_and_stops_the_other(
    tmp_path: Path, gather: bool
) -> None:
    codes = start(2, partial(death, gather=gather), tmp_path)
    assert codes == [0, 7]
    stopped_and_left_nothing(tmp_path)
