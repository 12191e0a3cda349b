"""Compile the kernel once with the machine's C compiler and keep it in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

_HERE = Path(__file__).parent
_SOURCES = ("fuse.c", "undo.c", "checksum.c")
_HEADERS = ("number.h", "fast.h")
# -fno-trapping-math lets selects between floats become vector code; no flag may reorder sums
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
# tried in turn: -march=native is not known to every compiler on every processor
_TUNING = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())


class BuildError(RuntimeError):
    """No compiled kernel can be had on this machine; the torch twins do the same work."""


def library() -> Path:
    """Path of the shared object for this source, compiler and processor; compiled if it is new.

    Raises:
        BuildError: no C compiler, or it failed.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise BuildError("no C compiler (cc, gcc or clang) was found")
    key = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        key.update((_HERE / name).read_bytes())
    key.update(repr((compiler, _FLAGS, _TUNING, platform.machine(), _processor())).encode())
    folder = _cache_folder()
    path = folder / f"kernel-{key.hexdigest()[:20]}.so"
    if not path.exists():
        _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    sources = [str(_HERE / name) for name in _SOURCES]
    complaint = ""
    for tuning in _TUNING:
        handle, scratch = tempfile.mkstemp(suffix=".so", dir=path.parent)
        os.close(handle)
        command = [*compiler.split(), *_FLAGS, *tuning, *sources, "-o", scratch, "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode == 0:
                Path(scratch).replace(path)
                return
            complaint = done.stderr.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            complaint = str(error)
        finally:
            Path(scratch).unlink(missing_ok=True)
    raise BuildError(f"{compiler} could not compile the kernel: {complaint[-500:]}")


def _processor() -> str:
    """What the code may be compiled for: a cache on a shared home must not cross processors."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return platform.processor()


def _cache_folder() -> Path:
    """A folder that only this user can write: what lies in it is loaded as code."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "graft"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.stat()
        if info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="graft-kernel-"))
