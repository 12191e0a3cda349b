"""What the weight files of a model directory are called, by transformers and by diffusers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import FormatError

#: the stem of safetensors files → that of pickled ones
STEMS = {"model": "pytorch_model", "diffusion_pytorch_model": "diffusion_pytorch_model"}
#: how files end that hold weights, in whatever form
SUFFIXES = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz",
    ".onnx_data", ".mlmodel", ".tflite", ".ot", ".zip", ".tar", ".gz",
})  # fmt: skip
_STEM = "|".join(STEMS)
_VARIANT = re.compile(rf"({_STEM})(?:\.(\w+)\.safetensors|\.safetensors\.index\.(\w+)\.json)")


@dataclass(frozen=True)
class WeightNames:
    """The names of one model's safetensors files.

    Args:
        stem: ``model`` (transformers) or ``diffusion_pytorch_model`` (diffusers).
        variant: ``fp16`` in ``model.fp16.safetensors``; empty in the plain names.
    """

    stem: str = "model"
    variant: str = ""

    @property
    def single(self) -> str:
        """The one file of a model that is not sharded."""
        return f"{self._start}.safetensors"

    @property
    def index(self) -> str:
        """The index of a sharded model."""
        return ".".join(part for part in (self.stem, "safetensors.index", self.variant, "json") if part)

    def shard(self, number: int, count: int) -> str:
        """The name of one of several files; numbers begin with 1."""
        return f"{self._start}-{number:05}-of-{count:05}.safetensors"

    @property
    def _start(self) -> str:
        return f"{self.stem}.{self.variant}" if self.variant else self.stem


def places(folder: Path) -> list[tuple[WeightNames, str, str]]:
    """Where weights may lie: (names of safetensors, single file, index), in the order of preference.

    Plain names come first, then pickled files, then the one variant (``fp16``) that is there.
    """
    plain = [WeightNames(stem) for stem in STEMS]
    pickled = [(names, f"{STEMS[names.stem]}.bin") for names in plain]
    return [
        *((names, names.single, names.index) for names in plain),
        *((names, single, f"{single}.index.json") for names, single in pickled),
        *((names, names.single, names.index) for names in variants(folder)),
    ]


def variants(folder: Path) -> list[WeightNames]:
    """The names of a folder's variants, such as ``model.fp16.safetensors``."""
    found = [match for path in sorted(folder.iterdir()) if (match := _VARIANT.fullmatch(path.name))]
    return list(dict.fromkeys(WeightNames(match[1], match[2] or match[3]) for match in found))


def refuse_several(folder: Path, found: list[WeightNames]) -> None:
    """Refuse a folder that holds several variants and no plain weights.

    Raises:
        FormatError: naming them.
    """
    if len(found) > 1:
        names = ", ".join(names.single for names in found)
        raise FormatError(f"{folder} holds several variants of the weights ({names}); keep the one to use")
