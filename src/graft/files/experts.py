"""The names a model has in memory where its files have others (transformers 5).

transformers 5 keeps the experts of Mixtral-like models packed in one parameter, while their files hold
a tensor per expert, and it renames some modules on loading. An adapter made in memory speaks of the
former. transformers' own conversion table is read here, and its operations are followed on shapes
alone: each file tensor gets its place in the packed parameter, and with it its slice of ΔW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ..adapter import Adapter, LowRank
from ..checkpoint import Checkpoint
from ..errors import FormatError
from .packed import Part


@dataclass(frozen=True)
class Place:
    """Where a file tensor lies in a parameter: the corner, and the parameter's axis of each of its axes."""

    corner: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """A parameter as the model holds it, made of file tensors."""

    name: str
    shape: tuple[int, ...]
    places: dict[str, Place]

    def parts(self, site: LowRank) -> dict[str, Part]:
        """Each file tensor's part of the parameter's update.

        Raises:
            FormatError: an update that is no sum of plain rectangles in the file's tensors.
        """
        layout = site.layout
        assert layout is not None
        if site.magnitude is not None:
            raise FormatError(f"{self.name}: DoRA on packed parameters is not supported")
        joined = 2 if layout.pattern in ("g o i", "g i o") else 1
        found: dict[str, Part] = {}
        for file, place in self.places.items():
            rows, cols, flipped = _rectangle(place, self.shape, joined, f"{self.name}: {file}")
            found[file] = Part(site, self.name, self.shape, rows, cols, flipped)
        return found


@dataclass(frozen=True)
class Memory:
    """The base's parameters under the names that the model has in memory.

    Args:
        shapes: by those names.
        renamed: parameters that are one file tensor under another name: name → file tensor.
        packed: parameters made of several.
    """

    shapes: dict[str, tuple[int, ...]]
    renamed: dict[str, str]
    packed: dict[str, Packed]

    def to_files(self, adapter: Adapter) -> tuple[Adapter, dict[str, Part]]:
        """A bound adapter under the files' names, and the parts of its packed parameters.

        Raises:
            FormatError: full tensors or rows for a packed parameter.
        """
        parts: dict[str, Part] = {}
        sites = dict(adapter.sites)
        for name in [n for n in sites if n in self.packed]:
            parts.update(self.packed[name].parts(sites.pop(name)))
        for name in (*adapter.replace, *adapter.rows, *adapter.shift):
            if name in self.packed:
                raise FormatError(f"{name} is kept in parts by the files; only its ΔW can be fused")

        def own(name: str) -> str:
            return self.renamed.get(name, name)

        moved = replace(
            adapter,
            sites={own(n): v for n, v in sites.items()},
            replace={own(n): v for n, v in adapter.replace.items()},
            shift={own(n): v for n, v in adapter.shift.items()},
            rows={own(n): v for n, v in adapter.rows.items()},
            notes=(*adapter.notes, "names in memory were mapped to the files' by transformers' own table"),
        )
        return moved, parts


def in_memory(base: Checkpoint) -> Memory | None:
    """The base's parameters as transformers holds them; None where they are as in the files, or unknown."""
    rename = _table(base)
    if rename is None:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    renamed: dict[str, str] = {}
    groups: dict[str, dict[str, list[str]]] = {}
    converters: dict[str, Any] = {}
    for file in sorted(base.entries, key=_natural):
        name, pattern, converter = rename(file)
        if pattern is None:
            shapes[name] = base.entries[file].shape
            if name != file:
                renamed[name] = file
        else:
            groups.setdefault(name, {}).setdefault(pattern, []).append(file)
            converters[name] = converter
    packed: dict[str, Packed] = {}
    for name, by_pattern in groups.items():
        made = _follow(name, by_pattern, converters[name], base.shapes)
        if made is not None:
            packed[name] = made
            shapes[name] = made.shape
    return Memory(shapes, renamed, packed) if renamed or packed else None


def _table(base: Checkpoint) -> Callable[[str], tuple[str, str | None, Any]] | None:
    """transformers' renaming of one file key: (name in memory, source pattern if converted, converter)."""
    try:
        from transformers import conversion_mapping, core_model_loading
    except ImportError:
        return None
    mapping: list[Any] | None = _of_model(base)
    for key in _model_names(base.config):
        mapping = mapping or conversion_mapping.get_checkpoint_conversion_mapping(key)
    if not mapping:
        return None
    converters = [one for one in mapping if isinstance(one, core_model_loading.WeightConverter)]
    renamings = [one for one in mapping if not isinstance(one, core_model_loading.WeightConverter)]

    def rename(key: str) -> tuple[str, str | None, Any]:
        for one in renamings:
            key, _ = one.rename_source_key(key)
        for one in converters:
            name, pattern = one.rename_source_key(key)
            if pattern is not None:
                return name, pattern, one
        return key, None, None

    return rename


def _of_model(base: Checkpoint) -> list[Any] | None:
    """The table of the very model that the base is of, from its class without weights; None if unknown."""
    import transformers
    from transformers import conversion_mapping

    architectures = base.config.get("architectures")
    names = cast("list[object]", architectures) if isinstance(architectures, list) else []
    maker = getattr(transformers, str(names[0]), None) if names else None
    build: Any = getattr(conversion_mapping, "get_model_conversion_mapping", None)
    if maker is None or build is None:
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(str(base.folder), trust_remote_code=False)
        with torch.device("meta"):
            return list(build(maker(config)))
    except Exception:  # whatever a class does with an odd config: then the table goes by names
        return None


def _model_names(config: dict[str, object]) -> list[str]:
    """The keys under which transformers may keep a table for this model."""
    architectures = config.get("architectures")
    text = config.get("text_config")
    nested = cast("dict[str, object]", text).get("model_type") if isinstance(text, dict) else None
    names = [*(architectures if isinstance(architectures, list) else []), config.get("model_type"), nested]
    return [name for name in names if isinstance(name, str)]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """transformers' order of a file's tensors: numbers in names count as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _follow(
    name: str, by_pattern: dict[str, list[str]], converter: Any, shapes: dict[str, tuple[int, ...]]
) -> Packed | None:
    """Follow a conversion on shapes; None for operations other than stacking, joining and transposing."""
    table = {p: [_leaf(file, shapes[file]) for file in files] for p, files in by_pattern.items()}
    try:
        for op in converter.operations:
            kind = type(op).__name__
            if kind == "MergeModulelist":
                table = {p: [_stack(held, op.dim)] for p, held in table.items()}
            elif kind == "Concatenate":
                ordered = [one for p in converter.source_patterns for one in table.get(p, [])]
                table = {name: [_join(ordered, op.dim)]}
            elif kind == "Transpose" and not op.check_dims and len(table) == 1:
                table = {p: [_swap(held, op.dim0, op.dim1) for held in all_] for p, all_ in table.items()}
            else:
                return None
    except (IndexError, ValueError):
        return None
    found = [one for held in table.values() for one in held]
    return replace(found[0], name=name) if len(found) == 1 else None


def _leaf(file: str, shape: tuple[int, ...]) -> Packed:
    place = Place((0,) * len(shape), tuple(range(len(shape))), shape)
    return Packed(file, shape, {file: place})


def _stack(held: Sequence[Packed], dim: int) -> Packed:
    if len({one.shape for one in held}) != 1:
        raise ValueError("unequal shapes")
    shape = held[0].shape
    places = {
        file: Place(
            (*place.corner[:dim], n, *place.corner[dim:]),
            tuple(axis + (axis >= dim) for axis in place.axes),
            place.shape,
        )
        for n, one in enumerate(held)
        for file, place in one.places.items()
    }
    return Packed("", (*shape[:dim], len(held), *shape[dim:]), places)


def _join(held: Sequence[Packed], dim: int) -> Packed:
    first = held[0].shape
    if any(one.shape[:dim] + one.shape[dim + 1 :] != first[:dim] + first[dim + 1 :] for one in held):
        raise ValueError("unequal shapes")
    places: dict[str, Place] = {}
    at = 0
    for one in held:
        for file, place in one.places.items():
            corner = list(place.corner)
            corner[dim] += at
            places[file] = replace(place, corner=tuple(corner))
        at += one.shape[dim]
    return Packed("", (*first[:dim], at, *first[dim + 1 :]), places)


def _swap(one: Packed, a: int, b: int) -> Packed:
    order = list(range(len(one.shape)))
    order[a], order[b] = order[b], order[a]
    places = {
        file: Place(
            tuple(place.corner[k] for k in order), tuple(order.index(x) for x in place.axes), place.shape
        )
        for file, place in one.places.items()
    }
    return Packed(one.name, tuple(one.shape[k] for k in order), places)


def _rectangle(
    place: Place, shape: tuple[int, ...], joined: int, name: str
) -> tuple[tuple[int, int], tuple[int, int], bool]:
    """Rows and columns of the stored matrix that a file tensor holds, and whether it holds the transpose."""
    if len(place.shape) != 2 or len(shape) != joined + 1:
        raise FormatError(f"{name} is no matrix of the parameter's; fusing it is not supported")
    extent = dict(zip(place.axes, place.shape, strict=True))
    if set(extent) != {joined - 1, joined}:
        raise FormatError(f"{name} runs along other axes than the parameter's matrices")
    index = math.prod(shape[1:joined]) * place.corner[0] + place.corner[1] if joined == 2 else place.corner[0]
    rows = (index, index + extent[joined - 1])
    cols = (place.corner[joined], place.corner[joined] + extent[joined])
    return rows, cols, place.axes[0] == joined
