"""loralib as the oracle: its state dicts read as the update that its own eval() adds, and written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from torch import nn

from graft.adapter import Adapter
from graft.errors import BaseMismatchError, FormatError
from graft.formats import read, write

from . import peers

ALPHA, RANK = 5, 3


class Net(nn.Module):
    def __init__(self, enable: list[bool] | None = None, fan: bool = False) -> None:
        super().__init__()
        options: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA}
        self.emb = loralib.Embedding(17, 10, **options)
        self.lin = loralib.Linear(10, 14, **options)
        self.square = loralib.Linear(14, 14, bias=False, **options)
        self.turned = loralib.Linear(14, 9, fan_in_fan_out=True, **options)
        self.conv = loralib.Conv2d(4, 6, 3, **options)
        self.grouped = loralib.Conv2d(4, 6, 3, groups=2, **options)
        self.qkv = loralib.MergedLinear(
            10,
            12,
            enable_lora=[True, True, True] if enable is None else enable,
            fan_in_fan_out=fan,
            **options,
        )
        self.plain = nn.Linear(3, 3)


def saved(net: nn.Module, path: Path, bias: str = "none") -> tuple[peers.Weights, peers.Weights]:
    """Random factors, saved; the base's weights and those that loralib itself makes of them."""
    net.train()
    for name, parameter in net.named_parameters():
        if name.endswith(("lora_A", "lora_B")):
            parameter.data.normal_()
    kept = {
        n: p.detach().clone(memory_format=torch.contiguous_format)
        for n, p in net.named_parameters()
        if ".lora_" not in n
    }
    torch.save(loralib.lora_state_dict(net, bias), path)
    net.eval()
    after = {
        n: p.detach().clone(memory_format=torch.contiguous_format)
        for n, p in net.named_parameters()
        if ".lora_" not in n
    }
    net.train()
    return kept, after


def bound(path: Path, base: peers.Weights, **options: Any) -> Adapter:
    return peers.bound(path, base, alpha=ALPHA, config={"model_type": "bert"}, **options)


@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize(
    "enable",
    [
        [True, True, True],
        [True, False, True],
        [False, True, False],
        [True],
        [True, False],
        [False, False, False, True],
    ],
    ids=str,
)
def test_all_layers(enable: list[bool], fan: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base, want = saved(Net(enable, fan), tmp_path / "lora.pt")
    adapter = bound(tmp_path / "lora.pt", base, enable_lora=enable)
    assert len(adapter.sites) == 7
    peers.assert_exact(adapter, base)
    peers.assert_like(want, adapter, base)


def test_blocks_that_the_file_does_not_name_are_asked_for(tmp_path: Path) -> None:
    base, _ = saved(Net([True, False, True]), tmp_path / "lora.pt")
    with pytest.raises(BaseMismatchError, match="enable_lora"):
        bound(tmp_path / "lora.pt", base)
    full, _ = saved(Net([True, True, True]), tmp_path / "full.pt")
    bound(tmp_path / "full.pt", full)


def test_contradicting_blocks_are_refused(tmp_path: Path) -> None:
    base, _ = saved(Net([True, True, True]), tmp_path / "lora.pt")
    with pytest.raises(FormatError, match="enables 2"):
        bound(tmp_path / "lora.pt", base, enable_lora=[True, False, True])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_replace(bias: str, tmp_path: Path) -> None:
    net = Net()
    base, want = saved(net, tmp_path / "lora.pt", bias)
    changed = {n: w + 1 if n.endswith("bias") else w for n, w in base.items()}
    adapter = bound(tmp_path / "lora.pt", changed)
    assert ("plain.bias" in adapter.replace) == (bias == "all")
    assert torch.equal(adapter.replace["lin.bias"], want["lin.bias"])


def test_alpha_is_asked_for(tmp_path: Path) -> None:
    saved(Net(), tmp_path / "lora.pt")
    with pytest.raises(FormatError, match="--alpha"):
        read(tmp_path / "lora.pt")
    with pytest.raises(FormatError, match="positive"):
        read(tmp_path / "lora.pt", alpha=0)


def test_whole_model_is_refused(tmp_path: Path) -> None:
    net = Net().eval()
    torch.save(net.state_dict(), tmp_path / "all.pt")
    with pytest.raises(FormatError, match="lora_state_dict"):
        read(tmp_path / "all.pt", alpha=ALPHA)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    net = Net()
    state = loralib.lora_state_dict(net)
    del state["lin.lora_B"], state["emb.lora_A"]
    torch.save(state, tmp_path / "half.pt")
    with pytest.raises(FormatError, match=r"emb\.lora_B has no lora_A\n.*lin\.lora_A has no lora_B"):
        read(tmp_path / "half.pt", alpha=ALPHA)


def test_round_trip_through_loralib(tmp_path: Path) -> None:
    """What Graft writes, loralib loads, and its eval() makes the same weights."""
    enable = [True, False, True]
    torch.manual_seed(4)
    net = Net(enable)
    base, want = saved(net, tmp_path / "a.pt")
    adapter = bound(tmp_path / "a.pt", base, enable_lora=enable)
    notes = write(adapter, tmp_path / "b.pt", format="loralib")
    assert any("lora_alpha=5" in note for note in notes)
    assert any("enable_lora=[True, False, True]" in note for note in notes)
    peers.assert_same(bound(tmp_path / "b.pt", base, enable_lora=enable), adapter)
    twin = Net(enable)
    twin.load_state_dict({**net.state_dict(), **torch.load(tmp_path / "b.pt", weights_only=True)})
    twin.eval()
    for name, weight in want.items():
        assert torch.equal(dict(twin.named_parameters())[name], weight), name


def test_loralib_to_peft(tmp_path: Path) -> None:
    """MergedLinear, Embedding and Conv2d become PEFT's modules with the same ΔW."""
    enable = [True, False, True]
    net = Net(enable)
    del net.grouped
    base, want = saved(net, tmp_path / "a.pt")
    adapter = bound(tmp_path / "a.pt", base, enable_lora=enable)
    plain = nn.ModuleDict(
        {
            "emb": nn.Embedding(17, 10), "lin": nn.Linear(10, 14), "square": nn.Linear(14, 14, bias=False),
            "conv": nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3)}), "qkv": nn.Linear(10, 12),
            "plain": nn.Linear(3, 3),
        }
    )  # fmt: skip
    from dataclasses import replace

    sites = {name: site for name, site in adapter.sites.items() if name != "turned.weight"}
    del base["turned.weight"], base["turned.bias"], want["turned.weight"], want["turned.bias"]
    write(replace(adapter, sites=sites), tmp_path / "b")
    plain.load_state_dict(base)
    peers.assert_like(want, replace(adapter, sites=sites), base)
    got = peers.merged(peers.load(plain, tmp_path / "b"))
    for name, weight in want.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=1e-4)


def test_what_loralib_cannot_hold(tmp_path: Path) -> None:
    net = peers.Net()
    weights = dict(net.named_parameters())
    wrapped = peers.adapted(net, target_modules=["wide", "conv2"], alpha_pattern={"wide": 9}, lora_bias=True)
    adapter = peers.bound(peers.save(wrapped, tmp_path / "a"), weights)
    with pytest.raises(FormatError, match=r"conv2\.weight") as error:
        write(adapter, tmp_path / "b.pt", format="loralib")
    assert "wide.bias" in str(error.value) and not (tmp_path / "b.pt").exists()


def test_blocks_of_each_module(tmp_path: Path) -> None:
    base, want = saved(Net([True, False, True]), tmp_path / "lora.pt")
    adapter = bound(tmp_path / "lora.pt", base, enable_lora={"qkv": [True, False, True]})
    peers.assert_like(want, adapter, base)
    with pytest.raises(BaseMismatchError, match="enable"):
        bound(tmp_path / "lora.pt", base, enable_lora={"v": [True, False, True]})


def test_a_kind_that_nobody_tells_is_not_written_for_peft(tmp_path: Path) -> None:
    net = nn.ModuleDict({"x": loralib.Linear(4, 6, r=2, fan_in_fan_out=True)})
    base, _ = saved(net, tmp_path / "a.pt")
    adapter = peers.bound(tmp_path / "a.pt", base, alpha=1)
    assert adapter == peers.bind(adapter, {n: w.shape for n, w in base.items()})
    with pytest.raises(FormatError, match="embedding or stored"):
        write(adapter, tmp_path / "b")


def with_head(net: Net, path: Path) -> tuple[peers.Weights, dict[str, torch.Tensor]]:
    """A file as Microsoft's for GLUE: LoRA, and a head that was trained beside it."""
    base, _ = saved(net, path)
    state = {**loralib.lora_state_dict(net), "plain.weight": torch.randn(3, 3), "plain.bias": torch.randn(3)}
    torch.save(state, path)
    return base, state


def test_a_head_that_was_trained_beside_replaces_the_base_s(tmp_path: Path) -> None:
    base, state = with_head(Net(), tmp_path / "lora.pt")
    adapter = bound(tmp_path / "lora.pt", base)
    assert len(adapter.sites) == 7 and set(adapter.replace) == {"plain.weight", "plain.bias"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter.replace.items())
    assert any("plain.weight" in note for note in adapter.notes)


@pytest.mark.parametrize("leaf", ["lin.weight", "conv.conv.weight"])
def test_a_head_beside_an_adapted_weight_may_be_a_whole_model(leaf: str, tmp_path: Path) -> None:
    net = Net()
    _, state = with_head(net, tmp_path / "lora.pt")
    torch.save({**state, leaf: net.state_dict()[leaf]}, tmp_path / "more.pt")
    with pytest.raises(FormatError, match="whole model"):
        read(tmp_path / "more.pt", alpha=ALPHA)


@pytest.mark.parametrize("key", ["model_state_dict", "model", "state_dict", "module", "lora"])
@pytest.mark.parametrize("start", ["", "module."])
def test_a_state_dict_inside_another_table(key: str, start: str, tmp_path: Path) -> None:
    """As loralib's own GPT-2 example nests it, with DataParallel's prefix; heads and biases are kept."""
    base, state = with_head(Net(), tmp_path / "lora.pt")
    found = {start + name: tensor for name, tensor in state.items()}
    torch.save({key: found, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "nested.pt")
    peers.assert_same(bound(tmp_path / "nested.pt", base), bound(tmp_path / "lora.pt", base))


def test_two_state_dicts_in_one_file_are_refused(tmp_path: Path) -> None:
    _, state = with_head(Net(), tmp_path / "lora.pt")
    torch.save({"model": state, "ema": state}, tmp_path / "two.pt")
    with pytest.raises(FormatError, match="under 2 names, model and ema"):
        read(tmp_path / "two.pt", alpha=ALPHA)
