"""Every bad input gives one message and exit code 2, writes nothing and changes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from graft.cli.app import cli

from .bad_cases import CASES, REPAIRED, Case
from .pairs import Pair, snapshot, write_pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path / "work")


def run(words: list[str]) -> Result:
    result = CliRunner().invoke(cli, words, catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bad_input_is_refused(case: Case, pair: Pair) -> None:
    case.damage(pair)
    before = snapshot(pair.root)
    result = run(pair.call)
    assert result.exit_code == 2, result.output
    assert re.search(case.says, result.stderr, re.DOTALL), result.stderr
    assert len(re.findall(r"^error: |^Error: ", result.stderr, re.MULTILINE)) == 1, result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert snapshot(pair.root) == before


@pytest.mark.parametrize("case", REPAIRED, ids=lambda c: c.name)
def test_what_can_be_proven_is_fused(case: Case, pair: Pair) -> None:
    case.damage(pair)
    before = snapshot(pair.root)
    result = run(pair.call)
    assert result.exit_code == 0, result.output
    assert re.search(case.says, result.stdout), result.stdout
    after = snapshot(pair.root)
    assert {k: v for k, v in after.items() if not k.startswith("out")} == before
    assert (
        run(["verify", str(pair.out), "--base", str(pair.base), "--adapter", str(pair.adapter)]).exit_code
        == 0
    )
