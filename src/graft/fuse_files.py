"""Fuse an adapter into a model, file to file, without ever loading the model.

The plan comes from headers alone. Then each output file is a stream of aligned chunks: untouched bytes
are copied, touched elements become W + ΔW rounded once, and both inputs and outputs are hashed on the
way. Memory is a few chunks and the thin factors of the tensors in work, whatever the model's size.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import __version__, kernel
from .atomic import last
from .checkpoint import Checkpoint
from .errors import GraftError, OutputError
from .files import card, inputs
from .files.loss import Loss, measure
from .files.plan import Plan, Wanted, make_plan
from .files.shards import CHUNK, refuse_overflow
from .files.stream import Writer, stream
from .files.tied import is_vocabulary
from .formats.protocol import EnableLora
from .tensors import atomic_directory, check_out, output_errors, write_index

#: dtypes that a fused model can be rounded to
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

#: version of graft.json's schema
PROVENANCE = 1


@dataclass(frozen=True)
class FuseReport:
    """What a fuse did (or would do).

    Args:
        changed: tensor → what was done to it; all others were copied bit for bit.
        bytes_written: size of the weight files.
        loss: what rounding takes of the update, from a sample; None without a plain ΔW.
        seconds: wall time.
    """

    base: str
    adapter: str
    out: str
    format: str
    dry_run: bool
    scale: float
    dtype: str | None
    tensors: int
    changed: dict[str, str]
    bytes_written: int
    files: list[str]
    loss: Loss | None
    notes: list[str]
    kernel: str
    seconds: float

    @property
    def copied(self) -> int:
        return self.tensors - len(self.changed)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "copied": self.copied}


def fuse(
    base: Path | str,
    adapter: Path,
    out: Path,
    *,
    dtype: str | None = None,
    scale: float = 1.0,
    alpha: float | None = None,
    max_shard_size: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    adapter_config: Path | None = None,
    tied: str | None = None,
    again: bool = False,
    enable_lora: EnableLora | None = None,
) -> FuseReport:
    """Write base + adapter to ``out`` as a Hugging Face directory.

    Every touched weight becomes ``round(W + scale · s · B · A)``, rounded once to nearest even; the bytes
    do not depend on threads or chunks.

    Args:
        base: a model directory (safetensors or .bin, sharded or single), or a hub id.
        adapter: an adapter's directory or file, of any known format.
        out: the directory to make; it appears whole or not at all.
        dtype: ``bfloat16``, ``float16`` or ``float32`` for all floating tensors; the base's when None.
        scale: multiplies the adapter's own scale.
        alpha: LoRA's alpha, for formats that do not carry it.
        max_shard_size: bytes of a file; the base's own files when None.
        dry_run: check everything, write nothing.
        force: replace an existing model at ``out``.
        threads: threads that stream; one more than the cores when None.
        progress: called with bytes done and in all.
        adapter_config: the adapter's json, if it does not lie beside the weights.
        tied: what an update of an output head that is tied to the embedding does: ``untie`` or ``shared``.
        again: fuse an adapter although the base's provenance says that it holds it already.
        enable_lora: for loralib's MergedLinear, as :func:`graft.formats.read` takes it.
    Raises:
        GraftError: one message that says what is wrong and what mends it; nothing was written.
    """
    from . import formats

    started = time.perf_counter()
    _check_options(dtype, scale, max_shard_size, tied)
    adapter, out = Path(adapter), Path(out)
    found = inputs.open_base(base)
    inputs.spare_inputs(out, found.folder, adapter)
    if not dry_run:
        check_out(out, force=force)
    read = formats.read(adapter, alpha=alpha, config=adapter_config, enable_lora=enable_lora)
    identity = _identity(inputs.adapter_files(adapter, adapter_config), threads)
    _refuse_twice(found, identity, again)
    job = inputs.fit(found, read, scale=scale, choice=tied)
    wanted = Wanted(DTYPES[dtype] if dtype else None, max_shard_size, job.parts, job.added)
    plan = make_plan(found, job.adapter, wanted)
    try:
        loss = measure(plan)
        name = inputs.base_name(base, found, read.config.get("base_model_name_or_path"))
        work = _Work(found, name, adapter, read.format, identity, job, wanted, plan, loss)
        options: dict[str, object] = {"scale": scale, "alpha": alpha, "dtype": dtype, "tied": tied}
        options["max_shard_size"] = max_shard_size
        options["enable_lora"] = _switches(enable_lora)
        texts = work.texts(options)
        if not dry_run:
            _check_space(out, plan)
            with atomic_directory(out, force=force) as staging, output_errors(out):
                work.write(staging, texts, threads, progress)
    finally:
        plan.close()
    return work.report(out, texts, dry_run=dry_run, seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class _Texts:
    """The small text files, made before anything is written, so that they cannot fail after."""

    config: bytes | None
    card: str
    provenance: dict[str, object]
    copies: dict[str, Path]
    notes: list[str]


@dataclass(frozen=True)
class _Work:
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

    def texts(self, options: dict[str, object]) -> _Texts:
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
        if self.loss is not None and self.loss.measured > 0.25:
            notes.append(
                f"rounding takes {self.loss.measured:.0%} of the update (as a norm): it is small beside the "
                "weights. --dtype float32 keeps it all"
            )
        lines = [f"{len(self.plan.changed)} of {len(self.plan.shapes)} tensors changed", *notes]
        provenance: dict[str, object] = {
            "version": PROVENANCE,
            "graft": __version__,
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
        return _Texts(
            config, readme, provenance, card.small_files(self.base, self.adapter, bool(rows)), notes
        )

    def write(
        self,
        staging: Path,
        texts: _Texts,
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

    def _record(self, staging: Path, texts: _Texts, threads: int | None) -> None:
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

    def report(self, out: Path, texts: _Texts, *, dry_run: bool, seconds: float) -> FuseReport:
        options = texts.provenance["options"]
        assert isinstance(options, dict)
        return FuseReport(
            base=self.base_name,
            adapter=str(self.adapter),
            out=str(out),
            format=self.format,
            dry_run=dry_run,
            scale=float(options["scale"]),
            dtype=options["dtype"],
            tensors=len(self.plan.shapes),
            changed=self.plan.changed,
            bytes_written=self.plan.size,
            files=[s.name for s in self.plan.shards],
            loss=self.loss,
            notes=texts.notes,
            kernel=kernel.status(),
            seconds=seconds,
        )


def _switches(given: EnableLora | None) -> object:
    """``enable_lora`` as JSON holds it."""
    if isinstance(given, Mapping):
        return {name: list(on) for name, on in given.items()}
    return None if given is None else list(given)


def _told(total: int, length: int) -> dict[str, object]:
    return {"bytes": length, "checksum": inputs.hexadecimal(total, length)}


def _check_options(dtype: str | None, scale: float, max_shard_size: int | None, tied: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise GraftError(f"dtype {dtype!r} is not one of: {', '.join(DTYPES)}")
    if not math.isfinite(scale):
        raise GraftError(f"scale must be a finite number, got {scale}")
    if max_shard_size is not None and max_shard_size < 1:
        raise GraftError(f"max_shard_size must be a positive number of bytes, got {max_shard_size}")
    if tied not in (None, "untie", "shared"):
        raise GraftError(f"tied must be 'untie' or 'shared', got {tied!r}")


def _identity(files: list[Path], threads: int | None) -> dict[str, dict[str, object]]:
    return {path.name: inputs.digest(path, threads) for path in files}


def _refuse_twice(base: Checkpoint, identity: dict[str, dict[str, object]], again: bool) -> None:
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


def _check_space(out: Path, plan: Plan) -> None:
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    need = plan.size + 16 * CHUNK
    if free < need:
        raise OutputError(
            f"{out} needs {need / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; free some space, or "
            "name an output on another disk"
        )
