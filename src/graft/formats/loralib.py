"""Microsoft's loralib: ``loralib.lora_state_dict(model)`` saved with torch.save.

The file holds ``<module>.lora_A`` and ``<module>.lora_B`` (and biases), and says nothing of alpha, of the
module's class, or of MergedLinear's ``enable_lora``: alpha is asked for, the rest is decided by the base's
shapes when the adapter is bound. scale = alpha / r. A head that was trained beside LoRA may lie in the file
too, as in Microsoft's own files for GLUE (``examples/NLU/utils/split_lora.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..adapter import Adapter, LowRank
from ..errors import FormatError
from ..layout import Layout
from .ledger import Ledger, listed
from .nested import is_alone
from .protocol import Loss, Options, Target, Written
from .source import Source


class LoralibFormat:
    """The format's entry in the registry."""

    name = "loralib"

    def detect(self, source: Source) -> bool:
        """By content: tensors whose last name component is ``lora_A`` and ``lora_B``."""
        return {"lora_A", "lora_B"} <= {key.rpartition(".")[2] for key in source.tensors}

    def read(self, source: Source, options: Options) -> Adapter:
        return _read(source, options)

    def losses(self, adapter: Adapter, target: Target) -> list[Loss]:
        from . import loralib_writer

        return loralib_writer.losses(adapter)

    def write(self, adapter: Adapter, path: Path, target: Target) -> Written:
        from . import loralib_writer

        return loralib_writer.write(adapter, path)


def _read(source: Source, options: Options) -> Adapter:
    alpha = options.alpha_for("loralib", source.weights, "lora_alpha")
    ledger = Ledger(source.tensors, source.weights)
    ledger.check_tensors()
    ledger.problems.raise_if_any()
    sites: dict[str, LowRank] = {}
    replace: dict[str, torch.Tensor] = {}
    for key in source.tensors:
        module, _, leaf = key.rpartition(".")
        if leaf == "lora_A":
            if f"{module}.lora_B" not in source.tensors:
                ledger.take(key)
                ledger.problems.add(f"{key} has no lora_B")
                continue
            site = _site(ledger, module, options)
            if site is not None:
                sites[f"{module}.weight"] = site
        elif leaf == "lora_B":
            if f"{module}.lora_A" not in source.tensors:
                ledger.take(key)
                ledger.problems.add(f"{key} has no lora_A")
        else:
            replace[key] = ledger.take(key)
    others = [key for key in replace if not _is_bias(key)]
    if others and not is_alone(source.tensors):
        raise FormatError(
            f"{source.weights} holds a whole model ({len(others)} tensors besides LoRA's and biases: "
            f"{listed(others, 3)}); whether its weights already hold the update (loralib adds it on eval()) "
            "cannot be told, so save loralib.lora_state_dict(model) alone"
        )
    ledger.close()
    config: dict[str, object] = {"alpha": alpha}
    notes = ["loralib's files do not name the class of a module: it is told by the base's shapes"]
    if others:
        config["modules_to_save"] = sorted({_head(key) for key in others})
        notes.append(f"trained whole beside LoRA, as the file holds no other weights: {listed(others)}")
    return Adapter(sites, replace, format="loralib", config=config, notes=tuple(notes))


def _is_bias(key: str) -> bool:
    """loralib's own rule for ``bias="all"``."""
    return any("bias" in part for part in key.split("."))


def _head(key: str) -> str:
    """The module of the model that a full tensor lies in; ``module.`` in front is DataParallel's."""
    return key.removeprefix("module.").partition(".")[0]


def _blocks(module: str, options: Options) -> Sequence[bool] | None:
    """enable_lora of this module; a mapping names modules by the end of their dotted names."""
    given = options.enable_lora
    if not isinstance(given, Mapping):
        return given
    return next((on for name, on in given.items() if f".{module}".endswith(f".{name}")), None)


def _site(ledger: Ledger, module: str, options: Options) -> LowRank | None:
    a, b = ledger.take(f"{module}.lora_A"), ledger.take(f"{module}.lora_B")
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] % b.shape[1]:
        ledger.problems.add(
            f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not agree on the rank"
        )
        return None
    assert options.alpha is not None
    layout = None
    groups = a.shape[0] // b.shape[1]
    blocks = _blocks(module, options)
    if blocks is not None:
        enabled = tuple(i for i, on in enumerate(blocks) if on)
        if len(enabled) == groups and len(blocks) > 1:
            layout = Layout("(g o) i", len(blocks), enabled)
        elif groups > 1:
            ledger.problems.add(
                f"{module}: lora_A holds {groups} blocks, enable_lora={list(blocks)} enables {len(enabled)}"
            )
    return LowRank(a, b, options.alpha / b.shape[1], layout=layout, kind="loralib")
