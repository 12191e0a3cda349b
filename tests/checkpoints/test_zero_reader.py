"""The reader against DeepSpeed's own converter and the engine's own weights, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graft.formats.stored import Piece, Stored, gather
from graft.formats.zero_checkpoint import open_zero_checkpoint

pytestmark = pytest.mark.dist

TWO = [
    "odd-1-bf16", "odd-2-bf16", "odd-3-bf16", "odd-1-fp32", "odd-3-fp32", "odd-2-lean", "odd-3-lean",
    "groups-3", "fp16-2", "fp16-3", "robin-2", "offload-3",
    "peft-1", "peft-3", "peft-3-lean", "peft-3-more", "graft-2", "graft-3", "lightning-2", "lightning-3",
]  # fmt: skip


def find(folder: Path, name: str, world: int) -> Path:
    return next(p for p in (folder / f"{name}-{world}", folder / f"{name}-{world}.ckpt") if p.is_dir())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("name", TWO)
def test_equals_zero_to_fp32(two: Path, name: str) -> None:
    expected = torch.load(two / f"{name}-2.oracle.pt")
    read = open_zero_checkpoint(find(two, name, 2))
    assert {n for n in expected if n not in read or not same(read[n], expected[n])} == set()
    assert read.world == 2
    extra = read.keys() - expected.keys()
    if read.stage == 1:  # DeepSpeed's converter loses frozen parameters of stage 1 in silence
        assert extra and all(read.stored[n].trained is False for n in extra)
    else:
        assert not extra


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("name", ["odd-2-bf16", "odd-3-bf16", "groups-3"])
def test_other_numbers_of_ranks(written: Callable[[int], Path], name: str, world: int) -> None:
    folder = written(world)
    expected = torch.load(folder / f"{name}-{world}.oracle.pt")
    read = open_zero_checkpoint(folder / f"{name}-{world}")
    assert {n for n in expected if n not in read or not same(read[n], expected[n])} == set()
    assert read.world == world


@pytest.mark.parametrize("name", [*(name for name in TWO if "lightning" not in name), "odd-1-wide", "odd-0"])
def test_rounds_to_the_engines_weights(two: Path, name: str) -> None:
    """Also of checkpoints that DeepSpeed's converter refuses, and with frozen parameters and buffers."""
    weights = torch.load(two / f"{name}-2.engine.pt")
    read = open_zero_checkpoint(two / f"{name}-2")
    held = {n for n in weights if n in read}
    assert {n for n in held if not torch.equal(read[n].to(weights[n].dtype), weights[n])} == set()
    missing = set(weights) - held
    assert bool(missing) == ("lean" in name)
    assert not any(".lora_" in n or n in ("lin.weight", "embed.weight") for n in missing)


def test_groups_are_really_several(two: Path) -> None:
    """A parameter lies across two of a rank's flat buffers."""
    read = open_zero_checkpoint(two / "groups-3-2")
    owners = {piece.flat.data_ptr() for one in read.stored.values() if one.trained for piece in one.pieces()}
    assert len(owners) > 4


def test_what_was_trained_is_told(two: Path) -> None:
    read = open_zero_checkpoint(two / "odd-3-bf16-2")
    trained = {name for name, one in read.stored.items() if one.trained}
    assert trained == {
        "embed.weight",
        "lin.weight",
        "lin.bias",
        "gain",
        "norm.weight",
        "norm.bias",
        "head.weight",
    }
    assert read["shift"].dtype == torch.float32 and read["count"].dtype == torch.int64
    assert {read[name].dtype for name in trained} == {torch.float32}
    assert read["frozen.weight"].dtype == torch.bfloat16


def test_a_tag_can_be_named(two: Path) -> None:
    root = two / "odd-3-bf16-2"
    latest, first = open_zero_checkpoint(root), open_zero_checkpoint(root, tag="global_step1")
    assert latest.folder.name == "global_step2"
    assert not torch.equal(latest["lin.weight"], first["lin.weight"])
    assert torch.equal(open_zero_checkpoint(first.folder)["lin.weight"], first["lin.weight"])


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"deepspeed", "lightning", "peft", "transformers"}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
from pathlib import Path
from graft.formats.zero_checkpoint import open_zero_checkpoint
print(sum(t.numel() for t in open_zero_checkpoint(Path(sys.argv[1])).values()))
"""


def test_needs_neither_deepspeed_nor_lightning(two: Path) -> None:
    path = two / "lightning-2-2.ckpt"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLOCKED, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    expected = sum(t.numel() for t in torch.load(two / "lightning-2-2.oracle.pt").values())
    assert done.stdout.strip() == str(expected), done.stderr


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_any_range_of_any_tensor(two: Path, data: st.DataObject) -> None:
    read = open_zero_checkpoint(two / "odd-3-bf16-2")
    name = data.draw(st.sampled_from(sorted(read)))
    whole = read[name].reshape(-1)
    first = data.draw(st.integers(0, whole.numel()))
    count = data.draw(st.integers(0, whole.numel() - first))
    into = torch.empty(count, dtype=whole.dtype)
    read.stored[name].read(first, into)
    assert torch.equal(into, whole[first : first + count])


def test_large_adapters_are_gathered_into_a_file() -> None:
    flat = torch.arange(3 << 20, dtype=torch.float32)
    parts = [Piece(flat, 0, 1 << 20), Piece(flat, 1 << 20, 2 << 20)]
    one = Stored((3, 1 << 20), torch.float32, lambda: parts)
    small = Stored.of(torch.ones(3, dtype=torch.bfloat16))
    found = gather({"a": one, "b": small, "c": one})
    assert torch.equal(found["a"], flat.view(3, -1)) and torch.equal(found["c"], found["a"])
    assert torch.equal(found["b"], torch.ones(3, dtype=torch.bfloat16))
    assert found["a"].untyped_storage().data_ptr() == found["c"].untyped_storage().data_ptr()
