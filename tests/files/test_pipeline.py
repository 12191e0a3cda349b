"""A diffusers pipeline as the base: every model in its folder, one output, one proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from graft.bind import bind
from graft.cli.app import cli
from graft.errors import BaseMismatchError, FormatError, OutputError, StateError, VerifyError
from graft.files.convert import convert
from graft.files.work import Work
from graft.formats import read
from graft.fuse_files import fuse
from graft.inspect_files import ModelReport, inspect
from graft.rounding import round_once
from graft.tensors import open_checkpoint
from graft.verify_files import verify
from tests.formats.kohya_files import TEXT, UNET, module, tensors

Tensors = dict[str, torch.Tensor]
VAE = {"decoder.conv_in.weight": (4, 3, 3, 3), "decoder.conv_in.bias": (4,)}


def make(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Tensors:
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A sharded UNet, a text encoder in one file, a pickled VAE, and folders without weights."""
    torch.manual_seed(0)
    folder = tmp_path / "base"
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.1"}
    classes = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "DDIMScheduler"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "safety_checker": (None, None),
    }
    index |= {name: list(kind) for name, kind in classes.items()}
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler/scheduler_config.json", {"steps": 1})
    write_json(folder / "tokenizer/vocab.json", {"a": 0})
    (folder / "v1-5-pruned.ckpt").write_bytes(b"not copied")
    about = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.1"}
    write_json(folder / "unet/config.json", about)
    write_json(folder / "vae/config.json", {**about, "_class_name": "AutoencoderKL"})
    write_json(folder / "text_encoder/config.json", {"model_type": "clip_text_model", "dtype": "float16"})
    denoiser = make(UNET, torch.float32)
    table = {}
    for n, (name, tensor) in enumerate(denoiser.items(), 1):
        file = f"diffusion_pytorch_model-{n:05}-of-00004.safetensors"
        save_file({name: tensor}, folder / "unet" / file, {"format": "pt"})
        table[name] = file
    place = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    write_json(place, {"metadata": {"total_size": 1}, "weight_map": table})
    save_file(make(TEXT, torch.float16), folder / "text_encoder/model.safetensors", {"format": "pt"})
    torch.save(make(VAE, torch.float32), folder / "vae/diffusion_pytorch_model.bin")
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def weights(folder: Path) -> Tensors:
    opened = open_checkpoint(folder)
    return {name: opened.read(name).clone() for name in opened.entries}


def expected(base: Path, lora: Path, dtype: torch.dtype | None = None) -> Tensors:
    """W + ΔW in float64, rounded once, by component and name."""
    before = weights(base)
    bound = bind(read(lora), {name: tuple(t.shape) for name, t in before.items()})
    found = {name: tensor.double() for name, tensor in before.items()}
    for name, site in bound.sites.items():
        delta = site.scale * (site.B.double() @ site.A.double())
        found[name] = found[name] + delta.view(before[name].shape)
    return {name: round_once(tensor, dtype or before[name].dtype) for name, tensor in found.items()}


def assert_same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_every_model_in_its_folder(base: Path, lora: Path, tmp_path: Path) -> None:
    report = fuse(base, lora, tmp_path / "out")
    assert_same(weights(tmp_path / "out"), expected(base, lora))
    assert set(report.changed) == {*(f"unet.{n}" for n in UNET), *(f"text_encoder.{n}" for n in TEXT)}
    assert "changed: unet (4 tensors), text_encoder (2 tensors); not changed: vae" in report.notes
    want = {name for name in names(base) if not name.endswith((".ckpt", ".bin"))}
    want |= {"README.md", "graft.json", "vae/diffusion_pytorch_model.safetensors"}
    assert names(tmp_path / "out") == want
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    table = json.loads((tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert table["weight_map"].keys() == UNET.keys()
    assert table["metadata"]["total_size"] == sum(4 * t.numel() for t in weights(base / "unet").values())
    assert 'library_name: "diffusers"' in (tmp_path / "out/README.md").read_text()


def test_one_model_of_it_is_the_same_model(base: Path, lora: Path, tmp_path: Path) -> None:
    """The pipeline's UNet, and the UNet alone with its part of the adapter."""
    fuse(base, lora, tmp_path / "whole")
    for name in ("unet", "text_encoder"):
        report = fuse(base / name, lora, tmp_path / name, component=name)
        assert any("left out" in note for note in report.notes)
        assert_same(weights(tmp_path / name), weights(tmp_path / "whole" / name))
        verify(tmp_path / name, base / name, lora)  # with the component that graft.json records


def test_a_part_of_the_adapter_in_the_whole_pipeline(base: Path, lora: Path, tmp_path: Path) -> None:
    report = fuse(base, lora, tmp_path / "out", component="text_encoder")
    assert set(report.changed) == {f"text_encoder.{name}" for name in TEXT}
    assert_same(weights(tmp_path / "out" / "unet"), weights(base / "unet"))


def test_a_part_for_another_model_is_never_dropped_in_silence(base: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseMismatchError, match=r"model_index\.json.*--component text_encoder"):
        fuse(base / "unet", lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_names_what_differs(base: Path, lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fuse(base, lora, out)
    report = verify(out, base, lora)
    assert report.recomputed == 6 and "output unet/config.json" in report.files
    for file, said in (
        ("text_encoder/model.safetensors", r"text_encoder\."),
        ("scheduler/scheduler_config.json", "scheduler_config"),
    ):
        data = (out / file).read_bytes()
        (out / file).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        with pytest.raises(VerifyError, match=said):
            verify(out, base, lora)
        (out / file).write_bytes(data)
    verify(out, base, lora)


def test_dtype_is_every_model_s(base: Path, lora: Path, tmp_path: Path) -> None:
    fuse(base, lora, tmp_path / "out", dtype="bfloat16")
    assert_same(weights(tmp_path / "out"), expected(base, lora, torch.bfloat16))
    told = json.loads((tmp_path / "out/text_encoder/config.json").read_text())
    assert told["dtype"] == "bfloat16"
    assert (tmp_path / "out/unet/config.json").read_bytes() == (base / "unet/config.json").read_bytes()
    verify(tmp_path / "out", base, lora)


def test_shards_are_each_model_s_own(base: Path, lora: Path, tmp_path: Path) -> None:
    fuse(base, lora, tmp_path / "out", max_shard_size=400)
    assert_same(weights(tmp_path / "out"), expected(base, lora))
    made = names(tmp_path / "out")
    assert (
        "text_encoder/model.safetensors" in made
        and "vae/diffusion_pytorch_model-00002-of-00002.safetensors" in made
    )
    assert "text_encoder/model.safetensors.index.json" not in made
    verify(tmp_path / "out", base, lora)


def test_output_is_whole_or_not_at_all(
    base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert fuse(base, lora, out, dry_run=True).dry_run and not out.exists()
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Work, "_record", lambda *_: (_ for _ in ()).throw(RuntimeError("stopped")))
        with pytest.raises(RuntimeError, match="stopped"):
            fuse(base, lora, out)
    assert names(tmp_path) == before
    fuse(base, lora, out)
    with pytest.raises(OutputError, match="already exists"):
        fuse(base, lora, out)
    fuse(base, lora, out, force=True, scale=0.5)
    for inside in (base / "unet" / "out", base / "out"):
        with pytest.raises(OutputError, match="share files"):
            fuse(base, lora, inside)


def test_nothing_is_fused_twice(base: Path, lora: Path, tmp_path: Path) -> None:
    """A pipeline knows what was fused into it, and so do its models' folders, alone and together."""
    fuse(base, lora, tmp_path / "out")
    with pytest.raises(OutputError, match="already holds this adapter"):
        fuse(tmp_path / "out", lora, tmp_path / "again")
    with pytest.raises(OutputError, match="already holds this adapter"):
        fuse(tmp_path / "out" / "unet", lora, tmp_path / "again", component="unet")
    fuse(base / "unet", lora, tmp_path / "unet", component="unet")
    (base / "unet/graft.json").write_bytes((tmp_path / "unet/graft.json").read_bytes())
    with pytest.raises(OutputError, match="already holds this adapter"):
        fuse(base, lora, tmp_path / "again")


def test_a_variant_keeps_its_names(base: Path, lora: Path, tmp_path: Path) -> None:
    (base / "text_encoder/model.safetensors").rename(base / "text_encoder/model.fp16.safetensors")
    fuse(base, lora, tmp_path / "out")
    assert (tmp_path / "out/text_encoder/model.fp16.safetensors").is_file()
    assert_same(weights(tmp_path / "out"), expected(base, lora))
    for path in (base / "unet").glob("*index.json"):
        path.rename(path.with_name(path.name.replace("index.json", "index.fp16.json")))
    fuse(base, lora, tmp_path / "two", max_shard_size=700)
    assert "unet/diffusion_pytorch_model.safetensors.index.fp16.json" in names(tmp_path / "two")
    assert "unet/diffusion_pytorch_model.fp16-00003-of-00003.safetensors" in names(tmp_path / "two")
    verify(tmp_path / "two", base, lora)
    save_file(make(TEXT, torch.float32), base / "text_encoder/model.ema.safetensors")
    with pytest.raises(FormatError, match=r"several variants.*model\.ema\.safetensors, model\.fp16"):
        fuse(base, lora, tmp_path / "three")


def test_plain_weights_come_before_a_variant(base: Path, lora: Path, tmp_path: Path) -> None:
    save_file(make(TEXT, torch.float16), base / "text_encoder/model.fp16.safetensors")
    write_json(base / "unet/diffusion_pytorch_model.safetensors.index.fp16.json", {"weight_map": {}})
    assert open_checkpoint(base / "text_encoder").names.variant == ""
    fuse(base, lora, tmp_path / "out")
    assert not [name for name in names(tmp_path / "out") if "fp16" in name]


def edit_index(base: Path, **changes: object) -> None:
    path = base / "model_index.json"
    write_json(path, {**json.loads(path.read_text()), **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transformer": ["diffusers", "X"]}, "the component transformer is missing"),
        ({"../other": ["diffusers", "X"]}, "outside the folder"),
        ({"..": ["diffusers", "X"]}, "outside the folder"),
    ],
)
def test_incomplete_pipelines_are_refused(changes: dict[str, object], said: str, base: Path) -> None:
    edit_index(base, **changes)
    with pytest.raises(FormatError, match=said):
        open_checkpoint(base)


def test_weights_that_cannot_be_read_are_named(base: Path, tmp_path: Path) -> None:
    (base / "vae/diffusion_pytorch_model.bin").rename(base / "vae/diffusion_flax_model.msgpack")
    with pytest.raises(FormatError, match=r"vae holds no weights: looked for .*diffusion_pytorch_model"):
        open_checkpoint(base)
    write_json(tmp_path / "empty/model_index.json", {"_class_name": "X"})
    with pytest.raises(FormatError, match="none of the components"):
        open_checkpoint(tmp_path / "empty")


def test_a_quantised_model_is_refused(base: Path, lora: Path, tmp_path: Path) -> None:
    path = base / "unet/config.json"
    write_json(
        path, {**json.loads(path.read_text()), "quantization_config": {"quant_method": "bitsandbytes"}}
    )
    with pytest.raises(StateError, match=r"unet/config\.json says that it is quantised"):
        fuse(base, lora, tmp_path / "out")


def test_inspect_shows_the_components(base: Path) -> None:
    report = inspect(base)
    assert isinstance(report, ModelReport)
    assert report.components == {"unet": 4, "text_encoder": 2, "vae": 2}
    assert report.architectures == ("StableDiffusionPipeline",) and "unet/" in report.files[-2]
    assert isinstance(inspect(base / "unet"), ModelReport)
    shown = CliRunner().invoke(cli, ["inspect", str(base)]).output
    assert "unet (4 tensors)" in shown


def test_convert_names_the_component_by_the_base(base: Path, lora: Path, tmp_path: Path) -> None:
    """kohya's file → diffusers' → kohya's again, by the pipeline and by one of its models."""
    convert(lora, tmp_path / "d", to="diffusers", base=base)
    convert(tmp_path / "d", tmp_path / "k", to="kohya", base=base)
    assert_same(expected(base, tmp_path / "k"), expected(base, lora))
    convert(lora, tmp_path / "u", to="diffusers", base=base / "unet", component="unet")
    assert read(tmp_path / "u").components == {"unet"}


def test_formats_of_one_model_get_its_own_names(base: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"for one model.*--component text_encoder"):
        convert(lora, tmp_path / "p", to="peft", base=base)
    convert(lora, tmp_path / "d", to="diffusers", base=base)
    for name, source, place in (("a", lora, base), ("b", lora, base / "unet"), ("c", tmp_path / "d", None)):
        convert(source, tmp_path / name, to="peft", base=place, component="unet")
        assert read(tmp_path / name).sites.keys() == UNET.keys()
        fuse(base / "unet", tmp_path / name, tmp_path / f"fused-{name}")
        fuse(base, tmp_path / name, tmp_path / f"whole-{name}")
        one, whole = weights(tmp_path / f"fused-{name}"), weights(tmp_path / f"whole-{name}")
        assert_same(one, {n.removeprefix("unet."): t for n, t in whole.items() if n.startswith("unet.")})


def test_the_command(base: Path, lora: Path, tmp_path: Path) -> None:
    def run(*words: object) -> tuple[int, str]:
        result = CliRunner().invoke(cli, [str(word) for word in words])
        return result.exit_code, result.output + (result.stderr if result.stderr_bytes else "")

    code, said = run("fuse", base / "unet", lora, "-o", tmp_path / "a")
    assert code == 2 and "--component" in said
    code, said = run("fuse", base / "unet", lora, "-o", tmp_path / "a", "--component", "unet")
    assert code == 0 and "left out: text_encoder (2 updates)" in said
    assert run("verify", tmp_path / "a", "--base", base / "unet", "--adapter", lora)[0] == 0
    assert run("fuse", base, lora, "-o", tmp_path / "b")[0] == 0
    assert run("verify", tmp_path / "b", "--base", base, "--adapter", lora)[0] == 0
    code, said = run("inspect", lora, "--component", "unet", "--base", base / "unet")
    assert code == 0 and "down_blocks.0.resnets.0.conv1.weight" in said and "text_model" not in said
    assert run("fuse", base, lora, "-o", tmp_path / "c", "--component", "vae")[0] == 2


def test_loading_into_a_model_in_memory(lora: Path, tmp_path: Path) -> None:
    import graft

    model = torch.nn.Sequential()
    model.add_module("proj_in", torch.nn.Linear(6, 6))
    found = {**module("lora_unet_proj_in", (6, 6)), **module("lora_te_a", (3, 3))}
    save_file(found, tmp_path / "one.safetensors")
    with pytest.raises(BaseMismatchError, match="component='text_encoder'"):
        graft.load(model, tmp_path / "one.safetensors")
    report = graft.load(model, tmp_path / "one.safetensors", component="unet", quiet=True)
    assert report.sites == ("proj_in.weight",)
