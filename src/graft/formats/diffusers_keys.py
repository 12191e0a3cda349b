"""The grammar of tensor names in LoRA files of Hugging Face diffusers, through three eras.

======  ===================================================  =============================
era     a name, after ``unet.`` or ``text_encoder.``          the module
======  ===================================================  =============================
1       ``….attn1.processor.to_q_lora.down.weight``           ``….attn1.to_q``
2       ``….attn1.to_q.lora.down.weight``,                    ``….attn1.to_q``
        ``….q_proj.lora_linear_layer.down.weight``
3       ``….attn1.to_q.lora_A.weight`` (PEFT's names)         ``….attn1.to_q``
======  ===================================================  =============================

Source: diffusers, ``utils/state_dict_utils.py`` and ``loaders/lora_conversion_utils.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from .components import COMPONENT
from .peft import keys as peft_keys

_SIDES = {"down": "A", "up": "B"}
_LAYERS = frozenset({"lora", "lora_linear_layer"})
_ALPHAS = frozenset({"alpha", "network_alpha"})
#: attention's projections of the first era by their place in a denoiser; the others keep their names
_DENOISER = {"to_out": "to_out.0"}
#: and in a text encoder
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Key:
    """One tensor name, parsed.

    Args:
        text: the name in the file.
        component: the model that it is of; empty if the name does not say it.
        module: the module's dotted name in that model; of a ``plain`` tensor, the tensor's.
        role: ``A``, ``B``, ``B_bias``, ``magnitude``, ``alpha``, or ``plain`` for anything else.
        era: 1, 2 or 3; 0 where the name does not tell.
    """

    text: str
    component: str
    module: str
    role: str
    era: int


def parse(text: str) -> Key:
    """Parse one tensor name."""
    first, _, rest = text.partition(".")
    component, rest = (first, rest) if COMPONENT.fullmatch(first) and rest else ("", text)
    peft = peft_keys.parse(rest)
    if peft.role in ("A", "B", "B_bias", "magnitude"):
        return Key(text, component, ".".join(peft.module), peft.role, 3)
    parts = [part for part in rest.split(".") if part != "processor"]
    if len(parts) > 1 and parts[-1] in _ALPHAS:
        return Key(text, component, _module_of_alpha(parts[:-1], component), "alpha", 0)
    if len(parts) > 3 and parts[-1] == "weight" and parts[-2] in _SIDES:
        module, era = _old_module(parts[:-2], component)
        if era:
            return Key(text, component, module, _SIDES[parts[-2]], era)
    return Key(text, component, rest, "plain", 0)


def _old_module(parts: list[str], component: str) -> tuple[str, int]:
    """The module of a layer's name in the first two eras, and the era; 0 if it is no layer's."""
    *before, last = parts
    if last in _LAYERS:
        return ".".join(before), 2
    if not last.endswith("_lora"):
        return ".".join(parts), 0
    table = _TEXT if component.startswith("text_encoder") else _DENOISER
    name = last.removesuffix("_lora")
    return ".".join((*before, table.get(name, name))), 1


def _module_of_alpha(parts: list[str], component: str) -> str:
    """The module whose alpha it is: the layer's own name, or a factor's, may stand in between."""
    for between in ({"weight"}, {*_SIDES, "lora_A", "lora_B"}):
        if len(parts) > 1 and parts[-1] in between:
            parts = parts[:-1]
    return _old_module(parts, component)[0]
