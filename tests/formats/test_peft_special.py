"""PEFT's special storages: GPT-2's Conv1D, MultiheadAttention, packed parameters, embeddings saved whole."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from graft.bind import bind
from graft.errors import BaseMismatchError, FormatError
from graft.formats import read, write

from . import peers


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not ...:
            config[key] = value
    path.write_text(json.dumps(config))
    return folder


def gpt2(width: int = 16) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=31, n_positions=8, n_embd=width, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("said", [True, False, ...], ids=["true", "false", "absent"])
def test_conv1d_is_told_by_shape_and_model_type(said: Any, tmp_path: Path) -> None:
    model = gpt2()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = peers.adapted(model, target_modules=["c_attn", "c_proj", "c_fc", "wte"], fan_in_fan_out=True)
    folder = edit(peers.save(wrapped, tmp_path / "a", save_embedding_layers=False), fan_in_fan_out=said)
    adapter = peers.bound(folder, weights, config={"model_type": "gpt2"})
    square = adapter.sites["transformer.h.0.attn.c_proj.weight"]
    assert square.layout is not None and square.layout.pattern == "i o" and square.shape == (16, 16)
    peers.assert_exact(adapter, weights)
    peers.assert_like(peers.merged(wrapped), adapter, weights)


def test_square_weight_that_nobody_explains_is_refused(tmp_path: Path) -> None:
    net = nn.ModuleDict({"c_proj": nn.Linear(8, 8)})
    weights = dict(net.named_parameters())
    folder = edit(
        peers.save(peers.adapted(net, target_modules=["c_proj"]), tmp_path / "a"), fan_in_fan_out=...
    )
    with pytest.raises(BaseMismatchError, match="square"):
        peers.bound(folder, weights)
    layouts = {
        said: peers.bound(folder, weights, transposed=lambda _, said=said: said).sites["c_proj.weight"].layout
        for said in (True, False)
    }
    assert (
        layouts[True]
        and layouts[False]
        and layouts[True].pattern == "i o"
        and layouts[False].pattern == "o i"
    )


def test_conv1d_adapter_is_loaded_by_peft(tmp_path: Path) -> None:
    model = gpt2()
    wrapped = peers.adapted(copy.deepcopy(model), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    weights = dict(model.named_parameters())
    adapter = peers.bound(peers.save(wrapped, tmp_path / "a"), weights, config={"model_type": "gpt2"})
    assert write(adapter, tmp_path / "b", base_name="some/gpt2") == []
    again = peers.load(model, tmp_path / "b")
    ids = torch.arange(6)[None]
    torch.testing.assert_close(again(ids).logits, wrapped(ids).logits)


def test_fused_blocks_are_written_as_one_exact_pair(tmp_path: Path) -> None:
    """GPT-2's c_attn with q and v adapted (MergedLinear): PEFT's forward on our file is W + ΔW."""
    from graft.adapter import Adapter, LowRank
    from graft.layout import Layout

    model = gpt2()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    name, layout = "transformer.h.1.attn.c_attn.weight", Layout("i (g o)", 3, (0, 2))
    torch.manual_seed(0)
    site = LowRank(torch.randn(4, 16), torch.randn(32, 2), 0.7, layout, shape=(16, 48))
    adapter = Adapter({name: site})
    assert write(adapter, tmp_path / "b") == []
    again = peers.load(model, tmp_path / "b")
    want = {n: w.float() for n, w in peers.reference(adapter, weights).items()}
    got = dict(again.merge_and_unload().named_parameters())
    torch.testing.assert_close(got[name], want[name])
    assert torch.equal(got[name][:, 16:32], weights[name][:, 16:32])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)
        self.out = nn.Linear(12, 5)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_multihead_attention_is_applied_once(lora_bias: bool, tmp_path: Path) -> None:
    net = Attention()
    weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    wrapped = peers.adapted(
        net, target_modules=["attn", "out"], alpha_pattern={"attn": 9}, lora_bias=lora_bias
    )
    adapter = peers.bound(peers.save(wrapped, tmp_path / "a"), weights)
    assert set(adapter.sites) == {"attn.in_proj_weight", "attn.out_proj.weight", "out.weight"}
    assert any("out_proj twice" in note for note in adapter.notes)
    assert adapter.sites["attn.out_proj.weight"].scale == 3.0
    assert set(adapter.shift) == (
        {"attn.in_proj_bias", "attn.out_proj.bias", "out.bias"} if lora_bias else set()
    )
    peers.assert_exact(adapter, weights)
    inner = wrapped.base_model.model.attn
    got = peers.reference(adapter, weights)
    for module, name in ((inner, "attn.in_proj_weight"), (inner.base_layer.out_proj, "attn.out_proj.weight")):
        delta = module.get_delta_weight("default").double()
        torch.testing.assert_close(got[name], weights[name].double() + delta, rtol=1e-5, atol=1e-5)
    notes = write(adapter, tmp_path / "b")
    assert any("twice" in note for note in notes)
    peers.assert_same(peers.bound(tmp_path / "b", weights), adapter)


class Experts(nn.Module):
    def __init__(self, transposed: bool = False, inner: int = 10, hidden: int = 6) -> None:
        super().__init__()
        self.is_transposed = transposed
        shapes = [(4, 2 * inner, hidden), (4, hidden, inner)]
        if transposed:
            shapes = [(e, i, o) for e, o, i in shapes]
        self.gate_up_proj = nn.Parameter(torch.randn(shapes[0]))
        self.down_proj = nn.Parameter(torch.randn(shapes[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        h = x @ up
        return (h[..., ::2] * h[..., 1::2]) @ down


class Moe(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": Experts(**options)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["experts"](self.proj(x))
        return x


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"layers.0.experts.gate_up_proj": 8}},
        {"alpha_pattern": {"down_proj": 8}, "use_rslora": True},
    ],
    ids=["uniform", "ranks", "alphas"],
)
def test_packed_experts(transposed: bool, patterns: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = Moe(transposed=transposed)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = peers.adapted(
        copy.deepcopy(model),
        target_modules=["proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        **patterns,
    )
    adapter = peers.bound(peers.save(wrapped, tmp_path / "a"), weights)
    assert set(adapter.sites) == {n for n in weights if n != "proj.bias"}
    peers.assert_exact(adapter, weights)
    x = torch.randn(4, 3, 6)
    write(adapter, tmp_path / "b")
    peers.assert_same(peers.bound(tmp_path / "b", weights), adapter)
    again = peers.load(model, tmp_path / "b")
    torch.testing.assert_close(again(x), wrapped(x), rtol=1e-4, atol=1e-4)
    peers.assert_like(peers.merged(wrapped), adapter, weights)


def test_one_packed_parameter_and_a_linear_weight_by_name(tmp_path: Path) -> None:
    model = Moe()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = peers.adapted(model, target_modules=[], target_parameters=["experts.down_proj", "proj.weight"])
    adapter = peers.bound(peers.save(wrapped, tmp_path / "a"), weights)
    assert set(adapter.sites) == {
        "proj.weight", "layers.0.experts.down_proj", "layers.1.experts.down_proj"
    }  # fmt: skip
    peers.assert_like(peers.merged(wrapped), adapter, weights)


def test_square_experts_need_a_witness(tmp_path: Path) -> None:
    """Square experts: old PEFT always read [E, in, out]; the new one asks the module."""
    model = Moe(inner=6)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = peers.adapted(model, target_modules=[], target_parameters=["experts.down_proj"])
    folder = peers.save(wrapped, tmp_path / "a")
    with pytest.raises(BaseMismatchError, match="square"):
        peers.bound(folder, weights)
    want = peers.merged(wrapped)
    adapter = peers.bound(folder, weights, config={"model_type": "mixtral"})
    peers.assert_like(want, adapter, weights)
    edit(folder, peft_version="0.18.1")
    old = peers.bound(folder, weights, config={"model_type": "mixtral"})
    site = old.sites["layers.0.experts.down_proj"]
    assert site.layout is not None and site.layout.pattern == "g i o"


def test_swapped_dialect_of_old_peft(tmp_path: Path) -> None:
    """A file of PEFT ≤ 0.18.1 for [E, out, in]: in and out swapped, and still the same sum as it made."""
    model = Moe(transposed=True)  # 0.21's unswapped arithmetic on this shape is what 0.18 did on every shape
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = peers.adapted(model, target_modules=[], target_parameters=["experts.gate_up_proj"])
    folder = edit(peers.save(wrapped, tmp_path / "a"), peft_version="0.18.0")
    adapter = peers.bound(folder, weights)
    peers.assert_like(peers.merged(wrapped), adapter, weights)


def test_stacked_experts_of_megatron_bridge_are_refused(tmp_path: Path) -> None:
    """Its newer files hold [E, r, in] and [E, out, r] under PEFT's names, which PEFT itself cannot load."""
    model = Moe()
    wrapped = peers.adapted(model, target_modules=[], target_parameters=["experts.down_proj"])
    folder = peers.save(wrapped, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    stacked = {name: torch.stack([tensor] * 2) for name, tensor in tensors.items()}
    save_file(stacked, folder / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="do not agree on the rank"):
        read(folder)


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_saved_whole_carry_their_update(tied: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = peers.adapted(model, target_modules=["embed_tokens", "q_proj"])
    folder = peers.save(wrapped, tmp_path / "a")
    adapter = peers.bound(folder, weights, config=model.config.to_dict())
    assert "model.embed_tokens.weight" in adapter.replace and "model.embed_tokens.weight" in adapter.sites
    peers.assert_like(peers.merged(wrapped), adapter, weights)
    write(adapter, tmp_path / "b")
    peers.assert_same(peers.bound(tmp_path / "b", weights), adapter)


def test_grown_vocabulary_replaces_both_ends(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=False)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.resize_token_embeddings(33, mean_resizing=False)
    wrapped = peers.adapted(model, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    folder = peers.save(wrapped, tmp_path / "a", save_embedding_layers=True)
    adapter = peers.bound(folder, weights)
    assert {t.shape for t in adapter.replace.values()} == {(33, 16)}
    assert set(adapter.replace) == {"model.embed_tokens.weight", "lm_head.weight"}


def test_vocabulary_that_grows_on_one_side_is_refused(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=False)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.resize_token_embeddings(33, mean_resizing=False)
    folder = peers.save(
        peers.adapted(model, target_modules=["q_proj"], modules_to_save=["embed_tokens"]), tmp_path / "a"
    )
    with pytest.raises(BaseMismatchError, match="grows from 29 to 33 rows"):
        peers.bound(folder, weights)


def test_tied_head_with_the_same_update_is_applied_once(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = peers.adapted(model, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    folder = peers.save(wrapped, tmp_path / "a", save_embedding_layers=False)
    adapter = bind(read(folder), {n: w.shape for n, w in weights.items()})
    assert set(adapter.sites) == {"model.embed_tokens.weight"}
    assert any("tied" in note for note in adapter.notes)


def test_update_of_a_tied_head_alone_is_refused(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    folder = peers.save(
        peers.adapted(model, target_modules=["lm_head"]), tmp_path / "a", save_embedding_layers=False
    )
    with pytest.raises(BaseMismatchError, match="tied to the embedding"):
        peers.bound(folder, weights)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_of_a_language_model(tied: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapped = peers.adapted(copy.deepcopy(model), target_modules=["q_proj"], trainable_token_indices=[5, 1])
    adapter = peers.bound(peers.save(wrapped, tmp_path / "a"), weights)
    assert adapter.rows["model.embed_tokens.weight"][0] == (5, 1)
    peers.assert_like(peers.merged(wrapped), adapter, weights)
    write(adapter, tmp_path / "b")
    again = peers.load(model, tmp_path / "b")
    peers.assert_like(peers.merged(again), adapter, weights)


@pytest.mark.parametrize("suffix", ["default", "my_adapter"])
def test_adapter_names_in_keys(suffix: str, tmp_path: Path) -> None:
    """Lightning and raw state dicts keep the adapter's name in each key."""
    from safetensors.torch import load_file, save_file

    net = peers.Net()
    weights = dict(net.named_parameters())
    wrapped = peers.adapted(
        net, target_modules=["wide", "embed_tokens"], modules_to_save=["head"], lora_bias=False
    )
    folder = peers.save(wrapped, tmp_path / "a")
    want = peers.bound(folder, weights)
    path = folder / "adapter_model.safetensors"
    named = {}
    for key, tensor in load_file(path).items():
        if key.endswith((".lora_A.weight", ".lora_B.weight")):
            key = key.removesuffix("weight") + f"{suffix}.weight"
        elif "lora_embedding" in key:
            key += f".{suffix}"
        elif ".head." in key:
            key = key.replace(".head.", f".head.modules_to_save.{suffix}.")
        named[key] = tensor
    save_file({**named, "base_model.model.head.original_module.bias": torch.zeros(7)}, path)
    peers.assert_same(peers.bound(folder, weights), want)


def test_convolution_of_another_kernel_is_refused(tmp_path: Path) -> None:
    """Six inputs times kernel positions either way: only the kernel's own shape tells them apart."""
    net = nn.ModuleDict({"c": nn.Conv2d(2, 4, (3, 1))})
    folder = peers.save(peers.adapted(net, target_modules=["c"]), tmp_path / "a")
    with pytest.raises(BaseMismatchError, match="shapes differ"):
        bind(read(folder), {"c.weight": (4, 2, 1, 3), "c.bias": (4,)})


def test_lora_bias_needs_a_bias(tmp_path: Path) -> None:
    net = nn.ModuleDict({"c": nn.Linear(4, 6, bias=False)})
    folder = peers.save(peers.adapted(net, target_modules=["c"], lora_bias=True), tmp_path / "a")
    with pytest.raises(BaseMismatchError, match="no bias"):
        bind(read(folder), {"c.weight": (6, 4)})
