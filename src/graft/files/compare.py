"""The sink that verifies: every chunk that base and adapter give against the output's own bytes."""

from __future__ import annotations

from bisect import bisect_right
from threading import Lock

import torch

from .. import checksum
from ..checkpoint import Checkpoint
from ..errors import Problems, VerifyError
from .plan import Plan
from .shards import Shard, scratch
from .sources import OpenFile

#: what mends a result that is not base + adapter
MEND = "Fuse again: graft fuse BASE ADAPTER -o OUT --force"


class Compared:
    """The sink of the stream: each expected chunk against the file's own bytes."""

    def __init__(self, out: Checkpoint) -> None:
        self.out = out
        self._files = {name: OpenFile(out.folder / name) for name in out.headers}
        self._lock = Lock()
        self.sums: dict[str, int] = {}
        self._differ: dict[str, int] = {}

    def layout(self, plan: Plan) -> None:
        """Refuse other files, names, shapes or sizes than the plan's.

        Raises:
            VerifyError: naming them.
        """
        problems = Problems(VerifyError, f"{self.out.folder} is not base + adapter:")
        want = {name: plan.shapes[name] for name in plan.shapes}
        have = self.out.shapes
        for name in sorted(want.keys() ^ have.keys()):
            problems.add(f"{name} is {'missing' if name in want else 'not in the base'}")
        for name in want.keys() & have.keys():
            if want[name] != have[name]:
                problems.add(f"{name} has shape {list(have[name])}, not {list(want[name])}")
            elif plan.weight_map[name] != (file := self.out.place(self.out.entries[name].file)):
                problems.add(f"{name} is in {file}, not {plan.weight_map[name]}")
        for shard in plan.shards:
            path = self.out.folder / shard.name
            if path.exists() and path.stat().st_size != shard.size:
                problems.add(f"{shard.name} has {path.stat().st_size} bytes, not {shard.size}")
        problems.raise_if_any(MEND)

    def __call__(self, shard: Shard, at: int, data: torch.Tensor, view: memoryview) -> None:
        mine = scratch(len(view), torch.uint8)
        self._files[shard.name].read(at, mine)
        total = checksum.update(mine, at)
        with self._lock:
            self.sums[shard.name] = self.sums.get(shard.name, 0) + total
        if not torch.equal(mine, data):
            self._blame(shard.name, at, (mine != data).nonzero().view(-1))

    def _blame(self, file: str, at: int, where: torch.Tensor) -> None:
        entries = [e for e in self.out.headers[file].entries if e.nbytes]
        starts = [e.offset for e in entries]
        while where.numel():
            n = bisect_right(starts, at + int(where[0])) - 1
            name = entries[n].name if n >= 0 else f"the header of {file}"
            end = entries[n].offset + entries[n].nbytes if n >= 0 else (starts[0] if starts else at + 1)
            inside = where < max(end - at, int(where[0]) + 1)
            with self._lock:
                self._differ[name] = self._differ.get(name, 0) + int(inside.sum())
            where = where[~inside]

    def tensors(self) -> None:
        """Refuse any difference.

        Raises:
            VerifyError: naming the first tensors that differ, in the files' order.
        """
        order = {name: n for n, name in enumerate(self.out.entries)}
        problems = Problems(VerifyError, f"{self.out.folder} is not base + adapter:")
        for name in sorted(self._differ, key=lambda n: order.get(n, -1)):
            problems.add(f"{name} differs in {self._differ[name]} bytes")
        problems.raise_if_any(MEND)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
