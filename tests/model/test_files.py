"""save, load and export of models, against peft's and transformers' own loading."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import graft
from graft.attach import sites

from .kinds import randomise

# peft 0.21 asks transformers 5 for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL: dict[str, Any] = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.tensor([[1, 5, 9, 2], [7, 7, 0, 3]])


def llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, **options))


def gpt2() -> GPT2LMHeadModel:
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=2, n_head=4, **ends))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SMALL, **HEADS, num_local_experts=3))


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(**SMALL, num_attention_heads=4, max_position_embeddings=16)
    )


EXPERTS = ["*.experts.gate_up_proj", "*.experts.down_proj"]
MODELS: dict[str, tuple[Any, list[str]]] = {
    "llama": (llama, ["all-linear"]),
    "llama tied": (lambda: llama(tie_word_embeddings=True), ["q_proj", "embed_tokens"]),
    "gpt2": (gpt2, ["all-linear", "wte"]),
    "mixtral": (mixtral, ["q_proj", *EXPERTS]),
    "bert": (bert, ["all-linear", "word_embeddings"]),
}


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    make, targets = MODELS[name]
    model = make().eval()
    base = copy.deepcopy(model)
    graft.adapt(model, targets, rank=3, alpha=7.0, quiet=True, **options)
    randomise(model, std=0.2)
    return base, model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_loads_with_transformers_and_is_the_fused_model(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, model = build(name)
    model.to(dtype)
    before = copy.deepcopy(model.state_dict())
    graft.export(model, tmp_path / "out", max_shard_size=20_000)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again = type(base).from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(base) and again.dtype == dtype
    with graft.fused(model):
        assert torch.equal(logits(again), logits(model))
        for key, value in again.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_export_names_and_shapes_are_save_pretrained_s(name: str, tmp_path: Path) -> None:
    base, model = build(name)
    base.save_pretrained(tmp_path / "theirs")
    graft.export(model, tmp_path / "ours", max_shard_size=None)
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("ours", "theirs"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {
        p.name for p in (tmp_path / "theirs").iterdir()
    }
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "theirs")]
    assert configs[0] == configs[1]
    if name == "mixtral":
        assert any(".experts.2.w1." in key or ".experts.2.gate_proj." in key for key in ours)


def test_export_shards_dtype_tokenizer_and_a_fused_model(tmp_path: Path) -> None:
    _, model = build("llama")

    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    graft.export(model, tmp_path / "bf16", dtype=torch.bfloat16, tokenizer=Tokenizer(), max_shard_size=4000)
    assert (tmp_path / "bf16" / "tokenizer.json").exists()
    index = json.loads((tmp_path / "bf16" / "model.safetensors.index.json").read_text())
    q = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(q)
    exact = layer.weight.double() + 7 / 3 * (layer.lora_B.double() @ layer.lora_A.double())
    with safe_open(tmp_path / "bf16" / index["weight_map"][f"{q}.weight"], "pt") as file:
        got = file.get_tensor(f"{q}.weight")
    assert torch.equal(got, graft.rounding.round_once(exact.detach(), torch.bfloat16))
    graft.fuse(model)
    graft.export(model, tmp_path / "fused")
    with pytest.raises(graft.StateError, match="would round twice"):
        graft.export(model, tmp_path / "twice", dtype=torch.bfloat16)
    assert not (tmp_path / "twice").exists() and len(list(tmp_path.iterdir())) == 2
    graft.unfuse(model)
    graft.export(model, tmp_path / "again")
    same = [load_file(tmp_path / d / "model.safetensors") for d in ("fused", "again")]
    assert all(torch.equal(v, same[1][k]) for k, v in same[0].items())
    with pytest.raises(graft.OutputError, match="exists"):
        graft.export(model, tmp_path / "again")
    graft.export(model, tmp_path / "again", force=True)


def test_export_of_a_plain_module_and_of_one_without_adapter(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(graft.StateError, match="no adapter"):
        graft.export(model, tmp_path / "out")
    graft.adapt(model, "0", quiet=True)
    randomise(model)
    graft.export(model, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    graft.unadapt(model, keep_fused=True)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_into_the_plain_base(name: str, tmp_path: Path) -> None:
    base, model = build(name)
    graft.save(model, tmp_path / "adapter")
    report = graft.load(base, tmp_path / "adapter", quiet=True)
    assert report.sites == tuple(sites(model))
    assert torch.equal(logits(base), logits(model))
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    randomise(model, seed=11)
    graft.save(model, tmp_path / "second")
    own = [getattr(m, "lora_A", None) for m in base.modules()]
    graft.load(base, tmp_path / "second", quiet=True)
    assert torch.equal(logits(base), logits(model))
    assert all(x is y for x, y in zip(own, (getattr(m, "lora_A", None) for m in base.modules()), strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to:UserWarning"
)  # peft decides it itself and says so
def test_peft_loads_what_is_saved_and_computes_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, _ = MODELS[name]
    model = make().eval()
    base = copy.deepcopy(model)
    graft.adapt(model, "all-linear", rank=3, rslora=True, quiet=True)
    randomise(model, std=0.2)
    graft.save(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["patterns", "modules_to_save", "bias", "embedding", "plain"])
def test_an_adapter_made_by_peft_loads_and_computes_the_same(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = bert().eval()
    options: dict[str, Any] = {
        "patterns": {"rank_pattern": {"query": 5}, "alpha_pattern": {"key": 3}, "use_rslora": True},
        "modules_to_save": {"modules_to_save": ["classifier"]},
        "bias": {"bias": "lora_only"},
        "embedding": {"target_modules": ["word_embeddings", "query"]},
        "plain": {},
    }[kind]
    options = {"target_modules": ["query", "key", "dense"], "r": 4, "lora_alpha": 6, **options}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    graft.load(base, tmp_path / "adapter", quiet=True)
    torch.testing.assert_close(logits(base), logits(theirs), rtol=1e-5, atol=1e-5)
    graft.verify(base, input_ids=IDS)


# peft checks shapes as if a bias had a rank
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")
def test_what_cannot_be_run_in_memory_is_refused_by_name(tmp_path: Path) -> None:
    for option, said in (("use_dora", "DoRA magnitude"), ("lora_bias", "lora_bias")):
        config = peft.LoraConfig(target_modules=["query"], **{option: True})
        peft.get_peft_model(bert(), config).save_pretrained(str(tmp_path / option))
        model = bert()
        with pytest.raises(graft.FormatError, match=rf"(?s){said}.*graft fuse BASE"):
            graft.load(model, tmp_path / option)
        assert not sites(model)


def test_an_adapter_of_another_form_is_refused_or_replaces(tmp_path: Path) -> None:
    base, model = build("llama")
    graft.save(model, tmp_path / "adapter")
    other = copy.deepcopy(base)
    graft.adapt(other, ["q_proj", "embed_tokens"], rank=2, quiet=True)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(graft.BaseMismatchError) as error:
        graft.load(other, tmp_path / "adapter")
    for said in (
        "rank 2 in the model, 3 in the file",
        "embed_tokens.weight is adapted in the model",
        "replace=",
    ):
        assert said in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    graft.fuse(other)
    graft.load(other, tmp_path / "adapter", replace=True, quiet=True)
    assert torch.equal(logits(other), logits(model))
    graft.fuse(other)
    with pytest.raises(graft.BaseMismatchError, match=r"fused; call graft\.unfuse"):
        graft.load(other, tmp_path / "adapter")
    graft.unadapt(other)
    assert torch.equal(logits(other), logits(base))


def test_trained_heads_and_biases_travel_with_the_adapter(tmp_path: Path) -> None:
    base, model = build("bert", bias="lora_only", train="classifier")
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and "lora_" not in n:
                p.normal_()
    graft.save(model, tmp_path / "adapter")
    graft.load(base, tmp_path / "adapter", quiet=True)
    assert torch.equal(logits(base), logits(model))


def test_loralib_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    base = copy.deepcopy(model)
    graft.adapt(model, ["0", "1"], rank=2, alpha=5.0, quiet=True)
    randomise(model)
    graft.save(model, tmp_path / "lora.pt", format="loralib", trained=False)
    graft.load(base, tmp_path / "lora.pt", alpha=5.0, quiet=True)
    x = torch.randn(3, 6)
    assert torch.equal(base(x), model(x))


def test_export_of_weights_that_are_not_here_leaves_nothing(tmp_path: Path) -> None:
    model = nn.Linear(4, 4, device="meta")
    graft.adapt(model, "weight", quiet=True)
    with pytest.raises(graft.StateError, match="not here in full"):
        graft.export(model, tmp_path / "out")
    with pytest.raises(graft.StateError, match="meta device"):
        graft.fuse(model)
    assert not list(tmp_path.iterdir())
