"""The portable form against PEFT itself: one rank, one alpha, and the same merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from graft.adapter import Adapter
from graft.bind import bind
from graft.errors import FormatError
from graft.files.convert import convert
from graft.formats import SERVERS, Target, read, written

from . import peers


def wide(tmp_path: Path, **settings: object) -> tuple[peers.Net, Adapter, Path]:
    torch.manual_seed(0)
    net = peers.Net()
    base = {name: p.detach().clone() for name, p in net.named_parameters()}
    options = {
        "target_modules": ["wide", "square", "head"],
        "rank_pattern": {"wide": 5},
        "alpha_pattern": {"head": 7},
        **settings,
    }
    path = peers.save(peers.adapted(net, **options), tmp_path / "a")
    fresh = peers.Net()
    fresh.load_state_dict(base)
    return fresh, peers.bound(path, base), path


def test_peft_loads_it_with_uniform_settings(tmp_path: Path) -> None:
    net, adapter, _ = wide(tmp_path)
    base = {name: p.detach().clone() for name, p in net.named_parameters()}
    done = written(adapter, tmp_path / "b", SERVERS["vllm"], Target())
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 5, False)
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["modules_to_save"]
    assert any("rounded once" in note for note in done.notes)  # 5 / 3 has no exact quotient
    peers.assert_like(peers.merged(peers.load(net, tmp_path / "b")), adapter, base)


def test_what_servers_do_not_take_is_refused_or_left_out(tmp_path: Path) -> None:
    _, _, path = wide(
        tmp_path, use_dora=True, modules_to_save=["conv1"], target_modules=["wide", "embed_tokens"]
    )
    base = peers.Net()
    from graft.tensors import save_file

    folder = tmp_path / "base"
    folder.mkdir()
    save_file(dict(base.named_parameters()), folder / "model.safetensors")
    with pytest.raises(FormatError, match="vllm cannot hold") as refused:
        convert(path, tmp_path / "b", serve="vllm", base=folder)
    for said in ("embed_tokens.weight", "conv1.weight", "conv1.bias", "DoRA"):
        assert said in str(refused.value)
    report = convert(path, tmp_path / "b", serve="vllm", base=folder, accept_loss=True)
    assert report.written_as == "vllm" and sum(note.startswith("lost: ") for note in report.notes) == 4
    back = bind(read(tmp_path / "b"), {n: tuple(p.shape) for n, p in base.named_parameters()})
    assert set(back.sites) == {"wide.weight"} and back.sites["wide.weight"].scale == 1.0
    assert not back.replace and back.sites["wide.weight"].magnitude is None


def test_for_and_to_exclude_each_other(tmp_path: Path) -> None:
    _, _, path = wide(tmp_path)
    with pytest.raises(FormatError, match="leave --to loralib out"):
        convert(path, tmp_path / "b", serve="vllm", to="loralib")
    with pytest.raises(FormatError, match="unknown server 'x'"):
        convert(path, tmp_path / "b", serve="x")
