"""The names that Black Forest Labs' code has for the modules of Flux; sd-scripts trains Flux under them.

Its q, k and v (and in single blocks the MLP too) are one module whose rows are those of diffusers' modules
one after the other. Source: kohya-ss/sd-scripts, ``networks/convert_flux_lora.py``; diffusers,
``loaders/lora_conversion_utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .bind_spelling import Shapes, Spelling

_NAMING, _XLABS = "Black Forest Labs' names", "XLabs' names"
_DOUBLE: Mapping[str, Sequence[str]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE: Mapping[str, Sequence[str]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
#: XLabs' adapters have the first rows of linear1 as a module, and another name for linear2
_SINGLE_XLABS: Mapping[str, Sequence[str]] = {
    "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "proj": ("proj_out",),
}
_TOP: Mapping[str, Sequence[str]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
#: its rows are shift and scale; diffusers' are scale and shift
_FINAL, _FINAL_HERE = "final_layer.adaLN_modulation.1", "norm_out.linear"


def flux_names(base: Shapes) -> dict[str, Spelling]:
    """Black Forest Labs' name of each weight → the base's; empty if the base is no diffusers Flux."""
    firsts = {name.partition(".")[0] for name in base}
    if not {"transformer_blocks", "single_transformer_blocks", "context_embedder"} <= firsts:
        return {}
    found: dict[str, Spelling] = {}
    for naming, told, modules in _modules(base):
        names = [f"{module}.weight" for module in modules]
        if all(name in base for name in names):
            found[f"{told}.weight"] = Spelling.joined(naming, names, base)
    if f"{_FINAL_HERE}.weight" in base:
        found[f"{_FINAL}.weight"] = Spelling.swapped(_NAMING, f"{_FINAL_HERE}.weight", base)
    return found


def _modules(base: Shapes) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Every module by another's name, whose it is, and the modules here that it is made of."""
    for told, modules in _TOP.items():
        yield _NAMING, told, modules
    for naming, theirs, ours, table in (
        (_NAMING, "double_blocks", "transformer_blocks", _DOUBLE),
        (_NAMING, "single_blocks", "single_transformer_blocks", _SINGLE),
        (_XLABS, "single_blocks", "single_transformer_blocks", _SINGLE_XLABS),
    ):
        parts = (name.split(".") for name in base if name.startswith(f"{ours}."))
        for number in dict.fromkeys(part[1] for part in parts):
            for told, modules in table.items():
                yield naming, f"{theirs}.{number}.{told}", [f"{ours}.{number}.{module}" for module in modules]
