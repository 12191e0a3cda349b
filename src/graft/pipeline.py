"""A diffusers pipeline: several models in folders of one directory, read as one checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from .checkpoint import PIPELINE, Checkpoint, open_model, read_json
from .errors import FormatError, Problems
from .safetensors_header import Entry, Header
from .weight_names import SUFFIXES


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a directory: a model's, or a diffusers pipeline's with all its models.

    Raises:
        FormatError: as :func:`graft.checkpoint.open_model` and :func:`open_pipeline` raise it.
    """
    folder = Path(folder)
    return open_pipeline(folder) if (folder / PIPELINE).exists() else open_model(folder)


def open_pipeline(folder: Path) -> Checkpoint:
    """All models of a pipeline as one checkpoint, whose names begin with the component (``unet.``).

    Components without weights (schedulers, tokenizers) are no part of it.

    Raises:
        FormatError: a component that is missing, or whose weights cannot be read.
    """
    config = read_json(folder / PIPELINE)
    problems = Problems(FormatError, f"{folder} is not a whole pipeline:")
    parts: dict[str, Checkpoint] = {}
    for component in _components(config):
        place = folder / component
        if place.parent != folder or place.name in ("", ".", ".."):
            problems.add(f"{PIPELINE} names a component outside the folder: {component!r}")
        elif not place.is_dir():
            problems.add(f"the component {component} is missing")
        elif any(path.suffix in SUFFIXES for path in place.iterdir()):
            parts[component] = open_model(place)
    problems.raise_if_any("Download the pipeline again, or give one of its models' folders as the base.")
    if not parts:
        raise FormatError(f"{folder}: none of the components in {PIPELINE} holds weights")
    entries: dict[str, Entry] = {}
    headers: dict[str, Header] = {}
    for component, part in parts.items():
        entries |= {f"{component}.{n}": _under(component, entry) for n, entry in part.entries.items()}
        for file, header in part.headers.items():
            mine = tuple(_under(component, entry) for entry in header.entries)
            headers[f"{component}/{file}"] = replace(header, entries=mine)
    return Checkpoint(folder, entries, config, headers, {}, parts=parts)


def _components(config: Mapping[str, object]) -> Iterator[str]:
    """The components that a pipeline has: ``name: [library, class]``; what it does without is null."""
    for name, value in config.items():
        if isinstance(value, list) and len(value) == 2 and value[1] is not None:  # pyright: ignore[reportUnknownArgumentType]
            yield name


def _under(component: str, entry: Entry) -> Entry:
    return replace(entry, name=f"{component}.{entry.name}")
