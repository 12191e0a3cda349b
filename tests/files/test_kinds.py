"""What PEFT can put into an adapter, fused into files, against PEFT's own merge and float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from graft.errors import BaseMismatchError
from graft.fuse_files import fuse
from graft.tensors import load_file, open_checkpoint
from graft.verify_files import verify

from . import make

#: PEFT, transformers and accelerate warn about their own internals while an adapter is made
pytestmark = pytest.mark.filterwarnings("ignore")


def _check(folder: Path, adapted, **options: object) -> dict[str, torch.Tensor]:
    """Fuse, verify, compare with PEFT's merge in fp32; the fused tensors."""
    fuse(folder / "base", folder / "adapter", folder / "out", **options)  # type: ignore[arg-type]
    verify(folder / "out", folder / "base", folder / "adapter")
    got, want = make.tensors(folder / "out"), make.merged(adapted)
    for name, tensor in got.items():
        torch.testing.assert_close(
            tensor, want[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    return got


LLAMA_CASES = {
    "rank and alpha patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 5},
        "alpha_pattern": {"up_proj": 1.5},
    },
    "rslora": {"target_modules": ["k_proj"], "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "untied head": {"target_modules": ["lm_head", "o_proj"]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "dora embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 0, 95]}},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["k_proj.weight"]},
}


@pytest.mark.parametrize("case", LLAMA_CASES)
def test_llama(case: str, tmp_path: Path) -> None:
    model = make.llama(dtype=torch.float32)
    make.save(model, tmp_path / "base")
    adapted = make.peft(model, tmp_path / "adapter", **LLAMA_CASES[case])
    before = make.tensors(tmp_path / "base")
    after = _check(tmp_path, adapted)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed, "the case must change something"


@pytest.mark.parametrize("fan", [True, False])
def test_conv1d_of_gpt2(tmp_path: Path, fan: bool) -> None:
    model = make.gpt2()
    make.save(model, tmp_path / "base")
    adapted = make.peft(
        model, tmp_path / "adapter", target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=fan
    )
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got, want = make.tensors(tmp_path / "out"), make.merged(adapted)
    assert len(json.loads((tmp_path / "out" / "graft.json").read_text())["changed"]) == 7
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], rtol=2e-5, atol=2e-6)


def test_bias_and_lora_bias(tmp_path: Path) -> None:
    for case, config in {
        "bias": {"bias": "all"},
        "lora_only": {"bias": "lora_only"},
        "lora_bias": {"lora_bias": True},
    }.items():
        folder = tmp_path / case
        model = make.gpt2()
        make.save(model, folder / "base")
        adapted = make.peft(
            model, folder / "adapter", target_modules=["c_attn"], fan_in_fan_out=True, **config
        )
        _check(folder, adapted)
        changed = json.loads((folder / "out" / "graft.json").read_text())["changed"]
        assert "transformer.h.0.attn.c_attn.bias" in changed


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 8, 3)
        self.two = nn.Conv2d(4, 6, (3, 2))
        self.three = nn.Conv3d(2, 5, 2)
        self.embed = nn.Embedding(11, 7)
        self.lin = nn.Linear(7, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions(tmp_path: Path, dora: bool, dtype: torch.dtype) -> None:
    from graft.tensors import save_file

    torch.manual_seed(0)
    model = Convs()
    (tmp_path / "base").mkdir()
    save_file(
        {n: t.detach().to(dtype) for n, t in model.state_dict().items()}, tmp_path / "base/model.safetensors"
    )
    model.load_state_dict({n: t.to(dtype).float() for n, t in model.state_dict().items()})
    adapted = make.peft(
        model, tmp_path / "adapter", target_modules=["one", "two", "three", "lin", "embed"], use_dora=dora
    )
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    verify(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    got, want = make.tensors(tmp_path / "out"), make.merged(adapted)
    for name, tensor in got.items():
        if dtype == torch.float32:
            torch.testing.assert_close(tensor, want[name], rtol=2e-5, atol=2e-6)
        else:
            torch.testing.assert_close(tensor.float(), want[name], rtol=2**-8, atol=1e-6)


def test_dora_is_rounded_once(tmp_path: Path) -> None:
    """bf16 against m·(W + ΔW)/‖W + ΔW‖ in float64."""
    from graft.rounding import round_once

    model = make.llama()
    make.save(model, tmp_path / "base")
    make.peft(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], use_dora=True)
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    base, out = make.tensors(tmp_path / "base"), make.tensors(tmp_path / "out")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for key in held:
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = held[key].double(), held[key.replace("lora_A", "lora_B")].double()
        m = next(
            t for n, t in held.items() if n.startswith(f"base_model.model.{module}.lora_magnitude")
        ).double()
        full = base[f"{module}.weight"].double() + 7 / 3 * (b @ a)
        want = m.view(-1, 1) * full / full.norm(dim=1, keepdim=True)
        assert torch.equal(out[f"{module}.weight"], round_once(want, torch.bfloat16))


def test_the_vocabulary_grows(tmp_path: Path) -> None:
    model = make.llama(dtype=torch.float32)
    make.save(model, tmp_path / "base", max_shard_size=60000)
    model.resize_token_embeddings(103, mean_resizing=False)
    adapted = make.peft(
        model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"grown": true}')
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    _check(tmp_path, adapted)
    out = open_checkpoint(tmp_path / "out")
    assert out.shapes["model.embed_tokens.weight"] == (103, 48) == out.shapes["lm_head.weight"]
    assert out.config["vocab_size"] == 103
    assert "grown" in (tmp_path / "out" / "tokenizer.json").read_text()
    index = out.index["metadata"]
    assert isinstance(index, dict) and index["total_size"] == sum(e.nbytes for e in out.entries.values())
    from transformers import LlamaForCausalLM

    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert again.get_input_embeddings().weight.shape[0] == 103


@pytest.mark.parametrize("both", [False, True])
def test_a_tied_head(tmp_path: Path, both: bool) -> None:
    from transformers import LlamaForCausalLM

    model = make.llama(tied=True, dtype=torch.float32)
    make.save(model, tmp_path / "base")
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "base").entries
    names = ["lm_head", "q_proj", *(["embed_tokens"] if both else [])]
    adapted = make.peft(model, tmp_path / "adapter", target_modules=names)
    ids = torch.arange(8)[None]
    adapted.eval()
    trained = adapted(ids).logits
    with pytest.raises(BaseMismatchError, match="--tied untie"):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "untied", tied="untie")
    verify(tmp_path / "untied", tmp_path / "base", tmp_path / "adapter")
    untied = LlamaForCausalLM.from_pretrained(tmp_path / "untied").eval()
    torch.testing.assert_close(untied(ids).logits, trained, rtol=1e-4, atol=1e-5)
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "shared", tied="shared")
    verify(tmp_path / "shared", tmp_path / "base", tmp_path / "adapter")
    shared = LlamaForCausalLM.from_pretrained(tmp_path / "shared").eval()
    want = make.merged(adapted)
    torch.testing.assert_close(
        shared.state_dict()["lm_head.weight"], want["lm_head.weight"], rtol=2e-5, atol=2e-6
    )


def test_packed_experts_in_files_of_single_ones(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, num_local_experts=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    make.save(model, tmp_path / "base")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in open_checkpoint(tmp_path / "base").entries
    adapted = make.peft(
        model, tmp_path / "adapter", target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    report = fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    verify(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    assert len(report.changed) == 2 * (1 + 3 * 4)
    got = MixtralForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in make.merged(adapted).items():
        torch.testing.assert_close(got[name], tensor, rtol=2e-5, atol=2e-6)


class Lora(nn.Module):
    def __init__(self) -> None:
        import loralib

        super().__init__()
        self.lin = loralib.Linear(12, 10, r=3, lora_alpha=6)
        self.qkv = loralib.MergedLinear(12, 36, r=3, lora_alpha=6, enable_lora=[True, False, True])
        self.emb = loralib.Embedding(20, 8, r=3, lora_alpha=6)
        self.conv = loralib.Conv2d(4, 6, 3, r=3, lora_alpha=6)


def test_loralib(tmp_path: Path) -> None:
    """Against what loralib itself merges into the weights on ``.eval()``."""
    import loralib

    from graft.tensors import save_file

    torch.manual_seed(0)
    model = Lora().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    (tmp_path / "base").mkdir()
    plain = {n: t.detach().clone() for n, t in model.state_dict().items() if "lora_" not in n}
    save_file(plain, tmp_path / "base" / "model.safetensors")
    torch.save(loralib.lora_state_dict(model), tmp_path / "lora.pt")
    switches = {"qkv": [True, False, True]}
    fuse(tmp_path / "base", tmp_path / "lora.pt", tmp_path / "out", alpha=6, enable_lora=switches)
    verify(tmp_path / "out", tmp_path / "base", tmp_path / "lora.pt")
    got = make.tensors(tmp_path / "out")
    model.eval()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=2e-5, atol=2e-6)
        assert torch.equal(tensor, plain[name]) == name.endswith("bias"), name


def test_multihead_attention(tmp_path: Path) -> None:
    """PEFT adds out_proj's update twice in forward; the file says it once, and once it is fused."""
    from graft.rounding import round_once
    from graft.tensors import save_file

    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("attn", nn.MultiheadAttention(12, 3))
    (tmp_path / "base").mkdir()
    plain = {n: t.detach().clone() for n, t in model.state_dict().items()}
    save_file(plain, tmp_path / "base" / "model.safetensors")
    make.peft(model, tmp_path / "adapter", target_modules=["attn"])
    report = fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert any("twice" in note for note in report.notes), report.notes
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    got = make.tensors(tmp_path / "out")
    for name, key in (
        ("attn.in_proj_weight", "attn."),
        ("attn.out_proj.weight", "attn.base_layer.out_proj."),
    ):
        a, b = (held[f"base_model.model.{key}lora_{x}.weight"].double() for x in "AB")
        assert torch.equal(got[name], round_once(plain[name].double() + 7 / 3 * (b @ a), torch.float32))
