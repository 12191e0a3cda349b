"""litgpt: ``lit_model.pth.lora`` with ``<module>.lora_A``; rank and alpha in ``hyperparameters.yaml``.

A is ``[r, in]``, B is ``[out, r]``, scale = lora_alpha / lora_r; q, k and v are fused
(:mod:`.litgpt_qkv`), and ``lora_query``, ``lora_key`` and ``lora_value`` say which of them are adapted. With
a Hugging Face base names become the base's.
Source: Lightning-AI/litgpt, ``lora.py``, ``finetune/lora.py``, ``scripts/merge_lora.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..adapter import Adapter, LowRank
from ..errors import FormatError
from .ledger import Ledger, listed
from .litgpt_names import GROUPED, HYPERPARAMETERS, MODULES, QKV, Family, family_of
from .litgpt_qkv import Block, Heads, blocks, cut, heads_of
from .protocol import Loss, Options, Target, Written
from .renames import Renames
from .source import Source

_CONFIGS = ("model_config.yaml", "lit_config.json")
_FLAGS = ("lora_query", "lora_key", "lora_value")
_KNOWN = Renames({name: name for name in (QKV, GROUPED, *MODULES)})
_OWN = Renames({name: name for name in MODULES})
_FUSED = Renames({QKV: GROUPED})


class LitgptFormat:
    """The format's entry in the registry."""

    name = "litgpt"

    def detect(self, source: Source) -> bool:
        """By content: LoRA's tensors are those of litgpt's modules, and not of the head alone."""
        modules = [key.rpartition(".")[0] for key in source.tensors if key.rpartition(".")[2] == "lora_A"]
        return any(name != "lm_head" and _KNOWN.ours(name) for name in modules)

    def read(self, source: Source, options: Options) -> Adapter:
        return _Reader.of(source, options).read()

    def losses(self, adapter: Adapter, target: Target) -> list[Loss]:
        from . import litgpt_writer

        return litgpt_writer.losses(adapter, target)

    def write(self, adapter: Adapter, path: Path, target: Target) -> Written:
        from . import litgpt_writer

        return litgpt_writer.write(adapter, path, target)


@dataclass
class _Reader:
    source: Source
    model: Mapping[str, object] | None
    family: Family | None
    hyper: Mapping[str, object]
    alpha: float
    enabled: tuple[int, ...] | None
    ledger: Ledger
    idle: list[str]

    @classmethod
    def of(cls, source: Source, options: Options) -> _Reader:
        hyper = source.settings(HYPERPARAMETERS) or {}
        alpha = hyper.get("lora_alpha")
        told = all(flag in hyper for flag in _FLAGS)
        if isinstance(alpha, (int, float)) and not isinstance(alpha, bool):
            options.refuse_unused("litgpt's hyperparameters.yaml and", alpha=True)
        else:
            alpha = options.alpha_for("litgpt", source.weights, "lora_alpha")
        on: object = [hyper[flag] for flag in _FLAGS] if told else options.enable_lora
        enabled = None
        if isinstance(on, Sequence) and not isinstance(on, str):
            enabled = tuple(n for n, one in enumerate(on) if one)
        ledger = Ledger(source.tensors, source.weights)
        return cls(source, options.model, family_of(options.model), hyper, float(alpha), enabled, ledger, [])

    def read(self) -> Adapter:
        self.ledger.check_tensors()
        self.ledger.problems.raise_if_any()
        sites: dict[str, LowRank] = {}
        for key in self.source.tensors:
            module, _, leaf = key.rpartition(".")
            if leaf != "lora_A" or _KNOWN.ours(module) is None:
                continue
            pair = self._pair(module)
            if pair is None:
                continue
            if _OWN.ours(module) is None:
                sites |= self._fused(module, *pair)
            elif pair[0].any() or pair[1].any():
                sites[f"{self._renamed(module)}.weight"] = self._site(*pair)
            else:
                self.idle.append(module)
        self.ledger.close(explain=_explain)
        found = Adapter(sites, format="litgpt", config=dict(self.hyper))
        return replace(found, notes=self._notes())

    def _pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        a, other = self.ledger.take(f"{module}.lora_A"), f"{module}.lora_B"
        if other not in self.source.tensors:
            self.ledger.problems.add(f"{module}.lora_A has no lora_B")
            return None
        b = self.ledger.take(other)
        fused = _OWN.ours(module) is None
        if (
            a.dim() != 2
            or b.dim() != 2
            or a.shape[0] % b.shape[1]
            or (a.shape[0] != b.shape[1] and not fused)
        ):
            self.ledger.problems.add(
                f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are not of one rank"
            )
            return None
        if self.hyper.get("lora_r", b.shape[1]) != b.shape[1]:
            self.ledger.problems.add(
                f"{module} is of rank {b.shape[1]}, {HYPERPARAMETERS} says lora_r: {self.hyper['lora_r']}"
            )
        return a, b

    def _site(self, a: torch.Tensor, b: torch.Tensor, rank: int | None = None) -> LowRank:
        return LowRank(a, b, self.alpha / (rank or b.shape[1]), fan_in_fan_out=False)

    def _renamed(self, module: str) -> str:
        if self.family is None:
            return module
        name = self.family.names.ours(module)
        if name is None:
            self.ledger.problems.add(f"{module}: a base of model_type {self._kind()} has no such module")
        return name or module

    def _kind(self) -> object:
        return (self.model or {}).get("model_type")

    def _fused(self, module: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, LowRank]:
        """The sites of q, k and v, or the one of the weight that holds them."""
        rank, heads = b.shape[1], self._heads()
        count = a.shape[0] // rank
        enabled = (0, 1, 2) if self.enabled is None and count == 3 else self.enabled
        if enabled is None:
            self.ledger.problems.add(
                f"{module}: {count} of q, k and v are adapted, and which is not told; put {HYPERPARAMETERS} "
                "beside the file, or give --enable-lora 1,0,1 (enable_lora=[True, False, True])"
            )
            return {}
        if len(enabled) != count or sum(heads.rows[j] for j in enabled) != b.shape[0]:
            self.ledger.problems.add(
                f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit "
                f"{' and '.join('qkv'[j] for j in enabled)} of {heads.rows} rows"
            )
            return {}
        grouped = _KNOWN.ours(module) != _renamed(module)
        found = blocks(a, b, enabled, heads, grouped=grouped)
        self.idle += [module] * (len(found) < len(enabled))
        return self._placed(module, found, rank, heads, grouped)

    def _placed(
        self, module: str, found: Sequence[Block], rank: int, heads: Heads, grouped: bool
    ) -> dict[str, LowRank]:
        sites: dict[str, LowRank] = {}
        if self.family is not None and len(self.family.qkv) == 3:
            first = 0
            for template, rows in zip(self.family.qkv, heads.rows, strict=True):
                pair = cut(found, first, first + rows)
                first += rows
                if pair is not None:
                    name = Renames({QKV: template}).ours(_renamed(module))
                    sites[f"{name}.weight"] = self._site(*pair, rank)
            return sites
        pair = cut(found, 0, sum(heads.rows))
        if pair is None:
            return {}
        name = module
        if self.family is not None:
            name = str(Renames({QKV: self.family.qkv[0]}).ours(_renamed(module)))
        a, b = pair
        if grouped or self.family is not None:
            b = torch.empty_like(b).index_copy_(0, heads.grouped(), b)
        return {f"{name}.weight": self._site(a, b, rank)}

    def _heads(self) -> Heads:
        if self.family is not None:
            return heads_of(self.model)
        config = self.source.settings(*_CONFIGS) or {}
        found = [config.get(name) for name in ("n_head", "n_query_groups", "n_embd", "head_size")]
        heads, groups, width, size = (n if isinstance(n, int) and n > 0 else None for n in found)
        size = size or (width // heads if width and heads else None)
        if not heads or not size:
            raise FormatError(
                f"{self.source.weights}: the rows of q, k and v are not told; give the base (--base BASE) or "
                f"put the run's {_CONFIGS[0]} beside it"
            )
        return Heads(heads, groups or heads, size)

    def _notes(self) -> tuple[str, ...]:
        notes: list[str] = []
        if self.family is None:
            notes.append("names are litgpt's own; a Hugging Face base (--base) translates them")
        if self.idle:
            notes.append(f"A and B are zero, as of a module that is not adapted: {listed(self.idle)}")
        return tuple(notes)


def _renamed(module: str) -> str:
    """The current name of q, k and v."""
    return _FUSED.theirs(module) or module


def _explain(key: str) -> str:
    module, _, leaf = key.rpartition(".")
    if leaf == "lora_B" and _KNOWN.ours(module) is not None:
        return "its lora_A is missing"
    return "not a tensor of litgpt's LoRA"
