"""One set of updates in each naming that LoRA files of pipelines have had."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .tiny import Updates

Tensors = dict[str, torch.Tensor]
_KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def whole(component: str, module: str) -> str:
    """The module's name as the files have it: text encoders had ``text_model`` in all of transformers 4."""
    bare = component == "text_encoder" and not module.startswith("text_model.")
    return f"text_model.{module}" if bare else module


def kohya(
    updates: Mapping[str, Updates],
    alpha: float | None = None,
    spelled: Callable[[str], str] = lambda name: name,
    heads: Mapping[str, str] = _KOHYA,
) -> Tensors:
    """sd-scripts' names.

    Args:
        spelled: another name of a denoiser's module.
    """
    found: Tensors = {}
    for component, mine in updates.items():
        for module, (a, b) in mine.items():
            name = spelled(module) if component == "unet" else whole(component, module)
            key = f"{heads[component]}_{name.replace('.', '_')}"
            found[f"{key}.lora_down.weight"], found[f"{key}.lora_up.weight"] = a, b
            if alpha is not None:
                found[f"{key}.alpha"] = torch.tensor(alpha)
    return found


def peft_era(updates: Mapping[str, Updates]) -> Tensors:
    """``unet.….to_q.lora_A.weight``."""
    found: Tensors = {}
    for component, mine in updates.items():
        for module, (a, b) in mine.items():
            key = f"{component}.{whole(component, module)}"
            found[f"{key}.lora_A.weight"], found[f"{key}.lora_B.weight"] = a, b
    return found


def layer_era(updates: Mapping[str, Updates]) -> Tensors:
    """``unet.….to_q.lora.down.weight``, ``text_encoder.….q_proj.lora_linear_layer.down.weight``."""
    found: Tensors = {}
    for component, mine in updates.items():
        layer = "lora" if component == "unet" else "lora_linear_layer"
        for module, (a, b) in mine.items():
            key = f"{component}.{whole(component, module)}.{layer}"
            found[f"{key}.down.weight"], found[f"{key}.up.weight"] = a, b
    return found


def processor_era(updates: Mapping[str, Updates], prefix: bool = True) -> Tensors:
    """``unet.….attn1.processor.to_q_lora.down.weight``; attention only."""
    found: Tensors = {}
    for component, mine in updates.items():
        for module, (a, b) in mine.items():
            owner, _, last = whole(component, module).removesuffix(".0").rpartition(".")
            last = _OLD_TEXT.get(last, last)
            key = f"{owner}.processor.{last}_lora" if component == "unet" else f"{owner}.{last}_lora"
            key = f"{component}.{key}" if prefix else key
            found[f"{key}.down.weight"], found[f"{key}.up.weight"] = a, b
    return found
