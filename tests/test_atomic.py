"""Output directories appear whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graft import atomic
from graft.atomic import atomic_directory
from graft.errors import OutputError


def _fill(folder: Path, text: str = "new") -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "x").write_text(text)
    (folder / "config.json").write_text(text)


def _left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_appears_whole(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "deep" / "out") as staging:
        _fill(staging)
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "sub" / "x").read_text() == "new"
    assert _left(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_vanishes_on_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_directory(tmp_path / "out") as staging:
        _fill(staging)
        raise error
    assert _left(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_a_model(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    out = tmp_path / "out"
    out.mkdir()
    _fill(out, "old")
    with pytest.raises(OutputError, match="--force"), atomic_directory(out):
        pass
    with pytest.raises(RuntimeError), atomic_directory(out, force=True) as staging:
        raise RuntimeError
    assert (out / "config.json").read_text() == "old"
    with atomic_directory(out, force=True) as staging:
        _fill(staging)
        assert (out / "config.json").read_text() == "old"
    assert (out / "config.json").read_text() == "new" and _left(tmp_path) == ["out"]


def test_force_spares_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("work")
    (tmp_path / "file").write_text("work")
    for name, said in (("home", "holds no model"), ("file", "not a directory")):
        with pytest.raises(OutputError, match=said), atomic_directory(tmp_path / name, force=True):
            pass
    assert (tmp_path / "home" / "thesis.txt").exists() and (tmp_path / "file").exists()


def test_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no space left"), atomic_directory(tmp_path / "out") as staging:
        _fill(staging)
        raise OSError(errno.ENOSPC, "No space left on device")
    assert _left(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="permission"), atomic_directory(tmp_path / "out"):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), atomic_directory(tmp_path / "file" / "out"):
        pass


def test_a_rerun_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from graft.atomic import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'model.safetensors').write_text('x')\n"
        "    os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert done.returncode == 9 and _left(tmp_path) != []
    with atomic_directory(tmp_path / "out") as mine:
        with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out"):
            assert mine.exists(), "a running process keeps its directory"
            raise RuntimeError
        _fill(mine)
    assert _left(tmp_path) == ["out"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("older", [True, False])
def test_last_file_appears_with_the_directory(
    tmp_path: Path, links: bool, older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(NotImplementedError))
    out, seen = tmp_path / "out", list[bool]()
    if older:
        out.mkdir()
        _fill(out, "old")
    publish = atomic._publish

    def watched(staging: Path, final: Path, *, force: bool) -> None:
        seen.append((staging / "config.json").exists())
        publish(staging, final, force=force)
        seen.append((final / "config.json").read_text() == "new")

    monkeypatch.setattr(atomic, "_publish", watched)
    with atomic_directory(out, force=older) as staging:
        atomic.last(staging, "config.json").write_text("new")
        assert not (staging / "config.json").exists()
    assert seen == [not links, True]
    assert _left(out) == ["config.json"] and not (out / "config.json").is_symlink()
    assert _left(tmp_path) == ["out"]


def test_parents_vanish_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert _left(tmp_path) == []
