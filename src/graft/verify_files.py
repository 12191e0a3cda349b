"""Prove that a directory is base + adapter: every byte computed again and compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from . import formats
from .checkpoint import Checkpoint, read_json
from .errors import FormatError, Problems, VerifyError
from .files import inputs
from .files.compare import MEND, Compared
from .files.plan import Plan, Wanted, make_plan
from .files.stream import stream
from .files.work import PROVENANCE
from .formats.protocol import EnableLora
from .fuse_files import DTYPES
from .tensors import open_checkpoint


@dataclass(frozen=True)
class VerifyReport:
    """What was proven.

    Args:
        tensors: all of them, equal bit for bit to what base and adapter give.
        recomputed: those that the adapter changes.
        files: files whose hashes are as recorded, outputs and inputs.
    """

    out: str
    base: str
    adapter: str
    tensors: int
    recomputed: int
    bytes_compared: int
    files: list[str]
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def verify(
    out: Path,
    base: Path | str,
    adapter: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    alpha: float | None = None,
    adapter_config: Path | None = None,
) -> VerifyReport:
    """Check ``out`` against base and adapter, with the options that its graft.json records.

    Untouched tensors must equal the base's bit for bit, touched ones ``round(W + ΔW)`` computed anew,
    and all files, inputs and outputs, must have the recorded hashes.

    Args:
        alpha: instead of the recorded one.
        adapter_config: as for :func:`graft.fuse_files.fuse`.
    Raises:
        VerifyError: naming the first tensors and files that differ.
        GraftError: inputs that cannot be read.
    """
    started = time.perf_counter()
    out, adapter = Path(out), Path(adapter)
    record = _record(out)
    found = inputs.open_base(base)
    said = _Options.of(_part(record, "options"), out / "graft.json")
    read = formats.read(
        adapter,
        alpha=said.alpha if alpha is None else alpha,
        config=adapter_config,
        enable_lora=said.enable_lora,
        model=found.config or None,
        component=said.component,
    )
    job = inputs.fit(found, read, scale=said.scale, choice=said.tied)
    wanted = Wanted(said.dtype, said.max_shard_size, job.parts, job.added)
    plan = make_plan(found, job.adapter, wanted)
    compared = Compared(open_checkpoint(out))
    try:
        compared.layout(plan)
        stream(plan.shards, compared, threads=threads, progress=progress)
    finally:
        plan.close()
        compared.close()
    compared.tensors()
    files = _hashes(record, out, found, read.files, plan, compared, threads)
    return VerifyReport(
        out=str(out),
        base=inputs.base_name(base, found, _part(record, "base").get("name")),
        adapter=str(adapter),
        tensors=len(plan.shapes),
        recomputed=len(plan.changed),
        bytes_compared=plan.size,
        files=files,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Options:
    """The options of the fuse, as its record has them."""

    scale: float
    alpha: float | None
    dtype: torch.dtype | None
    max_shard_size: int | None
    tied: str | None
    enable_lora: EnableLora | None
    component: str | None

    @classmethod
    def of(cls, told: Mapping[str, object], path: Path) -> _Options:
        """Read and check them.

        Raises:
            FormatError: a value that no fuse writes.
        """
        problems = Problems(FormatError, f"{path} is damaged:")

        def get(name: str, kinds: tuple[type, ...], default: object = None) -> Any:
            value = told.get(name, default)
            if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
                return value
            problems.add(f"option {name} is {value!r}")
            return None

        dtype = get("dtype", (str,))
        if dtype is not None and dtype not in DTYPES:
            problems.add(f"option dtype is {dtype!r}")
        found = cls(
            float(get("scale", (int, float), 1.0) or 0.0),
            get("alpha", (int, float)),
            DTYPES.get(str(dtype)),
            get("max_shard_size", (int,)),
            get("tied", (str,)),
            get("enable_lora", (list, dict)),
            get("component", (str,)),
        )
        problems.raise_if_any(MEND)
        return found


def _hashes(
    record: Mapping[str, object],
    out: Path,
    base: Checkpoint,
    adapter: Sequence[Path],
    plan: Plan,
    compared: Compared,
    threads: int | None,
) -> list[str]:
    """Compare every file's hash with the recorded one; the names of all that agree.

    Raises:
        VerifyError: naming those that do not.
    """
    known = {
        **{out / s.name: inputs.hexadecimal(compared.sums.get(s.name, 0), s.size) for s in plan.shards},
        **{
            base.folder / s.name: inputs.hexadecimal(s.read, s.size)
            for s in plan.shards
            if s.background is not None
        },
    }
    problems = Problems(VerifyError, f"hashes differ from those recorded in {out / 'graft.json'}:")
    agree: list[str] = []

    def check(role: str, folder: Path, name: str, told: object) -> None:
        path = folder / name
        want = told.get("checksum") if isinstance(told, dict) else None
        if Path(name).is_absolute() or ".." in Path(name).parts:
            problems.add(f"{role} {name!r} lies outside the folder")
        elif not path.exists():
            problems.add(f"{role} {name} is missing")
        elif want != (known.get(path) or inputs.file_checksum(path, threads)):
            problems.add(f"{role} {name}")
        else:
            agree.append(f"{role} {name}")

    for name, told in _part(_part(record, "output"), "files").items():
        check("output", out, name, told)
    for name, told in _part(_part(record, "base"), "files").items():
        check("base", base.folder, name, told)
    recorded = list(_part(_part(record, "adapter"), "files").values())
    for path, told in zip(adapter, recorded, strict=False):
        check("adapter", path.parent, path.name, told)
    problems.raise_if_any("A file was edited after the fuse, or these are not the inputs it was made from.")
    return agree


def _record(out: Path) -> dict[str, object]:
    if not out.is_dir():
        raise FormatError(f"{out} is not a directory; give what graft fuse wrote")
    if not (out / "graft.json").exists():
        raise FormatError(f"{out} has no graft.json, so graft fuse did not write it; it cannot be verified")
    record = read_json(out / "graft.json")
    if record.get("version") != PROVENANCE:
        raise FormatError(
            f"{out / 'graft.json'} has version {record.get('version')!r}, this graft reads {PROVENANCE}; "
            "verify with the version that wrote it"
        )
    return record


def _part(table: Mapping[str, object], key: str) -> dict[str, object]:
    """A nested object of the record; empty if it is missing or something else."""
    value = table.get(key)
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}
