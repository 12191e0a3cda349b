"""Checkpoints that are not whole, not one, or not safe are refused by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.errors import FormatError
from graft.formats.zero_checkpoint import open_zero_checkpoint

pytestmark = pytest.mark.dist

OPTIM = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"


def remove(name: str) -> Callable[[Path], Any]:
    return lambda tag: (tag / name).unlink()


def copy(source: str, target: str) -> Callable[[Path], Any]:
    return lambda tag: shutil.copyfile(tag / source, tag / target)


def truncate(name: str) -> Callable[[Path], Any]:
    return lambda tag: os.truncate(tag / name, (tag / name).stat().st_size * 2 // 3)


def latest(text: str) -> Callable[[Path], Any]:
    return lambda tag: (tag.parent / "latest").write_text(text)


def put(name: str, value: object) -> Callable[[Path], Any]:
    return lambda tag: torch.save(value, tag / name)


class Evil:
    """Would make a file when a plain pickle is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch graft_was_here",)


class Homely:
    """A class of the training script's own."""


def with_object(name: str, value: object) -> Callable[[Path], Any]:
    def change(tag: Path) -> None:
        states = torch.load(tag / name, weights_only=False)
        torch.save({**states, "extra": value}, tag / name)

    return change


def other_world(tag: Path) -> None:
    for rank in (0, 1):
        path = tag / OPTIM.format(rank)
        states = torch.load(path, weights_only=False)
        states["optimizer_state_dict"]["partition_count"] = 2 + rank
        torch.save(states, path)


Case = tuple[Callable[[Path], Any], tuple[str, ...]]

TAGS = "global_step1, global_step2"
EXPERT = "layer_0_expert_1_mp_rank_00_model_states.pt"
EARLIER = f"../global_step1/{MODEL.format(1)}"

THREE: dict[str, Case] = {
    "a rank's optimizer": (remove(OPTIM.format(1)), ("rank 1's file is missing", OPTIM.format(1))),
    "the first rank's optimizer": (remove(OPTIM.format(0)), ("rank 0's file is missing", OPTIM.format(0))),
    "a rank's model": (remove(MODEL.format(1)), ("rank 1's file is missing", MODEL.format(1))),
    "a rank too many": (copy(OPTIM.format(1), OPTIM.format(2)), ("of rank 2", "had 2 ranks")),
    "two steps": (
        copy(f"../global_step1/{OPTIM.format(1)}", OPTIM.format(1)),
        (OPTIM.format(1), "optimizer step", "(1.0,)", "(2.0,)"),
    ),
    "two steps of the model": (copy(EARLIER, MODEL.format(1)), (MODEL.format(1), "steps")),
    "two worlds": (other_world, ("2 and 3 ranks",)),
    "two files of a rank": (copy(OPTIM.format(1), OPTIM.format(1)[5:]), ("rank 1 has two files",)),
    "tensor parallel": (
        copy(OPTIM.format(0), OPTIM.format(0).replace("mp_rank_00", "mp_rank_01")),
        ("model parallelism", "mp_rank_01"),
    ),
    "experts": (copy(MODEL.format(0), EXPERT), ("experts", "expert_1")),
    "pipeline": (copy(MODEL.format(0), "layer_01-model_00-model_states.pt"), ("pipeline", "layer_01")),
    "stages mixed": (copy(MODEL.format(0), "mp_rank_00_model_states.pt"), ("two runs",)),
    "truncated": (truncate(OPTIM.format(1)), (OPTIM.format(1), "truncated")),
    "truncated model": (truncate(MODEL.format(0)), (MODEL.format(0), "truncated")),
    "empty": (lambda tag: (tag / MODEL.format(0)).write_bytes(b""), (MODEL.format(0), "empty")),
    "evil optimizer": (with_object(OPTIM.format(0), Evil()), (OPTIM.format(0), "Nothing was run")),
    "evil model": (with_object(MODEL.format(1), Evil()), (MODEL.format(1), "Nothing was run")),
    "own class": (with_object(MODEL.format(0), Homely()), (MODEL.format(0), "Homely")),
    "something else": (put(OPTIM.format(1), {"a": torch.ones(2)}), (OPTIM.format(1), "does not hold")),
    "a list": (put(MODEL.format(0), [1, 2]), (MODEL.format(0), "does not hold")),
    "latest leaves": (latest("../elsewhere"), ("latest", "'../elsewhere'")),
    "latest is gone": (latest("global_step9"), ("global_step9", TAGS)),
    "no latest": (lambda tag: (tag.parent / "latest").unlink(), ("no file 'latest'", TAGS)),
    "no optimizer": (
        lambda tag: [(tag / OPTIM.format(rank)).unlink() for rank in (0, 1)],
        ("no optimizer states",),
    ),
    "universal": (
        lambda tag: [(tag / "zero").mkdir(), *((tag / OPTIM.format(rank)).unlink() for rank in (0, 1))],
        ("universal checkpoint", "was made from"),
    ),
}  # fmt: skip

TWO: dict[str, Case] = {
    "a rank": (remove(OPTIM.format(1)), ("rank 1's file is missing",)),
    "the model": (remove("mp_rank_00_model_states.pt"), ("mp_rank_00_model_states.pt", "missing")),
    "the model's step": (
        copy("../global_step1/mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"),
        ("another step", OPTIM.format(0), OPTIM.format(1)),
    ),
    "another model": (
        copy("../../peft-1-2/global_step2/mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"),
        ("two models",),
    ),
}


def refused(source: Path, folder: Path, change: Callable[[Path], Any], said: tuple[str, ...]) -> None:
    shutil.copytree(source, folder / source.name)
    shutil.copytree(source.with_name("peft-1-2"), folder / "peft-1-2")
    change(folder / source.name / "global_step2")
    with pytest.raises(FormatError) as error:
        open_zero_checkpoint(folder / source.name)
    assert all(text in str(error.value) for text in said), str(error.value)


@pytest.mark.parametrize(("change", "said"), THREE.values(), ids=THREE)
def test_stage_3(
    two: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], Any],
    said: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(two / "odd-3-bf16-2", tmp_path, change, said)
    assert not (tmp_path / "graft_was_here").exists()


@pytest.mark.parametrize(("change", "said"), TWO.values(), ids=TWO)
def test_stage_2(two: Path, tmp_path: Path, change: Callable[[Path], Any], said: tuple[str, ...]) -> None:
    refused(two / "odd-2-bf16-2", tmp_path, change, said)
