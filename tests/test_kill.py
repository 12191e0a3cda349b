"""A fuse stopped at any moment leaves OUT whole or absent, the inputs as they were, and a rerun works.

Importing torch takes seconds, so :mod:`tests.kill_harness` imports it once and forks a child a stop.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .pairs import Pair, snapshot, write_pair

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork and SIGKILL"),
    pytest.mark.slow,
]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path / "work", width=24)


def harness(pair: Pair, stops: int, mode: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "tests.kill_harness", str(pair.root), str(stops), mode]
    done = subprocess.run(words, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_at_100_random_moments(pair: Pair) -> None:
    found = harness(pair, 100, "kill")
    assert found["stopped"] == 100, found
    assert found["left behind"] >= 20, f"the kills did not hit the writing: {found}"
    assert found["left"] == [], "the rerun left what the killed runs had written"


def test_killed_while_replacing(pair: Pair) -> None:
    found = harness(pair, 30, "force")
    assert found["stopped"] == 30, found
    assert found["left"] == []


def test_interrupted_at_random_moments(pair: Pair) -> None:
    found = harness(pair, 30, "interrupt")
    assert found["stopped"] == 30 and found["left"] == [], found


def test_ctrl_c_of_the_real_command(pair: Pair) -> None:
    before = snapshot(pair.root)
    words = [sys.executable, "-m", "graft", *pair.call, "--threads", "1"]
    with subprocess.Popen(words, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None and len(list(pair.root.iterdir())) == 2:
            time.sleep(0.0005)
        run.send_signal(signal.SIGINT)
        stdout, stderr = run.communicate(timeout=60)
    assert (run.returncode, stdout, stderr) == (130, "", "interrupted: no half-written output is left\n")
    assert snapshot(pair.root) == before
