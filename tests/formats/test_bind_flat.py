"""Names that only the base can tell: ``_`` for ``.``, LDM's names, Black Forest Labs' joined modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from graft.adapter import Adapter, LowRank
from graft.bind import bind
from graft.bind_flat import flat
from graft.bind_flux import flux_names
from graft.bind_ldm import ldm_names
from graft.bind_spelling import Spelling
from graft.errors import BaseMismatchError
from graft.formats import read

from .kohya_files import Tensors, dense, module, stored

_PART = st.text("ab", min_size=1, max_size=2) | st.sampled_from(["0", "1"])
_NAME = st.lists(_PART, min_size=1, max_size=4).flatmap(
    lambda parts: st.lists(st.sampled_from("._"), min_size=len(parts) - 1, max_size=len(parts) - 1).map(
        lambda dots: "".join(p + d for p, d in zip(parts, [*dots, ""], strict=True))
    )
)


@given(st.lists(_NAME, min_size=1, max_size=12, unique=True), st.data())
def test_names_come_back_or_are_refused_as_ambiguous(names: list[str], data: st.DataObject) -> None:
    """Whatever dots and underscores a base has: the name that is meant, or an error that lists them."""
    base = {f"{name}.weight": (2, 2) for name in names}
    meant = data.draw(st.lists(st.sampled_from(sorted(base)), min_size=1, unique=True))
    assume(len({flat(name) for name in meant}) == len(meant))
    site = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0, fan_in_fan_out=False)
    adapter = Adapter({flat(name): site for name in meant}, flattened=True)
    twins = [name for name in meant if sum(flat(name) == flat(other) for other in base) > 1]
    if not twins:
        assert bind(adapter, base).sites.keys() == set(meant)
        return
    with pytest.raises(BaseMismatchError) as error:
        bind(adapter, base)
    assert all(name in str(error.value) for name in twins[:12])


def test_two_names_of_one_weight_are_refused() -> None:
    site = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0, fan_in_fan_out=False)
    twice = Adapter({"a_b.weight": site, "text_model_a_b.weight": site}, flattened=True)
    with pytest.raises(BaseMismatchError, match=r"(?s)two names for one parameter.*a_b\.weight"):
        bind(twice, {"a.b.weight": (2, 2)})


def test_ldm_s_names_against_stable_diffusion_s() -> None:
    """LDM's numbers of Stable Diffusion 1's layers, from its own configuration: 3 a resolution."""
    base = [
        *(f"down_blocks.{b}.resnets.{n}.conv1.weight" for b in range(4) for n in range(2)),
        *(f"down_blocks.{b}.attentions.{n}.proj_in.weight" for b in range(3) for n in range(2)),
        *(f"down_blocks.{b}.downsamplers.0.conv.weight" for b in range(3)),
        *(f"mid_block.resnets.{n}.conv2.weight" for n in range(2)),
        "mid_block.attentions.0.proj_out.weight",
        *(f"up_blocks.{b}.resnets.{n}.conv_shortcut.weight" for b in range(4) for n in range(3)),
        *(f"up_blocks.{b}.attentions.{n}.proj_in.weight" for b in range(1, 4) for n in range(3)),
        *(f"up_blocks.{b}.upsamplers.0.conv.weight" for b in range(3)),
        "conv_in.weight",
        "time_embedding.linear_2.bias",
    ]
    told = {ours: theirs for theirs, ours in ldm_names(base).items()}
    assert told.keys() == set(base)
    for ours, theirs in {
        "conv_in.weight": "input_blocks.0.0.weight",
        "down_blocks.0.resnets.0.conv1.weight": "input_blocks.1.0.in_layers.2.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.2.attentions.1.proj_in.weight": "input_blocks.8.1.proj_in.weight",
        "down_blocks.3.resnets.1.conv1.weight": "input_blocks.11.0.in_layers.2.weight",
        "mid_block.resnets.1.conv2.weight": "middle_block.2.out_layers.3.weight",
        "mid_block.attentions.0.proj_out.weight": "middle_block.1.proj_out.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.attentions.2.proj_in.weight": "output_blocks.11.1.proj_in.weight",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
    }.items():
        assert told[ours] == theirs
    assert ldm_names(["model.layers.0.q_proj.weight"]) == {}


FLUX = {
    "context_embedder.weight": (8, 6),
    "norm_out.linear.weight": (16, 8),
    **{f"transformer_blocks.0.attn.{name}.weight": (8, 8) for name in ("to_q", "to_k", "to_v", "to_add_out")},
    **{f"single_transformer_blocks.0.attn.{name}.weight": (8, 8) for name in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.0.proj_mlp.weight": (32, 8),
}


def test_flux_s_joined_modules_are_split_by_rows(tmp_path: Path) -> None:
    found = {
        **module("lora_unet_double_blocks_0_img_attn_qkv", (24, 8), alpha=2.0),
        **module("lora_unet_single_blocks_0_linear1", (56, 8), rank=3),
        **module("lora_unet_final_layer_adaLN_modulation_1", (16, 8)),
        **module("lora_unet_txt_in", (8, 6)),
    }
    bound = bind(read(stored(found, tmp_path)), FLUX)
    assert bound.sites.keys() == FLUX.keys() - {"transformer_blocks.0.attn.to_add_out.weight"}
    assert any("Black Forest Labs" in note for note in bound.notes)

    def delta(key: str) -> torch.Tensor:
        return (
            found[f"lora_unet_{key}.lora_up.weight"].double()
            @ found[f"lora_unet_{key}.lora_down.weight"].double()
        )

    def rows(*names: str) -> torch.Tensor:
        return torch.cat([dense(bound.sites[f"{name}.weight"]).double() for name in names])

    attn = [f"attn.to_{x}" for x in "qkv"]
    double = rows(*(f"transformer_blocks.0.{name}" for name in attn))
    torch.testing.assert_close(double, delta("double_blocks_0_img_attn_qkv"))
    single = rows(*(f"single_transformer_blocks.0.{name}" for name in (*attn, "proj_mlp")))
    torch.testing.assert_close(single, delta("single_blocks_0_linear1"))
    final = delta("final_layer_adaLN_modulation_1")
    torch.testing.assert_close(rows("norm_out.linear"), torch.cat([final[8:], final[:8]]))


COMFY = {
    "lora_A and lora_B": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "lora_down and lora_up": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
    "no component": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "PEFT's prefix": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
}


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("spelled", COMFY)
def test_comfyui_s_names_say_what_kohya_s_say(spelled: str, alpha: float | None, tmp_path: Path) -> None:
    names = {"double_blocks.0.img_attn.qkv": (24, 8), "single_blocks.0.linear1": (56, 8)}
    told = {
        name: module(f"lora_unet_{flat(name + '.weight')[:-7]}", s, alpha=alpha) for name, s in names.items()
    }
    other: Tensors = {}
    for name, found in told.items():
        keys = [key.format(name) for key in COMFY[spelled]]
        keys.append(f"{keys[0].removesuffix('.weight').rpartition('.')[0]}.alpha")
        other |= dict(zip(keys, found.values(), strict=False))
    (tmp_path / "kohya").mkdir()
    one = bind(
        read(stored({k: t for found in told.values() for k, t in found.items()}, tmp_path / "kohya")), FLUX
    )
    adapter = read(stored(other, tmp_path))
    two = bind(adapter, {f"transformer.{name}": shape for name, shape in FLUX.items()})
    assert adapter.format == "diffusers" and two.sites.keys() == {f"transformer.{name}" for name in one.sites}
    for name, site in one.sites.items():
        assert torch.equal(dense(two.sites[f"transformer.{name}"]), dense(site)), name
    assert any("no alpha" in note for note in two.notes) == (alpha is None)


def test_joined_modules_of_other_sizes_are_refused(tmp_path: Path) -> None:
    path = stored(module("lora_unet_double_blocks_0_img_attn_qkv", (25, 8)), tmp_path)
    with pytest.raises(BaseMismatchError, match=r"has 25 outputs; it is .*to_q.*24 in all"):
        bind(read(path), FLUX)


def test_a_split_update_keeps_every_row_of_dora() -> None:
    base = {"a": (2, 3), "b": (4, 3)}
    whole = LowRank(torch.randn(1, 3), torch.randn(6, 1), 1.0, magnitude=torch.arange(6.0))
    parts = Spelling.joined("x", ["a", "b"], base).sites(whole)
    assert [parts[name].magnitude.tolist() for name in base] == [[0, 1], [2, 3, 4, 5]]  # type: ignore[union-attr]
    assert flux_names(base) == {} and Spelling.joined("x", ["a"], base).rows == 2
