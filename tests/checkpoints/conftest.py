"""Real checkpoints, written once a session by processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A call that gives the folder of the checkpoints of so many ranks."""
    pytest.importorskip("deepspeed")
    pytest.importorskip("lightning")
    base = tmp_path_factory.getbasetemp()
    # workers of pytest-xdist share one folder, and the first of them writes
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "checkpoints"
    if "GRAFT_CHECKPOINTS" in os.environ:  # keeps them between runs, for whoever works on these tests
        root = Path(os.environ["GRAFT_CHECKPOINTS"])
    return lambda world: _write(root / str(world), world)


def _write(folder: Path, world: int) -> Path:
    done = folder / "done"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        end = time.monotonic() + 400
        while not done.exists() and time.monotonic() < end:
            time.sleep(0.2)
        assert done.exists() and done.read_text() == "0", f"writing {folder} failed elsewhere"
        return folder
    words = [sys.executable, "-W", "ignore", "-m", "tests.checkpoints.write", str(folder), str(world)]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_XDIST_WORKER", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    run = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=400)
    done.write_text(str(run.returncode))
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def two(written: Callable[[int], Path]) -> Path:
    """The checkpoints of two ranks."""
    return written(2)
