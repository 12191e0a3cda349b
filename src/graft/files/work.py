"""What a fuse writes: weights, small files, provenance; and what it refuses before it writes."""

from __future__ import annotations

import json
import shutil
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

    config: bytes | None
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
        config, said = card.changed_config(
            self.base, dtype=self.wanted.dtype, rows=rows, changes=self.job.config
        )
        notes = [*dict.fromkeys([*self.job.adapter.notes, *said])]
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
        return Texts(config, readme, provenance, card.small_files(self.base, self.adapter, bool(rows)), notes)

    def write(
        self,
        staging: Path,
        texts: Texts,
        threads: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Write all files; ``config.json``, without which nothing loads, is the last."""
        writer = Writer(staging)
        try:
            stream(self.plan.shards, writer, threads=threads, progress=progress)
        finally:
            writer.close()
        refuse_overflow(self.plan.shards)
        for name, source in texts.copies.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, staging / name)
        if len(self.plan.shards) > 1 or self.base.index:
            about = self.base.index.get("metadata")
            kept = dict(about) if isinstance(about, dict) else {}
            write_index(staging, self.plan.weight_map, {**kept, "total_size": self.plan.total_size})
        (staging / "README.md").write_text(texts.card, encoding="utf-8")
        self._record(staging, texts, threads)
        if texts.config is not None:
            last(staging, "config.json").write_bytes(texts.config)

    def _record(self, staging: Path, texts: Texts, threads: int | None) -> None:
        """graft.json with the hashes of every input and output file."""
        made = {s.name: _told(s.written, s.size) for s in self.plan.shards}
        used = {s.name: _told(s.read, s.size) for s in self.plan.shards if s.background is not None}
        for file in self.base.files:
            if file.name not in used:
                used[file.name] = inputs.digest(file, threads)
        if texts.config is not None:
            used["config.json"] = inputs.digest(self.base.folder / "config.json", 1)
        for path in sorted(p for p in staging.rglob("*") if p.is_file()):
            name = str(path.relative_to(staging))
            if name not in made:
                made[name] = inputs.digest(path, 1)
        if texts.config is not None:
            made["config.json"] = inputs.digest_bytes(texts.config)
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
