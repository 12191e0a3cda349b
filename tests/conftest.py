"""Settings of every test."""

from __future__ import annotations

import pytest
from hypothesis import settings

# how long one example takes says how busy the machine is, nothing of the code
settings.register_profile("graft", deadline=None)
settings.load_profile("graft")


#: fixtures of the distributed tests that start processes once for all tests of a module
_STARTED_ONCE = {"folder", "results"}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that read what one group of processes did go to one of xdist's workers, so that it runs once."""
    for item in items:
        if not isinstance(item, pytest.Function) or item.get_closest_marker("dist") is None:
            continue
        if not _STARTED_ONCE.isdisjoint(item.fixturenames):
            world = item.callspec.params.get("world", "") if hasattr(item, "callspec") else ""
            item.add_marker(pytest.mark.xdist_group(f"{item.module.__name__}{world}"))
