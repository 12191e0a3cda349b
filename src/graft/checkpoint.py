"""A Hugging Face model directory, read from its headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch

from .errors import FormatError, Problems
from .mapped import load_file
from .pickled import load_tensors
from .safetensors_header import Entry, Header, read_header, refuse_stub
from .weight_names import WeightNames, places, refuse_several, variants

_PLAIN = WeightNames()
SINGLE, INDEX = _PLAIN.single, _PLAIN.index
#: what makes a directory a diffusers pipeline, whose models lie in folders of their own
PIPELINE = "model_index.json"


@dataclass(frozen=True)
class Checkpoint:
    """The stored tensors of a model directory, or of a pipeline's models together.

    Args:
        folder: the directory.
        entries: every tensor by name, in the order of the files and of their data; a pipeline's names begin
            with the component (``unet.``).
        config: ``config.json``, or ``{}``; a pipeline's is ``model_index.json``.
        headers: the safetensors files' headers by their path in the folder, in order; none for pickled files.
        index: the index file's own fields besides ``weight_map`` (``metadata``), or ``{}``.
        names: what its weight files are called.
        parts: a pipeline's models, by component; each is a checkpoint of its own.
    """

    folder: Path
    entries: dict[str, Entry]
    config: dict[str, object]
    headers: dict[str, Header]
    index: dict[str, object]
    names: WeightNames = _PLAIN
    parts: Mapping[str, Checkpoint] = field(default_factory=dict[str, "Checkpoint"])
    _loaded: dict[Path, dict[str, torch.Tensor]] = field(
        default_factory=dict[Path, "dict[str, torch.Tensor]"]
    )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def pickled(self) -> bool:
        """Whether the weights are .bin files, whose tensors have no place of their own in the file."""
        return not self.headers

    @property
    def models(self) -> dict[str, Checkpoint]:
        """The models in the directory by their folder in it: a pipeline's, or itself under ``""``."""
        return dict(self.parts) or {"": self}

    def place(self, file: Path) -> str:
        """A file's path in the directory."""
        return file.relative_to(self.folder).as_posix()

    def stored_name(self, name: str) -> str:
        """What a tensor is called in its own file."""
        return name.partition(".")[2] if self.parts else name

    @property
    def files(self) -> list[Path]:
        """The weight files, in order."""
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file (not read until used; do not write to it)."""
        if self.parts:
            component, _, inner = name.partition(".")
            return self.parts[component].read(inner)
        entry = self.entries[name]
        if self.pickled:
            return self._loaded[entry.file][name]
        if entry.file not in self._loaded:
            self._loaded[entry.file] = load_file(entry.file)
        return self._loaded[entry.file][name]


def open_model(folder: Path) -> Checkpoint:
    """Read the headers of one model's directory: single or sharded, safetensors or .bin (weights_only).

    Raises:
        FormatError: no weights, missing or damaged shards, an index that disagrees with them or names
            files outside the folder, pickles that hold more than tensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        why = "is not a directory" if folder.exists() else "does not exist"
        raise FormatError(f"{folder} {why}; give the directory of a model in Hugging Face layout")
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    for names, single, index in places(folder):
        if names.variant:
            refuse_several(folder, variants(folder))
        if (folder / single).exists():
            return _collect(folder, config, names, [single], None)
        if (folder / index).exists():
            table = read_json(folder / index)
            return _collect(folder, config, names, _shards(folder / index, table), table)
    raise FormatError(_nothing_found(folder))


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        FormatError: unreadable, empty, a Git LFS pointer, no JSON, or no object.
    """
    try:
        data = path.read_bytes()
        refuse_stub(path, data[:32], len(data))
        value: object = json.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}. Download it again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds no JSON object")
    return cast("dict[str, object]", value)


def _nothing_found(folder: Path) -> str:
    there = sorted(p.name for p in folder.iterdir())
    if "adapter_config.json" in there or "adapter_model.safetensors" in there:
        return f"{folder} is an adapter, not a base model. The order is: graft fuse BASE ADAPTER -o OUT"
    seen = ", ".join(there[:8]) or "nothing"
    wanted = ", ".join(name for _, *names in places(folder) for name in names)
    return f"{folder} holds no weights: looked for {wanted}; found {seen}"


def _shards(path: Path, table: dict[str, object]) -> list[str]:
    """The shard files that an index names, in order, each checked to be a plain name in the folder."""
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path} has no weight_map; download the index again")
    named = cast("dict[str, object]", weight_map).values()
    names = list(dict.fromkeys(name if isinstance(name, str) else repr(name) for name in named))
    problems = Problems(FormatError, f"{path} does not fit its folder:")
    for name in names:
        if name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
            problems.add(f"it names a file outside the folder: {name!r}")
        elif not (path.parent / name).exists():
            problems.add(f"shard {name} is missing")
    problems.raise_if_any("Download the missing shards again, or use an index that belongs to them.")
    return sorted(names)


def _collect(
    folder: Path,
    config: dict[str, object],
    names: WeightNames,
    files: list[str],
    table: dict[str, object] | None,
) -> Checkpoint:
    """Open every file, and check that the index and the files name the same tensors."""
    weight_map = cast("dict[str, str]", (table or {}).get("weight_map", {}))
    problems = Problems(FormatError, f"{folder}: the index and the shards disagree:")
    entries: dict[str, Entry] = {}
    headers: dict[str, Header] = {}
    loaded: dict[Path, dict[str, torch.Tensor]] = {}
    for file in files:
        path = folder / file
        if file.endswith(".safetensors"):
            headers[file] = read_header(path)
            found: tuple[Entry, ...] = headers[file].entries
        else:
            loaded[path] = load_tensors(path)
            found = tuple(_pickled_entry(path, name, t) for name, t in loaded[path].items())
        for entry in found:
            if table is not None and weight_map.get(entry.name) != file:
                said = weight_map.get(entry.name)
                problems.add(f"{entry.name} is in {file}, the index says {said or 'nothing of it'}")
            entries[entry.name] = entry
    for name, file in weight_map.items():
        if name not in entries:
            problems.add(f"{name} is not in {file}")
    problems.raise_if_any("Download the model again.")
    if not entries:
        raise FormatError(f"{folder}: {', '.join(files)} holds no tensors")
    if headers and loaded:
        raise FormatError(
            f"{folder}: the index mixes safetensors and pickled shards; convert the model first"
        )
    index = {key: value for key, value in (table or {}).items() if key != "weight_map"}
    return Checkpoint(folder, entries, config, headers, index, names, _loaded=loaded)


def _pickled_entry(path: Path, name: str, tensor: torch.Tensor) -> Entry:
    return Entry(name, tuple(tensor.shape), tensor.dtype, path, -1, tensor.numel() * tensor.element_size())
