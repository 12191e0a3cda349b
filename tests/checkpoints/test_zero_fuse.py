"""Checkpoint → fused model or adapter, against the recipe of DeepSpeed and PEFT and against exact sums."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from graft.cli.app import cli
from graft.errors import BaseMismatchError, FormatError
from graft.files.convert import convert
from graft.fuse_files import fuse
from graft.rounding import round_once
from graft.tensors import load_file
from graft.verify_files import verify
from tests.checkpoints import models
from tests.files.make import same_bits, save, tensors

pytestmark = pytest.mark.dist

CASES = {
    "peft-1-2": models.PEFT,
    "peft-3-2": models.PEFT,
    "peft-3-lean-2": models.PEFT,
    "peft-3-more-2": models.PEFT_MORE,
    "lightning-2-2.ckpt": models.PEFT,
    "lightning-3-2.ckpt": models.PEFT,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(models.llama(), tmp_path_factory.mktemp("base") / "base")


def configure(folder: Path, settings: dict[str, object]) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", **settings}))
    return path


def oracle(two: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(two / f"{name.removesuffix('.ckpt')}.oracle.pt")


def relative(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names from PEFT's prefix on."""
    return {n[n.index("base_model.") :]: t for n, t in state.items() if "base_model." in n}


def recipe(state: dict[str, torch.Tensor], settings: dict[str, object]) -> dict[str, torch.Tensor]:
    """zero_to_fp32 → load base → get_peft_model → load → merge_and_unload."""
    adapted = models.with_peft(models.llama(), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT about its own merge
        missing = adapted.load_state_dict(relative(state), strict=False)
        assert not missing.unexpected_keys and not any(".lora_" in n for n in missing.missing_keys)
        return {n: t.detach() for n, t in adapted.merge_and_unload().state_dict().items()}


def exact(base: Path, state: dict[str, torch.Tensor], settings: dict[str, object]) -> dict[str, torch.Tensor]:
    """round(W + scale·B·A) in float64; modules that were saved whole take the base's place."""
    out, found = tensors(base), relative(state)
    rank = float(settings["r"])  # type: ignore[arg-type]
    scale = float(settings["lora_alpha"]) / (rank**0.5 if settings.get("use_rslora") else rank)  # type: ignore[arg-type]
    for name, a in found.items():
        module, mark, _ = name.removeprefix("base_model.model.").partition(".lora_A.default.weight")
        if mark:
            delta = found[name.replace("lora_A", "lora_B")].double() @ a.double()
            weight = out[f"{module}.weight"]
            out[f"{module}.weight"] = round_once(weight.double() + scale * delta, weight.dtype)
        module, mark, _ = name.removeprefix("base_model.model.").partition(".lora_embedding_A.default")
        if mark:
            delta = (found[name.replace("_A.", "_B.")].double() @ a.double()).T
            weight = out[f"{module}.weight"]
            out[f"{module}.weight"] = round_once(weight.double() + scale * delta, weight.dtype)
        module, mark, _ = name.removeprefix("base_model.model.").partition(".modules_to_save.default.weight")
        if mark:
            out[f"{module}.weight"] = a.to(out[f"{module}.weight"].dtype)
    return out


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_to_model(two: Path, base: Path, tmp_path: Path, name: str) -> None:
    config, out = configure(tmp_path, CASES[name]), tmp_path / "out"
    words = ["fuse", str(base), str(two / name), "--adapter-config", str(config), "-o", str(out)]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    state = oracle(two, name)
    fused = tensors(out)
    same_bits(fused, exact(base, state, CASES[name]))
    for key, expected in recipe(state, CASES[name]).items():
        assert torch.allclose(fused[key].float(), expected.float(), rtol=0.02, atol=1e-3), key
    verify(out, base, two / name, adapter_config=config)


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_to_peft_adapter(two: Path, base: Path, tmp_path: Path, name: str) -> None:
    """PEFT loads what convert writes, and it fuses to the same bits as the checkpoint itself."""
    from peft import PeftModel

    config = configure(tmp_path, CASES[name])
    report = convert(two / name, tmp_path / "adapter", adapter_config=config)
    assert report.sites == (5 if "more" in name else 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT about transformers' names
        loaded = PeftModel.from_pretrained(models.llama(), tmp_path / "adapter").state_dict()
    for key, tensor in relative(oracle(two, name)).items():
        if ".lora_" in key or "modules_to_save" in key:
            assert torch.equal(loaded[key].float(), tensor.to(loaded[key].dtype).float()), key
    fuse(base, tmp_path / "adapter", tmp_path / "one")
    fuse(base, two / name, tmp_path / "two", adapter_config=config)
    same_bits(tensors(tmp_path / "one"), tensors(tmp_path / "two"))


@pytest.mark.parametrize("nested", [False, True])
def test_consolidated_file(two: Path, base: Path, tmp_path: Path, nested: bool) -> None:
    """What zero_to_fp32 writes, plain or as Lightning's single file."""
    state = oracle(two, "lightning-3-2.ckpt")
    torch.save({"state_dict": state, "epoch": 1} if nested else state, tmp_path / "all.ckpt")
    config = configure(tmp_path, models.PEFT)
    fuse(base, tmp_path / "all.ckpt", tmp_path / "out", adapter_config=config)
    same_bits(tensors(tmp_path / "out"), exact(base, state, models.PEFT))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", ["peft-3-2", "lightning-2-2.ckpt"])
def test_consolidated_in_several_files(two: Path, base: Path, tmp_path: Path, name: str, safe: bool) -> None:
    """The folder that zero_to_fp32 itself writes, with its index; a shard that is missing is named."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as consolidate

    folder = tmp_path / "consolidated"
    consolidate(str(two / name), str(folder), max_shard_size="20KB", safe_serialization=safe)
    shards = sorted(folder.glob("*-of-*"))
    assert len(shards) > 1
    config = configure(tmp_path, models.PEFT)
    fuse(base, folder, tmp_path / "out", adapter_config=config)
    same_bits(tensors(tmp_path / "out"), exact(base, oracle(two, name), models.PEFT))
    verify(tmp_path / "out", base, folder, adapter_config=config)
    found = CliRunner().invoke(cli, ["inspect", str(folder), "--adapter-config", str(config)])
    assert found.output.startswith("adapter ")
    shards[1].unlink()
    with pytest.raises(FormatError, match=f"shard {shards[1].name} is missing"):
        fuse(base, folder, tmp_path / "less", adapter_config=config)
    assert not (tmp_path / "less").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_grafts_own_names(two: Path, base: Path, tmp_path: Path, stage: int) -> None:
    """A model adapted by Graft; the final norm was trained in full beside the factors."""
    state, expected = oracle(two, f"graft-{stage}-2"), tensors(base)
    for name, a in state.items():
        module, mark, _ = name.partition(".lora_A")
        if mark:
            delta = state[f"{module}.lora_B"].double() @ a.double()
            weight = expected[f"{module}.weight"]
            expected[f"{module}.weight"] = round_once(weight.double() + 8 / 3 * delta, weight.dtype)
    expected["model.norm.weight"] = state["model.norm.weight"].to(torch.bfloat16)
    assert not torch.equal(expected["model.norm.weight"], tensors(base)["model.norm.weight"])
    config = configure(tmp_path, {"r": 3, "lora_alpha": 8})
    report = fuse(base, two / f"graft-{stage}-2", tmp_path / "out", adapter_config=config)
    same_bits(tensors(tmp_path / "out"), expected)
    adapted = {n for n in expected if n.endswith(("q_proj.weight", "down_proj.weight"))}
    assert report.changed.keys() == adapted | {"model.norm.weight"}
    convert(two / f"graft-{stage}-2", tmp_path / "adapter", adapter_config=config)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(factors[f"base_model.model.{name}.weight"], state[name])


def test_the_frozen_base_must_be_this_base(two: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, models.PEFT)
    for other, said in ((models.llama(seed=7), "another base"), (models.llama(layers=1), "layers up to 1")):
        folder = save(other, tmp_path / "other")
        with pytest.raises(BaseMismatchError, match=said):
            fuse(folder, two / "peft-3-2", tmp_path / "out", adapter_config=config, force=True)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(folder)


def test_a_model_without_an_adapter(two: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="without an adapter"):
        fuse(base, two / "odd-3-bf16-2", tmp_path / "out", adapter_config=configure(tmp_path, models.PEFT))


def test_the_configuration_may_lie_in_the_checkpoint(two: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="--adapter-config"):
        fuse(base, two / "peft-3-2", tmp_path / "out")
    shutil.copytree(two / "peft-3-2", tmp_path / "copy")
    configure(tmp_path / "copy", models.PEFT)
    fuse(base, tmp_path / "copy", tmp_path / "out")
    same_bits(tensors(tmp_path / "out"), exact(base, oracle(two, "peft-3-2"), models.PEFT))
