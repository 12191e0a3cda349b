"""kohya-ss/sd-scripts: ``lora_unet_<module>.lora_down.weight``, and LyCORIS's plain LoRA in the same names.

Of a module, ``lora_down`` is A ``[r, in]`` or ``[r, in, k, k]``, ``lora_up`` is B ``[out, r]`` or
``[out, r, 1, 1]``, and ``alpha`` is one number: scale = alpha / r. Without alpha, and with alpha 0, the scale
is 1: so do sd-scripts' ``create_network_from_weights`` and ``LoRAModule`` (networks/lora.py). The module's
name is spelled with ``_`` for ``.``, so it is resolved by the base's names (:mod:`graft.bind_flat`).

LyCORIS's DoRA stands in ``dora_scale`` ``[out, 1, …]``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapter import Adapter, LowRank
from ..bind_flat import flat
from ..errors import FormatError
from ..fingerprint import loads
from .ledger import Ledger, listed
from .protocol import Loss, Options, Target, Written
from .source import Source

#: what names begin with → the component of the pipeline; binding knows which others may be meant
_COMPONENTS = {
    "lora_unet": "unet",
    "lora_transformer": "transformer",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
}
_HEAD = re.compile(rf"({'|'.join(_COMPONENTS)})_(.+)")
_ROLES = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", "dora_scale": "magnitude"}
#: how names of other methods begin → why they are no pair of factors
_OTHERS = {
    "hada_": "LoHa, a product of two LoRAs element by element; its ΔW has no pair of factors",
    "lokr_": "LoKr, a Kronecker product; its ΔW has no pair of factors",
    "lora_mid": "LoCon's Tucker (CP) decomposition of a convolution, which has three factors",
    "oft_": "OFT, which multiplies the weight",
    "boft_": "BOFT, which multiplies the weight",
    "diff": "a full difference of the weight, no LoRA",
    "w_norm": "a trained normalisation layer, no LoRA",
    "b_norm": "a trained normalisation layer, no LoRA",
    "on_input": "(IA)³, which multiplies activations",
    "scalar": "LyCORIS's trained scalar, which other loaders ignore",
}


@dataclass(frozen=True)
class _Key:
    component: str
    module: str
    role: str


class KohyaFormat:
    """The format's entry in the registry."""

    name = "kohya"

    def detect(self, source: Source) -> bool:
        """By content: names that begin with ``lora_unet_``, ``lora_te_`` and the like."""
        return any(_HEAD.match(key) for key in source.tensors)

    def read(self, source: Source, options: Options) -> Adapter:
        options.refuse_unused("kohya", alpha=True, enable_lora=True)
        return _read(source)

    def losses(self, adapter: Adapter, target: Target) -> list[Loss]:
        from . import kohya_writer

        return kohya_writer.losses(adapter, target)

    def write(self, adapter: Adapter, path: Path, target: Target) -> Written:
        from . import kohya_writer

        return kohya_writer.write(adapter, path, target)


def _parse(text: str) -> _Key | None:
    """One tensor's name; None if it is no LoRA's. A ``_`` before the last part, for a ``.``, is dirt."""
    head = _HEAD.fullmatch(text)
    if head is None:
        return None
    for leaf, role in _ROLES.items():
        for end in (f".{leaf}", f"_{leaf}"):
            if head[2].endswith(end) and "." not in head[2].removesuffix(end):
                return _Key(_COMPONENTS[head[1]], head[2].removesuffix(end), role)
    return None


def _read(source: Source) -> Adapter:
    ledger = Ledger(source.tensors, source.weights)
    modules: dict[tuple[str, str], dict[str, str]] = {}
    for text in source.tensors:
        key = _parse(text)
        if key is None:
            continue
        roles = modules.setdefault((key.component, key.module), {})
        if key.role in roles:
            ledger.take(text)
            ledger.problems.add(f"{text} and {roles[key.role]} are the same tensor of one module")
        roles.setdefault(key.role, text)
    ledger.check_tensors(numbers={roles["alpha"] for roles in modules.values() if "alpha" in roles})
    sites: dict[str, LowRank] = {}
    unscaled: list[str] = []
    for (component, module), roles in modules.items():
        site = _site(ledger, roles, unscaled)
        if site is not None:
            sites[f"{component}.{module}.weight"] = site
    ledger.close(explain=_explain)
    if not sites:
        raise FormatError(f"{source.weights} holds no LoRA")
    notes = [f"alpha is 0, so the scale is 1 as in sd-scripts: {listed(unscaled)}"] if unscaled else []
    told = loads({key: str(value) for key, value in source.metadata.items()})
    return Adapter(
        sites,
        format="kohya",
        notes=tuple(notes),
        base={_flat(name): value for name, value in told.items()},
        flattened=True,
        components=frozenset(component for component, _ in modules),
    )


def _flat(name: str) -> str:
    """A base's name as the sites here are named: the component, and the rest spelled with ``_``."""
    component, _, rest = name.partition(".")
    return f"{component}.{flat(rest)}"


def _site(ledger: Ledger, roles: dict[str, str], unscaled: list[str]) -> LowRank | None:
    """One module's update; a fault is recorded."""
    alpha = ledger.number(roles["alpha"]) if "alpha" in roles else None
    given = {role: ledger.take(roles[role]) for role in ("A", "B", "magnitude") if role in roles}
    if "A" not in given or "B" not in given:
        there = next(iter(roles.values()))
        ledger.problems.add(f"{there} has no {'lora_down' if 'A' not in given else 'lora_up'} beside it")
        return None
    down, up = given["A"], given["B"]
    if down.dim() < 2 or up.dim() < 2 or down.shape[0] != up.shape[1] or up[0, 0].numel() != 1:
        ledger.problems.add(
            f"{roles['A']} {list(down.shape)} and {roles['B']} {list(up.shape)} are no [r, in, …] and "
            "[out, r, 1, …] of one rank"
        )
        return None
    if alpha == 0:
        unscaled.append(roles["alpha"])
    magnitude = _magnitude(ledger, roles, given, up.shape[0])
    pointwise = down[0, 0].numel() == 1
    return LowRank(
        down.flatten(1),
        up.flatten(1),
        alpha / down.shape[0] if alpha else 1.0,
        magnitude=magnitude,
        fan_in_fan_out=False,
        kind="projection" if pointwise else "conv",
        shape=None if pointwise else (up.shape[0], *down.shape[1:]),
    )


def _magnitude(
    ledger: Ledger, roles: dict[str, str], given: dict[str, torch.Tensor], outputs: int
) -> torch.Tensor | None:
    """DoRA's m, one number for each row of the weight."""
    scale = given.get("magnitude")
    if scale is None:
        return None
    if scale.shape[0] != outputs or scale.numel() != outputs:
        ledger.problems.add(
            f"{roles['magnitude']} {list(scale.shape)}: a DoRA scale for each input (LyCORIS's "
            f"wd_on_output=False), or of another module; one for each of {outputs} outputs can be fused"
        )
    return scale.flatten()


def _explain(key: str) -> str:
    leaf = key.partition(".")[2]
    for start, why in _OTHERS.items():
        if leaf.startswith(start):
            return why
    if not _HEAD.match(key):
        return f"its name begins with none of {', '.join(_COMPONENTS)}"
    return "unknown key"
