"""Forks a fuse, stops it at a random moment, judges what it left; prints one JSON line at the end.

Run as ``python -m tests.kill_harness WORK STOPS MODE``; MODE is ``kill`` (SIGKILL), ``force`` (SIGKILL
while it replaces an older OUT) or ``interrupt`` (SIGINT and SIGTERM in turn).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

import torch

from graft import fuse_files
from graft.cli.app import cli

#: what may differ from run to run: a record of the run, a file about to get its final name
UNSTABLE = re.compile(r"graft\.json|\.graft-last\..*")


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file of a folder."""
    files = (p for p in folder.rglob("*") if p.is_file() and not UNSTABLE.fullmatch(p.name))
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in files}


def stamps(*folders: Path) -> list[tuple[str, int, int, int]]:
    """What a write to a file would change, without reading it."""
    stats = ((p, p.stat()) for folder in folders for p in sorted(folder.rglob("*")))
    return [(str(p), s.st_ino, s.st_size, s.st_mtime_ns) for p, s in stats]


def loads_as_model(folder: Path) -> bool:
    """Whether transformers would find a configuration and weights under names that it knows."""
    names = {p.name for p in folder.iterdir()}
    return (folder / "config.json").is_file() and bool(
        names & {"model.safetensors", "model.safetensors.index.json"}
    )


class Trial:
    """One base, one adapter, one place for OUT; many stopped fuses."""

    def __init__(self, work: Path, mode: str) -> None:
        self.base, self.adapter, self.out = work / "base", work / "adapter", work / "place" / "out"
        self.mode, self.count = mode, Counter[str]()
        self.inputs = tree(self.base), tree(self.adapter)
        self.stamps = stamps(self.base, self.adapter)
        self.out.parent.mkdir()
        self.whole()
        self.want = tree(self.out)
        self.clear()
        self.took = min(self.whole(), self.again(), self.again())
        assert tree(self.out) == self.want, "two fuses of the same inputs differ"
        self.clear()

    def start(self) -> int:
        pid = os.fork()
        if pid == 0:
            self._child()
        return pid

    def _child(self) -> NoReturn:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        words = ["fuse", str(self.base), str(self.adapter), "-o", str(self.out), "--threads", "1", "--json"]
        code = 99
        try:
            cli.main([*words, *["--force"] * (self.mode == "force")], prog_name="graft")
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 98
        finally:
            os._exit(code)

    def whole(self) -> float:
        """Run one to its end; seconds."""
        began = time.perf_counter()
        status = os.waitpid(self.start(), 0)[1]
        assert status == 0, f"a fuse that nobody stopped ended with status {status}"
        return time.perf_counter() - began

    def again(self) -> float:
        self.clear()
        return self.whole()

    def clear(self) -> None:
        if self.mode != "force":
            shutil.rmtree(self.out, ignore_errors=True)

    def stop(self, after: float, how: signal.Signals) -> bool:
        """Start one, stop it after so many seconds, judge what it left; whether it was still running."""
        pid = self.start()
        time.sleep(after)
        os.kill(pid, how)
        status = os.waitpid(pid, 0)[1]
        stopped = self._judge_end(status, how)
        self._judge_place()
        assert stamps(self.base, self.adapter) == self.stamps, "an input was written to"
        self.clear()
        return stopped

    def _judge_end(self, status: int, how: signal.Signals) -> bool:
        code = os.waitstatus_to_exitcode(status)
        if how == signal.SIGKILL:
            stopped, early = code == -how, False
        else:
            # the child's own start, before the command listens to signals
            stopped, early = code == 128 + how, code in (99, -how)
            left = [p.name for p in self.out.parent.iterdir() if p != self.out]
            assert not left, f"{how.name} left {left}"
        assert stopped or early or code == 0, f"ended with {code} after {how.name}"
        self.count["stopped" if stopped else "early" if early else "finished"] += 1
        return stopped

    def _judge_place(self) -> None:
        if self.out.exists():
            self.count["whole"] += 1
            assert tree(self.out) == self.want, "OUT is there and not whole"
        else:
            self.count["absent"] += 1
            assert self.mode != "force", "the older OUT is lost"
        for other in self.out.parent.iterdir():
            if other != self.out:
                self.count["left behind"] += 1
                old = self.mode == "force" and tree(other) == self.want
                assert old or not loads_as_model(other), f"{other.name} loads as a model"


def main(work: Path, stops: int, mode: str) -> None:
    torch.set_num_threads(1)
    random.seed(stops)
    assert fuse_files
    trial = Trial(work, mode)
    n, tries = 0, 0
    while n < stops and (tries := tries + 1) < 4 * stops:
        how = signal.SIGKILL
        if mode == "interrupt":
            how = (signal.SIGINT, signal.SIGTERM)[tries % 2]
        # spread over the whole run, whose length changes with the machine's load
        if trial.stop(trial.took * (n + random.random()) / stops, how):
            n += 1
            trial.took *= 1.01
        else:
            trial.took *= 0.97
    trial.whole()
    assert tree(trial.out) == trial.want, "the rerun is not whole"
    assert (tree(trial.base), tree(trial.adapter)) == trial.inputs
    left = [p.name for p in trial.out.parent.iterdir() if p != trial.out]
    print(json.dumps({**trial.count, "left": left, "seconds": trial.took}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
