"""From headers alone: which bytes of which output file come from where, and what is done to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch

from ..adapter import Adapter
from ..checkpoint import Checkpoint
from ..dora import Dora, ReadRows
from ..dora import check as check_dora
from ..errors import FormatError, Problems, StateError
from ..rounding import WEIGHT_DTYPES
from ..safetensors_header import Entry, build_header, nbytes
from ..tensors import plan_shards
from .ops import Add, Cast, Deltas, Op, Rows, shift
from .packed import Both, Part
from .shards import Region, Shard
from .sources import FileSource, OpenFile, Source, TensorSource


@dataclass(frozen=True)
class Target:
    """One tensor of the output: its place in the output's order, its numbers' origin, its operation."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Source
    op: Op | None
    how: str
    entry: Entry | None


@dataclass
class Plan:
    """What will be written.

    Args:
        shards: output weight files in order.
        changed: tensor name → what is done to it; every other tensor is copied bit for bit.
        weight_map: tensor name → output file.
        same_layout: whether all output files have the base's names, headers and sizes.
    """

    shards: list[Shard]
    changed: dict[str, str]
    weight_map: dict[str, str]
    same_layout: bool
    shapes: dict[str, tuple[int, ...]]
    files: list[OpenFile]

    @property
    def size(self) -> int:
        return sum(s.size for s in self.shards)

    def close(self) -> None:
        for file in self.files:
            file.close()


@dataclass(frozen=True)
class Wanted:
    """What the user asked for, besides base and adapter."""

    dtype: torch.dtype | None = None
    max_shard_size: int | None = None
    #: tensors whose ΔW is not a site of their own: parts of packed parameters, tied weights
    parts: Mapping[str, Part | Both] = field(default_factory=dict[str, "Part | Both"])
    #: tensors that the output has and the base has not: name → the base's tensor it begins as
    added: Mapping[str, str] = field(default_factory=dict[str, str])


def make_plan(base: Checkpoint, adapter: Adapter, wanted: Wanted) -> Plan:
    """Lay out the output.

    Raises:
        FormatError, StateError: tensors that cannot be changed exactly (quantised, integer).
    """
    builder = _Builder(base, adapter, wanted)
    _refuse_quantised(base, adapter, wanted)
    targets = {name: builder.target(name, entry) for name, entry in base.entries.items()}
    for name, origin in wanted.added.items():
        targets[name] = builder.target(name, base.entries[origin])
    lost = sorted({*adapter.touched, *wanted.parts} - targets.keys())
    if lost:
        raise FormatError(
            f"the adapter changes {', '.join(lost[:5])}, for which the base's files have no place"
        )
    shards: list[Shard] = []
    same = True
    for file, names in _groups(base, targets, wanted.max_shard_size).items():
        shard, kept = builder.shard(file, [targets[n] for n in names])
        shards.append(shard)
        same = same and kept
    return Plan(
        shards=shards,
        changed={t.name: t.how for t in targets.values() if t.how},
        weight_map={r: s.name for s in shards for r in builder.order[s.name]},
        same_layout=same and [s.name for s in shards] == list(base.headers),
        shapes={t.name: t.shape for t in targets.values()},
        files=list(builder.files.values()),
    )


def _groups(
    base: Checkpoint, targets: Mapping[str, Target], max_shard_size: int | None
) -> dict[str, list[str]]:
    """Output file → tensor names: the base's own files unless a shard size is asked for."""
    found: dict[str, list[str]] = {}
    for folder, model in base.models.items():
        mine = {n: t for n, t in targets.items() if not folder or n.startswith(f"{folder}.")}
        for file, names in _files_of(model, mine, max_shard_size).items():
            found[f"{folder}/{file}" if folder else file] = names
    return found


def _files_of(
    model: Checkpoint, targets: Mapping[str, Target], max_shard_size: int | None
) -> dict[str, list[str]]:
    """One model's output files."""
    if max_shard_size is not None:
        sizes = {n: nbytes(t.shape, t.dtype) for n, t in targets.items()}
        return plan_shards(sizes, max_shard_size, model.names)
    by_file: dict[Path, list[str]] = {}
    last = model.files[-1]
    for name, target in targets.items():
        by_file.setdefault(target.entry.file if target.entry else last, []).append(name)
    if not model.pickled:
        return {model.place(file): names for file, names in by_file.items()}
    groups = list(by_file.values())
    if len(groups) == 1:
        return {model.names.single: groups[0]}
    return {model.names.shard(n, len(groups)): group for n, group in enumerate(groups, 1)}


class _Builder:
    def __init__(self, base: Checkpoint, adapter: Adapter, wanted: Wanted) -> None:
        self._base, self._adapter, self._wanted = base, adapter, wanted
        self._deltas = Deltas()
        self.files: dict[Path, OpenFile] = {}
        self.order: dict[str, list[str]] = {}

    def target(self, name: str, entry: Entry) -> Target:
        """What becomes of one stored tensor."""
        full = self._adapter.replace.get(name)
        shape = tuple(full.shape) if full is not None else entry.shape
        own = entry.dtype in WEIGHT_DTYPES
        dtype = self._wanted.dtype if own and self._wanted.dtype is not None else entry.dtype
        source = self._source(entry) if full is None else TensorSource(lambda: full, full.dtype)
        op, how = self._op(name, shape, source)
        if full is not None:
            how = f"replaced, then {how}" if how else "replaced"
            if full.dtype not in WEIGHT_DTYPES and full.dtype != dtype:
                raise FormatError(f"{name}: the adapter's full tensor is {full.dtype}, the base's is {dtype}")
        if source.dtype != dtype and op is None:
            op = Cast()
            how = how or f"rounded to {_short(dtype)}"
        return Target(name, shape, dtype, source, op, how, entry if name == entry.name else None)

    def shard(self, file: str, targets: list[Target]) -> tuple[Shard, bool]:
        """One output file, and whether its header is the base file's own."""
        self.order[file] = [t.name for t in targets]
        header = self._base.headers.get(file)
        kept = (
            header is not None
            and [e.name for e in header.entries] == [t.name for t in targets]
            and all(t.entry is not None and t.dtype == t.entry.dtype for t in targets)
            and all(t.entry is not None and t.shape == t.entry.shape for t in targets)
        )
        if kept and header is not None:
            head, background = header.raw, self._file(self._base.folder / file)
        else:
            told = header.metadata if header is not None else {"format": "pt"}
            stored = ((self._base.stored_name(t.name), t.shape, t.dtype) for t in targets)
            head, background = build_header(stored, told), None
        regions: list[Region] = []
        at = len(head)
        for t in targets:
            stop = at + nbytes(t.shape, t.dtype)
            if stop > at and (background is None or t.op is not None or t.how):
                own = background is not None and isinstance(t.source, FileSource)
                regions.append(Region(t.name, at, stop, t.dtype, t.source, t.op, own))
            at = stop
        return Shard(file, at, head, background, regions, at - len(head)), kept

    def _file(self, path: Path) -> OpenFile:
        return self.files.setdefault(path, OpenFile(path))

    def _source(self, entry: Entry) -> Source:
        if entry.offset < 0:
            return TensorSource(lambda: self._base.read(entry.name), entry.dtype)
        return FileSource(self._file(entry.file), entry.offset, entry.dtype)

    def _op(self, name: str, shape: tuple[int, ...], source: Source) -> tuple[Op | None, str]:
        adapter = self._adapter
        site, moved, rows = adapter.sites.get(name), adapter.shift.get(name), adapter.rows.get(name)
        part = self._wanted.parts.get(name)
        if sum(x is not None for x in (site, moved, rows, part)) > 1:
            raise FormatError(f"{name}: the adapter changes it in two ways at once, which is not supported")
        if part is not None:
            return Add(self._deltas.whole(part.delta), part.width), part.how
        if moved is not None:
            tensor, scale = moved
            return Add(self._deltas.whole(lambda: shift(tensor, scale)), tensor.numel()), "shifted"
        if rows is not None:
            indices, tensor = rows
            return Rows(indices, tensor, _row_size(shape)), f"{len(indices)} rows replaced"
        if site is None:
            return None, ""
        assert site.layout is not None
        if site.magnitude is None:
            width = site.layout.stored(shape)[1]
            return Add(self._deltas.of(site, shape), width), f"rank {site.rank}"
        check_dora(site, shape)
        read = _rows_of(source, site.layout.stored(shape)[1])
        return _DoraOp(self._deltas.kept(lambda: Dora(site, shape, read))), f"DoRA rank {site.rank}"


class _DoraOp:
    def __init__(self, dora: Callable[[], Dora]) -> None:
        self._dora = dora

    def apply(self, src: torch.Tensor, dst: torch.Tensor, start: int) -> int:
        return self._dora().add(src, dst, start=start)


def _rows_of(source: Source, width: int) -> ReadRows:
    def read(r0: int, r1: int) -> torch.Tensor:
        rows = torch.empty((r1 - r0) * width, dtype=source.dtype)
        source.read(r0 * width, rows)
        return rows.view(r1 - r0, width)

    return read


def _row_size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape[1:]:
        size *= n
    return size


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_quantised(base: Checkpoint, adapter: Adapter, wanted: Wanted) -> None:
    """Refuse to add to numbers that are not the weight's own.

    Raises:
        StateError: naming every tensor.
    """
    problems = Problems(StateError, "these tensors of the base cannot be changed exactly:")
    touched = {*adapter.sites, *adapter.shift, *adapter.rows, *wanted.parts}
    for name in sorted(touched & set(base.entries)):
        dtype = base.entries[name].dtype
        if dtype not in WEIGHT_DTYPES and name not in adapter.replace:
            problems.add(f"{name} is stored as {_short(dtype)}")
    problems.raise_if_any("Dequantise the base first (to bfloat16, say), then fuse into that.")
    for folder, model in base.models.items():
        told = model.config.get("quantization_config")
        method = cast("dict[str, object]", told).get("quant_method", "") if isinstance(told, dict) else ""
        if told and (wanted.dtype is not None or method == "bitsandbytes"):
            which = f"{folder}/config.json" if folder else "config.json"
            raise StateError(
                f"the base's {which} says that it is quantised ({method or 'no method given'}), so its "
                "numbers are not the weights. Fuse into the unquantised base instead, or dequantise it first"
            )
