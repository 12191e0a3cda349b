"""The names that the LDM code has for the modules of a diffusers UNet; sd-scripts trains SDXL under them.

LDM counts all blocks of the way down (``input_blocks``) and up (``output_blocks``) through, diffusers
counts the layers of each resolution. Source: diffusers, ``loaders/lora_conversion_utils.py`` and
``utils/state_dict_utils.py``, here from the base's names towards LDM's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MID = re.compile(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)")


@dataclass
class _Blocks:
    """The blocks of one way: how many resnets each has, which have attention, which change the size."""

    resnets: dict[int, int] = field(default_factory=lambda: defaultdict[int, int](int))
    attention: set[int] = field(default_factory=set[int])
    sampled: set[int] = field(default_factory=set[int])

    def start(self, block: int, *, counts_samplers: bool) -> int:
        """LDM's number of the block's first layer, counted from the first block's."""
        before = range(block)
        return sum(self.resnets[n] + (counts_samplers and n in self.sampled) for n in before)


def ldm_names(names: Iterable[str]) -> dict[str, str]:
    """LDM's name → the base's, for each parameter of a diffusers UNet; empty for other models."""
    names = list(names)
    if not {"down_blocks", "mid_block", "up_blocks"} <= {name.partition(".")[0] for name in names}:
        return {}
    blocks = {"down": _Blocks(), "up": _Blocks()}
    for name in names:
        if found := _BLOCK.match(name):
            way, block, kind, layer = blocks[found[1]], int(found[2]), found[3], int(found[4])
            if kind == "resnets":
                way.resnets[block] = max(way.resnets[block], layer + 1)
            else:
                (way.attention if kind == "attentions" else way.sampled).add(block)
    return {told: name for name in names if (told := _told(name, blocks)) is not None}


def _told(name: str, blocks: dict[str, _Blocks]) -> str | None:
    module, _, leaf = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{leaf}"
    if found := _MID.match(name):
        place = _MIDDLE.get(found[1])
        return None if place is None else f"middle_block.{place}.{_inside(found[1], found[2])}"
    found = _BLOCK.match(name)
    if found is None:
        return None
    way, block, kind, layer, rest = blocks[found[1]], int(found[2]), found[3], int(found[4]), found[5]
    if found[1] == "down":
        at = 1 + way.start(block, counts_samplers=True)
        if kind == "downsamplers":
            return f"input_blocks.{at + way.resnets[block]}.0.{rest.replace('conv.', 'op.', 1)}"
        return f"input_blocks.{at + layer}.{int(kind == 'attentions')}.{_inside(kind, rest)}"
    at = way.start(block, counts_samplers=False)
    if kind == "upsamplers":
        return f"output_blocks.{at + way.resnets[block] - 1}.{1 + (block in way.attention)}.{rest}"
    return f"output_blocks.{at + layer}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    """The name inside the block: a resnet's layers have other names, a transformer's have the same."""
    layer, dot, leaf = rest.rpartition(".")
    return f"{_RESNET.get(layer, layer)}{dot}{leaf}" if kind.startswith("resnets") else rest
