"""DeepSpeed-Chat's and -VisualChat's tensors against the documented formula, alone and in a whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graft import fingerprint
from graft.bind import bind
from graft.errors import BaseMismatchError, FormatError
from graft.files.convert import convert
from graft.formats import read, write

from .carrying import LINEAR, SHAPES, plain, update


def lora(rank: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for name, (out, wide) in LINEAR.items():
        module = name.removesuffix(".weight")
        found[f"{module}.lora_right_weight"] = torch.randn(wide, rank)
        found[f"{module}.lora_left_weight"] = torch.randn(rank, out)
    return found


def base() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def test_the_update_is_theirs(tmp_path: Path) -> None:
    """W += lora_scaling / lora_dim · leftᵀ · rightᵀ, as ``fuse_lora_weight`` adds it."""
    tensors = lora()
    torch.save(tensors, tmp_path / "lora.bin")
    adapter = bind(read(tmp_path / "lora.bin", alpha=3.0), SHAPES)
    assert set(adapter.sites) == set(LINEAR) and adapter.format == "deepspeed-chat"
    for name, weight in base().items():
        if name in LINEAR:
            left, right = (tensors[name.replace("weight", f"lora_{x}_weight")] for x in ("left", "right"))
            want = weight + 3.0 / 2 * torch.matmul(left.t(), right.t())
            torch.testing.assert_close(update(adapter.sites[name], weight), want)


def test_the_scaling_is_asked_for(tmp_path: Path) -> None:
    torch.save(lora(), tmp_path / "lora.bin")
    with pytest.raises(FormatError, match=r"lora_scaling used in training with --alpha"):
        read(tmp_path / "lora.bin")


@pytest.mark.parametrize("nested", [False, True])
def test_a_whole_model_is_compared_with_the_base(nested: bool, tmp_path: Path) -> None:
    state = {**base(), **lora()}
    torch.save({"module": state, "epoch": 3} if nested else state, tmp_path / "model.bin")
    adapter = bind(read(tmp_path / "model.bin", alpha=1.0), SHAPES)
    assert set(adapter.sites) == set(LINEAR) and not adapter.replace
    assert any("fuse_lora_weight" in note for note in adapter.notes)
    fingerprint.check(adapter.base, base().get)
    name = next(iter(LINEAR))
    fused = {**base(), name: base()[name] + 1}
    with pytest.raises(BaseMismatchError, match=name):
        fingerprint.check(adapter.base, fused.get)


def test_the_whole_model_of_another_base_is_refused(tmp_path: Path) -> None:
    torch.save({**base(), **lora(), "extra.weight": torch.ones(3)}, tmp_path / "model.bin")
    with pytest.raises(BaseMismatchError, match=r"extra\.weight"):
        bind(read(tmp_path / "model.bin", alpha=1.0), SHAPES)


def test_what_is_written_says_how_to_load_it(tmp_path: Path) -> None:
    notes = write(plain(scale=0.75, rank=4), tmp_path / "lora.bin", format="deepspeed-chat")
    assert "lora_dim=4, lora_scaling=3)" in notes[0]
    state = torch.load(tmp_path / "lora.bin", weights_only=True)
    assert {name.rpartition(".")[2] for name in state} == {"lora_right_weight", "lora_left_weight"}
    report = convert(tmp_path / "lora.bin", tmp_path / "b.bin", to="deepspeed-chat", alpha=3.0)
    assert report.needs == {"alpha": 3.0}


def test_faults_are_named(tmp_path: Path) -> None:
    tensors = lora()
    name = next(iter(LINEAR)).removesuffix(".weight")
    other = list(LINEAR)[1].removesuffix(".weight")
    del tensors[f"{name}.lora_left_weight"]
    tensors[f"{other}.lora_left_weight"] = torch.ones(3, 16)
    tensors["odd"] = torch.ones(1)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(FormatError) as refused:
        read(tmp_path / "lora.safetensors", alpha=1)
    for said in (
        f"{name}.lora_right_weight: it has no lora_left_weight",
        "not of one rank",
        "odd: not a tensor",
    ):
        assert said in str(refused.value)
