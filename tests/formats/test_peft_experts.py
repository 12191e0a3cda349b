"""Packed experts of four producers, told apart: each file spelled out by its producer's own definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from graft.bind import bind
from graft.errors import BaseMismatchError, FormatError
from graft.formats import read, write

E, R, ALPHA = 3, 2, 4
MODULE = "model.layers.0.mlp.experts"


class Sizes(NamedTuple):
    """Of gate_up_proj and down_proj: outputs and inputs."""

    gate_up: tuple[int, int]
    down: tuple[int, int]


WIDE, SQUARE = Sizes((10, 6), (6, 5)), Sizes((6, 6), (6, 6))
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # A [E, r, in], B [E, out, r]


def factors(sizes: Sizes) -> Factors:
    torch.manual_seed(0)
    table = {"gate_up_proj": sizes.gate_up, "down_proj": sizes.down}
    return {name: (torch.randn(E, R, i), torch.randn(E, o, R)) for name, (o, i) in table.items()}


def pack(over: torch.Tensor, under: torch.Tensor, by_experts: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A of ``over`` [E, r, n] and lora_B of ``under`` [E, m, r], row by row and column by column."""
    rows = torch.stack([over[e, k] for e in range(E) for k in range(R)])
    order = [(e, k) for e in range(E) for k in range(R)]
    if not by_experts:
        order = [(e, k) for k in range(R) for e in range(E)]
    return rows, torch.stack([under[e, :, k] for e, k in order], dim=1)


BASIC = {
    "task_type": "CAUSAL_LM", "peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "use_dora": False,
    "target_modules": [], "bias": "none", "base_model_name_or_path": "x",
    "target_parameters": [f"{MODULE}.gate_up_proj", f"{MODULE}.down_proj"],
}  # fmt: skip
BRIDGE = {
    **BASIC, "auto_mapping": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "lora_dropout": 0.0, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    "use_rslora": False,
}  # fmt: skip
PEFT = {
    **BRIDGE, "layers_to_transform": None, "layers_pattern": None, "layer_replication": None,
    "megatron_config": None, "megatron_core": "megatron.core", "exclude_modules": None, "revision": None,
    "loftq_config": {}, "lora_bias": False, "eva_config": None, "corda_config": None, "use_qalora": False,
    "qalora_group_size": 16, "trainable_token_indices": None,
}  # fmt: skip


class Producer(NamedTuple):
    """What one of them writes.

    Args:
        over: what A is over for a weight ``[E, out, in]``: its inputs, or its outputs.
        turned: the same for a weight ``[E, in, out]``.
    """

    config: dict[str, Any]
    over: str
    turned: str
    by_experts: bool


PRODUCERS = {
    "peft 0.21": Producer({**PEFT, "peft_version": "0.21.0"}, "in", "in", False),
    "peft 0.18": Producer({**PEFT, "peft_version": "0.18.1"}, "out", "in", False),
    "peft 0.17": Producer(PEFT, "out", "in", False),
    "automodel": Producer(BASIC, "out", "out", False),
    "bridge": Producer(BRIDGE, "out", "out", True),
}


def made(producer: Producer, found: Factors, folder: Path, turned: bool, **changes: Any) -> Path:
    """The files of one module, gate_up_proj inside of down_proj."""
    tensors: dict[str, torch.Tensor] = {}
    for name, inner in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        a, b = found[name]
        straight = (producer.turned if turned else producer.over) == "in"
        over, under = (a, b) if straight else (b.transpose(1, 2), a.transpose(1, 2))
        packed = pack(over, under, producer.by_experts)
        for letter, tensor in zip("AB", packed, strict=True):
            tensors[f"base_model.model.{MODULE}{inner}.lora_{letter}.weight"] = tensor.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {k: v for k, v in {**producer.config, **changes}.items() if v is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def shapes(sizes: Sizes, turned: bool) -> dict[str, tuple[int, ...]]:
    table = {"gate_up_proj": sizes.gate_up, "down_proj": sizes.down}
    return {f"{MODULE}.{n}": (E, i, o) if turned else (E, o, i) for n, (o, i) in table.items()}


def assert_updates(folder: Path, found: Factors, sizes: Sizes, turned: bool, **config: Any) -> None:
    """Every expert's ΔW is α/r · B·A, where the base has it."""
    base = shapes(sizes, turned)
    adapter = bind(read(folder), base, **config)
    assert set(adapter.sites) == set(base)
    for name, shape in base.items():
        a, b = found[name.rpartition(".")[2]]
        want = ALPHA / R * torch.einsum("eor,eri->eoi", b.double(), a.double())
        weight = torch.zeros(shape, dtype=torch.float64).view(-1)
        adapter.sites[name].delta(shape).add(weight, weight)
        got = weight.view(shape)
        torch.testing.assert_close(got.transpose(1, 2) if turned else got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("turned", [False, True], ids=["[E, out, in]", "[E, in, out]"])
@pytest.mark.parametrize("name", PRODUCERS)
def test_each_producers_experts_are_read(name: str, turned: bool, tmp_path: Path) -> None:
    found = factors(WIDE)
    folder = made(PRODUCERS[name], found, tmp_path / "a", turned)
    assert_updates(folder, found, WIDE, turned)
    adapter = bind(read(folder), shapes(WIDE, turned))
    write(adapter, tmp_path / "b")
    assert_updates(tmp_path / "b", found, WIDE, turned)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("name", ["peft 0.21", "peft 0.18", "automodel", "bridge"])
def test_square_experts_are_told_by_the_producer_and_the_model(
    name: str, model_type: str, tmp_path: Path
) -> None:
    turned, found = model_type == "gpt_oss", factors(SQUARE)
    folder = made(PRODUCERS[name], found, tmp_path / "a", turned)
    assert_updates(folder, found, SQUARE, turned, config={"model_type": model_type})
    if name != "peft 0.18":
        with pytest.raises(BaseMismatchError, match="square"):
            bind(read(folder), shapes(SQUARE, turned))


def test_square_experts_without_version_are_refused(tmp_path: Path) -> None:
    folder = made(PRODUCERS["peft 0.17"], factors(SQUARE), tmp_path / "a", False)
    with pytest.raises(FormatError, match=r"square and adapter_config\.json lacks peft_version"):
        read(folder)


@pytest.mark.parametrize("name", ["peft 0.17", "automodel", "bridge"])
def test_fields_of_no_known_producer_are_refused(name: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"megatron_core": ...} if name == "peft 0.17" else {"layers_pattern": None}
    folder = made(PRODUCERS[name], factors(WIDE), tmp_path / "a", False, **changes)
    with pytest.raises(FormatError, match=r"order of its columns is unknown.*peft_version.*0\.17\.1"):
        read(folder)


def test_a_rank_of_one_has_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.formats.test_peft_experts.R", 1)
    found = factors(WIDE)
    changes = {"layers_pattern": None, "r": 1}
    folder = made(PRODUCERS["bridge"], found, tmp_path / "a", False, **changes)
    assert_updates(folder, found, WIDE, False)
