"""diffusers' three eras of names, alpha in three places, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from graft.adapter import Adapter
from graft.bind import bind
from graft.errors import FormatError
from graft.formats import FORMATS, Source, read, written
from graft.formats.container import TensorFile
from graft.formats.diffusers_keys import parse
from graft.formats.diffusers_settings import METADATA_KEY
from graft.formats.protocol import Target
from graft.formats.source import open_source

Tensors = dict[str, torch.Tensor]
ATTN = "down_blocks.0.attentions.1.transformer_blocks.0.attn1"
CLIP = "text_model.encoder.layers.0"
TWICE = ("a_b.lora_A", "a_b.lora_B", "a.b.lora_A", "a.b.lora_B")
BASE = {
    f"unet.{ATTN}.to_q.weight": (6, 5),
    f"unet.{ATTN}.to_out.0.weight": (5, 6),
    f"text_encoder.{CLIP}.self_attn.q_proj.weight": (7, 4),
    f"text_encoder.{CLIP}.self_attn.out_proj.weight": (4, 7),
}
ERAS: dict[str, dict[str, str]] = {
    "processor": {
        f"unet.{ATTN}.to_q": f"unet.{ATTN}.processor.to_q_lora",
        f"unet.{ATTN}.to_out.0": f"unet.{ATTN}.processor.to_out_lora",
        f"text_encoder.{CLIP}.self_attn.q_proj": f"text_encoder.{CLIP}.self_attn.to_q_lora",
        f"text_encoder.{CLIP}.self_attn.out_proj": f"text_encoder.{CLIP}.self_attn.to_out_lora",
    },
    "layer": {
        name.removesuffix(".weight"): f"{name.removesuffix('.weight')}.{layer}"
        for name in BASE
        for layer in ["lora" if name.startswith("unet.") else "lora_linear_layer"]
    },
    "peft": {name.removesuffix(".weight"): name.removesuffix(".weight") for name in BASE},
}


def tensors(era: str = "peft", rank: int = 2, prefix: Callable[[str], str] = lambda name: name) -> Tensors:
    """One update of each weight in an era's names."""
    torch.manual_seed(0)
    sides = ("lora_A", "lora_B") if era == "peft" else ("down", "up")
    found: Tensors = {}
    for name, shape in BASE.items():
        key = prefix(ERAS[era][name.removesuffix(".weight")])
        found[f"{key}.{sides[0]}.weight"] = torch.randn(rank, shape[1])
        found[f"{key}.{sides[1]}.weight"] = torch.randn(shape[0], rank)
    return found


def stored(found: Tensors, folder: Path, settings: dict[str, Any] | None = None) -> Path:
    told = None if settings is None else {METADATA_KEY: json.dumps(settings)}
    save_file(found, folder / "lora.safetensors", told)
    return folder / "lora.safetensors"


def settings(**changes: Any) -> dict[str, Any]:
    """Metadata of both components; a change with ``__`` for ``.`` is of one."""
    base = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    both = {f"{c}.{key}": value for c in ("unet", "text_encoder") for key, value in base.items()}
    return {**both, **{key.replace("__", "."): value for key, value in changes.items()}}


def scales(bound: Adapter) -> list[float]:
    return [bound.sites[name].scale for name in BASE]


def format_of(path: Path) -> str | None:
    source: Source = open_source(path, TensorFile())
    return next((one.name for one in FORMATS if one.detect(source)), None)


@pytest.mark.parametrize("era", ERAS)
def test_every_era_says_the_same(era: str, tmp_path: Path) -> None:
    path = stored(tensors(era), tmp_path)
    assert format_of(path) == "diffusers"
    adapter = read(path)
    assert adapter.components == {"unet", "text_encoder"} and not adapter.flattened
    bound = bind(adapter, BASE)
    assert bound.sites.keys() == BASE.keys()
    found = iter(tensors(era).values())
    for name in BASE:  # the order in which the tensors were made
        site = bound.sites[name]
        assert torch.equal(site.A, next(found)) and torch.equal(site.B, next(found)), name
        assert site.scale == 1.0


def test_the_oldest_files_have_no_component(tmp_path: Path) -> None:
    """``save_attn_procs`` before diffusers 0.17."""
    unet = {key: t for key, t in tensors("processor").items() if key.startswith("unet.")}
    path = stored({key.removeprefix("unet."): t for key, t in unet.items()}, tmp_path)
    adapter = read(path)
    assert adapter.format == "diffusers" and not adapter.components
    base = {name.removeprefix("unet."): shape for name, shape in BASE.items() if name.startswith("unet.")}
    assert bind(adapter, base).sites.keys() == base.keys()
    whole = {name: shape for name, shape in BASE.items() if name.startswith("unet.")}
    assert any("'unet'" in note for note in bind(adapter, whole).notes)


@pytest.mark.parametrize(
    ("key", "module", "role"),
    [
        ("unet.a.attn2.processor.add_k_proj_lora.down.weight", "a.attn2.add_k_proj", "A"),
        ("unet.a.processor.to_out_lora.up.weight", "a.to_out.0", "B"),
        ("text_encoder_2.a.to_v_lora.up.weight", "a.v_proj", "B"),
        ("unet.a.to_q.lora_A.default.weight", "a.to_q", "A"),
        ("unet.base_model.model.a.lora_B.weight", "a", "B"),
        ("transformer.a.lora_B.bias", "a", "B_bias"),
        ("transformer_2.a.lora_magnitude_vector", "a", "magnitude"),
        ("unet.a.to_q.alpha", "a.to_q", "alpha"),
        ("unet.a.processor.to_out_lora.network_alpha", "a.to_out.0", "alpha"),
        ("unet.a.to_q.lora.alpha", "a.to_q", "alpha"),
        ("unet.a.to_q.lora.down.weight.alpha", "a.to_q", "alpha"),
        ("unet.a.to_q.lora_A.alpha", "a.to_q", "alpha"),
        ("text_encoder.a.to_q_lora.down.weight.alpha", "a.q_proj", "alpha"),
        ("diffusion_model.a.b.lora_A.weight", "a.b", "A"),
        ("diffusion_model.a.b.lora_up.weight", "a.b", "B"),
        ("transformer.a.to_q.lora_down.weight", "a.to_q", "A"),
        ("transformer.a.to_q.lora_down.alpha", "a.to_q", "alpha"),
        ("unet.a.weight", "a.weight", "plain"),
        ("unet.a.down.weight", "a.down.weight", "plain"),
        ("alpha", "alpha", "plain"),
        ("unet", "unet", "plain"),
    ],
)
def test_names(key: str, module: str, role: str) -> None:
    found = parse(key)
    assert (found.module, found.role) == (module, role)
    assert found.component == (key.partition(".")[0] if "." in key else "")


@pytest.mark.parametrize("start", ["", "base_model.model.", "diffusion_model."])
def test_flux_s_blocks_need_no_component(start: str) -> None:
    found = parse(f"{start}double_blocks.3.txt_attn.qkv.lora_A.weight")
    assert (found.component, found.module) == ("diffusion_model", "double_blocks.3.txt_attn.qkv")
    assert parse("a.lora_down.weight").role == "plain"


@given(
    st.lists(st.sampled_from(["unet", "a", "lora", "to_q_lora", "down", "weight", "alpha", "processor", "0"]))
)
def test_any_name_is_parsed(parts: list[str]) -> None:
    assert parse(".".join(parts)).text == ".".join(parts)


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("leaf", ["alpha", "network_alpha"])
def test_alpha_in_a_tensor(era: str, leaf: str, tmp_path: Path) -> None:
    found = tensors(era)
    (first, *_) = ERAS[era].values()
    found[f"{first}.{leaf}"] = torch.tensor(3.0)
    assert scales(bind(read(stored(found, tmp_path)), BASE)) == [1.5, 1.0, 1.0, 1.0]


def test_alpha_in_the_metadata(tmp_path: Path) -> None:
    told = settings(
        unet__lora_alpha=3,
        unet__alpha_pattern={"attn1.to_out.0": 5},
        text_encoder__use_rslora=True,
        text_encoder__lora_alpha=4,
        unet__target_modules=["to_q"],
    )
    bound = bind(read(stored(tensors(), tmp_path, told)), BASE)
    assert scales(bound) == [1.5, 2.5, 4 / 2**0.5, 4 / 2**0.5]


def test_a_model_s_own_file_has_metadata_without_components(tmp_path: Path) -> None:
    """``save_lora_adapter``."""
    found = {key.removeprefix("unet."): t for key, t in tensors().items() if key.startswith("unet.")}
    path = stored(found, tmp_path, {"r": 2, "lora_alpha": 8})
    assert format_of(path) == "diffusers"
    assert {site.scale for site in read(path).sites.values()} == {4.0}


def test_metadata_that_is_silent_on_a_component_is_noted(tmp_path: Path) -> None:
    told = {"unet.r": 2, "unet.lora_alpha": 6}
    adapter = read(stored(tensors(), tmp_path, told))
    assert scales(bind(adapter, BASE)) == [3.0, 3.0, 1.0, 1.0]
    assert any("nothing of text_encoder" in note for note in adapter.notes)


def test_biases_and_convolutions(tmp_path: Path) -> None:
    found = {
        "unet.conv.lora_A.weight": torch.randn(2, 3, 3, 3),
        "unet.conv.lora_B.weight": torch.randn(4, 2, 1, 1),
        "unet.conv.lora_B.bias": torch.randn(4),
        "unet.conv.lora_magnitude_vector": torch.rand(1, 4, 1, 1),
    }
    bound = bind(read(stored(found, tmp_path)), {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,)})
    site = bound.sites["conv.weight"]
    assert site.kind == "conv" and site.magnitude is not None and site.magnitude.shape == (4,)
    assert torch.equal(bound.shift["conv.bias"][0], found["unet.conv.lora_B.bias"])


Q = f"unet.{ATTN}.to_q"


@pytest.mark.parametrize(
    ("edit", "told", "said"),
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), None, "its module has no A"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), None, "its module has no B"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(6, 3)}), None, "of one rank"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.full((2, 5), torch.inf)}), None, "infinite"),
        (lambda t: t.update({f"{Q}.lora.down.weight": torch.ones(2, 5)}), None, "same tensor of one module"),
        (lambda t: t.update({f"{Q}.alpha": torch.tensor(0.0)}), None, "would change nothing"),
        (lambda t: t.update({f"{Q}.alpha": torch.ones(3)}), None, "one finite number"),
        (lambda t: t.update({f"{Q}.alpha": torch.tensor(2.0)}), settings(), "said twice"),
        (lambda t: t.update({f"{Q}.lokr_w1": torch.ones(2)}), None, "LoKr"),
        (
            lambda t: t.update(
                {
                    f"diffusion_model.{n}.lora_{f}.weight": torch.ones(2, 2)
                    for n in ("a_b", "a.b")
                    for f in "AB"
                }
            ),
            None,
            "diffusion_model.a_b: two modules",
        ),
        (
            lambda t: t.update({"unet.a.processor.to_k_custom_diffusion.weight": torch.ones(2)}),
            None,
            "Custom",
        ),
        (lambda t: t.update({"unet.mystery": torch.ones(2)}), None, "mystery: unknown key"),
        (lambda t: t.update({"a.to_q.lora.down.weight": torch.ones(2, 2)}), None, "names that do not"),
        (lambda t: None, settings(unet__r=3), "has rank 2, but lora_adapter_metadata says 3"),
        (lambda t: None, settings(unet__use_dora=True), "there is no lora_magnitude_vector"),
        (
            lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(6)}),
            settings(),
            "there is a lora_mag",
        ),
        (lambda t: None, settings(unet__peft_type="LOHA"), "unet, has peft_type 'LOHA'"),
        (lambda t: None, settings(unet__use_qalora=True), "use_qalora"),
    ],
)
def test_what_is_wrong_is_named(
    edit: Callable[[Tensors], object], told: dict[str, Any] | None, said: str, tmp_path: Path
) -> None:
    found = tensors()
    edit(found)
    with pytest.raises(FormatError, match=said):
        read(stored(found, tmp_path, told))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_metadata_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "a.safetensors", {METADATA_KEY: text})
    with pytest.raises(FormatError, match=r"lora_adapter_metadata.*JSON"):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"base_model.model.a.lora_A.weight": 0, "base_model.model.a.lora_B.weight": 0}, "peft"),
        ({"transformer.h.0.attn.lora_A.weight": 0, "transformer.h.0.attn.lora_B.weight": 0}, "peft"),
        ({"transformer.blocks.0.lora_A.weight": 0, "transformer.blocks.0.lora_B.weight": 0}, "diffusers"),
        ({"a.lora_A": 0, "a.lora_B": 0}, "loralib"),
        ({"lora_unet_a.lora_down.weight": 0}, "kohya"),
        ({"diffusion_model.a.lora_down.weight": 0, "diffusion_model.a.lora_up.weight": 0}, "diffusers"),
        ({"diffusion_model.a.lokr_w1": 0, "diffusion_model.a.lokr_w2": 0}, "diffusers"),
        ({"diffusion_model.a.lora_A.weight": 0, "text_encoders.t5xxl.a.lora_A.weight": 0}, "diffusers"),
    ],
)
def test_like_names_of_other_formats_are_told_apart(found: dict[str, int], said: str, tmp_path: Path) -> None:
    """GPT-2's own ``transformer.h`` is no pipeline's, so PEFT's missing configuration is asked for."""
    assert format_of(stored({key: torch.ones(2, 2) for key in found}, tmp_path)) == said


def test_a_denoiser_s_names_are_not_taken_for_a_decoder(tmp_path: Path) -> None:
    """MPT's names begin with ``transformer.blocks``, as some denoisers' do; the base tells them apart."""
    name = "transformer.blocks.0.attn.Wqkv"
    path = stored(
        {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}, tmp_path
    )
    assert read(path).components == {"transformer"}
    with pytest.raises(FormatError, match=r"the base is a mpt.*adapter_config\.json.*--adapter-config"):
        read(path, model={"model_type": "mpt"})
    assert read(path, model={"_class_name": "WanTransformer3DModel"}).sites


def test_a_peft_configuration_beside_the_weights_decides(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 6}')
    path = stored(tensors(), tmp_path)
    assert format_of(path) == "peft" and {s.scale for s in read(path).sites.values()} == {3.0}


def test_a_hub_folder_s_preview_files_do_not_matter(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "pytorch_lora_weights.safetensors")
    save_file({"emb_params": torch.ones(2)}, tmp_path / "learned_embeds.safetensors")
    assert read(tmp_path).files == (tmp_path / "pytorch_lora_weights.safetensors",)


def test_exact_scales_are_folded_and_others_go_into_the_metadata(tmp_path: Path) -> None:
    from dataclasses import replace

    from graft.formats import WRITERS
    from graft.tensors import metadata

    target = Target(model={"_class_name": "XPipeline", "_diffusers_version": "0.1"})
    bound = bind(read(stored(tensors(), tmp_path)), BASE)
    for scale, told in ((0.25, False), (0.3, True)):
        scaled = replace(bound, sites={n: replace(s, scale=scale) for n, s in bound.sites.items()})
        path = tmp_path / str(scale)
        done = written(scaled, path, WRITERS["diffusers"], target)
        assert (METADATA_KEY in metadata(path)) == told
        assert any("ComfyUI" in note for note in done.notes) == told
        back = read(path)
        assert {site.scale for site in back.sites.values()} == {scale if told else 1.0}


def test_dora_on_some_modules_of_a_component_is_lost(tmp_path: Path) -> None:
    from dataclasses import replace

    from graft.formats import WRITERS

    bound = bind(read(stored(tensors(), tmp_path)), BASE)
    sites = {
        n: replace(s, magnitude=torch.ones(s.B.shape[0])) if n.startswith("text_") or "to_q" in n else s
        for n, s in bound.sites.items()
    }
    lost = WRITERS["diffusers"].losses(replace(bound, sites=sites), Target())
    assert [(loss.part, loss.name) for loss in lost] == [("magnitude", f"{Q}.weight")]
