"""Directories and files that appear whole or not at all.

A directory is written beside its final place under a hidden name, synced, and renamed; files that join others
in a directory are written in a hidden one inside it. The writer holds a lock on what is hidden, so a later
run knows what a killed run left behind and removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
import time
from collections.abc import Generator
from pathlib import Path

from .errors import OutputError

#: files that make a directory recognisable as a model or an adapter, so that --force may replace it
_MARKS = ("graft.json", "config.json", "model_index.json", "adapter_config.json", "adapter_model.safetensors")
_LAST = ".graft-last."
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def atomic_directory(out: Path, *, force: bool = False) -> Generator[Path, None, None]:
    """Yield a fresh directory that becomes ``out`` when the block ends well, and vanishes when not.

    Write ``config.json`` to ``last(staging, "config.json")``: then the hidden directory never loads as a
    model, at whatever moment the process dies, and ``out`` does from the moment it is there.

    Args:
        out: the directory to make; its parent is created if missing.
        force: replace an existing model or adapter directory; it stays whole until the new one is.
    Raises:
        OutputError: ``out`` exists (without ``force``), is no model directory (with ``force``), or
            cannot be written; also when the disk fills up meanwhile.
    """
    out = out.absolute()
    check_out(out, force=force)
    staging = out.parent / f".{out.name[:100]}.graft-{os.getpid()}-{secrets.token_hex(4)}"
    missing = [parent for parent in out.parents if not parent.exists()]
    lock: int | None = None
    try:
        with output_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(out.parent, f".{out.name[:100]}.")
            staging.mkdir()
            lock = _lock(staging)
            yield staging
            linked = _link_last(staging, out)
            _sync_tree(staging)
            _publish(staging, out, force=force)
            for hidden, name in linked.items():
                (out / hidden).replace(out / name)
            sync(out)
    finally:
        _remove(staging)
        if lock is not None:
            os.close(lock)
        _remove_empty(missing)


@contextlib.contextmanager
def atomic_files(folder: Path) -> Generator[Path, None, None]:
    """Yield a fresh directory whose files move into ``folder`` when the block ends well, and vanish when not.

    Each file appears in its place, or takes that of an older one of its name, whole; ``config.json`` goes
    last. What else ``folder`` holds stays. It is created if missing.

    Raises:
        OutputError: ``folder`` is a file, or cannot be written; also when the disk fills up meanwhile.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is not a directory; name another output directory")
    staging = folder / f".graft-{os.getpid()}-{secrets.token_hex(4)}"
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock: int | None = None
    try:
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _remove_stale(folder, ".")
            staging.mkdir()
            lock = _lock(staging)
            yield staging
            _sync_tree(staging)
            _move_files(staging, folder)
    finally:
        _remove(staging)
        if lock is not None:
            os.close(lock)
        _remove_empty(missing)


def _move_files(staging: Path, folder: Path) -> None:
    files = [path for path in sorted(staging.rglob("*")) if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == "config.json"):
        place = folder / path.relative_to(staging)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    sync(folder)


def _remove_empty(folders: list[Path]) -> None:
    """Remove those that hold nothing; deepest first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def remove_directory(folder: Path) -> None:
    """Remove a directory that :func:`atomic_directory` made: at once from its name, then from the disk.

    Raises:
        OutputError: no permission.
    """
    hidden = folder.parent / f".{folder.name[:100]}.graft-{os.getpid()}-{secrets.token_hex(4)}"
    with output_errors(folder):
        folder.rename(hidden)
    _remove(hidden)


def last(staging: Path, name: str) -> Path:
    """Where to write the file ``name`` so that it gets its name together with the whole directory.

    Until then it is a hidden file, and ``name`` a link through the directory's final place: nothing can
    follow it before the rename, everything can after it, and no moment lies between.
    """
    return staging / f"{_LAST}{staging.name[-8:]}.{name}"


def check_out(out: Path, *, force: bool = False) -> None:
    """Refuse an output directory that must not be written, before any work is done.

    Raises:
        OutputError: see :func:`atomic_directory`.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out} is not a directory; name another output directory")
    if out.exists():
        if not force:
            raise OutputError(f"{out} already exists; choose another output or replace it with --force")
        names = {p.name for p in out.iterdir()}
        if names and not names.intersection(_MARKS):
            raise OutputError(
                f"{out} exists and holds no model ({', '.join(sorted(names)[:3])} …), so --force does not "
                "replace it; choose another output"
            )
    parent = next(p for p in (out if out.exists() else out.parent, *out.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {out}: no permission to write in {parent}")


@contextlib.contextmanager
def output_errors(out: Path) -> Generator[None, None, None]:
    """Turn a full disk and missing permissions into one clear error.

    Raises:
        OutputError: naming ``out`` and what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutputError(
                f"no space left on the disk while writing {out}; nothing was kept. Free some space, "
                "or name an output on another disk"
            ) from error
        if error.errno in _DENIED:
            raise OutputError(f"cannot write {out}: {error.strerror} ({error.filename or out})") from error
        raise


def _lock(folder: Path) -> int | None:
    """Lock a directory until its descriptor is closed; None where the system has no such locks."""
    try:
        import fcntl

        fd = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _remove_stale(parent: Path, start: str) -> None:
    """Remove what killed runs left: unlocked, and their process is gone or they are a minute old."""
    for folder in parent.glob(f"{_escape(start)}graft-*-*"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(folder.name.rsplit("-", 2)[1])
            gone = not _alive(pid) or time.time() - folder.stat().st_mtime > 60
            lock = _lock(folder) if gone else None
            if lock is not None:
                _remove(folder)
                os.close(lock)


def _escape(name: str) -> str:
    import glob

    return glob.escape(name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _link_last(staging: Path, out: Path) -> dict[str, str]:
    """What :func:`last` made: hidden name → name, each now a link that works at ``out`` only.

    Where there are no links the file gets its name at once.
    """
    linked: dict[str, str] = {}
    start = last(staging, "").name
    for path in sorted(staging.glob(f"{start}*")):
        name = path.name.removeprefix(start)
        try:
            (staging / name).symlink_to(Path("..") / out.name / path.name)
            linked[path.name] = name
        except (OSError, NotImplementedError):
            path.replace(staging / name)
    return linked


def _remove(folder: Path) -> None:
    """Remove a directory, first what makes it load as a model: the removal too can be killed."""
    for name in _MARKS:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """fsync a file or a directory (where the system can sync directories)."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(fd)


def _publish(staging: Path, out: Path, *, force: bool) -> None:
    """Rename the finished directory into place; what was there goes last."""
    if not out.exists():
        staging.rename(out)
    elif not force:
        raise OutputError(f"{out} was made by someone else meanwhile; nothing was changed")
    elif not _exchange(staging, out):
        old = staging.with_name(staging.name + "-old")
        out.rename(old)
        try:
            staging.rename(out)
        except BaseException:
            old.rename(out)
            raise
        _remove(old)
    sync(out.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step (Linux: renameat2 with RENAME_EXCHANGE); False if not possible."""
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here = -100  # AT_FDCWD
    return call(here, os.fsencode(a), here, os.fsencode(b), 2) == 0
