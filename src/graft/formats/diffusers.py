"""Hugging Face diffusers: the LoRA of a pipeline's models in one file (``pytorch_lora_weights``).

The scale of a module is alpha / r. alpha stands in the metadata ``lora_adapter_metadata``, PEFT's settings of
each component in one table, in a tensor of the module's own (``.alpha``, ``.network_alpha``), or nowhere:
then the scale is 1. Source: diffusers, ``loaders/peft.py`` and ``loaders/lora_base.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..adapter import Adapter, LowRank
from ..errors import FormatError
from ..fingerprint import loads
from . import diffusers_settings
from .diffusers_keys import COMFY, Key, parse
from .diffusers_settings import METADATA_KEY
from .ledger import Ledger, listed
from .peft.config import LoraSettings
from .protocol import Loss, Options, Target, Written
from .source import Source

#: how names of LyCORIS's other methods begin
_OTHERS = ("lokr_", "hada_")
_UNSCALED = "the file says no alpha, so the scale is 1, as ComfyUI and diffusers take it"


class DiffusersFormat:
    """The format's entry in the registry."""

    name = "diffusers"

    def detect(self, source: Source) -> bool:
        """By content: names of the first two eras; PEFT's names if they, or metadata, say a pipeline."""
        if source.config is not None and "peft_type" in source.config:
            return False
        keys = [key for key in map(parse, source.tensors) if key.role in ("A", "B")]
        comfy = any(key.component == COMFY for key in keys) or any(map(_other_method, source.tensors))
        if comfy or any(key.era < 3 for key in keys):
            return True
        return bool(keys) and (METADATA_KEY in source.metadata or all(map(_of_pipeline, keys)))

    def read(self, source: Source, options: Options) -> Adapter:
        options.refuse_unused("diffusers", alpha=True, enable_lora=True)
        adapter = _Reader(source).read()
        _refuse_other_base(adapter, options.model or {}, source)
        return adapter

    def losses(self, adapter: Adapter, target: Target) -> list[Loss]:
        from . import diffusers_writer

        return diffusers_writer.losses(adapter, target)

    def write(self, adapter: Adapter, path: Path, target: Target) -> Written:
        from . import diffusers_writer

        return diffusers_writer.write(adapter, path, target)


def _of_pipeline(key: Key) -> bool:
    """Whether the name begins with a component; ``transformer.h`` is GPT-2's own."""
    return bool(key.component) and not (key.component == "transformer" and key.module.startswith("h."))


def _refuse_other_base(adapter: Adapter, model: Mapping[str, object], source: Source) -> None:
    """Names of a denoiser for a model of transformers: such a base may itself begin with ``transformer``.

    Then they are PEFT's, without the configuration that says the scale.

    Raises:
        FormatError: the base is no model that the adapter could be for.
    """
    kind = model.get("model_type")
    text = any(name.startswith("text_encoder") for name in adapter.components)
    if isinstance(kind, str) and adapter.components and not text and METADATA_KEY not in source.metadata:
        names = ", ".join(sorted(adapter.components))
        raise FormatError(
            f"{source.weights} holds LoRA for {names} of a diffusers pipeline by its names, and the base is "
            f"a {kind}. If it is a PEFT adapter, put its {source.config_path.name}, which holds rank and "
            "alpha, beside it or name it with --adapter-config"
        )


@dataclass
class _Reader:
    source: Source
    modules: dict[tuple[str, str], dict[str, Key]] = field(
        default_factory=dict[tuple[str, str], "dict[str, Key]"]
    )
    shift: dict[str, tuple[torch.Tensor, float]] = field(
        default_factory=dict[str, "tuple[torch.Tensor, float]"]
    )

    def read(self) -> Adapter:
        """The adapter, every tensor accounted for.

        Raises:
            FormatError: all faults of the file.
        """
        self.ledger = Ledger(self.source.tensors, self.source.weights)
        self._collect()
        settings = diffusers_settings.read(self.source, {component for component, _ in self.modules})
        alphas = {roles["alpha"].text for roles in self.modules.values() if "alpha" in roles}
        if settings and alphas:
            self.ledger.problems.add(
                f"the scales are said twice, by {METADATA_KEY} and by {listed(sorted(alphas), 2)}"
            )
        self.ledger.check_tensors(numbers=alphas)
        sites: dict[str, LowRank] = {}
        # the model's authors may have named its modules: binding knows those names spelled with _
        flattened = any(component == COMFY for component, _ in self.modules)
        for (component, module), roles in self.modules.items():
            inner = module.replace(".", "_") if flattened else module
            name = f"{component}.{inner}".removeprefix(".")
            site = self._site(name, module, roles, settings.get(component))
            if f"{name}.weight" in sites:
                self.ledger.problems.add(
                    f"{name}: two modules of the file have this name when . is spelled _"
                )
            if site is not None:
                sites[f"{name}.weight"] = site
        self.ledger.close(explain=_explain)
        notes = [_UNSCALED] if flattened and not settings and not alphas else []
        silent = sorted({component for component, _ in self.modules} - settings.keys()) if settings else []
        told = {key: str(value) for key, value in self.source.metadata.items()}
        return Adapter(
            sites,
            shift=self.shift,
            format="diffusers",
            base=loads(told),
            components=frozenset(component for component, _ in self.modules if component),
            flattened=flattened,
            notes=(*notes, *(f"{METADATA_KEY} says nothing of {one}, so its scale is 1" for one in silent)),
        )

    def _collect(self) -> None:
        """Adapter tensors by component and module.

        Raises:
            FormatError: names with a component and names without.
        """
        for text in self.source.tensors:
            key = parse(text)
            if key.role == "plain":
                continue
            roles = self.modules.setdefault((key.component, key.module), {})
            if key.role in roles:
                self.ledger.take(text)
                self.ledger.problems.add(
                    f"{text} and {roles[key.role].text} are the same tensor of one module"
                )
            roles.setdefault(key.role, key)
        bare = [next(iter(roles.values())).text for (name, _), roles in self.modules.items() if not name]
        if bare and len(bare) < len(self.modules):
            raise FormatError(
                f"{self.source.weights} holds names that begin with a component and names that do not "
                f"({listed(bare, 3)}); save the parts in files of their own"
            )

    def _site(
        self, name: str, module: str, roles: dict[str, Key], settings: LoraSettings | None
    ) -> LowRank | None:
        """One module's update; a fault is recorded."""
        alpha = self.ledger.number(roles["alpha"].text) if "alpha" in roles else None
        given = {role: self.ledger.take(key.text) for role, key in roles.items() if role != "alpha"}
        if "A" not in given or "B" not in given:
            there = next(iter(roles.values())).text
            self.ledger.problems.add(f"{there}: its module has no {'A' if 'A' not in given else 'B'}")
            return None
        a, b = given["A"], given["B"]
        if a.dim() < 2 or b.dim() < 2 or a.shape[0] != b.shape[1] or b[0, 0].numel() != 1:
            self.ledger.problems.add(
                f"{roles['A'].text} {list(a.shape)} and {roles['B'].text} {list(b.shape)} are no [r, in, …] "
                "and [out, r, 1, …] of one rank"
            )
            return None
        scale = self._scale(roles, module, a.shape[0], alpha, settings)
        if "B_bias" in given:
            self.shift[f"{name}.bias"] = (given["B_bias"], scale)
        conv = a.dim() > 2
        return LowRank(
            a.flatten(1),
            b.flatten(1),
            scale,
            magnitude=given["magnitude"].flatten() if "magnitude" in given else None,
            fan_in_fan_out=None if conv else False,
            kind="conv" if conv else "linear",
            shape=(b.shape[0], *a.shape[1:]) if conv else None,
        )

    def _scale(
        self,
        roles: dict[str, Key],
        module: str,
        rank: int,
        alpha: float | None,
        settings: LoraSettings | None,
    ) -> float:
        problems = self.ledger.problems
        if settings is None:
            if alpha == 0:
                problems.add(f"{roles['alpha'].text} is 0, so the module would change nothing")
            return 1.0 if alpha is None else alpha / rank
        told, scale = settings.of(module)
        if told != rank:
            problems.add(f"{roles['A'].text} has rank {rank}, but {METADATA_KEY} says {told}")
        if settings.dora != ("magnitude" in roles):
            which = "no" if settings.dora else "a"
            problems.add(
                f"{roles['A'].text}: use_dora is {settings.dora}, and there is {which} lora_magnitude_vector"
            )
        return scale


def _other_method(key: str) -> bool:
    """A tensor of LoKr or LoHa under ComfyUI's names."""
    return key.startswith(f"{COMFY}.") and key.rpartition(".")[2].startswith(_OTHERS)


def _explain(key: str) -> str:
    parts = key.split(".")
    if any(part.startswith(_OTHERS) for part in parts):
        return "LoKr or LoHa, whose ΔW has no pair of factors"
    if any("custom_diffusion" in part for part in parts):
        return "Custom Diffusion trains whole projections, no LoRA"
    return "unknown key"
