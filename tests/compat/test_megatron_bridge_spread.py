"""Megatron-Bridge's LoRA on two processes: cut factors merged, and Megatron-core's own linears."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore")]  # Megatron's own warnings

from tests.compat import bridge_work  # noqa: E402
from tests.dist import group  # noqa: E402


def test_two_processes() -> None:
    group.run(2, bridge_work.work)
