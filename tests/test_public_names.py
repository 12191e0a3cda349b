"""``import graft`` is quick, and gives every public name when it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import graft


def test_every_public_name_is_there() -> None:
    assert [name for name in graft.__all__ if getattr(graft, name, None) is None] == []
    assert set(graft.__all__) <= set(dir(graft))


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(graft.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    shown = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == graft._HOME and set(shown) == set(graft.__all__)


def test_modules_and_unknown_names() -> None:
    assert graft.formats.read is not None
    with pytest.raises(AttributeError, match="no attribute 'formatz'"):
        _ = graft.formatz


def test_import_does_not_wait_for_torch() -> None:
    code = "import sys, graft; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
