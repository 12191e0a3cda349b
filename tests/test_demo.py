"""The demo: its held-out data is new, and it runs from end to end."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo"


@pytest.fixture
def opposites(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DEMO))
    import opposites  # pyright: ignore[reportMissingImports]

    return opposites


def test_held_out_requests_share_nothing_with_training(opposites: ModuleType) -> None:
    requests = opposites.held_out(0)
    shared = opposites.overlap(requests)
    assert {k: v for k, v in shared.items() if k != "words"} == {
        "sentences": 0,
        "wordings": 0,
        "things": 0,
        "frames": 0,
    }
    assert shared["words"] < 0.25
    drawn = {text for n in range(50) for texts in opposites.batch(random.Random(n), 16) for text in texts}
    assert not drawn & {r.text for r in requests}


def test_overlap_notices_a_leak(opposites: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opposites, "TRAIN", (*opposites.TRAIN, opposites.HELD_OUT[0]))
    monkeypatch.setattr(opposites, "TRAIN_FRAMES", (*opposites.TRAIN_FRAMES, *opposites.HELD_OUT_FRAMES))
    shared = opposites.overlap(opposites.held_out(0))
    assert all(shared[k] > 0 for k in ("sentences", "wordings", "things", "frames"))


def test_a_wish_has_four_wordings_and_its_opposite_four_others(opposites: ModuleType) -> None:
    requests = opposites.held_out(0)
    wishes: dict[tuple[str, int], set[str]] = {}
    for r in requests:
        wishes.setdefault(r.wish, set()).add(r.text)
    assert all(len(texts) == 4 for texts in wishes.values())
    assert len({r.text for r in requests}) == len(requests)
    assert all((thing, 1 - side) in wishes for thing, side in wishes)


@pytest.mark.slow
def test_the_demo_runs_over_what_an_earlier_run_left(tmp_path: Path) -> None:
    left = tmp_path / "demo-out"
    (left / "adapter").mkdir(parents=True)
    (left / "base").symlink_to(tmp_path / "gone")
    done = subprocess.run(
        [sys.executable, str(DEMO), "--steps", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "every bit back" in done.stdout
    assert {p.name for p in left.iterdir()} == {"base", "adapter", "fused"}
