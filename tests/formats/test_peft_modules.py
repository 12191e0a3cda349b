"""PEFT as the oracle: whatever it saves for its module kinds, Graft reads as the same ΔW, and writes back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graft.formats import write

from . import peers

CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": peers.ALL},
    "one rank": {"target_modules": ["wide"], "r": 1, "lora_alpha": 1},
    "rank above the dimensions": {"target_modules": ["wide", "head"], "r": 31, "lora_alpha": 7.5},
    "rank_pattern": {"target_modules": peers.ALL, "rank_pattern": {"wide": 5, "^head": 1, "conv.": 4}},
    "alpha_pattern": {
        "target_modules": peers.ALL,
        "alpha_pattern": {"w.*": 2.5, "wide": 9, "embed_tokens": 3},
    },
    "both": {
        "target_modules": peers.ALL,
        "rank_pattern": {"wide|head": 7},
        "alpha_pattern": {"head": 1, "conv[12]": 11},
    },
    "rsLoRA": {"target_modules": peers.ALL, "use_rslora": True, "rank_pattern": {"square": 6}},
    "DoRA": {"target_modules": [*peers.ALL], "use_dora": True},
    "lora_bias": {"target_modules": ["wide", "conv1", "conv2", "head"], "lora_bias": True},
    "bias all": {"target_modules": ["wide"], "bias": "all"},
    "bias lora_only": {"target_modules": ["wide", "conv2"], "bias": "lora_only"},
    "modules_to_save": {"target_modules": ["wide"], "modules_to_save": ["head", "conv3"]},
    "trainable tokens": {"target_modules": ["wide"], "trainable_token_indices": {"embed_tokens": [3, 0, 22]}},
    "every module": {"target_modules": "all-linear"},
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def base(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(7)
    return peers.Net().to(request.param)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_reads_what_peft_saves(base: nn.Module, settings: dict[str, Any], tmp_path: Path) -> None:
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    wrapped = peers.adapted(copy.deepcopy(base).float(), **settings)
    adapter = peers.bound(peers.save(wrapped, tmp_path / "a"), weights)
    peers.assert_exact(adapter, weights)
    wide = {name: w.float() for name, w in weights.items()}
    if settings.get("bias") or settings.get("modules_to_save"):
        assert adapter.replace
    peers.assert_like(peers.merged(wrapped), adapter, wide)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_peft_loads_what_is_written(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(7)
    base = peers.Net()
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    wrapped = peers.adapted(copy.deepcopy(base), **settings)
    adapter = peers.bound(peers.save(wrapped, tmp_path / "a"), weights)
    assert write(adapter, tmp_path / "b") == []
    peers.assert_same(peers.bound(tmp_path / "b", weights), adapter)
    ids = torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(1))
    again = peers.load(base, tmp_path / "b")
    torch.testing.assert_close(again(ids), wrapped(ids), rtol=1e-5, atol=1e-5)
    peers.assert_like(peers.merged(again), adapter, weights)


def test_bin_files_are_read(tmp_path: Path) -> None:
    base = peers.Net()
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    wrapped = peers.adapted(base, target_modules=["wide", "embed_tokens"])
    peers.save(wrapped, tmp_path / "s")
    peers.save(wrapped, tmp_path / "b", safe_serialization=False)
    assert not (tmp_path / "b" / "adapter_model.safetensors").exists()
    peers.assert_same(peers.bound(tmp_path / "b", weights), peers.bound(tmp_path / "s", weights))


def test_grouped_convolution_is_refused(tmp_path: Path) -> None:
    from graft.errors import FormatError

    net = nn.ModuleDict({"c": nn.Conv2d(8, 8, 3, groups=4)})
    wrapped = peers.adapted(net, target_modules=["c"], r=4)
    with pytest.raises(FormatError, match="grouped convolution"):
        peers.bound(peers.save(wrapped, tmp_path / "a"), dict(net.named_parameters()))
