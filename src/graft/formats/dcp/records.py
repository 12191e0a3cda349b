"""The pickle ``.metadata`` of a DCP directory, read as plain records.

``torch.load(weights_only=True)`` does not read this file, whose classes are DCP's own. Here no class of the
file is imported and none of its functions is called: objects of the allowed packages become :class:`Record`,
shapes become tuples, dtypes are looked up in a table, and every other name is refused.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from ...errors import FormatError

#: packages whose objects stand in such metadata; megatron-core's are empty classes of older versions
_ALLOWED = (
    "torch.distributed.checkpoint", "torch.distributed._shard", "megatron.core.dist_checkpointing", "pathlib",
)  # fmt: skip
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class Record:
    """An object of the file as its fields; calling its class or setting its state does nothing else."""

    def __new__(cls, *_: object, **__: object) -> Record:
        found = super().__new__(cls)
        found.fields, found.state = {}, None
        return found

    fields: dict[str, Any]
    state: object

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state
        if isinstance(state, dict):
            self.fields = state

    def get(self, name: str) -> Any:
        """A field; None if the object has none of this name."""
        return self.fields.get(name)


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: Path) -> None:
        super().__init__(io.BytesIO(data))
        self.where = where

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "torch":
            if global_name == "Size":
                return tuple
            if global_name in _DTYPES:
                return _DTYPES[global_name]
        if (module_name, global_name) == ("torch.serialization", "_get_layout"):
            return Record
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return OrderedDict
        if any(module_name == one or module_name.startswith(f"{one}.") for one in _ALLOWED):
            return Record
        raise FormatError(
            f"{self.where} holds more than the metadata of a checkpoint ({module_name}.{global_name}), and "
            "loading it could run code. Nothing was run"
        )


def load_records(path: Path) -> Record:
    """The metadata object of the file.

    Raises:
        FormatError: damaged, or a name that has no place in metadata.
    """
    try:
        found: object = _Unpickler(path.read_bytes(), path).load()
    except FormatError:
        raise
    except Exception as error:
        raise FormatError(
            f"{path} is not readable metadata of a checkpoint: {error}; copy it again"
        ) from None
    if not isinstance(found, Record):
        raise FormatError(f"{path} holds a {type(found).__name__}, not the metadata of a checkpoint")
    return found
