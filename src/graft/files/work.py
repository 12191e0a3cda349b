"""What a fuse writes: weights, small files, provenance; and what it refuses before it writes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..atomic import last
from ..checkpoint import Checkpoint
from ..errors import OutputError
from ..tensors import write_index
from . import card, inputs
from .loss import Loss
from .plan import Plan, Wanted
from .shards import CHUNK, refuse_overflow
from .stream import Writer, stream
from .tied import is_vocabulary

#: version of graft.json's schema
PROVENANCE = 1


@dataclass(frozen=True)
class Texts:
    """The small text files, made before anything is written, so that they cannot fail after."""

    configs: dict[str, bytes]
    card: str
    provenance: dict[str, object]
    copies: dict[str, Path]
    notes: list[str]


@dataclass(frozen=True)
class Work:
    """Everything that is known before the first byte is written."""

    base: Checkpoint
    base_name: str
    adapter: Path
    format: str
    identity: dict[str, dict[str, object]]
    job: inputs.Job
    wanted: Wanted
    plan: Plan
    loss: Loss | None

    def texts(self, options: dict[str, object]) -> Texts:
        """Configuration, model card and provenance (all but the hashes of the output)."""
        rows = {
            name: (self.base.entries[name].shape[0], shape[0])
            for name, shape in self.plan.shapes.items()
            if name in self.base.entries
            and is_vocabulary(name)
            and shape[0] != self.base.entries[name].shape[0]
        }
        configs, said = card.configurations(
            self.base,
            dtype=self.wanted.dtype,
            rows=rows,
            changes=self.job.config,
            added=self.job.added,
        )
        notes = [*dict.fromkeys([*self.job.adapter.notes, *said, *self._components()])]
        if self.loss is not None and self.loss.ratio > 1:
            notes.append(
                f"the update is {self.loss.ratio:.3g} times as large as the weights: are alpha and scale "
                "right?"
            )
        if self.loss is not None and self.loss.measured > 0.25:
            notes.append(
                f"rounding takes {self.loss.measured:.0%} of the update (as a norm): it is small beside the "
                "weights. --dtype float32 keeps it all"
            )
        lines = [f"{len(self.plan.changed)} of {len(self.plan.shapes)} tensors changed", *notes]
        provenance: dict[str, object] = {
            "version": PROVENANCE,
            "graft": _version(),
            "torch": str(torch.__version__),
            "base": {"name": self.base_name, "files": {}},
            "adapter": {"name": self.adapter.name, "format": self.format, "files": self.identity},
            "fused": [*inputs.fused_before(self.base), {"name": self.adapter.name, "files": self.identity}],
            "options": options,
            "changed": self.plan.changed,
            "rounding": self.loss.to_dict() if self.loss else None,
            "notes": notes,
        }
        scale = options["scale"]
        assert isinstance(scale, float | int)
        readme = card.model_card(self.base, self.base_name, self.adapter.name, float(scale), lines)
        copies = card.small_files(self.base, self.adapter, bool(rows))
        return Texts(configs, readme, provenance, copies, notes)

    def _components(self) -> list[str]:
        """Which of a pipeline's models are changed, and which are not."""
        if not self.base.parts:
            return []
        counts = Counter(name.partition(".")[0] for name in self.plan.changed)
        changed = ", ".join(f"{name} ({counts[name]} tensors)" for name in self.base.parts if name in counts)
        same = ", ".join(name for name in self.base.parts if name not in counts)
        return [f"changed: {changed or 'nothing'}" + (f"; not changed: {same}" if same else "")]

    def write(
        self,
        staging: Path,
        texts: Texts,
        threads: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Write all files; the configuration without which nothing loads is the last."""
        for component in self.base.parts:
            (staging / component).mkdir()
        writer = Writer(staging)
        try:
            stream(self.plan.shards, writer, threads=threads, progress=progress)
        finally:
            writer.close()
        refuse_overflow(self.plan.shards)
        for name, source in texts.copies.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, staging / name)
        for folder, model in self.base.models.items():
            self._index(staging, folder, model)
        (staging / "README.md").write_text(texts.card, encoding="utf-8")
        names = list(texts.configs)
        for name in names[:-1]:
            (staging / name).write_bytes(texts.configs[name])
        self._record(staging, texts, threads)
        for name in names[-1:]:
            last(staging, name).write_bytes(texts.configs[name])

    def _index(self, staging: Path, folder: str, model: Checkpoint) -> None:
        """One model's index, if it has several files or had an index."""
        shards = [s for s in self.plan.shards if s.name.rpartition("/")[0] == folder]
        if len(shards) < 2 and not model.index:
            return
        about = model.index.get("metadata")
        kept = dict(about) if isinstance(about, dict) else {}
        files = {s.name for s in shards}
        table = {
            self.base.stored_name(name): file.rpartition("/")[2]
            for name, file in self.plan.weight_map.items()
            if file in files
        }
        total = sum(s.data_bytes for s in shards)
        write_index(staging / folder, table, {**kept, "total_size": total}, model.names)

    def _record(self, staging: Path, texts: Texts, threads: int | None) -> None:
        """graft.json with the hashes of every input and output file."""
        made = {s.name: _told(s.written, s.size) for s in self.plan.shards}
        used = {s.name: _told(s.read, s.size) for s in self.plan.shards if s.background is not None}
        for file in self.base.files:
            if self.base.place(file) not in used:
                used[self.base.place(file)] = inputs.digest(file, threads)
        for name in texts.configs:
            used[name] = inputs.digest(self.base.folder / name, 1)
        for path in sorted(p for p in staging.rglob("*") if p.is_file()):
            name = str(path.relative_to(staging))
            if name not in made:
                made[name] = inputs.digest(path, 1)
        made.update({name: inputs.digest_bytes(text) for name, text in texts.configs.items()})
        base = {"name": self.base_name, "files": used}
        table = {**texts.provenance, "base": base, "output": {"files": made}}
        text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
        (staging / "graft.json").write_text(text, encoding="utf-8")


def _told(total: int, length: int) -> dict[str, object]:
    return {"bytes": length, "checksum": inputs.hexadecimal(total, length)}


def identity_of(files: Sequence[Path], threads: int | None) -> dict[str, dict[str, object]]:
    return {path.name: inputs.digest(path, threads) for path in files}


def refuse_twice(base: Checkpoint, identity: dict[str, dict[str, object]], again: bool) -> None:
    """Refuse an adapter whose weight file the base's provenance lists.

    Raises:
        OutputError: with the way to do it all the same.
    """
    mine = next(iter(identity.values()))["checksum"]
    for one in inputs.fused_before(base):
        files = one.get("files")
        held = [f.get("checksum") for f in files.values()] if isinstance(files, dict) else []
        if mine in held and not again:
            raise OutputError(
                f"{base.folder} already holds this adapter ({one.get('name')}), says its graft.json. Fusing "
                "it again would apply it twice; use the base before it, or say --again (again=True)"
            )


def check_space(out: Path, plan: Plan) -> None:
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    need = plan.size + 16 * CHUNK
    if free < need:
        raise OutputError(
            f"{out} needs {need / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; free some space, or "
            "name an output on another disk"
        )


def _version() -> str:
    from .. import __version__

    return __version__
