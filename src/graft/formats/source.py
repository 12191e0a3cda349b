"""The files of one adapter, opened once and looked at by every format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch

from ..adapter import Beside
from ..errors import FormatError
from ..fingerprint import loads
from ..tensors import read_json
from .beside import PREFERRED, SUFFIXES, inside, preferred_in, twins, unread
from .container import Container, Opened
from .stored import Stored
from .training import is_training, split

CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """What a format's reader sees.

    Args:
        path: what the user named: a file or a directory.
        opened: the container that the tensors lie in.
        tensors: all of its tensors by key, on the CPU, mapped where the file allows.
        given: the configuration that the user named (``--adapter-config``), which stands for whatever
            configuration the format asks for.
        beside: the rest of the model, where the file holds a whole model as it was trained.
        notes: what the user must be told of the file.
    """

    path: Path
    opened: Opened
    tensors: Mapping[str, torch.Tensor]
    given: Path | None = None
    beside: Mapping[str, Beside] = field(default_factory=dict[str, Beside])
    notes: tuple[str, ...] = ()
    _used: dict[Path, Mapping[str, object]] = field(
        default_factory=dict[Path, "Mapping[str, object]"], repr=False
    )

    @property
    def weights(self) -> Path:
        """The file (or directory) that holds the tensors."""
        return self.opened.weights

    @property
    def kind(self) -> str:
        """The container's name: ``tensors`` for plain weight files."""
        return self.opened.kind

    @property
    def metadata(self) -> Mapping[str, object]:
        """What the container says beside its tensors, such as safetensors' metadata."""
        return self.opened.metadata

    @property
    def fingerprints(self) -> dict[str, str]:
        """Those of the base that Graft left in safetensors' metadata (:mod:`graft.fingerprint`)."""
        return loads({key: str(value) for key, value in self.metadata.items()})

    @property
    def config(self) -> Mapping[str, object] | None:
        """``adapter_config.json``; PEFT, MLX and AdapterHub use this name with three schemas."""
        return self.settings(CONFIG_NAME)

    @property
    def config_path(self) -> Path:
        """Where that json is or would be, for messages."""
        return self.where(CONFIG_NAME)

    def where(self, *names: str) -> Path:
        """The companion of the first of these names that exists; where it would be if none does."""
        if self.given is not None:
            return self.given
        places = [folder / name for name in names for folder in self.opened.folders]
        return next((place for place in places if place.is_file()), self.opened.folders[0] / names[0])

    def settings(self, *names: str) -> Mapping[str, object] | None:
        """The json or yaml companion of the first of these names that exists; None if there is none.

        Raises:
            FormatError: it cannot be read.
        """
        path = self.where(*names)
        if not path.is_file():
            return None
        if path not in self._used:
            yaml = path.suffix in (".yaml", ".yml")
            self._used[path] = _read_yaml(path) if yaml else read_json(path)
        return self._used[path]

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that was read so far: the weights first, then the companions."""
        return (*self.opened.files, *self._used)


def open_source(path: Path, container: Container, config: Path | None = None) -> Source:
    """Open one container; the adapter is taken out of a training run's whole state dict.

    Args:
        config: a configuration to use instead of the ones beside the weights.
    Raises:
        FormatError: a file that cannot be read.
    """
    opened = container.open(path)
    source = Source(path, opened, opened.tensors, config)
    whole = opened.whole
    if whole is None:
        if not is_training(opened.tensors, source.config):
            return source
        whole = {name: Stored.of(tensor) for name, tensor in opened.tensors.items()}
    parts = split(whole, opened.weights, source.config, opened.buffers)
    return replace(source, tensors=parts.tensors, beside=parts.beside, notes=parts.notes)


def find_source(
    path: Path,
    containers: Sequence[Container],
    recognised: Callable[[Source], bool],
    config: Path | None = None,
) -> Source:
    """Open the adapter that the user named: a file, or a directory that holds one.

    Args:
        containers: the known containers; the last takes any file.
        recognised: whether a format knows the source; asked only where a directory has several files.
        config: a configuration to use instead of the ones beside the weights.
    Raises:
        FormatError: no such path, no adapter or several, a file that cannot be read.
    """
    path = Path(path)
    if config is not None and not Path(config).is_file():
        raise FormatError(f"there is no adapter configuration at {config}; correct the path given")
    found, notes = _candidates(path, containers)
    if len(found) == 1:
        source = open_source(*found[0], config)
        return replace(source, notes=(*source.notes, *notes))
    known: list[Source] = []
    for place, container in found:
        try:
            source = open_source(place, container, config)
        except FormatError:
            continue  # a trainer's other files: optimizer states, schedulers
        if recognised(source):
            known.append(source)
    if len(known) == 1:
        return known[0]
    names = ", ".join(one.weights.name for one in known) or ", ".join(place.name for place, _ in found)
    what = "adapters" if known else "weight files"
    raise FormatError(f"{path} holds several {what} ({names}); name the adapter's file itself")


def _candidates(
    path: Path, containers: Sequence[Container]
) -> tuple[list[tuple[Path, Container]], list[str]]:
    """What may be the adapter, with the container that holds it; notes on what lies beside it."""
    if not path.exists():
        raise FormatError(f"there is no adapter at {path}; name an adapter file or directory that exists")
    preferred = preferred_in(path)
    twin = len(preferred) > 1 and twins(preferred)
    if len(preferred) > 1 and not twin:
        raise FormatError(
            f"{path} holds both {' and '.join(p.name for p in preferred)}, which may differ; "
            "name the one to use, or remove the other"
        )
    here = next((one for one in containers if not preferred and one.holds(path)), None)
    if here is not None:
        return [(path, here)], []
    places = preferred[:1] or sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if not places:
        raise FormatError(f"{path} holds no adapter weights ({' or '.join(PREFERRED[:2])}); {inside(path)}")
    notes = [f"{preferred[1].name} holds the same tensors as {preferred[0].name}"] if twin else []
    notes += unread(path, preferred) if preferred else []
    return [(place, next(one for one in containers if one.holds(place))) for place in places], notes


def _read_yaml(path: Path) -> Mapping[str, object]:
    """A YAML mapping, by PyYAML's safe loader.

    Raises:
        FormatError: unreadable, no mapping, or PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError:
        raise FormatError(f"{path} needs PyYAML to be read: pip install pyyaml") from None
    try:
        value: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FormatError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds no mapping of settings")
    return cast("dict[str, object]", value)
