"""torchtune's files: names, the order of q's and k's rows, DoRA, its export to PEFT, its own functions."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from graft.adapter import Adapter
from graft.bind import bind
from graft.errors import FormatError
from graft.formats import Target, read, write
from graft.formats.torchtune import TorchtuneFormat
from graft.formats.torchtune_names import NAMES

from .carrying import LINEAR, MODEL, SHAPES, assert_same_update, plain, update
from .peers import reference

#: torchtune's own shapes of the same decoder
THEIRS = {NAMES.theirs(name.removesuffix(".weight")) or "": shape for name, shape in LINEAR.items()}
RECIPE = "model:\n  _component_: torchtune.models.llama2.lora_llama2\n  lora_rank: 2\n  lora_alpha: 3\n"


def lora(*, dora: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for module, (out, wide) in THEIRS.items():
        found[f"{module}.lora_a.weight"] = torch.randn(2, wide)
        found[f"{module}.lora_b.weight"] = torch.randn(out, 2)
        if dora:
            found[f"{module}.magnitude"] = torch.rand(out) + 0.5
    return found


def save(folder: Path, tensors: dict[str, torch.Tensor], recipe: str | None = RECIPE) -> Path:
    folder.mkdir()
    torch.save(tensors, folder / "adapter_0.pt")
    if recipe is not None:
        (folder / "torchtune_config.yaml").write_text(recipe)
    return folder


def halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: a head's rows 0, 2, 4, … are its first half in transformers, 1, 3, 5, … its second."""
    size = tensor.shape[0] // heads
    order = [h * size + 2 * j + part for h in range(heads) for part in (0, 1) for j in range(size // 2)]
    return tensor[order]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "qwen2", "qwen3"])
@pytest.mark.parametrize("dora", [False, True])
def test_rows_of_q_and_k_and_their_magnitudes(kind: str, dora: bool, tmp_path: Path) -> None:
    tensors, model = lora(dora=dora), {**MODEL, "model_type": kind}
    adapter = bind(read(save(tmp_path / "a", tensors), model=model), SHAPES, config=model)
    assert set(adapter.sites) == set(LINEAR) and adapter.format == "torchtune"
    for name, site in adapter.sites.items():
        module = NAMES.theirs(name.removesuffix(".weight"))
        a, b = (tensors[f"{module}.lora_{x}.weight"] for x in "ab")
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        turned = heads is not None and not kind.startswith("qwen")
        want = 1.5 * b.double() @ a.double()
        want = halves(want, heads or 1) if turned else want
        got = update(site, torch.zeros(LINEAR[name], dtype=torch.float64))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        if dora:
            norm = tensors[f"{module}.magnitude"]
            assert site.magnitude is not None
            assert torch.equal(site.magnitude, halves(norm, heads or 1) if turned else norm)


def test_without_a_hugging_face_base_names_stay(tmp_path: Path) -> None:
    tensors = lora()
    shapes = {f"{module}.weight": shape for module, shape in THEIRS.items()}
    adapter = bind(read(save(tmp_path / "a", tensors)), shapes)
    assert any("--base" in note for note in adapter.notes)
    write(adapter, tmp_path / "b", format="torchtune")
    again = torch.load(tmp_path / "b" / "adapter_model.pt")
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], t) for n, t in tensors.items())


def test_written_files_have_what_a_recipe_builds(tmp_path: Path) -> None:
    sites = plain().sites
    kept = ("1.mlp.down_proj.weight", "0.self_attn.v_proj.weight")
    some = {name: site for name, site in sites.items() if name.endswith(kept)}
    write(Adapter(some), tmp_path / "a", format="torchtune", model=MODEL)
    tensors = torch.load(tmp_path / "a" / "adapter_model.pt")
    want = {m for m in THEIRS if m.rpartition(".")[2] in ("v_proj", "w1", "w2", "w3")}
    assert {key.removesuffix(".lora_a.weight") for key in tensors if "lora_a" in key} == want
    for module in want:
        shape = tensors[f"{module}.lora_b.weight"].shape[0], tensors[f"{module}.lora_a.weight"].shape[1]
        assert shape == THEIRS[module]
    yaml = pytest.importorskip("yaml")
    settings = yaml.safe_load((tmp_path / "a" / "torchtune_config.yaml").read_text())["model"]
    assert settings == {
        "lora_attn_modules": ["v_proj"], "apply_lora_to_mlp": True, "apply_lora_to_output": False,
        "lora_rank": 2, "lora_alpha": 4, "use_dora": False,
    }  # fmt: skip
    back = read(tmp_path / "a", model=MODEL)
    assert set(back.sites) == set(some) and any("not adapted" in note for note in back.notes)


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        (None, {}, "--alpha"),
        (RECIPE, {"alpha": 16.0}, "leave --alpha"),
        (RECIPE.replace("rank: 2", "rank: 4"), {}, "of rank 2, its settings say 4"),
        (RECIPE.replace("rank: 2", "rank: x"), {}, "whole number, got 'x'"),
        (RECIPE, {"model": {**MODEL, "model_type": "phi3"}}, "'phi3' is not known.*llama"),
        (RECIPE, {"model": {**MODEL, "num_attention_heads": 5}}, "not 5 heads"),
    ],
)
def test_what_must_be_told(recipe: str | None, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a", lora(), recipe)
    with pytest.raises(FormatError, match=said):
        read(path, **{"model": MODEL, **options})


def test_a_recipe_of_any_name_and_alpha_by_hand(tmp_path: Path) -> None:
    path = save(tmp_path / "a", lora(), None)
    (tmp_path / "8B_lora.yaml").write_text(RECIPE)
    one = read(path, model=MODEL, config=tmp_path / "8B_lora.yaml")
    other = read(path, model=MODEL, alpha=3.0)
    assert_same_update(*(bind(x, SHAPES, config=MODEL) for x in (one, other)), rounded=False)
    assert tmp_path / "8B_lora.yaml" in one.files


def test_faults_are_named(tmp_path: Path) -> None:
    tensors = lora(dora=True)
    del tensors["layers.0.attn.q_proj.lora_b.weight"], tensors["layers.0.attn.k_proj.lora_a.weight"]
    tensors["layers.0.attn.v_proj.lora_b.weight"] = torch.ones(16, 3)
    tensors["layers.1.attn.v_proj.magnitude"] = torch.ones(3)
    tensors["decoder.layers.0.attn.q_proj.lora_a.weight"] = torch.ones(2, 2)
    tensors["norm.scale"] = torch.ones(2)
    with pytest.raises(FormatError) as refused:
        read(save(tmp_path / "a", tensors), model=MODEL)
    for said in (
        "q_proj.lora_a.weight has no lora_b",
        "k_proj.lora_b.weight: its lora_a is missing",
        "v_proj: lora_a [2, 16] and lora_b [16, 3]",
        "magnitude [3] is not one for each of 16 rows",
        "decoder.layers.0.attn.q_proj.lora_a.weight: not a module of",
        "norm.scale: not a tensor of",
    ):
        assert said in str(refused.value)


def test_losses_name_what_the_base_must_tell() -> None:
    one = TorchtuneFormat()
    assert all("--base BASE" in loss.why for loss in one.losses(plain(), Target()))
    assert all(
        "'t5'" in loss.why for loss in one.losses(plain(), Target(None, {**MODEL, "model_type": "t5"}))
    )
    model = {**MODEL, "num_key_value_heads": 5}
    assert {loss.name.split(".")[-2] for loss in one.losses(plain(), Target(None, model))} == {"k_proj"}


def their(name: str) -> ModuleType:
    """One of torchtune's modules, alone: the package itself wants torchao and more."""
    package = importlib.util.find_spec("torchtune")
    if package is None or package.origin is None:
        pytest.skip("torchtune is not installed")
    spec = importlib.util.spec_from_file_location("torchtune_alone", Path(package.origin).parent / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SIZES = {"num_heads": 4, "num_kv_heads": 2, "dim": 16, "head_dim": 8}


@pytest.mark.parametrize("dora", [False, True])
def test_torchtunes_own_merge_and_conversion(dora: bool, tmp_path: Path) -> None:
    convert, merge = their("models/convert_weights.py"), their("modules/peft/_utils.py")
    tensors = lora(dora=dora)
    weights = {f"{module}.weight": torch.randn(shape) for module, shape in THEIRS.items()}
    base = convert.tune_to_hf(weights, **SIZES)
    whole = {name: tensor.clone() for name, tensor in {**weights, **tensors}.items()}
    want = convert.tune_to_hf(merge.get_merged_lora_ckpt(whole, rank=2, alpha=3), **SIZES)
    adapter = bind(read(save(tmp_path / "a", tensors), model=MODEL), SHAPES, config=MODEL)
    got = reference(adapter, base)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor.double(), rtol=1e-5, atol=1e-5)


def exported(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """What torchtune's checkpointer leaves: its own file, and beside it the same adapter for PEFT."""
    convert = their("models/convert_weights.py")
    folder.mkdir()
    torch.save(tensors, folder / "adapter_model.pt")
    save_file(convert.tune_to_peft_adapter_weights(tensors, **SIZES), folder / "adapter_model.safetensors")
    modules = ["q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3"]
    about = {"r": 2, "lora_alpha": 3, "target_modules": modules, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(convert.tune_to_peft_adapter_config(about, "a/b")))
    return folder


def test_torchtunes_export_is_read_as_pefts_and_is_the_same(tmp_path: Path) -> None:
    path = exported(tmp_path / "a", lora())
    found = [bind(read(one, model=MODEL), SHAPES, config=MODEL) for one in (path, path / "adapter_model.pt")]
    assert [one.format for one in found] == ["peft", "torchtune"]
    assert_same_update(*found, rounded=False)


def test_what_torchtunes_export_gets_wrong(tmp_path: Path) -> None:
    """DoRA: the magnitudes keep torchtune's order and use_dora is not said. Qwen: rows that need no turn."""
    path = exported(tmp_path / "a", lora(dora=True))
    with pytest.raises(FormatError, match="use_dora is not set"):
        read(path, model=MODEL)
    assert read(path / "adapter_model.pt", model=MODEL).format == "torchtune"
    path, model = exported(tmp_path / "b", lora()), {**MODEL, "model_type": "qwen2"}
    one, other = (bind(read(p, model=model), SHAPES, config=model) for p in (path, path / "adapter_model.pt"))
    differ = {n.split(".")[-2] for n in LINEAR if not torch.equal(one.sites[n].B, other.sites[n].B)}
    assert differ == {"q_proj", "k_proj"}
