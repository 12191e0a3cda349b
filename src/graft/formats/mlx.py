"""MLX (Apple's mlx-lm): ``adapters.safetensors`` and an ``adapter_config.json`` of its own schema.

``<module>.lora_a`` is ``[in, r]`` and ``.lora_b`` is ``[r, out]``: y += scale · (x·a)·b, where the
configuration's ``scale`` is the multiplier itself. Packed experts (``switch_mlp``) have ``[E, r, in]`` and
``[E, out, r]``; DoRA's magnitude is ``.m``. Names are those of the Hugging Face model, except that its
experts are stacked. Source: mlx-lm 0.32, ``tuner/lora.py``, ``tuner/dora.py``, ``tuner/utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from ..adapter import Adapter, LowRank
from ..bind_layouts import is_embedding
from ..errors import FormatError
from .ledger import Ledger
from .mlx_names import expert_name
from .protocol import Loss, Options, Target, Written
from .source import Source

_WRAPPED = frozenset({"linear", "embedding"})


class MlxFormat:
    """The format's entry in the registry."""

    name = "mlx"

    def detect(self, source: Source) -> bool:
        """By content: the schema of the json, or names that end in ``lora_a`` and ``lora_b``."""
        config = source.config or {}
        if "fine_tune_type" in config or "lora_parameters" in config:
            return True
        return {"lora_a", "lora_b"} <= {key.rpartition(".")[2] for key in source.tensors}

    def read(self, source: Source, options: Options) -> Adapter:
        options.refuse_unused("MLX", alpha=True, enable_lora=True)
        return _Reader(source).read()

    def losses(self, adapter: Adapter, target: Target) -> list[Loss]:
        from . import mlx_writer

        return mlx_writer.losses(adapter, target)

    def write(self, adapter: Adapter, path: Path, target: Target) -> Written:
        from . import mlx_writer

        return mlx_writer.write(adapter, path, target)


class _Reader:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.ledger = Ledger(source.tensors, source.weights)
        self.problems = self.ledger.problems
        self.sites: dict[str, LowRank] = {}
        self.replace: dict[str, torch.Tensor] = {}

    def read(self) -> Adapter:
        self.ledger.check_tensors()
        config = self._config()
        kind = config.get("fine_tune_type", "lora")
        if kind not in ("lora", "dora", "full"):
            self.problems.add(f"fine_tune_type {kind!r} of {self.source.config_path.name} is unknown")
        self.problems.raise_if_any()
        for key in self.source.tensors:
            module, _, leaf = key.rpartition(".")
            if leaf == "lora_a":
                self._site(module, kind == "dora", config)
            elif leaf == "lora_b" and f"{module}.lora_a" not in self.source.tensors:
                self.ledger.take(key)
                self.problems.add(f"{key} has no lora_a")
        for key in self.ledger.left():
            module, _, leaf = key.rpartition(".")
            if not leaf.startswith("lora_") and leaf != "m":
                parts = [part for part in module.split(".") if part not in _WRAPPED]
                self.replace[".".join((*parts, leaf))] = self.ledger.take(key)
        self.ledger.close(explain=lambda key: "not a tensor of mlx-lm's LoRA")
        return Adapter(
            self.sites, self.replace, format="mlx", config=dict(config), base=self.source.fingerprints
        )

    def _config(self) -> Mapping[str, object]:
        if self.source.config is None:
            raise FormatError(
                f"{self.source.weights} has MLX's tensor names but there is no "
                f"{self.source.config_path.name} beside it, which holds the scale; put it there or name it "
                "with --adapter-config"
            )
        return self.source.config

    def _settings(self, config: Mapping[str, object]) -> tuple[int | None, float]:
        found = config.get("lora_parameters")
        table = cast("Mapping[str, object]", found) if isinstance(found, Mapping) else {}
        scale, rank = table.get("scale"), table.get("rank")
        if not isinstance(scale, (int, float)) or isinstance(scale, bool):
            raise FormatError(
                f"{self.source.config_path}: lora_parameters.scale must be a number, got {scale!r}; add the "
                "value used in training (mlx-lm's default is 20)"
            )
        return (rank if isinstance(rank, int) else None), float(scale)

    def _site(self, module: str, dora: bool, config: Mapping[str, object]) -> None:
        rank, scale = self._settings(config)
        a = self.ledger.take(f"{module}.lora_a")
        if f"{module}.lora_b" not in self.source.tensors:
            self.problems.add(f"{module}.lora_a has no lora_b")
            return
        b = self.ledger.take(f"{module}.lora_b")
        magnitude = self._magnitude(module, dora)
        experts = a.dim() == 3
        ranks = (a.shape[-2], b.shape[-1]) if experts else (a.shape[-1], b.shape[0])
        fits = a.dim() == b.dim() in (2, 3) and (not experts or a.shape[0] == b.shape[0])
        if not fits or ranks[0] != ranks[1] or ranks[0] != (rank or ranks[0]):
            self.problems.add(
                f"{module}: lora_a {list(a.shape)} and lora_b {list(b.shape)} are not of one rank"
                + (f", {rank} by {self.source.config_path.name}" if rank else "")
            )
        elif experts:
            self._experts(module, a, b, scale)
        else:
            name = f"{module}.weight"
            kind = "embedding" if is_embedding(name) else "linear"
            self.sites[name] = LowRank(a.T, b.T, scale, magnitude=magnitude, kind=kind)

    def _experts(self, module: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        template = expert_name(module)
        if template is None:
            self.problems.add(f"{module}: stacked experts of a module that mlx-lm does not call switch_mlp")
            return
        for n in range(a.shape[0]):
            self.sites[f"{template.format(n)}.weight"] = LowRank(a[n], b[n], scale)

    def _magnitude(self, module: str, dora: bool) -> torch.Tensor | None:
        key = f"{module}.m"
        there = key in self.source.tensors
        if there != dora:
            said = "a DoRA magnitude, but fine_tune_type is not dora" if there else "missing, and it is dora"
            self.problems.add(f"{key}: {said}")
        if there and dora and is_embedding(f"{module}.weight"):
            self.problems.add(
                f"{key}: MLX's DoRA of an embedding has a norm for each token, which is not read"
            )
        return self.ledger.take(key) if there else None
