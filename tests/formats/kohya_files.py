"""A little pipeline, and files for it as sd-scripts saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from graft.adapter import LowRank
from graft.bind_flat import flat

Tensors = dict[str, torch.Tensor]

UNET = {
    "down_blocks.0.attentions.0.proj_in.weight": (6, 6, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight": (6, 5),
    "down_blocks.0.resnets.0.conv1.weight": (4, 6, 3, 3),
    "mid_block.attentions.0.proj_in.weight": (6, 6),
}
TEXT = {f"text_model.encoder.layers.{n}.self_attn.q_proj.weight": (7, 5) for n in range(2)}
PIPELINE = {
    **{f"unet.{name}": shape for name, shape in UNET.items()},
    **{f"text_encoder.{name}": shape for name, shape in TEXT.items()},
}


def module(key: str, shape: tuple[int, ...], rank: int = 2, alpha: float | None = None) -> Tensors:
    """One module as sd-scripts saves it."""
    found = {
        f"{key}.lora_down.weight": torch.randn(rank, *shape[1:]),
        f"{key}.lora_up.weight": torch.randn(shape[0], rank, *(1 for _ in shape[2:])),
    }
    return found if alpha is None else {**found, f"{key}.alpha": torch.tensor(alpha)}


def tensors(alpha: float | None = 1.0) -> Tensors:
    """A file for every module of the little pipeline."""
    torch.manual_seed(0)
    found: Tensors = {}
    for head, names in (("lora_unet", UNET), ("lora_te", TEXT)):
        for name, shape in names.items():
            found |= module(f"{head}_{flat(name).removesuffix('.weight')}", shape, alpha=alpha)
    return found


def stored(found: Tensors, folder: Path) -> Path:
    save_file(found, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def dense(site: LowRank) -> torch.Tensor:
    assert site.shape is not None
    return site.delta(site.shape).dense()
