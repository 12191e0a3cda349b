"""Whole pipelines fused from file to file, against diffusers' own ``load_lora_weights`` and ``fuse_lora``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from graft.bind import bind
from graft.bind_flat import flat
from graft.bind_flux import flux_names
from graft.bind_ldm import ldm_names
from graft.files.convert import convert
from graft.formats import read
from graft.fuse_files import FuseReport, fuse
from graft.verify_files import verify

from . import dialects, tiny
from .tiny import ATTENTION, DENOISER, EMBEDDERS, SAMPLERS, TEXT, Updates, quiet


class Base:
    """A pipeline on disk and what it holds."""

    def __init__(self, pipeline: Any, folder: Path) -> None:
        self.kind, self.folder = type(pipeline), tiny.save(pipeline, folder)
        self.pipeline = pipeline
        self.weights = {name: value.clone() for name, value in tiny.weights(pipeline).items()}

    def updates(self, ends: tuple[str, ...], **ranks: int) -> dict[str, Updates]:
        """Random updates of the denoiser (``ends``) and of each text encoder that is given a rank."""
        found = {"unet": tiny.adapted(self.pipeline.unet, ends)}
        for seed, (name, rank) in enumerate(ranks.items(), 1):
            found[name] = tiny.adapted(getattr(self.pipeline, name), TEXT, rank, seed)
        return found

    def by_diffusers(self, file: Path) -> dict[str, torch.Tensor]:
        """What diffusers makes of the file."""
        pipe = tiny.load(self.kind, self.folder)
        quiet(pipe.load_lora_weights, str(file))
        quiet(pipe.fuse_lora)
        quiet(pipe.unload_lora_weights)
        return tiny.weights(pipe)

    def by_graft(self, file: Path, out: Path) -> tuple[dict[str, torch.Tensor], FuseReport]:
        """What ``graft fuse`` makes of it, loaded by diffusers; ``graft verify`` agrees."""
        report = fuse(self.folder, file, out)
        assert verify(out, self.folder, file).recomputed == len(report.changed)
        return tiny.weights(tiny.load(self.kind, out)), report


@pytest.fixture(scope="module", autouse=True)
def diffusers() -> None:
    """Imported only here: it takes seconds, which every process that collects tests would spend."""
    quiet(pytest.importorskip, "diffusers")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(quiet(tiny.stable_diffusion), tmp_path_factory.mktemp("sd") / "base")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(quiet(tiny.sdxl), tmp_path_factory.mktemp("sdxl") / "base")


def assert_fused(base: Base, file: Path, out: Path, updates: dict[str, Updates], scale: float) -> FuseReport:
    """Graft and diffusers make the same of the file, and it is what the definition says."""
    theirs, (ours, report) = base.by_diffusers(file), base.by_graft(file, out)
    want = tiny.expected(base.weights, updates, scale)
    assert theirs.keys() == ours.keys() == want.keys()
    for name in want:
        assert torch.equal(ours[name], want[name].to(ours[name].dtype)), name
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-5, atol=1e-6, msg=name)
    changed = {f"{component}.{module}.weight" for component, mine in updates.items() for module in mine}
    assert set(report.changed) == changed
    assert (out / "tokenizer/vocab.json").is_file() and (out / "model_index.json").is_file()
    return report


ERAS = {
    "kohya": lambda u: dialects.kohya(u, 1.0),
    "no alpha": lambda u: dialects.kohya(u),
    "peft": dialects.peft_era,
    "layer": dialects.layer_era,
    "processor": dialects.processor_era,
}


@pytest.mark.parametrize("era", ERAS)
def test_stable_diffusion_in_every_naming(era: str, sd: Base, tmp_path: Path) -> None:
    updates = sd.updates(ATTENTION if era == "processor" else DENOISER, text_encoder=2)
    if era == "processor":
        updates["text_encoder"] = {n: p for n, p in updates["text_encoder"].items() if "_proj" in n}
    save_file(ERAS[era](updates), tmp_path / "lora.safetensors")
    report = assert_fused(
        sd, tmp_path / "lora.safetensors", tmp_path / "out", updates, 0.5 if era == "kohya" else 1.0
    )
    assert report.format == ("kohya" if era in ("kohya", "no alpha") else "diffusers")
    assert any("text_model" in note and note.startswith("text_encoder: ") for note in report.notes)


def test_sdxl_in_ldm_s_names(sdxl: Base, tmp_path: Path) -> None:
    """sd-scripts trains SDXL under LDM's names; diffusers has its own mapping of them."""
    updates = sdxl.updates((*DENOISER, *SAMPLERS, *EMBEDDERS), text_encoder=3, text_encoder_2=1)
    names = {ours: theirs for theirs, ours in ldm_names(f"{m}.weight" for m in updates["unet"]).items()}
    spelled = {m: names[f"{m}.weight"].removesuffix(".weight") for m in updates["unet"]}
    assert {name.partition(".")[0] for name in spelled.values()} == {
        "input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"
    }  # fmt: skip
    heads = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    tensors = dialects.kohya(updates, None, spelled.__getitem__, heads)
    save_file(tensors, tmp_path / "lora.safetensors")
    report = assert_fused(sdxl, tmp_path / "lora.safetensors", tmp_path / "out", updates, 1.0)
    assert any("LDM's names" in note for note in report.notes)


def test_a_file_that_diffusers_saved_with_its_metadata(sd: Base, tmp_path: Path) -> None:
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = tiny.load(sd.kind, sd.folder)
    patterns = {"rank_pattern": {"attn1.to_q": 3}, "alpha_pattern": {"attn1.to_q": 7, "to_k": 5}}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k", "conv1"], **patterns)
    text = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "fc1"])
    quiet(pipe.unet.add_adapter, config)
    quiet(pipe.text_encoder.add_adapter, text)
    for model in (pipe.unet, pipe.text_encoder):
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    quiet(
        sd.kind.save_lora_weights,
        tmp_path / "lora",
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=config.to_dict(),
        text_encoder_lora_adapter_metadata=text.to_dict(),
    )
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    from graft.tensors import metadata

    assert LORA_ADAPTER_METADATA_KEY in metadata(file)
    quiet(pipe.fuse_lora)
    quiet(pipe.unload_lora_weights)
    theirs, (ours, report) = tiny.weights(pipe), sd.by_graft(tmp_path / "lora", tmp_path / "out")
    changed = {name for name, weight in sd.weights.items() if not torch.equal(weight, ours[name])}
    assert changed == set(report.changed) and any("conv1" in name for name in changed)
    for name in theirs:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("alpha", [1.0, 1.3])
def test_diffusers_reads_what_is_written(to: str, alpha: float, sdxl: Base, tmp_path: Path) -> None:
    """Also a scale that no factor of float32 holds: kohya's alpha, diffusers' metadata."""
    updates = sdxl.updates(("to_q", "proj_out", "conv1"), text_encoder=2, text_encoder_2=2)
    save_file(dialects.kohya(updates, alpha), tmp_path / "one.safetensors")
    two = tmp_path / "two.safetensors"
    report = convert(tmp_path / "one.safetensors", two, to=to, base=sdxl.folder)
    assert report.read_as == "kohya" and report.written_as == to
    assert any("metadata" in note for note in report.notes) == (to == "diffusers" and alpha == 1.3)
    scale = torch.tensor(alpha).double().item() / 2
    want = tiny.expected(sdxl.weights, updates, scale)
    theirs, (ours, _) = sdxl.by_diffusers(two), sdxl.by_graft(two, tmp_path / "out")
    for name in want:
        assert torch.equal(ours[name], want[name].to(ours[name].dtype)), name
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-5, atol=1e-6, msg=name)
    assert len({*updates["unet"], *updates["text_encoder_2"]}) > 10


def test_two_roads_one_number(sd: Base, tmp_path: Path) -> None:
    """``graft.load`` into the model in memory, and ``graft fuse`` of the files."""
    import graft

    save_file(dialects.kohya(sd.updates(DENOISER, text_encoder=2), 1.0), tmp_path / "lora.safetensors")
    ours, _ = sd.by_graft(tmp_path / "lora.safetensors", tmp_path / "out")
    pipe = tiny.load(sd.kind, sd.folder)
    for name in ("unet", "text_encoder"):
        model = getattr(pipe, name)
        graft.load(model, tmp_path / "lora.safetensors", component=name, quiet=True)
        graft.fuse(model)
    fused = {name: pipe_weight for name, pipe_weight in tiny.weights(pipe).items() if name in ours}
    assert fused.keys() == ours.keys()
    for name, to in (("unet", "kohya"), ("unet", "diffusers"), ("text_encoder", "kohya")):
        file = tmp_path / f"{name}-{to}"
        graft.save(getattr(pipe, name), file, format=to)
        again, _ = sd.by_graft(file, tmp_path / f"{name}-{to}-out")
        assert all(torch.equal(again[key], ours[key]) for key in ours if key.startswith(f"{name}."))
    assert all(torch.equal(fused[name], ours[name]) for name in ours)


def test_flux_in_the_names_of_its_authors(tmp_path: Path) -> None:
    """sd-scripts' Flux file, module by module, as diffusers splits and renames it."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers as convert_flux

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=1, guidance_embeds=True)
    base = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for told, spelling in flux_names(base).items():
        if spelling.naming.startswith("XLabs"):
            continue
        key = f"lora_unet_{flat(told).removesuffix('.weight')}"
        width = base[next(iter(spelling.parts))][1]
        tensors[f"{key}.lora_down.weight"] = torch.randn(1, width)
        tensors[f"{key}.lora_up.weight"] = torch.randn(spelling.rows, 1)
    theirs = quiet(convert_flux, dict(tensors))
    save_file(tensors, tmp_path / "lora.safetensors")
    adapter = read(tmp_path / "lora.safetensors")
    ours = bind(adapter, {f"transformer.{name}": shape for name, shape in base.items()}).sites
    assert len(ours) == len(theirs) // 2 == 2 * 14 + 6 + 10
    for name, site in ours.items():
        module = name.removeprefix("transformer.").removesuffix(".weight")
        start = "transformer." if f"transformer.{module}.lora_A.weight" in theirs else ""
        assert torch.equal(site.A, theirs[f"{start}{module}.lora_A.weight"]), name
        assert torch.equal(site.B, theirs[f"{start}{module}.lora_B.weight"]), name


def test_flux_in_xlabs_names(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers as convert_flux

    shapes = {
        "double_blocks.0.processor.qkv_lora1": (24, 8),
        "double_blocks.0.processor.proj_lora1": (8, 8),
        "double_blocks.0.processor.qkv_lora2": (24, 8),
        "double_blocks.0.processor.proj_lora2": (8, 8),
        "single_blocks.0.processor.qkv_lora": (24, 8),
        "single_blocks.0.processor.proj_lora": (8, 40),
    }
    tensors = {f"{name}.down.weight": torch.randn(2, wide) for name, (_, wide) in shapes.items()}
    tensors |= {f"{name}.up.weight": torch.randn(rows, 2) for name, (rows, _) in shapes.items()}
    theirs = quiet(convert_flux, dict(tensors))
    base = {
        key.removeprefix("transformer.").replace("lora_B.weight", "weight"): (
            t.shape[0],
            theirs[key.replace("lora_B", "lora_A")].shape[1],
        )
        for key, t in theirs.items()
        if "lora_B" in key.split(".")
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    ours = bind(read(tmp_path / "lora.safetensors"), {**base, "context_embedder.weight": (8, 6)}).sites
    assert len(ours) == len(theirs) // 2 == 12
    for name, site in ours.items():
        module = f"transformer.{name.removesuffix('.weight')}"
        assert torch.equal(site.A, theirs[f"{module}.lora_A.weight"]), name
        assert torch.equal(site.B, theirs[f"{module}.lora_B.weight"]) and site.scale == 1, name
