"""When to export and where to: laws of the schedule and of the folder's pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import graft
from graft.train.schedule import FolderPattern, Schedule


def schedule(**chosen: Any) -> Schedule:
    return Schedule(
        **{"epochs": None, "steps": None, "end": False, "checkpoints": False, **chosen}  # type: ignore[arg-type]
    )


@given(st.integers(1, 6), st.integers(1, 30))
def test_every_nth(n: int, total: int) -> None:
    due = [d for d in range(1, total + 1) if schedule(epochs=n).after_epoch(d - 1, d)]
    assert due == list(range(n, total + 1, n))
    assert due == [s for s in range(total + 1) if schedule(steps=n).after_step(s)]


@given(st.sets(st.integers(0, 30), min_size=1), st.integers(0, 30))
def test_those_of_a_list(chosen: set[int], number: int) -> None:
    assert schedule(epochs=chosen).after_epoch(number, number + 1) == (number in chosen)
    assert schedule(steps=sorted(chosen)).after_step(number) == (number in chosen)


def test_every_epoch_unless_another_moment_is_chosen() -> None:
    assert all(schedule().after_epoch(n, n + 1) for n in range(5))
    for other in ({"steps": 3}, {"end": True}, {"checkpoints": True}):
        assert not any(schedule(**other).after_epoch(n, n + 1) for n in range(5))
    assert schedule(steps=3, epochs=2).after_epoch(1, 2)


@pytest.mark.parametrize("when", [0, -1, True, 1.5, [1, -1], [], ["1"]])
@pytest.mark.parametrize("name", ["epochs", "steps"])
def test_numbers_that_no_epoch_has(name: str, when: Any) -> None:
    with pytest.raises(graft.TargetError, match=f"{name} must be n ≥ 1"):
        schedule(**{name: when})


@given(st.integers(0, 200), st.integers(0, 10**6))
def test_the_folder_of_a_moment(epoch: int, step: int) -> None:
    folders = FolderPattern("a/{epoch:03d}/s{step}", schedule(), again=False)
    assert folders.of(epoch, step) == Path(f"a/{epoch:03d}/s{step}")


@pytest.mark.parametrize("pattern", ["a/{epok}", "a/{}", "a/{0}", "a/{epoch", "a/{epoch:q}", "a/{step.real}"])
def test_a_pattern_of_other_fields(pattern: str) -> None:
    with pytest.raises(graft.OutputError, match="not a pattern of"):
        FolderPattern(pattern, schedule(), again=False)


@pytest.mark.parametrize(
    ("pattern", "chosen", "needs"),
    [
        ("a", {}, "epoch"),
        ("a", {"epochs": 2, "end": True}, "epoch"),
        ("a/{epoch}", {"steps": 2}, "step"),
        ("a/{epoch}", {"checkpoints": True}, "step"),
    ],
)
def test_one_folder_for_several_exports(pattern: str, chosen: dict[str, Any], needs: str) -> None:
    with pytest.raises(graft.OutputError, match=rf"put {{{needs}}} into it, or pass force=True"):
        FolderPattern(pattern, schedule(**chosen), again=False)
    FolderPattern(pattern, schedule(**chosen), again=True)
    FolderPattern(pattern + "/{step}", schedule(**chosen), again=False)


def test_one_folder_for_one_export() -> None:
    assert FolderPattern("last", schedule(end=True), again=False).of(3, 9) == Path("last")


@pytest.mark.parametrize("root", ["", "abs"])
def test_what_is_there_already(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x[1]/epoch-1-a", "x[1]/epoch-22-a", "x[1]/epoch-1-b", "x1/epoch-1-a", "x[1]/other"):
        (tmp_path / name).mkdir(parents=True)
    start = f"{tmp_path}/" if root else ""
    folders = FolderPattern(start + "x[1]/epoch-{epoch}-a", schedule(), again=False)
    assert folders.existing() == [Path(f"{start}x[1]/epoch-{n}-a") for n in (1, 22)]
    assert FolderPattern(start + "none/{epoch}", schedule(), again=False).existing() == []
    assert FolderPattern(start + "x[1]", schedule(end=True), again=False).existing() == [Path(start + "x[1]")]
