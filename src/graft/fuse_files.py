"""Fuse an adapter into a model, file to file, without ever loading the model.

The plan comes from headers alone. Then each output file is a stream of aligned chunks: untouched bytes
are copied, touched elements become W + ΔW rounded once, and both inputs and outputs are hashed on the
way. Memory is a few chunks and the thin factors of the tensors in work, whatever the model's size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import fingerprint, kernel
from .errors import GraftError
from .files import inputs
from .files.loss import Loss, measure
from .files.plan import Wanted, make_plan
from .files.work import Texts, Work, check_space, identity_of, refuse_twice
from .formats.protocol import EnableLora
from .tensors import atomic_directory, check_out, output_errors

#: dtypes that a fused model can be rounded to
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
    other_base: bool = False,
    enable_lora: EnableLora | None = None,
    component: str | None = None,
) -> FuseReport:
    """Write base + adapter to ``out`` as a Hugging Face directory, of a model or of a diffusers pipeline.

    Every touched weight becomes ``round(W + scale · s · B · A)``, rounded once to nearest even; the bytes
    do not depend on threads or chunks.

    Args:
        base: a model directory (safetensors or .bin, sharded or single), a diffusers pipeline (with
            ``model_index.json``), or a hub id.
        adapter: an adapter's directory or file, of any known format.
        out: the directory to make; it appears whole or not at all.
        dtype: ``bfloat16``, ``float16`` or ``float32`` for all floating tensors; the base's when None.
        scale: multiplies the adapter's own scale.
        alpha: LoRA's alpha, for formats that do not carry it.
        max_shard_size: bytes of a file; the base's own files when None.
        dry_run: check everything, write nothing.
        force: replace an existing model at ``out``.
        threads: threads that stream; two more than the cores when None.
        progress: called with bytes done and in all.
        adapter_config: the adapter's json, if it does not lie beside the weights.
        tied: what an update of an output head that is tied to the embedding does: ``untie`` or ``shared``.
        again: fuse an adapter although the base's provenance says that it holds it already.
        other_base: fuse into this base although the adapter's fingerprints name another.
        enable_lora: for loralib's MergedLinear, as :func:`graft.formats.read` takes it.
        component: fuse only the adapter's part for this model of a pipeline (``unet``, ``text_encoder``).
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
    read = formats.read(
        adapter,
        alpha=alpha,
        config=adapter_config,
        enable_lora=enable_lora,
        model=found.config or None,
        component=component,
    )
    identity = identity_of(read.files, threads)
    refuse_twice(found, identity, again)
    job = inputs.fit(found, read, scale=scale, choice=tied)
    if not other_base:
        fingerprint.check(job.adapter.base, lambda name: found.read(name) if name in found.entries else None)
    wanted = Wanted(DTYPES[dtype] if dtype else None, max_shard_size, job.parts, job.added)
    plan = make_plan(found, job.adapter, wanted)
    try:
        loss = measure(plan)
        name = inputs.base_name(base, found, read.config.get("base_model_name_or_path"))
        work = Work(found, name, adapter, read.format, identity, job, wanted, plan, loss)
        options: dict[str, object] = {"scale": scale, "alpha": alpha, "dtype": dtype, "tied": tied}
        options["max_shard_size"] = max_shard_size
        options["enable_lora"] = _switches(enable_lora)
        options["component"] = component
        texts = work.texts(options)
        if not dry_run:
            check_space(out, plan)
            with atomic_directory(out, force=force) as staging, output_errors(out):
                work.write(staging, texts, threads, progress)
    finally:
        plan.close()
    return _report(work, texts, out, dry_run=dry_run, seconds=time.perf_counter() - started)


def _report(work: Work, texts: Texts, out: Path, *, dry_run: bool, seconds: float) -> FuseReport:
    """What the user is told."""
    options = texts.provenance["options"]
    assert isinstance(options, dict)
    return FuseReport(
        base=work.base_name,
        adapter=str(work.adapter),
        out=str(out),
        format=work.format,
        dry_run=dry_run,
        scale=float(options["scale"]),
        dtype=options["dtype"],
        tensors=len(work.plan.shapes),
        changed=work.plan.changed,
        bytes_written=work.plan.size,
        files=[s.name for s in work.plan.shards],
        loss=work.loss,
        notes=texts.notes,
        kernel=kernel.status(),
        seconds=seconds,
    )


def _switches(given: EnableLora | None) -> object:
    """``enable_lora`` as JSON holds it."""
    if isinstance(given, Mapping):
        return {name: list(on) for name, on in given.items()}
    return None if given is None else list(given)


def _check_options(dtype: str | None, scale: float, max_shard_size: int | None, tied: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise GraftError(f"dtype {dtype!r} is not one of: {', '.join(DTYPES)}")
    if not math.isfinite(scale):
        raise GraftError(f"scale must be a finite number, got {scale}")
    if max_shard_size is not None and max_shard_size < 1:
        raise GraftError(f"max_shard_size must be a positive number of bytes, got {max_shard_size}")
    if tied not in (None, "untie", "shared"):
        raise GraftError(f"tied must be 'untie' or 'shared', got {tied!r}")
