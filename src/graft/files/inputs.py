"""What the user named, resolved: a base directory, an adapter's files, an output that spares them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from .. import checksum
from ..adapter import Adapter
from ..bind import bind
from ..bind_names import unwrapped
from ..checkpoint import PIPELINE, Checkpoint
from ..errors import BaseMismatchError, FormatError, OutputError
from ..tensors import open_checkpoint, read_json
from . import heads, tied
from .experts import in_memory
from .packed import Both, Part
from .shards import Shard
from .sources import OpenFile
from .stream import stream

#: small files are also given their sha256, which other tools can check
_SMALL = 64 << 20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Job:
    """A base and an adapter that fit each other.

    Args:
        added: tensors that the output has and the base has not → the tensor they begin as.
        parts: tensors whose ΔW comes from another parameter's update.
        config: changes of config.json.
    """

    base: Checkpoint
    adapter: Adapter
    added: dict[str, str]
    parts: dict[str, Part | Both]
    config: dict[str, object]


def resolve_base(base: Path | str) -> Path:
    """A directory, or a hub id downloaded (or found in the cache) by huggingface_hub.

    Raises:
        FormatError: neither a directory nor a model that can be had.
    """
    path = Path(base)
    if path.exists() or not _HUB_ID.fullmatch(str(base)):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FormatError(
            f"{base} is not a directory here; to fetch it as a hub id, pip install huggingface-hub"
        ) from None
    try:
        return Path(snapshot_download(str(base), ignore_patterns=["*.gguf", "*.h5", "*.msgpack", "*.onnx"]))
    except Exception as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise FormatError(
            f"{base} is not a directory here and cannot be had from the hub: {why[0]}"
        ) from None


def spare_inputs(out: Path, base: Path, adapter: Path) -> None:
    """Refuse an output that is, holds, or lies inside an input.

    Raises:
        OutputError: naming both.
    """
    mine = out.resolve()
    for role, path in (("base", base), ("adapter", adapter)):
        theirs = path.resolve()
        if mine == theirs or mine.is_relative_to(theirs) or theirs.is_relative_to(mine):
            raise OutputError(f"the output {out} and the {role} {path} share files; choose another output")


def fit(base: Checkpoint, adapter: Adapter, *, scale: float, choice: str | None) -> Job:
    """Bind the adapter to the base's files: names, shapes, tied weights, packed experts.

    Raises:
        BaseMismatchError: it was not made for this base, or a choice is needed (``--tied``).
    """
    adapter = tied.scaled(adapter, scale)
    try:
        return _fit(base, adapter, base.shapes, choice)
    except BaseMismatchError as error:
        # Only now, because looking transformers' table up takes seconds.
        mapped = _fit_memory(base, adapter, choice)
        if mapped is None:
            raise BaseMismatchError(f"{error}{_quantised(base)}") from None
        return mapped


def _quantised(base: Checkpoint) -> str:
    """Why nothing fits a quantised base, whose names and shapes are its own."""
    told = base.config.get("quantization_config")
    if not isinstance(told, dict):
        return ""
    method = cast("dict[str, object]", told).get("quant_method", "no method given")
    return (
        f"\nThe base's config.json says that it is quantised ({method}): fuse into the unquantised base "
        "instead, or dequantise it first"
    )


def _fit_memory(base: Checkpoint, adapter: Adapter, choice: str | None) -> Job | None:
    """Bind under the names that the model has in memory; None if it does not fit those either."""
    memory = in_memory(base)
    if memory is None:
        return None
    try:
        job = _fit(base, adapter, memory.shapes, choice)
    except BaseMismatchError:
        return None
    moved, parts = memory.to_files(job.adapter)
    return replace(job, adapter=moved, parts={**job.parts, **parts})


def _fit(base: Checkpoint, adapter: Adapter, shapes: dict[str, tuple[int, ...]], choice: str | None) -> Job:
    """Bind to parameters of these names and shapes; a head that is tied or new is settled."""
    new = heads.new_tensors(adapter, shapes)
    if new:
        plain = {name: unwrapped(name) for name in new}
        adapter, new = adapter.renamed(lambda name: plain.get(name, name)), list(plain.values())
        grown = {**shapes, **{name: tuple(adapter.replace[name].shape) for name in new}}
        job = _fit(base, adapter, grown, choice)
        origin = next(iter(base.entries))
        notes = (*job.adapter.notes, heads.note_of(adapter, new))
        return replace(
            job,
            adapter=replace(job.adapter, notes=notes),
            added={**job.added, **dict.fromkeys(new, origin)},
            config={**job.config, **heads.config_of(adapter, new)},
        )
    try:
        bound = tied.without_copies(bind(adapter, shapes, config=base.config), base, {})
        bound = replace(bound, notes=(*bound.notes, *tied.notes_of(bound, base)))
        return Job(base, bound, {}, {}, {})
    except BaseMismatchError:
        head = tied.absent_head(adapter, shapes)
        if head is None:
            raise
    bound = bind(adapter, {**shapes, head[0]: shapes[head[1]]}, config=base.config)
    settled = tied.settle(tied.without_copies(bound, base, dict([head])), *head, choice, base)
    notes = (*settled.adapter.notes, *settled.notes)
    return Job(
        base,
        replace(settled.adapter, notes=notes),
        dict(settled.added),
        dict(settled.both),
        dict(settled.config),
    )


def open_base(base: Path | str) -> Checkpoint:
    """:func:`resolve_base`, then :func:`graft.tensors.open_checkpoint`."""
    return open_checkpoint(resolve_base(base))


def digest(path: Path, threads: int | None = None) -> dict[str, object]:
    """Size and hashes of a file."""
    size = path.stat().st_size
    told: dict[str, object] = {"bytes": size, "checksum": file_checksum(path, threads)}
    if size <= _SMALL:
        told["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return told


def digest_bytes(data: bytes) -> dict[str, object]:
    """As :func:`digest`, of bytes at hand."""
    part = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    told: dict[str, object] = {
        "bytes": len(data),
        "checksum": hexadecimal(checksum.update(part, 0), len(data)),
    }
    told["sha256"] = hashlib.sha256(data).hexdigest()
    return told


def file_checksum(path: Path, threads: int | None = None) -> str:
    """:mod:`graft.checksum` of a file's bytes, as 16 hexadecimal digits."""
    file, size = OpenFile(path), path.stat().st_size
    shard = Shard(path.name, size, b"", file, [], 0)
    try:
        stream([shard], lambda *_: None, threads=threads if size > _SMALL else 1)
    finally:
        file.close()
    return hexadecimal(shard.read, size)


def hexadecimal(total: int, length: int) -> str:
    """A stream's hash as it is recorded."""
    return f"{checksum.finish(total & (1 << 64) - 1, length):016x}"


def base_name(given: Path | str, base: Checkpoint, told: object = None) -> str:
    """The base's name for people and for the hub: an id if one is known, else the directory's name.

    ``told`` is what the adapter calls its base. It is asked before the base's own ``_name_or_path``, which
    in files that were trained further names what they were made from.
    """
    if not Path(given).exists():
        return str(given)
    for part in (*base.folder.absolute().parts[::-1],):
        if part.startswith("models--") and part.count("--") >= 2:
            return part.removeprefix("models--").replace("--", "/", 1)
    for said in (told, base.config.get("_name_or_path")):
        if isinstance(said, str) and _HUB_ID.fullmatch(said) and not Path(said).exists():
            return said
    return base.folder.resolve().name


def fused_before(base: Checkpoint) -> list[dict[str, object]]:
    """The adapters that the base already holds, by its own provenance.

    A pipeline's models may have been fused each on its own, and a model as a part of its pipeline.
    """
    folders = [base.folder, *(part.folder for part in base.parts.values())]
    if (base.folder.parent / PIPELINE).exists():
        folders.append(base.folder.parent)
    found: list[dict[str, object]] = []
    for path in (folder / "graft.json" for folder in folders):
        fused = read_json(path).get("fused") if path.exists() else None
        found += [one for one in fused if isinstance(one, dict)] if isinstance(fused, list) else []
    return found
