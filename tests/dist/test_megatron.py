"""Megatron-core tensor parallelism on two processes with gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")
pytestmark = [
    pytest.mark.dist,
    # Megatron's modules are imported here only to name the checks
    pytest.mark.filterwarnings("ignore"),
]

from tests.dist.megatron_work import CHECKS, work  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("megatron")
    torch.multiprocessing.spawn(work, (2, str(folder)), nprocs=2)  # type: ignore[attr-defined]
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", list(CHECKS))
def test_on_two_processes(name: str, results: list[dict[str, str]]) -> None:
    for rank, result in enumerate(results):
        assert name in result, "an earlier check failed, so this one did not run"
        assert not result[name], f"process {rank}:\n{result[name]}"
