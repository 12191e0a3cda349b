"""mistral-finetune's files: names, the order of q's and k's rows, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft.adapter import Adapter
from graft.bind import bind
from graft.errors import FormatError
from graft.formats import read, write
from graft.formats.mistral import _NAMES  # pyright: ignore[reportPrivateUsage]

from .carrying import LINEAR, MODEL, SHAPES, plain, update

#: Mistral's own shapes of the same decoder
THEIRS = {_NAMES.theirs(name.removesuffix(".weight")) or "": shape for name, shape in LINEAR.items()}


def save(folder: Path, tensors: dict[str, torch.Tensor], params: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "lora.safetensors")
    if params is not None:
        (folder / "params.json").write_text(json.dumps(params))
    return folder


def lora() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for module, (out, wide) in THEIRS.items():
        found[f"{module}.lora_A.weight"] = torch.randn(2, wide)
        found[f"{module}.lora_B.weight"] = torch.randn(out, 2)
    return found


def neighbours(x: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """Mistral's rotation of ``[positions, heads, dim]``: neighbours are one complex number."""
    half = x.shape[-1] // 2
    turns = torch.arange(x.shape[0])[:, None] * theta ** -(torch.arange(half) / half)
    pairs = torch.view_as_complex(x.unflatten(-1, (half, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(turns), turns)[:, None]).flatten(-2)


@pytest.mark.parametrize("layer", range(3))
def test_attention_scores_are_those_of_mistrals_own_rotation(layer: int, tmp_path: Path) -> None:
    """q and k of the update alone, in Mistral's layout and rotation and in transformers': equal scores."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    tensors = lora()
    path = save(tmp_path / "a", tensors, {"lora": {"rank": 2, "scaling": 1.5}})
    adapter = bind(read(path, model=MODEL), SHAPES, config=MODEL)
    x = torch.randn(5, 16)

    def mine(name: str, heads: int) -> torch.Tensor:
        site = adapter.sites[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
        return (x @ update(site, torch.zeros(8 * heads, 16)).T).unflatten(-1, (heads, 8))

    def theirs(name: str, heads: int) -> torch.Tensor:
        a, b = (tensors[f"layers.{layer}.attention.w{name}.lora_{x}.weight"] for x in "AB")
        return (1.5 * x @ a.T @ b.T).unflatten(-1, (heads, 8))

    rotary = LlamaRotaryEmbedding(LlamaConfig(**MODEL))
    cos, sin = rotary(x[None], torch.arange(5)[None])
    q, k = apply_rotary_pos_emb(
        mine("q", 4)[None].transpose(1, 2), mine("k", 2)[None].transpose(1, 2), cos, sin
    )
    got = q[0] @ k[0].repeat_interleave(2, 0).transpose(1, 2)
    q, k = (neighbours(theirs(name, heads)).transpose(0, 1) for name, heads in (("q", 4), ("k", 2)))
    want = q @ k.repeat_interleave(2, 0).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_other_weights_are_renamed_and_norms_replace(tmp_path: Path) -> None:
    tensors = lora()
    norms = {"layers.0.attention_norm.weight": torch.rand(16), "norm.weight": torch.rand(16)}
    path = save(tmp_path / "a", {**tensors, **norms}, {"lora": {"rank": 2, "scaling": 1.5}})
    adapter = read(path, model=MODEL)
    for theirs, ours in (("attention.wo", "self_attn.o_proj"), ("feed_forward.w2", "mlp.down_proj")):
        site = adapter.sites[f"model.layers.1.{ours}.weight"]
        assert torch.equal(site.B, tensors[f"layers.1.{theirs}.lora_B.weight"]) and site.scale == 1.5
    assert set(adapter.sites) == set(LINEAR) and adapter.format == "mistral"
    assert torch.equal(adapter.replace["model.norm.weight"], norms["norm.weight"])
    assert set(adapter.replace) == {"model.layers.0.input_layernorm.weight", "model.norm.weight"}


def test_without_a_hugging_face_base_names_stay(tmp_path: Path) -> None:
    tensors = lora()
    path = save(tmp_path / "a", tensors, {"lora": {"scaling": 2}})
    adapter = bind(read(path), {f"{m}.weight": shape for m, shape in THEIRS.items()})
    assert torch.equal(
        adapter.sites["layers.0.attention.wq.weight"].B, tensors["layers.0.attention.wq.lora_B.weight"]
    )
    assert any("--base" in note for note in adapter.notes)
    write(adapter, tmp_path / "b", format="mistral")
    again = load_file(tmp_path / "b" / "lora.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], t) for n, t in tensors.items())
    assert json.loads((tmp_path / "b" / "params.json").read_text())["lora"]["scaling"] == 2.0


def test_experts() -> None:
    theirs = "layers.3.feed_forward.experts.11.w2"
    ours = "model.layers.3.block_sparse_moe.experts.11.w2"
    assert (_NAMES.ours(theirs), _NAMES.theirs(ours)) == (ours, theirs)
    assert _NAMES.ours("layers.3.feed_forward.gate") is None


def test_writing_needs_the_heads(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"q_proj.*--base") as refused:
        write(plain(), tmp_path / "a", format="mistral")
    assert "v_proj" not in str(refused.value)
    odd = {name: s for name, s in plain().sites.items() if "k_proj" in name}
    with pytest.raises(FormatError, match="not 5 heads"):
        write(Adapter(odd), tmp_path / "a", format="mistral", model={**MODEL, "num_key_value_heads": 5})


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (None, r"params\.json does not say"),
        ({"dim": 1}, "lora.scaling"),
        ({"lora": {"scaling": "2"}}, "--adapter"),
    ],
)
def test_the_scaling_must_be_there(params: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=said):
        read(save(tmp_path / "a", lora(), params))


def test_faults_are_named(tmp_path: Path) -> None:
    tensors = lora()
    del tensors["layers.0.attention.wq.lora_B.weight"], tensors["layers.0.attention.wk.lora_A.weight"]
    tensors["layers.0.attention.wv.lora_B.weight"] = torch.ones(16, 3)
    with pytest.raises(FormatError) as refused:
        read(save(tmp_path / "a", tensors, {"lora": {"scaling": 1}}))
    for said in (
        "wq.lora_A.weight has no lora_B",
        "wk.lora_B.weight: its lora_A",
        "wv: lora_A [2, 16] and lora_B [16, 3]",
    ):
        assert said in str(refused.value)
    with pytest.raises(FormatError, match="5 heads"):
        read(
            save(tmp_path / "b", lora(), {"lora": {"scaling": 1}}), model={**MODEL, "num_attention_heads": 5}
        )


def test_a_model_in_memory_and_its_files_are_fused_alike(tmp_path: Path) -> None:
    """``graft.load`` and ``graft fuse`` both hand the base's config.json to the reader."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import graft
    from graft.fuse_files import fuse
    from graft.tensors import open_checkpoint
    from graft.verify_files import verify

    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**MODEL, tie_word_embeddings=False)).bfloat16()
    model.save_pretrained(tmp_path / "base")
    path = save(tmp_path / "a", lora(), {"lora": {"rank": 2, "scaling": 0.25}})
    report = fuse(tmp_path / "base", path, tmp_path / "fused")
    assert report.format == "mistral" and len(report.changed) == len(LINEAR)
    assert any(
        file.endswith("params.json") for file in verify(tmp_path / "fused", tmp_path / "base", path).files
    )
    graft.load(model, path, quiet=True)
    graft.fuse(model)
    files = open_checkpoint(tmp_path / "fused")
    assert all(torch.equal(files.read(n), p) for n, p in model.named_parameters() if "lora_" not in n)
