"""The grammar of tensor names in LoRA files of Hugging Face diffusers, through three eras.

======  ===================================================  =============================
era     a name, after ``unet.`` or ``text_encoder.``          the module
======  ===================================================  =============================
1       ``….attn1.processor.to_q_lora.down.weight``           ``….attn1.to_q``
2       ``….attn1.to_q.lora.down.weight``,                    ``….attn1.to_q``
        ``….q_proj.lora_linear_layer.down.weight``
3       ``….attn1.to_q.lora_A.weight`` (PEFT's names)         ``….attn1.to_q``
======  ===================================================  =============================

In files for ComfyUI ``diffusion_model.`` stands before the names, which may be those of the model's authors
(``diffusion_model.double_blocks.0.img_attn.qkv``), and ``lora_down``, ``lora_up`` for ``lora_A``, ``lora_B``.
XLabs' files have Flux's blocks in the first era's form (``double_blocks.0.processor.qkv_lora1``).

Source: diffusers, ``utils/state_dict_utils.py`` and ``loaders/lora_conversion_utils.py``; ComfyUI,
``comfy/lora.py``; XLabs-AI/x-flux, ``src/flux/modules/layers.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from .components import COMPONENT
from .peft import keys as peft_keys

#: ComfyUI's component: the denoiser, whatever the pipeline calls it
COMFY = "diffusion_model"
#: how names of Flux begin with its authors, where no component stands before them or PEFT's prefix
_AUTHORS = frozenset({"double_blocks", "single_blocks"})

_SIDES = {"down": "A", "up": "B"}
_JOINED_SIDES = {"lora_down": "A", "lora_up": "B"}
_LAYERS = frozenset({"lora", "lora_linear_layer"})
_ALPHAS = frozenset({"alpha", "network_alpha"})
#: attention's projections of the first era by their place in a denoiser; the others keep their names
_DENOISER = {"to_out": "to_out.0"}
#: and XLabs' names of them in Flux
_XLABS = {
    "qkv_lora1": "img_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora2": "txt_attn.proj",
}
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
    component, rest = _split(text)
    peft = peft_keys.parse(rest)
    if peft.role in ("A", "B", "B_bias", "magnitude"):
        return Key(text, component, ".".join(peft.module), peft.role, 3)
    parts = [part for part in rest.split(".") if part != "processor"]
    if len(parts) > 1 and parts[-1] in _ALPHAS:
        return Key(text, component, _module_of_alpha(parts[:-1], component), "alpha", 0)
    if component and len(parts) > 2 and parts[-1] == "weight" and parts[-2] in _JOINED_SIDES:
        return Key(text, component, ".".join(parts[:-2]), _JOINED_SIDES[parts[-2]], 2)
    if len(parts) > 3 and parts[-1] == "weight" and parts[-2] in _SIDES:
        module, era = _old_module(parts[:-2], component)
        if era:
            return Key(text, component, module, _SIDES[parts[-2]], era)
    return Key(text, component, rest, "plain", 0)


def _split(text: str) -> tuple[str, str]:
    """The component and the rest of a name."""
    bare = text.removeprefix("base_model.model.")
    if bare.partition(".")[0] in _AUTHORS:
        return COMFY, bare
    first, _, rest = text.partition(".")
    return (first, rest) if rest and (first == COMFY or COMPONENT.fullmatch(first)) else ("", text)


def _old_module(parts: list[str], component: str) -> tuple[str, int]:
    """The module of a layer's name in the first two eras, and the era; 0 if it is no layer's."""
    *before, last = parts
    if last in _LAYERS:
        return ".".join(before), 2
    if last in _XLABS:
        return ".".join((*before, _XLABS[last])), 1
    if not last.endswith("_lora"):
        return ".".join(parts), 0
    table = _TEXT if component.startswith("text_encoder") else _DENOISER
    name = last.removesuffix("_lora")
    return ".".join((*before, table.get(name, name))), 1


def _module_of_alpha(parts: list[str], component: str) -> str:
    """The module whose alpha it is: the layer's own name, or a factor's, may stand in between."""
    for between in ({"weight"}, {*_SIDES, *_JOINED_SIDES, "lora_A", "lora_B"}):
        if len(parts) > 1 and parts[-1] in between:
            parts = parts[:-1]
    return _old_module(parts, component)[0]
