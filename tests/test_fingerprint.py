"""An adapter that Graft saved knows its base, by file and in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graft
from graft.errors import BaseMismatchError
from graft.fingerprint import METADATA_KEY, check, fingerprint, loads, rounded
from graft.fuse_files import fuse
from graft.tensors import metadata, write_shards


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def base_of(model: nn.Module, folder: Path) -> Path:
    folder.mkdir()
    items = [(n, tuple(t.shape), t.dtype, lambda t=t: t.detach()) for n, t in model.state_dict().items()]
    write_shards(folder, items, max_shard_size=10**9, metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, another base of the same shapes, and an adapter of the first."""
    torch.manual_seed(0)
    model, other = Net(), Net()
    one, two = base_of(model, tmp_path / "one"), base_of(other, tmp_path / "two")
    graft.adapt(model, ["up", "down"], rank=2, quiet=True)
    nn.init.normal_(model.up.lora_B)
    graft.save(model, tmp_path / "adapter")
    return one, two, tmp_path / "adapter"


def test_the_right_base_is_fused(saved: tuple[Path, Path, Path], tmp_path: Path) -> None:
    fuse(saved[0], saved[2], tmp_path / "out")
    told = loads(metadata(saved[2] / "adapter_model.safetensors"))
    assert set(told) == {"up.weight", "down.weight"}


def test_another_base_of_the_same_shapes_is_refused_by_name(
    saved: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(graft.GraftError, match=r"another base:\n  - (up|down)\.weight(.|\n)*--other-base"):
        fuse(saved[1], saved[2], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fuse(saved[1], saved[2], tmp_path / "out", other_base=True)


def test_another_base_is_refused_in_memory(saved: tuple[Path, Path, Path]) -> None:
    with pytest.raises(graft.GraftError, match="another base"):
        graft.load(Net(), saved[2], quiet=True)
    graft.load(Net(), saved[2], other_base=True, quiet=True)


def test_a_fused_model_is_not_taken_for_another_base(saved: tuple[Path, Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    graft.load(model, saved[2], quiet=True)
    graft.fuse(model)
    graft.save(model, tmp_path / "again")
    assert loads(metadata(tmp_path / "again" / "adapter_model.safetensors")) == {}


def test_broken_metadata_is_no_fingerprint() -> None:
    assert loads({METADATA_KEY: "{"}) == loads({METADATA_KEY: "[1]"}) == loads({}) == {}


def test_a_fingerprint_sees_dtype_and_numbers_not_strides() -> None:
    w = torch.randn(40, 30)
    assert fingerprint(w) == fingerprint(w.T.contiguous().T)
    assert fingerprint(w) != fingerprint(w.bfloat16()) != fingerprint(w.half())
    changed = w.clone()
    changed[0, 0] += 1
    assert fingerprint(w) != fingerprint(changed)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_weight_that_was_widened_for_training_is_its_base_s_still(half: torch.dtype) -> None:
    """A trainer's float32 copy of half-precision weights: the first 16 KiB of its rounding are the base's."""
    base = torch.randn(300, 70).to(half)
    told = {"w": rounded(base.float().flatten()[:16384])}
    check(told, lambda _: base)
    check(told, lambda _: base.float())
    check({"w": rounded(base.flatten()[:16384])}, lambda _: base.float())  # not compared: no rounding is told
    for other in (base, base.float()):
        changed = other.clone()
        changed[0, 5] += 1
        with pytest.raises(BaseMismatchError, match="w holds other numbers"):
            check(told, lambda _, changed=changed: changed)
