"""kohya's sd-scripts: alpha, dirt, what is no LoRA, and what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.adapter import Adapter, LowRank
from graft.bind import bind
from graft.bind_flat import flat
from graft.errors import BaseMismatchError, FormatError
from graft.formats import Target, read, write, writer, written

from .kohya_files import PIPELINE, UNET, Tensors, dense, module, stored, tensors


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [(1.0, 0.5), (None, 1.0), (0.0, 1.0), (3.0, 1.5), (-2.0, -1.0), (4, 2.0)],
)
def test_scale_is_alpha_by_rank_and_one_without(alpha: float | None, scale: float, tmp_path: Path) -> None:
    """sd-scripts: no alpha in the file, and alpha 0, mean "no scaling"."""
    adapter = read(stored(tensors(alpha), tmp_path))
    assert {site.scale for site in adapter.sites.values()} == {scale}
    assert any("alpha is 0" in note for note in adapter.notes) == (alpha == 0)


def test_every_module_finds_its_weight(tmp_path: Path) -> None:
    found = tensors()
    bound = bind(read(stored(found, tmp_path)), PIPELINE)
    assert bound.sites.keys() == PIPELINE.keys() and not bound.flattened and not bound.components
    for name, site in bound.sites.items():
        component, _, rest = name.partition(".")
        key = f"{'lora_unet' if component == 'unet' else 'lora_te'}_{flat(rest).removesuffix('.weight')}"
        a, b = found[f"{key}.lora_down.weight"].flatten(1), found[f"{key}.lora_up.weight"].flatten(1)
        torch.testing.assert_close(dense(site).double(), 0.5 * (b.double() @ a.double()))
    assert bound.sites["unet.down_blocks.0.attentions.0.proj_in.weight"].kind == "conv"
    assert bound.sites["unet.mid_block.attentions.0.proj_in.weight"].kind == "linear"


@pytest.mark.parametrize("kernel", [(), (1, 1)])
def test_a_linear_layer_and_a_kernel_of_one_stand_for_each_other(
    kernel: tuple[int, ...], tmp_path: Path
) -> None:
    """Models of one family have either; sd-scripts' merge too takes the file's factors for both."""
    adapter = read(stored(module("lora_unet_proj_in", (4, 6, *kernel)), tmp_path))
    for base in ((4, 6), (4, 6, 1, 1)):
        assert bind(adapter, {"proj_in.weight": base}).sites["proj_in.weight"].shape == base
    with pytest.raises(BaseMismatchError, match="its factors do not fit"):
        bind(adapter, {"proj_in.weight": (4, 6, 3, 3)})


@pytest.mark.parametrize(
    "dirty",
    [
        lambda key: key.replace(".lora_", "_lora_"),
        lambda key: key.replace(".alpha", "_alpha"),
        lambda key: key.replace(".lora_down", "_lora_down"),
    ],
)
def test_an_underscore_for_the_dot_is_read(dirty: Callable[[str], str], tmp_path: Path) -> None:
    clean, other = tmp_path / "clean", tmp_path / "dirty"
    clean.mkdir(), other.mkdir()
    one = bind(read(stored(tensors(), clean)), PIPELINE)
    two = bind(read(stored({dirty(key): t for key, t in tensors().items()}, other)), PIPELINE)
    assert one.sites.keys() == two.sites.keys()
    assert all(torch.equal(dense(one.sites[n]), dense(two.sites[n])) for n in one.sites)


def changed(edit: Callable[[Tensors], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        found = tensors()
        edit(found)
        return stored(found, folder)

    return make


UP = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"
HEAD = UP.removesuffix(".lora_up.weight")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(UP), f"{HEAD}.* has no lora_up"),
        (lambda t: t.pop(UP.replace("up", "down")), f"{HEAD}.* has no lora_down"),
        (lambda t: t.update({UP: torch.ones(7, 3)}), "of one rank"),
        (lambda t: t.update({UP: torch.zeros(0)}), "is empty"),
        (lambda t: t.update({UP: torch.full((7, 2), torch.nan)}), "NaN"),
        (lambda t: t.update({f"{HEAD}.alpha": torch.ones(2)}), "one finite number"),
        (lambda t: t.update({f"{HEAD}.alpha": torch.tensor(torch.inf)}), "one finite number"),
        (lambda t: t.update({f"{HEAD}.lora_mid.weight": torch.ones(2, 2, 3, 3)}), r"Tucker \(CP\)"),
        (lambda t: t.update({f"{HEAD}.hada_w1_a": torch.ones(2)}), "LoHa"),
        (lambda t: t.update({f"{HEAD}.lokr_w1": torch.ones(2)}), "LoKr"),
        (lambda t: t.update({f"{HEAD}.diff": torch.ones(2)}), "full difference"),
        (lambda t: t.update({f"{HEAD}.oft_blocks": torch.ones(2)}), "OFT"),
        (lambda t: t.update({f"{HEAD}.mystery": torch.ones(2)}), "mystery: unknown key"),
        (lambda t: t.update({"bundle_emb.a": torch.ones(2)}), "begins with none of lora_unet"),
        (lambda t: t.update({f"{HEAD}_lora_up.weight": t[UP] * 2}), "same tensor of one module"),
        (lambda t: t.update({f"{HEAD}.dora_scale": torch.ones(1, 5)}), "for each input"),
    ],
)
def test_what_is_wrong_or_no_lora_is_named(
    edit: Callable[[Tensors], object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=said):
        read(changed(edit)(tmp_path))


def test_other_methods_alone_are_recognised_and_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="LoHa"):
        read(stored({"lora_unet_a_b.hada_w1_a": torch.ones(2)}, tmp_path))


def test_dora_scale_is_a_magnitude(tmp_path: Path) -> None:
    scale = torch.rand(7, 1)
    bound = bind(read(changed(lambda t: t.update({f"{HEAD}.dora_scale": scale}))(tmp_path)), PIPELINE)
    magnitude = bound.sites["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight"].magnitude
    assert magnitude is not None and torch.equal(magnitude, scale.flatten())


def test_options_that_the_file_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="carry alpha themselves"):
        read(stored(tensors(), tmp_path), alpha=3)


def bound_pipeline(tmp_path: Path) -> Adapter:
    return bind(read(stored(tensors(), tmp_path)), PIPELINE)


def test_names_follow_the_pipeline(tmp_path: Path) -> None:
    """sd-scripts numbers text encoders only where there are several."""
    adapter = bound_pipeline(tmp_path)
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.1"}
    one = {**index, "text_encoder": ["transformers", "CLIPTextModel"]}
    two = {**one, "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    from graft.tensors import load_file

    for name, model, head in (("a", one, "lora_te_"), ("b", two, "lora_te1_")):
        write(adapter, tmp_path / name, format="kohya", model=model)
        heads = {key.partition("text_model")[0] for key in load_file(tmp_path / name) if "text_model" in key}
        assert heads == {head}
        back = bind(read(tmp_path / name), PIPELINE)
        assert all(torch.equal(dense(site), dense(adapter.sites[n])) for n, site in back.sites.items())


@pytest.mark.parametrize(
    ("model", "head"),
    [
        ({"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.1"}, "lora_unet_"),
        ({"_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.1"}, "lora_transformer_"),
        ({"model_type": "clip_text_model"}, "lora_te_"),
    ],
)
def test_one_model_s_component_is_told_by_its_configuration(
    model: dict[str, object], head: str, tmp_path: Path
) -> None:
    adapter = bind(read(stored(tensors(), tmp_path), component="unet"), UNET)
    write(adapter, tmp_path / "out", format="kohya", model=model)
    from graft.tensors import load_file

    assert all(key.startswith(head) for key in load_file(tmp_path / "out"))
    assert bind(read(tmp_path / "out"), UNET).sites.keys() == UNET.keys()


def test_without_a_base_the_component_is_not_guessed(tmp_path: Path) -> None:
    adapter = bind(read(stored(tensors(), tmp_path), component="unet"), UNET)
    for name in ("kohya", "diffusers"):
        with pytest.raises(FormatError, match="--base BASE"):
            write(adapter, tmp_path / "out", format=name)


def test_components_and_layers_without_a_name_are_lost(tmp_path: Path) -> None:
    site = bound_pipeline(tmp_path).sites["unet.mid_block.attentions.0.proj_in.weight"]
    adapter = Adapter(
        {"unet.a.weight": site, "vae.a.weight": site, "transformer_2.a.weight": site, "unet.weight": site}
    )
    target = Target(model={"_class_name": "XPipeline", "_diffusers_version": "0.1"})
    lost = {loss.name: loss.why for loss in writer("kohya").losses(adapter, target)}
    assert lost.keys() == {"vae.a.weight", "transformer_2.a.weight", "unet.weight"}
    assert "component vae" in lost["vae.a.weight"] and "one layer" in lost["unet.weight"]
    assert {loss.name for loss in writer("diffusers").losses(adapter, target)} == {
        "vae.a.weight",
        "unet.weight",
    }


@given(st.floats(1e-6, 1e6), st.integers(1, 33))
def test_every_scale_comes_back(scale: float, rank: int) -> None:
    """alpha is float32 where that is exact, else float64."""
    from graft.formats.kohya_writer import _alpha

    site = LowRank(torch.ones(rank, 1), torch.ones(1, rank), scale)
    assert abs(float(_alpha(site)) / rank - scale) <= 2e-16 * scale


def test_scale_zero_is_not_no_scaling(tmp_path: Path) -> None:
    site = LowRank(torch.ones(2, 6), torch.ones(6, 2), 0.0, fan_in_fan_out=False)
    bound = bind(Adapter({"mid_block.attentions.0.proj_in.weight": site}), UNET)
    model = {"_class_name": "UNet2DConditionModel"}
    written(bound, tmp_path / "out", writer("kohya"), Target(model=model))
    (back,) = bind(read(tmp_path / "out"), UNET).sites.values()
    assert not dense(back).any() and back.scale == 1.0  # no loader reads another number out of alpha


def test_fingerprints_of_the_base_go_along(tmp_path: Path) -> None:
    from dataclasses import replace

    adapter = bound_pipeline(tmp_path)
    told = {name: f"float32:{n:016x}" for n, name in enumerate(adapter.sites)}
    index = {"_class_name": "XPipeline", "_diffusers_version": "0.1"}
    for name in ("kohya", "diffusers"):
        write(replace(adapter, base=told), tmp_path / name, format=name, model=index)
        assert bind(read(tmp_path / name), PIPELINE).base == told
        unet = {n.removeprefix("unet."): value for n, value in told.items() if n.startswith("unet.")}
        assert bind(read(tmp_path / name, component="unet"), UNET).base == unet
