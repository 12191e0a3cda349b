"""Settings of every test, and which tests go to one of xdist's workers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

# how long one example takes says how busy the machine is, nothing of the code
settings.register_profile("graft", deadline=None)
settings.load_profile("graft")

#: files whose tests read what one group of processes did, so that it should run once
STARTED_ONCE = frozenset(
    {
        f"tests/dist/test_{name}.py"
        for name in ("bridge", "ddp", "deepspeed_chat", "dtensor", "megatron", "zero")
    }
    | {"tests/train/test_spread.py"}
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For ``--dist loadgroup``; xdist 3.8's own groups go by names of tests that pytest 9 does not change."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


def group_of(nodeid: str) -> str:
    """The file and number of processes of a test in ``STARTED_ONCE``; any other is its own group."""
    file, _, test = nodeid.partition("::")
    if file not in STARTED_ONCE or "dies_in_export" in test:
        return nodeid
    world = test.partition("[")[2][:2]
    return f"{file} {world}" if world in ("2-", "4-") and "dtensor" not in file else file
