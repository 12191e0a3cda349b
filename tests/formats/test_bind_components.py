"""An adapter for several models of a pipeline: bound to the pipeline, or to one of its models."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.bind import bind
from graft.errors import BaseMismatchError, FormatError
from graft.formats import read

from .kohya_files import PIPELINE, TEXT, UNET, module, stored, tensors


def test_several_components_do_not_fit_one_model(tmp_path: Path) -> None:
    adapter = read(stored(tensors(), tmp_path))
    with pytest.raises(BaseMismatchError) as error:
        bind(adapter, UNET)
    for said in ("text_encoder (2 updates)", "unet (4 updates)", "model_index.json", "--component"):
        assert said in str(error.value)


def test_one_component_is_chosen_and_the_rest_named(tmp_path: Path) -> None:
    path = stored(tensors(), tmp_path)
    part = read(path, component="unet")
    assert any("left out: text_encoder (2 updates)" in note for note in part.notes)
    assert bind(part, UNET).sites.keys() == UNET.keys()
    assert all(name.startswith("unet.") for name in bind(part, PIPELINE).sites)
    assert bind(read(path, component="text_encoder"), TEXT).sites.keys() == TEXT.keys()
    assert read(path, component="transformer").components == {"unet"}  # lora_unet is any denoiser
    with pytest.raises(FormatError, match=r"nothing for the component 'vae'.*text_encoder, unet"):
        read(path, component="vae")


def test_a_component_that_the_pipeline_lacks_is_named(tmp_path: Path) -> None:
    path = stored({**tensors(), **module("lora_te2_text_projection", (4, 5))}, tmp_path)
    with pytest.raises(
        BaseMismatchError, match=r"text_encoder_2 \(1 updates\).*no such component.*--component"
    ):
        bind(read(path), PIPELINE)


def test_two_components_are_not_one_model(tmp_path: Path) -> None:
    """``lora_unet`` may be a transformer, but not the one that ``lora_transformer`` is."""
    path = stored({**module("lora_unet_a", (2, 2)), **module("lora_transformer_b", (2, 2))}, tmp_path)
    with pytest.raises(BaseMismatchError, match=r"unet \(1 updates\), and the base has no such"):
        bind(read(path), {"transformer.a.weight": (2, 2), "transformer.b.weight": (2, 2)})


def test_faults_of_all_components_are_said_at_once(tmp_path: Path) -> None:
    base = {name.replace("q_proj", "query").replace("conv1", "first"): s for name, s in PIPELINE.items()}
    with pytest.raises(BaseMismatchError, match=r"(?s)text_encoder: .*q_proj.*unet: .*conv1"):
        bind(read(stored(tensors(), tmp_path)), base)


def test_each_component_has_its_own_prefix(tmp_path: Path) -> None:
    """transformers 5 saves one kind of CLIP without ``text_model``, and the other with it."""
    second = {
        f"lora_te2_{key.removeprefix('lora_te_')}": t for key, t in tensors().items() if "lora_te_" in key
    }
    base = {name.replace("text_model.", ""): shape for name, shape in PIPELINE.items()}
    base |= {f"text_encoder_2.{name}": shape for name, shape in TEXT.items()}
    bound = bind(read(stored({**tensors(), **second}, tmp_path)), base)
    assert bound.sites.keys() == base.keys()
    assert [note for note in bound.notes if "repaired" in note] == [
        "text_encoder: names repaired: the prefix 'text_model_' was taken off"
    ]


def test_flux_s_t5_is_the_second_encoder(tmp_path: Path) -> None:
    """sd-scripts numbers T5 third, for SD 3's sake, and calls every denoiser unet."""
    found = {
        **module("lora_unet_proj", (4, 4)),
        **module("lora_te1_q", (4, 4)),
        **module("lora_te3_q", (5, 4)),
    }
    base = {
        "transformer.proj.weight": (4, 4),
        "text_encoder.q.weight": (4, 4),
        "text_encoder_2.q.weight": (5, 4),
    }
    adapter = read(stored(found, tmp_path))
    assert bind(adapter, base).sites.keys() == base.keys()
    sd3 = {**base, "text_encoder_2.q.weight": (6, 6), "text_encoder_3.q.weight": (5, 4)}
    assert bind(adapter, sd3).sites.keys() == sd3.keys() - {"text_encoder_2.q.weight"}
